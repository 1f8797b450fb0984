"""Instances as services of Docker Swarm, on two real engines that form a swarm."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.simulated.image import IMAGE
from tests.support.daemon import Daemon, wait_for
from tests.support.fixtures import FAST, write_templates
from tests.support.swarm import Swarm, SwarmHost, swarm_obstacles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import requests

pytestmark = pytest.mark.skipif(bool(swarm_obstacles()), reason="; ".join(swarm_obstacles()))

CARD = "GPU-aaaaaaaa-0000-4000-8000-000000000001"
OTHER_CARD = "GPU-bbbbbbbb-0000-4000-8000-000000000002"
LABEL = "ollama-manager.manager"

NewDaemon = Any


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    with Swarm(cards={"worker": (CARD, OTHER_CARD)}) as swarm:
        yield swarm
    swarm.assert_clean()


@pytest.fixture
def new_daemon(swarm: Swarm, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Makes daemons on the manager node; afterwards their services are gone."""
    made: list[Daemon] = []

    def make(name: str = "daemon", *, templates: Any = None, **config: Any) -> Daemon:
        lifecycle = {**FAST, **config.pop("lifecycle", {})}
        home = tmp_path / name
        whole = {
            "gpus": "none",
            "instances": {},
            "roles": {},
            "templates": {"dir": str(write_templates(home / "templates", templates or {}))},
            "swarm": {"reach": "host"},
            "lifecycle": lifecycle,
            **config,
        }
        for host in swarm.hosts:  # another test may just have mended one
            host.wait_for_state("ready")
        daemon = Daemon(home, whole, engine_url=swarm.manager.url)
        made.append(daemon)
        return daemon

    yield make
    for daemon in made:
        daemon.__exit__()
    api: Any = swarm.client().api
    for daemon in made:
        for service in services_of(swarm, daemon):
            api.remove_service(service["ID"])


def services_of(swarm: Swarm, daemon: Daemon) -> list[dict[str, Any]]:
    api: Any = swarm.client().api
    found: list[dict[str, Any]] = api.services(filters={"label": f"{LABEL}={daemon.manager_id}"})
    return found


def on(host: SwarmHost, **more: Any) -> dict[str, Any]:
    return {"driver": "swarm", "template": "sim", "placement": [f"node.hostname=={host.hostname}"], **more}


def chat(daemon: Daemon, model: str, **more: Any) -> requests.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False, **more}
    return daemon.call("POST", "/api/chat", json=body)


def replicas(swarm: Swarm, daemon: Daemon) -> list[int]:
    return [one["Spec"]["Mode"]["Replicated"]["Replicas"] for one in services_of(swarm, daemon)]


def test_an_instance_on_another_host_starts_answers_and_stops_by_scaling(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}).start()
    assert daemon.instance("far")["phase"] == "stopped"
    answer = chat(daemon, "tiny@far")
    assert answer.status_code == 200, f"{answer.text}\n{daemon.log()}"
    assert answer.headers["X-Instance"] == "far"
    body = daemon.instance("far")
    assert (body["phase"], body["driver"]) == ("ready", "swarm")
    assert body["endpoint"].startswith(f"http://{swarm.worker.address}:")
    (service,) = services_of(swarm, daemon)
    assert replicas(swarm, daemon) == [1]
    daemon.stopped("far")
    assert replicas(swarm, daemon) == [0]
    assert daemon.instance("far")["phase"] == "stopped"
    daemon.started("far")
    (again,) = services_of(swarm, daemon)
    assert again["ID"] == service["ID"], "the service stays, and is scaled"


def test_a_daemon_that_was_killed_adopts_its_services(swarm: Swarm, new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}).start()
    daemon.started("far")
    (task,) = swarm.tasks(services_of(swarm, daemon)[0]["ID"])
    daemon.kill()
    daemon.start()
    body = daemon.wait_for_phase("far", "ready")
    assert body["starts"] == 1
    (after,) = swarm.tasks(services_of(swarm, daemon)[0]["ID"])
    assert after["ID"] == task["ID"]
    assert chat(daemon, "tiny@far").status_code == 200


def test_a_changed_template_is_shown_and_the_service_made_anew(swarm: Swarm, new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}).start()
    daemon.started("far")
    (before,) = services_of(swarm, daemon)
    daemon.stop()
    write_templates(daemon.home / "templates", {"sim": {"env": {"OLLAMA_NUM_PARALLEL": "3"}}})
    daemon.start()
    daemon.wait_for_phase("far", "ready")

    def environment() -> list[str]:
        (service,) = services_of(swarm, daemon)
        assert service["ID"] == before["ID"]
        found: list[str] = service["Spec"]["TaskTemplate"]["ContainerSpec"]["Env"]
        return found

    wait_for(environment, lambda env: "OLLAMA_NUM_PARALLEL=3" in env)
    daemon.wait_for_phase("far", "ready")


def test_a_service_is_as_hard_as_services_allow(swarm: Swarm, new_daemon: NewDaemon) -> None:
    template = {"sim": {"limits": {"memory": "256m", "pids": 64, "shm": "32m"}}}
    daemon = new_daemon(instances={"far": on(swarm.worker)}, templates=template).start()
    daemon.started("far")
    (container,) = swarm.worker.client().containers.list()
    inspected = container.attrs
    host, config = inspected["HostConfig"], inspected["Config"]
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert host["Memory"] == 256 * 2**20
    assert host["PidsLimit"] == 64
    assert host["Privileged"] is False
    assert "NVIDIA_VISIBLE_DEVICES=void" in config["Env"]
    mounts = {one["Destination"]: one["Type"] for one in inspected["Mounts"]}
    assert {"/tmp": "tmpfs", "/dev/shm": "tmpfs"}.items() <= mounts.items()
    shm = next(one for one in host["Mounts"] if one["Target"] == "/dev/shm")
    assert shm["TmpfsOptions"]["SizeBytes"] == 32 * 2**20


def test_a_card_is_bound_to_its_instance_on_the_node_that_advertises_it(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    gpu = {"driver": "swarm", "template": "sim-gpu", "device": OTHER_CARD}
    daemon = new_daemon(instances={"big": gpu}).start()
    daemon.started("big")
    (service,) = services_of(swarm, daemon)
    (task,) = swarm.tasks(service["ID"])
    assert task["NodeID"] == swarm.worker.node_id
    (container,) = swarm.worker.client().containers.list()
    assert f"NVIDIA_VISIBLE_DEVICES={OTHER_CARD}" in container.attrs["Config"]["Env"]
    body = daemon.instance("big")
    assert [one["uuid"] for one in body["device"]["cards"]] == [OTHER_CARD]
    cards = {one["uuid"]: one for one in daemon.get("gpus")["gpus"]}
    assert cards[OTHER_CARD]["vram_free_bytes"] is None, "nobody has measured it"


def test_a_card_instance_runs_on_when_its_node_changes(swarm: Swarm, new_daemon: NewDaemon) -> None:
    gpu = {"driver": "swarm", "template": "sim-gpu", "device": CARD}
    daemon = new_daemon(instances={"big": gpu}).start()
    daemon.started("big")
    (service,) = services_of(swarm, daemon)
    swarm.worker.label(changed="once")
    # Swarm judges tasks anew: those of a node when that changes, and all when a manager begins.
    swarm.manager.restart()
    daemon.wait_until_ready()
    for host in swarm.hosts:
        host.wait_for_state("ready")
    time.sleep(1)
    (task,) = swarm.tasks(service["ID"])
    assert task["Status"]["State"] == "running", task["Status"]
    assert chat(daemon, "tiny@big").status_code == 200
    assert daemon.instance("big")["starts"] == 1


def test_a_card_that_no_node_has_is_refused_with_its_name(swarm: Swarm, new_daemon: NewDaemon) -> None:
    missing = "GPU-cccccccc-0000-4000-8000-000000000003"
    gpu = {"driver": "swarm", "template": "sim-gpu", "device": missing}
    daemon = new_daemon(instances={"big": gpu}).start()
    answer = daemon.begin("big", "start")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "gpu_missing")
    assert missing in answer.json()["error"]["message"]
    assert services_of(swarm, daemon) == []


def test_a_placement_that_no_node_meets_fails_the_start_and_leaves_nothing_to_start_later(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    nowhere = {"driver": "swarm", "template": "sim", "placement": ["node.labels.disk==fast"]}
    daemon = new_daemon(instances={"lost": nowhere}).start()
    answer = daemon.begin("lost", "start")
    assert answer.status_code == 503
    assert "no suitable node" in answer.json()["error"]["message"]
    assert replicas(swarm, daemon) == [0]
    time.sleep(2 * FAST["resync_interval_s"])
    assert "no suitable node" in daemon.instance("lost")["reason"]["message"], "the reason stays"


def test_an_image_that_the_node_has_not_fails_the_start_with_its_name(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    gone = {"gone": {"image": "ollama-manager/simulated:gone"}}
    daemon = new_daemon(instances={"gone": on(swarm.worker, template="gone")}, templates=gone).start()
    answer = daemon.begin("gone", "start")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "image_missing"), answer.text
    assert "simulated:gone" in answer.json()["error"]["message"]
    assert replicas(swarm, daemon) == [0]


def test_a_server_that_ends_at_its_start_is_reported_with_its_last_words(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    broken = {"broken": {"env": {"OLLAMA_SIM_CRASH": "start"}}}
    daemon = new_daemon(
        instances={"broken": on(swarm.worker, template="broken")},
        templates=broken,
        allow={"env": ["OLLAMA_*"]},
    ).start()
    answer = daemon.begin("broken", "start")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "container_exited"), answer.text
    assert daemon.instance("broken")["reason"]["log_tail"]
    assert replicas(swarm, daemon) == [0]


def test_an_idle_instance_is_stopped_and_a_busy_one_is_not(swarm: Swarm, new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker, ttl_s=2)}).start()
    daemon.started("far")
    answers: list[requests.Response] = []
    slow = threading.Thread(
        target=lambda: answers.append(chat(daemon, "tiny@far", options={"num_predict": 200}))
    )
    slow.start()
    slow.join()
    assert answers[0].status_code == 200
    daemon.wait_for_phase("far", "stopped", within_s=30)
    assert replicas(swarm, daemon) == [0]


def test_a_service_that_an_operator_scales_to_zero_is_stopped_and_not_failed(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}).start()
    daemon.started("far")
    services: Any = swarm.client().services
    service = services.get(services_of(swarm, daemon)[0]["ID"])
    service.scale(0)
    body = daemon.wait_for_phase("far", "stopped", within_s=10)
    assert body["reason"] is None
    assert chat(daemon, "tiny@far").status_code == 200, "and the next request starts it"


def test_a_service_that_swarm_moves_is_followed(swarm: Swarm, new_daemon: NewDaemon) -> None:
    either = {"driver": "swarm", "template": "sim"}
    daemon = new_daemon(instances={"any": either}).start()
    daemon.started("any")
    (service,) = services_of(swarm, daemon)
    (task,) = swarm.tasks(service["ID"])
    host = next(one for one in swarm.hosts if one.node_id == task["NodeID"])
    other = next(one for one in swarm.hosts if one is not host)
    host.drain()
    try:
        # Its container ends with the node; the next request has it started on the other one.
        wait_for(lambda: daemon.instance("any")["phase"], lambda phase: phase != "ready", within_s=10)
        answer = chat(daemon, "tiny@any")
        assert answer.status_code == 200, answer.text
        assert daemon.instance("any")["endpoint"].startswith(f"http://{other.address}:")
    finally:
        host.activate()


def test_a_service_without_an_instance_is_shown_and_left_alone(swarm: Swarm, new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker), "old": on(swarm.worker)}).start()
    daemon.started("old")
    daemon.stop()
    daemon.configure({**daemon.config, "instances": {"far": on(swarm.worker)}})
    daemon.start()
    (orphan,) = wait_for(lambda: daemon.get("orphans")["orphans"])
    assert orphan["name"] == f"{daemon.manager_id}-ollama-old"
    assert orphan["remedy"] == f"docker service rm {orphan['name']}"
    assert len(services_of(swarm, daemon)) == 1


def test_the_nodes_give_instances_for_their_cpu_and_their_cards(swarm: Swarm, new_daemon: NewDaemon) -> None:
    templates = {"ollama-cpu": {}, "ollama-gpu": {"device": "gpu"}}
    daemon = new_daemon(swarm={"reach": "host", "instances": "auto"}, templates=templates).start()
    wanted = {"worker-cpu", "worker-gpu0", "worker-gpu1"}
    wait_for(lambda: {one["id"] for one in daemon.get("instances")["instances"]}, wanted.__eq__)
    answer = chat(daemon, "tiny@worker-gpu1")
    assert answer.status_code == 200, answer.text
    found = daemon.get("instances")["instances"]
    cards = {one["id"]: [card["uuid"] for card in one["device"]["cards"]] for one in found}
    assert cards == {"worker-cpu": [], "worker-gpu0": [CARD], "worker-gpu1": [OTHER_CARD]}
    daemon.kill()
    daemon.start()
    daemon.wait_for_phase("worker-gpu1", "ready")


def test_programs_and_people_see_the_node_of_each_instance(swarm: Swarm, new_daemon: NewDaemon) -> None:
    anywhere = {"driver": "swarm", "template": "sim"}
    daemon = new_daemon(instances={"far": on(swarm.worker), "any": anywhere}).start()
    assert [daemon.instance(name)["node"] for name in ("far", "any")] == ["worker", None]
    daemon.started("any")
    assert daemon.instance("any")["node"] in ("manager", "worker")
    daemon.started("far")
    hosts = {one["name"]: one for one in daemon.call("GET", "/v1/cluster/hosts").json()["hosts"]}
    worker = hosts["worker"]
    assert (worker["kind"], worker["state"], worker["address"]) == ("node", "ready", swarm.worker.address)
    assert "far" in worker["instances"]
    assert [card["uuid"] for card in worker["gpus"]] == [CARD, OTHER_CARD]
    swarm.worker.drain()
    try:
        body = daemon.wait_for_phase("far", "failed", "unavailable", within_s=20)
        assert "worker is drained" in body["reason"]["message"]
    finally:
        swarm.worker.activate()


def test_doctor_names_the_nodes_and_what_an_instance_lacks(swarm: Swarm, new_daemon: NewDaemon) -> None:
    lost = {"driver": "swarm", "template": "sim", "placement": ["node.hostname==gone"]}
    daemon = new_daemon(instances={"far": on(swarm.worker), "lost": lost}).start()
    command = [sys.executable, "-m", "manager", "doctor", "--json", "--config", str(daemon.config_file)]
    done = subprocess.run(
        command, env=daemon.environment, check=False, capture_output=True, text=True, timeout=60
    )
    checks = {one["check"]: one for one in json.loads(done.stdout)["checks"]}
    assert checks["swarm"]["verdict"] == "ok", checks
    assert "worker (2 cards)" in checks["swarm"]["message"]
    assert checks["placement"]["message"] == "lost wants node gone, which is not in the swarm"
    assert "image" not in checks, "those of nodes are not on this engine"


def test_requests_go_elsewhere_when_a_host_is_lost_and_back_when_it_returns(
    swarm: Swarm, new_daemon: NewDaemon
) -> None:
    role = {"work": {"model": "tiny", "kind": "generate", "instances": ["far", "near"]}}
    daemon = new_daemon(
        instances={"far": on(swarm.worker, priority=1), "near": on(swarm.manager)}, roles=role
    ).start()
    daemon.started("far")
    daemon.started("near")
    assert chat(daemon, "work").headers["X-Instance"] == "far"
    swarm.worker.cut_network()
    try:
        began = time.monotonic()
        # Sent on a connection that is kept: nobody says that it leads nowhere.
        at_once: list[requests.Response] = []
        caught = threading.Thread(target=lambda: at_once.append(chat(daemon, "work")))
        caught.start()
        wait_for(lambda: daemon.instance("far")["health"], lambda health: health != "healthy", within_s=10)
        assert time.monotonic() - began < 2 * FAST["probe_interval_s"] + 2, "two probe intervals, and some"
        answer = chat(daemon, "work")
        assert (answer.status_code, answer.headers["X-Instance"]) == (200, "near")
        caught.join(timeout=30)
        assert [(one.status_code, one.headers["X-Instance"]) for one in at_once] == [(200, "near")]
        swarm.worker.wait_for_state("down")
        body = daemon.wait_for_phase("far", "failed", "unavailable", within_s=15)
        assert "worker is down" in body["reason"]["message"]
    finally:
        swarm.worker.mend_network()
    daemon.wait_for_phase("far", "failed", "stopped", within_s=15)
    daemon.started("far")
    assert chat(daemon, "tiny@far").status_code == 200


def test_the_managers_engine_restarts_under_the_daemon(swarm: Swarm, new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}).start()
    daemon.started("far")
    swarm.manager.kill()
    # The instance on the other host answers on, whatever becomes of the managers.
    assert chat(daemon, "tiny@far").status_code == 200
    wait_for(lambda: daemon.call("GET", "/readyz").status_code, lambda status: status == 503, within_s=15)
    assert chat(daemon, "tiny@far").status_code == 200
    swarm.manager.start()
    daemon.wait_until_ready()
    daemon.wait_for_phase("far", "ready", within_s=30)
    for host in swarm.hosts:
        host.wait_for_state("ready")
    assert chat(daemon, "tiny@far").status_code == 200


def test_a_name_in_use_by_somebody_elses_service_is_refused(swarm: Swarm, new_daemon: NewDaemon) -> None:
    daemon = new_daemon(instances={"far": on(swarm.worker)}).start()
    services: Any = swarm.client().services
    foreign = services.create(
        IMAGE, name=f"{daemon.manager_id}-ollama-far", mode={"Replicated": {"Replicas": 0}}
    )
    try:
        answer = daemon.begin("far", "start")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "name_conflict"), answer.text
        assert f"docker service rm {daemon.manager_id}-ollama-far" in answer.json()["error"]["message"]
    finally:
        foreign.remove()


def test_a_bind_of_a_directory_is_refused_for_services(swarm: Swarm, new_daemon: NewDaemon) -> None:
    bound = {"bound": {"volumes": [{"source": "/srv/models", "target": "/models", "read_only": True}]}}
    daemon = new_daemon(
        instances={"far": on(swarm.worker, template="bound")}, templates=bound, allow={"binds": ["/srv"]}
    ).start(until_ready=False)
    assert daemon.wait_until_dead() == 2
    assert "/srv/models" in daemon.log()
