"""When things happen by the clock, through APScheduler; the only file that imports it.

APScheduler keeps wall-clock times and sleeps on the monotonic clock. When the two move apart (suspend and
resume, a clock that was set) it would sleep through a line, or stand still until an old time comes again;
`ApScheduler` looks at both every few seconds and has it count anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import structlog
import tzlocal
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.combining import OrTrigger
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from manager.domain import cron

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime, tzinfo

_log = structlog.get_logger("schedule")

_CLOCK_CHECK_S = 5.0
_CLOCK_STEP_S = 1.0


def cron_trigger(line: str, timezone: str | None) -> BaseTrigger:
    """The trigger for a line of crontab(5); `timezone` None is local time.

    Raises:
        ValueError: not a line as in crontab(5), one that never fires, or an unknown time zone.
    """
    when = cron.parse(line)
    zone = _zone(timezone)

    def trigger(days: str, weekdays: str) -> BaseTrigger:
        return CronTrigger(
            minute=_listed(when.minutes),
            hour=_listed(when.hours),
            day=days,
            month=_listed(when.months),
            day_of_week=weekdays,
            timezone=zone,
        )

    if when.either_day:
        return OrTrigger([trigger(_listed(when.days), "*"), trigger("*", when.weekdays)])
    return trigger(_listed(when.days), when.weekdays)


class _Newest(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """A trigger that passes over what was missed.

    To run the last of them once, APScheduler would compute each: half a second's interval and a week of
    suspend would keep the event loop busy for many seconds.
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


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _zone(timezone: str | None) -> tzinfo:
    try:
        return tzlocal.get_localzone() if timezone is None else ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as exc:
        what = "the local time zone" if timezone is None else f"the time zone {timezone!r}"
        raise ValueError(f"{what} is unknown: {exc}") from exc
