"""Nobody shares what can be used by one alone: the state directory, an instance, a registry that is sound."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import yaml

from tests.support.daemon import ROOT, Daemon, wait_for
from tests.support.state import is_locked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import docker

    from tests.support.fixtures import NewDaemon

REFUSED = 4
FAILED = 1
SLACK_S = 10.0  # for a machine that does other things too
LOCK_WAIT_S = 10.0  # what the daemon grants another process


def serve(daemon: Daemon, command: str = "serve") -> subprocess.CompletedProcess[str]:
    """A command with the configuration of a daemon, for as long as it takes to be refused."""
    return subprocess.run(
        [sys.executable, "-m", "manager", command, "--config", str(daemon.config_file)],
        cwd=ROOT,
        env=daemon.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_second_daemon_on_one_state_directory_is_refused_and_told_who_holds_it(
    new_daemon: NewDaemon,
) -> None:
    first = new_daemon().start()
    first.started("cpu")
    second = new_daemon(name="second", config={"state": {"dir": str(first.state_dir)}})
    refused = serve(second)
    assert refused.returncode == REFUSED
    assert refused.stdout == ""
    assert first.process is not None
    assert f"process {first.process.pid}" in refused.stderr
    assert first.url in refused.stderr
    assert str(first.state_dir) in refused.stderr
    assert "Traceback" not in refused.stderr
    assert first.instance("cpu")["phase"] == "ready"

    first.kill()  # its lock goes with it, whatever it has left behind
    assert not is_locked(first.state_dir / "daemon.lock")
    second.start()
    assert second.wait_for_phase("cpu", "ready")["starts"] == 1
    second.stopped("cpu")


def test_a_second_daemon_with_the_same_manager_id_and_another_state_directory_is_refused(
    new_daemon: NewDaemon, docker_client: docker.DockerClient
) -> None:
    first = new_daemon().start()
    before = first.started("cpu")
    assert first.process is not None
    second = new_daemon(name="second")
    refused = serve(second)
    assert refused.returncode == REFUSED
    assert f"process {first.process.pid}" in refused.stderr
    assert "docker rm" not in refused.stderr
    assert "Traceback" not in refused.stderr

    # Its daemon is gone, and its state directory may still be there: that is not for us to decide.
    first.kill()
    refused = serve(second)
    assert refused.returncode == REFUSED
    assert before["container"]["name"] in refused.stderr
    assert "--take-over" in refused.stderr
    assert "docker rm" not in refused.stderr
    assert serve(second, "reap").returncode == REFUSED
    container = docker_client.containers.get(before["container"]["id"])
    assert container.status == "running"

    # The state directory is lost for good.
    second.start(arguments=["--take-over"])
    body = second.wait_for_phase("cpu", "ready")
    assert body["container"]["id"] == before["container"]["id"]
    second.stop()
    second.start()  # the take-over was kept
    assert second.wait_for_phase("cpu", "ready")["container"]["id"] == before["container"]["id"]
    second.stopped("cpu")


def test_a_changed_manager_id_is_refused_while_containers_have_the_former_one(
    new_daemon: NewDaemon, docker_client: docker.DockerClient
) -> None:
    daemon = new_daemon().start()
    body = daemon.started("cpu")
    daemon.stop()
    text, name = daemon.config_file.read_text(), body["container"]["name"]
    former = yaml.safe_load(text)["manager_id"]
    changed = text.replace(f"manager_id: {former}\n", f"manager_id: {former}-new\n")
    assert changed != text
    daemon.config_file.write_text(changed)
    for command in ("serve", "reap"):
        refused = serve(daemon, command)
        assert refused.returncode == REFUSED
        assert f"manager_id was {former!r} and is '{former}-new' now" in refused.stderr
        assert f"docker rm -f {name}" in refused.stderr
    assert docker_client.containers.get(name).status == "running"

    daemon.config_file.write_text(text)
    daemon.start()
    assert daemon.wait_for_phase("cpu", "ready")["container"]["id"] == body["container"]["id"]
    daemon.stopped("cpu")
    daemon.stop()

    daemon.config_file.write_text(changed)
    daemon.start()  # nothing is left under the former id
    assert daemon.started("cpu")["container"]["name"] == f"{former}-new-ollama-cpu"
    daemon.stopped("cpu")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """A lock file held the way another process would; flock(2) cares about the open file, not the process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_an_instance_that_another_process_holds_is_refused_in_time_and_works_once_it_is_let_go(
    new_daemon: NewDaemon,
) -> None:
    ids = ("starts", "stops", "free")
    daemon = new_daemon(instances={id_: {"template": "sim"} for id_ in ids}).start()
    daemon.started("stops")
    locks = daemon.state_dir / "locks"
    with (
        held(locks / "starts.lock"),
        held(locks / "stops.lock"),
        ThreadPoolExecutor(2) as pool,
    ):
        began = time.monotonic()
        start = pool.submit(daemon.begin, "starts", "start")
        stop = pool.submit(daemon.begin, "stops", "stop")
        daemon.started("free")  # the others are not held up
        daemon.stopped("free")
        assert not start.done()
        for answer in (start.result(), stop.result()):
            assert answer.status_code == 409
            assert answer.json()["error"]["code"] == "instance_locked"
        assert LOCK_WAIT_S <= time.monotonic() - began < LOCK_WAIT_S + SLACK_S
        body = daemon.instance("starts")
        assert (body["phase"], body["target"], body["container"]) == ("failed", "stopped", None)
        body = daemon.instance("stops")
        assert (body["phase"], body["target"]) == ("stopping", "stopped")
        assert "could not be stopped yet" in body["reason"]["message"]
    assert daemon.started("starts")["phase"] == "ready"
    daemon.wait_for_phase("stops", "stopped")  # it stayed asked for
    assert wait_for(lambda: daemon.instance("stops"), lambda body: body["reason"] is None)


def test_a_corrupt_registry_ends_the_start_untouched_and_the_printed_command_mends_it(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon()
    daemon.state_dir.mkdir()
    registry = daemon.state_dir / "registry.sqlite3"
    garbage = b"SQLite format 3\x00" + b"this is none" * 500
    registry.write_bytes(garbage)
    refused = serve(daemon)
    assert refused.returncode == FAILED
    assert "Traceback" not in refused.stderr
    assert registry.read_bytes() == garbage
    assert sorted(path.name for path in daemon.state_dir.glob("registry*")) == ["registry.sqlite3"]
    command = refused.stderr[refused.stderr.index("mv ") :].splitlines()[0]
    subprocess.run(command, shell=True, check=True)
    daemon.start()
    assert daemon.started("cpu")["phase"] == "ready"
    (aside,) = daemon.state_dir.glob("registry.sqlite3.corrupt-*")
    assert aside.read_bytes() == garbage
