"""What every kind of instance does: its probes, its health and the end of its leases."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from manager.domain.instance import Driver, Explanation, Health, Model, Phase
from manager.errors import Reason
from manager.services.instances.instance import PROBE_BYTES
from tests.support.fake_engine import IMAGE, LIMITS, Ground, on_ground
from tests.support.virtual import BEGIN_S, in_virtual_time, until


def probe_times(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list to which the time of each probe from now on is added."""
    times: list[float] = []
    probe = ground.engine.probe

    async def noted(endpoint: str, **how: Any) -> Any:
        times.append(asyncio.get_running_loop().time() - BEGIN_S)
        return await probe(endpoint, **how)

    monkeypatch.setattr(ground.engine, "probe", noted)
    return times


@in_virtual_time
async def test_probes_come_once_in_every_interval_at_the_instances_own_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with on_ground() as ground:
        times = probe_times(ground, monkeypatch)
        one = await ground.ready()
        await asyncio.sleep(20)
        every_s = LIMITS.probe_interval_s
        regular = times[1:]
        assert len(regular) >= 8
        moments = {round(time % every_s, 3) for time in regular}
        assert moments == {round((one._beat * every_s - BEGIN_S) % every_s, 3)}
        assert every_s / 4 < regular[0] - times[0] <= every_s * 5 / 4
        for before, after in pairwise(regular):
            assert after - before == pytest.approx(every_s)


@in_virtual_time
async def test_a_probe_out_of_turn_puts_the_next_one_off_where_that_would_follow_at_once() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        loop = asyncio.get_running_loop()
        until_moment_s = (one._beat * 8 - loop.time()) % 8
        await asyncio.sleep(until_moment_s - 2)  # a quarter of the interval is left
        assert one._until_beat_s(8) == pytest.approx(10)
        await asyncio.sleep(-0.01 + 8)
        assert one._until_beat_s(8) == pytest.approx(2.01)


@in_virtual_time
async def test_the_last_use_is_the_end_of_the_last_lease() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        first, second = await one.lease(), await one.lease()
        await asyncio.sleep(30)
        first.release()
        await asyncio.sleep(30)
        assert one.view().last_used_at == ground.engine.now(), "it is in use"
        second.release()
        ended_at = ground.engine.now()
        await asyncio.sleep(20)
        assert one.view().last_used_at == ended_at
        remaining_s = one.view().ttl_remaining_s
        assert remaining_s == pytest.approx(LIMITS.ttl_s - 20)


@in_virtual_time
async def test_a_health_that_changes_is_recorded_once_and_the_first_good_one_never() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        assert "healthy" not in ground.journal.kinds
        ground.engine.box.answers = False
        await until(lambda: one.view().health is Health.UNHEALTHY)
        await asyncio.sleep(10)
        ground.engine.box.answers = True
        await until(lambda: one.view().health is Health.HEALTHY)
        kinds = [kind for kind in ground.journal.kinds if kind in ("healthy", "unhealthy")]
        assert kinds == ["unhealthy", "healthy"]


@in_virtual_time
async def test_a_change_of_health_makes_requests_be_decided_anew() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        revision = ground.world.revision.number
        await asyncio.sleep(10)
        assert ground.world.revision.number == revision
        ground.engine.box.answers = False
        await until(lambda: one.view().health is Health.UNHEALTHY)
        assert ground.world.revision.number > revision


@in_virtual_time
async def test_a_container_says_since_when_it_runs_only_while_it_does() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        box = ground.engine.box
        assert box.image == IMAGE
        assert one.view().started_at == box.started_at
        ground.engine.end(box, 1)
        await until(lambda: one.view().container is None or one.view().container.exit_code == 1)  # type: ignore[union-attr]
        assert one.view().started_at is None


@in_virtual_time
async def test_without_a_ttl_samples_of_use_are_as_rare_as_listings() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        for ttl_s, most_s in ((0, LIMITS.resync_interval_s), (8, 2), (0.1, LIMITS.probe_interval_s / 4)):
            await one.configure({"ttl_s": ttl_s})
            assert most_s / 4 <= one.until_sample_s <= most_s * 5 / 4


@in_virtual_time
async def test_loads_on_a_card_end_with_the_last_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_ground(gpu=True) as ground:
        one = await ground.ready()
        ended: list[str] = []
        monkeypatch.setattr(ground.gpus, "end_loads", ended.append)
        first, second = await one.lease(), await one.lease()
        first.release()
        assert ended == []
        second.release()
        assert ended == ["gpu0"]


@in_virtual_time
async def test_the_failure_of_a_container_that_ended_has_its_last_lines() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        box = ground.engine.box
        box.log.append((ground.engine.now(), "panic: no more"))
        ground.engine.end(box, 1)
        await until(lambda: one.view().phase is Phase.FAILED)
        await until(lambda: one.view().explanation is not None)
        explanation = one.view().explanation
        assert explanation is not None
        assert explanation.log_tail == ("panic: no more",)


@pytest.mark.parametrize("gpu", [True, False])
@in_virtual_time
async def test_what_a_model_takes_is_learned_on_a_card_that_is_there(
    monkeypatch: pytest.MonkeyPatch, *, gpu: bool
) -> None:
    async with on_ground(gpu=gpu) as ground:
        one = await ground.ready()
        learned: list[str] = []

        async def learn(instance: str, _models: object) -> None:
            learned.append(instance)

        monkeypatch.setattr(ground.gpus, "learn", learn)
        await one.probe()
        assert learned == (["gpu0"] if gpu else [])
        ground.machine.is_there = False
        await ground.gpus.refresh()
        await one.probe()
        assert learned == (["gpu0"] if gpu else [])


@in_virtual_time
async def test_a_stored_sample_allows_for_the_probes_up_to_the_next_storing() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        probes = LIMITS.resync_interval_s / LIMITS.probe_interval_s + 2  # one that ends late, one out of turn
        assert one.coming_probe_bytes == int(probes * max(PROBE_BYTES, one._last_probe_bytes))


@in_virtual_time
async def test_a_listing_without_news_causes_no_look() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        await asyncio.sleep(1)  # the events are over
        inspected = ground.engine.calls.count("inspect")
        await ground.relist(one)
        await asyncio.sleep(0.1)
        assert ground.engine.calls.count("inspect") == inspected
        await one.stop()
        await asyncio.sleep(1)  # the events are over
        inspected = ground.engine.calls.count("inspect")
        await ground.relist(one)
        await asyncio.sleep(0.1)
        assert ground.engine.calls.count("inspect") == inspected, "there is none, as before"


@in_virtual_time
async def test_other_models_in_memory_make_requests_be_decided_anew_and_the_same_do_not() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        await asyncio.sleep(1)
        loaded = (Model("tiny", "d", 1, 0, None),)
        for models, advances in ((loaded, 1), (loaded, 0), ((), 1), ((), 0)):
            revision = ground.world.revision.number
            ground.engine.box.models = models
            await one.probe()
            assert (one.models, ground.world.revision.number - revision) == (models, advances)


@in_virtual_time
async def test_nothing_is_done_while_the_engine_is_away() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        one.begin_stop()
        one.engine_changed(up=False)
        await asyncio.sleep(1)
        assert "SIGTERM" not in ground.engine.calls
        one.engine_changed(up=True)
        await until(lambda: one.view().phase is Phase.STOPPED)


@in_virtual_time
async def test_the_cards_learn_of_each_container_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_ground(gpu=True) as ground:
        noted: list[str] = []
        forgotten: list[str] = []
        monkeypatch.setattr(ground.gpus, "note_container", lambda container, *_: noted.append(container))
        monkeypatch.setattr(ground.gpus, "forget_container", forgotten.append)
        one = await ground.ready()
        first = ground.engine.box.id
        for _ in range(3):
            one._looking.soon()
            await asyncio.sleep(1)
        assert (noted, forgotten) == ([first], [])
        await one.stop()
        assert (noted, forgotten) == ([first], [first])


@in_virtual_time
async def test_nothing_makes_way_while_the_engine_is_away() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        await asyncio.sleep(10)
        one._w.engine_up = False
        assert not await one.make_way("to make way")
        assert one.view().phase is Phase.READY
        one._w.engine_up = True
        assert await one.make_way("to make way")


@in_virtual_time
async def test_a_server_is_silent_once_its_grace_is_over() -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        one._answered_at = ground.world.now() - 3 * LIMITS.probe_interval_s
        assert not one.is_silent, "it is healthy"
        one._health = Health.UNHEALTHY
        assert not one.is_silent, "the grace is just over"
        one._answered_at -= 0.001
        assert one.is_silent


@pytest.mark.parametrize(
    ("driver", "reason", "is_silent"),
    [
        (Driver.SWARM, Reason.UPSTREAM_UNREACHABLE, True),
        (Driver.SWARM, Reason.INSTANCE_UNHEALTHY, False),
        (Driver.SWARM, None, False),
        (Driver.DOCKER, Reason.UPSTREAM_UNREACHABLE, False),
    ],
)
@in_virtual_time
async def test_a_service_is_silent_at_once_when_its_host_cannot_be_reached(
    driver: Driver, reason: Reason | None, is_silent: bool
) -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        one.spec = replace(one.spec, driver=driver)
        one._health = Health.UNHEALTHY
        one._health_issue = None if reason is None else Explanation(reason, "no answer")
        assert one.is_silent is is_silent


@in_virtual_time
async def test_a_probe_that_is_under_way_counts_as_bytes_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_ground() as ground:
        one = await ground.ready()
        under_way: list[int] = []
        probe = ground.engine.probe

        async def noted(endpoint: str, **how: Any) -> Any:
            under_way.append(one.probe_bytes)
            return await probe(endpoint, **how)

        monkeypatch.setattr(ground.engine, "probe", noted)
        one._last_probe_bytes = 0
        await one.probe()
        await one.probe()
        assert under_way == [PROBE_BYTES, 2000]
        assert one.probe_bytes == 0
