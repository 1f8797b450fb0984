"""Cards: which instance gets which, and whether what it needs is free."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.nvml.standin import Card, Process, Slice
from tests.support.cards import GIB, A, B, C, D, Machine
from tests.support.daemon import wait_for
from tests.support.engine import private_engine_obstacles
from tests.support.engine_kinds import CDI_VARIABLE, is_podman, needs_cards
from tests.support.fixtures import making_daemons, new_manager_id
from tests.support.state import stored

if TYPE_CHECKING:
    from collections.abc import Iterator

    import docker

    from tests.support.daemon import Daemon
    from tests.support.engine import Engine
    from tests.support.fixtures import NewDaemon

pytestmark = [
    pytest.mark.skipif(bool(private_engine_obstacles()), reason="; ".join(private_engine_obstacles())),
    needs_cards(),
]

GPU_TEMPLATE = {"ollama-gpu": {"device": "gpu"}}  # what cards that are found by themselves are given


def card(uuid: str, slot: int, **more: Any) -> Card:
    return Card(uuid, pci_bus_id=f"00000000:{slot:02x}:00.0", name=f"Card {slot}", **more)


def requested(client: docker.DockerClient, body: dict[str, Any]) -> list[str]:
    """The ids of the devices that an instance's container has asked for."""
    if is_podman():  # it does not say what it was asked for, so what counts is what it gave
        return [environment(client, body)[CDI_VARIABLE]]
    (request,) = client.containers.get(body["container"]["id"]).attrs["HostConfig"]["DeviceRequests"]
    assert request["Driver"] == "nvidia"
    assert request["Capabilities"] == [["gpu"]]
    assert request["Count"] == 0
    ids: list[str] = request["DeviceIDs"]
    return ids


def seen(client: docker.DockerClient, body: dict[str, Any]) -> str:
    """NVIDIA_VISIBLE_DEVICES of an instance's process, which is what the engine makes of the request."""
    return environment(client, body)["NVIDIA_VISIBLE_DEVICES"]


def environment(client: docker.DockerClient, body: dict[str, Any]) -> dict[str, str]:
    pid = client.containers.get(body["container"]["id"]).attrs["State"]["Pid"]
    return dict(line.partition("=")[::2] for line in Path(f"/proc/{pid}/environ").read_text().split("\0"))


def ids(daemon: Daemon) -> list[str]:
    return [body["id"] for body in daemon.get("instances")["instances"]]


# --- which card ---


def test_each_instance_has_its_card_by_uuid_and_keeps_it_when_cards_are_renumbered(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, card(A, 1, vram_used=GIB), card(B, 2))
    daemon = new_daemon(
        templates=GPU_TEMPLATE, config={"gpus": "auto"}, environment=machine.environment
    ).start()
    assert ids(daemon) == ["cpu", "gpu0", "gpu1"]
    first = {id_: daemon.started(id_) for id_ in ("gpu0", "gpu1", "cpu")}
    assert first["gpu0"]["device"] == {
        "kind": "gpu",
        "uuid": A,
        "index": 0,
        "name": "Card 1",
        "vram_total_bytes": 24 * GIB,
        "vram_used_bytes": GIB,
        "vram_free_bytes": 23 * GIB,
        "cards": [
            {
                "uuid": A,
                "index": 0,
                "name": "Card 1",
                "host": None,
                "pci_bus_id": "00000000:01:00.0",
                "vram_total_bytes": 24 * GIB,
                "vram_used_bytes": GIB,
                "vram_free_bytes": 23 * GIB,
            }
        ],
    }
    for id_, uuid in (("gpu0", A), ("gpu1", B)):
        assert requested(docker_client, first[id_]) == [uuid]
        assert seen(docker_client, first[id_]) == uuid
    assert seen(docker_client, first["cpu"]) == "void"

    machine.show(card(B, 2), card(A, 1))
    body = wait_for(lambda: daemon.instance("gpu0"), lambda body: body["device"]["index"] == 1)
    assert body["device"]["uuid"] == A
    daemon.stop()
    machine.show(card(B, 1), card(A, 3))  # in other slots too
    daemon.start()
    for id_, uuid in (("gpu0", A), ("gpu1", B)):
        body = daemon.wait_for_phase(id_, "ready")
        assert body["device"]["uuid"] == uuid
        assert body["container"] == first[id_]["container"]
    daemon.stopped("gpu0")
    assert requested(docker_client, daemon.started("gpu0")) == [A]


def test_a_missing_card_is_never_replaced_by_another_and_a_new_one_gets_a_new_number(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, card(A, 1), card(B, 2))
    daemon = new_daemon(
        templates=GPU_TEMPLATE, config={"gpus": "auto"}, environment=machine.environment
    ).start()
    machine.show(card(B, 2), card(C, 3))
    wait_for(lambda: ids(daemon), lambda found: "gpu2" in found)
    body = daemon.instance("gpu0")
    assert (body["phase"], body["reason"]["code"]) == ("unavailable", "gpu_missing")
    assert A in body["reason"]["message"]
    assert body["device"]["uuid"] == A
    assert body["device"]["vram_total_bytes"] is None
    answer = daemon.begin("gpu0", "start")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "gpu_missing")
    assert daemon.instance("gpu0")["container"] is None
    assert requested(docker_client, daemon.started("gpu2")) == [C]  # found while running, and usable at once
    assert requested(docker_client, daemon.started("gpu1")) == [B]

    machine.show(card(A, 1), card(B, 2), card(D, 4))
    wait_for(lambda: ids(daemon), lambda found: "gpu3" in found)  # gpu2 was given to another one before
    assert daemon.instance("gpu3")["device"]["uuid"] == D
    assert daemon.wait_for_phase("gpu0", "stopped")["reason"] is None
    assert requested(docker_client, daemon.started("gpu0")) == [A]
    numbers = {row["instance"]: row["uuid"] for row in stored(daemon.state_dir, "SELECT * FROM bindings")}
    assert numbers == {"gpu0": A, "gpu1": B, "gpu2": C, "gpu3": D}


def test_cards_are_named_by_uuid_or_slot_or_slice_and_may_be_shared(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, tmp_path: Path
) -> None:
    slices = (Slice("MIG-1", vram_total=5 * GIB), Slice("MIG-2", vram_total=10 * GIB))
    machine = Machine(tmp_path, card(A, 1), card(B, 2), card(C, 3, mig=slices))
    devices = {"by-uuid": B, "shares": B, "by-slot": "01:00.0", "by-slice": "MIG-2", "any": "auto"}
    daemon = new_daemon(
        instances={id_: {"template": "sim-gpu", "device": device} for id_, device in devices.items()},
        templates=GPU_TEMPLATE,
        config={"gpus": "auto"},
        environment=machine.environment,
    ).start()
    assert ids(daemon) == list(devices)  # each card has an instance: none is left to be found
    bound = {"by-uuid": B, "shares": B, "by-slot": A, "by-slice": "MIG-2", "any": "MIG-1"}
    for id_, uuid in bound.items():
        body = daemon.started(id_)
        assert body["device"]["uuid"] == uuid
        assert requested(docker_client, body) == [uuid]
        assert seen(docker_client, body) == uuid
    assert daemon.instance("by-slice")["device"]["vram_total_bytes"] == 10 * GIB


def test_without_a_driver_nothing_is_known_of_cards_and_the_cpu_works(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, tmp_path: Path
) -> None:
    machine = Machine(tmp_path, init_error=9)
    daemon = new_daemon(
        instances={
            "cpu": {"template": "sim"},
            "any": {"template": "sim-gpu", "device": "auto"},
            "named": {"template": "sim-gpu", "device": B},
        },
        environment=machine.environment,
    ).start()
    gpus = daemon.get("gpus")
    assert gpus["gpus"] == []
    assert gpus["error"]["code"] == "driver_not_loaded"
    assert daemon.started("cpu")["phase"] == "ready"
    body = daemon.instance("any")
    assert (body["phase"], body["reason"]["code"]) == ("unavailable", "gpu_missing")
    assert gpus["error"]["message"] in body["reason"]["message"]
    body = daemon.instance("named")  # it may well be there: the engine will say
    assert (body["phase"], body["reason"], body["device"]["vram_free_bytes"]) == ("stopped", None, None)
    assert requested(docker_client, daemon.started("named")) == [B]

    machine.show(card(A, 1), card(B, 2))
    assert daemon.wait_for_phase("any", "stopped")["device"]["uuid"] == A
    assert daemon.get("gpus")["error"] is None
    assert requested(docker_client, daemon.started("any")) == [A]


def test_a_card_for_which_there_is_no_template_ends_nothing(new_daemon: NewDaemon, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    daemon = new_daemon(config={"gpus": "auto"}, environment=machine.environment).start()
    machine.show(card(A, 1))
    event = wait_for(lambda: [event for event in daemon.events() if event["kind"] == "found_unusable"])[0]
    assert "ollama-gpu" in event["detail"]
    assert ids(daemon) == ["cpu"]
    assert daemon.started("cpu")["phase"] == "ready"
    assert [event["kind"] for event in daemon.events()].count("found_unusable") == 1


# --- whether it fits ---

NEED = 8 * GIB
WAIT_S = 2.0
SLACK_S = 10.0  # for a machine that does other things too


@pytest.fixture(scope="module")
def shared_machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("machine"), card(A, 1))


@pytest.fixture(scope="module")
def only_daemon(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory, shared_machine: Machine
) -> Iterator[Daemon]:
    """Instances `one` and `two` that need 8 GiB, and `learns` that does not know yet, all on one card."""
    with making_daemons(engine, tmp_path_factory.mktemp("admission"), new_manager_id()) as make:
        yield make(
            instances={
                "one": {"template": "needs", "device": A},
                "two": {"template": "needs", "device": A},
                "learns": {"template": "sim-gpu", "device": A},
            },
            templates={"needs": {"device": "gpu", "limits": {"vram": "8g"}}},
            lifecycle={"vram_wait_s": WAIT_S},
            environment=shared_machine.environment,
        ).start()


@pytest.fixture
def machine(shared_machine: Machine, only_daemon: Daemon) -> Iterator[Machine]:
    yield shared_machine
    for id_ in ("one", "two", "learns"):
        shared_machine.show(card(A, 1))
        only_daemon.stopped(id_)


@pytest.fixture
def daemon(only_daemon: Daemon, machine: Machine) -> Daemon:
    """The daemon with nothing running and an empty card, now and afterwards."""
    machine.show(card(A, 1))
    return only_daemon


def pid_of(engine: Engine, body: dict[str, Any]) -> int:
    with closing(engine.client()) as client:
        return int(client.containers.get(body["container"]["id"]).attrs["State"]["Pid"])


def free_seen(daemon: Daemon) -> int:
    return int(daemon.get("gpus")["gpus"][0]["vram_free_bytes"])


def test_a_start_without_enough_free_memory_is_refused_after_a_bounded_wait(
    daemon: Daemon, machine: Machine
) -> None:
    foreign = Process(1, 17 * GIB)
    machine.show(card(A, 1, vram_used=17 * GIB, processes=(foreign,)))
    answer = daemon.begin("one", "start")
    assert WAIT_S <= answer.elapsed.total_seconds() < WAIT_S + SLACK_S
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    error = answer.json()["error"]
    assert error["code"] == "vram_insufficient"
    assert error["details"]["needed_bytes"] == NEED
    assert error["details"]["lacking_bytes"] == GIB
    body = daemon.instance("one")
    assert (body["phase"], body["reason"]["code"], body["container"]) == ("failed", "vram_insufficient", None)
    (process,) = daemon.get("gpus")["gpus"][0]["processes"]
    name = Path("/proc/1/comm").read_text().strip()
    assert process == {"pid": 1, "name": name, "used_bytes": 17 * GIB, "instance": None}
    assert f"8.0 GiB of GPU memory, 1.0 GiB more than are free; held by {name} (pid 1)" in error["message"]


def test_a_start_is_let_in_as_soon_as_memory_is_given_back(daemon: Daemon, machine: Machine) -> None:
    machine.show(card(A, 1, vram_used=20 * GIB))
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(daemon.begin, "one", "start")
        daemon.wait_for_phase("one", "starting")
        machine.show(card(A, 1, vram_used=16 * GIB))
        assert start.result().status_code == 200


def test_two_starts_at_once_are_not_let_in_by_the_same_memory(daemon: Daemon, machine: Machine) -> None:
    machine.show(card(A, 1, vram_used=12 * GIB))
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda id_: daemon.begin(id_, "start"), ("one", "two")))
    assert sorted(answer.status_code for answer in answers) == [200, 503]
    won, lost = ("one", "two") if answers[0].ok else ("two", "one")
    assert daemon.instance(lost)["reason"]["code"] == "vram_insufficient"
    daemon.stopped(won)
    daemon.started(lost)


def test_memory_that_an_instance_was_promised_and_has_taken_counts_once(
    engine: Engine, daemon: Daemon, machine: Machine
) -> None:
    pid = pid_of(engine, daemon.started("one"))
    machine.show(card(A, 1, vram_used=15 * GIB, processes=(Process(pid, NEED), Process(1, 7 * GIB))))
    wait_for(lambda: free_seen(daemon), lambda free: free == 9 * GIB)
    daemon.started("two")


def test_processes_are_told_by_instance_and_a_stop_waits_until_their_memory_is_given_back(
    engine: Engine, daemon: Daemon, machine: Machine
) -> None:
    process = Process(pid_of(engine, daemon.started("one")), 6 * GIB)
    machine.show(card(A, 1, vram_used=6 * GIB, processes=(process,)))
    (told,) = wait_for(lambda: daemon.get("gpus")["gpus"][0]["processes"])
    assert told == {"pid": process.pid, "name": "ollama", "used_bytes": 6 * GIB, "instance": "one"}
    with ThreadPoolExecutor(1) as pool:
        stop = pool.submit(daemon.begin, "one", "stop")
        wait_for(lambda: daemon.instance("one")["container"] is None)
        assert daemon.instance("one")["phase"] == "stopping"
        machine.show(card(A, 1, vram_used=6 * GIB))  # the process has gone, its memory has not
        wait_for(lambda: daemon.get("gpus")["gpus"][0]["processes"] == [])
        assert daemon.instance("one")["phase"] == "stopping"
        machine.show(card(A, 1))
        assert stop.result().json()["instance"]["phase"] == "stopped"


def test_memory_that_is_not_given_back_holds_a_stop_up_for_a_bounded_time(
    engine: Engine, daemon: Daemon, machine: Machine
) -> None:
    process = Process(pid_of(engine, daemon.started("one")), 6 * GIB)
    machine.show(card(A, 1, vram_used=6 * GIB, processes=(process,)))
    wait_for(lambda: daemon.get("gpus")["gpus"][0]["processes"])
    answer = daemon.begin("one", "stop")
    assert answer.json()["instance"]["phase"] == "stopped"
    assert WAIT_S <= answer.elapsed.total_seconds() < WAIT_S + SLACK_S
    events = [event for event in daemon.events() if event["instance"] == "one"]
    assert [event["kind"] for event in events][-2:] == ["vram_not_given_back", "stopped"]


def test_what_a_model_really_took_is_learned_and_asked_for_at_the_next_start(
    engine: Engine, daemon: Daemon, machine: Machine
) -> None:
    body = daemon.started("learns")  # nothing is known of it: it is let in
    requests.post(f"{body['endpoint']}/api/generate", json={"model": "tiny"}, timeout=10)
    machine.show(card(A, 1, vram_used=5 * GIB, processes=(Process(pid_of(engine, body), 5 * GIB),)))
    (size,) = wait_for(lambda: stored(daemon.state_dir, "SELECT * FROM learned_sizes"))
    assert (size["instance"], size["model"], size["vram_bytes"]) == ("learns", "tiny:latest", 5 * GIB)
    machine.show(card(A, 1))
    daemon.stopped("learns")
    daemon.stop()  # it is known for good
    machine.show(card(A, 1, vram_used=20 * GIB))
    daemon.start()
    answer = daemon.begin("learns", "start")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "vram_insufficient")
    assert answer.json()["error"]["details"]["needed_bytes"] == 5 * GIB


def test_what_an_adopted_instance_was_promised_still_counts(daemon: Daemon, machine: Machine) -> None:
    machine.show(card(A, 1, vram_used=12 * GIB))
    daemon.started("one")
    daemon.stop()
    daemon.start()
    daemon.wait_for_phase("one", "ready")
    answer = daemon.begin("two", "start")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "vram_insufficient")
