"""Starts: many at once, given up, stopped half-way, failing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import aiohttp
import pytest

from manager.domain.condition import Retry
from manager.errors import CancelledByStopError, StartFailedError
from tests.simulated.image import IMAGE
from tests.support.inside import EngineEvents, NewInside, own_containers, until
from tests.support.talk import answers, post

if TYPE_CHECKING:
    import docker

    from manager.services.instances.leases import Lease

CRASH = {"env": {"OLLAMA_SIM_CRASH": "start"}}
NEVER_READY = {"env": {"OLLAMA_SIM_START_PORT": "never"}}


# --- many at once ---


async def test_first_requests_at_once_make_one_create_and_one_start(
    new_inside: NewInside, engine_events: EngineEvents
) -> None:
    inside = await new_inside()
    cpu = inside.get("cpu")
    leases: list[Lease]
    leases, answered = await asyncio.gather(
        asyncio.gather(*(cpu.lease() for _ in range(16))),
        asyncio.gather(*(post(inside, "instances/cpu/start") for _ in range(8))),
    )
    assert {status for status, _ in answered} == {200}
    assert len({lease.endpoint for lease in leases}) == 1
    assert (engine_events.count("cpu", "create"), engine_events.count("cpu", "start")) == (1, 1)
    assert cpu.view().starts == 1
    assert cpu.in_flight == 16
    for lease in leases:
        lease.release()
        lease.release()
    assert cpu.in_flight == 0


async def test_the_first_caller_may_leave_and_the_others_get_their_lease(
    new_inside: NewInside, engine_events: EngineEvents
) -> None:
    inside = await new_inside()
    cpu = inside.get("cpu")
    gate = inside.steps.hold("cpu", "created")
    first = asyncio.create_task(cpu.lease())
    await gate.reached()
    others = [asyncio.create_task(cpu.lease()) for _ in range(4)]
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.open()
    leases = await asyncio.gather(*others)
    assert cpu.in_flight == 4
    assert await answers(leases[0].endpoint)
    assert engine_events.count("cpu", "create") == 1


async def test_a_client_that_hangs_up_does_not_stop_the_start_it_asked_for(new_inside: NewInside) -> None:
    inside = await new_inside()
    gate = inside.steps.hold("cpu", "created")
    async with aiohttp.ClientSession() as session:
        asking = asyncio.create_task(session.post(f"{inside.compute_url}/instances/cpu/start"))
        await gate.reached()
        asking.cancel()
    gate.open()
    await until(lambda: inside.phase("cpu"), lambda phase: phase == "ready")


# --- stopped half-way ---


@pytest.mark.parametrize("step", ["stored", "created", "started"])
async def test_a_stop_cancels_a_start_at_any_step_and_cleans_up(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str, step: str
) -> None:
    inside = await new_inside()
    cpu = inside.get("cpu")
    gate = inside.steps.hold("cpu", step)
    asking = asyncio.create_task(post(inside, "instances/cpu/start"))
    leasing = [asyncio.create_task(cpu.lease()) for _ in range(3)]
    await gate.reached()
    await until(lambda: len(cpu._condition.starters._futures), lambda waiting: waiting == 4)
    assert await cpu.stop() is True
    status, body = await asking
    assert (status, body["error"]["code"], body["error"]["instance"]) == (409, "cancelled", "cpu")
    for outcome in await asyncio.gather(*leasing, return_exceptions=True):
        assert isinstance(outcome, CancelledByStopError)
    assert own_containers(docker_client, manager_id) == []
    view = cpu.view()
    assert (view.phase, view.target, view.container, view.explanation) == ("stopped", "stopped", None, None)
    gate.open()
    (await cpu.lease()).release()


async def test_a_stop_at_any_moment_of_a_start_leaves_nothing_and_answers_everyone(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside()
    cpu = inside.get("cpu")
    outcomes = set()
    for delay_ms in (0, 1, 5, 20, 40, 80, 120, 200, 300, 450):
        starting = asyncio.create_task(cpu.start())
        await asyncio.sleep(delay_ms / 1000)
        await cpu.stop()
        async with asyncio.timeout(30):
            result = (await asyncio.gather(starting, return_exceptions=True))[0]
        assert result is True or isinstance(result, CancelledByStopError), result
        outcomes.add(type(result).__name__)
        assert own_containers(docker_client, manager_id) == []
        assert (inside.phase("cpu"), cpu.busy) == ("stopped", False)
    assert "CancelledByStopError" in outcomes


async def test_a_container_that_is_not_ready_yet_is_not_asked_to_end(
    new_inside: NewInside, engine_events: EngineEvents
) -> None:
    inside = await new_inside(
        instances={"slow": {"template": "slow"}},
        templates={"slow": {"env": {"OLLAMA_SIM_START_DELAY_S": "120", "OLLAMA_SIM_SHUTDOWN_S": "-1"}}},
        lifecycle={"start_timeout_s": 120, "stop_timeout_s": 60},
    )
    slow = inside.get("slow")
    starting = asyncio.create_task(slow.start())
    await until(lambda: engine_events.count("slow", "start"), within_s=30)
    began = time.monotonic()
    await slow.stop()
    assert time.monotonic() - began < 30
    with pytest.raises(CancelledByStopError):
        await starting
    # SIGTERM would have been ignored for a minute.
    assert engine_events.actions("slow")[-1] == "destroy"


async def test_a_stop_of_a_start_that_is_only_asked_for_touches_nothing(
    new_inside: NewInside, engine_events: EngineEvents
) -> None:
    inside = await new_inside()
    cpu = inside.get("cpu")
    cpu.begin_start()
    assert cpu.begin_stop() is True
    assert cpu._condition.state.intent is None
    assert (await post(inside, "instances/cpu/stop"))[1]["changed"] is False
    assert engine_events.actions("cpu") == []


# --- a container that ends before it is ready ---


async def test_a_container_that_ends_during_the_health_wait_fails_every_waiter_at_once(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside(
        instances={"bad": {"template": "bad"}}, templates={"bad": CRASH}, lifecycle={"start_timeout_s": 300}
    )
    bad = inside.get("bad")
    began = time.monotonic()
    (status, body), *leases = await asyncio.gather(
        post(inside, "instances/bad/start"), *(bad.lease() for _ in range(3)), return_exceptions=True
    )
    assert time.monotonic() - began < 60
    error = body["error"]
    assert (status, error["code"], error["instance"]) == (503, "container_exited", "bad")
    assert "exit code 2" in error["message"]
    assert any("simulated crash at start" in line for line in error["details"]["log_tail"])
    for lease in leases:
        assert isinstance(lease, StartFailedError)
        assert lease.log_tail == tuple(error["details"]["log_tail"])
    view = bad.view()
    assert (view.phase, view.target) == ("failed", "stopped")
    assert view.explanation is not None
    assert view.explanation.code == "container_exited"
    assert view.explanation.log_tail == lease.log_tail
    assert own_containers(docker_client, manager_id) == []


async def test_a_container_that_ended_before_anyone_looked_is_told_as_ended(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside(instances={"bad": {"template": "bad"}}, templates={"bad": CRASH})
    gate = inside.steps.hold("bad", "started")
    starting = asyncio.create_task(inside.get("bad").start())
    await gate.reached()
    await asyncio.to_thread(docker_client.containers.get(f"{manager_id}-ollama-bad").wait, timeout=60)
    gate.open()
    with pytest.raises(StartFailedError, match="exit code 2") as caught:
        await starting
    assert caught.value.code == "container_exited"
    assert any("simulated crash at start" in line for line in caught.value.log_tail)


async def test_the_log_shown_after_a_failed_start_is_that_of_the_container_that_failed(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside()
    cpu = inside.get("cpu")
    await cpu.start()
    running = await cpu.logs(100)
    await cpu.stop()
    assert (await cpu.logs(100))[: len(running)] == running
    gate = inside.steps.hold("cpu", "started")
    starting = asyncio.create_task(cpu.start())
    await gate.reached()
    container = docker_client.containers.get(f"{manager_id}-ollama-cpu")
    await until(lambda: b"Listening" in container.logs())
    container.kill()
    gate.open()
    with pytest.raises(StartFailedError, match="exit code 137") as caught:
        await starting
    assert caught.value.log_tail
    assert await cpu.logs(100) == caught.value.log_tail
    assert await cpu.logs(1) == caught.value.log_tail[-1:]


async def test_a_container_that_is_removed_during_the_health_wait_fails_the_start_at_once(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside(
        instances={"slow": {"template": "slow"}},
        templates={"slow": NEVER_READY},
        lifecycle={"start_timeout_s": 300},
    )
    slow = inside.get("slow")
    starting = asyncio.create_task(slow.start())
    await until(lambda: slow.view().started_at)
    docker_client.containers.get(f"{manager_id}-ollama-slow").remove(force=True)
    async with asyncio.timeout(60):
        with pytest.raises(StartFailedError) as caught:
            await starting
    assert caught.value.code == "container_exited"


async def test_a_server_that_never_answers_fails_at_the_deadline_and_leaves_no_container(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside(
        instances={"slow": {"template": "slow", "start_timeout_s": 1}}, templates={"slow": NEVER_READY}
    )
    status, body = await post(inside, "instances/slow/start")
    assert (status, body["error"]["code"]) == (504, "start_timeout")
    assert own_containers(docker_client, manager_id) == []


# --- failures are neither sticky nor a storm ---


async def test_leases_leave_a_failing_instance_alone_for_a_growing_while_and_an_explicit_start_does_not(
    new_inside: NewInside, engine_events: EngineEvents
) -> None:
    inside = await new_inside(instances={"bad": {"template": "bad"}}, templates={"bad": CRASH})
    bad = inside.get("bad")
    with pytest.raises(StartFailedError) as failed:
        await bad.lease()
    assert failed.value.retry_after_s is None
    for _ in range(20):
        with pytest.raises(StartFailedError, match="left alone") as refused:
            await bad.lease()
        assert refused.value.code == "container_exited"
        assert refused.value.log_tail == failed.value.log_tail
    assert refused.value.retry_after_s is not None
    assert 0 < refused.value.retry_after_s <= 1
    assert engine_events.count("bad", "create") == 1
    for creates in (2, 3):
        with pytest.raises(StartFailedError):
            await bad.start()
        assert engine_events.count("bad", "create") == creates
    with pytest.raises(StartFailedError) as refused:
        await bad.lease()
    assert refused.value.retry_after_s is not None
    assert 2 < refused.value.retry_after_s <= 4
    assert bad.view().phase == "failed"


async def test_clients_that_retry_without_a_pause_cause_no_storm(
    new_inside: NewInside, engine_events: EngineEvents
) -> None:
    inside = await new_inside(instances={"bad": {"template": "bad"}}, templates={"bad": CRASH})
    bad = inside.get("bad")
    refused = 0

    async def insist() -> None:
        nonlocal refused
        while engine_events.count("bad", "create") < 3:
            with pytest.raises(StartFailedError):
                await bad.lease()
            refused += 1
            await asyncio.sleep(0.05)

    async with asyncio.timeout(60):
        await asyncio.gather(*(insist() for _ in range(4)))
    first, second, third = engine_events.moments("bad", "create")[:3]
    assert second - first >= 1
    assert third - second >= 2
    assert refused > 20


async def test_a_pinned_instance_is_restarted_after_a_growing_pause_and_another_is_not(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str, engine_events: EngineEvents
) -> None:
    inside = await new_inside(
        instances={"kept": {"template": "sim", "pinned": True}, "loose": {"template": "sim"}}
    )
    await asyncio.gather(inside.get("kept").start(), inside.get("loose").start())
    docker_client.containers.get(f"{manager_id}-ollama-loose").kill()
    for crash in (1, 2):
        docker_client.containers.get(f"{manager_id}-ollama-kept").kill()
        await until(lambda: inside.phase("kept") == "failed")
        assert inside.get("kept").view().target == "running"
        await until(lambda: engine_events.count("kept", "create"), lambda count: count > crash)  # noqa: B023
        await until(lambda: inside.phase("kept") == "ready")
    deaths = engine_events.moments("kept", "die")
    creates = engine_events.moments("kept", "create")[1:]
    assert creates[0] - deaths[0] >= 1
    assert creates[1] - deaths[1] >= 2
    view = inside.get("loose").view()
    assert (view.phase, view.target) == ("failed", "stopped")
    assert view.explanation is not None
    assert view.explanation.code == "container_exited"
    assert engine_events.count("loose", "create") == 1


async def test_a_failure_long_after_the_last_one_is_the_first_of_a_new_row(
    new_inside: NewInside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.domain.backoff.STABLE_S", 0.2)
    inside = await new_inside()
    cpu = inside.get("cpu")
    cpu._condition.state = replace(cpu._condition.state, start_retry=Retry(failures=6))
    await cpu.start()
    ready_since = cpu._condition.state.ready_since
    assert ready_since is not None
    await until(lambda: time.monotonic() - ready_since > 0.3)
    await cpu.stop()
    assert cpu._condition.state.start_retry.failures == 0


# --- images ---


async def test_a_missing_image_is_named_with_its_remedy_and_never_pulled_until_it_is_there(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str, engine_events: EngineEvents
) -> None:
    image = f"ollama-manager/simulated:{manager_id}"
    inside = await new_inside(instances={"late": {"template": "late"}}, templates={"late": {"image": image}})
    status, body = await post(inside, "instances/late/start")
    assert (status, body["error"]["code"]) == (503, "image_missing")
    assert "ollama-manager pull" in body["error"]["message"]
    assert image in body["error"]["message"]
    assert inside.get("late").view().explanation is not None
    assert own_containers(docker_client, manager_id) == []
    assert engine_events.pulls() == []
    docker_client.images.get(IMAGE).tag(*image.split(":"))
    try:
        status, body = await post(inside, "instances/late/start")
        assert (status, body["instance"]["phase"], body["instance"]["reason"]) == (200, "ready", None)
        await inside.get("late").stop()
    finally:
        docker_client.images.remove(image)


async def test_the_readiness_deadline_does_not_run_before_the_container_does(new_inside: NewInside) -> None:
    inside = await new_inside(instances={"cpu": {"template": "sim", "start_timeout_s": 3}})
    gate = inside.steps.hold("cpu", "created")
    starting = asyncio.create_task(inside.get("cpu").start())
    await gate.reached()
    await asyncio.sleep(3.2)
    gate.open()
    assert await starting is True
