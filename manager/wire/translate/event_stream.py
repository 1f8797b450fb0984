"""Splits server-sent events out of the bytes of a stream, within a bound."""

from __future__ import annotations

from typing import NamedTuple

# Of one event: its lines together. A server that sends a whole tool call at once stays below it.
MOST_EVENT_BYTES = 1024 * 1024

_MARK = b"\xef\xbb\xbf"


class Sent(NamedTuple):
    """One event. `name` is empty where the server gives it none."""

    name: bytes
    data: bytes


class EventStream:
    """Reads a text/event-stream piece by piece; the same bytes give the same events however they are split.

    Source: the HTML standard, "Parsing an event stream". One thing differs: an event counts even where the
    stream ends without the empty line behind it.

    Attributes:
        fault: why nothing is read any more: an event is too large; None where none is.
    """

    def __init__(self, most_bytes: int = MOST_EVENT_BYTES) -> None:
        self.fault: str | None = None
        self._most_bytes = most_bytes
        self._rest = bytearray()
        self._is_after_return = False
        self._is_first = True
        self._size = 0
        self._name = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[Sent]:
        """Return the events that are whole now; those before a fault are among them."""
        if self.fault is not None:
            return []
        if self._is_after_return and piece:
            piece, self._is_after_return = piece.removeprefix(b"\n"), False
        if b"\r" in piece:
            self._is_after_return = piece.endswith(b"\r")
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        self._rest += piece
        if b"\n" not in piece:
            self._check(len(self._rest))
            return []
        *lines, rest = self._rest.split(b"\n")
        self._rest = rest
        found = self._read(lines)
        self._check(len(rest))
        return found

    def end(self) -> list[Sent]:
        """Return the last event where no empty line has followed it."""
        return self.feed(b"\n\n")

    def _read(self, lines: list[bytearray]) -> list[Sent]:
        found: list[Sent] = []
        for line in lines:
            self._check(len(line))
            if self.fault is not None:
                break
            if self._is_first:
                line, self._is_first = line.removeprefix(_MARK), False  # noqa: PLW2901
            if line:
                self._size += len(line)
                self._take(bytes(line))
                continue
            if self._data:
                found.append(Sent(self._name, b"\n".join(self._data)))
            self._size, self._name, self._data = 0, b"", []
        return found

    def _take(self, line: bytes) -> None:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value

    def _check(self, more: int) -> None:
        if self.fault is None and self._size + more > self._most_bytes:
            self.fault = f"the server sent an event of more than {self._most_bytes} bytes"
            self._rest, self._data = bytearray(), []
