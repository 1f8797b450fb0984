"""The body of an inference request: what is read from it, and what is changed in it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from manager.domain.roles import merged
from manager.wire.routes import Dialect

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from manager.domain.roles import BodyChanges
    from manager.wire.routes import Route

# Longer than any name is. It goes into headers, and is remembered in several places.
_MOST_MODEL_LENGTH = 1024
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")


class BadBodyError(ValueError):
    """The body cannot be understood; the message is for the caller."""


@dataclass(slots=True)
class InferenceBody:
    """A request as it came, the names of its fields in lower case.

    `exact` is whether every server reads the same model from `raw` as is read here.
    """

    raw: bytes
    document: dict[str, Any]
    model: str
    stream: bool
    exact: bool

    def forget(self) -> None:
        """Let go of what may be many megabytes, once it was sent for good."""
        self.raw = b""
        self.document = {}


def read_body(raw: bytes, route: Route) -> InferenceBody:
    """Read an inference request. Only what routing needs is checked; the rest is the server's to judge.

    An empty `model` is returned where none is named: a lane may still name one.

    Raises:
        BadBodyError: it is no JSON object, or a field that is needed here has another type.
    """
    if not raw or raw.isspace():
        raise BadBodyError("missing request body")
    document = parsed(raw)
    if not isinstance(document, dict):
        raise BadBodyError("the request body must be a JSON object")
    # The server takes a field's name in any case, and the last one counts.
    exact = True
    if not all(map(str.islower, document)):
        exact = [key for key in document if key.lower() == "model"] in ([], ["model"])
        document = _in_lower_case(document)
    model = document.get("model")
    if model is None:
        model = ""
    if not isinstance(model, str):
        raise BadBodyError("model must be a string")
    if len(model) > _MOST_MODEL_LENGTH:
        raise BadBodyError(f"model must be the name of one, of at most {_MOST_MODEL_LENGTH} characters")
    if not model.isascii():
        model = _HALF_A_PAIR.sub("\ufffd", model)  # as the server reads it
    stream = document.get("stream")
    if stream is None:
        stream = route.streams
    if not isinstance(stream, bool):
        raise BadBodyError("stream must be true or false")
    return InferenceBody(
        raw=raw,
        document=document,
        model=model.strip(),
        stream=stream and route.can_stream,
        exact=exact and model == model.strip(),
    )


def body_for(body: InferenceBody, route: Route, model: str, changes: BodyChanges) -> bytes:
    """The bytes to send for `model`: those that came, wherever nothing has to be changed in them."""
    if body.exact and body.model == model and changes.empty:
        return body.raw
    document = {"model": model, **body.document}
    document["model"] = model
    if not changes.empty:
        document = merged(_in_lower_case(changes.defaults), document)
        _think(document, route, changes.think)
        document = merged(document, _in_lower_case(changes.overrides))
        document["model"] = model
        if changes.system is not None:
            _system(document, route, changes.system, changes.system_mode)
    return dumped(document)


def parsed(raw: bytes) -> Any:
    """The JSON value in a request's body, as leniently as a server reads it.

    Raises:
        BadBodyError: it is none.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        pass
    # The server is more lenient: broken UTF-8 becomes U+FFFD, and numbers have no end.
    try:
        text = raw.decode("utf-8", "replace")
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise BadBodyError("the request body is nested too deeply") from None
    except ValueError as error:
        reason = str(error).partition(": line")[0]
        raise BadBodyError(f"the request body is not JSON: {reason}") from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is beyond any")
    return value


def dumped(document: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(document)
    except TypeError:  # an integer of more than 64 bits, half a surrogate pair, or more than 254 levels
        pass
    try:
        return json.dumps(document, separators=(",", ":")).encode()
    except RecursionError:
        return b"".join(_flat(document))


def _flat(document: Any) -> Iterator[bytes]:
    """The parts of its JSON, however deep it is."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, bytes):  # a part already
            yield value
        elif isinstance(value, dict):
            parts = [part for key, one in value.items() for part in (b",", _key(key), one)]
            waiting += [b"}", *reversed(parts[1:]), b"{"]
        elif isinstance(value, list):
            parts = [part for one in value for part in (b",", one)]
            waiting += [b"]", *reversed(parts[1:]), b"["]
        else:
            yield json.dumps(value).encode()


def _key(name: str) -> bytes:
    return json.dumps(name).encode() + b":"


def _in_lower_case(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key.lower(): value for key, value in fields.items()}


def _think(document: dict[str, Any], route: Route, think: bool | None) -> None:
    """Say whether the model is to think, where the caller does not."""
    if think is None:
        return
    if route.dialect is Dialect.NATIVE:
        if route.path in ("/api/chat", "/api/generate"):
            document.setdefault("think", think)
    elif route.path == "/v1/chat/completions":
        if not think and "reasoning" not in document:
            document.setdefault("reasoning_effort", "none")
    elif route.path == "/v1/messages" and not think:
        document.setdefault("thinking", {"type": "disabled"})


def _system(document: dict[str, Any], route: Route, text: str, mode: str) -> None:
    """Put `text` into the system prompt of the request, wherever its dialect has one."""
    field = {"/api/generate": "system", "/v1/responses": "instructions", "/v1/messages": "system"}.get(
        route.path
    )
    if field is not None:
        document[field] = _joined(document.get(field), text, mode)
    elif isinstance(messages := document.get("messages"), list):
        document["messages"] = _with_system(messages, text, mode)


def _with_system(messages: list[Any], text: str, mode: str) -> list[Any]:
    def is_system(message: Any) -> bool:
        return isinstance(message, dict) and message.get("role") in ("system", "developer")

    first = next((index for index, message in enumerate(messages) if is_system(message)), None)
    if mode == "replace":
        return [{"role": "system", "content": text}, *(one for one in messages if not is_system(one))]
    if first is None:
        return [{"role": "system", "content": text}, *messages]
    changed: Mapping[str, Any] = {
        **messages[first],
        "content": _joined(messages[first].get("content"), text, mode),
    }
    return [*messages[:first], changed, *messages[first + 1 :]]


def _joined(old: Any, text: str, mode: str) -> Any:
    """The old prompt, a string or a list of blocks, with `text` put into it."""
    if mode == "replace" or not old:
        return text
    if isinstance(old, str):
        return f"{text}\n\n{old}" if mode == "prepend" else f"{old}\n\n{text}"
    if isinstance(old, list):
        block = {"type": "text", "text": text}
        return [block, *old] if mode == "prepend" else [*old, block]
    return old  # which the server refuses
