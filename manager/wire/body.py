"""The body of an inference request: what is read from it. `wire/rewriting.py` changes it.

msgspec reads small bodies at once. Large ones are read in steps: a request of any size and shape holds the
event loop for a few milliseconds at a time, and costs its own size in memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import orjson

from manager.domain.models import MOST_NAME_LENGTH
from manager.wire.bounds import most_input_tokens, output_limit
from manager.wire.encoding import gathered, holds_any
from manager.wire.errors import BadBodyError, BodyTooLargeError
from manager.wire.scan import NotJsonError, Scan, folded, string_in
from manager.wire.steps import STEP_BYTES, run

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from manager.wire.encoding import Encoding
    from manager.wire.routes import Route
    from manager.wire.steps import Steps

__all__ = [
    "SMALL_BYTES",
    "BadBodyError",
    "BodyTooLargeError",
    "Buffer",
    "Fields",
    "InferenceBody",
    "combined",
    "dumped",
    "fields_of",
    "flag_in",
    "name_in",
    "read_body",
    "read_fields",
    "reading",
    "text_of",
]

Buffer: TypeAlias = bytes | bytearray | memoryview | msgspec.Raw
# Names to JSON values as they came. A later field comes later, also where it replaces an earlier one.
Fields: TypeAlias = dict[str, Buffer]

# What is read in one step.
SMALL_BYTES = STEP_BYTES

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT = msgspec.json.Decoder(str | None)
_FLAGS = {b"true": True, b"false": False, b"null": None}
# A character may be written as two escapes of six characters.
_MOST_NAME_BYTES = 12 * MOST_NAME_LENGTH + 2
_OBJECT, _QUOTE, _NULL = b'{"n'
_SPACE = b" \t\r\n"
# Go's encoding/json decodes a field that is given twice into the same place. For a map this adds to what is
# there, and for a string or a bool null changes nothing. Source: Ollama 0.33 `api/types.go`,
# `openai/openai.go`, `openai/responses.go`, `anthropic/anthropic.go`.
_ADDED = frozenset({"options"})
_KEPT_OVER_NULL = frozenset({"model", "prompt"})
_STREAM = "stream"
# Where `stream` is a bool, and no pointer to one.
_PLAIN_FLAG = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages"})


@dataclass(slots=True)
class InferenceBody:
    """A request as it came.

    `raw` is the first JSON value alone: a server ignores what follows it. `fields` are those of the object,
    their names as `folded` spells them. `exact` is whether every server reads the same model from `raw` as is
    read here.
    """

    raw: bytes | bytearray | memoryview
    fields: Fields
    model: str
    stream: bool
    exact: bool

    @property
    def size(self) -> int:
        return len(self.raw)

    @property
    def is_small(self) -> bool:
        """Whether the body may be rewritten at once."""
        return len(self.raw) <= SMALL_BYTES

    def raw_count(self, name: str) -> int:
        """Count a name, in quotes, in a small body."""
        return bytes(self.raw).count(f'"{name}"'.encode())

    @property
    def most_input_tokens(self) -> int:
        """A number of input tokens that no tokenizer exceeds."""
        return most_input_tokens(self.raw)

    @property
    def most_output_tokens(self) -> int | None:
        """The limit of output tokens that the client sets; None without one."""
        return output_limit(self.fields)

    def forget(self) -> None:
        """Release what may be many megabytes, once it was sent for good."""
        self.raw = b""
        self.fields = {}


def read_body(raw: bytes, route: Route) -> InferenceBody:
    """Read an inference request of at most SMALL_BYTES.

    Only what routing needs is checked; the rest is the server's to judge. The model is empty where none is
    named: a lane may still name one.

    Raises:
        BadBodyError: it is no JSON object, or a field that is needed here has another type.
    """
    fields = _small_fields(raw)
    if fields is None or (
        b"null" in raw and (_is_null(fields.get(_STREAM)) or _is_null(fields.get("model")))
    ):
        return run(_scanned(raw, route))
    return _body(raw, fields, route, exact=True)


def combined(body: InferenceBody, route: Route) -> InferenceBody:
    """Return a small body with all that its fields say; one of them that adds up may be given twice."""
    if any(name in body.fields and body.raw_count(name) > 1 for name in _ADDED):
        return run(_scanned(bytes(body.raw), route))
    return body


def reading(
    parts: list[bytes],
    route: Route,
    most_bytes: int,
    encoding: Encoding | None = None,
    holds: Callable[[int], bool] = holds_any,
) -> Steps[InferenceBody]:
    """Read an inference request of any size, in steps.

    Args:
        parts: the body as it was received; the list is emptied.
        route: where the request goes.
        most_bytes: how large the decoded body may be.
        encoding: what the parts are decoded from.
        holds: as for `gathered`.

    Raises:
        BadBodyError: as `read_body`, or it cannot be decoded.
        BodyTooLargeError: the decoded body is too large.
        NoRoomError: `holds` has said no.
    """
    raw = yield from gathered(parts, encoding, most_bytes, holds)
    if len(raw) <= SMALL_BYTES:
        return read_body(bytes(raw), route)
    return (yield from _scanned(raw, route))


def read_fields(parts: list[bytes]) -> Steps[Fields]:
    """Read the fields of a request of any other kind, in steps. The list is emptied.

    Raises:
        BadBodyError: it is no JSON object.
    """
    raw = yield from gathered(parts, None, 0)
    found, _, _ = yield from _object(raw, _KEPT_OVER_NULL)
    return found


def fields_of(value: Buffer) -> Steps[Fields | None]:
    """Read the fields of a nested object, with their names as they came; None for any other value."""
    if len(value) <= SMALL_BYTES:
        fields = _small_fields(value)
        if fields is not None:
            return fields
    view = memoryview(value)
    if not view or view[0] != _OBJECT:
        return None
    found: Fields = {}
    try:
        for name, start, end in (yield from Scan(view).fields()):
            found.pop(name, None)
            found[name] = view[start:end]
    except NotJsonError:
        return None  # the server refuses the document for it
    return found


def name_in(fields: Fields, key: str) -> str:
    """Return the name in a field, with the white space around it; empty if there is none.

    Raises:
        BadBodyError: it is no string, or longer than any name.
    """
    value = fields.get(key)
    if value is None:
        return ""
    try:
        name: str | None = _TEXT.decode(value) if len(value) <= _MOST_NAME_BYTES else None
    except ValueError:
        name = None
    if name is not None and len(name) <= MOST_NAME_LENGTH:
        return name
    begins = memoryview(value)[0]
    if begins == _NULL:
        return ""
    if begins != _QUOTE:
        raise BadBodyError(f"{key} must be a string")
    if name is None and len(value) <= _MOST_NAME_BYTES:
        try:
            name = string_in(bytes(value))
        except NotJsonError as error:
            raise BadBodyError(f"the request body is not JSON: {error}") from None
    if name is None or len(name) > MOST_NAME_LENGTH:
        raise BadBodyError(f"{key} must be a name of at most {MOST_NAME_LENGTH} characters")
    return name


def flag_in(fields: Fields, key: str) -> bool | None:
    """Return the value of a field that is true, false or null; None if there is none.

    Raises:
        BadBodyError: it is neither.
    """
    value = fields.get(key)
    if value is None:
        return None
    literal = bytes(value) if len(value) <= len(b"false") else b""
    if literal not in _FLAGS:
        raise BadBodyError(f"{key} must be true or false")
    return _FLAGS[literal]


def text_of(value: Buffer | None, most_length: int = MOST_NAME_LENGTH) -> str | None:
    """Return the text in a JSON string as a server reads it, None for any other value or a longer text."""
    if value is None or len(value) > 12 * most_length + 2:
        return None
    try:
        text = _TEXT.decode(value)
    except ValueError:
        try:
            text = string_in(bytes(value))
        except NotJsonError:
            return None
    return None if text is None or len(text) > most_length else text


def dumped(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer of more than 64 bits, or half a surrogate pair
        return json.dumps(value, separators=(",", ":")).encode()


# --- helpers --------------------------------------------------------------------------------------


def _small_fields(value: Buffer) -> Fields | None:
    """The fields of an object, None where a longer look is needed: their names are not all alike spelled."""
    try:
        fields: Any = _FIELDS.decode(value)
    except (ValueError, RecursionError):
        return None
    names = "".join(fields)
    return fields if names.isascii() and names.islower() else None


def _is_null(value: Buffer | None) -> bool:
    return value is not None and len(value) == len(b"null") and bytes(value) == b"null"


def _scanned(raw: bytes | bytearray, route: Route) -> Steps[InferenceBody]:
    kept = _KEPT_OVER_NULL | {_STREAM} if route.path in _PLAIN_FLAG else _KEPT_OVER_NULL
    fields, names, end = yield from _object(raw, kept)
    whole = raw if end == len(raw) else bytes(raw[:end]) if end <= SMALL_BYTES else memoryview(raw)[:end]
    exact = [name for name in names if folded(name) == "model"] == ["model"]
    return _body(whole, fields, route, exact=exact)


def _object(raw: bytes | bytearray, kept: Collection[str]) -> Steps[tuple[Fields, list[str], int]]:
    """Read the object that a body is: its fields, all names as they came, and where it ends.

    Args:
        raw: the body.
        kept: the fields that a later null does not change.
    """
    view = memoryview(raw)
    scan = Scan(view)
    first = yield from scan.space()
    if first < 0:
        raise BadBodyError("missing request body")
    try:
        if first != _OBJECT:
            yield from scan.value()
            raise BadBodyError("the request body must be a JSON object")
        found = yield from scan.fields()
    except NotJsonError as error:
        raise BadBodyError(f"the request body is not JSON: {error}") from None
    # The server takes a field's name in any case, and the last one counts.
    fields: Fields = {}
    for name, start, end in found:
        key, value = folded(name), view[start:end]
        earlier = fields.get(key)
        fields[key] = value if earlier is None else _both(key, earlier, value, kept)
    return fields, [field.name for field in found], scan.at


def _both(key: str, earlier: Buffer, later: Buffer, kept: Collection[str]) -> Buffer:
    """The value of a field that is given twice."""
    if memoryview(later)[0] == _NULL:
        return earlier if key in kept else later
    if key in _ADDED and memoryview(later)[0] == memoryview(earlier)[0] == _OBJECT:
        inner = (bytes(memoryview(one)[1:-1]).strip(_SPACE) for one in (earlier, later))
        return b"{%b}" % b",".join(filter(None, inner))
    return later


def _body(raw: bytes | bytearray | memoryview, fields: Fields, route: Route, *, exact: bool) -> InferenceBody:
    named = name_in(fields, "model")
    model = named.strip()
    stream = flag_in(fields, "stream")
    if stream is None:
        stream = route.streams
    return InferenceBody(raw, fields, model, stream and route.can_stream, exact and model == named)
