"""Cards that are lost, containers that lose theirs, and loads for which there is not enough memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.nvml.standin import Card, Process
from tests.support.cards import GIB, A, B, Machine
from tests.support.daemon import wait_for
from tests.support.engine import private_engine_obstacles
from tests.support.ollama import set_knobs
from tests.support.state import stored

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.daemon import Daemon
    from tests.support.engine import Engine
    from tests.support.fixtures import NewDaemon

pytestmark = pytest.mark.skipif(
    bool(private_engine_obstacles()), reason="; ".join(private_engine_obstacles())
)


def first(**more: Any) -> Card:
    return Card(A, pci_bus_id="00000000:01:00.0", name="First", **more)


SECOND = Card(B, pci_bus_id="00000000:02:00.0", name="Second")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, first(), SECOND)


@pytest.fixture
def daemon(new_daemon: NewDaemon, machine: Machine) -> Daemon:
    return new_daemon(
        instances={
            "one": {"template": "sim-gpu", "device": A},
            "two": {"template": "sim-gpu", "device": A},
            "other": {"template": "sim-gpu", "device": B},
        },
        lifecycle={"vram_wait_s": 1},
        environment=machine.environment,
    ).start()


def pid_of(engine: Engine, body: dict[str, Any]) -> int:
    with closing(engine.client()) as client:
        return int(client.containers.get(body["container"]["id"]).attrs["State"]["Pid"])


def kinds(daemon: Daemon, *wanted: str) -> list[tuple[str, str]]:
    return [(event["kind"], event["instance"]) for event in daemon.events() if event["kind"] in wanted]


def cards(daemon: Daemon) -> dict[str, dict[str, Any]]:
    return {card["uuid"]: card for card in daemon.get("gpus")["gpus"]}


def lost_cards(daemon: Daemon) -> set[str]:
    return {uuid for uuid, card in cards(daemon).items() if card["lost"]}


def chat(daemon: Daemon, model: str, **more: Any) -> requests.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False, **more}
    return daemon.call("POST", "/api/chat", json=body)


def test_a_card_that_is_lost_is_told_everywhere_and_is_back_when_it_is_back(
    daemon: Daemon, machine: Machine
) -> None:
    for gone, code, lost in (
        ((first(error=15), SECOND), "gpu_lost", {A}),
        ((first(handle_error=16), SECOND), "gpu_lost", {A}),
        ((SECOND,), "gpu_lost", {A}),
        (None, "driver_not_loaded", {A, B}),
    ):
        if gone is None:
            machine.show(init_error=9, count_error=9)
        else:
            machine.show(*gone)
        wait_for(lambda: lost_cards(daemon), lost.__eq__)
        found = cards(daemon)
        assert found[A]["name"] == "First"
        assert found[A]["vram_free_bytes"] is None
        error = daemon.get("gpus")["error"]
        assert error["code"] == code
        answer = daemon.begin("one", "start")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "gpu_missing")
        assert daemon.instance("one")["container"] is None
        metrics = daemon.call("GET", "/metrics").text
        assert f'ollama_manager_gpu_lost{{uuid="{A}"}} 1.0' in metrics
        machine.show(first(), SECOND)
        wait_for(lambda: daemon.get("gpus")["error"], lambda error: error is None)
    told = kinds(daemon, "gpu_lost", "gpu_back")
    of_one = [kind for kind, instance in told if instance == "one"]
    assert of_one == ["gpu_lost", "gpu_back"] * 4
    assert [kind for kind, instance in told if instance == "other"] == ["gpu_lost", "gpu_back"]
    assert daemon.started("one")["reason"] is None


def test_a_container_that_lost_its_card_is_found_although_its_server_says_nothing(
    daemon: Daemon, machine: Machine, engine: Engine
) -> None:
    body = daemon.started("one")
    requests.post(f"{body['endpoint']}/api/generate", json={"model": "tiny"}, timeout=10)
    process = Process(pid_of(engine, body), 2 * GIB)
    machine.show(first(vram_used=2 * GIB, processes=(process,)), SECOND)
    wait_for(lambda: daemon.get("gpus")["gpus"][0]["processes"])
    assert daemon.instance("one")["reason"] is None
    machine.show(first(), SECOND)
    body = wait_for(lambda: daemon.instance("one"), lambda body: body["reason"])
    assert (body["phase"], body["reason"]["code"]) == ("ready", "gpu_fallback")
    assert "no process of the container holds memory on the card" in body["reason"]["message"]
    assert body["models"][0]["vram_bytes"] > 0  # so says its server


def test_a_request_for_the_processor_is_no_fallback(daemon: Daemon) -> None:
    body = daemon.started("one")
    set_knobs(body["endpoint"], cpu_fallback=True)
    assert chat(daemon, "tiny@one", options={"num_gpu": 0}).status_code == 200
    seen = wait_for(lambda: daemon.instance("one"), lambda body: body["models"])
    assert seen["models"][0]["vram_bytes"] == 0
    later = wait_for(lambda: daemon.instance("one"), lambda body: body["last_seen_at"] > seen["last_seen_at"])
    assert later["reason"] is None
    assert kinds(daemon, "gpu_fallback") == []


def test_a_load_for_which_memory_lacks_is_refused_with_a_reason_and_two_do_not_share_what_is_free(
    daemon: Daemon, machine: Machine, engine: Engine
) -> None:
    bodies = {id_: daemon.started(id_) for id_ in ("one", "two")}
    assert chat(daemon, "tiny@one").status_code == 200
    machine.show(
        first(vram_used=5 * GIB, processes=(Process(pid_of(engine, bodies["one"]), 5 * GIB),)), SECOND
    )
    wait_for(lambda: stored(daemon.state_dir, "SELECT * FROM learned_sizes"))
    assert chat(daemon, "tiny@one", keep_alive=0).status_code == 200
    wait_for(lambda: daemon.instance("one")["models"], lambda models: models == [])

    machine.show(first(vram_used=21 * GIB, processes=(Process(1, 21 * GIB),)), SECOND)
    wait_for(lambda: cards(daemon)[A]["vram_used_bytes"], lambda used: used == 21 * GIB)
    answer = chat(daemon, "tiny@one")
    assert answer.status_code == 503
    assert "tiny on one needs 5.0 GiB of GPU memory, 2.0 GiB more than are free" in answer.text
    assert "(pid 1) 21.0 GiB" in answer.text
    reason = daemon.instance("one")["reason"]
    assert reason["code"] == "vram_insufficient"

    machine.show(first(vram_used=16 * GIB), SECOND)  # enough for one of them
    wait_for(lambda: daemon.instance("one")["reason"], lambda reason: reason is None)
    for body in bodies.values():
        set_knobs(body["endpoint"], load_s=4)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda id_: chat(daemon, f"tiny@{id_}"), ("one", "two")))
    assert sorted(answer.status_code for answer in answers) == [200, 503]
    lost = next(answer for answer in answers if answer.status_code == 503)
    assert "are reserved for other instances" in lost.text
