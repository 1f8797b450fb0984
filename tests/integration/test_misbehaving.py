"""Servers that hang, stall, crash or eat too much, disks that are full, and ports that are taken."""

from __future__ import annotations

import os
import socket
import subprocess
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import requests

from manager.domain.registry import InstanceRow
from tests.nvml.standin import Card
from tests.simulated.image import IMAGE, ensure_simulated_image
from tests.support.cards import A, Machine
from tests.support.daemon import free_port, wait_for
from tests.support.engine import PrivateEngine, private_engine_obstacles
from tests.support.engine_kinds import needs_word_of_lost_memory, not_on_podman
from tests.support.fixtures import making_daemons, new_manager_id
from tests.support.ollama import set_knobs
from tests.support.state import store_instance

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import docker

    from tests.support.daemon import Daemon
    from tests.support.engine import Engine
    from tests.support.fixtures import NewDaemon

DEADLINE_S = 2.0
MIB = 2**20

needs_private_engine = pytest.mark.skipif(
    bool(private_engine_obstacles()), reason="; ".join(private_engine_obstacles())
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")


def knobs(**values: object) -> dict[str, Any]:
    """A template whose container begins with these knobs."""
    return {"env": {f"OLLAMA_SIM_{name.upper()}": value for name, value in values.items()}}


TEMPLATES = {
    "hung": knobs(hang="all"),
    "half-hung": knobs(hang="body"),
    "portless": knobs(start_port="never"),
    "late": knobs(start_delay_s=DEADLINE_S * 4),
    "slow": knobs(start_delay_s=1),
    "slow-but-bound": knobs(start_delay_s=1, start_port="open"),
    "crashing": knobs(crash="start"),
    "hungry": {**knobs(allocate_bytes=256 * MIB), "limits": {"memory": "64m"}},
    "confined": {"limits": {"memory": "96m"}},
}
SLACK_S = 10.0  # for a machine that does other things too
GENEROUS_S = 20.0  # where a start should come to its end by itself


@pytest.fixture(scope="module")
def daemon(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """An instance of every template above, and a sound one."""
    deadline = {"hung": DEADLINE_S, "half-hung": DEADLINE_S, "portless": DEADLINE_S, "late": DEADLINE_S}
    instances = {
        id_: {"template": id_, "start_timeout_s": deadline.get(id_, GENEROUS_S)} for id_ in TEMPLATES
    }
    with making_daemons(engine, tmp_path_factory.mktemp("misbehaving"), new_manager_id()) as make:
        yield make(instances={**instances, "cpu": {"template": "sim"}}, templates=TEMPLATES).start()


def happened(daemon: Daemon, instance: str) -> list[str]:
    return [event["kind"] for event in daemon.events() if event["instance"] == instance]


# --- at the start ---


@pytest.mark.parametrize("instance", ["hung", "half-hung", "portless", "late"])
def test_a_start_without_an_answer_ends_at_its_deadline_and_leaves_no_container(
    daemon: Daemon, docker_client: docker.DockerClient, instance: str
) -> None:
    answer = daemon.begin(instance, "start")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "start_timeout")
    assert DEADLINE_S <= answer.elapsed.total_seconds() < DEADLINE_S + SLACK_S
    body = daemon.instance(instance)
    assert (body["phase"], body["target"], body["container"]) == ("failed", "stopped", None)
    assert body["reason"]["code"] == "start_timeout"
    assert docker_client.containers.list(all=True, filters={"name": f"-ollama-{instance}$"}) == []
    assert daemon.begin(instance, "stop").status_code == 200


@pytest.mark.parametrize("instance", ["slow", "slow-but-bound"])
def test_a_slow_start_within_its_deadline_is_waited_for(daemon: Daemon, instance: str) -> None:
    body = daemon.started(instance)
    assert (body["phase"], body["reason"]) == ("ready", None)
    daemon.stopped(instance)


def test_a_crash_at_the_start_is_told_at_once_with_the_last_lines_of_the_log(
    daemon: Daemon, docker_client: docker.DockerClient
) -> None:
    answer = daemon.begin("crashing", "start")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "container_exited")
    assert answer.elapsed.total_seconds() < GENEROUS_S / 2
    error = answer.json()["error"]
    assert "exit code 2" in error["message"]
    assert any("simulated crash at start" in line for line in error["details"]["log_tail"])
    reason = daemon.instance("crashing")["reason"]
    assert any("simulated crash at start" in line for line in reason["log_tail"])
    assert docker_client.containers.list(all=True, filters={"name": "-ollama-crashing$"}) == []


@needs_word_of_lost_memory()
def test_a_server_that_eats_too_much_at_the_start_is_told_as_out_of_memory(daemon: Daemon) -> None:
    answer = daemon.begin("hungry", "start")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
    assert daemon.instance("hungry")["reason"]["code"] == "out_of_memory"


# --- later ---


@pytest.mark.parametrize("how", ["all", "body"])
def test_a_server_that_hangs_later_is_unhealthy_stays_and_recovers(daemon: Daemon, how: str) -> None:
    endpoint = daemon.started("cpu")["endpoint"]
    wait_for(lambda: daemon.instance("cpu"), lambda body: body["health"] == "healthy")
    set_knobs(endpoint, hang=how)
    body = wait_for(lambda: daemon.instance("cpu"), lambda body: body["health"] == "unhealthy")
    assert (body["phase"], body["target"]) == ("ready", "running")
    assert body["reason"]["code"] == "instance_unhealthy"
    set_knobs(endpoint, hang="")
    body = wait_for(lambda: daemon.instance("cpu"), lambda body: body["health"] == "healthy")
    assert (body["phase"], body["reason"]) == ("ready", None)


def test_a_crash_later_is_told_with_its_exit_code_and_not_mended_unasked(daemon: Daemon) -> None:
    endpoint = daemon.started("cpu")["endpoint"]
    set_knobs(endpoint, crash_exit=7, crash="now")
    body = daemon.wait_for_phase("cpu", "failed")
    assert (body["target"], body["reason"]["code"]) == ("stopped", "container_exited")
    assert "exit code 7" in body["reason"]["message"]
    wait_for(lambda: daemon.instance("cpu")["reason"]["log_tail"])
    assert daemon.started("cpu")["reason"] is None


@not_on_podman("it sends no event for a killed process, and the state says so at the container's end only")
def test_a_child_that_is_killed_for_its_memory_is_told_while_the_server_runs_on(daemon: Daemon) -> None:
    body = daemon.started("confined")
    set_knobs(body["endpoint"], allocate_bytes=512 * MIB, allocate_in="child")
    body = wait_for(
        lambda: daemon.instance("confined"),
        lambda body: body["reason"] and body["reason"]["code"] == "out_of_memory",
    )
    assert body["phase"] == "ready"
    assert "out_of_memory" in happened(daemon, "confined")
    assert requests.get(f"{body['endpoint']}/api/version", timeout=5).ok
    daemon.stopped("confined")


@needs_word_of_lost_memory()
def test_a_server_that_is_killed_for_its_memory_has_failed_for_that_reason(daemon: Daemon) -> None:
    body = daemon.started("confined")
    with suppress(OSError):
        set_knobs(body["endpoint"], allocate_bytes=512 * MIB, allocate_in="server")
    daemon.wait_for_phase("confined", "failed")
    body = wait_for(
        lambda: daemon.instance("confined"), lambda body: body["reason"]["code"] == "out_of_memory"
    )
    assert (body["phase"], body["target"]) == ("failed", "stopped")
    assert daemon.started("confined")["reason"] is None
    daemon.stopped("confined")


# --- ports ---


def test_a_port_that_is_taken_is_named_and_used_once_it_is_free(
    new_daemon: NewDaemon, docker_client: docker.DockerClient
) -> None:
    daemon = new_daemon(templates={"sim": {"reach": "loopback"}})
    port = free_port()
    store_instance(daemon.state_dir, InstanceRow(id="cpu", loopback_port=port))
    daemon.start()

    def assert_taken() -> None:
        answer = daemon.begin("cpu", "start")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "port_taken"), answer.text
        assert str(port) in answer.json()["error"]["message"]
        body = daemon.instance("cpu")
        assert (body["phase"], body["reason"]["code"], body["container"]) == ("failed", "port_taken", None)

    with socket.create_server(("127.0.0.1", port)):
        assert_taken()
    container = docker_client.containers.run(
        IMAGE, detach=True, ports={"11434/tcp": ("127.0.0.1", port)}, auto_remove=True
    )
    try:
        assert_taken()
    finally:
        container.kill()
        with suppress(Exception):
            container.wait()
    wait_for(lambda: daemon.begin("cpu", "start").ok)
    assert daemon.instance("cpu")["endpoint"] == f"http://127.0.0.1:{port}"


# --- disks ---


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "oem-test", str(path)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(directory: Path) -> Path:
    """Use up all space of a directory's file system; returns the file that has it."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        for block in (MIB, 4096, 1):
            with suppress(OSError):
                while file.write(b"\xff" * block):
                    pass
    return filler


@needs_root
def test_a_full_disk_for_the_state_refuses_changes_and_nothing_else(
    new_daemon: NewDaemon, tmp_path: Path
) -> None:
    machine = Machine(tmp_path)
    daemon = new_daemon(
        instances={id_: {"template": "sim"} for id_ in ("runs", "starts", "stops")},
        templates={"ollama-gpu": {"device": "gpu"}},
        config={"gpus": "auto"},
        environment=machine.environment,
    )
    with small_disk(daemon.state_dir, 8 * MIB), daemon:
        daemon.start()
        endpoint = daemon.started("runs")["endpoint"]
        daemon.started("stops")
        filler = fill(daemon.state_dir)
        answer = daemon.begin("starts", "start")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "registry_unwritable")
        assert "disk is full" in answer.json()["error"]["message"]
        assert int(answer.headers["Retry-After"]) >= 1
        assert daemon.instance("starts")["container"] is None  # what is not stored is not begun
        assert daemon.call("PATCH", "instances/runs", json={"ttl_s": 5}).status_code == 503
        assert daemon.instance("runs")["ttl_s"] != 5
        daemon.stopped("stops")  # what can go on without being stored does
        machine.show(Card(A))  # a new card's number cannot be stored either
        answer = wait_for(lambda: daemon.call("GET", "/readyz"), lambda answer: answer.status_code == 503)
        assert any(reason.startswith("registry:") for reason in answer.json()["reasons"])
        assert daemon.instance("runs")["phase"] == "ready"
        assert requests.get(f"{endpoint}/api/version", timeout=5).ok
        wait_for(lambda: daemon.get("gpus")["gpus"])

        filler.unlink()
        daemon.wait_until_ready()
        assert daemon.started("starts")["phase"] == "ready"
        wait_for(lambda: daemon.get("instances")["instances"], lambda all_: all_[-1]["id"] == "gpu0")
        assert "start_failed" in happened(daemon, "starts")  # what happened meanwhile was not lost
        daemon.stop()
        daemon.start()
        assert daemon.wait_for_phase("starts", "ready")["starts"] == 1
        assert "start_failed" in happened(daemon, "starts")


@needs_private_engine
def test_a_full_disk_of_the_engine_is_named_and_a_start_works_once_there_is_space(tmp_path: Path) -> None:
    with PrivateEngine(data_limit_bytes=96 * MIB) as engine:
        ensure_simulated_image(engine.client())
        with making_daemons(engine, tmp_path, new_manager_id()) as make:
            daemon = make().start()
            daemon.stopped("cpu")
            filler = fill(engine.data_root)
            answer = daemon.begin("cpu", "start")
            assert answer.status_code == 503
            assert "no space left on device" in answer.json()["error"]["message"]
            assert "free some disk space" in answer.json()["error"]["message"]
            assert daemon.instance("cpu")["phase"] == "failed"
            assert daemon.call("GET", "/readyz").status_code == 200
            filler.unlink()
            assert daemon.started("cpu")["phase"] == "ready"
            assert daemon.stopped("cpu")["phase"] == "stopped"
            daemon.stop()
    engine.assert_clean()
