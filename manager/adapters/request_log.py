"""The log of requests: one JSON line each, formatted by orjson and written in batches off their path."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
import structlog

if TYPE_CHECKING:
    import asyncio

    from manager.services.traffic import RequestRecord

_log = structlog.get_logger("requests")

_EVERY_S = 0.1
_ROUNDED = ("queue_ms", "start_ms", "ttfb_ms", "duration_ms")
_NOT_LOGGED = ("span_id", "parent_span_id", "path")


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
                said = {key: value for key, value in fields(record).items() if value not in (None, False)}
                _log.info("request", **{key: said[key] for key in _READABLE if key in said})
        elif waiting:
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
    """One JSON line for a record."""
    return orjson.dumps(fields(record), option=orjson.OPT_APPEND_NEWLINE)


def fields(record: RequestRecord) -> dict[str, Any]:
    """What a record says, under the names of the log. `ts` is RFC 3339, times are rounded to microseconds."""
    entry: dict[str, Any] = asdict(record)
    at = datetime.fromtimestamp(record.ts, UTC)
    entry["ts"] = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    for name in _ROUNDED:
        if entry[name] is not None:
            entry[name] = round(entry[name], 3)
    for name in _NOT_LOGGED:
        del entry[name]
    return entry
