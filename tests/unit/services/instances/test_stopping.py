"""Drains: what wakes one, and what it looks at."""

from __future__ import annotations

import asyncio

from manager.domain.instance import Phase
from manager.errors import EngineError, LimitReachedError, Reason
from tests.support.fake_engine import LIMITS, on_ground
from tests.support.virtual import in_virtual_time, until


@in_virtual_time
async def test_a_released_lease_makes_a_drain_ask_the_engine_nothing() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        leases = [await one.lease() for _ in range(3)]
        stopping = asyncio.ensure_future(one.stop())
        await until(lambda: one.view().phase is Phase.DRAINING)
        before = ground.engine.calls.count("inspect")
        for lease in leases[:2]:
            lease.release()
            await asyncio.sleep(0.1)
        assert ground.engine.calls.count("inspect") == before
        leases[2].release()
        await stopping


@in_virtual_time
async def test_a_drain_ends_with_its_last_lease() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        lease = await one.lease()
        stopping = asyncio.ensure_future(one.stop())
        await until(lambda: one.view().phase is Phase.DRAINING)
        released_at = ground.world.now()
        lease.release()
        await stopping
        assert ground.world.now() - released_at < 1
        assert lease.cut is None


@in_virtual_time
async def test_a_drain_whose_container_cannot_be_inspected_goes_on() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        lease = await one.lease()
        stopping = asyncio.ensure_future(one.stop())
        await until(lambda: one.view().phase is Phase.DRAINING)
        refusal = EngineError("not now", reason=Reason.START_FAILED)
        ground.engine.refuses["inspect"] = [refusal]
        one._stopping.nudge()
        one._w.signals.news.set()
        await until(lambda: not ground.engine.refuses["inspect"])
        await asyncio.sleep(1)
        assert one.view().phase is Phase.DRAINING
        lease.release()
        await stopping


@in_virtual_time
async def test_a_drain_whose_engine_cannot_be_asked_goes_on_to_its_end() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        lease = await one.lease()
        stopping = asyncio.ensure_future(one.stop())
        await until(lambda: one.view().phase is Phase.DRAINING)
        began = ground.world.now()
        ground.engine.down = True
        await asyncio.sleep(LIMITS.resync_interval_s + 1)
        assert one.view().phase is Phase.DRAINING
        ground.engine.down = False
        await stopping
        assert LIMITS.drain_timeout_s - 1 < ground.world.now() - began < LIMITS.drain_timeout_s + 2
        assert lease.cut is not None


@in_virtual_time
async def test_a_pinned_instance_that_is_wanted_during_its_stop_starts_again_whatever_the_limit() -> None:
    async with on_ground() as ground:
        one = await ground.ready(pinned=True)
        gate = ground.gates["signalled"] = asyncio.Event()
        stopping = asyncio.ensure_future(one.stop())
        await until(lambda: one.view().phase is Phase.STOPPING)
        leasing = asyncio.ensure_future(one.lease())
        await asyncio.sleep(1)
        ground.refusal = LimitReachedError("lifecycle.max_running is 1")
        gate.set()
        (await leasing).release()
        await stopping
        assert one.view().starts == 2
