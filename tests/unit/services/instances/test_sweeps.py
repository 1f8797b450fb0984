"""Sweeps and schedules, over real supervisors."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from manager.domain.instance import Phase
from manager.errors import EngineError, EngineUnreachableError, Reason
from manager.services.instances.sweeps import Schedule, Swept
from tests.support.fleet_rig import Rig, until

if TYPE_CHECKING:
    from collections.abc import Callable

START = Schedule("0 8 * * *", "start", "a", "Europe/Berlin")
STOP = Schedule("0 20 * * *", "stop", "a", None)
NEXT = datetime(2026, 11, 30, 8, 0, tzinfo=UTC)
REAP = Schedule("*/5 * * * *", "reap", None, None)


class Scheduler:
    """Ticks when the test says so."""

    def __init__(self) -> None:
        self.ticks: dict[str, Callable[[], None]] = {}
        self.lines: list[tuple[str, str | None]] = []
        self.intervals: list[float] = []

    def every(self, name: str, interval_s: float, tick: Callable[[], None]) -> None:
        self.ticks[name] = tick
        self.intervals.append(interval_s)

    def cron(self, name: str, line: str, timezone: str | None, tick: Callable[[], None]) -> None:
        self.ticks[name] = tick
        self.lines.append((line, timezone))

    def remove(self, name: str) -> None:
        del self.ticks[name]

    def upcoming(self, name: str, count: int) -> tuple[datetime, ...]:
        assert name in self.ticks
        return (NEXT,) * count

    def start(self) -> None: ...
    def stop(self) -> None: ...


def scheduled(rig: Rig) -> Scheduler:
    scheduler = Scheduler()
    rig.sweeps.schedule(scheduler)
    return scheduler


async def test_a_sweep_says_of_each_instance_what_became_of_it_and_why() -> None:
    rig = Rig("idle", "stopped", "used")
    rig.add("pinned", pinned=True)
    async with rig.running():
        for name in ("idle", "used", "pinned"):
            await rig.capacity.start(name)
        await rig["idle"].configure({"ttl_s": 0.001})
        rig.add("never")
        await until(lambda: rig["idle"].idle)
        lease = rig["used"].try_lease()
        assert lease is not None
        foreseen = await rig.sweeps.reap(dry_run=True)
        assert Swept("idle", "would_stop", "idle past its TTL of 0.001 s") in foreseen
        assert rig.view("idle").phase is Phase.READY
        assert await rig.sweeps.reap() == (
            Swept("idle", "stopped", "idle past its TTL of 0.001 s"),
            Swept("stopped", "kept", "stopped"),
            Swept("used", "kept", "1 open leases"),
            Swept("pinned", "kept", "pinned"),
            Swept("never", "kept", "unavailable"),
        )
        lease.release()
        left = re.fullmatch(r"used recently; (\d+) s left of 900 s", (await rig.sweeps.reap())[2].detail)
        assert left is not None
        assert 880 < int(left[1]) <= 900
        await rig["used"].configure({"ttl_s": 0})
        assert (await rig.sweeps.reap())[2].detail == "its TTL is 0: it is never stopped for being idle"
        assert rig.view("idle").phase is Phase.STOPPED


async def test_a_sweep_lists_orphans_with_the_command_and_never_touches_them() -> None:
    rig = Rig("a")
    rig.engine.put("m-ollama-old", "old")
    rig.engine.put("left", "a", "exited")
    async with rig.running():
        for dry_run in (True, False):
            assert (await rig.sweeps.reap(dry_run=dry_run))[1:] == (
                Swept(
                    "left",
                    "kept",
                    "orphan, it has ended: the container of instance 'a' is named m-ollama-a; this one was "
                    "renamed; `docker rm -f left` removes it",
                ),
                Swept(
                    "m-ollama-old",
                    "kept",
                    "orphan, it runs: it is labelled as instance 'old', which is not configured; "
                    "`docker rm -f m-ollama-old` removes it",
                ),
            )
        assert {facts.name for facts in rig.engine.containers.values()} == {"m-ollama-old", "left"}


async def test_without_an_engine_nothing_is_swept() -> None:
    rig = Rig("a")
    rig.engine.down = "it is away"
    async with rig.running(settled=False):
        await rig.link.asked.wait()
        with pytest.raises(EngineUnreachableError, match="it is away"):
            await rig.sweeps.reap()


async def test_a_stop_that_fails_is_told_and_one_used_at_the_last_moment_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig("a", "b")
    async with rig.running():
        for name in ("a", "b"):
            await rig.capacity.start(name)
            await rig[name].configure({"ttl_s": 0.001})
        await until(lambda: rig["a"].idle and rig["b"].idle)

        async def used_just_now() -> bool:
            return False

        monkeypatch.setattr(rig["b"], "stop_if_idle", used_just_now)
        rig.engine.failing["remove"] = EngineError("it will not", reason=Reason.START_FAILED)
        assert await rig.sweeps.reap() == (
            Swept("a", "failed", "it will not"),
            Swept("b", "kept", "used just now"),
        )


async def test_the_regular_sweep_and_a_schedule_stop_what_is_idle_once() -> None:
    rig = Rig("a", "busy", schedules=(REAP,))
    async with rig.running():
        scheduler = scheduled(rig)
        assert scheduler.intervals == [2.0]
        assert scheduler.lines == [("*/5 * * * *", None)]
        for name in ("a", "busy"):
            await rig.capacity.start(name)
        await rig["a"].configure({"ttl_s": 0.001})
        await until(lambda: rig["a"].idle)
        rig.engine.stops.clear()
        scheduler.ticks["sweep"]()
        await until(lambda: rig.view("a").phase is Phase.STOPPING)
        scheduler.ticks["schedules[0]"]()
        scheduler.ticks["sweep"]()
        rig.engine.stops.set()
        await until(lambda: rig.view("a").phase is Phase.STOPPED)
        assert rig.engine.calls.count("signal a") == 1
        assert rig.view("busy").phase is Phase.READY


async def test_a_stop_that_hangs_is_not_asked_for_twice() -> None:
    rig = Rig("a")
    async with rig.running():
        scheduler = scheduled(rig)
        await rig.capacity.start("a")
        await rig["a"].configure({"ttl_s": 0.001})
        await until(lambda: rig["a"].idle)
        async with rig["a"]._last_look:  # the last look before the stop takes a while
            for _ in range(3):
                scheduler.ticks["sweep"]()
                await until(lambda: not rig.sweeps._due)
        await until(lambda: rig.view("a").phase is Phase.STOPPED)
        assert rig.journal.kinds.count("stopping") == 1


async def test_a_schedule_starts_and_stops_an_instance_and_is_told_once() -> None:
    rig = Rig("a", schedules=(START, STOP))
    async with rig.running():
        scheduler = scheduled(rig)
        assert scheduler.lines == [("0 8 * * *", "Europe/Berlin"), ("0 20 * * *", None)]
        start, stop = scheduler.ticks["schedules[0]"], scheduler.ticks["schedules[1]"]
        start()
        start()
        await until(lambda: rig.view("a").phase is Phase.READY)
        start()
        stop()
        await until(lambda: rig.view("a").phase is Phase.STOPPED)
        stop()
        await until(lambda: not rig.sweeps._due)
        assert rig.journal.details_of("scheduled") == ["start by '0 8 * * *'", "stop by '0 20 * * *'"]


async def test_a_schedule_that_is_due_before_the_engine_was_asked_waits_for_it() -> None:
    rig = Rig("a", schedules=(START,))
    scheduler = scheduled(rig)
    scheduler.ticks["schedules[0]"]()
    async with rig.running(settled=False):
        await until(lambda: rig.view("a").phase is Phase.READY)
        assert "schedule_failed" not in rig.journal.kinds


async def test_a_schedule_gets_a_place_as_a_request_does_or_says_why_not() -> None:
    rig = Rig("a", "b", max_running=1, schedules=(START,))
    async with rig.running():
        start = scheduled(rig).ticks["schedules[0]"]
        await rig.capacity.start("b")
        lease = rig["b"].try_lease()
        assert lease is not None
        start()
        await until(lambda: "schedule_failed" in rig.journal.kinds)
        assert rig.journal.details_of("schedule_failed") == [
            "0 8 * * *: lifecycle.max_running is 1; running already: b"
        ]
        lease.release()
        start()
        await until(lambda: rig.view("a").phase is Phase.READY)
        assert rig.view("b").phase is Phase.STOPPED


async def test_changed_schedules_take_the_place_of_the_old_ones_and_unchanged_ones_keep_theirs() -> None:
    rig = Rig("a", schedules=(START, STOP))
    scheduler = scheduled(rig)
    kept = scheduler.ticks["schedules[0]"]
    rig.sweeps.reconfigure((START, REAP))
    assert scheduler.ticks["schedules[0]"] is kept
    assert scheduler.lines[2:] == [("*/5 * * * *", None)]
    rig.sweeps.reconfigure((START,))
    assert set(scheduler.ticks) == {"sweep", "schedules[0]"}
    rig.sweeps.reconfigure((START, STOP))
    assert set(scheduler.ticks) == {"sweep", "schedules[0]", "schedules[1]"}
    assert scheduler.lines[3:] == [("0 20 * * *", None)]
    assert scheduler.ticks["schedules[0]"] is kept


def test_schedules_that_change_before_the_scheduler_runs_are_registered_once() -> None:
    rig = Rig("a", schedules=(START,))
    rig.sweeps.reconfigure((STOP,))
    assert scheduled(rig).lines == [("0 20 * * *", None)]


# --- what is shown of them


async def test_schedules_are_listed_with_their_next_times_and_the_regular_sweep_comes_last() -> None:
    rig = Rig("a", schedules=(START, REAP))
    assert [one.upcoming for one in await rig.sweeps.entries(3)] == [(), (), ()]
    scheduled(rig)
    start, reap, regular = await rig.sweeps.entries(3)
    assert (start.schedule, start.every_s, start.upcoming, start.last) == (START, None, (NEXT,) * 3, None)
    assert (reap.schedule, reap.upcoming) == (REAP, (NEXT,) * 3)
    assert (regular.schedule, regular.every_s, regular.upcoming, regular.last) == (None, 2.0, (), None)


async def test_the_last_run_of_each_schedule_and_what_it_did_are_listed() -> None:
    rig = Rig("a", max_running=1, schedules=(START, STOP, REAP))
    async with rig.running():
        ticks, began = scheduled(rig).ticks, rig.world.utcnow()

        async def did(place: int) -> str:
            async with asyncio.timeout(5):
                while (last := (await rig.sweeps.entries(0))[place].last) is None:
                    pass  # each look gives the loop a turn
            assert began <= last.at <= rig.world.utcnow()
            return last.detail

        ticks["schedules[0]"]()
        assert await did(0) == "starts a"
        await until(lambda: rig.view("a").phase is Phase.READY)
        ticks["schedules[2]"]()
        assert await did(2) == "nothing was idle"
        ticks["sweep"]()
        ticks["schedules[1]"]()
        assert await did(1) == "stops a"
        assert (await rig.sweeps.entries(0))[3].last is None, "the regular sweep found nothing idle"
        await until(lambda: rig.view("a").phase is Phase.STOPPED)
        await rig.capacity.start("a")
        await rig["a"].configure({"ttl_s": 0.001})
        await until(lambda: rig["a"].idle)
        ticks["sweep"]()
        assert await did(3) == "stops a"
        rig.sweeps.reconfigure((START,))
        assert [one.last is None for one in await rig.sweeps.entries(0)] == [False, False]
