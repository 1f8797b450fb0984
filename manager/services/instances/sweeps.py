"""Sweeps of everything idle past its TTL, and the configured schedules."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from manager.domain.instance import Phase
from manager.errors import ManagerError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from manager.domain.orphans import Orphan
    from manager.services.instances.capacity import Capacity
    from manager.services.instances.engine_link import EngineLink
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import View
    from manager.services.instances.supervisor import Supervisor
    from manager.services.ports import Scheduler
    from manager.services.world import World


@dataclass(frozen=True, slots=True)
class Schedule:
    """One cron line and what it does; `instance` is None for a sweep of all."""

    cron: str
    action: Literal["start", "stop", "reap"]
    instance: str | None
    timezone: str | None


@dataclass(frozen=True, slots=True)
class Swept:
    """The effect of one sweep on one instance, and why; of an orphan, `instance` is the container's name."""

    instance: str
    action: Literal["stopped", "would_stop", "kept", "failed"]
    detail: str


@dataclass(frozen=True, slots=True)
class Ran:
    """The last time that a schedule was due, and what it did."""

    at: datetime
    detail: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One schedule, or the regular sweep where `schedule` is None.

    Attributes:
        every_s: between two regular sweeps; None for a schedule.
        upcoming: the next times, in the schedule's time zone.
        last: since the daemon began; of the regular sweep the last one that found something idle. None
            without one.
    """

    schedule: Schedule | None
    every_s: float | None
    upcoming: tuple[datetime, ...]
    last: Ran | None


class Sweeps:
    """Owns what is due: the regular sweep and the schedules whose time has come.

    A tick of the scheduler only notes what is due; `run` does it. What is due twice is done once.

    Args:
        world: the journal.
        fleet: the instances.
        capacity: starts and stops them.
        links: the orphans, and whether the engine is up.
        schedules: the configured ones.
        interval_s: of the regular sweep.
    """

    def __init__(
        self,
        world: World,
        fleet: Fleet,
        capacity: Capacity,
        links: Sequence[EngineLink],
        *,
        schedules: tuple[Schedule, ...],
        interval_s: float,
    ) -> None:
        self._world = world
        self._fleet = fleet
        self._capacity = capacity
        self._links = links
        self._schedules = schedules
        self._interval_s = interval_s
        self._scheduler: Scheduler | None = None
        self._due: dict[Schedule | None, None] = {}
        self._last: dict[Schedule | None, Ran] = {}
        self._news = asyncio.Event()

    def schedule(self, scheduler: Scheduler) -> None:
        """Register the regular sweep and the configured schedules."""
        self._scheduler = scheduler
        scheduler.every("sweep", self._interval_s, lambda: self._tick(None))
        for number, entry in enumerate(self._schedules):
            self._add(scheduler, number, entry)

    def reconfigure(self, schedules: tuple[Schedule, ...]) -> None:
        """Take over new schedules. One that has not changed keeps its next time."""
        before, self._schedules = self._schedules, schedules
        self._last = {entry: ran for entry, ran in self._last.items() if entry in (None, *schedules)}
        if self._scheduler is None:
            return
        for number, (old, new) in enumerate(zip_longest(before, schedules)):
            if old != new and old is not None:
                self._scheduler.remove(_job(number))
            if old != new and new is not None:
                self._add(self._scheduler, number, new)

    def _add(self, scheduler: Scheduler, number: int, entry: Schedule) -> None:
        scheduler.cron(_job(number), entry.cron, entry.timezone, lambda: self._tick(entry))

    async def entries(self, count: int) -> tuple[Entry, ...]:
        """Return the schedules as they are configured, with their next times; then the regular sweep."""
        schedules, scheduler = self._schedules, self._scheduler

        def upcoming() -> list[tuple[datetime, ...]]:
            if scheduler is None:
                return [()] * len(schedules)
            return [scheduler.upcoming(_job(number), count) for number in range(len(schedules))]

        times = await asyncio.to_thread(upcoming)
        return (
            *(
                Entry(entry, None, at, self._last.get(entry))
                for entry, at in zip(schedules, times, strict=True)
            ),
            Entry(None, self._interval_s, (), self._last.get(None)),
        )

    async def reap(self, *, dry_run: bool = False) -> tuple[Swept, ...]:
        """Sweep once; return what became of each instance with a container, and of each orphan.

        An orphan is never stopped: nothing tells whether it is in use.

        Raises:
            EngineUnreachableError: nothing can be stopped now.
        """
        needed = [link for link in self._links if link.is_needed]
        if needed and not any(link.up for link in needed):
            needed[0].refuse_if_down()
        swept = await asyncio.gather(
            *(self._sweep(one, dry_run=dry_run) for one in self._fleet.supervisors())
        )
        orphans = (orphan for link in self._links for orphan in link.orphans)
        return (*swept, *map(_kept_orphan, orphans))

    async def run(self) -> None:
        """Do what is due once the engine was asked, until cancelled."""
        for link in self._links:
            await link.asked.wait()  # before that, the engine counts as away
        async with asyncio.TaskGroup() as tasks:
            sweeping: dict[str, asyncio.Task[Swept]] = {}
            while True:
                await self._news.wait()
                self._news.clear()
                due, self._due = self._due, {}
                for entry in due:
                    if entry is None or entry.action == "reap":
                        idle = [one for one in self._fleet.supervisors() if one.idle]
                        if idle or entry is not None:
                            stops = ", ".join(one.id for one in idle)
                            self._note(entry, f"stops {stops}" if stops else "nothing was idle")
                        for supervisor in idle:
                            # A stop that hangs must not delay the others, nor be asked for twice.
                            if supervisor.id not in sweeping or sweeping[supervisor.id].done():
                                sweeping[supervisor.id] = tasks.create_task(
                                    self._sweep(supervisor, dry_run=False)
                                )
                    else:
                        self._keep(entry)

    def _tick(self, entry: Schedule | None) -> None:
        self._due[entry] = None
        self._news.set()

    async def _sweep(self, supervisor: Supervisor, *, dry_run: bool) -> Swept:
        if not supervisor.idle:
            return Swept(supervisor.id, "kept", _why_kept(supervisor.view()))
        if dry_run:
            return Swept(supervisor.id, "would_stop", f"idle past its TTL of {supervisor.ttl_s:g} s")
        try:
            if not await supervisor.stop_if_idle():
                return Swept(supervisor.id, "kept", "used just now")
            await supervisor.stopped()
        except ManagerError as error:
            return Swept(supervisor.id, "failed", error.message)
        return Swept(supervisor.id, "stopped", f"idle past its TTL of {supervisor.ttl_s:g} s")

    def _keep(self, entry: Schedule) -> None:
        """Begin what a schedule asks for."""
        instance_id = str(entry.instance)
        try:
            if entry.action == "start":
                changed = self._capacity.begin_start(instance_id)
            else:
                changed = self._capacity.begin_stop(instance_id)
        except ManagerError as error:
            self._world.journal.record(
                "schedule_failed", instance=entry.instance, detail=f"{entry.cron}: {error.message}"
            )
            self._note(entry, f"failed: {error.message}")
        else:
            words = "starts" if entry.action == "start" else "stops"
            self._note(entry, f"{words} {instance_id}" if changed else f"{instance_id} is left as it is")
            if changed:
                self._world.journal.record(
                    "scheduled", instance=entry.instance, detail=f"{entry.action} by {entry.cron!r}"
                )

    def _note(self, entry: Schedule | None, detail: str) -> None:
        self._last[entry] = Ran(self._world.utcnow(), detail)


def _job(number: int) -> str:
    return f"schedules[{number}]"


def _why_kept(view: View) -> str:
    if view.phase is not Phase.READY:
        return view.phase.value
    if view.drained is not None:
        return f"out of service ({view.drained.detail}), and kept running"
    if view.in_flight:
        return f"{view.in_flight} open leases"
    if view.pinned or view.keeps_warm:
        return "pinned" if view.pinned else "a role keeps a model warm there"
    if view.ttl_s <= 0:
        return "its TTL is 0: it is never stopped for being idle"
    return f"used recently; {view.ttl_remaining_s or 0:.0f} s left of {view.ttl_s:g} s"


def _kept_orphan(orphan: Orphan) -> Swept:
    state = "it runs" if orphan.is_running else "it has ended"
    return Swept(orphan.name, "kept", f"orphan, {state}: {orphan.why}; `{orphan.remedy}` removes it")
