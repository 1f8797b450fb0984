"""The whole way on a real engine: start, use, stop."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import requests

from tests.support.daemon import wait_for

if TYPE_CHECKING:
    import docker

    from tests.integration.conftest import NewDaemon


def containers(client: docker.DockerClient, manager_id: str) -> list[str]:
    found = client.containers.list(all=True, filters={"label": f"ollama-manager.manager={manager_id}"})
    return sorted(container.name or "" for container in found)


def test_a_started_instance_answers_at_its_endpoint_and_a_stopped_one_is_gone(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str
) -> None:
    daemon = new_daemon().start()
    assert daemon.instance("cpu")["phase"] == "stopped"
    body = daemon.started("cpu")
    assert body["phase"] == "ready"
    assert body["target"] == "running"
    assert body["starts"] == 1
    assert requests.get(f"{body['endpoint']}/api/version", timeout=5).json()["version"]
    assert containers(docker_client, manager_id) == [f"{manager_id}-ollama-cpu"]
    assert daemon.begin("cpu", "start").json()["changed"] is False
    body = daemon.stopped("cpu")
    assert (body["phase"], body["target"], body["endpoint"], body["container"]) == (
        "stopped",
        "stopped",
        None,
        None,
    )
    assert containers(docker_client, manager_id) == []
    assert daemon.begin("cpu", "stop").json()["changed"] is False


def test_sixteen_starts_at_once_make_one_container_and_one_outcome(
    new_daemon: NewDaemon, manager_id: str
) -> None:
    daemon = new_daemon().start()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: daemon.begin("cpu", "start"), range(16)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["instance"]["container"]["id"] for answer in answers}) == 1
    assert daemon.instance("cpu")["starts"] == 1


def test_an_idle_instance_is_stopped_after_its_ttl_and_polls_do_not_extend_it(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(instances={"cpu": {"template": "sim", "ttl_s": 1}}).start()
    daemon.started("cpu")
    body = wait_for(lambda: daemon.instance("cpu"), lambda b: b["phase"] == "stopped", within_s=6)
    assert body["reason"] is None
    kinds = [event["kind"] for event in daemon.events()]
    assert kinds.count("stopped") == 1
