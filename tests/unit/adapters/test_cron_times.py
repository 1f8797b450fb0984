"""Cron lines against a reference that looks at every minute, through the clock changes of a year."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeAlias
from zoneinfo import ZoneInfo

import pytest
import structlog
from structlog.testing import capture_logs

from manager.adapters import schedule
from manager.adapters.schedule import cron_trigger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet

MINUTE = timedelta(minutes=1)
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
END = datetime(2027, 1, 1, tzinfo=UTC)
ZONES = [
    "Europe/Berlin",
    "America/New_York",
    "Australia/Sydney",
    "America/Santiago",  # its clocks change at midnight
    "Australia/Lord_Howe",  # by half an hour
    "Africa/Casablanca",  # standard time in the month of Ramadan only
    "Asia/Kathmandu",  # UTC+05:45, no changes
    "UTC",
]
# (line, minutes, hours, days, months, weekdays counted from Monday, whether either day is enough)
Numbers: TypeAlias = "AbstractSet[int]"
EVERY = frozenset(range(60))
SOME_HOURS: dict[str, tuple[Numbers, Numbers, Numbers, Numbers, Numbers, bool]] = {
    "0 0 * * *": ({0}, {0}, EVERY, EVERY, EVERY, False),
    "0 0 * * mon": ({0}, {0}, EVERY, EVERY, {0}, False),
    "0 0 1 * *": ({0}, {0}, {1}, EVERY, EVERY, False),
    "30 2 * * *": ({30}, {2}, EVERY, EVERY, EVERY, False),
    "30 1 * * *": ({30}, {1}, EVERY, EVERY, EVERY, False),
    "15 0 * * sun": ({15}, {0}, EVERY, EVERY, {6}, False),
    "45 23 * * 6,7": ({45}, {23}, EVERY, EVERY, {5, 6}, False),
    "*/30 2 * * *": ({0, 30}, {2}, EVERY, EVERY, EVERY, False),
    "* 2 * * *": (EVERY, {2}, EVERY, EVERY, EVERY, False),
    "* 0,23 * * *": (EVERY, {0, 23}, EVERY, EVERY, EVERY, False),
    "20 */2 * * *": ({20}, set(range(0, 24, 2)), EVERY, EVERY, EVERY, False),
    "5,10-50/20 1-3 * * *": ({5, 10, 30, 50}, {1, 2, 3}, EVERY, EVERY, EVERY, False),
    "59 23 31 * *": ({59}, {23}, {31}, EVERY, EVERY, False),
    "0 8 * * mon-fri": ({0}, {8}, EVERY, EVERY, {0, 1, 2, 3, 4}, False),
    "10 2 29 mar *": ({10}, {2}, {29}, {3}, EVERY, False),
    "0 2 1-7 apr,oct sun": ({0}, {2}, set(range(1, 8)), {4, 10}, {6}, True),
    "0 3 */2 * 7": ({0}, {3}, set(range(1, 32, 2)), EVERY, {6}, False),
    "30 2 13 * fri": ({30}, {2}, {13}, EVERY, {4}, True),
}
EVERY_HOUR: dict[str, tuple[Numbers, Numbers, Numbers, bool]] = {
    "0 * * * *": ({0}, EVERY, EVERY, False),
    "30 */1 * * *": ({30}, EVERY, EVERY, False),
    "*/20 * * * *": ({0, 20, 40}, EVERY, EVERY, False),
    "* 0-23 * * sun": (EVERY, EVERY, {6}, False),
    "15,45 * 5,6 * *": ({15, 45}, {5, 6}, EVERY, False),
    "59 * 29 * sat": ({59}, {29}, {5}, True),
}


Window = tuple[datetime, datetime]
Clock = tuple[datetime, datetime]  # a moment, and what a clock on the wall shows then


def windows(zone: str) -> list[Window]:
    """Some days around each change of the clocks; where there is none, a week."""
    info = ZoneInfo(zone)
    days = [BEGIN + timedelta(days=n) for n in range(366)]
    offsets = [day.astimezone(info).utcoffset() for day in days]
    changes = [day for day, before, after in zip(days, offsets, offsets[1:], strict=False) if before != after]
    return [
        (max(day - timedelta(days=2), BEGIN), day + timedelta(days=4))
        for day in changes or [datetime(2026, 2, 27, tzinfo=UTC)]
    ]


@functools.cache
def minutes(zone: str, window: Window) -> tuple[Clock, ...]:
    """Every minute behind the first."""
    info = ZoneInfo(zone)
    begin, end = window
    moments = (begin + n * MINUTE for n in range(1, int((end - begin) / MINUTE)))
    return tuple((at, at.astimezone(info).replace(tzinfo=None)) for at in moments)


@functools.cache
def times(zone: str, window: Window) -> dict[tuple[int, int], list[Clock]]:
    """By hour and minute: each time on the clock, at its first moment or the first behind a gap."""
    found: dict[tuple[int, int], list[Clock]] = defaultdict(list)
    following = minutes(zone, window)[0][1]
    for moment, clock in minutes(zone, window):
        while following <= clock:
            found[following.hour, following.minute].append((moment, following))
            following += MINUTE
    return found


@functools.cache
def by_minute(zone: str, window: Window) -> dict[int, list[Clock]]:
    found: dict[int, list[Clock]] = defaultdict(list)
    for moment, clock in minutes(zone, window):
        found[clock.minute].append((moment, clock))
    return found


def day_matches(at: datetime, days: Numbers, weekdays: Numbers, *, either: bool) -> bool:
    by_day, by_weekday = at.day in days, at.weekday() in weekdays
    return (by_day or by_weekday) if either else (by_day and by_weekday)


def by_the_clock(line: str, zone: str, window: Window) -> list[datetime]:
    minute, hour, days, months, weekdays, either = SOME_HOURS[line]
    found = {
        moment
        for h, m in itertools.product(hour, minute)
        for moment, clock in times(zone, window)[h, m]
        if clock.month in months and day_matches(clock, days, weekdays, either=either)
    }
    return sorted(found)


def by_elapsed_time(line: str, zone: str, window: Window) -> list[datetime]:
    minute, days, weekdays, either = EVERY_HOUR[line]
    found = [
        moment
        for m in minute
        for moment, clock in by_minute(zone, window)[m]
        if day_matches(clock, days, weekdays, either=either)
    ]
    return sorted(found)


def fired(line: str, zone: str, window: Window) -> Iterator[datetime]:
    trigger = cron_trigger(line, zone)
    previous, end = window
    while (at := trigger.get_next_fire_time(previous, previous)) < end:
        assert at > previous
        yield at
        previous = at


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("line", SOME_HOURS)
def test_a_line_of_some_hours_misses_no_time_and_runs_once_when_a_time_comes_twice(
    line: str, zone: str
) -> None:
    for window in windows(zone):
        assert list(fired(line, zone, window)) == by_the_clock(line, zone, window)


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("line", EVERY_HOUR)
def test_a_line_of_every_hour_goes_by_elapsed_time(line: str, zone: str) -> None:
    for window in windows(zone):
        assert list(fired(line, zone, window)) == by_elapsed_time(line, zone, window)


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Australia/Sydney"])
@pytest.mark.parametrize("line", [line for line, fields in SOME_HOURS.items() if len(fields[0]) == 1])
def test_a_whole_year_agrees(line: str, zone: str) -> None:
    year = (BEGIN, END)
    assert list(fired(line, zone, year)) == by_the_clock(line, zone, year)


def next_time(line: str, zone: str, *, since: datetime) -> datetime:
    at: datetime = cron_trigger(line, zone).get_next_fire_time(None, since)
    return at.astimezone(ZoneInfo(zone))


def test_a_time_that_the_clocks_skip_comes_behind_the_gap() -> None:
    at = next_time("30 2 * * *", "Europe/Berlin", since=datetime(2026, 3, 29, 0, 0, tzinfo=UTC))
    assert at.isoformat() == "2026-03-29T03:00:00+02:00"


def test_midnight_after_the_clocks_went_forward_is_not_lost() -> None:
    sunday = datetime(2026, 3, 29, 12, 0, tzinfo=UTC)
    assert next_time("0 0 * * *", "Europe/Berlin", since=sunday).isoformat() == "2026-03-30T00:00:00+02:00"
    assert next_time("0 0 * * mon", "Europe/Berlin", since=sunday).isoformat() == "2026-03-30T00:00:00+02:00"


def test_a_daemon_that_starts_in_the_hour_that_comes_again_does_not_run_what_has_come() -> None:
    again = datetime(2026, 10, 25, 1, 10, tzinfo=UTC)  # 02:10 for the second time
    at = next_time("30 2 * * *", "Europe/Berlin", since=again)
    assert at.isoformat() == "2026-10-26T02:30:00+01:00"


@pytest.mark.parametrize("fraction", [0, 1, 499_999, 999_999])
def test_a_time_within_the_next_second_is_not_passed_over(fraction: int) -> None:
    just_before = datetime(2026, 8, 3, 7, 59, 59, fraction, tzinfo=UTC)
    eight = datetime(2026, 8, 3, 8, 0, tzinfo=UTC)
    trigger = cron_trigger("0 8 * * *", "UTC")
    assert trigger.get_next_fire_time(None, just_before) == eight
    assert trigger.get_next_fire_time(just_before, just_before) == eight
    assert trigger.get_next_fire_time(None, eight) == eight
    assert trigger.get_next_fire_time(eight, eight) == eight + timedelta(days=1)


def test_a_day_that_is_decades_away_is_found() -> None:
    at = next_time("0 0 29 2 */7", "UTC", since=BEGIN)  # a Sunday, the 29th of February
    assert at.date().isoformat() == "2032-02-29"


LOCAL = """
import logging, sys, structlog
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
from datetime import UTC, datetime
from manager.adapters.schedule import ApScheduler, cron_trigger
at = cron_trigger("0 8 * * *", None).get_next_fire_time(None, datetime(2026, 8, 1, tzinfo=UTC))
ApScheduler().cron("x", "0 8 * * *", None, lambda: None)
print(at.astimezone(UTC).isoformat())
"""


@pytest.mark.parametrize(
    ("tz", "hour", "warned"),
    [
        ("UTC0", 8, True),
        ("CET-1CEST,M3.5.0,M10.5.0/3", 8, True),
        ("nonsense", 8, True),
        (" ", 8, True),
        ("../../etc/passwd", 8, True),
        ("/etc/passwd", 8, True),
        ("<+03>-3", 8, True),
        ("/dev", 8, True),
        ("a/../b", 8, True),
        ("Europe", 8, True),
        ("Europe/Berlin", 6, False),
        (":Europe/Berlin", 6, False),
    ],
)
def test_any_text_in_tz_leaves_a_schedule_with_a_zone(tz: str, hour: int, *, warned: bool) -> None:
    environ = os.environ | {"TZ": tz}
    done = subprocess.run(
        [sys.executable, "-c", LOCAL], env=environ, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"2026-08-01T{hour:02}:00:00+00:00\n"
    assert ("local_time_zone_unknown" in done.stderr) is warned
    assert "Traceback" not in done.stderr


def test_the_system_s_own_zone_file_is_local_time() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOCAL],
        env=os.environ | {"TZ": ":/etc/localtime"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2026-0")


def test_a_system_without_any_zone_uses_utc_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> ZoneInfo:
        import warnings  # noqa: PLC0415

        warnings.warn("Can not find any timezone configuration, defaulting to UTC.", stacklevel=1)
        return ZoneInfo("UTC")

    monkeypatch.setattr("tzlocal.get_localzone", none)
    monkeypatch.setattr(schedule, "_log", structlog.get_logger())
    with capture_logs() as logs:
        trigger = cron_trigger("0 8 * * *", None)
    assert trigger.get_next_fire_time(None, BEGIN) == BEGIN + timedelta(hours=8)
    assert [entry["schedules_use"] for entry in logs] == ["UTC"]
