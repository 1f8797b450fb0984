"""A line of crontab(5) in words, for people who do not read it every day."""

from __future__ import annotations

from manager.domain import cron

_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
_WEEKDAYS = ("Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_ALL_MINUTES, _ALL_HOURS, _ALL_MONTHS = 60, 24, 12
# More times of the day than these are not listed one by one.
_MOST_TIMES = 6
# A longer run of numbers is told by its ends.
_SHORTEST_RANGE = 3


def cron_words(line: str) -> str:
    """Return when a line fires: `at 08:00, Monday to Friday`.

    Raises:
        ValueError: as `cron.parse`.
    """
    minute, hour, day, month, weekday = cron.parse(line).split()
    days = _days(day, weekday)
    if not days and hour != "*":
        days = ["every day"]
    return ", ".join([_times(_numbers(minute), hour), *days, *_months(_numbers(month))])


def _times(minutes: list[int], hour: str) -> str:
    if hour == "*":
        return _of_every_hour(minutes)
    hours = _numbers(hour)
    if len(hours) * len(minutes) <= _MOST_TIMES:
        return "at " + _and([f"{at:02}:{minute:02}" for at in hours for minute in minutes])
    step = _step(hours, _ALL_HOURS)
    return f"{_minutes(minutes)}, {f'every {step} hours' if step else f'in the hours {_and(_ranges(hours))}'}"


def _of_every_hour(minutes: list[int]) -> str:
    if minutes == [0]:
        return "every hour"
    words = _minutes(minutes)
    return f"{words} of every hour" if words.startswith("at") else words


def _minutes(minutes: list[int]) -> str:
    if len(minutes) == _ALL_MINUTES:
        return "every minute"
    step = _step(minutes, _ALL_MINUTES)
    if step:
        return f"every {step} minutes"
    return f"at {'minute' if len(minutes) == 1 else 'minutes'} {_and(_ranges(minutes))}"


def _step(numbers: list[int], count: int) -> int:
    """Return the step where a number comes every so many, without a break at the end; else 0."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 0
    return step if step and count % step == 0 and numbers == list(range(0, count, step)) else 0


def _days(day: str, weekday: str) -> list[str]:
    """Return the days; none where every day counts.

    Both fields must match where one of them begins with `*`, else either of them (crontab(5), NOTES).
    """
    days = None if day == "*" else _month_days(_numbers(day))
    weekdays = None if weekday == "*" else _and(_ranges(_numbers(weekday), _WEEKDAYS))
    if days is None or weekdays is None:
        return [one for one in (days, weekdays) if one is not None]
    if day.startswith("*") or weekday.startswith("*"):
        return [f"{days} if it is a {_and(_ranges(_numbers(weekday), _WEEKDAYS), 'or')}"]
    return [f"{days} and every {weekdays}"]


def _month_days(days: list[int]) -> str:
    return f"on {'day' if len(days) == 1 else 'days'} {_and(_ranges(days))} of the month"


def _months(months: list[int]) -> list[str]:
    if len(months) == _ALL_MONTHS:
        return []
    return [f"in {_and(_ranges([number - 1 for number in months], _MONTHS))}"]


def _numbers(field: str) -> list[int]:
    """Return the numbers of a field; a first part such as `*/2` only says how it was written."""
    return [int(number) for number in field.split(",") if not number.startswith("*")]


def _ranges(numbers: list[int], names: tuple[str, ...] | None = None) -> list[str]:
    """Return numbers, or their names, with runs as `first to last`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    found: list[str] = []
    for run in runs:
        named = [names[number] if names else str(number) for number in run]
        found += [f"{named[0]} to {named[-1]}"] if len(run) >= _SHORTEST_RANGE else named
    return found


def _and(words: list[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
