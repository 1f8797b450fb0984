"""A daemon that dies at any moment, or ends in order, is followed by one that carries on from there."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from contextlib import closing, suppress
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.support.daemon import ROOT, Daemon, wait_for
from tests.support.fixtures import making_daemons, new_manager_id, write_templates
from tests.support.state import is_locked, stored_instance

if TYPE_CHECKING:
    from collections.abc import Iterator

    import docker

    from tests.support.engine import Engine

KILLED = -signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Rig:
    """A daemon that is not running between tests, and the engine that its container `name` is on."""

    daemon: Daemon
    client: docker.DockerClient
    manager_id: str

    @property
    def name(self) -> str:
        return f"{self.manager_id}-ollama-cpu"

    def containers(self) -> dict[str, str]:
        """Name -> status."""
        found = self.client.containers.list(
            all=True, filters={"label": f"ollama-manager.manager={self.manager_id}"}, ignore_removed=True
        )
        return {str(container.name): container.status for container in found}

    def begin_afresh(self) -> None:
        for name in self.containers():
            self.client.api.remove_container(name, force=True)
        shutil.rmtree(self.daemon.state_dir, ignore_errors=True)

    def until_dead(self, action: str) -> None:
        """Ask for what the daemon dies of."""
        with suppress(requests.ConnectionError):
            self.daemon.begin("cpu", action)
        assert self.daemon.wait_until_dead() == KILLED, self.daemon.log()

    def stored(self) -> tuple[str, str | None]:
        """Target and unfinished operation of the instance, as the next daemon will find them."""
        row = stored_instance(self.daemon.state_dir, "cpu")
        return row["target"], row["operation"]

    def assert_locks_are_free(self) -> None:
        locks = self.daemon.state_dir / "locks" / "cpu.lock"
        assert not is_locked(locks)
        assert not is_locked(self.daemon.state_dir / "daemon.lock")

    def assert_ready(self) -> dict[str, Any]:
        body = self.daemon.wait_for_phase("cpu", "ready")
        assert body["target"] == "running"
        assert self.containers() == {self.name: "running"}
        assert requests.get(f"{body['endpoint']}/api/version", timeout=5).ok
        return body

    def assert_stopped(self) -> None:
        body = self.daemon.wait_for_phase("cpu", "stopped")
        assert (body["target"], body["container"], body["reason"]) == ("stopped", None, None)
        assert self.containers() == {}


@pytest.fixture(scope="module")
def only_rig(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    manager_id = new_manager_id()
    with (
        closing(engine.client()) as client,
        making_daemons(engine, tmp_path_factory.mktemp("crash"), manager_id) as make,
    ):
        instances = {"cpu": {"template": "sim"}, "quiet": {"template": "sim", "ttl_s": 60}}
        yield Rig(
            make(instances=instances, lifecycle={"probe_interval_s": 1, "resync_interval_s": 0.5}),
            client,
            manager_id,
        )


@pytest.fixture
def used_rig(only_rig: Rig) -> Iterator[Rig]:
    """The rig as the test before has left it, with no daemon running."""
    yield only_rig
    if only_rig.daemon.process is not None:
        only_rig.daemon.kill()


@pytest.fixture
def rig(used_rig: Rig) -> Rig:
    """The rig with no daemon running, no state and no container."""
    used_rig.begin_afresh()
    return used_rig


# Each row has a step of a start and one of a stop, so that three daemons serve for two deaths. The second
# daemon itself begins a start (or an adoption), so the step "stored" of its stop is its second one.
@pytest.mark.parametrize(
    ("start_step", "stop_step"),
    [("stored", "stored:2"), ("created", "signalled"), ("started", "ended"), ("ready", "removed")],
)
def test_a_daemon_killed_in_a_start_or_in_a_stop_is_followed_by_one_that_completes_it(
    rig: Rig, start_step: str, stop_step: str
) -> None:
    rig.daemon.start(die_at=f"cpu:{start_step}")
    rig.until_dead("start")
    assert rig.stored() == ("running", "start")
    rig.assert_locks_are_free()
    there = {"stored": {}, "created": {rig.name: "created"}}
    assert rig.containers() == there.get(start_step, {rig.name: "running"})

    rig.daemon.start(die_at=f"cpu:{stop_step}")
    rig.assert_ready()
    rig.until_dead("stop")
    assert rig.stored() == ("stopped", "stop")
    rig.assert_locks_are_free()
    if stop_step == "stored:2":
        assert rig.containers() == {rig.name: "running"}

    rig.daemon.start()
    rig.assert_stopped()
    assert wait_for(rig.stored, lambda row: row[1] is None) == ("stopped", None)


@pytest.mark.parametrize(("action", "step"), [("start", "stored"), ("stop", "stored:2")])
def test_a_daemon_whose_engine_never_answered_leaves_an_unfinished_operation_to_the_next_one(
    rig: Rig, action: str, step: str
) -> None:
    rig.daemon.start(die_at=f"cpu:{step}")
    if action == "stop":
        rig.daemon.started("cpu")
    rig.until_dead(action)
    unfinished = rig.stored()
    assert unfinished[1] == action

    engine = rig.daemon.environment["DOCKER_HOST"]
    rig.daemon.environment["DOCKER_HOST"] = f"unix://{rig.daemon.home}/nothing.sock"
    try:
        rig.daemon.start(until_ready=False).wait_until_alive()
        rig.daemon.stop()  # which stores what the daemon has
    finally:
        rig.daemon.environment["DOCKER_HOST"] = engine
    assert rig.stored() == unfinished

    rig.daemon.start()
    if action == "start":
        rig.assert_ready()
    else:
        rig.assert_stopped()


def test_a_daemon_killed_while_it_drains_is_followed_by_one_that_completes_the_stop(rig: Rig) -> None:
    rig.daemon.configure({**rig.daemon.config, "lifecycle": {"drain_timeout_s": 0.2}})
    try:
        argv = [sys.executable, "-m", "tests.support.leaser", str(rig.daemon.config_file), "cpu", "drained"]
        died = subprocess.run(
            argv, cwd=ROOT, env=rig.daemon.environment, timeout=60, capture_output=True, check=False
        )
        assert died.returncode == KILLED, died.stderr
    finally:
        rig.daemon.configure(rig.daemon.config)
    assert rig.stored() == ("stopped", "stop")
    assert rig.containers() == {rig.name: "running"}
    rig.assert_locks_are_free()
    rig.daemon.start()
    rig.assert_stopped()


# A daemon adopts a container of an older template ("stored", "ready") and replaces it when idle.
@pytest.mark.parametrize(
    "step",
    ["stored:2", "signalled", "ended", "removed", "stored:3", "created", "started", "ready:2"],
)
def test_a_daemon_killed_while_it_recreates_is_followed_by_one_that_has_the_new_container(
    used_rig: Rig, step: str
) -> None:
    rig = used_rig
    if rig.containers() != {rig.name: "running"}:
        rig.begin_afresh()
        rig.daemon.start()
        rig.daemon.started("cpu")
        rig.daemon.stop()
    (old,) = rig.client.containers.list(filters={"name": rig.name})
    write_templates(rig.daemon.home / "templates", {"sim": {"description": step, "env": {"OLLAMA_X": step}}})

    rig.daemon.start(die_at=f"cpu:{step}", until_ready=False)
    assert rig.daemon.wait_until_dead() == KILLED, rig.daemon.log()
    assert rig.stored() == ("running", "start" if step in AFTER_THE_STOP else "stop")
    rig.assert_locks_are_free()

    rig.daemon.start()
    body = wait_for(
        lambda: rig.daemon.instance("cpu"),
        lambda body: body["phase"] == "ready" and body["container"]["id"] != old.id and not body["reason"],
    )
    rig.assert_ready()
    (new,) = rig.client.containers.list(filters={"name": rig.name})
    assert new.id == body["container"]["id"]
    assert f"OLLAMA_X={step}" in new.attrs["Config"]["Env"]


AFTER_THE_STOP = ("stored:3", "created", "started", "ready:2")


def test_running_containers_are_adopted_with_a_fresh_ttl_and_no_client_is_ever_cut(rig: Rig) -> None:
    daemon = rig.daemon.start()
    endpoint = daemon.started("cpu")["endpoint"]
    daemon.started("quiet")
    reader = StreamReader(endpoint)
    reader.start()
    before = daemon.instance("cpu")
    for number in (signal.SIGTERM, signal.SIGKILL):
        remaining = wait_for(
            lambda: daemon.instance("quiet")["ttl_remaining_s"], lambda remaining: remaining < 59
        )
        assert daemon.stop(number) == (0 if number == signal.SIGTERM else -number)
        assert set(rig.containers().values()) == {"running"}
        daemon.start()
        after = daemon.wait_for_phase("cpu", "ready")
        assert after["container"] == before["container"]
        assert after["started_at"] == before["started_at"]
        assert after["endpoint"] == endpoint
        assert after["starts"] == 1
        assert daemon.wait_for_phase("quiet", "ready")["ttl_remaining_s"] > remaining
        assert [event["kind"] for event in daemon.events() if event["kind"] == "adopted"]
        reader.assert_flowing()
    assert daemon.begin("cpu", "start").json()["changed"] is False


class StreamReader(Thread):
    """Somebody who talks to a container directly and reads a long answer."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(daemon=True)
        requests.post(f"{endpoint}/_sim/knobs", json={"tokens": 10**6, "tokens_per_s": 20}, timeout=5)
        self._url = f"{endpoint}/api/generate"
        self.lines = 0
        self.ended: object = None

    def run(self) -> None:
        body = {"model": "tiny", "prompt": "go on"}
        try:
            with requests.post(self._url, json=body, stream=True, timeout=20) as answer:
                for _ in answer.iter_lines():
                    self.lines += 1
            self.ended = "the stream came to its end"
        except Exception as error:  # noqa: BLE001 - shown by whoever looks
            self.ended = error

    def assert_flowing(self) -> None:
        so_far = self.lines
        wait_for(lambda: self.lines > so_far or self.ended)
        assert self.ended is None
