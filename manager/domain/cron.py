"""Reads lines of crontab(5), and writes them again in a form that every scheduler reads alike.

When a line fires is the scheduler's business; here is what a line may say, and what is wrong with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FIELDS = 5

_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_LONG_WEEKDAYS = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_LONGEST_MONTHS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_PART = re.compile(
    r"(?:(?P<all>\*)|(?P<first>[0-9]{1,9}|[a-z]+)(?:-(?P<last>[0-9]{1,9}|[a-z]+))?)(?:/(?P<step>[0-9]{1,9}))?"
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
class _Field:
    what: str
    lowest: int
    highest: int
    names: tuple[str, ...] = ()
    long_names: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """The number of different values."""
        return self.last - self.lowest + 1

    @property
    def last(self) -> int:
        """The last value of `*`: as a weekday, 7 is 0 again."""
        return 6 if self.long_names else self.highest


_MINUTE = _Field("minute", 0, 59)
_HOUR = _Field("hour", 0, 23)
_DAY = _Field("day of the month", 1, 31)
_MONTH = _Field("month", 1, 12, _MONTHS)
_WEEKDAY = _Field("weekday", 0, 7, _WEEKDAYS, _LONG_WEEKDAYS)  # counted from Sunday; 7 is Sunday again


def parse(line: str) -> str:
    """Return a line of five fields, or a nickname such as `@daily`, as five fields of numbers.

    Names become numbers, ranges and steps become lists, and 7 becomes 0. What begins with `*` afterwards:

    - the hour, where the line names every hour: such a line goes by elapsed time when the clocks change,
      any other by what the clock shows;
    - a day field that begins with `*` in `line`: then both days must match, else either of them
      (crontab(5), NOTES).

    Raises:
        ValueError: not a line that crontab(5) describes, or one that never fires.
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
    weekdays = tuple(sorted({number % 7 for number in _numbers(_WEEKDAY, weekday)}))
    both = day.startswith("*") or weekday.startswith("*")
    if both and not any(number <= _LONGEST_MONTHS[month - 1] for number in days for month in months):
        raise ValueError(f"{line!r} never fires: none of its months has such a day")
    hours = _numbers(_HOUR, hour)
    return " ".join(
        (
            _listed(_numbers(_MINUTE, minute)),
            "*" if len(hours) == _HOUR.count else _listed(hours),
            _day_field(_DAY, day, days),
            _listed(months),
            _day_field(_WEEKDAY, weekday, weekdays),
        )
    )


def _day_field(field: _Field, text: str, numbers: tuple[int, ...]) -> str:
    if not text.startswith("*"):
        return _listed(numbers)
    return "*" if len(numbers) == field.count else f"{text.partition(',')[0]},{_listed(numbers)}"


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _numbers(field: _Field, text: str) -> tuple[int, ...]:
    chosen: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise _refused(field, part, f"no {field.what}, range of them or step")
        first, last = _range(field, match)
        step = int(match["step"] or 1)
        if step == 0:
            raise _refused(field, part, "a step of 0 never fires")
        chosen.update(range(first, last + 1, step))
    return tuple(sorted(chosen))


def _range(field: _Field, match: re.Match[str]) -> tuple[int, int]:
    """The first and the last value; a step after a single value runs to the end of the field."""
    if match["all"]:
        return field.lowest, field.last
    first = _number(field, match["first"])
    if match["last"] is None:
        return first, max(first, field.last) if match["step"] else first
    last = _number(field, match["last"])
    if last == 0 and match["last"].isalpha():
        last = 7 if first > 0 else 0  # fri-sun: here Sunday ends the week
    if last < first:
        raise _refused(field, match[0], "the range runs backwards")
    return first, last


def _number(field: _Field, text: str) -> int:
    for names in (field.names, field.long_names):
        if text in names:
            return names.index(text) + field.lowest
    if text.isdigit() and field.lowest <= int(text) <= field.highest:
        return int(text)
    raise _refused(field, text, f"no such {field.what}")


def _refused(field: _Field, text: str, why: str) -> ValueError:
    or_names = f" or {field.names[0]}-{field.names[-1]}" if field.names else ""
    return ValueError(f"the {field.what} {text!r}: {why}; expected {field.lowest}-{field.highest}{or_names}")
