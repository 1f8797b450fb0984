"""Times in a query: as such, or as a span before now."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field

from manager.domain.durations import parse_duration


def moment(text: str) -> datetime:
    """Return a time that was written as such, or as a span of time before now.

    Raises:
        ValueError: it is neither; the message is for the client.
    """
    with suppress(ValueError):
        span_s = parse_duration(text)
        try:
            return datetime.now(UTC) - timedelta(seconds=span_s)
        except OverflowError:  # longer than there are dates
            return datetime.min.replace(tzinfo=UTC)
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        example = "a time with its zone such as 2026-03-01T12:00:00Z, or a span such as 15m or 2h"
        raise ValueError(f"expected {example}")
    return at


def _moment_text(text: str) -> str:
    moment(text)
    return text


MomentText: TypeAlias = Annotated[str, Field(max_length=64), AfterValidator(_moment_text)]
