"""Native requests that have nothing to compute: they load a model, or end its time in memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import orjson

from manager.wire.translate.native_answer import stamp
from manager.wire.unload import unloads

if TYPE_CHECKING:
    from manager.wire.body import InferenceBody
    from manager.wire.routes import Route

# The field that has to be empty, by route. Source: Ollama 0.24 to 0.33, `server/routes.go`.
_ASKED = {
    "/api/generate": "prompt",
    "/api/chat": "messages",
    "/api/embed": "input",
    "/api/embeddings": "prompt",
}
_EMPTY = re.compile(rb'[ \t\r\n]*(?:null|""|\[[ \t\r\n]*\])[ \t\r\n]*\Z')
_MOST_BYTES = 64


def idle_answer(body: InferenceBody, route: Route, model: str, now_ns: int) -> bytes | None:
    """Return the answer to such a request from a server that loads models by itself; None for any other.

    Nothing is sent to that server: its API has no word for a load. `ollama run` begins with one.

    Args:
        body: the request of the client.
        route: where the client sent it.
        model: the name of the model, as it is to stand in the answer.
        now_ns: the Unix time in nanoseconds.
    """
    field = _ASKED.get(route.path)
    if field is None:
        return None
    asked = body.fields.get(field)
    if asked is not None and _EMPTY.match(memoryview(asked)[:_MOST_BYTES]) is None:
        return None
    if route.path == "/api/embeddings":
        return orjson.dumps({"embedding": []})
    if route.path == "/api/embed":
        return orjson.dumps({"model": model, "embeddings": []})
    said: dict[str, Any] = {"message": {"role": "assistant", "content": ""}}
    if route.path == "/api/generate":
        said = {"response": ""}
    reason = "unload" if unloads(body, route) else "load"
    line = {"model": model, "created_at": stamp(now_ns), **said, "done": True, "done_reason": reason}
    return orjson.dumps(line)
