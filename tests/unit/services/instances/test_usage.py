"""Samples of a container's counters: which windows are judged, and what counts as somebody's use."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

from manager.domain.idle import UsageSample
from manager.errors import EngineError, Reason
from manager.services.instances.usage import UsageWatch
from manager.services.ports import ContainerCounters
from tests.support.fake_engine import BEGIN
from tests.support.virtual import BEGIN_S, in_virtual_time

MUCH = 10_000_000


class Watched:
    """An instance whose counters and leases are set by the test."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.ready_container: Any = SimpleNamespace(id="c1")
        self.ttl_s = 900.0
        self.until_sample_s = 30.0
        self.models: tuple[Any, ...] = ()
        self.own_bytes = 0
        self.probe_bytes = 0
        self.coming_probe_bytes = 0
        self.in_flight = 0
        self.uses = 0
        self.counters_are: ContainerCounters | None = ContainerCounters(0, 0.0)
        self.asked_at: list[float] = []
        self.answer = asyncio.Event()
        self.answer.set()
        world = SimpleNamespace(
            engine=self,
            now=loop.time,
            utcnow=lambda: BEGIN + timedelta(seconds=loop.time() - BEGIN_S),
        )
        self.watch = UsageWatch(cast("Any", world), self)

    def used(self) -> None:
        self.uses += 1

    async def counters(self, _container: str) -> ContainerCounters:
        self.asked_at.append(asyncio.get_running_loop().time() - BEGIN_S)
        await self.answer.wait()
        if self.counters_are is None:
            raise EngineError("no counters", reason=Reason.START_FAILED)
        return self.counters_are

    async def after(self, seconds: float, *, network_bytes: int = 0, cpu_s: float = 0.0) -> bool:
        """Take a sample after some time, in which the counters have grown."""
        await asyncio.sleep(seconds)
        before = self.counters_are or ContainerCounters(0, 0.0)
        self.counters_are = ContainerCounters(before.network_bytes + network_bytes, before.cpu_s + cpu_s)
        return await self.watch.sample()

    async def watched(self) -> None:
        """Take the first sample of a container that was new."""
        self.watch.restart(None)
        await self.watch.sample()
        self.uses = 0


@in_virtual_time
async def test_a_sample_is_compared_with_the_one_before() -> None:
    one = Watched()
    assert not await one.watch.sample(), "there is none before"
    assert await one.after(10)
    assert one.uses == 0
    assert await one.after(10, network_bytes=MUCH)
    assert one.uses == 1
    assert await one.after(10, cpu_s=10)
    assert one.uses == 2
    assert await one.after(10)
    assert one.uses == 2


@in_virtual_time
async def test_what_the_probes_moved_is_no_use() -> None:
    one = Watched()
    await one.watched()
    one.own_bytes += MUCH
    assert await one.after(10, network_bytes=MUCH)
    one.probe_bytes = MUCH  # it is under way: it counts as ours when it has ended
    assert await one.after(10, network_bytes=MUCH)
    assert one.uses == 0


@in_virtual_time
async def test_a_probe_that_ends_during_a_sample_is_no_use() -> None:
    one = Watched()
    await one.watched()
    one.probe_bytes = MUCH
    one.counters_are = ContainerCounters(MUCH, 0.0)
    one.answer.clear()
    sampling = asyncio.ensure_future(one.watch.sample())
    await asyncio.sleep(1)
    one.probe_bytes = 0
    one.answer.set()
    assert await sampling
    assert one.uses == 0


@in_virtual_time
async def test_a_window_with_a_lease_is_not_judged() -> None:
    one = Watched()
    await one.watched()
    one.watch.leased()
    assert not await one.after(10, network_bytes=MUCH)
    one.in_flight = 1
    assert not await one.after(10, network_bytes=MUCH)
    one.in_flight = 0
    assert await one.after(10)
    assert one.uses == 0


@in_virtual_time
async def test_without_a_ready_container_there_is_no_sample() -> None:
    one = Watched()
    one.ready_container = None
    assert not await one.watch.sample()
    assert (one.asked_at, one.watch.stored()) == ([], None)


@in_virtual_time
async def test_counters_of_a_container_that_was_replaced_meanwhile_are_ignored() -> None:
    one = Watched()
    await one.watched()
    before = one.watch.stored()
    one.answer.clear()
    one.counters_are = ContainerCounters(MUCH, 10.0)
    sampling = asyncio.ensure_future(one.watch.sample())
    await asyncio.sleep(0)
    one.ready_container = SimpleNamespace(id="c2")
    one.answer.set()
    assert not await sampling
    assert (one.uses, one.watch.stored()) == (0, before)


@in_virtual_time
async def test_a_new_container_counts_as_used_unless_a_lease_says_so_anyway() -> None:
    one = Watched()
    one.watch.restart(None)
    assert not await one.watch.sample()
    assert one.uses == 1
    assert await one.after(10)
    assert one.uses == 1
    one.watch.restart(None)
    one.in_flight = 1
    assert not await one.watch.sample()
    assert one.uses == 1


@in_virtual_time
async def test_a_stored_sample_is_gone_on_from() -> None:
    one = Watched()
    stored = UsageSample(BEGIN.timestamp() - 100, MUCH, 0, 0.0, ())
    one.counters_are = ContainerCounters(MUCH, 0.0)
    one.watch.restart(stored)
    assert await one.watch.sample()
    assert one.uses == 0
    one.counters_are = ContainerCounters(2 * MUCH, 0.0)
    one.watch.restart(stored)
    assert await one.watch.sample()
    assert one.uses == 1


@in_virtual_time
async def test_time_since_a_stored_sample_allows_for_what_an_idle_server_does() -> None:
    one = Watched()
    one.counters_are = ContainerCounters(0, 3.0)
    one.watch.restart(UsageSample(BEGIN.timestamp() - 3600, 0, 0, 0.0, ()))
    assert await one.watch.sample()
    assert one.uses == 0, "3 s of processor time in an hour"
    one.watch.restart(UsageSample(BEGIN.timestamp() - 1, 0, 0, 0.0, ()))
    assert await one.watch.sample()
    assert one.uses == 1, "3 s of processor time in a second"


@in_virtual_time
async def test_a_sample_is_stored_with_what_the_probes_move_until_the_next_storing() -> None:
    one = Watched()
    one.counters_are = ContainerCounters(1000, 2.0)
    one.own_bytes = 300
    await one.watch.sample()
    await asyncio.sleep(7)
    one.own_bytes, one.coming_probe_bytes = 340, 5
    assert one.watch.stored() == UsageSample(BEGIN.timestamp(), 1045, 345, 2.0, ())


@in_virtual_time
async def test_counters_that_the_engine_does_not_tell_stand_still() -> None:
    one = Watched()
    await one.watched()
    await one.after(1, network_bytes=500)
    one.counters_are = None
    one.own_bytes = MUCH
    assert await one.watch.sample()
    stored = one.watch.stored()
    assert stored is not None
    assert stored.network_bytes - stored.own_bytes == 500
    one.counters_are = ContainerCounters(MUCH + 500, 0.0)
    assert await one.watch.sample()
    assert one.uses == 0


@in_virtual_time
async def test_counters_that_were_never_told_are_zero() -> None:
    one = Watched()
    one.counters_are = None
    one.own_bytes = 7
    await one.watch.sample()
    assert one.watch.stored() == UsageSample(BEGIN.timestamp(), 0, 7, 0.0, ())


# --- a closer look ---


async def looked_s(one: Watched) -> float:
    """Return how long a look takes."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await one.watch.look()
    return round(loop.time() - began, 3)


@in_virtual_time
async def test_a_look_waits_for_a_window_that_says_something() -> None:
    one = Watched()
    assert await looked_s(one) == 1.0
    assert len(one.asked_at) == 2
    await asyncio.sleep(5)
    assert await looked_s(one) == 0.0
    assert len(one.asked_at) == 3
    one.watch.leased()
    await asyncio.sleep(5)
    assert await looked_s(one) == 1.0, "the last window has held a lease"


@in_virtual_time
async def test_a_window_that_has_begun_is_waited_for_to_its_end() -> None:
    one = Watched()
    await one.watched()
    await asyncio.sleep(0.4)
    assert await looked_s(one) == 0.6
    await one.watched()
    await asyncio.sleep(1)
    before = len(one.asked_at)
    assert await looked_s(one) == 0.0, "exactly long enough"
    assert len(one.asked_at) == before + 1


@in_virtual_time
async def test_a_look_takes_no_longer_than_a_short_ttl_and_as_long_as_ever_without_one() -> None:
    for ttl_s, expected_s in ((0.3, 0.3), (900, 1.0), (0, 1.0)):
        one = Watched()
        one.ttl_s = ttl_s
        assert await looked_s(one) == expected_s


@in_virtual_time
async def test_a_look_at_what_is_in_use_or_not_ready_takes_no_time() -> None:
    one = Watched()
    one.in_flight = 1
    assert await looked_s(one) == 0.0
    one.in_flight, one.ready_container = 0, None
    assert await looked_s(one) == 0.0


# --- the regular samples ---


@in_virtual_time
async def test_samples_are_taken_in_an_interval_and_at_once_when_that_changes() -> None:
    one = Watched()
    running = asyncio.ensure_future(one.watch.run())
    await asyncio.sleep(65)
    assert one.asked_at == [0, 30, 60]
    one.watch.resample()
    await asyncio.sleep(1)
    assert one.asked_at == [0, 30, 60, 65]
    one.ready_container = None
    await asyncio.sleep(100)
    assert one.asked_at == [0, 30, 60, 65]
    one.ready_container = SimpleNamespace(id="c2")
    one.watch.restart(None)
    await asyncio.sleep(1)
    assert one.asked_at == [0, 30, 60, 65, 166]
    running.cancel()
    await asyncio.wait({running})
