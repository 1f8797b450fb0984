"""Stops: slow ones, refused ones, failing ones, and requests that come in the middle of one."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from manager.errors import EngineUnreachableError, LockedError
from tests.simulated.image import ensure_simulated_image
from tests.support.engine import PrivateEngine, private_engine_obstacles
from tests.support.engine_kinds import is_podman
from tests.support.inside import EngineEvents, NewInside, own_containers, until
from tests.support.talk import answers, get, post, set_knobs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import docker

STUBBORN = {"env": {"OLLAMA_SIM_SHUTDOWN_S": "-1"}}
SLOW = {"env": {"OLLAMA_SIM_SHUTDOWN_S": "1.5"}}


# --- requests in the middle of a stop ---


async def test_requests_that_arrive_during_a_stop_wait_and_start_it_again(
    new_inside: NewInside, engine_events: EngineEvents
) -> None:
    inside = await new_inside(instances={"slow": {"template": "slow"}}, templates={"slow": SLOW})
    slow = inside.get("slow")
    await slow.start()
    before = slow.view().container
    stopping = asyncio.create_task(slow.stop())
    await until(lambda: inside.phase("slow") == "stopping")
    lease, (status, body), stopped = await asyncio.gather(
        slow.lease(), post(inside, "instances/slow/start"), stopping
    )
    assert (status, body["changed"], body["instance"]["phase"]) == (200, True, "ready")
    assert stopped is True
    assert await answers(lease.endpoint)
    lease.release()
    after = slow.view().container
    assert before is not None
    assert after is not None
    assert before.id != after.id
    assert engine_events.count("slow", "create") == 2


async def test_a_drain_lets_the_open_lease_finish_and_serves_the_next_one_afterwards(
    new_inside: NewInside, engine_events: EngineEvents
) -> None:
    inside = await new_inside(lifecycle={"drain_timeout_s": 120})
    cpu = inside.get("cpu")
    open_lease = await cpu.lease()
    stopping = asyncio.create_task(post(inside, "instances/cpu/stop"))
    await until(lambda: inside.phase("cpu") == "draining")
    next_lease = asyncio.create_task(cpu.lease())
    starting = asyncio.create_task(post(inside, "instances/cpu/start"))
    await until(lambda: len(cpu._condition.starters._futures) == 2)
    assert await answers(open_lease.endpoint)
    assert (cpu.in_flight, next_lease.done(), starting.done()) == (1, False, False)
    assert engine_events.count("cpu", "kill") == 0
    open_lease.release()
    assert (await stopping)[0] == 200
    assert (await starting)[0] == 200
    with await next_lease as lease:
        assert await answers(lease.endpoint)
    assert engine_events.count("cpu", "create") == 2
    assert cpu.in_flight == 0


async def test_a_stop_that_follows_a_start_that_waits_for_a_stop_has_the_last_word(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside(instances={"slow": {"template": "slow"}}, templates={"slow": SLOW})
    slow = inside.get("slow")
    await slow.start()
    first = asyncio.create_task(slow.stop())
    await until(lambda: inside.phase("slow") == "stopping")
    starting = asyncio.create_task(post(inside, "instances/slow/start"))
    await until(lambda: len(slow._condition.starters._futures) == 1)
    assert await slow.stop() is True
    assert await first is True
    status, body = await starting
    assert (status, body["error"]["code"]) == (409, "cancelled")
    assert (inside.phase("slow"), slow.busy) == ("stopped", False)
    assert own_containers(docker_client, manager_id) == []


async def test_a_drain_ends_at_its_deadline_and_force_does_not_wait_for_it(new_inside: NewInside) -> None:
    inside = await new_inside(
        instances={"cpu": {"template": "sim"}, "two": {"template": "sim"}, "three": {"template": "sim"}},
        lifecycle={"drain_timeout_s": 3},
    )
    leases = await asyncio.gather(*(inside.get(name).lease() for name in ("cpu", "two", "three")))
    waiting = asyncio.create_task(inside.get("cpu").stop())
    forced_later = asyncio.create_task(inside.get("two").stop())
    await until(lambda: inside.phase("two") == "draining")
    await inside.get("three").stop(force=True)
    await inside.get("two").stop(force=True)
    await asyncio.gather(waiting, forced_later)
    assert "draining" not in inside.kinds("three")
    drained = {
        name: inside.moments(name, "stopping")[0] - inside.moments(name, "draining")[0]
        for name in ("cpu", "two")
    }
    assert drained["cpu"] >= 2.9
    assert drained["two"] < drained["cpu"]
    for lease, name in zip(leases, ("cpu", "two", "three"), strict=True):
        assert inside.get(name).in_flight == 1
        lease.release()
        assert inside.get(name).in_flight == 0


async def test_many_stops_at_once_are_one(new_inside: NewInside, engine_events: EngineEvents) -> None:
    inside = await new_inside()
    cpu = inside.get("cpu")
    await cpu.start()
    answered = await asyncio.gather(*(post(inside, "instances/cpu/stop") for _ in range(8)))
    assert {status for status, _ in answered} == {200}
    assert inside.kinds("cpu").count("stopped") == 1
    assert engine_events.count("cpu", "destroy") == 1


async def test_a_container_that_dies_while_it_is_drained_ends_the_stop_at_once(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside(lifecycle={"drain_timeout_s": 300})
    cpu = inside.get("cpu")
    lease = await cpu.lease()
    stopping = asyncio.create_task(cpu.stop())
    await until(lambda: inside.phase("cpu") == "draining")
    docker_client.containers.get(f"{manager_id}-ollama-cpu").kill()
    async with asyncio.timeout(60):
        assert await stopping is True
    view = cpu.view()
    assert (view.phase, view.target, view.explanation) == ("stopped", "stopped", None)
    lease.release()
    assert cpu.in_flight == 0


# --- containers that will not end ---


async def test_a_container_that_ignores_sigterm_is_killed(
    new_inside: NewInside, engine_events: EngineEvents, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside(
        instances={"deaf": {"template": "deaf"}},
        templates={"deaf": STUBBORN},
        lifecycle={"stop_timeout_s": 1},
    )
    deaf = inside.get("deaf")
    await deaf.start()
    assert await deaf.stop() is True
    kills = [event for event in engine_events.all("deaf") if event["Action"] == "kill"]
    assert len(kills) == 2
    if not is_podman():  # it does not say which signal
        assert [event["Actor"]["Attributes"]["signal"] for event in kills] == ["15", "9"]
    assert own_containers(docker_client, manager_id) == []
    assert any("Listening" in line for line in await deaf.logs(100))


async def test_a_paused_container_is_stopped_too(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside(lifecycle={"stop_timeout_s": 1})
    cpu = inside.get("cpu")
    await cpu.start()
    docker_client.containers.get(f"{manager_id}-ollama-cpu").pause()
    view = await until(cpu.view, lambda view: view.health == "unhealthy" and view.explanation)
    assert view.phase == "ready"
    assert view.explanation is not None
    assert "docker unpause" in view.explanation.message
    assert await cpu.stop() is True
    assert own_containers(docker_client, manager_id) == []


async def test_a_container_that_was_paused_past_its_deadline_gets_its_time_when_it_goes_on(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside(
        instances={"slow": {"template": "slow", "start_timeout_s": 2}},
        templates={"slow": {"env": {"OLLAMA_SIM_START_DELAY_S": "1"}}},
    )
    starting = asyncio.create_task(inside.get("slow").start())
    gate = inside.steps.hold("slow", "started")
    await gate.reached()
    container = docker_client.containers.get(f"{manager_id}-ollama-slow")
    container.pause()
    gate.open()
    await asyncio.sleep(2.5)
    assert inside.phase("slow") == "starting"
    container.unpause()
    assert await starting is True


async def test_one_slow_stop_delays_no_other_instance_and_no_status(new_inside: NewInside) -> None:
    inside = await new_inside(
        instances={"deaf": {"template": "deaf"}, "other": {"template": "sim"}, "third": {"template": "sim"}},
        templates={"deaf": STUBBORN},
        lifecycle={"stop_timeout_s": 8},
    )
    await asyncio.gather(inside.get("deaf").start(), inside.get("third").start())
    stopping = asyncio.create_task(inside.get("deaf").stop())
    await until(lambda: inside.phase("deaf") == "stopping")
    began = time.monotonic()
    await asyncio.gather(inside.get("other").start(), inside.get("third").stop())
    await inside.get("other").stop()
    polls = 0
    slowest_s = 0.0
    for path in ("instances", "instances/deaf", "/metrics", "/readyz", "gpus") * 5:
        asked = time.monotonic()
        await get(inside, path)
        slowest_s = max(slowest_s, time.monotonic() - asked)
        polls += 1
    spent_s = time.monotonic() - began
    assert (inside.phase("deaf"), stopping.done()) == ("stopping", False)
    assert inside.phase("other") == inside.phase("third") == "stopped"
    assert polls == 25
    await stopping
    assert slowest_s < spent_s < inside.moments("deaf", "stopped")[0] - inside.moments("deaf", "stopping")[0]


# --- stops that fail ---


async def test_a_stop_that_fails_stays_asked_for_and_tells_everyone_who_waits(
    new_inside: NewInside,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    docker_client: docker.DockerClient,
    manager_id: str,
) -> None:
    monkeypatch.setattr("manager.opening._LOCK_WAIT_S", 0.3)
    inside = await new_inside()
    cpu = inside.get("cpu")
    await cpu.start()
    with FileLock(tmp_path / "state" / "locks" / "cpu.lock"):
        stopping = asyncio.create_task(cpu.stop())
        await until(lambda: inside.phase("cpu") == "stopping")
        starting = asyncio.create_task(post(inside, "instances/cpu/start"))
        with pytest.raises(LockedError):
            await stopping
        async with asyncio.timeout(30):
            status, body = await starting
        assert (status, body["error"]["code"]) == (409, "instance_locked")
        view = cpu.view()
        assert view.phase == "stopping"
        assert view.explanation is not None
        assert "could not be stopped yet" in view.explanation.message
        await until(lambda: inside.kinds("cpu").count("stop_failed") >= 2)
        assert len(own_containers(docker_client, manager_id)) == 1
        cpu.begin_stop()
    await until(lambda: inside.phase("cpu") == "stopped")
    assert own_containers(docker_client, manager_id) == []
    assert cpu.view().explanation is None


@pytest.fixture(scope="module")
def fragile_engine() -> Iterator[PrivateEngine]:
    """An engine that may be stopped in its tracks."""
    if obstacles := private_engine_obstacles():
        pytest.skip("; ".join(obstacles))
    with PrivateEngine() as engine:
        ensure_simulated_image(engine.client())
        yield engine
    engine.assert_clean()


async def test_an_engine_that_hangs_fails_every_call_in_time_and_nothing_is_forgotten(
    new_inside: NewInside, fragile_engine: PrivateEngine, manager_id: str
) -> None:
    inside = await new_inside(
        instances={"one": {"template": "sim"}, "two": {"template": "sim"}, "three": {"template": "sim"}},
        engine_url=fragile_engine.url,
        timeout_s=2,
    )
    client = fragile_engine.client()
    one, two, three = (inside.get(name) for name in ("one", "two", "three"))
    await asyncio.gather(one.start(), two.start())
    signalled = inside.steps.hold("one", "signalled")
    created = inside.steps.hold("three", "created")
    stopping = asyncio.create_task(one.stop())
    starting = asyncio.create_task(three.start())
    await asyncio.gather(signalled.reached(), created.reached())
    fragile_engine.pause()
    try:
        signalled.open()
        created.open()
        began = time.monotonic()
        async with asyncio.timeout(60):
            with pytest.raises(EngineUnreachableError):
                await stopping
            with pytest.raises(EngineUnreachableError):
                await starting
            await until(lambda: not inside.daemon.parts.link.up)
            for name, action in (("two", "stop"), ("two", "start"), ("three", "start"), ("one", "stop")):
                status, body = await post(inside, f"instances/{name}/{action}")
                if (name, action) == ("two", "start"):
                    assert (status, body["changed"]) == (200, False)  # it runs, and it answers
                else:
                    assert (status, body["error"]["code"]) == (503, "engine_unavailable")
        assert time.monotonic() - began < 30
        assert one.view().target == "stopped"
        assert (await get(inside, "instances/one"))["reason"]["code"] == "engine_unavailable"
        assert (await get(inside, "instances/two"))["phase"] == "ready"
        with await two.lease() as lease:
            assert await answers(lease.endpoint)
    finally:
        fragile_engine.resume()
    await until(lambda: inside.phase("one") == "stopped")
    await two.stop()
    async with asyncio.timeout(60):
        # The engine may only now begin the start that it was asked for before it hung; it is adopted then.
        while own_containers(client, manager_id):
            if inside.phase("three") == "ready":
                with suppress(EngineUnreachableError):  # it answers slowly, having just woken up
                    await three.stop()
            await asyncio.sleep(0.05)


async def test_a_server_that_hangs_is_stopped_all_the_same(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside()
    cpu = inside.get("cpu")
    await cpu.start()
    endpoint = cpu.usable_endpoint()
    assert endpoint is not None
    await set_knobs(endpoint, hang="all")
    await until(lambda: cpu.view().health == "unhealthy")
    assert await cpu.stop() is True
    assert own_containers(docker_client, manager_id) == []
