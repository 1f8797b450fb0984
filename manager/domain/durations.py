"""Durations as text: `90s`, `15m`, `2h`, `30d`, or a number of seconds."""

from __future__ import annotations

import re

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION = re.compile(r"(?P<number>[0-9]{1,9}(?:\.[0-9]{1,6})?)\s*(?P<unit>[smhd]?)", re.IGNORECASE)
EXPECTED = "expected seconds, or a duration such as 90s, 15m, 2h or 30d"


def parse_duration(text: str) -> float:
    """Return the seconds that `text` stands for.

    Raises:
        ValueError: it is no duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(EXPECTED)
    return float(match["number"]) * _UNITS_S[match["unit"].lower() or "s"]


def duration_text(seconds: float) -> str:
    """Return a duration in the largest unit that states it exactly: 5400 is `90m`, 1.5 is `1.5s`."""
    for unit in ("d", "h", "m"):
        count, rest = divmod(seconds, _UNITS_S[unit])
        if count and not rest:
            return f"{count:g}{unit}"
    return f"{seconds:g}s"
