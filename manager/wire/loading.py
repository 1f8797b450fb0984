"""Requests that load a model and do nothing else: no prompt, or no input."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import orjson

from manager.wire.dialect import message_of

if TYPE_CHECKING:
    from collections.abc import Mapping

KeepAlive: TypeAlias = float | str
# Ollama keeps a model for good when the time is negative (`api/types.go`, Duration).
FOREVER = -1

# A duration as Go's time.ParseDuration reads it; without a unit it is none.
_PART = re.compile(r"(\d{1,12}(?:\.\d{0,9})?|\.\d{1,9})(ns|us|\u00b5s|\u03bcs|ms|s|m|h)", re.ASCII)
_DURATION = re.compile(rf"[+-]?(?:0|(?:{_PART.pattern})+)", re.ASCII)
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
_MOST_LENGTH = 64
_BAD_REQUEST = 400
_GENERATE, _EMBED = "/api/generate", "/api/embed"


class LoadAnswer(NamedTuple):
    """The answer to a request to load a model.

    `error` is its error, which a 200 may have in any of its lines. `is_confirmed` is whether the server says
    that it has loaded the model.
    """

    status: int
    error: str | None
    is_confirmed: bool


def duration_s(text: str) -> float | None:
    """Return the seconds of a text that Ollama takes for `keep_alive`; None for another one."""
    if len(text) > _MOST_LENGTH or _DURATION.fullmatch(text) is None:
        return None
    seconds = sum(float(count) * _UNITS_S[unit] for count, unit in _PART.findall(text))
    return -seconds if text.startswith("-") else seconds


def unloads_at_once(keep_alive: KeepAlive) -> bool:
    """Return whether a time to keep a model is none at all."""
    if isinstance(keep_alive, str):
        return not re.search("[1-9]", keep_alive)
    return keep_alive == 0


def load_request(model: str, keep_alive: KeepAlive | None, *, embeds: bool) -> tuple[str, bytes]:
    """Return the path and the body of a request to load a model.

    Args:
        model: its name.
        keep_alive: how long it stays after its last use; None leaves that to the server.
        embeds: the model does nothing but embed. Ollama loads one of those for `/api/embed` alone (0.24 to
            0.33: `server/routes.go` GenerateHandler checks what a model can do before it loads it, and
            EmbedHandler answers an empty input once the model is loaded).
    """
    kept: Mapping[str, object] = {} if keep_alive is None else {"keep_alive": keep_alive}
    if embeds:
        return _EMBED, orjson.dumps({"model": model, "input": [], **kept})
    return _GENERATE, orjson.dumps({"model": model, "stream": False, **kept})


def load_answer(status: int, body: bytes) -> LoadAnswer:
    """Return what a server says of a load: in one document, or in one a line."""
    error, is_confirmed = message_of(body), False
    for line in body.splitlines():
        error = error or message_of(line)
        is_confirmed = is_confirmed or _confirms(line)
    return LoadAnswer(status, error, is_confirmed and error is None)


def only_embeds(answer: LoadAnswer) -> bool:
    """Return whether a load was refused because the model does not generate."""
    return answer.status == _BAD_REQUEST and "does not support generate" in (answer.error or "")


def _confirms(line: bytes) -> bool:
    """Return whether a line ends a load: `done_reason` of `/api/generate`, vectors of `/api/embed`."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return isinstance(document, dict) and (document.get("done_reason") == "load" or "embeddings" in document)
