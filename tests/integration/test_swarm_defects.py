"""What is done to services, tasks and nodes by hand or by accident, while instances start, run and stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.integration.test_swarm import (
    CARD,
    NewDaemon,
    chat,
    new_daemon,
    on,
    replicas,
    services_of,
)
from tests.support.daemon import ROOT, Daemon, wait_for
from tests.support.state import stored_instance
from tests.support.swarm import Swarm, swarm_obstacles

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["new_daemon"]

pytestmark = pytest.mark.skipif(bool(swarm_obstacles()), reason="; ".join(swarm_obstacles()))

SLOW = {"sim": {"env": {"OLLAMA_SIM_TOKENS_PER_S": "8"}}}


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with Swarm(cards={"worker": (CARD,)}) as swarm:
        yield swarm
    swarm.assert_clean()


class Stream(threading.Thread):
    """A long answer that a client reads from a daemon."""

    def __init__(self, daemon: Daemon, model: str, tokens: int = 80) -> None:
        super().__init__(daemon=True)
        self._daemon = daemon
        self._body = {
            "model": model,
            "messages": [{"role": "user", "content": "hi"}],
            "options": {"num_predict": tokens},
        }
        self.lines: list[dict[str, Any]] = []
        self.trouble: Exception | None = None
        self.start()
        wait_for(lambda: self.lines or self.trouble)

    def run(self) -> None:
        try:
            with self._daemon.call("POST", "/api/chat", json=self._body, stream=True) as answer:
                for line in answer.iter_lines():
                    self.lines.append(json.loads(line))
        except requests.RequestException as error:
            self.trouble = error

    def assert_whole(self) -> None:
        self.join(60)
        assert self.trouble is None
        assert self.lines[-1].get("done") is True, self.lines[-1]


def change(swarm: Swarm, daemon: Daemon, *, replicas: int | None = None, is_forced: bool = False) -> str:
    """Change a service as `docker service scale` and `docker service update --force` do; return its id."""
    api: Any = swarm.client().api

    def changed() -> str | None:
        (service,) = services_of(swarm, daemon)
        spec = service["Spec"]
        if replicas is not None:
            spec["Mode"] = {"Replicated": {"Replicas": replicas}}
        if is_forced:
            spec["TaskTemplate"]["ForceUpdate"] = spec["TaskTemplate"].get("ForceUpdate", 0) + 1
        url = api._url("/services/{0}/update", service["ID"])
        answer = api._post_json(url, data=spec, params={"version": service["Version"]["Index"]})
        if not answer.ok and "out of sequence" in answer.text:
            return None  # Swarm itself has changed it meanwhile
        assert answer.ok, answer.text
        return str(service["ID"])

    made = wait_for(changed)
    assert made is not None
    return made


def running(swarm: Swarm, service: Any) -> list[str]:
    """Return the tasks whose containers run."""
    return [one["ID"] for one in swarm.tasks(service) if one["Status"]["State"] == "running"]


def until_dead(daemon: Daemon, action: str) -> None:
    with suppress(requests.ConnectionError):
        daemon.begin("far", action)
    assert daemon.wait_until_dead() == -signal.SIGKILL, daemon.log()


@pytest.mark.parametrize(
    ("start_step", "stop_step"),
    [("stored", "stored:2"), ("created", "signalled"), ("started", "ended"), ("ready", "removed")],
)
def test_a_daemon_killed_in_a_start_or_in_a_stop_is_followed_by_one_that_completes_it(
    swarm: Swarm, new_daemon: NewDaemon, start_step: str, stop_step: str
) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}).start(die_at=f"far:{start_step}")
    until_dead(daemon, "start")
    assert stored_instance(daemon.state_dir, "far")["operation"] == "start"
    daemon.start(die_at=f"far:{stop_step}")
    daemon.wait_for_phase("far", "ready")
    assert replicas(swarm, daemon) == [1]
    until_dead(daemon, "stop")
    daemon.start()
    body = daemon.wait_for_phase("far", "stopped")
    assert (body["target"], body["container"], body["reason"]) == ("stopped", None, None)
    assert replicas(swarm, daemon) == [0]
    assert chat(daemon, "tiny@far").status_code == 200


@pytest.mark.parametrize("count", [2, 3])
def test_a_service_that_is_scaled_up_by_hand_serves_on(
    swarm: Swarm, new_daemon: NewDaemon, count: int
) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}, templates=SLOW).start()
    daemon.started("far")
    stream = Stream(daemon, "tiny@far")
    service = change(swarm, daemon, replicas=count)
    wait_for(lambda: len(swarm.tasks(service)), count.__eq__)
    stream.assert_whole()
    assert chat(daemon, "tiny@far").status_code == 200
    body = daemon.instance("far")
    assert (body["phase"], body["reason"], body["starts"]) == ("ready", None, 1)
    daemon.stopped("far")
    assert replicas(swarm, daemon) == [0]


def test_a_service_that_is_scaled_up_on_several_nodes_stays_where_its_work_is(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    daemon = new_daemon(instances={"any": {"driver": "swarm", "template": "sim"}}, templates=SLOW).start()
    before = daemon.started("any")
    stream = Stream(daemon, "tiny@any")
    service = change(swarm, daemon, replicas=2)
    wait_for(lambda: len(running(swarm, service)), (2).__eq__)
    stream.assert_whole()
    body = daemon.instance("any")
    assert (body["phase"], body["endpoint"], body["started_at"]) == (
        "ready",
        before["endpoint"],
        before["started_at"],
    )


def test_a_service_that_is_removed_by_hand_is_made_anew(swarm: Swarm, new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}).start()
    daemon.started("far")
    api: Any = swarm.client().api
    api.remove_service(services_of(swarm, daemon)[0]["ID"])
    daemon.wait_for_phase("far", "stopped", "failed", within_s=10)
    assert chat(daemon, "tiny@far").status_code == 200
    api.remove_service(services_of(swarm, daemon)[0]["ID"])
    answer = daemon.begin("far", "stop")
    assert answer.status_code == 200, answer.text
    assert daemon.instance("far")["phase"] == "stopped"


def test_a_stop_while_a_start_waits_for_a_node_leaves_nothing_to_start_later(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    nowhere = {"driver": "swarm", "template": "sim", "placement": ["node.labels.disk==fast"]}
    daemon = new_daemon(instances={"lost": nowhere}).start()
    assert daemon.call("POST", "instances/lost/start?wait=false").status_code == 202
    wait_for(lambda: replicas(swarm, daemon), [1].__eq__)
    began = time.monotonic()
    answer = daemon.begin("lost", "stop")
    assert answer.status_code == 200, answer.text
    assert time.monotonic() - began < 8
    assert replicas(swarm, daemon) == [0]
    assert daemon.instance("lost")["phase"] == "stopped"


def test_a_start_during_a_stop_is_carried_out_after_it(swarm: Swarm, new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}).start()
    daemon.started("far")
    assert daemon.call("POST", "instances/far/stop?wait=false").status_code in (200, 202)
    daemon.started("far")
    assert chat(daemon, "tiny@far").status_code == 200
    assert replicas(swarm, daemon) == [1]


@pytest.mark.parametrize("action", ["start", "stop"])
def test_an_engine_that_hangs_during_an_operation_leaves_what_the_status_says(
    swarm: Swarm, new_daemon: NewDaemon, action: str
) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}, engine={"timeout_s": 2}).start()
    daemon.started("far")
    if action == "start":
        daemon.stopped("far")
    assert daemon.call("POST", f"instances/far/{action}?wait=false").status_code in (200, 202)
    if action == "start":
        wait_for(lambda: replicas(swarm, daemon), [1].__eq__)
    else:
        wait_for(lambda: replicas(swarm, daemon), [0].__eq__)
    swarm.manager.pause()
    try:
        wait_for(lambda: daemon.call("GET", "/readyz").status_code, (503).__eq__)
    finally:
        swarm.manager.resume()
    daemon.wait_until_ready()
    swarm.worker.wait_for_state("ready")
    if action == "stop":
        daemon.wait_for_phase("far", "stopped")
        assert replicas(swarm, daemon) == [0]
    else:
        body = daemon.wait_for_phase("far", "ready", "failed")
        wait_for(lambda: replicas(swarm, daemon) == [int(daemon.instance("far")["phase"] == "ready")])
        assert body["reason"] is None or "exit code None" not in body["reason"]["message"]
    daemon.started("far")
    assert chat(daemon, "tiny@far").status_code == 200


def test_a_stop_while_its_node_is_down_holds_when_the_node_is_back(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}).start()
    daemon.started("far")
    swarm.worker.cut_network()
    try:
        swarm.worker.wait_for_state("down")
        answer = daemon.begin("far", "stop")
        assert answer.status_code == 200, answer.text
        assert daemon.wait_for_phase("far", "stopped", "failed", "unavailable")["target"] == "stopped"
        assert replicas(swarm, daemon) == [0]
    finally:
        swarm.worker.mend_network()
    swarm.worker.wait_for_state("ready")
    with closing(swarm.worker.client()) as client:
        wait_for(client.containers.list, lambda found: not found)
    body = daemon.wait_for_phase("far", "stopped", within_s=10)
    assert body["target"] == "stopped"
    daemon.started("far")


def test_a_stop_while_its_node_is_cut_off_is_done_when_the_node_is_down(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}).start()
    daemon.started("far")
    swarm.worker.cut_network()
    try:
        answer = daemon.begin("far", "stop")
        assert answer.status_code == 200, answer.text
        body = daemon.instance("far")
        assert (body["phase"] in ("stopped", "unavailable"), body["target"]) == (True, "stopped")
    finally:
        swarm.worker.mend_network()
    swarm.worker.wait_for_state("ready")


@pytest.mark.parametrize("times", [1, 3])
def test_a_forced_update_by_hand_is_followed(swarm: Swarm, new_daemon: NewDaemon, times: int) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}, lifecycle={"resync_interval_s": 5}).start()
    before = daemon.started("far")
    for _ in range(times):
        change(swarm, daemon, is_forced=True)
    wait_for(lambda: daemon.instance("far")["started_at"], lambda at: at and at != before["started_at"])
    daemon.wait_for_phase("far", "ready", within_s=30)
    assert chat(daemon, "tiny@far").status_code == 200
    assert replicas(swarm, daemon) == [1]


def test_a_node_that_left_the_swarm_and_joined_again_gets_its_instances(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    gpu = {"driver": "swarm", "template": "sim-gpu", "device": CARD}
    daemon = new_daemon(instances={"big": gpu, "far": on(swarm.worker)}).start()
    daemon.started("big")
    daemon.started("far")
    old = swarm.worker.node_id
    with closing(swarm.worker.client()) as client:
        client.swarm.leave()
        swarm.worker.wait_for_state("down")
        token = swarm.client().swarm.attrs["JoinTokens"]["Worker"]
        client.swarm.join(
            remote_addrs=[swarm.manager.address],
            join_token=token,
            advertise_addr=swarm.worker.address,
            listen_addr=f"{swarm.worker.address}:2377",
        )
        swarm.worker.node_id = str(client.info()["Swarm"]["NodeID"])
    swarm.worker.wait_for_state("ready")
    assert swarm.worker.node_id != old
    for instance in ("far", "big"):
        daemon.wait_for_phase(instance, "failed", "stopped", within_s=20)
        daemon.started(instance)
        assert chat(daemon, f"tiny@{instance}").status_code == 200
    api: Any = swarm.client().api
    api.remove_node(old, force=True)
    daemon.stopped("big")
    daemon.started("big")


def test_a_placement_that_is_changed_waits_for_a_restart_and_moves_the_instance_then(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}).start()
    before = daemon.started("far")
    daemon.configure({**daemon.config, "instances": {"far": on(swarm.manager)}})
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    wait_for(daemon.log, lambda log: "reload_needs_restart" in log and "placement" in log)
    assert daemon.instance("far")["endpoint"] == before["endpoint"]
    daemon.stop()
    daemon.start()

    def has_moved(body: dict[str, Any]) -> bool:
        return body["phase"] == "ready" and str(body["endpoint"]).startswith(
            f"http://{swarm.manager.address}:"
        )

    wait_for(lambda: daemon.instance("far"), has_moved, within_s=30)
    assert before["endpoint"].startswith(f"http://{swarm.worker.address}:")
    assert replicas(swarm, daemon) == [1]


def test_a_sweep_without_a_daemon_stops_what_is_idle(swarm: Swarm, new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker, ttl_s=1), "kept": on(swarm.worker)}).start()
    daemon.started("kept")
    daemon.started("far")
    daemon.kill()

    def swept() -> str:
        argv = [sys.executable, "-m", "manager", "reap", "--config", str(daemon.config_file)]
        done = subprocess.run(
            argv, cwd=ROOT, env=daemon.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    wait_for(lambda: (swept(), sorted(replicas(swarm, daemon)))[1], [0, 1].__eq__, within_s=30)
    daemon.start()
    assert daemon.wait_for_phase("kept", "ready")["starts"] == 1
    assert daemon.instance("far")["phase"] == "stopped"


def test_a_daemon_that_replaces_another_one_goes_on_with_its_services(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}, templates=SLOW).start()
    before = daemon.started("far")
    stream = Stream(daemon, "tiny@far", tokens=40)
    old = daemon.process
    assert old is not None
    daemon.start(arguments=("--replace",), until_ready=False)
    wait_for(lambda: daemon.call("GET", "/readyz").status_code, (200).__eq__)
    stream.assert_whole()
    assert old.wait(30) == 0
    body = daemon.wait_for_phase("far", "ready")
    assert (body["endpoint"], body["starts"]) == (before["endpoint"], 1)
    assert chat(daemon, "tiny@far").status_code == 200
