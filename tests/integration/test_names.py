"""A container has the name that an instance wants: what is ours is taken over, what is not is left alone."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.container import LABEL_INSTANCE, LABEL_MANAGER
from tests.simulated.image import IMAGE
from tests.support.inside import NewInside, own_containers, until
from tests.support.talk import answers, get, post

if TYPE_CHECKING:
    from collections.abc import Iterator

    import docker


@contextmanager
def container(client: docker.DockerClient, manager_id: str, **labels: str) -> Iterator[Any]:
    """A running container with the name of instance `cpu`; leaving removes it."""
    running = client.containers.run(
        IMAGE, name=f"{manager_id}-ollama-cpu", labels=labels, detach=True, network="bridge"
    )
    try:
        yield running
    finally:
        running.remove(force=True)


def state(running: Any) -> tuple[Any, ...]:
    running.reload()
    return running.id, running.name, running.status, running.attrs["State"]["StartedAt"]


@pytest.mark.parametrize("whose", ["nobody's", "another manager's", "another instance's"])
async def test_a_stranger_with_the_name_is_refused_and_never_touched(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str, whose: str
) -> None:
    labels = {
        "nobody's": {},
        "another manager's": {LABEL_MANAGER: "other", LABEL_INSTANCE: "cpu"},
        "another instance's": {LABEL_MANAGER: manager_id, LABEL_INSTANCE: "gone"},
    }[whose]
    with container(docker_client, manager_id, **labels) as stranger:
        before = state(stranger)
        inside = await new_inside(instances={"cpu": {"template": "sim", "ttl_s": 0.1}})
        assert inside.phase("cpu") == "stopped"
        for _ in range(2):
            status, body = await post(inside, "instances/cpu/start")
            assert (status, body["error"]["code"]) == (409, "name_conflict")
            assert body["error"]["details"]["container"] == stranger.id
        assert (await get(inside, "instances/cpu"))["reason"]["code"] == "name_conflict"
        for query in ({}, {"force": "true"}):
            status, _ = await post(inside, "instances/cpu/stop", **query)
            assert status == 200
        assert (await post(inside, "reap"))[0] == 200
        await inside.get("cpu")._looking.once()
        assert inside.phase("cpu") == "stopped"
        assert state(stranger) == before
    status, _ = await post(inside, "instances/cpu/start")
    assert status == 200


async def test_a_stranger_that_takes_the_name_of_a_stopped_instance_survives_a_whole_lifecycle(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside()
    cpu = inside.get("cpu")
    await cpu.start()
    docker_client.containers.get(f"{manager_id}-ollama-cpu").remove(force=True)
    await until(lambda: inside.phase("cpu") == "failed")
    with container(docker_client, manager_id) as stranger:
        before = state(stranger)
        await cpu.stop(force=True)
        assert inside.phase("cpu") == "stopped"
        assert state(stranger) == before


async def test_a_container_of_ours_that_was_left_between_two_steps_is_replaced(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    inside = await new_inside()
    gate = inside.steps.hold("cpu", "stored")
    starting = asyncio.create_task(inside.get("cpu").start())
    await gate.reached()
    left = docker_client.containers.create(
        IMAGE,
        name=f"{manager_id}-ollama-cpu",
        labels={LABEL_MANAGER: manager_id, LABEL_INSTANCE: "cpu"},
    )
    gate.open()
    assert await starting is True
    (found,) = own_containers(docker_client, manager_id)
    assert found.id != left.id


async def test_a_container_of_ours_that_runs_is_adopted_with_the_work_in_it(
    new_inside: NewInside, docker_client: docker.DockerClient, manager_id: str
) -> None:
    labels = {LABEL_MANAGER: manager_id, LABEL_INSTANCE: "cpu"}
    with container(docker_client, manager_id, **labels) as running:
        before = state(running)
        inside = await new_inside()
        cpu = inside.get("cpu")
        await until(lambda: inside.phase("cpu") == "ready")
        with await cpu.lease() as lease:
            assert await answers(lease.endpoint)
        view = cpu.view()
        assert view.container is not None
        assert (view.container.id, view.target, view.starts) == (running.id, "running", 0)
        assert state(running) == before
