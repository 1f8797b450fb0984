"""A container that is cut off: from its network by hand, and from its streams by a stop."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.support.daemon import wait_for
from tests.support.ollama import set_knobs

if TYPE_CHECKING:
    import docker

    from tests.support.daemon import Daemon
    from tests.support.fixtures import NewDaemon

NETWORK = "ollama-manager"


def chat(daemon: Daemon) -> requests.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": False}
    return requests.post(f"{daemon.url}/api/chat", json=body, timeout=60)


def records(daemon: Daemon) -> list[dict[str, Any]]:
    """The log lines of requests so far."""
    lines = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    return [line for line in lines if "outcome" in line]


def test_a_container_that_is_disconnected_by_hand_is_connected_again(
    new_daemon: NewDaemon, docker_client: docker.DockerClient
) -> None:
    daemon = new_daemon().start()
    before = daemon.started("cpu")
    assert chat(daemon).status_code == 200
    container = docker_client.containers.get(before["container"]["id"])
    docker_client.networks.get(NETWORK).disconnect(container, force=True)
    wait_for(lambda: [event for event in daemon.events() if event["kind"] == "reconnected"], within_s=30)
    body = daemon.wait_for_phase("cpu", "ready")
    assert body["container"]["id"] == before["container"]["id"]
    wait_for(lambda: chat(daemon).status_code, lambda status: status == 200)
    container.reload()
    assert NETWORK in container.attrs["NetworkSettings"]["Networks"]


@pytest.mark.parametrize("force", [True, False])
def test_a_stream_that_the_operators_stop_cuts_is_logged_as_cut(
    new_daemon: NewDaemon, *, force: bool
) -> None:
    daemon = new_daemon(lifecycle={"drain_timeout_s": 1}).start()
    endpoint = daemon.started("cpu")["endpoint"]
    set_knobs(endpoint, tokens=10**6, tokens_per_s=50)
    body = {"model": "tiny", "prompt": "go on"}
    with requests.post(f"{daemon.url}/api/generate", json=body, stream=True, timeout=60) as answer:
        lines = answer.iter_lines()
        for _ in range(5):
            assert next(lines)
        stopped = daemon.stopped("cpu", force=str(force).lower())
        assert stopped["phase"] == "stopped"
        last = [line for line in lines if line][-1]
    assert "cpu was stopped" in json.loads(last)["error"]
    (record,) = wait_for(lambda: records(daemon), lambda found: len(found) == 1)
    assert record["outcome"] == "cut"
    answer = chat(daemon)  # it starts again, and nothing is held against it
    assert answer.status_code == 200
