"""Models that an operator loads on an instance, and unloads from it."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import requests

from tests.support.daemon import wait_for
from tests.support.gateway import gateway_over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemon import Daemon
    from tests.support.gateway import Gateway

ROLES = {"roles": {"thinking": {"model": "tiny"}, "empty": {}}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    knobs = {"two": {"models": "tiny"}}
    with gateway_over(
        tmp_path_factory.mktemp("loading"),
        ("one", "two"),
        knobs=knobs,
        config=ROLES,
        instances={"gone": {"driver": "external", "url": "http://127.0.0.1:9"}},
    ) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared: Gateway) -> Iterator[Gateway]:
    yield shared
    for server in shared.servers.values():
        server.set(load_s=0, queue_full=False, false_load="")
        for entry in requests.get(f"{server.url}/api/ps", timeout=10).json()["models"]:
            body = {"model": entry["name"], "keep_alive": 0}
            requests.post(f"{server.url}/api/generate", json=body, timeout=10).raise_for_status()
    # The daemon sees that with its next probe.
    wait_for(
        lambda: [one["models"] for one in shared.get("instances")["instances"]],
        lambda models: not any(models),
    )


def loaded(gateway: Gateway, instance: str) -> dict[str, Any]:
    models = requests.get(f"{gateway.servers[instance].url}/api/ps", timeout=10).json()["models"]
    return {model["name"]: model for model in models}


def status(gateway: Daemon, model: str) -> str:
    return str(gateway.get(f"/v1/models/{model}")["status"])


def load(gateway: Gateway, instance: str, model: str, **more: Any) -> requests.Response:
    return gateway.call("POST", f"instances/{instance}/load", json={"model": model, **more})


def unload(gateway: Gateway, instance: str, model: str) -> requests.Response:
    return gateway.call("POST", f"instances/{instance}/unload", json={"model": model})


@pytest.mark.parametrize("model", ["tiny", "minilm"])
def test_a_model_is_loaded_on_the_instance_that_is_named_and_unloaded_again(
    gateway: Gateway, model: str
) -> None:
    answer = load(gateway, "one", model)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["changed"]
    assert [one["name"] for one in body["instance"]["models"]] == [f"{model}:latest"]
    assert (list(loaded(gateway, "one")), list(loaded(gateway, "two"))) == ([f"{model}:latest"], [])
    assert status(gateway, model) == "ready"
    assert not load(gateway, "one", model).json()["changed"], "it was there already"
    answer = unload(gateway, "one", model)
    assert (answer.status_code, answer.json()["changed"]) == (200, True), answer.text
    assert answer.json()["instance"]["models"] == []
    assert (loaded(gateway, "one"), status(gateway, model)) == ({}, "not_loaded")
    assert not unload(gateway, "one", model).json()["changed"]


def test_a_model_is_loading_while_it_is(gateway: Gateway) -> None:
    gateway.servers["two"].set(load_s=2)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(load, gateway, "two", "tiny")
        wait_for(lambda: status(gateway, "tiny"), lambda now: now == "loading")
        assert gateway.instance("two")["in_flight"] == 1, "it holds a lease"
        assert asking.result().status_code == 200
    assert status(gateway, "tiny") == "ready"
    assert gateway.instance("two")["in_flight"] == 0


@pytest.mark.parametrize(("keep_alive", "stays"), [(-1, True), ("-1m", True), ("5m", False), (300, False)])
def test_the_time_to_keep_it_is_the_servers_to_read(
    gateway: Gateway, keep_alive: float | str, stays: bool
) -> None:
    assert load(gateway, "one", "tiny", keep_alive=keep_alive).status_code == 200
    until = loaded(gateway, "one")["tiny:latest"]["expires_at"]
    assert (until > "2100") is stays


def test_the_name_of_a_role_means_its_model(gateway: Gateway) -> None:
    assert load(gateway, "one", "thinking").status_code == 200
    assert list(loaded(gateway, "one")) == ["tiny:latest"]
    assert unload(gateway, "one", "thinking").json()["changed"]


@pytest.mark.parametrize(
    ("instance", "body", "code", "words"),
    [
        ("nope", {"model": "tiny"}, 404, "there is no instance 'nope'"),
        ("two", {"model": "minilm"}, 404, "model 'minilm' not found; models on two: tiny:latest"),
        ("gone", {"model": "tiny"}, 503, "gone cannot be used now"),
        ("one", {"model": "empty"}, 422, "the role 'empty' has no model"),
        ("one", {"model": "a b"}, 422, "'a b' is no possible name"),
        ("one", {"model": ""}, 422, "body.model"),
        ("one", {"model": "tiny", "keep_alive": 0}, 422, "body.keep_alive: 0; that would unload the model"),
        ("one", {"model": "tiny", "keep_alive": "2d"}, 422, "body.keep_alive: '2d'; expected seconds"),
        ("one", {"model": "tiny", "keep": 1}, 422, "body.keep"),
        ("one", {}, 422, "body.model"),
    ],
)
def test_what_cannot_be_loaded_is_refused_and_says_why(
    gateway: Gateway, instance: str, body: dict[str, Any], code: int, words: str
) -> None:
    answer = gateway.call("POST", f"instances/{instance}/load", json=body)
    assert answer.status_code == code, answer.text
    assert words in answer.json()["error"]["message"]
    assert loaded(gateway, "one") == {}


def test_a_model_that_came_behind_our_back_is_found(gateway: Gateway) -> None:
    url = gateway.servers["two"].url
    body = {"source": "tiny", "destination": "fresh"}
    requests.post(f"{url}/api/copy", json=body, timeout=10).raise_for_status()
    assert load(gateway, "two", "fresh").status_code == 200
    requests.delete(f"{url}/api/delete", json={"model": "fresh"}, timeout=10).raise_for_status()


def test_a_server_that_refuses_is_named_with_its_reason(gateway: Gateway) -> None:
    gateway.servers["two"].set(queue_full=True)
    answer = load(gateway, "two", "tiny")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded"), answer.text
    assert answer.json()["error"]["instance"] == "two"
    assert gateway.instance("two")["in_flight"] == 0


@pytest.mark.parametrize("false_load", ["nothing", "error"])
@pytest.mark.parametrize("other", ["", "minilm"])
def test_a_200_without_the_model_in_memory_is_a_load_that_failed(
    gateway: Gateway, false_load: str, other: str
) -> None:
    if other:
        assert load(gateway, "one", other).status_code == 200
    gateway.servers["one"].set(false_load=false_load)
    answer = load(gateway, "one", "tiny")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_load_failed"), answer.text
    words = "runner process has terminated" if false_load == "error" else "not in memory (/api/ps)"
    assert words in answer.json()["error"]["message"]
    assert status(gateway, "tiny") == "error"
    gateway.servers["one"].set(false_load="")
    assert load(gateway, "one", "tiny").status_code == 200
    assert status(gateway, "tiny") == "ready"


def test_a_copy_of_a_model_in_memory_is_loaded(gateway: Gateway) -> None:
    url = gateway.servers["one"].url
    body = {"source": "tiny", "destination": "copy"}
    requests.post(f"{url}/api/copy", json=body, timeout=10).raise_for_status()
    try:
        assert load(gateway, "one", "tiny").status_code == 200
        gateway.servers["one"].set(false_load="nothing")  # as Ollama, which finds the runner of the other one
        assert load(gateway, "one", "copy").status_code == 200
    finally:
        requests.delete(f"{url}/api/delete", json={"model": "copy"}, timeout=10).raise_for_status()


def leaving(gateway: Gateway, instance: str, model: str) -> socket.socket:
    """Ask for a load; the caller leaves when the socket is closed."""
    body = json.dumps({"model": model}).encode()
    head = f"POST /api/runtime/compute/instances/{instance}/load HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    caller = socket.create_connection(("127.0.0.1", urlsplit(gateway.url).port))
    caller.sendall(head.encode() + body)
    return caller


def at_work(gateway: Gateway, instance: str) -> tuple[int, list[str]]:
    """Return the leases of an instance, and what its server loads or has loaded."""
    return gateway.instance(instance)["in_flight"], list(loaded(gateway, instance))


def test_a_load_ends_when_its_caller_leaves(gateway: Gateway) -> None:
    gateway.servers["one"].set(load_s=60)
    with leaving(gateway, "one", "tiny"):
        wait_for(lambda: at_work(gateway, "one"), lambda now: now == (1, ["tiny:latest"]))
    wait_for(lambda: at_work(gateway, "one"), lambda now: now == (0, []))


@pytest.mark.parametrize("stop", [True, False])
def test_a_drain_does_not_wait_for_a_load(gateway: Gateway, stop: bool) -> None:
    gateway.servers["one"].set(load_s=60)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(load, gateway, "one", "tiny")
        wait_for(lambda: at_work(gateway, "one"), lambda now: now == (1, ["tiny:latest"]))
        answer = gateway.call("POST", "instances/one/drain", json={"stop": stop}, params={"wait": "true"})
        assert answer.status_code in (200, 202), answer.text
        refused = asking.result()
    try:
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "cancelled"), refused.text
        wait_for(lambda: at_work(gateway, "one"), lambda now: now == (0, []))
        assert status(gateway, "tiny") == "not_loaded"
    finally:
        gateway.servers["one"].set(load_s=0)
        gateway.call("POST", "instances/one/resume")


def test_unknown_models_and_instances_are_404_for_an_unload_too(gateway: Gateway) -> None:
    assert unload(gateway, "nope", "tiny").status_code == 404
    assert unload(gateway, "two", "minilm").status_code == 404
    answer = gateway.call("POST", "instances/one/unload", json={"model": "tiny", "keep_alive": 1})
    assert answer.status_code == 422
