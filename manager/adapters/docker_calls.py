"""Calls to a container engine: deadlines, refusals and the meaning of answers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

import orjson
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from manager.adapters import docker_answers as answers
from manager.adapters.http_client import HttpClient, plainly
from manager.adapters.tls import SharedTls
from manager.descriptors import lacks_descriptors
from manager.errors import EngineError, EngineUnreachableError, NoDescriptorForEngineError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.adapters.http_client import Answer

T = TypeVar("T")

# The last ten thousand lines of a container, if they are long ones.
_MOST_BYTES = 64 * 2**20
_MOST_KEPT = 8
_NOT_MODIFIED = 304


class EngineCalls:
    """Asks one engine over a few kept connections. Raises `EngineError` and its kin only.

    Args:
        url: `unix:///…`, `tcp://host:port`, `http://host:port` or `https://host:port`.
        timeout_s: the deadline of every call that names none of its own.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url
        self._timeout_s = timeout_s
        # The authorities that the SDK trusts, which talks to the same engine.
        tls = SharedTls(DEFAULT_CA_BUNDLE_PATH).context
        self._client = HttpClient(url, most_bytes=_MOST_BYTES, most_kept=_MOST_KEPT, tls=tls)

    def close(self) -> None:
        """Drop the connections that are kept."""
        self._client.close()

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        """Return the body of the answer.

        Args:
            method: of HTTP.
            path: with the query.
            body: a JSON document.
            timeout_s: the deadline of the whole call.

        Raises:
            EngineError: the engine refused, or cannot be reached.
        """
        return checked(await self.ask(method, path, body=body, timeout_s=timeout_s))

    async def ask(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        timeout_s: float | None = None,
        most_bytes: int | None = None,
    ) -> Answer:
        """Return the answer, whatever its status. The arguments are those of `call` and of `HttpClient`."""
        deadline_s = timeout_s or self._timeout_s
        try:
            async with asyncio.timeout(deadline_s):
                return await self._client.ask(method, path, body, most_bytes=most_bytes)
        except TimeoutError as error:
            raise self.silent(deadline_s) from error
        except OSError as error:
            if lacks_descriptors(error):
                raise NoDescriptorForEngineError from error
            raise EngineUnreachableError(
                f"the container engine at {self.url} cannot be reached ({plainly(error)})"
            ) from error

    def silent(self, deadline_s: float) -> EngineUnreachableError:
        """Return the error of an engine that did not answer in time."""
        return EngineUnreachableError(
            f"the container engine at {self.url} did not answer within {deadline_s:g} s"
        )


def checked(answer: Answer) -> bytes:
    """Return the body of an answer.

    Raises:
        EngineError: its status is a refusal.
    """
    if not 200 <= answer.status < 300 and answer.status != _NOT_MODIFIED:  # noqa: PLR2004
        raise answers.refusal(answer.status, answers.said(answer.body))
    return answer.body


def read(url: str, convert: Callable[[Any], T], raw: bytes) -> T:
    """Return the meaning of an answer.

    Raises:
        EngineError: it is not one of an engine.
    """
    try:
        return convert(orjson.loads(raw))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise EngineError(
            f"unexpected answer of the container engine at {url}: {error!r}",
            reason=Reason.START_FAILED,
        ) from error


def query(**values: str) -> str:
    """Return the query of a path."""
    return urlencode(values)


def filters(**values: str) -> str:
    """Return filters as the engine takes them: each has a list of values."""
    return orjson.dumps({name: [value] for name, value in values.items()}).decode()
