"""Requests that only unload a model: no prompt, and a `keep_alive` of zero."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from datetime import datetime

    from manager.wire.body import InferenceBody
    from manager.wire.routes import Route

# The field that has to be empty, by route. Source: Ollama 0.24 to 0.33, `server/routes.go`, GenerateHandler
# and ChatHandler: "expire the runner if unload is requested".
_PROMPTS = {"/api/generate": "prompt", "/api/chat": "messages"}
# A number of seconds, or a duration as Go's time.ParseDuration reads it.
_ZERO = re.compile(
    rb"[ \t\r\n]*(?:-?0(?:\.0+)?(?:[eE][+-]?[0-9]+)?"
    rb'|"[+-]?(?:0|(?:0+(?:\.0*)?(?:ns|us|\xc2\xb5s|ms|s|m|h))+)")[ \t\r\n]*\Z'
)
_EMPTY = re.compile(rb'[ \t\r\n]*(?:null|""|\[[ \t\r\n]*\])[ \t\r\n]*\Z')
_MOST_BYTES = 64


def unloads(body: InferenceBody, route: Route) -> bool:
    """Whether a request asks for nothing but the end of a model's time in memory."""
    keep_alive = body.fields.get("keep_alive")
    if keep_alive is None:
        return False
    name = _PROMPTS.get(route.path)
    if name is None or _ZERO.match(memoryview(keep_alive)[:_MOST_BYTES]) is None:
        return False
    prompt = body.fields.get(name)
    return prompt is None or _EMPTY.match(memoryview(prompt)[:_MOST_BYTES]) is not None


def unloaded(route: Route, model: str, at: datetime) -> bytes:
    """Return the answer to such a request where no instance runs, as a server gives it."""
    document: dict[str, Any] = {"model": model, "created_at": at.isoformat().replace("+00:00", "Z")}
    if route.path == "/api/chat":
        document["message"] = {"role": "assistant", "content": ""}
    else:
        document["response"] = ""
    return orjson.dumps({**document, "done": True, "done_reason": "unload"})
