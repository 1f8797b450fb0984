"""The live channel against a real daemon and a real engine: what is killed, replaced and comes back."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.integration.test_following import running
from tests.support.daemon import COMPUTE, Daemon, wait_for
from tests.support.inside import own_containers
from tests.support.replacing import Replaceable, processes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import docker

    from tests.integration.conftest import NewDaemon
    from tests.support.nursery import Process

__all__ = ["processes"]


@contextmanager
def following(daemon: Daemon) -> Iterator[Iterator[dict[str, Any]]]:
    """The frames of the live channel."""
    with requests.get(f"{daemon.url}{COMPUTE}/live", stream=True, timeout=30) as answer:
        assert answer.status_code == 200
        yield (
            json.loads(line.removeprefix(b"data: "))
            for line in answer.iter_lines(2**16)
            if line.startswith(b"data: ")
        )


def phase_of(frame: dict[str, Any]) -> str | None:
    return str(frame["instances"][0]["phase"]) if "instances" in frame else None


def test_a_killed_container_is_shown_within_a_second(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str
) -> None:
    daemon = new_daemon().start()
    daemon.started("cpu")
    with following(daemon) as frames:
        assert phase_of(next(frames)) == "ready"
        (container,) = own_containers(docker_client, manager_id, "cpu")
        container.kill()
        began = time.monotonic()
        for frame in frames:
            if phase_of(frame) == "failed":
                assert frame["instances"][0]["reason"]["code"] == "container_exited"
                break
        assert time.monotonic() - began < 1.5, "the tick is 0.5 s"


def test_a_replaced_daemon_ends_its_streams_and_the_new_one_has_the_same_to_show(
    new_daemon: NewDaemon, processes: list[Process]
) -> None:
    daemon = new_daemon().start()
    daemon.started("cpu")
    with following(daemon) as frames:
        assert phase_of(next(frames)) == "ready"
        old = Replaceable(daemon, processes).replace()
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            list(frames)
        assert old.wait(timeout=30) == 0
    daemon.wait_for_phase("cpu", "ready")
    with following(daemon) as frames:
        assert phase_of(next(frames)) == "ready"


def test_a_watch_outlives_a_daemon_that_is_killed(new_daemon: NewDaemon, tmp_path: Path) -> None:
    daemon = new_daemon().start()
    daemon.started("cpu")
    with running(daemon, tmp_path, "status", "--watch") as command:
        command.wait_for(" ready ")
        daemon.kill()
        command.wait_for("daemon unreachable")
        daemon.start()
        command.wait_for("the daemon is back")
        daemon.stopped("cpu")
        wait_for(lambda: command.stdout().splitlines()[-1].split()[3] == "stopped")
        assert command.process.poll() is None
