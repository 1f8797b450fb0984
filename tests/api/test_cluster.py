"""`/v1/cluster`: the views of hosts, services, roles and health, and where requests would go."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import pytest

from manager.api.cluster import ClusterHealthBody, ClusterRolesBody, HostsBody, ServicesBody
from manager.api.cluster_routes import MatchBody, RouteBody
from tests.api.test_contract import error_of
from tests.support.daemon import COMPUTE, wait_for
from tests.support.gateway import gateway_over

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import requests

    from tests.support.gateway import Gateway

KNOBS = {"one": {"models": "tiny,qwen-coder:7b"}, "two": {"models": "tiny,minilm"}}
CONFIG = {
    "roles": {
        "thinking": {"model": "tiny", "strategy": "least_loaded", "fallbacks": ["coder"]},
        "coder": {"model": "qwen-coder:7b", "strategy": "scored"},
        "turns": {"model": "tiny", "strategy": "round_robin"},
        "later": {"model": "tiny", "mode": "async"},
        "embedding": {"model": "minilm"},
    },
    "routing": {"auto": True},
    "models": {"facts": {"tiny": {"tier": "fast"}}},
}
FAR = {"driver": "external", "url": "http://nowhere.invalid:9"}
INSTANCES = {"two": {"device": "cpu"}, "far": FAR}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("cluster")
    with gateway_over(home, ("one", "two"), knobs=KNOBS, config=CONFIG, instances=INSTANCES) as running:
        # Until it was asked once, the third one may come back.
        running.wait_for_phase("far", "unavailable")
        wait_for(lambda: running.instance("far")["reason"], lambda reason: reason is not None)
        yield running


def cluster(gateway: Gateway, path: str) -> Any:
    return gateway.get(f"/v1/cluster/{path}")


def match(gateway: Gateway, **request: Any) -> dict[str, Any]:
    answer = gateway.call("POST", "/v1/cluster/routes/match", json=request)
    assert answer.status_code == 200, answer.text
    MatchBody.model_validate(answer.json())
    found: dict[str, Any] = answer.json()
    return found


def resolved(gateway: Gateway, query: str) -> requests.Response:
    return gateway.call("GET", f"/v1/cluster/routes/resolve?{query}")


def route(gateway: Gateway, query: str) -> dict[str, Any]:
    answer = resolved(gateway, query)
    assert answer.status_code == 200, answer.text
    RouteBody.model_validate(answer.json())
    found: dict[str, Any] = answer.json()
    return found


def places(found: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one["instance"], one["model"]) for one in found["candidates"]]


# --- views ---


def test_hosts_are_the_machine_and_those_of_external_instances(gateway: Gateway) -> None:
    body = cluster(gateway, "hosts")
    HostsBody.model_validate(body)
    machine, far = body["hosts"]
    assert (machine["name"], machine["kind"]) == (platform.node(), "machine")
    assert machine["instances"] == ["one", "two"], "their URLs name this machine"
    assert (machine["engine"]["up"], machine["gpus"]) == (False, [])
    assert machine["engine"]["url"].startswith("unix://")
    assert machine["engine"]["trouble"]
    assert machine["cpu"]["count"] >= 1
    assert far == {
        "name": "nowhere.invalid",
        "kind": "external",
        "state": None,
        "address": None,
        "engine": None,
        "cpu": None,
        "gpus": [],
        "instances": ["far"],
    }
    assert body["count"] == 2


def test_services_are_the_instances_with_their_models_and_their_load(gateway: Gateway) -> None:
    gateway.call("POST", "/api/generate", json={"model": "tiny@two", "prompt": "hi", "stream": False})
    wait_for(lambda: gateway.instance("two")["models"], bool)
    body = cluster(gateway, "services")
    ServicesBody.model_validate(body)
    one, two, far = body["services"]
    assert [body["count"], one["instance"], two["instance"], far["instance"]] == [3, "one", "two", "far"]
    assert (two["driver"], two["protocol"], two["state"], two["phase"]) == (
        *("external", "ollama", "ready", "ready"),
    )
    assert two["url"] == two["endpoint"] == gateway.servers["two"].url
    assert two["models"] == ["minilm:latest", "tiny:latest"]
    assert (two["loaded_models"], two["loaded_model_count"]) == (["tiny:latest"], 1)
    assert (two["vram_used_bytes"], two["in_flight"], two["queue_depth"]) == (0, 0, 0)
    assert (far["state"], far["endpoint"]) == ("out", "http://nowhere.invalid:9")
    assert (far["models"], far["loaded_models"], far["vram_used_bytes"]) == (None, [], None)
    assert (one["host"], far["host"]) == (platform.node(), "nowhere.invalid")


def test_roles_are_listed_with_their_strategies_and_where_they_go(gateway: Gateway) -> None:
    body = cluster(gateway, "roles")
    ClusterRolesBody.model_validate(body)
    roles = {one["name"]: one for one in body["roles"]}
    assert body["count"] == len(roles) >= 8
    assert {name: roles[name]["strategy"] for name in ("thinking", "coder", "turns", "output")} == {
        "thinking": "least_loaded",
        "coder": "scored",
        "turns": "round_robin",
        "output": "warm_first",
    }
    thinking, routing = roles["thinking"], gateway.get(f"{COMPUTE}/routing")["roles"]["thinking"]
    assert {key: thinking[key] for key in routing if key != "health"} == {
        key: value for key, value in routing.items() if key != "health"
    }
    assert (thinking["models"], thinking["fallbacks"], thinking["instances"]) == (["tiny"], ["coder"], None)
    assert roles["fast"]["models"] == ["tiny"], "a tier has the models of its facts"


def test_health_counts_and_names_what_is_wrong(gateway: Gateway) -> None:
    body = cluster(gateway, "health")
    ClusterHealthBody.model_validate(body)
    assert (body["status"], body["instances"], body["able"]) == ("degraded", 3, 2)
    assert (body["phases"]["ready"], body["phases"]["unavailable"], body["phases"]["failed"]) == (2, 1, 0)
    assert sum(body["health"].values()) == 3
    (far,) = body["degraded"]
    assert (far["instance"], far["reason"]) == ("far", gateway.instance("far")["reason"]["code"])
    assert far["message"]


def test_a_cluster_without_trouble_is_ok_and_one_that_nobody_can_use_is_down(tmp_path: Path) -> None:
    with gateway_over(tmp_path, ("one",)) as gateway:
        assert cluster(gateway, "health")["status"] == "ok"
        gateway.call("POST", "instances/one/drain", json={"reason": "for the night"})
        body = cluster(gateway, "health")
        assert (body["status"], body["able"], body["degraded"]) == ("down", 0, [])
        gateway.call("POST", "instances/one/resume")
        gateway.servers["one"].set(hang="all")
        try:
            body = wait_for(lambda: cluster(gateway, "health"), lambda one: one["status"] == "down")
        finally:
            gateway.servers["one"].set(hang="")
        assert body["degraded"][0]["reason"] == "instance_unhealthy"


# --- match ---


def test_candidates_are_scored_and_the_best_is_first(gateway: Gateway) -> None:
    found = match(gateway, model="tiny")
    assert found["strategy"] == "warm_first"
    first, second, last = found["candidates"]
    assert first["score"] >= second["score"] > 0
    assert {first["instance"], second["instance"]} == {"one", "two"}
    assert (last["instance"], last["score"], last["state"]) == ("far", None, "out")
    assert last["reason"] == gateway.instance("far")["reason"]["code"]
    assert first["reason"] is None
    assert list(first["signals"]) == [
        *("text", "family", "loaded", "latency", "throughput", "queue", "benchmark")
    ]
    assert (first["signals"]["family"], first["signals"]["queue"]) == (1, 1)
    assert first["signals"]["benchmark"] is None


def test_a_loaded_model_scores_higher_and_the_limit_counts(gateway: Gateway) -> None:
    gateway.call("POST", "/api/generate", json={"model": "tiny@two", "prompt": "hi", "stream": False})
    wait_for(lambda: gateway.instance("two")["models"], bool)
    gateway.call("POST", "/api/generate", json={"model": "tiny@one", "keep_alive": 0})  # of another test
    wait_for(lambda: not gateway.instance("one")["models"], bool)
    # Routing takes in what is loaded within a second.
    wait_for(
        lambda: places(match(gateway, model="tiny", limit=1.0)), lambda found: found == [("two", "tiny")]
    )


def test_a_role_is_matched_with_its_fallbacks_and_its_strategy(gateway: Gateway) -> None:
    found = match(gateway, role="thinking")
    assert found["strategy"] == "least_loaded"
    assert set(places(found)) >= {("one", "tiny"), ("two", "tiny"), ("one", "qwen-coder:7b")}
    assert match(gateway, role="coder")["strategy"] == "scored"
    lane = match(gateway, model="tiny", role="coder")
    assert lane["strategy"] == "scored"
    assert {model for _, model in places(lane)} == {"tiny"}
    assert places(lane)[0] == ("one", "tiny") or lane["candidates"][0]["signals"]["loaded"] == 1


def test_words_find_a_model_that_nobody_named(gateway: Gateway) -> None:
    found = match(gateway, text="write code with a qwen coder")
    signals = {(one["instance"], one["model"]): one["signals"] for one in found["candidates"]}
    assert {place: one["family"] for place, one in signals.items()} == {
        ("one", "qwen-coder:7b"): 1,
        ("one", "tiny:latest"): 0,
        ("two", "tiny:latest"): 0,
    }
    assert signals["one", "tiny:latest"]["text"] > signals["two", "tiny:latest"]["text"] == 0
    assert ("two", "minilm:latest") not in places(found), "it embeds"
    assert "far" not in [instance for instance, _ in places(found)], "its models are not known"
    assert all(one["signals"]["text"] is None for one in match(gateway)["candidates"])
    assert places(match(gateway, kind="embed")) == [("two", "minilm:latest")]


def test_auto_is_matched_as_the_role_that_its_words_need(gateway: Gateway) -> None:
    found = match(gateway, model="auto", text="Is the mood good? yes/no")
    assert {model for _, model in places(found)} == {"tiny"}
    error = error_of(gateway.call("POST", "/v1/cluster/routes/match", json={"model": "auto:complex"}), 404)
    assert error["code"] == "model_missing"


@pytest.mark.parametrize(
    "request_",
    [
        {"limit": 0},
        {"limit": 1001},
        {"limit": 1.5},
        {"limit": "1"},
        {"limit": True},
        {"model": ""},
        {"x": 1},
        {"kind": "no"},
    ],
)
def test_a_wrong_match_is_refused(gateway: Gateway, request_: dict[str, Any]) -> None:
    error_of(gateway.call("POST", "/v1/cluster/routes/match", json=request_), 422)


# --- resolve ---


def test_a_route_is_where_a_request_goes(gateway: Gateway) -> None:
    found = route(gateway, "role=coder")
    assert {key: value for key, value in found.items() if key not in ("score", "because")} == {
        "instance": "one",
        "model": "qwen-coder:7b",
        "role": "coder",
        "endpoint": gateway.servers["one"].url,
        "fallback": None,
    }
    assert found["because"] in {"running", "loaded"}
    assert 0 < found["score"] <= 1
    assert route(gateway, "model=tiny@two")["instance"] == "two"
    assert route(gateway, "role=embedding")["instance"] == "two", "the kind is that of the role"


def test_a_look_takes_no_turn_and_a_request_does(gateway: Gateway) -> None:
    seen = {route(gateway, "role=turns")["instance"] for _ in range(3)}
    assert len(seen) == 1
    before = seen.pop()
    answer = gateway.call("POST", "/api/generate", json={"model": "turns", "prompt": "hi", "stream": False})
    assert answer.headers["X-Instance"] == before
    assert route(gateway, "role=turns")["instance"] != before


@pytest.mark.parametrize(
    ("query", "code", "message"),
    [
        ("", "model_missing", "names no model and no role"),
        ("model=nope", "model_missing", "model 'nope' not found"),
        ("role=nope", "model_missing", "there is no role 'nope'"),
        ("role=control", "model_missing", "the role 'control' has no model"),
        ("model=tiny@far", "", "far"),
        ("model=x@nowhere", "instance_unavailable", "there is no instance 'nowhere'"),
        ("role=later", "policy", "takes runs only"),
        ("model=tiny&role=embedding&kind=generate", "policy", "'embedding'"),
    ],
)
def test_a_request_that_nothing_can_take_has_no_route_and_hears_why(
    gateway: Gateway, query: str, code: str, message: str
) -> None:
    error = error_of(resolved(gateway, query), 404)
    assert message in error["message"]
    assert error["code"] == code or not code


def test_a_denied_model_has_no_route(tmp_path: Path) -> None:
    with gateway_over(tmp_path, ("one",), instances={"one": {"deny_models": ["tiny"]}}) as gateway:
        assert error_of(resolved(gateway, "model=tiny"), 404)["code"] == "host_denied"
        (one,) = [one for one in match(gateway)["candidates"] if one["model"] == "tiny:latest"]
        assert (one["score"], one["reason"]) == (None, "host_denied")


@pytest.mark.parametrize("query", ["x=1", "model=tiny&kind=no", "model="])
def test_a_wrong_query_is_refused(gateway: Gateway, query: str) -> None:
    error_of(resolved(gateway, query), 422)


def test_what_is_not_there_is_told_in_the_shape_of_the_control_api(gateway: Gateway) -> None:
    error_of(gateway.call("GET", "/v1/cluster/nothing"), 404)
    error_of(gateway.call("DELETE", "/v1/cluster/hosts"), 405)
