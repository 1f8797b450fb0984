"""When an instance counts as idle, and what happens to those who come at that very moment."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from tests.support.inside import EngineEvents, Inside, NewInside, until
from tests.support.talk import answers, get, patch, post

if TYPE_CHECKING:
    from manager.services.instances.leases import Lease


def lived_s(inside: Inside, instance: str) -> float:
    """From the time it was ready to the time its first stop began."""
    return inside.moments(instance, "stopping")[0] - inside.moments(instance, "ready")[0]


async def test_the_ttl_begins_when_the_instance_is_ready_even_if_nobody_waits_any_more(
    new_inside: NewInside,
) -> None:
    inside = await new_inside(
        instances={"left": {"template": "slow", "ttl_s": 1}, "asked": {"template": "slow", "ttl_s": 1}},
        templates={"slow": {"env": {"OLLAMA_SIM_START_DELAY_S": "1.5"}}},
    )
    left = inside.get("left")
    leasing = asyncio.create_task(left.lease())
    await until(lambda: inside.phase("left") == "starting")
    leasing.cancel()
    await inside.get("asked").start()
    await until(lambda: inside.phase("left") == inside.phase("asked") == "stopped")
    assert left.in_flight == 0
    assert leasing.cancelled()
    for instance in ("left", "asked"):
        assert lived_s(inside, instance) >= 1
        assert inside.kinds(instance).count("starting") == 1


async def test_an_open_lease_holds_the_instance_and_the_ttl_begins_at_the_last_release(
    new_inside: NewInside,
) -> None:
    inside = await new_inside(instances={"cpu": {"template": "sim", "ttl_s": 1}})
    cpu = inside.get("cpu")
    first, second = await asyncio.gather(cpu.lease(), cpu.lease())
    ready_at = inside.moments("cpu", "ready")[0]
    await until(lambda: time.time() - ready_at > 1.5)
    status, body = await post(inside, "reap")
    assert (status, body["instances"][0]["action"]) == (200, "kept")
    assert "2 open leases" in body["instances"][0]["detail"]
    first.release()
    await asyncio.sleep(0.3)
    assert cpu.view().ttl_remaining_s is None
    assert await answers(second.endpoint)
    released_at = time.time()
    second.release()
    assert cpu.view().ttl_remaining_s == pytest.approx(1, abs=0.2)
    await until(lambda: inside.phase("cpu") == "stopped")
    assert inside.moments("cpu", "stopping")[0] - released_at >= 1


async def test_a_lease_that_is_granted_always_leads_to_a_server_that_answers(new_inside: NewInside) -> None:
    inside = await new_inside(instances={"cpu": {"template": "sim", "ttl_s": 0.02}})
    cpu = inside.get("cpu")
    ends_at = time.monotonic() + 4
    granted = 0

    async def use(pause_s: float) -> None:
        nonlocal granted
        while time.monotonic() < ends_at:
            with await cpu.lease() as lease:
                granted += 1
                assert await answers(lease.endpoint)
                await asyncio.sleep(pause_s / 4)
                assert await answers(lease.endpoint)
            await asyncio.sleep(pause_s)

    async def sweep() -> None:
        while time.monotonic() < ends_at:
            await inside.daemon.parts.sweeps.reap()
            await asyncio.sleep(0.003)

    async with asyncio.TaskGroup() as tasks:
        for pause_s in (0.0, 0.05, 0.11, 0.23):
            tasks.create_task(use(pause_s))
        for _ in range(2):
            tasks.create_task(sweep())
    assert cpu.in_flight == 0
    assert granted > 10
    await until(lambda: inside.phase("cpu") == "stopped")


async def test_leases_and_sweeps_that_alternate_find_every_moment_of_a_stop(new_inside: NewInside) -> None:
    inside = await new_inside(
        instances={"cpu": {"template": "sim", "ttl_s": 0.001}}, lifecycle={"probe_interval_s": 30}
    )
    cpu = inside.get("cpu")
    stops = 0
    # The last look before a stop may take two seconds: some engines tell their counters only after one, and
    # a window that held a lease is followed by a second one.
    for delay_ms in (0, 500, 1020, 1100, 1500, 2050, 2200, 2600):
        (await cpu.lease()).release()
        await until(lambda: cpu.idle)
        sweeping = asyncio.create_task(inside.daemon.parts.sweeps.reap())
        await asyncio.sleep(delay_ms / 1000)
        with await cpu.lease() as lease:
            assert await answers(lease.endpoint)
            (swept,) = await sweeping
            assert await answers(lease.endpoint)
        stops += swept.action == "stopped"
    assert cpu.in_flight == 0
    assert stops == inside.kinds("cpu").count("stopped")
    assert stops > 0


async def test_looking_neither_starts_nor_extends_anything(
    new_inside: NewInside, engine_events: EngineEvents
) -> None:
    inside = await new_inside(instances={"cpu": {"template": "sim", "ttl_s": 1.5}})
    cpu = inside.get("cpu")
    polls = 0

    async def poll() -> None:
        nonlocal polls
        while True:
            for path in (
                "instances",
                "instances/cpu",
                "instances/cpu/logs",
                "gpus",
                "/metrics",
                "/readyz",
                "/healthz",
            ):
                await get(inside, path)
            await post(inside, "reap", dry_run="true")
            polls += 1

    await cpu.start()
    await until(lambda: cpu._usage._last)  # what comes before the first sample counts as use
    used_at = cpu.view().last_used_at
    polling = asyncio.create_task(poll())
    stopped = await until(cpu.view, lambda view: view.phase == "stopped")
    assert stopped.last_used_at == used_at
    assert stopped.explanation is None
    assert lived_s(inside, "cpu") >= 1.5
    before = polls
    await until(lambda: polls >= before + 5 or polling.done())
    assert not polling.done()
    polling.cancel()
    assert engine_events.count("cpu", "create") == 1
    assert (await get(inside, "instances/cpu"))["starts"] == 1


async def test_pinned_instances_and_those_with_a_ttl_of_zero_are_never_swept(new_inside: NewInside) -> None:
    inside = await new_inside(
        instances={
            "pinned": {"template": "sim", "ttl_s": 0.2, "pinned": True},
            "forever": {"template": "sim", "ttl_s": 0},
            "witness": {"template": "sim", "ttl_s": 0.2},
        }
    )
    await asyncio.gather(*(inside.get(name).start() for name in ("pinned", "forever")))
    await inside.get("witness").start()
    await until(lambda: inside.phase("witness") == "stopped")
    _, body = await post(inside, "reap")
    details = {one["id"]: (one["action"], one["detail"]) for one in body["instances"]}
    assert details["pinned"] == ("kept", "pinned")
    assert details["forever"][0] == "kept"
    assert "its TTL is 0" in details["forever"][1]
    assert inside.phase("pinned") == inside.phase("forever") == "ready"


async def test_changes_of_ttl_and_pin_take_effect_at_once(new_inside: NewInside) -> None:
    inside = await new_inside(instances={"cpu": {"template": "sim", "ttl_s": 0.3}})
    cpu = inside.get("cpu")
    lease = await cpu.lease()
    assert (await patch(inside, "cpu", pinned=True))["pinned"] is True
    lease.release()
    assert (await get(inside, "instances/cpu"))["ttl_remaining_s"] is None
    await asyncio.sleep(0.8)  # more than TTL and sweep together
    assert inside.phase("cpu") == "ready"
    body = await patch(inside, "cpu", ttl_s=900, pinned=False)
    assert (body["ttl_s"], body["pinned"]) == (900, False)
    assert 800 < body["ttl_remaining_s"] < 900
    body = await patch(inside, "cpu", ttl_s=0)
    assert body["ttl_remaining_s"] is None
    await patch(inside, "cpu", ttl_s=0.1)
    await until(lambda: inside.phase("cpu") == "stopped")
    assert cpu.view().ttl_s == 0.1


async def test_a_lease_that_outlives_its_container_is_still_given_back(new_inside: NewInside) -> None:
    inside = await new_inside(instances={"cpu": {"template": "sim", "ttl_s": 0.3}})
    cpu = inside.get("cpu")
    old: list[Lease] = [await cpu.lease() for _ in range(3)]
    await cpu.stop(force=True)
    new = await cpu.lease()
    assert cpu.in_flight == 4
    for lease in old:
        lease.release()
    assert cpu.in_flight == 1
    await asyncio.sleep(0.8)
    assert inside.phase("cpu") == "ready"
    new.release()
    await until(lambda: inside.phase("cpu") == "stopped")
    assert cpu.in_flight == 0


async def test_sweeps_that_come_while_a_stop_is_slow_do_not_ask_for_it_again(new_inside: NewInside) -> None:
    inside = await new_inside(
        instances={"deaf": {"template": "deaf", "ttl_s": 0.05}},
        templates={"deaf": {"env": {"OLLAMA_SIM_SHUTDOWN_S": "-1"}}},
        lifecycle={"stop_timeout_s": 2},
    )
    await inside.get("deaf").start()
    await until(lambda: inside.phase("deaf") == "stopped")
    assert inside.kinds("deaf").count("stopping") == 1
    assert inside.moments("deaf", "stopped")[0] - inside.moments("deaf", "stopping")[0] >= 2


async def test_two_sweeps_at_once_make_one_stop(new_inside: NewInside) -> None:
    inside = await new_inside(
        instances={"cpu": {"template": "sim", "ttl_s": 0.01}}, lifecycle={"probe_interval_s": 30}
    )
    cpu = inside.get("cpu")
    await cpu.start()
    await until(lambda: cpu._usage._last and cpu.idle)
    answered = await asyncio.gather(*(post(inside, "reap") for _ in range(4)))
    actions = sorted(body["instances"][0]["action"] for _, body in answered)
    assert {status for status, _ in answered} == {200}
    assert actions == ["kept", "kept", "kept", "stopped"]
    assert inside.kinds("cpu").count("stopping") == 1
