"""`ollama-manager reap`, as a cron job calls it: without a daemon, beside one, and twice at once."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

import requests
import yaml

from tests.support.daemon import ROOT, Daemon, wait_for
from tests.support.inside import EngineEvents, own_containers

if TYPE_CHECKING:
    import docker

    from tests.integration.conftest import NewDaemon


def reap(daemon: Daemon, *arguments: str, timezone: str = "UTC") -> dict[str, str]:
    """Run one sweep; instance id -> what became of it."""
    command = [sys.executable, "-m", "manager", "reap", "--config", str(daemon.config_file), *arguments]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**daemon.environment, "TZ": timezone},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert set(said) == set(daemon_instances(daemon)), result.stdout
    return said


def daemon_instances(daemon: Daemon) -> list[str]:
    return list(yaml.safe_load(daemon.config_file.read_text())["instances"])


def wait_until_stored(daemon: Daemon, *instances: str) -> None:
    """Wait until a sample of each instance's use has been stored."""

    def stored() -> set[str]:
        with closing(sqlite3.connect(f"file:{daemon.state_dir}/registry.sqlite3?mode=ro", uri=True)) as db:
            return {row[0] for row in db.execute("SELECT id FROM instances WHERE usage IS NOT NULL")}

    wait_for(stored, lambda found: found >= set(instances), within_s=60)


def shorten_ttl(daemon: Daemon) -> None:
    """Make the TTL of 800 s one of 1 s, from the next process on: a daemon that runs must not come first."""
    config = daemon.config_file.read_text()
    assert "ttl_s: 800" in config
    daemon.config_file.write_text(config.replace("ttl_s: 800", "ttl_s: 1"))


def names(client: docker.DockerClient, manager_id: str) -> set[str]:
    found = own_containers(client, manager_id)
    return {container.attrs["Names"][0].removeprefix(f"/{manager_id}-ollama-") for container in found}


def test_without_a_daemon_a_sweep_goes_by_the_stored_last_use_and_starts_nothing(
    new_daemon: NewDaemon,
    docker_client: docker.DockerClient,
    manager_id: str,
    engine_events: EngineEvents,
) -> None:
    daemon = new_daemon(
        instances={
            "idle": {"template": "sim", "ttl_s": 800},
            "young": {"template": "sim", "ttl_s": 900},
            "pinned": {"template": "sim", "ttl_s": 800, "pinned": True},
            "forever": {"template": "sim", "ttl_s": 0},
            "asked": {"template": "sim", "ttl_s": 800},
            "again": {"template": "sim", "ttl_s": 800},
            "warm": {"template": "sim"},
        },
        lifecycle={"probe_interval_s": 2},
    ).start()
    running = {"idle", "young", "pinned", "forever", "asked", "again"}
    with ThreadPoolExecutor(6) as pool:
        bodies = list(pool.map(daemon.started, sorted(running)))
    (endpoint,) = (body["endpoint"] for body in bodies if body["id"] == "asked")
    wait_until_stored(daemon, *running)
    daemon.stop()
    shorten_ttl(daemon)
    config = daemon.config_file.read_text()
    assert "warm:\n    template" in config
    daemon.config_file.write_text(config.replace("warm:\n", "warm:\n    prewarm: true\n"))
    time.sleep(1.2)
    load = {"model": "tiny", "keep_alive": "10m"}
    assert requests.post(f"{endpoint}/api/generate", json=load, timeout=10).status_code == 200
    docker_client.containers.get(f"{manager_id}-ollama-again").restart()
    said = reap(daemon, timezone="America/New_York")
    assert said["idle"].startswith("stopped")
    assert "s left of 900 s" in said["young"]
    assert said["pinned"] == "kept: pinned"
    assert "its TTL is 0" in said["forever"]
    assert said["asked"] == "kept: used just now"
    assert said["again"].startswith("kept: used")
    assert said["warm"] == "kept: stopped"
    assert names(docker_client, manager_id) == running - {"idle"}
    assert {name for name in daemon_instances(daemon) if engine_events.count(name, "create") == 1} == running
    assert engine_events.count("warm", "create") == 0


def test_after_a_kill_a_sweep_stops_what_has_been_idle_since_before(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str
) -> None:
    daemon = new_daemon(instances={"idle": {"template": "sim", "ttl_s": 800}}).start()
    daemon.started("idle")
    wait_until_stored(daemon, "idle")
    probed = wait_for(lambda: daemon.instance("idle")["last_seen_at"])
    wait_for(lambda: daemon.instance("idle")["last_seen_at"] != probed)
    daemon.kill()
    shorten_ttl(daemon)
    time.sleep(1.2)
    assert reap(daemon, "--dry-run", timezone="Asia/Tokyo")["idle"].startswith("would be stopped")
    assert names(docker_client, manager_id) == {"idle"}
    assert reap(daemon)["idle"].startswith("stopped")
    assert names(docker_client, manager_id) == set()
    daemon.start()
    body = daemon.instance("idle")
    assert (body["phase"], body["target"], body["starts"]) == ("stopped", "stopped", 1)


def test_sweeps_at_once_with_and_without_a_daemon_stop_an_instance_once(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str, engine_events: EngineEvents
) -> None:
    daemon = new_daemon(
        instances={"one": {"template": "slow", "ttl_s": 1}},
        templates={"slow": {"env": {"OLLAMA_SIM_SHUTDOWN_S": "1"}}},
        lifecycle={"probe_interval_s": 60},
    ).start()
    for alive in (True, False):
        daemon.started("one")
        wait_until_stored(daemon, "one")
        if not alive:
            daemon.kill()
        time.sleep(1.2)
        with ThreadPoolExecutor(2) as pool:
            said = [future.result() for future in [pool.submit(reap, daemon) for _ in range(2)]]
        outcomes = sorted(one["one"].split(":")[0] for one in said)
        assert outcomes == ["kept", "stopped"], said
        assert names(docker_client, manager_id) == set()
    assert engine_events.count("one", "destroy") == 2
    assert engine_events.count("one", "create") == 2


def test_a_sweep_without_a_daemon_is_not_held_up_by_a_paused_container(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str
) -> None:
    daemon = new_daemon(
        instances={"still": {"template": "sim", "ttl_s": 800}, "idle": {"template": "sim", "ttl_s": 800}}
    ).start()
    daemon.started("still")
    daemon.started("idle")
    wait_until_stored(daemon, "still", "idle")
    docker_client.containers.get(f"{manager_id}-ollama-still").pause()
    daemon.kill()
    shorten_ttl(daemon)
    time.sleep(1.2)
    assert reap(daemon)["idle"].startswith("stopped")
    assert names(docker_client, manager_id) <= {"still"}


def test_a_start_that_a_daemon_left_half_done_is_not_finished_by_a_sweep(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str
) -> None:
    daemon = new_daemon().start(die_at="cpu:stored")
    with contextlib.suppress(requests.ConnectionError):
        daemon.begin("cpu", "start", wait="false")
    daemon.wait_until_dead()
    assert reap(daemon)["cpu"].startswith("kept")
    assert names(docker_client, manager_id) == set()
