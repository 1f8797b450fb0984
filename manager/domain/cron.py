"""Lines as in crontab(5), read into numbers and names that no scheduler can misread."""

from __future__ import annotations

import re
from dataclasses import dataclass

FIELDS = 5

_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_LONG_WEEKDAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_LONGEST_MONTHS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_PART = re.compile(
    r"(?:(?P<all>\*)|(?P<first>[0-9]+|[a-z]+)(?:-(?P<last>[0-9]+|[a-z]+))?)(?:/(?P<step>[0-9]+))?"
)
_NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}


@dataclass(frozen=True, slots=True)
class CronLine:
    """When a line fires: every combination of these, sorted. `weekdays` as `weekday_names` gives them.

    A day counts when it is in both `days` and `weekdays`, or, with `either_day`, in one of them.
    """

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: tuple[int, ...]
    months: tuple[int, ...]
    weekdays: str
    either_day: bool


@dataclass(frozen=True, slots=True)
class _Field:
    what: str
    lowest: int
    highest: int
    names: tuple[str, ...] = ()
    long_names: tuple[str, ...] = ()


_MINUTE = _Field("minute", 0, 59)
_HOUR = _Field("hour", 0, 23)
_DAY = _Field("day of the month", 1, 31)
_MONTH = _Field("month", 1, 12, _MONTHS)
_WEEKDAY = _Field("weekday", 0, 7, _WEEKDAYS, _LONG_WEEKDAYS)  # counted from Sunday; 7 is Sunday again


def parse(line: str) -> CronLine:
    """Read a line of five fields, or a nickname such as `@daily`.

    Two days count when either matches, unless one of the two fields begins with `*` (crontab(5), NOTES).

    Raises:
        ValueError: not a line that crontab(5) describes, or one that could never fire.
    """
    text = line.strip().lower()
    fields = _NICKNAMES.get(text, text).split()
    if text.startswith("@") and len(fields) == 1:
        raise ValueError(f"{line!r} is not one of {', '.join(_NICKNAMES)}")
    if len(fields) != FIELDS:
        raise ValueError(
            f"{line!r} has {len(fields)} fields instead of {FIELDS}: minute hour day-of-month month weekday"
        )
    minute, hour, day, month, weekday = fields
    days, months = _numbers(_DAY, day), _numbers(_MONTH, month)
    either_day = not day.startswith("*") and not weekday.startswith("*")
    if not any(day <= _LONGEST_MONTHS[month - 1] for day in days for month in months):
        if not either_day:
            raise ValueError(f"{line!r} never fires: none of its months has such a day")
        days, either_day = _numbers(_DAY, "*"), False  # the weekdays alone decide
    return CronLine(
        minutes=_numbers(_MINUTE, minute),
        hours=_numbers(_HOUR, hour),
        days=days,
        months=months,
        weekdays=weekday_names(weekday),
        either_day=either_day,
    )


def weekday_names(field: str) -> str:
    """The fifth field of a line as a list of names (`1-5` -> `mon,tue,wed,thu,fri`), `*` as it is.

    crontab(5) counts from Sunday = 0 and takes 7 for Sunday too; schedulers that count from Monday = 0
    would fire on the wrong days.

    Raises:
        ValueError: not a weekday field.
    """
    if field == "*":
        return field
    chosen = {number % 7 for number in _numbers(_WEEKDAY, field.lower())}
    return ",".join(name for number, name in enumerate(_WEEKDAYS) if number in chosen)


def _numbers(field: _Field, text: str) -> tuple[int, ...]:
    chosen: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is not a {field.what}, a range of them or a step")
        first, last = _range(field, match)
        step = int(match["step"] or 1)
        if step == 0:
            raise ValueError(f"{part!r}: a step of 0 never fires")
        chosen.update(range(first, last + 1, step))
    return tuple(sorted(chosen))


def _range(field: _Field, match: re.Match[str]) -> tuple[int, int]:
    """The first and the last value; a step after a single value runs to the end of the field."""
    highest = 6 if field is _WEEKDAY else field.highest  # 7 is not one more day
    if match["all"]:
        return field.lowest, highest
    first = _number(field, match["first"])
    if match["last"] is None:
        return first, max(first, highest) if match["step"] else first
    last = _number(field, match["last"])
    if last == 0 and match["last"].isalpha():
        last = 7 if first > 0 else 0  # fri-sun: here Sunday ends the week
    if last < first:
        raise ValueError(f"the range {match[0]!r} runs backwards")
    return first, last


def _number(field: _Field, text: str) -> int:
    for names in (field.names, field.long_names):
        if text in names:
            return names.index(text) + field.lowest
    if text.isdigit() and field.lowest <= int(text) <= field.highest:
        return int(text)
    or_names = f" or {field.names[0]}-{field.names[-1]}" if field.names else ""
    raise ValueError(f"{text!r} is not a {field.what}: expected {field.lowest}-{field.highest}{or_names}")
