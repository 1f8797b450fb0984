"""Finds the fields of a JSON object and the elements of an array without building the values in them.

The scan is exact for valid JSON. It checks the object or the array itself; inside the values it only counts
brackets outside of strings, and leaves errors there to the server, which refuses the whole document for them.
"""

from __future__ import annotations

import json
import re
from array import array
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import orjson

from manager.wire.steps import STEP_BYTES

if TYPE_CHECKING:
    from manager.wire.steps import Steps

# More than any API has.
MOST_FIELDS = 1024
_MOST_NAME_BYTES = 4096
_MOST_LITERAL_BYTES = 1024
# Small values are common: the first look at a value is a short one.
_FIRST_WINDOW = 512
# What a value costs beside its length, as if it were that many bytes.
_VALUE_COST = 256
# Objects and arrays without others in them are found by one pattern, up to this length.
_FLAT_BYTES = 2048

_QUOTE, _COMMA, _COLON, _END_OF_ARRAY, _END_OF_OBJECT = b'",:]}'
_OPENING = b"[{"

_SPACE = re.compile(rb"[ \t\r\n]*+")
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_FLAT = re.compile(rb'[\[{][^][{}"]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^][{}"]*+)*+[\]}]', re.DOTALL)
_LITERAL = re.compile(
    rb"(?:true|false|null|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][-+]?[0-9]++)?+)(?=[ \t\r\n,\]}]|\Z)"
)
_HALF_A_PAIR = re.compile("[\ud800-\udfff]")

# Brackets of both kinds as signed bytes: one level down is +1, one level up is -1.
_DOWN, _UP = b"\x01", b"\xff"
_LEVELS = bytes.maketrans(b"[{]}", _DOWN * 2 + _UP * 2)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_PASSES = 3

# What Go's encoding/json folds into ASCII letters (`foldRune` in fold.go).
_FOLDED = {0x17F: "s", 0x212A: "k"} | {letter: chr(letter + 32) for letter in range(0x41, 0x5B)}


class NotJsonError(ValueError):
    """The text is no JSON; the message says why and repeats nothing of it."""


class Field(NamedTuple):
    """A field of an object: its name as the server reads it, and where its value stands."""

    name: str
    start: int
    end: int


def folded(name: str) -> str:
    """The name that all spellings of a field have in common.

    Source: Go encoding/json: names compare without case, and U+017F is an s, U+212A a k.
    """
    return name.lower() if name.isascii() else name.translate(_FOLDED)


class Scan:
    """Reads forward through a JSON text. Each step looks at no more than STEP_BYTES.

    Args:
        text: the text; it must not change meanwhile.
        at: where to begin.
    """

    def __init__(self, text: memoryview, at: int = 0) -> None:
        self.at = at
        self._text = text
        self._spent = 0

    def space(self) -> Steps[int]:
        """Skip white space. Return the next byte, or -1 at the end."""
        text = self._text
        while True:
            found = _SPACE.match(text, self.at, self.at + STEP_BYTES)
            assert found is not None  # noqa: S101  (the pattern matches nothing, too)
            length = found.end() - self.at
            self.at = found.end()
            if length < STEP_BYTES:
                return text[self.at] if self.at < len(text) else -1
            yield from self._spend(length)

    def fields(self) -> Steps[list[Field]]:
        """Read the object that begins here, and go behind it.

        Raises:
            NotJsonError: its own syntax is wrong, or it has too many fields.
        """
        found: list[Field] = []
        self.at += 1
        byte = yield from self.space()
        while byte != _END_OF_OBJECT or found:
            if byte != _QUOTE:
                raise self._expected("the name of a field")
            name = yield from self._name()
            if (yield from self.space()) != _COLON:
                raise self._expected("a colon")
            self.at += 1
            yield from self.space()
            start = self.at
            yield from self.value()
            found.append(Field(name, start, self.at))
            if len(found) > MOST_FIELDS:
                raise NotJsonError(f"an object has more than {MOST_FIELDS} fields")
            byte = yield from self.space()
            if byte == _END_OF_OBJECT:
                break
            if byte != _COMMA:
                raise self._expected("a comma or the end of the object")
            self.at += 1
            byte = yield from self.space()
        self.at += 1
        return found

    def next_element(self, *, first: bool) -> Steps[tuple[int, int] | None]:
        """Read the next element of the array that was entered. Return its place, or None behind the last.

        Raises:
            NotJsonError: the syntax of the array is wrong.
        """
        byte = yield from self.space()
        if byte == _END_OF_ARRAY:
            return None
        if not first:
            if byte != _COMMA:
                raise self._expected("a comma or the end of the array")
            self.at += 1
            yield from self.space()
        start = self.at
        yield from self.value()
        return start, self.at

    def value(self) -> Steps[None]:
        """Skip the value that begins here.

        Raises:
            NotJsonError: no value begins here, or it has no end.
        """
        text, at = self._text, self.at
        if at >= len(text):
            raise self._expected("a value")
        byte = text[at]
        self._spent += _VALUE_COST
        if byte == _QUOTE:
            self.at = at + 1
            yield from self._string()
        elif byte in _OPENING:
            flat = _FLAT.match(text, at, at + _FLAT_BYTES)
            if flat is not None:
                self.at = flat.end()
                yield from self._spend(self.at - at)
            else:
                self.at = at + 1
                yield from self._container()
        else:
            literal = _LITERAL.match(text, at, at + _MOST_LITERAL_BYTES)
            if literal is None or literal.end() == at + _MOST_LITERAL_BYTES:
                raise self._expected("a value")
            self.at = literal.end()
            yield from self._spend(self.at - at)

    # --- helpers ---

    def _name(self) -> Steps[str]:
        start = self.at
        self.at += 1
        yield from self._string()
        raw = bytes(self._text[start : min(self.at, start + _MOST_NAME_BYTES + 1)])
        if len(raw) > _MOST_NAME_BYTES:
            raise NotJsonError(f"the name of a field has more than {_MOST_NAME_BYTES} bytes")
        return string_in(raw)

    def _string(self) -> Steps[None]:
        """Go behind the end of the string that was entered."""
        size = _FIRST_WINDOW
        while True:
            window = bytes(self._text[self.at : self.at + size])
            quote = window.find(b'"')
            stop = len(window) if quote < 0 else quote
            if window.find(b"\\", 0, stop) >= 0:
                inside = _IN_STRING.match(window)
                assert inside is not None  # noqa: S101  (the pattern matches nothing, too)
                stop = inside.end()
            self.at += stop
            yield from self._spend(stop)
            if stop < len(window) and window[stop] == _QUOTE:
                self.at += 1
                return
            if self.at + len(window) - stop >= len(self._text):
                raise NotJsonError("a string has no end")
            size = min(4 * size, STEP_BYTES)

    def _container(self) -> Steps[None]:
        """Go behind the end of the object or array that was entered."""
        state = _State(1, in_string=False, escaped=False)
        size = _FIRST_WINDOW
        while True:
            window = bytes(self._text[self.at : self.at + size])
            if not window:
                raise NotJsonError("an object or an array has no end")
            after, ends = state.after(window)
            if ends:
                self.at += _end_in(window, state)
                yield from self._spend(2 * size)
                return
            state = after
            self.at += len(window)
            yield from self._spend(len(window))
            size = min(4 * size, STEP_BYTES)

    def _spend(self, amount: int) -> Steps[None]:
        self._spent += amount
        if self._spent >= STEP_BYTES:
            self._spent = 0
            yield

    def _expected(self, what: str) -> NotJsonError:
        if self.at >= len(self._text):
            return NotJsonError(f"it ends where {what} is expected")
        return NotJsonError(f"{what} is expected at byte {self.at}")


class _State(NamedTuple):
    """The state at the begin of a window: open brackets, in a string or not, behind a backslash or not."""

    depth: int
    in_string: bool
    escaped: bool

    def after(self, window: bytes) -> tuple[_State, bool]:
        """The state behind a window, and whether the outermost bracket is closed in it."""
        escaped = False
        if self.escaped:
            window = b"_" + window[1:]
        if b"\\" in window:
            # The length stays the same, and a backslash that is left at the end escapes what follows.
            window = window.replace(b"\\\\", b"__").replace(b'\\"', b"__")
            escaped = window.endswith(b"\\")
        parts = window.split(b'"')
        brackets = b"".join(parts[self.in_string :: 2]).translate(_LEVELS, _NO_BRACKETS)
        in_string = self.in_string ^ (len(parts) % 2 == 0)
        ups = brackets.count(_UP)
        after = _State(self.depth + len(brackets) - 2 * ups, in_string, escaped)
        return after, ups >= self.depth and self.depth + _lowest(brackets) <= 0


def _lowest(levels: bytes) -> int:
    """The lowest level that is reached; the level before the first bracket is 0."""
    for _ in range(_PASSES):
        # A bracket that is closed at once changes nothing but the level between the two.
        levels = levels.replace(_DOWN + _UP, b"")
    return min(accumulate(array("b", levels), initial=0))


def _end_in(window: bytes, state: _State) -> int:
    """The place in the window where the outermost bracket is closed."""
    offset = 0
    while len(window) > 1:
        half = len(window) // 2
        after, ends = state.after(window[:half])
        if ends:
            window = window[:half]
        else:
            state, offset, window = after, offset + half, window[half:]
    return offset + 1


def string_in(raw: bytes) -> str:
    """The text in a JSON string, as Go reads it: what is no UTF-8 becomes U+FFFD.

    Args:
        raw: with its quotes.

    Raises:
        NotJsonError: it is no JSON string.
    """
    try:
        text = orjson.loads(raw)
    except orjson.JSONDecodeError:
        text = _leniently(raw)
    if not isinstance(text, str):
        raise NotJsonError("a string is expected")
    return text


def _leniently(raw: bytes) -> object:
    try:
        text = json.loads(raw.decode("utf-8", "replace"))
    except ValueError:
        raise NotJsonError("a string is not well-formed") from None
    return _HALF_A_PAIR.sub("\ufffd", text) if isinstance(text, str) else text
