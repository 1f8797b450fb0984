"""The trace a request belongs to, as W3C Trace Context spells it (version 00)."""

from __future__ import annotations

import re

_TRACEPARENT = re.compile(
    rb"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
    rb"(?P<more>-.*)?"
)
_NO_TRACE = b"0" * 32
_NO_SPAN = b"0" * 16


def read_traceparent(value: bytes | None) -> tuple[str, str, str] | None:
    """Trace id, the caller's span id and flags; None when there is none that counts."""
    match = _TRACEPARENT.fullmatch(value.strip()) if value else None
    if match is None or match["trace"] == _NO_TRACE or match["span"] == _NO_SPAN:
        return None
    if match["more"] and match["version"] == b"00":
        return None  # only later versions have more to say, https://www.w3.org/TR/trace-context/#versioning
    return match["trace"].decode(), match["span"].decode(), match["flags"].decode()


def is_sampled(flags: str) -> bool:
    """Whether the one who sent these flags may have recorded the trace."""
    return bool(int(flags, 16) & 1)


def traceparent(trace_id: str, span_id: str, *, sampled: bool) -> bytes:
    return f"00-{trace_id}-{span_id}-{'01' if sampled else '00'}".encode()
