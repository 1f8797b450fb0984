"""Times are computed through the trigger; only the few tests of a running schedule let it run, at once."""

from __future__ import annotations

import asyncio
import logging
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from manager.adapters import schedule
from manager.adapters.schedule import ApScheduler, cron_trigger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SATURDAY = datetime(2026, 8, 1, 12, 0, tzinfo=UTC)


def fires(line: str, *, since: datetime = SATURDAY, count: int = 3, timezone: str = "UTC") -> list[str]:
    trigger = cron_trigger(line, timezone)
    previous, now, found = None, since, []
    for _ in range(count):
        at: datetime = trigger.get_next_fire_time(previous, now)
        found.append(f"{at:%a %Y-%m-%d %H:%M}")
        previous = now = at
    return found


def test_numeric_weekdays_are_those_of_crontab() -> None:
    monday_to_friday = [
        "Mon 2026-08-03 08:00",
        "Tue 2026-08-04 08:00",
        "Wed 2026-08-05 08:00",
        "Thu 2026-08-06 08:00",
        "Fri 2026-08-07 08:00",
        "Mon 2026-08-10 08:00",
    ]
    assert fires("0 8 * * 1-5", count=6) == monday_to_friday
    assert fires("0 8 * * mon-fri", count=6) == monday_to_friday


@pytest.mark.parametrize("sunday", ["0", "7", "sun"])
def test_sunday_has_three_spellings(sunday: str) -> None:
    assert fires(f"0 8 * * {sunday}", count=2) == ["Sun 2026-08-02 08:00", "Sun 2026-08-09 08:00"]


def test_two_restricted_days_fire_on_either() -> None:
    assert fires("0 0 13 * fri", count=4) == [
        "Fri 2026-08-07 00:00",
        "Thu 2026-08-13 00:00",
        "Fri 2026-08-14 00:00",
        "Fri 2026-08-21 00:00",
    ]


def test_a_day_that_matches_both_ways_fires_once() -> None:
    since = datetime(2026, 11, 7, tzinfo=UTC)
    assert fires("0 0 13 * fri", since=since, count=2) == ["Fri 2026-11-13 00:00", "Fri 2026-11-20 00:00"]


def test_a_day_that_begins_with_an_asterisk_must_match_as_well() -> None:
    # The 1st, 8th, 15th, 22nd and 29th, as far as they are Fridays.
    assert fires("0 0 */7 * fri", count=3) == [
        "Fri 2027-01-01 00:00",
        "Fri 2027-01-08 00:00",
        "Fri 2027-01-15 00:00",
    ]


def test_a_step_that_only_crontab_knows_is_taken() -> None:
    assert fires("*/60 * * * *", count=2) == ["Sat 2026-08-01 12:00", "Sat 2026-08-01 13:00"]


def test_the_time_zone_of_a_line_is_its_own() -> None:
    trigger = cron_trigger("0 8 * * *", "Asia/Tokyo")
    assert trigger.get_next_fire_time(None, SATURDAY) == datetime(2026, 8, 1, 23, 0, tzinfo=UTC)


def test_no_time_zone_means_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tzlocal.get_localzone", lambda: ZoneInfo("America/New_York"))
    trigger = cron_trigger("0 8 * * *", None)
    assert trigger.get_next_fire_time(None, SATURDAY) == SATURDAY


@pytest.mark.parametrize("line", ["0 0 8 * * *", "0 8 * *", "0 0 last * *", "0 0 * jan/2x *", "nonsense"])
def test_a_line_that_is_not_one_of_crontab_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"fields|: not a|: no |: no "):
        cron_trigger(line, None)
    with pytest.raises(ValueError, match=r"fields|: not a|: no |: no "):
        ApScheduler().cron("x", line, None, lambda: None)


@pytest.mark.parametrize("timezone", ["Mars/Olympus", "../../etc/passwd", "", "Europe"])
def test_an_unknown_time_zone_is_refused(timezone: str) -> None:
    with pytest.raises(ValueError, match=r"time zone .* is unknown"):
        cron_trigger("0 8 * * *", timezone)


def test_a_good_line_is_accepted() -> None:
    cron_trigger("0 8 * * mon-fri", "Europe/Berlin")
    cron_trigger("@daily", None)


FIELD = st.sampled_from(["*", "*/2", "*/5", "1", "13", "5-9", "1,15", "28-31", "30"])
WEEKDAY = st.sampled_from(["*", "*/2", "0", "7", "1-5", "sat,sun", "fri-sun", "3"])


@given(
    day=FIELD,
    weekday=WEEKDAY,
    month=st.sampled_from(["*", "2", "jan-mar", "4,6", "*/5"]),
    hour=st.sampled_from(["*", "0", "8-18/2", "23"]),
    since=st.datetimes(datetime(2023, 1, 1), datetime(2028, 1, 1)),  # noqa: DTZ001  (given its zone below)
)
def test_the_next_day_is_the_one_that_cron_itself_would_take(
    day: str, weekday: str, month: str, hour: str, since: datetime
) -> None:
    line = f"17 {hour} {day} {month} {weekday}"
    since = since.replace(tzinfo=UTC)
    try:
        trigger = cron_trigger(line, "UTC")
    except ValueError as exc:
        assert "never fires" in str(exc)  # noqa: PT017
        return
    at = trigger.get_next_fire_time(None, since)
    assert at >= since
    assert cron_matches(line, at)
    noon = since.replace(hour=12, minute=0)
    days_before = [noon + timedelta(days=n) for n in range(1, (at.date() - since.date()).days)]
    assert not any(day_matches(line, between) for between in days_before)


def cron_matches(line: str, at: datetime) -> bool:
    minute, hour, _, _, _ = line.split()
    return str(at.minute) == minute and at.hour in values(hour, 0, 23) and day_matches(line, at)


def day_matches(line: str, at: datetime) -> bool:
    """The rule of cron's own `cron.c`: the flags tell whether a field begins with an asterisk."""
    _, _, day, month, weekday = line.split()
    by_day = at.day in values(day, 1, 31)
    by_weekday = at.isoweekday() % 7 in {number % 7 for number in values(weekday, 0, 7)}
    both = by_day and by_weekday if day[0] == "*" or weekday[0] == "*" else by_day or by_weekday
    return at.month in values(month, 1, 12) and both


def values(field: str, lowest: int, highest: int) -> set[int]:
    named = {"jan-mar": "1-3", "sat,sun": "6,7", "fri-sun": "5-7"}.get(field, field)
    found: set[int] = set()
    for part in named.split(","):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        if span == "*":
            first, last = str(lowest), str(6 if highest == 7 else highest)
        found.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return found


@pytest.fixture
async def scheduler() -> AsyncIterator[ApScheduler]:
    scheduler = ApScheduler()
    yield scheduler
    scheduler.stop()


async def test_a_tick_comes_again_and_again_on_the_loop(scheduler: ApScheduler) -> None:
    ticks: list[int] = []
    enough = asyncio.Event()

    def tick() -> None:
        ticks.append(threading.get_ident())
        if len(ticks) == 3:
            enough.set()

    scheduler.every("sweep", 0.01, tick)
    scheduler.start()
    await asyncio.wait_for(enough.wait(), 10)
    assert set(ticks) == {threading.get_ident()}


async def test_a_tick_that_raises_is_logged_and_comes_again(scheduler: ApScheduler) -> None:
    ticks = 0
    enough = asyncio.Event()

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 3:
            enough.set()
        raise RuntimeError("the disk is on fire")

    scheduler.every("sweep", 0.01, tick)
    with structlog.testing.capture_logs() as logs:
        scheduler.start()
        await asyncio.wait_for(enough.wait(), 10)
        scheduler.stop()
    assert {(entry["event"], entry["schedule"]) for entry in logs} == {("schedule_tick_failed", "sweep")}


async def test_no_tick_comes_after_stop(scheduler: ApScheduler) -> None:
    ticks = 0
    first = asyncio.Event()

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        first.set()

    scheduler.every("sweep", 0.001, tick)
    scheduler.start()
    await asyncio.wait_for(first.wait(), 10)
    scheduler.stop()
    seen = ticks
    for _ in range(100):
        await asyncio.sleep(0)
    assert ticks == seen
    scheduler.stop()


async def test_apscheduler_does_not_tell_of_every_run(
    scheduler: ApScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    done = asyncio.Event()
    caplog.set_level(logging.INFO)
    scheduler.every("sweep", 0.01, done.set)
    scheduler.start()
    await asyncio.wait_for(done.wait(), 10)
    scheduler.stop()
    await asyncio.sleep(0)
    assert [record for record in caplog.records if record.name.startswith("apscheduler")] == []


def next_run(scheduler: ApScheduler, name: str) -> datetime:
    at: datetime = scheduler._scheduler.get_job(name).next_run_time
    return at


def clock_stepped(scheduler: ApScheduler, by_s: float, *jobs: str) -> None:
    """As if the wall clock had been moved: every stored time is now off by as much."""
    for name in jobs:
        job: Any = scheduler._scheduler.get_job(name)
        job.modify(next_run_time=job.next_run_time - timedelta(seconds=by_s))
    scheduler._ahead_s -= by_s
    scheduler._watch_clock()


async def test_a_clock_set_back_does_not_stop_the_ticks(scheduler: ApScheduler) -> None:
    scheduler.every("sweep", 2.0, lambda: None)
    scheduler.cron("morning", "0 8 * * *", "UTC", lambda: None)
    scheduler.start()
    clock_stepped(scheduler, -3600.0, "sweep", "morning")
    now = datetime.now(UTC)
    assert next_run(scheduler, "sweep") <= now + timedelta(seconds=2)
    assert next_run(scheduler, "morning").hour == 8


async def test_a_line_that_became_due_in_suspend_runs_once_on_resume(scheduler: ApScheduler) -> None:
    ticks = 0
    done = asyncio.Event()

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        done.set()

    scheduler.cron("morning", "* * * * *", "UTC", tick)
    scheduler.start()
    clock_stepped(scheduler, 8 * 3600.0, "morning")
    await asyncio.wait_for(done.wait(), 10)
    assert ticks == 1
    assert next_run(scheduler, "morning") > datetime.now(UTC) - timedelta(seconds=1)


@pytest.mark.parametrize("suspended", [timedelta(minutes=1), timedelta(days=365)])
async def test_a_long_suspend_costs_no_more_than_a_short_one(
    scheduler: ApScheduler, suspended: timedelta
) -> None:
    scheduler.every("sweep", 0.5, lambda: None)
    scheduler.cron("minutely", "* * * * *", "UTC", lambda: None)
    scheduler.start()
    for name in ("sweep", "minutely"):
        job: Any = scheduler._scheduler.get_job(name)
        resumed = datetime.now(UTC) + suspended
        assert len(job._get_run_times(resumed)) == 1
        following = job.trigger.get_next_fire_time(job.next_run_time, resumed)
        assert resumed < following <= resumed + timedelta(minutes=1)


def test_an_interval_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        ApScheduler().every("sweep", 0, lambda: None)


def test_a_name_is_given_once() -> None:
    scheduler = ApScheduler()
    scheduler.every("sweep", 1, lambda: None)
    with pytest.raises(ValueError, match="there is a schedule sweep already"):
        scheduler.every("sweep", 1, lambda: None)


async def test_a_schedule_that_was_removed_does_not_run_and_its_name_is_free(scheduler: ApScheduler) -> None:
    first, second = [], asyncio.Event()
    scheduler.every("sweep", 0.01, lambda: first.append(1))
    scheduler.start()
    scheduler.remove("sweep")
    scheduler.every("sweep", 0.01, second.set)
    await asyncio.wait_for(second.wait(), 10)
    assert first == []


async def test_a_run_that_comes_late_is_reported_with_the_time_that_was_planned(
    scheduler: ApScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "_log", structlog.get_logger())
    done = asyncio.Event()
    scheduler.cron("morning", "* * * * *", "UTC", done.set)
    with capture_logs() as logs:
        scheduler.start()
        planned = next_run(scheduler, "morning") - timedelta(seconds=8 * 3600.0)
        clock_stepped(scheduler, 8 * 3600.0, "morning")
        await asyncio.wait_for(done.wait(), 10)
    (late,) = logs
    assert (late["event"], late["schedule"]) == ("schedule_late", "morning")
    assert late["planned"] == planned.isoformat()
    assert late["late_s"] > 7 * 3600


async def test_the_next_times_of_a_line_are_in_its_time_zone(scheduler: ApScheduler) -> None:
    scheduler.cron("opens", "30 8 * * *", "Europe/Berlin", lambda: None)
    scheduler.every("sweep", 2.0, lambda: None)
    first, second, third = scheduler.upcoming("opens", 3)
    assert {at.strftime("%H:%M") for at in (first, second, third)} == {"08:30"}
    assert datetime.now(UTC) < first < second < third
    assert str(first.tzinfo) == "Europe/Berlin"
    assert scheduler.upcoming("sweep", 3) == ()
    assert scheduler.upcoming("gone", 3) == ()
