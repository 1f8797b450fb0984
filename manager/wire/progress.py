"""Progress as Ollama tells it: a JSON object a line, an `error` or the status `success` last."""

from __future__ import annotations

import re
from typing import Any

import orjson

_SUCCESS = re.compile(rb'"status"\s*:\s*"success"')
# No line of progress is longer; a server that sends no line end at all is not waited for.
MOST_LINE_BYTES = 1024 * 1024


class LineTooLongError(ValueError):
    """A line of progress had no end."""


class Lines:
    """Cuts a body that comes in any pieces into its lines, each with its end."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that `piece` completes.

        Raises:
            LineTooLongError: what is left of it is no line any more.
        """
        self._rest += piece
        *lines, rest = self._rest.split(b"\n")
        if len(rest) > MOST_LINE_BYTES:
            raise LineTooLongError
        self._rest = rest
        return [bytes(line) + b"\n" for line in lines if line.strip()]

    def end(self) -> list[bytes]:
        """The last line, where it has no end of its own."""
        rest = bytes(self._rest).strip()
        self._rest.clear()
        return [rest + b"\n"] if rest else []


def says_success(data: bytes) -> bool:
    """Whether the line that tells of a good end is in `data`."""
    return _SUCCESS.search(data) is not None


def subject_of(line: bytes) -> bytes:
    """What a line tells the progress of: a later one about the same makes it old."""
    document = _object(line)
    digest = document.get("digest")
    return orjson.dumps([document.get("status"), digest if isinstance(digest, str) else None])


def error_of(line: bytes) -> str | None:
    """The error that a line tells, None when it tells none."""
    error = _object(line).get("error")
    return error if isinstance(error, str) else None


def in_words(line: bytes) -> str:
    """What a line of progress says, with how far it is where it tells; empty where it says nothing."""
    document = _object(line)
    status, done, total = (document.get(name) for name in ("status", "completed", "total"))
    if not isinstance(status, str):
        return ""
    if isinstance(done, int) and isinstance(total, int) and total > 0:
        return f"{status} {100 * done // total} %"
    return status


def progress(status: str) -> bytes:
    return orjson.dumps({"status": status}) + b"\n"


def _object(line: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        return {}
    return document if isinstance(document, dict) else {}
