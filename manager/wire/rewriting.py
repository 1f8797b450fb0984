"""Changes in the body of an inference request: values are put in between those that came."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

from manager.domain.roles import NO_PARAMETERS
from manager.wire.body import BadBodyError, Buffer, combined, dumped, fields_of, text_of
from manager.wire.routes import Dialect
from manager.wire.scan import NotJsonError, Scan, folded
from manager.wire.steps import run

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.roles import BodyChanges, Parameters
    from manager.wire.body import InferenceBody
    from manager.wire.routes import Route
    from manager.wire.steps import Steps

# JSON as it came, JSON in pieces, or an object whose fields are changed.
Node: TypeAlias = "Buffer | list[Buffer] | dict[str, Node]"

# Their elements are looked at one by one where a system prompt is put among them.
MOST_MESSAGES = 65_536

_ARRAY, _STRING = 0x5B, 0x22
_NULL = b"null"
_EMPTY = re.compile(rb'(?:null|""|\[[ \t\r\n]*+\])\Z')
_MOST_EMPTY_BYTES = 4096
_JOINED_BYTES = 16 * 1024
_NO_EFFORT = b'"none"'
# Where the server reads a map: names in it are exact. Everything else is a struct, whose names are folded.
_MAP = "options"
_NATIVE = frozenset({"/api/chat", "/api/generate"})
# Temperature, tokens of context and of output; only Ollama's own routes take a context.
_NO_NAMES = ("", "", "")
_PARAMETERS = {
    **dict.fromkeys(_NATIVE, ("temperature", "num_ctx", "num_predict")),
    **dict.fromkeys(
        ("/v1/chat/completions", "/v1/completions", "/v1/messages"), ("temperature", "", "max_tokens")
    ),
    "/v1/responses": ("temperature", "", "max_output_tokens"),
}
_SYSTEM_FIELDS = {"/api/generate": "system", "/v1/responses": "instructions", "/v1/messages": "system"}


def body_for(body: InferenceBody, route: Route, model: str, changes: BodyChanges) -> bytes:
    """Return the bytes to send for `model`: those that came, wherever nothing has to be changed in them.

    For small bodies (`InferenceBody.is_small`).

    Raises:
        BadBodyError: as `rewriting`.
    """
    if body.exact and body.model == model and changes.empty:
        return body.raw if type(body.raw) is bytes else bytes(body.raw)
    body = combined(body, route)
    if changes.empty:
        return b"".join(_renamed(body, model))
    return b"".join(run(_pieces(body, route, model, changes)))


def rewriting(body: InferenceBody, route: Route, model: str, changes: BodyChanges) -> Steps[list[Buffer]]:
    """Return the pieces to send for `model`, in steps, for a body of any size.

    Raises:
        BadBodyError: a system prompt is to be put among too many messages.
    """
    if body.exact and body.model == model and changes.empty:
        return [body.raw]
    if changes.empty:
        return _larger(_renamed(body, model))
    pieces = yield from _pieces(body, route, model, changes)
    return _larger(pieces)


# --- helpers --------------------------------------------------------------------------------------


def _renamed(body: InferenceBody, model: str) -> list[Buffer]:
    """The body for another model, and otherwise as it came."""
    rest = [piece for name, value in body.fields.items() if name != "model" for piece in (_key(name), value)]
    return [b'{"model":', dumped(model), *rest, b"}"]


def _pieces(body: InferenceBody, route: Route, model: str, changes: BodyChanges) -> Steps[list[Buffer]]:
    fields: dict[str, Node] = {"model": b"", **body.fields}
    if changes.defaults:
        yield from _merge(fields, _folded(changes.defaults), over=False)
    if changes.parameters != NO_PARAMETERS:
        yield from _say_parameters(fields, route.path, changes.parameters)
    if changes.think is not None:
        yield from _think(fields, route, think=changes.think)
    if changes.overrides:
        yield from _merge(fields, _folded(changes.overrides), over=True)
    if changes.system is not None:
        yield from _system(fields, route, changes.system, changes.system_mode)
    fields["model"] = dumped(model)
    return _written(fields)


def _say_parameters(fields: dict[str, Node], path: str, parameters: Parameters) -> Steps[None]:
    """Put in the parameters that nothing is said about, under the names that a route has for them."""
    named = zip(_PARAMETERS.get(path, _NO_NAMES), parameters, strict=True)
    found = {name: dumped(value) for name, value in named if name and value is not None}
    said = fields
    if path in _NATIVE:
        options = (yield from _opened(fields[_MAP])) if _says(fields, _MAP) else {}
        if options is None or not found:
            return  # no object: the server refuses it
        fields[_MAP] = said = options
    elif _says(fields, "max_completion_tokens"):
        found.pop("max_tokens", None)
    for name, value in found.items():
        if not _says(said, name):
            said[name] = value


def _folded(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {folded(name): value for name, value in changes.items()}


def _merge(
    node: dict[str, Node], changes: Mapping[str, Any], *, over: bool, exact: bool = False
) -> Steps[None]:
    """Merge `changes` into the object, deeply: over what is there, or only where nothing is."""
    names = "".join(node)
    exact_here = exact or (names.isascii() and names.islower())  # nothing to fold
    for name, value in changes.items():
        key = name if exact else folded(name)
        same = [key] * (key in node) if exact_here else [one for one in node if folded(one) == key]
        if not same:
            node[name] = dumped(value)
            continue
        old = node[same[-1]]
        inner = (yield from _opened(old)) if isinstance(value, dict) else None
        if inner is None and not over:
            continue
        for one in same:
            del node[one]
        if inner is None:
            node[name] = dumped(value)
        else:
            node[name] = inner
            yield from _merge(inner, value, over=over, exact=exact or key == _MAP)


def _opened(node: Node) -> Steps[dict[str, Node] | None]:
    """The fields of an object, which may be changed; None for any other value."""
    if not isinstance(node, Buffer):
        return node if isinstance(node, dict) else None
    fields = yield from fields_of(node)
    return None if fields is None else {**fields}


def _think(fields: dict[str, Node], route: Route, *, think: bool) -> Steps[None]:
    """Switch thinking where the client leaves it open; below /v1 it is on unless it is switched off.

    Source: Ollama `openai/openai.go` FromChatRequest, `openai/responses.go` FromResponsesRequest,
    `anthropic/anthropic.go` FromMessagesRequest. A completion (/v1/completions) has no word for it.
    """
    path = route.path
    if route.dialect is Dialect.NATIVE:
        if path in ("/api/chat", "/api/generate") and not _says(fields, "think"):
            fields["think"] = dumped(think)
    elif think:
        return
    elif path == "/v1/messages":
        if not _says(fields, "thinking") and not (yield from _says_effort(fields, "output_config")):
            fields["thinking"] = dumped({"type": "disabled"})
    elif path == "/v1/responses" or (path == "/v1/chat/completions" and _says(fields, "reasoning")):
        # The chat route reads `reasoning_effort` only where there is no `reasoning`.
        if not _says(fields, "reasoning"):
            fields["reasoning"] = {"effort": _NO_EFFORT}
        elif not (yield from _says_effort(fields, "reasoning")):
            yield from _merge(fields, {"reasoning": {"effort": "none"}}, over=True)
    elif path == "/v1/chat/completions" and not _says(fields, "reasoning_effort"):
        fields["reasoning_effort"] = _NO_EFFORT


def _says(fields: Mapping[str, Node], name: str) -> bool:
    """Whether a field has a value; null is none for the server."""
    value = fields.get(name)
    return value is not None and (isinstance(value, dict | list) or bytes(memoryview(value)[:4]) != _NULL)


def _says_effort(fields: Mapping[str, Node], name: str) -> Steps[bool]:
    """Whether an object says how hard to think. What is no object is left to the server."""
    if not _says(fields, name):
        return False
    inner = yield from _opened(fields[name])
    if inner is None:
        return True
    last = next((value for key, value in reversed(inner.items()) if folded(key) == "effort"), None)
    return last is not None and not (isinstance(last, Buffer) and _is_empty(last))


# --- the system prompt ----------------------------------------------------------------------------


def _system(fields: dict[str, Node], route: Route, text: str, mode: str) -> Steps[None]:
    """Put `text` into the system prompt of the request, wherever its dialect has one."""
    field = _SYSTEM_FIELDS.get(route.path)
    if field is not None:
        fields[field] = _joined(fields.get(field), text, mode)
        return
    messages = fields.get("messages")
    if isinstance(messages, Buffer) and memoryview(messages)[0] == _ARRAY:
        with suppress(NotJsonError):  # the server refuses the document for it
            fields["messages"] = yield from _with_system(memoryview(messages), text, mode)


def _with_system(messages: memoryview, text: str, mode: str) -> Steps[list[Buffer]]:
    new = dumped({"role": "system", "content": text})
    scan = Scan(messages, 1)
    first_at = behind = run_at = 0  # places; 0 is none
    kept: list[Buffer] = []
    for count in range(MOST_MESSAGES + 1):
        place = yield from scan.next_element(first=count == 0)
        if place is None:
            break
        start, end = place
        first_at = first_at or start
        message = yield from _system_message(messages[start:end])
        if message is not None and mode != "replace":
            _set_content(message, text, mode)
            return [messages[:start], *_written(message), messages[end:]]
        if message is None:
            run_at = run_at or start
        elif run_at:
            kept += [b",", messages[run_at:behind]]
            run_at = 0
        behind = end
    else:
        raise BadBodyError(f"a system prompt can be put among {MOST_MESSAGES} messages at most")
    if run_at:
        kept += [b",", messages[run_at:behind]]
    return [b"[", new, *kept, b"]"]


def _system_message(message: memoryview) -> Steps[dict[str, Node] | None]:
    """The fields of a message, if it is a system prompt; else None."""
    fields = yield from fields_of(message)
    if fields is None:
        return None
    role = next((text_of(value) for name, value in reversed(fields.items()) if folded(name) == "role"), None)
    return {**fields} if role is not None and role.lower() in ("system", "developer") else None


def _set_content(message: dict[str, Node], text: str, mode: str) -> None:
    names = [name for name in message if folded(name) == "content"]
    old = message[names[-1]] if names else None
    for name in names:
        del message[name]
    message["content"] = _joined(old, text, mode)


def _joined(old: Node | None, text: str, mode: str) -> Node:
    """The old prompt, a string or a list of blocks, with `text` put into it."""
    if old is None or mode == "replace" or (isinstance(old, Buffer) and _is_empty(old)):
        return dumped(text)
    if not isinstance(old, Buffer):
        return old  # which the server refuses
    view = memoryview(old)
    if view[0] == _STRING:
        if mode == "prepend":
            return [dumped(f"{text}\n\n")[:-1], view[1:]]
        return [view[:-1], dumped(f"\n\n{text}")[1:]]
    if view[0] == _ARRAY:
        block = dumped({"type": "text", "text": text})
        return [b"[%b," % block, view[1:]] if mode == "prepend" else [view[:-1], b",%b]" % block]
    return old


def _is_empty(value: Buffer) -> bool:
    return _EMPTY.match(memoryview(value)[:_MOST_EMPTY_BYTES]) is not None


# --- writing --------------------------------------------------------------------------------------


def _written(node: dict[str, Node]) -> list[Buffer]:
    pieces: list[Buffer] = []
    for name, value in node.items():
        pieces.append(_key(name))
        if isinstance(value, dict):
            pieces += _written(value)
        elif isinstance(value, list):
            pieces += value
        else:
            pieces.append(value)
    if not pieces:
        return [b"{}"]
    pieces[0] = b"{%b" % bytes(pieces[0])[1:]
    pieces.append(b"}")
    return pieces


@lru_cache(maxsize=256)
def _key(name: str) -> bytes:
    return b",%b:" % dumped(name)


def _larger(pieces: list[Buffer]) -> list[Buffer]:
    """The same bytes in fewer pieces: small ones are joined."""
    result: list[Buffer] = []
    for is_small, some in groupby(pieces, lambda piece: len(piece) < _JOINED_BYTES):
        found = list(some)
        result += [b"".join(found)] if is_small else found
    return result
