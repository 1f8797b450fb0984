"""`roles`, `lanes`, `models` and `gpus` against a real daemon and a real engine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import requests

from tests.support.daemon import ROOT, Daemon, wait_for

if TYPE_CHECKING:
    from tests.integration.conftest import NewDaemon


def run(daemon: Daemon, *arguments: str, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "manager", *arguments],
        cwd=ROOT,
        env={**daemon.environment, "OLLAMA_MANAGER_URL": daemon.url},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == exit_code, f"{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    return result


def columns(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_a_role_is_changed_shown_and_taken_back(new_daemon: NewDaemon) -> None:
    instances = {"cpu": {"template": "sim", "slots": 2}, "other": {"template": "sim"}}
    roles = {"thinking": {"weight": 3}, "gpt-4.1": {"kind": "generate"}}
    daemon = new_daemon(instances=instances, config={"roles": roles}).start()
    pairs = (
        "model=qwen3:8b", "queue.length=5", "instances=cpu", "reserved=1", "attempt_timeouts_s=45,1m",
        "keep_warm=", "concurrency=null", "queue.wait_s=2m", "weight=4",
    )  # fmt: skip
    made = run(daemon, "roles", "set", "thinking", *pairs)
    assert made.stdout.splitlines() == [
        "thinking.model: null (default) -> qwen3:8b (override)",
        "thinking.instances: null (default) -> cpu (override)",
        "thinking.reserved: 0 (default) -> 1 (override)",
        "thinking.queue.length: 100 (default) -> 5 (override)",
        "thinking.queue.wait_s: 60 (default) -> 120 (override)",
        "thinking.weight: 3 (file) -> 4 (override)",
        "thinking.attempt_timeouts_s: [] (default) -> 45,60 (override)",
    ]
    assert made.stderr.startswith("warning: no instance is known to have the model 'qwen3:8b'")
    assert run(daemon, "roles", "set", "gpt-4.1", "policy=cpu_only").stdout.count("gpt-4.1.policy: ") == 1
    table = {columns(line)[0]: columns(line) for line in run(daemon, "roles").stdout.splitlines()}
    assert table["thinking"][1:9] == ["qwen3:8b", "cpu", "auto", "sync", "1", "-", "5, 120 s", "4"]
    assert "weight (override)" in table["thinking"][9]
    document = json.loads(run(daemon, "roles", "--json").stdout)
    assert document == daemon.get("/api/settings/models/effective")

    refused = run(daemon, "roles", "set", "thinking", "reserved=3", exit_code=2)
    assert "body.roles.thinking.reserved: 3 slots of cpu" in refused.stderr
    unknown = run(daemon, "roles", "set", "reviews", "model=m", exit_code=2)
    assert "there is no role 'reviews'" in unknown.stderr
    assert "kind" in unknown.stderr

    back = run(daemon, "roles", "unset", "thinking", "weight").stdout
    assert back == "thinking.weight: 4 (override) -> 3 (file)\n"
    assert (
        "thinking.model: qwen3:8b (override) -> null (default)"
        in run(daemon, "roles", "unset", "thinking").stdout
    )
    assert run(daemon, "roles", "unset", "thinking").stdout == "thinking: nothing changed\n"
    assert "reviews.kind: embed (override)" in run(daemon, "roles", "set", "reviews", "kind=embed").stdout
    assert run(daemon, "roles", "unset", "reviews").stdout == "reviews: removed\n"


def test_models_lanes_and_cards_are_shown_and_nothing_is_started(new_daemon: NewDaemon) -> None:
    instances = {"cpu": {"template": "sim", "slots": 2}, "other": {"template": "sim"}}
    daemon = new_daemon(instances=instances, config={"roles": {"thinking": {"model": "tiny"}}}).start()
    endpoint = daemon.started("cpu")["endpoint"]
    requests.post(f"{endpoint}/api/generate", json={"model": "tiny"}, timeout=10).raise_for_status()
    wait_for(lambda: daemon.instance("cpu"), lambda body: body["models"])
    lines = [columns(line) for line in run(daemon, "models").stdout.splitlines()]
    assert lines[0] == ["MODEL", "SIZE", "PARAMETERS", "ON", "STATUS", "LOADED ON", "ROLES"]
    (tiny,) = (line for line in lines if line[0] == "tiny:latest")
    assert tiny[3].split(", ")[0] == "cpu"
    assert tiny[5].startswith("cpu ")
    assert tiny[6] == "thinking"
    assert all(line[0] != "thinking:latest" for line in lines)

    lanes = [columns(line) for line in run(daemon, "lanes").stdout.splitlines()]
    assert ["cpu", "2", "0", "0"] in lanes
    assert ["thinking", "0", "-", "0", "-", "0"] in lanes
    assert json.loads(run(daemon, "lanes", "--json").stdout) == daemon.get("lanes")

    cards = run(daemon, "gpus")
    assert cards.stdout or cards.stderr
    assert json.loads(run(daemon, "gpus", "--json").stdout)["gpus"] == daemon.get("gpus")["gpus"]
    assert daemon.instance("other")["starts"] == 0
