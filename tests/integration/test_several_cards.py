"""One instance over several cards: what its container asks for, what it needs of each, and cards it loses."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.integration.test_gpus import GPU_TEMPLATE, card, ids, pid_of, requested, seen
from tests.nvml.standin import Process, Slice
from tests.support.cards import GIB, A, B, C, Machine
from tests.support.daemon import wait_for
from tests.support.engine import private_engine_obstacles
from tests.support.engine_kinds import is_podman, needs_cards
from tests.support.state import stored

if TYPE_CHECKING:
    from pathlib import Path

    import docker

    from tests.support.daemon import Daemon
    from tests.support.engine import Engine
    from tests.support.fixtures import NewDaemon

pytestmark = [
    pytest.mark.skipif(bool(private_engine_obstacles()), reason="; ".join(private_engine_obstacles())),
    needs_cards(),
]

BOTH = {"both": {"template": "sim-gpu", "device": [A, "02:00.0"]}}


def cards_asked_for(client: docker.DockerClient, body: dict[str, Any]) -> list[str]:
    """The cards of one device request; Podman shows only the last of several."""
    if is_podman():
        return seen(client, body).split(",")
    return requested(client, body)


def reason(daemon: Daemon, instance: str) -> Any:
    return daemon.instance(instance)["reason"]


def chat(daemon: Daemon, model: str) -> requests.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False}
    return daemon.call("POST", "/api/chat", json=body)


# --- which cards ---


def test_an_instance_over_several_cards_asks_for_each_by_uuid_and_shows_all_of_them(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, engine: Engine, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, card(A, 1, vram_used=GIB), card(B, 2, vram_used=2 * GIB), card(C, 3))
    daemon = new_daemon(
        instances=BOTH, templates=GPU_TEMPLATE, config={"gpus": "auto"}, environment=machine.environment
    ).start()
    assert ids(daemon) == ["both", "gpu0"]  # one that no instance names, alone or in a list
    assert daemon.instance("gpu0")["device"]["uuid"] == C
    body = daemon.started("both")
    assert cards_asked_for(docker_client, body) == [A, B]
    assert seen(docker_client, body) == f"{A},{B}"
    container = docker_client.containers.get(body["container"]["id"])
    assert container.labels["ollama-manager.device"] == f"{A},{B}"
    device = body["device"]
    assert [device[key] for key in ("kind", "uuid", "index", "name")] == ["gpu", A, 0, "Card 1"]
    sizes = [device[f"vram_{kind}_bytes"] // GIB for kind in ("total", "used", "free")]
    assert sizes == [48, 3, 45]
    assert [(one["uuid"], one["index"], one["vram_used_bytes"] // GIB) for one in device["cards"]] == [
        (A, 0, 1),
        (B, 1, 2),
    ]

    process = Process(pid_of(engine, body), 4 * GIB)
    machine.show(
        card(A, 1, vram_used=4 * GIB, processes=(process,)),
        card(B, 2, vram_used=4 * GIB, processes=(process,)),
        card(C, 3),
    )
    gpus = wait_for(lambda: daemon.get("gpus")["gpus"], lambda found: found[0]["processes"])
    assert [[one["instance"] for one in gpu["processes"]] for gpu in gpus] == [["both"], ["both"], []]

    daemon.stop()
    machine.show(card(B, 5), card(A, 2), card(C, 3))  # renumbered; A is in the slot that is named
    daemon.start()
    twice = daemon.wait_for_phase("both", "unavailable")["reason"]
    assert twice["code"] == "gpu_missing"
    assert f"`device` names GPU {A} twice, as {A} and as 02:00.0" in twice["message"]
    machine.show(card(A, 1), card(B, 2), card(C, 3))
    again = daemon.wait_for_phase("both", "ready")
    assert again["container"] == body["container"]


def test_all_cards_are_those_at_the_start_and_one_that_comes_later_is_joined_when_idle(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, card(B, 2), card(A, 1))
    daemon = new_daemon(
        instances={"every": {"template": "sim-gpu", "device": "all"}},
        templates=GPU_TEMPLATE,
        config={"gpus": "auto"},
        environment=machine.environment,
    ).start()
    assert ids(daemon) == ["every"]
    first = daemon.started("every")
    assert cards_asked_for(docker_client, first) == [A, B]
    assert [one["uuid"] for one in first["device"]["cards"]] == [A, B]
    machine.show(card(A, 1), card(B, 2), card(C, 3))
    body = wait_for(
        lambda: daemon.instance("every"),
        lambda one: one["container"] and one["container"]["id"] != first["container"]["id"],
    )
    body = daemon.wait_for_phase("every", "ready")
    assert ids(daemon) == ["every"]
    assert cards_asked_for(docker_client, body) == [A, B, C]
    (why,) = [event["detail"] for event in daemon.events() if event["kind"] == "recreating"]
    assert f"was made for {A},{B}, and its cards are {A},{B},{C} by now" in why

    machine.show(card(A, 1), card(B, 2))  # never fewer silently
    lost = daemon.wait_for_phase("every", "unavailable")["reason"]
    assert (lost["code"], C in lost["message"]) == ("gpu_missing", True)
    daemon.stopped("every")
    answer = daemon.begin("every", "start")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "gpu_missing")
    daemon.stop()
    daemon.start()  # with the cards that are there by now
    assert cards_asked_for(docker_client, daemon.started("every")) == [A, B]


def test_all_cards_are_never_asked_for_where_none_is_known(new_daemon: NewDaemon, tmp_path: Path) -> None:
    machine = Machine(tmp_path, init_error=9)
    daemon = new_daemon(
        instances={"every": {"template": "sim-gpu", "device": "all"}}, environment=machine.environment
    ).start()
    answer = daemon.begin("every", "start")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "gpu_missing")
    assert "no GPU was found" in answer.json()["error"]["message"]
    machine.show(card(A, 1, mig=(Slice("MIG-1"), Slice("MIG-2"))))
    message = wait_for(
        lambda: daemon.instance("every")["reason"]["message"], lambda message: "slice" in message
    )
    assert "MIG-1 is a slice of a card" in message


# --- cards that are missing ---


def test_a_missing_card_of_several_makes_the_instance_unavailable_and_is_never_left_out(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, card(A, 1), card(C, 3))
    daemon = new_daemon(instances=BOTH, environment=machine.environment).start()
    body = daemon.wait_for_phase("both", "unavailable")
    assert body["reason"]["code"] == "gpu_missing"
    assert body["reason"]["message"] == "GPU 02:00.0 was not found"
    assert [(one["uuid"], one["pci_bus_id"]) for one in body["device"]["cards"]] == [
        (A, "00000000:01:00.0"),
        (None, "02:00.0"),
    ]
    assert body["device"]["vram_total_bytes"] is None  # of one of them it is unknown
    answer = daemon.begin("both", "start")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "gpu_missing")
    assert daemon.instance("both")["container"] is None
    machine.show(card(A, 1), card(B, 2), card(C, 3))
    daemon.wait_for_phase("both", "stopped")
    assert cards_asked_for(docker_client, daemon.started("both")) == [A, B]


@pytest.mark.parametrize("lost", [A, B])
def test_a_running_instance_that_loses_one_of_its_cards_is_out_until_it_has_all_of_them(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, tmp_path: Path, lost: str
) -> None:
    both = [card(A, 1), card(B, 2)]
    machine = Machine(tmp_path, *both)
    daemon = new_daemon(
        instances=BOTH | {"alone": {"template": "sim-gpu", "device": A}}, environment=machine.environment
    ).start()
    first = daemon.started("both")
    machine.show(*[card(A, 1, error=15 if lost == A else 0), card(B, 2, error=15 if lost == B else 0)])
    body = daemon.wait_for_phase("both", "unavailable")
    assert body["reason"]["code"] == "gpu_missing"
    assert f"GPU {lost} is lost" in body["reason"]["message"]
    assert body["container"] == first["container"]
    assert chat(daemon, "tiny@both").status_code == 503
    machine.show()  # both have gone by now
    message = wait_for(
        lambda: reason(daemon, "both"), lambda why: why and A in why["message"] and B in why["message"]
    )
    assert message["code"] == "gpu_missing"
    machine.show(*both)
    wait_for(
        lambda: daemon.instance("both"),
        lambda one: one["phase"] == "ready" and one["container"]["id"] != first["container"]["id"],
    )
    assert cards_asked_for(docker_client, daemon.instance("both")) == [A, B]
    events = [(event["kind"], event["instance"]) for event in daemon.events()]
    assert events.count(("card_lost", "both")) == events.count(("card_returned", "both")) == 1
    assert ("gpu_lost", "both") in events
    assert ("gpu_lost", "alone") in events or lost == B


# --- whether it fits ---


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, card(A, 1), card(B, 2))


@pytest.fixture
def daemon(new_daemon: NewDaemon, machine: Machine) -> Daemon:
    """`both` needs 30 GiB of two cards of 24 GiB; `one` and `two` need 8 GiB of a card each."""
    return new_daemon(
        instances={
            "both": {"template": "large", "device": [A, B]},
            "learns": {"template": "sim-gpu", "device": [A, B]},
            "one": {"template": "small", "device": A},
            "two": {"template": "small", "device": B},
        },
        templates={
            "large": {"device": "gpu", "limits": {"vram": "30g"}},
            "small": {"device": "gpu", "limits": {"vram": "8g"}},
        },
        lifecycle={"vram_wait_s": 1},
        environment=machine.environment,
    ).start()


def test_a_start_is_refused_while_one_card_is_full_and_says_what_is_free_on_each(
    daemon: Daemon, machine: Machine
) -> None:
    machine.show(card(A, 1, vram_used=24 * GIB, processes=(Process(1, 24 * GIB),)), card(B, 2))
    answer = daemon.begin("both", "start")
    assert answer.status_code == 503
    error = answer.json()["error"]
    assert error["code"] == "vram_insufficient"
    assert f"free on its cards: {A} 0.0 GiB, {B} 24.0 GiB" in error["message"]
    details = error["details"]
    assert (details["needed_bytes"], details["lacking_bytes"]) == (30 * GIB, 6 * GIB)
    assert [one["vram_free_bytes"] // GIB for one in details["cards"]] == [0, 24]
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(daemon.begin, "both", "start")
        daemon.wait_for_phase("both", "starting")
        machine.show(card(A, 1, vram_used=18 * GIB), card(B, 2))
        assert start.result().status_code == 200


def test_what_an_instance_was_promised_counts_on_each_of_its_cards(
    daemon: Daemon, machine: Machine, engine: Engine
) -> None:
    body = daemon.started("both")  # 15 GiB on each card
    machine.show(card(A, 1, vram_used=2 * GIB), card(B, 2, vram_used=2 * GIB))
    for id_ in ("one", "two"):
        answer = daemon.begin(id_, "start")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "vram_insufficient")
        assert answer.json()["error"]["details"]["reserved_bytes"] == 15 * GIB
    process = Process(pid_of(engine, body), 30 * GIB - 7 * GIB)  # its server has placed most of it on A
    rest = Process(pid_of(engine, body), 7 * GIB)
    machine.show(
        card(A, 1, vram_used=23 * GIB, processes=(process,)), card(B, 2, vram_used=7 * GIB, processes=(rest,))
    )
    wait_for(lambda: daemon.get("gpus")["gpus"][1]["processes"])
    daemon.started("two")  # nothing more is promised on B
    assert daemon.begin("one", "start").status_code == 503

    daemon.stopped("two")
    machine.show(card(A, 1), card(B, 2))
    daemon.stopped("both")
    daemon.started("one")
    machine.show(card(A, 1, vram_used=20 * GIB), card(B, 2))
    assert daemon.begin("both", "start").json()["error"]["details"]["lacking_bytes"] == 6 * GIB


def test_the_share_of_each_card_is_learned_and_asked_for_at_the_next_start(
    daemon: Daemon, machine: Machine, engine: Engine
) -> None:
    body = daemon.started("learns")
    requests.post(f"{body['endpoint']}/api/generate", json={"model": "tiny"}, timeout=10)
    pid = pid_of(engine, body)
    machine.show(
        card(A, 1, vram_used=20 * GIB, processes=(Process(pid, 20 * GIB),)),
        card(B, 2, vram_used=10 * GIB, processes=(Process(pid, 10 * GIB),)),
    )
    (size,) = wait_for(lambda: stored(daemon.state_dir, "SELECT * FROM learned_sizes"))
    assert (size["instance"], size["vram_bytes"]) == ("learns", 30 * GIB)
    assert json.loads(size["by_card"]) == {A: 20 * GIB, B: 10 * GIB}
    machine.show(card(A, 1), card(B, 2))
    daemon.stopped("learns")
    daemon.stop()
    daemon.start()
    daemon.started("learns")  # it is promised what it took on each card
    machine.show(card(A, 1, vram_used=2 * GIB), card(B, 2, vram_used=2 * GIB))
    for id_, promised in (("one", 20), ("two", 10)):
        answer = daemon.begin(id_, "start")
        if id_ == "one":
            assert answer.json()["error"]["details"]["reserved_bytes"] == promised * GIB
        else:
            assert answer.status_code == 200
