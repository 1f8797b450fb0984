"""Progress as Ollama reports it: a JSON object a line, an `error` or the status `success` last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

# Ollama's own lines have a few hundred bytes. A server that sends no line end at all is not waited for.
MOST_LINE_BYTES = 64 * 1024
# A line that could be `success` while its end has not come.
_MOST_SUCCESS_BYTES = 1024
_SUCCESS = "success"


class LineTooLongError(ValueError):
    """A line of progress has no end."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The content of a line; a field is None where the line lacks it. Byte counts are of one layer."""

    status: str | None = None
    digest: str | None = None
    completed: int | None = None
    total: int | None = None
    error: str | None = None

    @property
    def subject(self) -> tuple[str | None, str | None]:
        """The subject of the line: a later line about the same replaces it."""
        return self.status, self.digest

    @property
    def is_success(self) -> bool:
        return self.status == _SUCCESS

    @property
    def is_download(self) -> bool:
        """Whether bytes of a layer are missing here; a layer that is here already is reported as complete."""
        return self.total is not None and (self.completed or 0) < self.total

    def in_words(self) -> str:
        """The status, with how far it is where the line tells; empty where it has no status."""
        if self.status is None:
            return ""
        if self.completed is not None and self.total:
            return f"{self.status} {100 * self.completed // self.total} %"
        return self.status


_NOTHING = Progress()


class Lines:
    """Cuts a body that comes in any pieces into its lines, each with its end. Linear in the body's length."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def rest(self, most: int) -> bytes:
        """The beginning of a line whose end has not come; empty where it is longer than `most` bytes."""
        return bytes(self._rest) if len(self._rest) <= most else b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that `piece` completes.

        Raises:
            LineTooLongError: a line is longer than `MOST_LINE_BYTES`.
        """
        first, *others = piece.split(b"\n")
        self._rest += first
        lines = []
        for beginning in others:
            if self._rest.strip():
                lines.append(bytes(self._rest) + b"\n")
            self._rest[:] = beginning
        if len(self._rest) > MOST_LINE_BYTES or any(len(line) > MOST_LINE_BYTES + 1 for line in lines):
            raise LineTooLongError
        return lines

    def end(self) -> list[bytes]:
        """The last line, where it has no end of its own."""
        rest = bytes(self._rest).strip()
        self._rest.clear()
        return [rest + b"\n"] if rest else []


class SuccessWatch:
    """Finds the line `success` in a body that comes in any pieces."""

    def __init__(self) -> None:
        self._lines: Lines | None = Lines()

    def feed(self, piece: bytes) -> bool:
        """Whether this piece completes that line; true once. Its line end may be missing or still to come."""
        if self._lines is None:
            return False
        try:
            found = [line for line in self._lines.feed(piece) if len(line) <= _MOST_SUCCESS_BYTES]
        except LineTooLongError:
            self._lines = None  # this is no progress
            return False
        found.append(self._lines.rest(_MOST_SUCCESS_BYTES))
        if not any(read_progress(line).is_success for line in found):
            return False
        self._lines = None
        return True


def read_progress(line: bytes) -> Progress:
    """Read a line leniently: a field that is odd is as if it were not there."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        return _NOTHING
    if not isinstance(document, dict):
        return _NOTHING
    return Progress(
        _text(document, "status"),
        _text(document, "digest"),
        _count(document, "completed"),
        _count(document, "total"),
        _text(document, "error"),
    )


def progress(status: str) -> bytes:
    return orjson.dumps({"status": status}) + b"\n"


def _text(document: dict[str, Any], key: str) -> str | None:
    value = document.get(key)
    return value if isinstance(value, str) else None


def _count(document: dict[str, Any], key: str) -> int | None:
    value = document.get(key)
    return value if isinstance(value, int) else None
