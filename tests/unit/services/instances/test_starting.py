"""How a start ends, and what its callers learn."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from manager.domain.container import Reach
from manager.domain.idle import UsageSample
from manager.domain.instance import Phase, Target
from manager.domain.registry import InstanceRow, Operation
from manager.domain.target import Target as Endpoint
from manager.errors import (
    BackingOffError,
    EngineError,
    NetworkMissingError,
    Reason,
    StartFailedError,
    UnavailableError,
)
from tests.support.fake_engine import BEGIN, LIMITS, on_ground
from tests.support.virtual import in_virtual_time, until

if TYPE_CHECKING:
    from manager.services.instances.supervisor import Supervisor


@in_virtual_time
async def test_a_start_that_the_engine_refuses_names_its_instance() -> None:
    async with on_ground() as ground:
        one = await ground.listed(ground.supervisor())
        ground.engine.refuses["create"] = [EngineError("no space left", reason=Reason.START_FAILED)]
        with pytest.raises(EngineError, match="no space left") as caught:
            await one.start()
        assert caught.value.instance == "cpu"


@in_virtual_time
async def test_a_prewarmed_start_keeps_to_the_pause_after_a_failure_and_an_operators_does_not() -> None:
    async with on_ground() as ground:
        one = await ground.listed(ground.supervisor())
        ground.engine.crash_at_start = 1
        while not isinstance(await failure(one), BackingOffError):
            assert ground.engine.calls.count("create") < 10
        creates = ground.engine.calls.count("create")
        one.prewarm()
        await asyncio.sleep(0.1)
        assert ground.engine.calls.count("create") == creates
        with pytest.raises(StartFailedError):
            await one.start()
        assert ground.engine.calls.count("create") == creates + 1


@pytest.mark.parametrize("reach", [Reach.ADDRESS, Reach.NAME])
@in_virtual_time
async def test_a_container_that_is_on_its_network_is_not_connected_to_it(reach: Reach) -> None:
    async with on_ground() as ground:
        one = ground.supervisor()
        one.reach = reach
        await ground.listed(one)
        await one.start()
        await one.probe()
        assert "connect" not in ground.engine.calls
        assert "reconnected" not in ground.journal.kinds


@pytest.mark.parametrize(("reach", "connects"), [(Reach.ADDRESS, 0), (Reach.NAME, 1)])
@in_virtual_time
async def test_only_by_name_it_must_be_that_network(reach: Reach, connects: int) -> None:
    async with on_ground() as ground:
        box = ground.engine.put(ground.name, ground.labels)
        box.networks = ("other",)
        one = ground.supervisor()
        one.reach = reach
        await ground.listed(one)
        await until(lambda: one.view().phase is Phase.READY)
        assert ground.engine.calls.count("connect") == connects


@in_virtual_time
async def test_a_container_that_is_slow_to_answer_is_inspected_about_once_a_second() -> None:
    async with on_ground() as ground:
        ground.engine.template = {"ready_in_s": 20.0}
        await ground.ready()
        assert 18 <= ground.engine.calls.count("inspect") <= 26


@in_virtual_time
async def test_a_start_that_is_not_wanted_any_more_when_its_turn_comes_does_nothing() -> None:
    async with on_ground() as ground:
        one = await ground.listed(ground.supervisor())
        await one._starting.once()
        assert (one.view().phase, ground.engine.boxes) == (Phase.STOPPED, {})
        await one.start()
        await one._starting.once()
        assert (one.view().phase, one.view().starts) == (Phase.READY, 1)
        ground.engine.end(ground.engine.box, 1)
        await until(lambda: one.view().phase is Phase.FAILED)
        assert one.view().target is Target.STOPPED
        await one._starting.once()
        assert (one.view().phase, one.view().starts) == (Phase.FAILED, 1)


@in_virtual_time
async def test_a_lease_during_an_unfinished_stop_of_an_earlier_run_waits_for_its_end() -> None:
    async with on_ground() as ground:
        ground.engine.put(ground.name, ground.labels)
        row = InstanceRow("cpu", target=Target.STOPPED, operation=Operation.STOP)
        gate = ground.gates["stored"] = asyncio.Event()
        one = await ground.listed(ground.supervisor(row=row))
        await until(lambda: ground.steps == ["stored"])
        leasing = asyncio.ensure_future(one.lease())
        await asyncio.sleep(1)
        assert not leasing.done()
        gate.set()
        (await leasing).release()
        assert one.view().starts == 1


@in_virtual_time
async def test_a_network_that_the_engine_misses_at_the_creation_is_made() -> None:
    async with on_ground() as ground:
        one = await ground.listed(ground.supervisor())
        ground.engine.refuses["create"] = [NetworkMissingError("no such network")]
        await one.start()
        assert ground.engine.calls.count("create") == 2
        assert "ensure_network" in ground.engine.calls


@in_virtual_time
async def test_a_container_that_is_removed_right_after_its_start_fails_it() -> None:
    async with on_ground() as ground:
        gate = ground.gates["started"] = asyncio.Event()
        one = await ground.listed(ground.supervisor())
        leasing = asyncio.ensure_future(failure(one))
        await until(lambda: "started" in ground.steps)
        ground.engine.tells = False
        ground.engine.delete(ground.engine.box)
        gate.set()
        assert "removed" in (await leasing).message
        assert ground.engine.boxes == {}


@in_virtual_time
async def test_a_start_of_what_has_ended_by_itself_removes_it_first() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        ended = ground.engine.box
        ground.engine.end(ended, 1)
        await until(lambda: one.view().phase is Phase.FAILED)
        assert ground.engine.box is ended, "it is kept for a while"
        await one.start()
        assert ground.engine.box is not ended
        assert ground.engine.calls.count("remove") == 1
        assert ground.engine.calls.count("create") == 2, "its name was free"


async def failure(one: Supervisor) -> UnavailableError:
    with pytest.raises(UnavailableError) as caught:
        await one.lease()
    return caught.value


@in_virtual_time
async def test_an_adopted_container_counts_as_used_now_unless_a_sweep_adopts_it() -> None:
    # A sample of 60 s ago says nothing of a container that was started 30 s ago.
    for sweeps, started_s, ago_s in (
        (False, 3600, 0.0),
        (True, 3600, 60.0),
        (True, 60, 60.0),
        (True, 30, 0.0),
    ):
        async with on_ground(sweeps=sweeps) as ground:
            box = ground.engine.put(ground.name, ground.labels)
            box.started_at = BEGIN - timedelta(seconds=started_s)
            row = InstanceRow(
                "cpu",
                last_used_at=BEGIN - timedelta(seconds=60),
                usage=UsageSample((BEGIN - timedelta(seconds=60)).timestamp(), 0, 0, 0.0, ()),
            )
            one = await ground.listed(ground.supervisor(row=row))
            await until(lambda one=one: one.view().phase is Phase.READY)  # type: ignore[misc]
            used_at = one.view().last_used_at
            assert used_at is not None
            assert (BEGIN - used_at).total_seconds() == pytest.approx(ago_s, abs=1)
            remaining_s = one.view().ttl_remaining_s
            assert remaining_s == pytest.approx(LIMITS.ttl_s - ago_s, abs=2)
            assert isinstance((await one.lease()).target, Endpoint)
