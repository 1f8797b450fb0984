"""Instances out of service: no lease, no start, open leases to their end, and the way back."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.drained import Drained
from manager.domain.instance import Limits, Phase, Target
from manager.domain.registry import InstanceRow, Operation, OrderKind
from manager.errors import (
    ConflictError,
    DrainedError,
    InvalidRequestError,
    RegistryUnwritableError,
    UnknownInstanceError,
)
from manager.services.instances.sweeps import Schedule
from tests.support.fleet_rig import Rig, until

if TYPE_CHECKING:
    from manager.services.instances.leases import Lease
    from manager.services.instances.supervisor import Supervisor

SHORT = Limits(900, 5, 5, 0.05, 0.02, 0.02, 1)
HOUR = timedelta(hours=1)


async def drain(
    rig: Rig, name: str, *, reason: str | None = None, ends: Any = None, stops: bool = True
) -> bool:
    return await rig.service.drain(name, reason=reason, until=ends, stops=stops)


def lease(instance: Any) -> Lease:
    taken = instance.try_lease()
    assert taken is not None
    return taken  # type: ignore[no-any-return]


async def out(one: Supervisor) -> None:
    async with asyncio.timeout(10):
        await one.out()


# --- drain ---


async def test_open_leases_end_however_long_they_take_and_then_the_container_is_stopped() -> None:
    rig = Rig()
    cpu = rig.add("cpu", limits=SHORT)
    async with rig.running():
        await cpu.start()
        open_lease = lease(cpu)
        assert await drain(rig, "cpu", reason="driver update") is True
        assert rig.registry.orders["cpu", OrderKind.DRAINED]["reason"] == "driver update"
        assert cpu.try_lease() is None
        await until(lambda: rig.journal.details_of("drain_waits"))  # its limit for a plain stop has passed
        assert (rig.view("cpu").phase, open_lease.cut) == (Phase.DRAINING, None)
        waiting = asyncio.create_task(out(cpu))
        assert "signal cpu" not in rig.engine.calls
        open_lease.release()
        await waiting
        view = rig.view("cpu")
        assert (view.phase, view.target, view.in_flight) == (Phase.STOPPED, Target.STOPPED, 0)
        assert view.drained is not None
        assert open_lease.cut is None
        assert len(rig.journal.details_of("drain_waits")) == 1


async def test_a_plain_stop_of_what_drains_has_its_limit_and_a_forced_one_waits_for_nothing() -> None:
    rig = Rig()
    one, other = rig.add("one", limits=SHORT), rig.add("other", limits=SHORT)
    async with rig.running():
        await asyncio.gather(one.start(), other.start())
        leases = lease(one), lease(other)
        await asyncio.gather(drain(rig, "one"), drain(rig, "other"))
        await until(lambda: len(rig.journal.details_of("drain_waits")) == 2)
        await one.stop()
        await other.stop(force=True)
        for each in leases:
            assert each.cut is not None
            each.release()
        assert rig.view("one").drained is not None


async def test_a_drain_waits_for_the_requests_of_the_daemon_before_and_a_plain_stop_does_not() -> None:
    rig = Rig()
    one, other = rig.add("one", limits=SHORT), rig.add("other", limits=SHORT)
    async with rig.running():
        await asyncio.gather(one.start(), other.start())
        rig.others_work = True
        await drain(rig, "one")
        await other.stop()
        await until(lambda: rig.journal.details_of("drain_waits"))
        assert "of the daemon that was replaced" in rig.journal.details_of("draining")[0]
        assert rig.view("one").phase is Phase.DRAINING
        rig.others_work = False
        await out(one)


async def test_nothing_starts_what_is_out_of_service() -> None:
    rig = Rig(schedules=(schedule := Schedule("* * * * *", "start", "cpu", None),))
    cpu = rig.add("cpu", prewarm=True, pinned=True, drained=Drained(datetime.now(UTC), reason="why"))
    async with rig.running():
        with pytest.raises(DrainedError, match=r"cpu is out of service \(drained: why\).*resume cpu"):
            await rig.capacity.start("cpu")
        with pytest.raises(DrainedError):
            rig.capacity.begin_start("cpu")
        with pytest.raises(DrainedError):
            await cpu.lease()
        with pytest.raises(DrainedError):
            await rig.upgrades.restart("cpu", wait=False)
        rig.sweeps._tick(schedule)
        await until(lambda: rig.journal.details_of("schedule_failed"))
        assert rig.engine.containers == {}
        assert rig.view("cpu").target is Target.STOPPED


async def test_callers_that_wait_for_a_start_get_the_order_as_the_reason() -> None:
    rig = Rig("cpu")
    async with rig.running():
        for _ in range(8):  # as many starts as the engine is asked for at once
            await rig.world.starting.acquire()
        starting = asyncio.create_task(rig["cpu"].lease())
        await until(lambda: rig.view("cpu").phase is Phase.STARTING)
        await drain(rig, "cpu", reason="why")
        with pytest.raises(DrainedError, match="drained: why"):
            await starting
        await out(rig["cpu"])
        assert (rig.view("cpu").phase, rig.engine.containers) == (Phase.STOPPED, {})


async def test_a_start_that_waits_for_a_place_is_withdrawn() -> None:
    rig = Rig("one", "two", max_running=1)
    async with rig.running():
        await rig["one"].start()
        held = lease(rig["one"])
        rig.capacity._prewarms["two"] = None
        await drain(rig, "two")
        assert rig.capacity.waiting("two") is None
        held.release()


async def test_a_container_that_is_to_run_on_is_neither_stopped_for_its_ttl_nor_for_another() -> None:
    rig = Rig(max_running=1)
    cpu = rig.add("cpu", limits=Limits(30, 5, 5, 5, 0.02, 15, 1))
    rig.add("two")
    async with rig.running():
        await cpu.start()
        open_lease = lease(cpu)
        assert await drain(rig, "cpu", stops=False)
        waiting = asyncio.create_task(out(cpu))
        await asyncio.sleep(0)
        assert not waiting.done()
        open_lease.release()
        await waiting
        rig.ahead_s = 60.0
        (swept,) = [one for one in await rig.sweeps.reap() if one.instance == "cpu"]
        assert (swept.action, swept.detail) == ("kept", "out of service (drained), and kept running")
        with pytest.raises(ConflictError, match="max_running"):
            await rig.capacity.start("two")
        view = rig.view("cpu")
        assert (view.phase, view.ttl_remaining_s, cpu.idle, cpu.unused_since) == (
            Phase.READY,
            None,
            False,
            None,
        )
        # The TTL begins anew with the resume.
        assert await rig.service.resume("cpu")
        assert (rig.view("cpu").ttl_remaining_s or 0) > 29
        assert cpu.unused_since is not None


async def test_a_second_order_changes_the_first_and_keeps_its_beginning() -> None:
    rig = Rig("cpu")
    async with rig.running():
        await rig["cpu"].start()
        await drain(rig, "cpu", stops=False)
        first = rig.view("cpu").drained
        assert first is not None
        assert await drain(rig, "cpu", stops=False) is False
        ends = datetime.now(UTC) + HOUR
        assert await drain(rig, "cpu", reason="later", ends=ends) is True
        second = rig.view("cpu").drained
        assert second == Drained(first.since, ends, "later", stops=True, ran=True)
        await out(rig["cpu"])
        assert rig.view("cpu").phase is Phase.STOPPED


async def test_an_end_that_has_passed_is_refused_and_changes_nothing() -> None:
    rig = Rig("cpu")
    with pytest.raises(
        InvalidRequestError, match=r"until: expected a time in the future, after .*; not 2020-"
    ):
        await drain(rig, "cpu", ends=datetime(2020, 1, 1, tzinfo=UTC))
    with pytest.raises(UnknownInstanceError):
        await drain(rig, "nope")
    assert rig["cpu"].drained is None


async def test_an_order_that_cannot_be_stored_changes_nothing() -> None:
    rig = Rig("cpu")
    rig.registry.refuses = RegistryUnwritableError("full")
    async with rig.running():
        with pytest.raises(RegistryUnwritableError):
            await drain(rig, "cpu")
        assert rig["cpu"].drained is None
        rig.registry.refuses = None
        await drain(rig, "cpu")
        rig.registry.refuses = RegistryUnwritableError("full")
        with pytest.raises(RegistryUnwritableError):
            await rig.service.resume("cpu")
        assert rig["cpu"].drained is not None


async def test_the_engine_may_be_away_when_an_instance_is_taken_out() -> None:
    rig = Rig("cpu")
    async with rig.running():
        await rig["cpu"].start()
        rig.engine.down = "away"
        await until(lambda: not rig.link.up)
        await drain(rig, "cpu")
        assert rig["cpu"].try_lease() is None
        rig.engine.down = None
        await until(lambda: rig.view("cpu").phase is Phase.STOPPED)


# --- resume ---


async def test_a_resume_in_the_middle_of_a_drain_keeps_the_container_and_its_leases() -> None:
    rig = Rig("cpu")
    async with rig.running():
        await rig["cpu"].start()
        before = rig.container("cpu").id
        open_lease = lease(rig["cpu"])
        await drain(rig, "cpu")
        await until(lambda: rig.view("cpu").phase is Phase.DRAINING)
        waiting = asyncio.create_task(out(rig["cpu"]))
        await asyncio.sleep(0)
        assert await rig.service.resume("cpu") is True
        with pytest.raises(ConflictError):
            await waiting
        lease(rig["cpu"]).release()
        open_lease.release()
        assert (rig.container("cpu").id, open_lease.cut) == (before, None)
        await until(lambda: not rig["cpu"].busy)
        assert await rig.service.resume("cpu") is False
        # It can be drained and stopped as ever.
        await drain(rig, "cpu")
        await out(rig["cpu"])
        assert rig.view("cpu").phase is Phase.STOPPED


async def test_what_is_back_in_service_is_started_by_the_next_request_only() -> None:
    rig = Rig("cpu")
    async with rig.running():
        await rig["cpu"].start()
        await drain(rig, "cpu")
        await out(rig["cpu"])
        await rig.service.resume("cpu")
        assert ("cpu", OrderKind.DRAINED) not in rig.registry.orders
        assert rig.engine.containers == {}
        (await rig["cpu"].lease()).release()


async def test_a_pinned_one_that_ran_is_started_again_and_one_that_was_stopped_is_not() -> None:
    rig = Rig()
    ran, stopped = rig.add("ran", pinned=True), rig.add("stopped", pinned=True)
    async with rig.running():
        await ran.start()
        await asyncio.gather(drain(rig, "ran"), drain(rig, "stopped"))
        await out(ran)
        await asyncio.gather(rig.service.resume("ran"), rig.service.resume("stopped"))
        await until(lambda: rig.view("ran").phase is Phase.READY)
        assert stopped.view().phase is Phase.STOPPED


async def test_one_that_was_to_start_with_the_daemon_starts_once_it_is_back() -> None:
    rig = Rig()
    rig.add("cpu", prewarm=True, drained=Drained(datetime.now(UTC)))
    async with rig.running():
        await rig.service.resume("cpu")
        await until(lambda: rig.view("cpu").phase is Phase.READY)
        await drain(rig, "cpu")
        await out(rig["cpu"])
        await rig.service.resume("cpu")  # it starts with the daemon, not with every resume
        assert (rig.view("cpu").phase, rig["cpu"].busy) == (Phase.STOPPED, False)


async def test_a_start_that_cannot_follow_a_resume_is_told() -> None:
    rig = Rig(max_running=1)
    cpu = rig.add("cpu", pinned=True)
    other = rig.add("other", pinned=True)
    async with rig.running():
        await cpu.start()
        await drain(rig, "cpu")
        await out(cpu)
        await other.start()
        assert await rig.service.resume("cpu") is True
        assert "max_running" in rig.journal.details_of("start_refused")[0]
        rig.engine.down = "away"
        await until(lambda: not rig.link.up)
        await drain(rig, "other")
        assert await rig.service.resume("other") is True


async def test_an_order_ends_by_itself_when_its_time_has_come() -> None:
    rig = Rig("cpu", "later", "never")
    rig.add_external()
    async with rig.running():
        await drain(rig, "never")
        await drain(rig, "later", ends=datetime.now(UTC) + 2 * HOUR)
        for name in ("cpu", "nas"):
            await drain(rig, name, ends=datetime.now(UTC) + HOUR)
        await asyncio.sleep(0.01)
        assert rig["cpu"].drained is not None
        rig.ahead_s = 3600.0
        rig.service._news.set()  # as after a moment; the clock is looked at every 15 s at least
        await until(lambda: rig["cpu"].drained is None and rig.view("nas").drained is None)
        assert set(rig.registry.orders) == {("later", "drained"), ("never", "drained")}
        assert rig.journal.details_of("resumed") == ["its time has passed"] * 2
        assert rig["later"].drained is not None


async def test_an_end_that_cannot_be_stored_is_an_end_all_the_same() -> None:
    rig = Rig("cpu")
    async with rig.running():
        await drain(rig, "cpu", ends=datetime.now(UTC) + HOUR)
        rig.registry.refuses = RegistryUnwritableError("full")
        rig.ahead_s = 3601.0
        rig.service._news.set()
        await until(lambda: rig["cpu"].drained is None)


async def test_an_order_that_was_changed_meanwhile_does_not_end_at_its_former_time() -> None:
    rig = Rig("cpu")
    async with rig.running():
        ends = datetime.now(UTC) + HOUR
        await drain(rig, "cpu", ends=ends)
        former = rig["cpu"].drained
        assert former is not None
        await drain(rig, "cpu", reason="longer", ends=ends + HOUR)
        await rig.service._end(rig["cpu"], former)
        assert rig["cpu"].drained is not None


# --- after a restart of the daemon ---


async def test_a_container_that_is_found_is_stopped_and_not_used() -> None:
    rig = Rig()
    row = InstanceRow("cpu", target=Target.RUNNING)
    rig.add("cpu", row=row, drained=Drained(datetime.now(UTC)))
    rig.engine.put("m-ollama-cpu", "cpu")
    async with rig.running():
        await until(lambda: rig.engine.containers == {})
        assert "adopting" not in [kind for kind, *_ in rig.journal.events]
        assert (rig.view("cpu").phase, rig.view("cpu").target) == (Phase.STOPPED, Target.STOPPED)


@pytest.mark.parametrize("operation", [None, Operation.START])
async def test_a_start_that_an_earlier_daemon_wanted_is_not_made_and_nothing_counts_as_ended(
    operation: Operation | None,
) -> None:
    rig = Rig()
    row = InstanceRow("cpu", target=Target.RUNNING, operation=operation)
    rig.add("cpu", row=row, drained=Drained(datetime.now(UTC)))
    async with rig.running():
        assert (rig.view("cpu").phase, rig["cpu"].busy) == (Phase.STOPPED, False)
        assert rig.journal.details_of("container_ended") == []
        assert rig.engine.containers == {}


async def test_a_container_that_was_to_run_on_is_adopted_and_not_used() -> None:
    rig = Rig()
    cpu = rig.add("cpu", drained=Drained(datetime.now(UTC), stops=False))
    rig.engine.put("m-ollama-cpu", "cpu")
    async with rig.running():
        assert rig.view("cpu").phase is Phase.READY
        assert cpu.try_lease() is None
        rig.engine.end(rig.container("cpu").id)
        await until(lambda: rig.view("cpu").phase is Phase.FAILED)
        assert (rig.view("cpu").target, cpu.busy) == (Target.STOPPED, False)


# --- external instances ---


async def test_an_external_server_gets_no_requests_while_it_is_out_of_service() -> None:
    rig = Rig()
    nas = rig.add_external()
    async with rig.running():
        await until(lambda: nas.usable_endpoint() is not None)
        open_lease = lease(nas)
        await drain(rig, "nas", reason="moves")
        assert nas.usable_endpoint() is None
        with pytest.raises(DrainedError, match="drained: moves"):
            await nas.lease()
        waiting = asyncio.create_task(nas.out())
        await asyncio.sleep(0)
        assert not waiting.done()
        open_lease.release()
        await waiting
        drained = rig.view("nas").drained
        assert drained is not None
        assert (rig.view("nas").phase, drained.reason, nas.ends) == (Phase.READY, "moves", False)
        await rig.service.resume("nas")
        (await nas.lease()).release()


async def test_whoever_waits_for_the_leases_of_an_external_server_is_told_of_a_resume() -> None:
    rig = Rig()
    nas = rig.add_external(drained=Drained(datetime.now(UTC)))
    async with rig.running():
        await rig.service.resume("nas")
        await until(lambda: nas.usable_endpoint() is not None)
        open_lease = lease(nas)
        await drain(rig, "nas")
        waiting = asyncio.create_task(nas.out())
        await asyncio.sleep(0)
        await rig.service.resume("nas")
        with pytest.raises(ConflictError, match="nas was put back in service"):
            await waiting
        open_lease.release()
