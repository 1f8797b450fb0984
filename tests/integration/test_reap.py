"""`ollama-manager reap`, as a cron job calls it: without a daemon, beside one, and twice at once."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import requests
import yaml

from tests.support.daemon import ROOT, Daemon, wait_for
from tests.support.fixtures import making_daemons
from tests.support.inside import EngineEvents, own_containers

if TYPE_CHECKING:
    from collections.abc import Iterator

    import docker

    from tests.integration.conftest import NewDaemon
    from tests.support.engine import Engine


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


def registry_of(daemon: Daemon) -> list[str]:
    with closing(sqlite3.connect(f"file:{daemon.state_dir}/registry.sqlite3?mode=ro", uri=True)) as database:
        return list(database.iterdump())


def shorten_ttl(daemon: Daemon) -> None:
    """Make the TTL of 800 s one of 1 s, from the next process on: a daemon that runs must not come first."""
    config = daemon.config_file.read_text()
    assert "ttl_s: 800" in config
    daemon.config_file.write_text(config.replace("ttl_s: 800", "ttl_s: 1"))


def names(client: docker.DockerClient, manager_id: str) -> set[str]:
    found = own_containers(client, manager_id)
    return {container.attrs["Names"][0].removeprefix(f"/{manager_id}-ollama-") for container in found}


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep said after a daemon was killed, and which instances had a container then and before."""

    foreseen: dict[str, str]
    said: dict[str, str]
    before: set[str]
    after: set[str]
    shown: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def sweep(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    """A sweep of instances of all kinds, more than their TTL after their daemon was killed."""
    manager_id = f"reap{time.time_ns() % 10**9}"
    with (
        closing(engine.client()) as client,
        making_daemons(engine, tmp_path_factory.mktemp("reap"), manager_id) as make,
    ):
        daemon = make(
            instances={
                "idle": {"template": "sim", "ttl_s": 800},
                "asked": {"template": "sim", "ttl_s": 800},
                "again": {"template": "sim", "ttl_s": 800},
                "still": {"template": "sim", "ttl_s": 800},
                "pinned": {"template": "sim", "ttl_s": 800, "pinned": True},
                "young": {"template": "sim", "ttl_s": 900},
                "forever": {"template": "sim", "ttl_s": 0},
                "half": {"template": "sim"},
                "warm": {"template": "sim"},
            }
        ).start(die_at="half:stored")
        running = ["idle", "asked", "again", "still", "pinned", "young", "forever"]
        with ThreadPoolExecutor(len(running)) as pool:
            bodies = dict(zip(running, pool.map(daemon.started, running), strict=True))
        wait_until_stored(daemon, *running)
        wait_for(lambda: all(daemon.instance(name)["last_seen_at"] for name in running), within_s=60)
        client.containers.get(f"{manager_id}-ollama-still").pause()
        with contextlib.suppress(requests.ConnectionError):
            daemon.begin("half", "start", wait="false")
        daemon.wait_until_dead()
        shorten_ttl(daemon)
        config = daemon.config_file.read_text()
        daemon.config_file.write_text(config.replace("warm:\n", "warm:\n    prewarm: true\n"))
        time.sleep(1.2)
        before = names(client, manager_id)
        stored = registry_of(daemon)
        foreseen = reap(daemon, "--dry-run", timezone="Asia/Tokyo")
        assert registry_of(daemon) == stored, "events too"
        assert names(client, manager_id) == before
        load = {"model": "tiny", "keep_alive": "10m"}
        requests.post(f"{bodies['asked']['endpoint']}/api/generate", json=load, timeout=30).raise_for_status()
        client.containers.get(f"{manager_id}-ollama-again").restart()
        said = reap(daemon, timezone="America/New_York")
        after = names(client, manager_id)
        daemon.start()
        shown = {name: daemon.instance(name) for name in daemon_instances(daemon)}
        yield Sweep(foreseen, said, before, after, shown)


def test_without_a_daemon_what_was_idle_before_it_died_is_stopped(sweep: Sweep) -> None:
    assert sweep.foreseen["idle"].startswith("would be stopped")
    assert sweep.said["idle"].startswith("stopped: idle past its TTL of 1 s")
    assert sweep.before - sweep.after == {"idle", "still"}
    assert (sweep.shown["idle"]["target"], sweep.shown["idle"]["starts"]) == ("stopped", 1)


def test_without_a_daemon_use_of_the_endpoint_is_seen_all_the_same(sweep: Sweep) -> None:
    # A slow sweep has seen the use before it looks at the TTL: "used recently".
    assert sweep.said["asked"].startswith("kept: used")


def test_a_container_that_somebody_started_again_is_not_idle_since_before(sweep: Sweep) -> None:
    assert sweep.said["again"].startswith("kept: used")


def test_a_sweep_leaves_what_is_pinned_or_young_or_never_to_be_stopped(sweep: Sweep) -> None:
    assert sweep.said["pinned"] == "kept: pinned"
    assert "s left of 900 s" in sweep.said["young"]
    assert "its TTL is 0" in sweep.said["forever"]


def test_a_sweep_is_not_held_up_by_a_paused_container(sweep: Sweep) -> None:
    assert sweep.said["still"].startswith("stopped")


def test_a_sweep_starts_nothing_and_finishes_no_start(sweep: Sweep) -> None:
    assert sweep.said["warm"] == sweep.said["half"] == "kept: stopped"
    assert sweep.after <= sweep.before
    # The next daemon does.
    assert sweep.shown["half"]["target"] == "running"


def two_at_once(daemon: Daemon, instance: str) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        said = [future.result() for future in [pool.submit(reap, daemon) for _ in range(2)]]
    return [one[instance].split(":")[0] for one in said]


def test_sweeps_at_once_with_and_without_a_daemon_stop_an_instance_once(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str, engine_events: EngineEvents
) -> None:
    daemon = new_daemon(
        instances={"one": {"template": "slow", "ttl_s": 1}, "two": {"template": "slow", "ttl_s": 1}},
        templates={"slow": {"env": {"OLLAMA_SIM_SHUTDOWN_S": "1"}}},
        lifecycle={"probe_interval_s": 60},
    ).start()
    for instance in ("one", "two"):
        daemon.started(instance)
        wait_until_stored(daemon, instance)
        if instance == "two":
            daemon.kill()
        # The start itself is use, which the engine may tell of late: then both keep it once more.
        said = wait_for(partial(two_at_once, daemon, instance), lambda said: set(said) != {"kept"})
        assert sorted(said) == ["kept", "stopped"]
        assert names(docker_client, manager_id) == set()
        assert (engine_events.count(instance, "create"), engine_events.count(instance, "destroy")) == (1, 1)
