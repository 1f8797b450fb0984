"""The log of requests: one JSON line each, formatted by orjson and written in batches off their path."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import orjson
import structlog

if TYPE_CHECKING:
    import asyncio

    from manager.domain.record import RequestRecord

# Not "requests": a library of that name has to be quiet.
_log = structlog.get_logger("traffic")

_EVERY_S = 0.1
_OPTIONS = orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z


class RequestLog:
    """Collects records and writes their lines soon after, to where the daemon's log goes.

    Args:
        loop: the event loop that records are written on.
        readable: for people at a terminal, in the words of the daemon's log.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, readable: bool) -> None:
        self._loop = loop
        self._readable = readable
        self._waiting: list[RequestRecord] = []

    def write(self, record: RequestRecord) -> None:
        if not self._waiting:
            self._loop.call_later(_EVERY_S, self.flush)
        self._waiting.append(record)

    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._readable:
            for record in waiting:
                said = ((name, getattr(record, name)) for name in _READABLE)
                _log.info("request", **{name: value for name, value in said if value is not None})
        elif waiting:
            with suppress(OSError):  # as with the daemon's log, a full disk under it is no reason to fail
                sys.stderr.buffer.write(b"".join(map(line, waiting)))
                sys.stderr.buffer.flush()


# What somebody who watches wants to see; the JSON lines have everything.
_READABLE = (
    "outcome",
    "status",
    "model",
    "role",
    "effective_target",
    "fallback_reason",
    "start_ms",
    "ttfb_ms",
    "duration_ms",
    "input_tokens",
    "output_tokens",
)


def line(record: RequestRecord) -> bytes:
    """One JSON line for a record, under the names of its fields; `ts` is RFC 3339 in UTC."""
    return orjson.dumps(record.as_dict(), option=_OPTIONS)
