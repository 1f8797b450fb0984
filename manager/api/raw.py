"""The routes of Ollama and OpenAI beside inference, where they pass to the raw server as they came."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote

import msgspec

from manager.api.granted import permit_of
from manager.domain.models import split_pin
from manager.domain.rollout import Stage
from manager.wire.ollama_routes import (
    BLOB_PREFIX,
    MODEL_PREFIX,
    TRANSCRIPTIONS,
    USER_KEY_PREFIX,
    methods_of,
    spoken_at,
)

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

    from manager.api.backend import Passing
    from manager.api.passage import Passage
    from manager.domain.target import Target

_SHOW = "/api/show"
# Below these a path has names and digests, which are nothing to count requests by.
_PREFIXES = (BLOB_PREFIX, MODEL_PREFIX, USER_KEY_PREFIX)
# A request about one model is short. A longer one names no role.
_MOST_LOOKED_AT = 64 * 1024


class _Named(msgspec.Struct):
    """The names in a request about a model."""

    model: str = ""
    name: str = ""


_NAMED = msgspec.json.Decoder(_Named)


class RawPassing:
    """Passes requests on to the raw server, with their whole path, as they came.

    Uploads of recordings are no part of it: they name a model, as other inference does.
    """

    def __init__(self, passing: Passing) -> None:
        self._passing = passing
        self._rollout = passing.routing.rollout

    def may_serve(self, scope: Scope) -> bool:
        """Return whether a request may pass to the raw server in the present stage.

        Of the routes below /v1 the raw server may have more than are known here. None of their paths has an
        escape, which a server could read as another route.
        """
        path = scope["path"]
        if self._rollout.raw is None or path == TRANSCRIPTIONS:
            return False
        if permit_of(scope) is not None:
            return False  # the lists of the raw server are not narrowed to a key, and ours are
        methods = methods_of(path)
        if methods is None:
            return spoken_at(path) is not None and b"%" not in scope["raw_path"]
        return scope["method"] in methods

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> Receive | None:
        """Pass the request on. Return None, or its body where it is about a lane that is managed."""
        stages, target = self._rollout.stages, self._rollout.raw
        assert target is not None  # noqa: S101  (`may_serve` was asked; the stage may change from here on)
        if stages.stage is Stage.LANES:
            path = scope["path"]
            if path.startswith(MODEL_PREFIX):
                name = unquote(scope["raw_path"].decode()).removeprefix(MODEL_PREFIX)
            elif path == _SHOW:
                content, receive = await _looked_at(receive)
                name = _name_in(content)
            else:
                name = ""
            if name and stages.manages(split_pin(name)[0], None):
                return receive
        passage = self._passing.passage(scope, receive, send, _route(scope["path"]), None)
        await self._passing.passages.run(passage, lambda passage: self._pass(passage, target))
        return None

    async def _pass(self, passage: Passage, target: Target) -> None:
        length = passage.body_length
        chunked = any(name == b"transfer-encoding" for name, _ in passage.scope["headers"])
        step = passage.attempting.enter_raw(target)
        if length or chunked:
            pieces = passage.uploaded()
            await passage.pass_on(
                self._passing.server, step, lambda target: passage.question(target, pieces, length)
            )
        else:
            body = await passage.body()  # its end is waited for, so that a client that leaves is seen
            await passage.pass_on(self._passing.server, step, lambda target: passage.question(target, body))


def _route(path: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES if path.startswith(prefix)), None)
    return path if prefix is None else prefix.rstrip("/")


def _name_in(content: bytes) -> str:
    try:
        named = _NAMED.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    return (named.model or named.name).strip()


async def _looked_at(receive: Receive) -> tuple[bytes, Receive]:
    """Return the beginning of a body, and a `receive` that gives all of it."""
    messages: list[Message] = []
    content = b""
    while len(content) <= _MOST_LOOKED_AT:
        message = await receive()
        messages.append(message)
        content += message.get("body", b"")
        if not message.get("more_body", False):
            break
    messages.reverse()

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return content, again
