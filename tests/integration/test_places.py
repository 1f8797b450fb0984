"""Places of `max_running` and containers that belong to no instance, on a real engine."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

from tests.support.daemon import ROOT, wait_for

if TYPE_CHECKING:
    import docker

    from tests.support.daemon import Daemon
    from tests.support.fixtures import NewDaemon

BROKEN = {"broken": {"env": {"OLLAMA_SIM_CRASH": "start"}}}
GONE = "ollama-manager/simulated:gone"


def chat(daemon: Daemon, instance: str) -> Any:
    body = {"model": f"tiny@{instance}", "messages": [{"role": "user", "content": "hi"}], "stream": False}
    return daemon.call("POST", "/api/chat", json=body)


def test_a_request_for_an_instance_that_cannot_start_stops_no_other(new_daemon: NewDaemon) -> None:
    instances = {"good": {"template": "sim"}, "loop": {"template": "broken"}, "gone": {"template": "gone"}}
    daemon = new_daemon(
        instances=instances, templates={**BROKEN, "gone": {"image": GONE}}, lifecycle={"max_running": 1}
    ).start()
    assert chat(daemon, "loop").status_code == 503
    daemon.started("good")
    for instance in ("loop", "gone"):
        answer = chat(daemon, instance)
        assert answer.status_code == 503
        assert "no other instance is stopped" in answer.json()["error"] or "left alone" in answer.text
    refused = daemon.begin("gone", "start")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "image_missing")
    body = daemon.instance("good")
    assert (body["phase"], body["starts"]) == ("ready", 1)


def test_an_instance_that_waits_for_a_place_says_so_and_starts_when_there_is_one(
    new_daemon: NewDaemon,
) -> None:
    daemon = new_daemon(
        instances={
            "first": {"template": "sim", "prewarm": True, "priority": 1},
            "late": {"template": "sim", "prewarm": True},
        },
        lifecycle={"max_running": 1},
    ).start()
    daemon.wait_for_phase("first", "ready")
    body = daemon.instance("late")
    assert (body["phase"], body["target"], body["reason"]["code"]) == ("stopped", "running", "overloaded")
    daemon.stopped("first")
    daemon.wait_for_phase("late", "ready")


def test_a_renamed_container_and_one_whose_instance_is_gone_are_shown_and_left_alone(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, manager_id: str
) -> None:
    daemon = new_daemon(instances={"kept": {"template": "sim"}, "gone": {"template": "sim"}}).start()
    for instance in ("kept", "gone"):
        daemon.started(instance)
    docker_client.containers.get(f"{manager_id}-ollama-kept").rename(f"{manager_id}-elsewhere")
    found = wait_for(lambda: daemon.get("orphans")["orphans"])
    assert [(one["name"], one["instance"], one["running"]) for one in found] == [
        (f"{manager_id}-elsewhere", "kept", True)
    ]
    daemon.stop()
    config = daemon.config_file.read_text()
    daemon.config_file.write_text(config.replace("gone:", "other:"))
    daemon.start()
    names = {f"{manager_id}-elsewhere", f"{manager_id}-ollama-gone"}
    assert {one["name"] for one in daemon.get("orphans")["orphans"]} == names
    swept = {one["id"]: one for one in daemon.call("POST", "reap").json()["instances"]}
    assert {swept[name]["action"] for name in names} == {"kept"}
    command = [sys.executable, "-m", "manager", "doctor", "--config", str(daemon.config_file)]
    told = subprocess.run(
        command, cwd=ROOT, env=daemon.environment, capture_output=True, text=True, timeout=120, check=False
    ).stdout
    for name in names:
        assert f"docker rm -f {name}" in told
        assert docker_client.containers.get(name).status == "running"
