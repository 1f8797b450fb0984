"""When things happen by the clock: cronsim computes the times of cron lines, APScheduler keeps them.

APScheduler's own CronTrigger is not used: it loses times of the hour 0 after the clocks went forward and runs
times twice that come twice in autumn (seen with 3.11).

APScheduler keeps wall-clock times and sleeps on the monotonic clock. When the two move apart (suspend and
resume, a clock that was set) it would sleep through a line, or stand still until an old time comes again;
`ApScheduler` compares both every few seconds and has the times computed anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
import warnings
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import structlog
import tzlocal
from apscheduler.events import EVENT_JOB_SUBMITTED
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.interval import IntervalTrigger
from cronsim import CronSim

from manager.domain import cron

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import tzinfo

    from apscheduler.events import JobSubmissionEvent

_log = structlog.get_logger("schedule")

_CLOCK_CHECK_S = 5.0
_CLOCK_STEP_S = 1.0
_LATE_S = 60.0
_SECOND = timedelta(seconds=1)


def cron_trigger(line: str, timezone: str | None) -> BaseTrigger:
    """The trigger for a line of crontab(5); `timezone` None is local time, or UTC where that is unknown.

    Raises:
        ValueError: not a line as in crontab(5), one that never fires, or an unknown time zone.
    """
    return _Cron(cron.parse(line), _local_zone() if timezone is None else _zone(timezone))


class _Cron(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """The times of a line as `domain.cron.parse` writes it.

    When the clocks go forward, a time that they skip comes at the first moment behind the gap, together with
    all others of that gap. When they go back, a time that comes twice counts the first time only. Lines of
    every hour go by elapsed time instead (as in Debian's cron).
    """

    def __init__(self, line: str, zone: tzinfo) -> None:
        self._line = line
        self.zone = zone

    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime | None:
        """The first time after `previous`, or from `now` on; None when there is none within 50 years."""
        least = now if previous is None else previous + timedelta.resolution
        times = CronSim(self._line, (least - _SECOND).astimezone(self.zone))
        # Looking for a single minute, cronsim 2.8 leaps an hour, and over a change of half an hour
        # (Australia/Lord_Howe). With one more it goes minute by minute; minute 60 never comes.
        times.minutes.add(60)
        # cronsim begins behind a time on the clock. In autumn it may find one that came an hour ago.
        for at in times:
            found = at.astimezone(UTC)
            if found >= least:
                return found
        return None


class _Newest(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """A trigger that passes over missed times.

    APScheduler would compute each of them to run the last one once: an interval of half a second and a week
    of suspend would keep the event loop busy for many seconds.
    """

    def __init__(self, trigger: BaseTrigger) -> None:
        self._trigger = trigger

    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime | None:
        at: datetime | None = self._trigger.get_next_fire_time(previous and max(previous, now), now)
        return at


class ApScheduler:
    """Implements `services.ports.Scheduler`. Ticks run on the event loop, and never after `stop`.

    A tick that raises is logged; its schedule goes on. However many times were missed, it runs once.
    """

    def __init__(self) -> None:
        logging.getLogger("apscheduler").setLevel(logging.WARNING)  # it tells of every single run
        self._scheduler = AsyncIOScheduler(
            timezone=UTC,
            job_defaults={"misfire_grace_time": None, "coalesce": True, "max_instances": 1},
        )
        self._scheduler.add_listener(self._report_late, EVENT_JOB_SUBMITTED)
        self._triggers: dict[str, Callable[[], BaseTrigger]] = {}
        self._running = False
        self._clock_check: asyncio.TimerHandle | None = None
        self._ahead_s = 0.0

    def every(self, name: str, interval_s: float, tick: Callable[[], None]) -> None:
        """Run `tick` every `interval_s` seconds, for the first time one interval after the start."""
        if interval_s <= 0:
            raise ValueError(f"the interval of {name} is {interval_s} s: it must be above 0")
        self._add(name, lambda: IntervalTrigger(seconds=interval_s, timezone=UTC), tick)

    def cron(self, name: str, line: str, timezone: str | None, tick: Callable[[], None]) -> None:
        """Run `tick` by a line of crontab(5).

        Raises:
            ValueError: as `cron_trigger`.
        """
        trigger = cron_trigger(line, timezone)
        self._add(name, lambda: trigger, tick)

    def remove(self, name: str) -> None:
        """End the schedule of that name; a tick that is due already may still come."""
        del self._triggers[name]
        self._scheduler.remove_job(name)

    def upcoming(self, name: str, count: int) -> tuple[datetime, ...]:
        """Return the next times of a cron line, in its time zone; none where there is no such schedule.

        It may take tens of milliseconds for a line that seldom fires. Any thread may call it.
        """
        trigger = self._triggers[name]() if name in self._triggers else None
        if not isinstance(trigger, _Cron):
            return ()
        found: list[datetime] = []
        now = datetime.now(UTC)
        while len(found) < count and (at := trigger.get_next_fire_time(found[-1] if found else None, now)):
            found.append(at)
        return tuple(at.astimezone(trigger.zone) for at in found)

    def start(self) -> None:
        """Begin; called on the event loop that the ticks are to run on."""
        self._scheduler.start()
        self._running = True
        self._ahead_s = time.time() - time.monotonic()
        self._watch_clock()

    def stop(self) -> None:
        """End for good; stopping twice, or before the start, is no error."""
        if not self._running:
            return
        self._running = False
        if self._clock_check is not None:
            self._clock_check.cancel()
        self._scheduler.shutdown(wait=False)

    def _add(self, name: str, trigger: Callable[[], BaseTrigger], tick: Callable[[], None]) -> None:
        if name in self._triggers:
            raise ValueError(f"there is a schedule {name} already")

        # A coroutine, because APScheduler would run a plain function in a thread.
        async def run() -> None:
            if not self._running:
                return
            try:
                tick()
            except Exception:  # noqa: BLE001  (whatever it is, the next tick still comes)
                _log.exception("schedule_tick_failed", schedule=name)

        self._triggers[name] = trigger
        self._scheduler.add_job(run, _Newest(trigger()), id=name, name=name)

    def _report_late(self, event: JobSubmissionEvent) -> None:
        planned = event.scheduled_run_times[0]
        late_s = (datetime.now(UTC) - planned).total_seconds()
        if late_s > _LATE_S:
            _log.warning(
                "schedule_late",
                schedule=event.job_id,
                planned=planned.astimezone(UTC).isoformat(),
                late_s=round(late_s),
                detail="runs once for all times that were missed",
            )

    def _watch_clock(self) -> None:
        loop = asyncio.get_running_loop()
        self._clock_check = loop.call_later(_CLOCK_CHECK_S, self._watch_clock)
        ahead_s = time.time() - time.monotonic()
        stepped_s, self._ahead_s = ahead_s - self._ahead_s, ahead_s
        if stepped_s > _CLOCK_STEP_S:
            self._scheduler.wakeup()  # what became due meanwhile runs now, once
        elif stepped_s < -_CLOCK_STEP_S:
            for name, trigger in self._triggers.items():
                self._scheduler.reschedule_job(name, trigger=_Newest(trigger()))


def _zone(timezone: str) -> tzinfo:
    try:
        return ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as exc:
        raise ValueError(f"the time zone {timezone!r} is unknown: {exc}") from exc


def _local_zone() -> tzinfo:
    """The zone that the system says. Any text can be in TZ, and a small container has no zone at all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            zone: tzinfo = tzlocal.get_localzone()
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            problem = " ".join(str(error.args[0] if error.args else error).split())
            zone = UTC
        else:
            problem = "; ".join(str(one.message) for one in caught)
    if problem:
        _log.warning(
            "local_time_zone_unknown",
            problem=problem,
            schedules_use=str(zone),
            hint="give the schedule a `timezone`, or set TZ to a name such as Europe/Berlin",
        )
    return zone
