"""The log of requests: one JSON line each, or a readable one on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.record import RequestRecord

# Not "requests": the level of the library of that name is raised.
_log = structlog.get_logger("traffic")

# Longer texts are cut. A client chooses the length of its model, project, lane and intent.
MOST_CHARACTERS = 1024
_CUT = "…"
_OPTIONS = orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z
# The fields shown to people, in this order. The JSON lines have all fields.
_READABLE = (
    "path",
    "status",
    "outcome",
    "model",
    "role",
    "effective_target",
    "fallback_reason",
    "start_ms",
    "ttfb_ms",
    "duration_ms",
    "input_tokens",
    "output_tokens",
    "project_id",
    "request_id",
)


class RequestLog:
    """Writes one line a record.

    Args:
        write: takes a finished line; must not block.
        readable: log readable lines through the daemon's own log instead.
    """

    def __init__(self, write: Callable[[bytes], None], *, readable: bool) -> None:
        self._write = write
        self._readable = readable

    def write(self, record: RequestRecord) -> None:
        if self._readable:
            values = _bounded(record)
            shown = {name: values[name] for name in _READABLE if values[name] is not None}
            _log.info("request", **shown)
        else:
            self._write(line(record))


def line(record: RequestRecord) -> bytes:
    """One JSON line for a record, under the names of its fields; `ts` is RFC 3339 in UTC.

    Texts are cut at `MOST_CHARACTERS`. Any record can be written: values that JSON has no form for, such as a
    lone surrogate, are written as text.
    """
    model = record.model
    try:
        # Every other text comes from a header, whose length is bounded, or from the configuration.
        if not isinstance(model, str) or len(model) <= MOST_CHARACTERS:
            data = orjson.dumps(record.as_dict(), option=_OPTIONS)
            if len(data) <= MOST_CHARACTERS:  # so no text in it is longer
                return data
        return orjson.dumps(_bounded(record), option=_OPTIONS)
    except TypeError:
        values = {name: encodable(value) for name, value in _bounded(record).items()}
        return orjson.dumps(values, option=_OPTIONS)


def _bounded(record: RequestRecord) -> dict[str, Any]:
    return {
        name: value[:MOST_CHARACTERS] + _CUT
        if isinstance(value, str) and len(value) > MOST_CHARACTERS
        else value
        for name, value in record.as_dict().items()
    }


def encodable(value: Any) -> Any:
    """The value, or its text where orjson refuses it."""
    try:
        orjson.dumps(value)
    except TypeError:
        try:
            text = value if isinstance(value, str) else str(value)[:MOST_CHARACTERS]
        except Exception:  # noqa: BLE001  (a foreign value may raise anything)
            text = f"<{type(value).__name__}>"
        return text.encode("utf-8", "backslashreplace").decode()
    return value
