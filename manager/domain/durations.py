"""Durations as text: `90s`, `15m`, `2h`, `30d`, `1h30m`, or a number of seconds."""

from __future__ import annotations

import re

_UNITS_S = {"d": 86_400, "h": 3600, "m": 60, "s": 1}
_NUMBER = r"[0-9]{1,9}(?:\.[0-9]{1,6})?"
_SECONDS = re.compile(_NUMBER)
# At least one part, the largest unit first, each unit once.
_PARTS = re.compile(
    "(?=[0-9])" + "".join(rf"(?:(?P<{unit}>{_NUMBER})\s*{unit}\s*)?" for unit in _UNITS_S), re.IGNORECASE
)
EXPECTED = "expected seconds, or a duration such as 90s, 15m, 2h, 1h30m or 30d"


def parse_duration(text: str) -> float:
    """Return the seconds that `text` stands for.

    Raises:
        ValueError: it is no duration.
    """
    text = text.strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    match = _PARTS.fullmatch(text)
    if match is None:
        raise ValueError(EXPECTED)
    return sum(float(match[unit]) * size_s for unit, size_s in _UNITS_S.items() if match[unit] is not None)


def duration_text(seconds: float) -> str:
    """Return a duration in the largest unit that states it exactly: 5400 is `90m`, 1.5 is `1.5s`."""
    for unit in ("d", "h", "m"):
        count, rest = divmod(seconds, _UNITS_S[unit])
        if count and not rest:
            return f"{count:g}{unit}"
    return f"{seconds:g}s"
