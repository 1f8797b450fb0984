"""A rollout with the daemon as a process, its command line, and a server that clients used before."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.support.daemon import ROOT, wait_for
from tests.support.gateway import gateway_over
from tests.support.keyed import keyed_gateway
from tests.support.ollama import RunningOllama, running_ollama

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.gateway import Gateway

ROLES = {"output": {"model": "tiny"}, "embedding": {"model": "minilm"}}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def raw() -> Iterator[RunningOllama]:
    with running_ollama() as raw:
        yield raw


@pytest.fixture
def gateway(tmp_path: Path, raw: RunningOllama) -> Iterator[Gateway]:
    config = {"roles": ROLES, "rollout": {"raw_url": raw.url}}
    with gateway_over(tmp_path, config=config) as gateway:
        yield gateway


def command(gateway: Gateway, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "manager", *arguments, "--config", str(gateway.config_file)]
    done = subprocess.run(
        argv, cwd=ROOT, env=gateway.environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == status, done.stderr
    return done


def where(gateway: Gateway, model: str) -> str:
    answer = gateway.call("POST", "/api/chat", json={**CHAT, "model": model, "stream": False})
    return answer.headers["X-Instance"]


def test_the_stages_one_after_the_other_and_back(gateway: Gateway, raw: RunningOllama) -> None:
    assert (where(gateway, "tiny"), where(gateway, "output")) == ("one", "one")
    observed = command(gateway, "rollout", "set", "observe").stdout
    assert observed.startswith("stage: observe (override) - all requests pass")
    assert f"raw_url: {raw.url} (file)" in observed
    assert where(gateway, "tiny") == "raw"
    assert "rollout: stage observe" in command(gateway, "status").stderr
    assert gateway.get("/readyz")["rollout"] == "observe"

    command(gateway, "rollout", "set", "shadow")
    assert where(gateway, "output") == "raw"
    (event,) = [one for one in gateway.events() if one["kind"] == "rollout_disagreement"]
    assert "the role output: the raw server does not have the model" in event["detail"]
    text = gateway.call("GET", "/metrics").text
    assert 'ollama_manager_rollout_disagreements_total{reason="model_missing"} 1.0' in text

    command(gateway, "rollout", "set", "lanes", "--lane", "output")
    assert (where(gateway, "tiny"), where(gateway, "output")) == ("raw", "one")
    refused = command(gateway, "rollout", "set", "lanes", "--lane", "nobody", status=2)
    assert "'nobody' is no role" in refused.stderr
    shown = command(gateway, "config", "show").stdout
    assert "stage: lanes" in shown
    assert "override" in next(line for line in shown.splitlines() if "stage: lanes" in line)

    # It outlives the daemon, and a reload of the file stays below it.
    gateway.stop()
    gateway.start(until_ready=False)
    gateway.wait_until_alive()
    wait_for(lambda: where(gateway, "output"), lambda found: found == "one")
    assert where(gateway, "tiny") == "raw"
    command(gateway, "rollout", "unset")
    assert where(gateway, "tiny") == "one"
    gateway.configure({**gateway.config, "rollout": {"stage": "observe", "raw_url": raw.url}})
    assert gateway.process is not None
    gateway.process.send_signal(signal.SIGHUP)
    wait_for(lambda: where(gateway, "tiny"), lambda found: found == "raw")
    command(gateway, "rollout", "set", "all")
    assert where(gateway, "tiny") == "one"


def test_a_live_change_cuts_no_open_stream(gateway: Gateway) -> None:
    """Streams of both servers go on through a roll-back and a second change."""
    options = {"num_predict": 200}
    answers: dict[str, list[Any]] = {}

    def stream(name: str, begun: threading.Event) -> None:
        with requests.post(
            f"{gateway.url}/api/chat", json={**CHAT, "options": options}, stream=True, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            answers[name] = [answer.headers["X-Instance"], next(lines)]
            begun.set()
            answers[name] += list(lines)

    threads: list[threading.Thread] = []
    for name in ("all", "observe", "all"):
        command(gateway, "rollout", "set", name)
        begun = threading.Event()
        thread = threading.Thread(target=stream, args=(f"{name}{len(threads)}", begun))
        thread.start()
        assert begun.wait(20)
        threads.append(thread)
    command(gateway, "rollout", "set", "observe")
    for thread in threads:
        thread.join(60)
    assert {name: lines[0] for name, lines in answers.items()} == {
        "all0": "one",
        "observe1": "raw",
        "all2": "one",
    }
    for lines in answers.values():
        assert b'"done":true' in lines[-1]


def test_a_key_in_a_path_is_never_passed_on(tmp_path: Path) -> None:
    with (
        running_ollama() as raw,
        keyed_gateway(tmp_path, config={"roles": ROLES, "rollout": {"raw_url": raw.url}}) as keyed,
    ):
        change = {"rollout": {"stage": "observe"}}
        assert keyed.ask("POST", "/api/settings/models", json=change).status_code == 200
        secret = keyed.make("app", "client")
        call = keyed.gateway.call
        answer = call("POST", f"/key/{secret}/api/chat", json={**CHAT, "stream": False})
        assert (answer.status_code, answer.headers["X-Instance"]) == (200, "raw")
        listed = call("GET", f"/key/{secret}/api/tags")
        assert (listed.status_code, listed.headers["X-Instance"]) == (200, "raw")
        assert call("POST", "/api/chat", json=CHAT).status_code == 401
        assert call("GET", "/api/tags").status_code == 401
        assert keyed.ask("POST", "/api/pull", key="app", json={"model": "x"}).status_code == 403
        unknown = keyed.ask("GET", "/v1/unknown", key="app")  # an admin key passes there, any other does not
        assert (unknown.status_code, unknown.headers.get("X-Instance")) == (404, None)
        assert keyed.ask("GET", "/v1/unknown").headers["X-Instance"] == "raw"
        assert keyed.ask("POST", "/api/settings/models", key="app", json=change).status_code == 403
        # Limits of a key hold, and what it may not see is not listed.
        keyed.make("limited", "client", models=["minilm*"])
        bad: list[Any] = [CHAT, {**CHAT, "model": "tiny@nowhere"}, {**CHAT, "model": "gpt"}]
        for body in bad:
            assert keyed.ask("POST", "/api/chat", key="limited", json=body).status_code == 403
        for content in (b"[]", b"{}"):
            assert keyed.ask("POST", "/api/chat", key="limited", data=content).status_code == 400
        embed = {"model": "minilm", "input": "x"}
        assert keyed.ask("POST", "/api/embed", key="limited", json=embed).headers["X-Instance"] == "raw"
        tags = keyed.ask("GET", "/api/tags", key="limited")
        assert {one["name"] for one in tags.json()["models"]} <= {"minilm:latest", "embedding:latest"}
        assert "X-Instance" not in tags.headers
        assert secret not in raw.log.read_text(encoding="utf-8")
        assert secret not in keyed.gateway.log()
