"""SwarmEngine on two real engines that form a swarm: what `services.ports.Engine` promises of a container."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import aclosing, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from manager.adapters.swarm_engine import SwarmEngine
from manager.domain.container import ContainerRequest, ServicePlace, container_request, endpoint_of
from manager.domain.template import Template
from manager.errors import EngineError, Reason
from tests.simulated.image import IMAGE
from tests.support.daemon import wait_for
from tests.support.swarm import CARD_KIND, Swarm, SwarmHost, swarm_obstacles

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from manager.domain.instance import ContainerFacts
    from manager.services.ports import EngineEvent

pytestmark = pytest.mark.skipif(bool(swarm_obstacles()), reason="; ".join(swarm_obstacles()))

TIMEOUT_S = 10.0
WITHIN_S = 20.0
POLL_S = 0.2
READY_LINE = "Listening on"
MANAGER = "m"


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with Swarm() as swarm:
        yield swarm
    swarm.assert_clean()


@pytest.fixture
async def engine(swarm: Swarm) -> AsyncIterator[SwarmEngine]:
    """Afterwards the services of the manager are gone."""
    with closing(engine_of(swarm)) as engine:
        yield engine
    remove_services(swarm)


def engine_of(swarm: Swarm) -> SwarmEngine:
    return SwarmEngine(swarm.manager.url, TIMEOUT_S, resource=CARD_KIND, stop_timeout_s=5.0, poll_s=POLL_S)


def remove_services(swarm: Swarm) -> None:
    api: Any = swarm.client().api
    for service in api.services(filters={"label": f"ollama-manager.manager={MANAGER}"}):
        api.remove_service(service["ID"])


def request_on(host: SwarmHost, instance: str = "far", *, network: str = "", **env: str) -> ContainerRequest:
    """Return what a service on a host is made with: at a port of the host, or on a network."""
    template = Template.model_validate({"image": IMAGE, "device": "cpu", "env": env})
    # A port of its own: that of a service which was removed is free a moment later.
    port = None if network else 20_000 + secrets.randbelow(10_000)
    place = ServicePlace(network or "unused", port, (f"node.id=={host.node_id}",))
    return container_request(
        template, manager_id=MANAGER, instance_id=instance, gpu=None, loopback_port=None, service=place
    )


async def inspected(engine: SwarmEngine, service: str) -> ContainerFacts:
    facts = await engine.inspect(service)
    assert facts is not None
    return facts


async def until(engine: SwarmEngine, service: str, holds: Callable[[ContainerFacts], bool]) -> ContainerFacts:
    async with asyncio.timeout(WITHIN_S):
        while not holds(facts := await inspected(engine, service)):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S / 4)
    return facts


async def started(engine: SwarmEngine, request: ContainerRequest) -> str:
    """Return the id of a service whose server listens."""
    service = await engine.create(request)
    await engine.start(service)
    async with asyncio.timeout(WITHIN_S):
        while not any(READY_LINE in line for line in await engine.logs(service, 100)):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S / 4)
    return service


async def begin_of(lines: AsyncIterator[str]) -> str:
    """Return what a log has said until its server listens."""
    text = ""
    async with asyncio.timeout(WITHIN_S):
        while READY_LINE not in text:
            text += await anext(lines)
    return text


async def end_of(lines: AsyncIterator[str]) -> str:
    """Return the rest of a log, which has to end."""
    async with asyncio.timeout(WITHIN_S):
        return "".join([piece async for piece in lines])


# --- life ---


async def test_a_service_is_created_without_replicas_runs_and_is_parked_again(
    engine: SwarmEngine, swarm: Swarm
) -> None:
    request = request_on(swarm.worker)
    service = await engine.create(request)
    assert (await inspected(engine, service)).status == "parked"
    await engine.start(service)
    facts = await until(engine, service, lambda one: one.status == "running")
    assert (facts.node, facts.address, facts.labels) == ("worker", swarm.worker.address, request.labels)
    assert [one.id for one in await engine.list_containers(MANAGER)] == [service]
    assert await engine.list_containers("another") == ()
    await engine.remove(service)
    assert (await inspected(engine, request.name)).status == "parked"
    assert all(task["Status"]["State"] != "running" for task in swarm.tasks(service))


async def test_two_starts_at_once_make_one_task(engine: SwarmEngine, swarm: Swarm) -> None:
    service = await engine.create(request_on(swarm.worker))
    async with asyncio.timeout(WITHIN_S):
        await asyncio.gather(*(engine.start(service) for _ in range(2)))
    assert len(swarm.tasks(service)) == 1
    assert (await inspected(engine, service)).status == "running"


async def test_creating_again_gives_a_service_that_is_parked_the_new_specification(
    engine: SwarmEngine, swarm: Swarm
) -> None:
    request = request_on(swarm.worker)
    service = await engine.create(request)
    await engine.start(service)
    with pytest.raises(EngineError, match="already in use by a service") as caught:
        await engine.create(request)
    assert caught.value.reason is Reason.NAME_CONFLICT
    await engine.remove(service)
    again = await engine.create(request_on(swarm.manager, OLLAMA_NUM_PARALLEL="3"))
    assert again == service
    await engine.start(service)
    facts = await until(engine, service, lambda one: one.status == "running")
    assert facts.node == "manager"
    api: Any = swarm.client().api
    spec = api.inspect_service(service)["Spec"]["TaskTemplate"]["ContainerSpec"]
    assert "OLLAMA_NUM_PARALLEL=3" in spec["Env"]


async def test_a_service_of_another_instance_is_left_as_it_is(engine: SwarmEngine, swarm: Swarm) -> None:
    request = request_on(swarm.worker)
    await engine.create(request)
    other = replace(request, labels=request.labels | {"ollama-manager.instance": "other"})
    with pytest.raises(EngineError) as caught:
        await engine.create(other)
    assert caught.value.reason is Reason.NAME_CONFLICT
    assert (await inspected(engine, request.name)).labels == request.labels


async def test_a_service_that_changed_after_it_was_read_is_read_again(
    engine: SwarmEngine, swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await engine.create(request_on(swarm.worker))
    api: Any = swarm.client().api
    read = engine._service
    changes = iter(["one", "two"])

    async def changed_after(name: str) -> Any:
        found = await read(name)
        if (label := next(changes, None)) is not None:
            now = api.inspect_service(service)
            labels = now["Spec"]["Labels"] | {"by-hand": label}
            whole = now["Spec"] | {"Labels": labels}
            url = api._url("/services/{0}/update", service)
            answer = api._post_json(url, data=whole, params={"version": now["Version"]["Index"]})
            assert answer.status_code == 200, answer.text
        return found

    monkeypatch.setattr(engine, "_service", changed_after)
    await engine.start(service)
    facts = await until(engine, service, lambda one: one.status == "running")
    assert facts.labels["by-hand"] == "two", "the change of somebody else is kept"


async def test_what_is_gone_can_be_stopped_and_removed(engine: SwarmEngine, swarm: Swarm) -> None:
    service = await engine.create(request_on(swarm.worker))
    api: Any = swarm.client().api
    api.remove_service(service)
    assert await engine.inspect(service) is None
    await engine.signal(service, "SIGTERM")
    with pytest.raises(EngineError):
        await engine.start(service)


async def test_tasks_that_begin_and_end_are_told_as_events(engine: SwarmEngine, swarm: Swarm) -> None:
    service = await engine.create(request_on(swarm.worker))
    opened = asyncio.Event()
    told: list[EngineEvent] = []

    async def listen() -> None:
        async for event in engine.events(MANAGER, opened.set):
            told.append(event)  # noqa: PERF401  (read before the end)

    listening = asyncio.ensure_future(listen())
    try:
        async with asyncio.timeout(WITHIN_S):
            await opened.wait()
            await engine.start(service)
            while not told:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S / 4)
            await engine.signal(service, "SIGTERM")
            while "die" not in [event.action for event in told]:  # noqa: ASYNC110
                await asyncio.sleep(POLL_S / 4)
    finally:
        listening.cancel()
        await asyncio.wait({listening})
    assert told[0].action == "start"
    assert {(event.container_id, event.instance) for event in told} == {(service, "far")}


# --- logs ---


async def test_the_log_of_a_task_is_read_from_another_node(engine: SwarmEngine, swarm: Swarm) -> None:
    service = await started(engine, request_on(swarm.worker))
    lines = await engine.logs(service, 100)
    assert any(READY_LINE in line for line in lines)
    assert len(await engine.logs(service, 1)) == 1


async def test_a_log_that_is_followed_ends_with_its_task(engine: SwarmEngine, swarm: Swarm) -> None:
    service = await started(engine, request_on(swarm.worker))
    async with aclosing(engine.follow_logs(service, 100)) as lines:
        text = await begin_of(lines)
        await engine.signal(service, "SIGTERM")
        text += await end_of(lines)
    assert text.count(READY_LINE) == 1


async def test_a_log_that_is_followed_does_not_go_on_with_the_next_task(
    engine: SwarmEngine, swarm: Swarm
) -> None:
    service = await started(engine, request_on(swarm.worker))
    async with aclosing(engine.follow_logs(service, 100)) as lines:
        text = await begin_of(lines)
        await engine.remove(service)
        await engine.start(service)
        text += await end_of(lines)
    assert text.count(READY_LINE) == 1


async def test_a_service_without_a_task_has_no_log(engine: SwarmEngine, swarm: Swarm) -> None:
    service = await engine.create(request_on(swarm.worker))
    with pytest.raises(EngineError, match="has no task"):
        await engine.logs(service, 10)
    with pytest.raises(EngineError, match="has no task"):
        await end_of(engine.follow_logs(service, 10))


async def test_a_log_on_a_node_that_is_down_is_refused_and_one_that_is_followed_ends(
    engine: SwarmEngine, swarm: Swarm
) -> None:
    service = await started(engine, request_on(swarm.worker))
    async with aclosing(engine.follow_logs(service, 100)) as lines:
        await begin_of(lines)
        swarm.worker.cut_network()
        try:
            await asyncio.to_thread(swarm.worker.wait_for_state, "down")
            for asked in (engine.logs(service, 10), end_of(engine.follow_logs(service, 10))):
                with pytest.raises(EngineError, match="is on node worker, which is down") as caught:
                    async with asyncio.timeout(TIMEOUT_S / 2):
                        await asked
                assert caught.value.reason is Reason.INSTANCE_UNAVAILABLE
            await end_of(lines)
            facts = await inspected(engine, service)
            assert (facts.status, facts.error) == ("exited", "its node worker is down")
        finally:
            swarm.worker.mend_network()
    await asyncio.to_thread(swarm.worker.wait_for_state, "ready")


# --- networks ---


async def test_the_network_of_services_is_made_once(engine: SwarmEngine, swarm: Swarm) -> None:
    async with asyncio.timeout(WITHIN_S):
        await asyncio.gather(*(engine.ensure_network("made") for _ in range(3)))
        await engine.ensure_network("made")
    (network,) = swarm.client().networks.list(names=["made"])
    assert (network.attrs["Driver"], network.attrs["Attachable"]) == ("overlay", True)
    network.remove()


async def test_a_bridge_of_that_name_is_refused(engine: SwarmEngine, swarm: Swarm) -> None:
    bridge = swarm.client().networks.create("local", driver="bridge")
    try:
        with pytest.raises(
            EngineError, match=r"swarm.network: 'local' is a network of driver bridge"
        ) as caught:
            await engine.ensure_network("local")
        assert caught.value.reason is Reason.NAME_CONFLICT
    finally:
        bridge.remove()


async def test_on_the_network_of_services_a_service_is_reached_by_its_name() -> None:
    # A swarm of its own: where another test has cut the network, overlay networks need a minute to recover.
    with Swarm() as swarm, closing(engine_of(swarm)) as engine:
        await engine.ensure_network("services")
        request = request_on(swarm.worker, network="services")
        service = await started(engine, request)
        facts = await inspected(engine, service)
        endpoint = endpoint_of(facts, request, by_name=True)
        assert endpoint == f"http://{MANAGER}-ollama-far:11434"
        near = swarm.manager.client().containers.run(IMAGE, detach=True, network="services")
        asked = {"OLLAMA_HOST": urlsplit(endpoint).netloc}

        def answers() -> bool:
            return bool(near.exec_run(["ollama", "list"], environment=asked).exit_code == 0)

        await asyncio.to_thread(wait_for, answers, within_s=WITHIN_S)
    swarm.assert_clean()
