"""A start that waits for memory on its card."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.nvml.standin import Card, build, environment, write
from tests.support.daemon import wait_for
from tests.support.engine_kinds import needs_cards
from tests.support.inside import own_containers

if TYPE_CHECKING:
    from pathlib import Path

    import docker

    from tests.integration.conftest import NewDaemon
    from tests.support.daemon import Daemon

GIB = 2**30
CARD = "GPU-00000000-0000-0000-0000-000000000001"
pytestmark = needs_cards()

NEEDY = {"device": "gpu", "limits": {"vram": "6g"}}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Describes a machine with one card that somebody else has filled."""
    state = tmp_path / "machine"
    write(state, [Card(CARD, vram_total=8 * GIB, vram_used=7 * GIB)])
    return state


@pytest.fixture
def daemon(new_daemon: NewDaemon, machine: Path, tmp_path: Path) -> Daemon:
    return new_daemon(
        instances={"gpu0": {"template": "needy", "device": CARD}},
        templates={"needy": NEEDY},
        lifecycle={"vram_wait_s": 300},
        environment=environment(build(tmp_path), machine),
    ).start()


def test_a_start_that_waits_for_memory_is_cancelled_by_a_stop_and_goes_on_when_there_is_some(
    daemon: Daemon, machine: Path, docker_client: docker.DockerClient, manager_id: str
) -> None:
    with ThreadPoolExecutor(4) as pool:
        starts = [pool.submit(daemon.begin, "gpu0", "start") for _ in range(3)]
        daemon.wait_for_phase("gpu0", "starting")
        body = daemon.stopped("gpu0")
        for start in starts:
            assert start.result().status_code == 409
            assert start.result().json()["error"]["code"] == "cancelled"
        assert (body["phase"], body["target"], body["starts"]) == ("stopped", "stopped", 0)
        assert own_containers(docker_client, manager_id) == []
        start = pool.submit(daemon.begin, "gpu0", "start")
        daemon.wait_for_phase("gpu0", "starting")
        write(machine, [Card(CARD, vram_total=8 * GIB, vram_used=1 * GIB)])
        assert start.result().status_code == 200
    (container,) = wait_for(lambda: own_containers(docker_client, manager_id))
    settings = docker_client.api.inspect_container(container.id)["Config"]
    assert f"NVIDIA_VISIBLE_DEVICES={CARD}" in settings["Env"]
