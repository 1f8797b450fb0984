"""The builds of the models that servers have, by what they say of themselves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson

from manager.domain.models import model_key
from manager.errors import Reason, UnavailableError
from manager.services.ports import Question

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.target import Target
    from manager.services.ports import ModelServer

_OK = 200
_TIMEOUT_S = 10.0
_MOST_LIST_BYTES = 32 * 2**20
# Servers whose last list is remembered.
_MOST_KNOWN = 512


class Digests:
    """Reads the lists of servers. Lives on the event loop; concurrent readings of one server are coalesced.

    Args:
        server: sends the requests.
    """

    def __init__(self, server: ModelServer) -> None:
        self._server = server
        self._known: dict[str, Mapping[str, str]] = {}  # by endpoint, the one that was read last at the end
        self._running: dict[str, asyncio.Task[Mapping[str, str]]] = {}
        self._coming: dict[str, asyncio.Task[Mapping[str, str]]] = {}

    async def at(self, target: Target, model: str) -> str | None:
        """Return the digest of a model as it was at some time before now; None where it is not there.

        Raises:
            UnavailableError: the server was never asked, and does not say now.
        """
        known = self._known.get(target.endpoint)
        if known is None:
            known = await self._read(target)
        return known.get(model_key(model))

    async def now(self, target: Target, model: str) -> str | None:
        """Return the digest of a model; the server is asked after the call has begun.

        Raises:
            UnavailableError: it does not say.
        """
        return (await self._read(target)).get(model_key(model))

    async def _read(self, target: Target) -> Mapping[str, str]:
        """Join a reading that has not begun, or have one begin after the one that goes on."""
        place = target.endpoint
        task = self._coming.get(place)
        if task is None:
            task = self._coming[place] = asyncio.ensure_future(self._after(self._running.get(place), target))
        return await asyncio.shield(task)

    async def _after(self, earlier: asyncio.Task[Any] | None, target: Target) -> Mapping[str, str]:
        if earlier is not None:
            await asyncio.wait({earlier})
        place, task = target.endpoint, asyncio.current_task()
        assert task is not None  # noqa: S101  (this is one)
        del self._coming[place]
        self._running[place] = task
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                found = await self._ask(target)
        except TimeoutError:
            message = f"{target.instance} did not list its models within {_TIMEOUT_S:g} s"
            raise UnavailableError(message, reason=Reason.ATTEMPT_TIMEOUT, instance=target.instance) from None
        finally:
            if self._running.get(place) is task:
                del self._running[place]
        self._known.pop(place, None)
        self._known[place] = found
        if len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]
        return found

    async def _ask(self, target: Target) -> Mapping[str, str]:
        question = Question(target.instance, target.endpoint, "GET", "/api/tags", target.headers)
        content = bytearray()
        async with self._server.ask(question) as answer:
            while piece := await answer.piece():
                content += piece
                if len(content) > _MOST_LIST_BYTES:
                    break
            status = answer.status
        listed = await asyncio.to_thread(_digests, bytes(content)) if status == _OK else None
        if listed is None:
            message = f"{target.instance} does not list its models (status {status})"
            raise UnavailableError(message, reason=Reason.INVALID_OUTPUT, instance=target.instance)
        return listed


def _digests(content: bytes) -> Mapping[str, str] | None:
    try:
        models = orjson.loads(content)["models"]
        entries = [(one["name"], one["digest"]) for one in models]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None
    return {
        model_key(name): digest
        for name, digest in entries
        if isinstance(name, str) and isinstance(digest, str)
    }
