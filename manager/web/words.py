"""Numbers, sizes and times as people read them. Pure; None is a dash, never a zero."""

from __future__ import annotations

from datetime import datetime

UNKNOWN = "\N{EN DASH}"
_KIB = 1024
_SIZES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_LARGE = 100
_THOUSAND = 1000
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86_400


def size(count: float | None) -> str:
    """Return bytes in the largest binary unit, with one decimal below 100: `7.9 GiB`, `512 MiB`."""
    if count is None:
        return UNKNOWN
    value, unit = float(count), 0
    while abs(value) >= _KIB and unit < len(_SIZES) - 1:
        value /= _KIB
        unit += 1
    digits = 0 if unit == 0 or abs(value) >= _LARGE else 1
    return f"{value:.{digits}f} {_SIZES[unit]}"


def duration(seconds: float | None) -> str:
    """Return seconds in one or two units: `0.4 s`, `45 s`, `14 min 05 s`, `2 h 05 min`, `3 d 4 h`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 10:  # noqa: PLR2004  (below ten seconds the tenths count)
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < _MINUTE_S:
        return f"{whole} s"
    if whole < _HOUR_S:
        return f"{whole // _MINUTE_S} min {whole % _MINUTE_S:02} s"
    if whole < _DAY_S:
        return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S:02} min"
    return f"{whole // _DAY_S} d {whole % _DAY_S // _HOUR_S} h"


def seconds_text(seconds: float) -> str:
    """Return a duration as it is written in settings: `90s`, `30m`, `2h`; 0 is `0`."""
    if seconds == 0:
        return "0"
    for unit, length in (("d", _DAY_S), ("h", _HOUR_S), ("m", _MINUTE_S)):
        if seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:g}s"


def milliseconds(value: float | None) -> str:
    """Return milliseconds as such below a second, as a duration above."""
    if value is None:
        return UNKNOWN
    return f"{value:.0f} ms" if value < _THOUSAND else duration(value / _THOUSAND)


def short_time(value_ms: float | None) -> str:
    """Return milliseconds with two decimals below ten, where they are what there is to see."""
    return milliseconds(value_ms) if value_ms is None or value_ms >= 10 else f"{value_ms:.2f} ms"  # noqa: PLR2004


def count(value: float | None) -> str:
    """Return a number with narrow spaces between the thousands."""
    return UNKNOWN if value is None else f"{value:,.0f}".replace(",", "\u202f")


def rate(value: float | None) -> str:
    """Return a number each second: with a decimal below a hundred."""
    if value is None or value >= _LARGE:
        return count(value)
    return f"{value:.1f}"


def usd(value: float | None) -> str:
    """Return US dollars: cents from ten cents on, up to six decimals below."""
    if value is None:
        return UNKNOWN
    if value == 0 or abs(value) >= 0.1:  # noqa: PLR2004  (ten cents)
        return f"${value:,.2f}"
    return f"${value:.6f}".rstrip("0")


def unix_s(time: datetime | str | None) -> float | None:
    """Return a time in Unix seconds; those of the API are texts."""
    return (datetime.fromisoformat(time) if isinstance(time, str) else time).timestamp() if time else None


def percent(share: float | None) -> str:
    """Return a share of 1 in percent; a tenth is shown below 10 %, and what is less than that is not zero."""
    if share is None:
        return UNKNOWN
    value = share * 100
    if 0 < value < 0.05:  # noqa: PLR2004  (it would be rounded to zero)
        return "< 0.1 %"
    return f"{value:.1f} %" if 0 < value < 9.95 else f"{value:.0f} %"  # noqa: PLR2004  (9.95 rounds to 10)
