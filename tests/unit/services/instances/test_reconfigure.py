"""A new configuration of the same instances, taken over while they run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from manager.domain.instance import Phase
from manager.errors import LimitReachedError
from tests.support.fleet_rig import LIMITS, Rig, until


async def test_a_new_limit_counts_for_the_next_start_and_ends_nothing() -> None:
    rig = Rig("a", "b", max_running=1)
    async with rig.running():
        await rig.capacity.start("a")
        lease = rig["a"].try_lease()
        assert lease is not None
        with pytest.raises(LimitReachedError, match="max_running is 1"):
            await rig.capacity.start("b")
        rig.capacity.reconfigure(2)
        await rig.capacity.start("b")
        rig.capacity.reconfigure(1)
        assert rig.running_ids() == {"a", "b"}
        rig.capacity.reconfigure(None)
        rig.link.join(rig.add("c"))
        await rig.capacity.start("c")
        lease.release()


async def test_a_higher_limit_starts_what_waits_for_a_place() -> None:
    rig = Rig(max_running=1)
    rig.add("first", prewarm=True, priority=1)
    rig.add("late", prewarm=True)
    rig.capacity._recheck_s = 3600.0
    async with rig.running():
        await until(lambda: rig.view("first").phase is Phase.READY)
        assert rig.capacity.waiting("late") is not None
        rig.capacity.reconfigure(2)
        await until(lambda: rig.view("late").phase is Phase.READY)


async def test_new_limits_of_an_instance_count_at_once_and_requests_are_decided_anew() -> None:
    rig = Rig("a", "b")
    async with rig.running():
        await rig.capacity.start("a")
        revision = rig.world.revision.number
        specs = [replace(rig[name].spec, limits=replace(LIMITS, ttl_s=60, stop_timeout_s=7)) for name in "ab"]
        rig.fleet.reconfigure(specs)
        assert rig.world.revision.number > revision
        assert [rig.view(name).ttl_s for name in "ab"] == [60, 60]
        assert rig["a"]._w.run.limits.stop_timeout_s == 7
        remaining_s = rig.view("a").ttl_remaining_s
        assert remaining_s is not None
        assert remaining_s <= 60
        await rig["a"].configure({"ttl_s": 5})
        rig.fleet.reconfigure([replace(specs[0], limits=LIMITS)])
        assert rig.view("a").ttl_s == 5, "an override stays"


async def test_an_instance_that_is_pinned_by_the_configuration_is_pinned_until_it_is_not() -> None:
    rig = Rig("a")
    async with rig.running():
        await rig.capacity.start("a")
        spec = rig["a"].spec
        rig.fleet.reconfigure([replace(spec, pinned=True)])
        assert rig.view("a").pinned
        assert not await rig["a"].make_way("for another")
        rig.engine.end(rig.container("a").id, 1)
        await until(lambda: rig.view("a").phase is Phase.READY and rig.view("a").starts == 2)
        rig.fleet.reconfigure([spec])
        assert not rig.view("a").pinned
        assert await rig["a"].make_way("for another")
