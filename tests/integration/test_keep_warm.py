"""Models that roles keep warm, over everything that can end the container or the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import requests

from tests.support.daemon import wait_for

if TYPE_CHECKING:
    import docker

    from tests.integration.conftest import NewDaemon
    from tests.support.daemon import Daemon

KEPT = {"roles": {"chat": {"model": "tiny", "keep_warm": ["cpu"]}}}


def warm(daemon: Daemon, instance: str = "cpu", *, within_s: float = 30) -> dict[str, Any]:
    """Wait until the model is in memory for good; the instance then."""

    def in_memory() -> list[dict[str, Any]]:
        endpoint = daemon.instance(instance)["endpoint"]
        if endpoint is None:
            return []
        try:
            models: list[dict[str, Any]] = requests.get(f"{endpoint}/api/ps", timeout=5).json()["models"]
        except requests.RequestException:
            return []
        return models

    wait_for(
        in_memory,
        lambda found: [one["name"] for one in found if one["expires_at"] > "2100"] == ["tiny:latest"],
        within_s=within_s,
    )
    return wait_for(
        lambda: daemon.instance(instance),
        lambda body: [model["name"] for model in body["models"]] == ["tiny:latest"],
        within_s=within_s,
    )


def kinds(daemon: Daemon, *wanted: str) -> list[str]:
    return [event["kind"] for event in daemon.events() if event["kind"] in wanted]


def test_a_kept_model_survives_the_end_of_its_container_and_of_the_daemon(
    new_daemon: NewDaemon, docker_client: docker.DockerClient
) -> None:
    daemon = new_daemon(instances={"cpu": {"template": "sim", "ttl_s": 1}}, config=KEPT).start()
    first = warm(daemon)
    assert daemon.get("/v1/models/tiny")["status"] == "ready"
    assert (first["ttl_remaining_s"], first["pinned"]) == (None, False), "its idle clock stands still"

    docker_client.containers.get(first["container"]["id"]).restart(timeout=1)
    second = warm(daemon)
    assert second["container"]["id"] == first["container"]["id"]

    docker_client.containers.get(first["container"]["id"]).kill()
    wait_for(lambda: daemon.instance("cpu"), lambda body: body["container"] != first["container"])
    third = warm(daemon)
    assert third["container"]["id"] != first["container"]["id"]

    daemon.kill()
    daemon.start()
    fourth = warm(daemon)
    assert fourth["container"]["id"] == third["container"]["id"], "it was adopted"

    daemon.kill()
    docker_client.containers.get(third["container"]["id"]).remove(force=True)
    daemon.start()
    warm(daemon)

    swept = daemon.call("POST", "reap").json()["instances"]
    assert swept == [{"id": "cpu", "action": "kept", "detail": "a role keeps a model warm there"}]
    assert kinds(daemon, "kept_warm", "keep_warm_failed").count("kept_warm") <= 4, "no event without a change"


def test_a_kept_instance_gives_no_place_to_others_and_is_let_go_live(new_daemon: NewDaemon) -> None:
    instances = {"cpu": {"template": "sim", "ttl_s": 1}, "other": {"template": "sim"}}
    daemon = new_daemon(instances=instances, lifecycle={"max_running": 1}, config=KEPT).start()
    warm(daemon)
    refused = daemon.begin("other", "start")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "max_running_reached")
    change: dict[str, Any] = {"roles": {"chat": {"keep_warm": []}}}
    assert daemon.call("POST", "/api/settings/models", json=change).status_code == 200
    daemon.wait_for_phase("cpu", "stopped")  # its TTL has run out
    assert daemon.begin("other", "start").status_code == 200


def test_an_operators_stop_holds_until_the_next_start(new_daemon: NewDaemon) -> None:
    roles = {**KEPT["roles"], "output": {"model": "tiny"}}
    instances = {"cpu": {"template": "sim"}, "second": {"template": "sim"}}
    daemon = new_daemon(instances=instances, config={"roles": roles}).start()
    warm(daemon)
    daemon.stopped("cpu")
    change = {"roles": {"output": {"keep_warm": ["second"]}}}
    assert daemon.call("POST", "/api/settings/models", json=change).status_code == 200
    warm(daemon, "second")  # every instance was looked at since
    assert daemon.instance("cpu")["phase"] == "stopped"
    body = {"model": "tiny@cpu", "messages": [], "stream": False}
    assert daemon.call("POST", "/api/chat", json=body).status_code == 200, "a request starts it"
    models = requests.get(f"{daemon.instance('cpu')['endpoint']}/api/ps", timeout=5).json()["models"]
    body = {"model": models[0]["name"], "keep_alive": 0}
    requests.post(
        f"{daemon.instance('cpu')['endpoint']}/api/generate", json=body, timeout=5
    ).raise_for_status()
    warm(daemon)  # the stop counts no more


def test_a_drained_instance_stays_out_and_is_warm_again_after_it(new_daemon: NewDaemon) -> None:
    daemon = new_daemon(config=KEPT).start()
    warm(daemon)
    assert daemon.call("POST", "instances/cpu/drain", json={"reason": "new driver"}).status_code == 200
    daemon.wait_for_phase("cpu", "stopped")
    answer = daemon.call("POST", "instances/cpu/load", json={"model": "tiny"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "drained"), answer.text
    assert daemon.call("POST", "instances/cpu/resume").status_code == 200
    warm(daemon)


def test_a_load_starts_the_instance_and_an_unload_starts_nothing(new_daemon: NewDaemon) -> None:
    daemon = new_daemon().start()
    answer = daemon.call("POST", "instances/cpu/unload", json={"model": "tiny"})
    assert (answer.status_code, answer.json()["changed"]) == (200, False), answer.text
    assert daemon.instance("cpu")["phase"] == "stopped"
    answer = daemon.call("POST", "instances/cpu/load", json={"model": "minilm", "keep_alive": -1})
    assert (answer.status_code, answer.json()["changed"]) == (200, True), answer.text
    instance = answer.json()["instance"]
    assert (instance["phase"], [model["name"] for model in instance["models"]]) == (
        "ready",
        ["minilm:latest"],
    )
    assert daemon.get("/v1/models/minilm")["status"] == "ready"


def test_prewarm_loads_the_models_of_the_roles_that_live_there(new_daemon: NewDaemon) -> None:
    roles = {"chat": {"model": "tiny", "target": "warm"}, "vectors": {"kind": "embed", "model": "minilm"}}
    daemon = new_daemon(
        instances={"warm": {"template": "sim", "prewarm": True}, "cold": {"template": "sim"}},
        config={"roles": roles},
    ).start()
    wait_for(
        lambda: [model["name"] for model in daemon.instance("warm")["models"]],
        lambda names: names == ["tiny:latest"],
        within_s=30,
    )
    assert daemon.instance("cold")["phase"] == "stopped"
