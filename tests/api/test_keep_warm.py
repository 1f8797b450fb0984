"""Models that stay in memory where a role says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import requests

from tests.support.daemon import wait_for
from tests.support.gateway import gateway_over

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.gateway import Gateway

FOREVER = "2100"


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    roles = {
        "chat": {"model": "tiny", "keep_warm": ["one"]},
        "vectors": {"kind": "embed", "model": "minilm", "keep_warm": ["one"]},
    }
    with gateway_over(tmp_path, ("one", "two"), config={"roles": roles}) as gateway:
        yield gateway


def loaded(gateway: Gateway, instance: str) -> dict[str, str]:
    models = requests.get(f"{gateway.servers[instance].url}/api/ps", timeout=10).json()["models"]
    return {model["name"]: model["expires_at"] for model in models}


def kept(gateway: Gateway, instance: str, *models: str, within_s: float = 15) -> None:
    wait_for(
        lambda: loaded(gateway, instance),
        lambda found: set(found) == set(models) and all(until > FOREVER for until in found.values()),
        within_s=within_s,
    )


def events(gateway: Gateway, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in gateway.events() if event["kind"] in kinds]


def change(gateway: Gateway, role: str, **values: Any) -> requests.Response:
    return gateway.call("POST", "/api/settings/models", json={"roles": {role: values}})


def test_the_models_of_roles_stay_in_memory_there_and_nowhere_else(gateway: Gateway) -> None:
    kept(gateway, "one", "tiny:latest", "minilm:latest")
    assert loaded(gateway, "two") == {}
    wait_for(lambda: gateway.get("/v1/models/tiny")["status"], lambda status: status == "ready")
    (first, second) = wait_for(lambda: events(gateway, "kept_warm"), lambda found: len(found) == 2)
    assert {first["detail"], second["detail"]} == {"tiny for chat", "minilm for vectors"}


@pytest.mark.parametrize("keep_alive", [0, "1s", "5s"])
def test_a_client_that_wants_it_shorter_does_not_have_it_unloaded_for_long(
    gateway: Gateway, keep_alive: int | str
) -> None:
    kept(gateway, "one", "tiny:latest", "minilm:latest")
    body = {"model": "tiny@one", "messages": [], "stream": False, "keep_alive": keep_alive}
    assert gateway.call("POST", "/api/chat", json=body).status_code == 200
    kept(gateway, "one", "tiny:latest", "minilm:latest")
    assert len(events(gateway, "kept_warm", "keep_warm_failed")) == 2, "a reload is no event"


def test_a_role_is_kept_warm_and_let_go_live(gateway: Gateway) -> None:
    kept(gateway, "one", "tiny:latest", "minilm:latest")
    assert change(gateway, "chat", keep_warm=["two"]).status_code == 200
    kept(gateway, "two", "tiny:latest")
    wait_for(lambda: loaded(gateway, "one")["tiny:latest"], lambda until: until < FOREVER, within_s=15)
    assert change(gateway, "vectors", keep_warm=[]).status_code == 200
    wait_for(lambda: loaded(gateway, "one")["minilm:latest"], lambda until: until < FOREVER, within_s=15)


def test_a_model_that_is_kept_warm_is_not_unloaded_by_an_operator(gateway: Gateway) -> None:
    kept(gateway, "one", "tiny:latest", "minilm:latest")
    answer = gateway.call("POST", "instances/one/unload", json={"model": "tiny"})
    assert answer.status_code == 409
    assert "the role 'chat' keeps tiny warm on one" in answer.json()["error"]["message"]
    assert gateway.call("POST", "instances/two/unload", json={"model": "tiny"}).status_code == 200


def test_a_drained_instance_is_left_alone_and_has_its_models_again_after_it(gateway: Gateway) -> None:
    kept(gateway, "one", "tiny:latest", "minilm:latest")
    assert gateway.call("POST", "instances/one/drain", json={}).status_code == 200
    url = gateway.servers["one"].url
    requests.post(
        f"{url}/api/generate", json={"model": "tiny", "keep_alive": 0}, timeout=10
    ).raise_for_status()
    assert change(gateway, "vectors", keep_warm=["two"]).status_code == 200
    kept(gateway, "two", "minilm:latest")  # the keeper has looked at all instances since
    assert "tiny:latest" not in loaded(gateway, "one")
    assert gateway.call("POST", "instances/one/resume").status_code == 200
    wait_for(lambda: loaded(gateway, "one"), lambda found: "tiny:latest" in found, within_s=15)


def test_a_load_ends_when_its_role_is_kept_warm_no_longer(tmp_path: Path) -> None:
    roles = {"chat": {"model": "tiny", "keep_warm": ["one"]}}
    knobs = {"one": {"load_s": 300}}
    with gateway_over(tmp_path, ("one", "two"), knobs=knobs, config={"roles": roles}) as gateway:
        wait_for(lambda: gateway.instance("one")["in_flight"], lambda count: count == 1)
        assert change(gateway, "chat", keep_warm=["two"]).status_code == 200
        wait_for(
            lambda: (gateway.instance("one")["in_flight"], loaded(gateway, "one")),
            lambda now: now == (0, {}),
            within_s=15,
        )
        kept(gateway, "two", "tiny:latest")
        assert events(gateway, "keep_warm_failed") == [], "nothing has failed"


def test_a_drain_does_not_wait_for_a_model_that_is_loaded_to_be_kept(tmp_path: Path) -> None:
    roles = {"chat": {"model": "tiny", "keep_warm": ["one"]}}
    knobs = {"one": {"load_s": 300}}
    with gateway_over(tmp_path, ("one",), knobs=knobs, config={"roles": roles}) as gateway:
        wait_for(lambda: gateway.instance("one")["in_flight"], lambda count: count == 1)
        answer = gateway.call("POST", "instances/one/drain", json={}, params={"wait": "true"}, timeout_s=15)
        assert (answer.status_code, answer.json()["instance"]["in_flight"]) == (200, 0), answer.text
        wait_for(lambda: loaded(gateway, "one"), lambda found: not found, within_s=15)
        assert events(gateway, "keep_warm_failed") == []


def test_a_model_that_is_denied_by_name_cannot_be_kept_warm(tmp_path: Path) -> None:
    roles = {"chat": {"model": "tiny"}}
    rules = {"one": {"deny_models": ["tiny"]}}
    with gateway_over(tmp_path, ("one",), config={"roles": roles}, instances=rules) as gateway:
        answer = change(gateway, "chat", keep_warm=["one"])
        assert answer.status_code == 422
        message = answer.json()["error"]["message"]
        assert "roles.chat.keep_warm: one must not run 'tiny' (deny_models tiny)" in message


def test_a_model_that_is_denied_by_its_size_is_told_of_and_shown(tmp_path: Path) -> None:
    roles = {"vectors": {"kind": "embed", "model": "minilm", "keep_warm": ["one", "two"]}}
    rules = {"one": {"max_parameters": "1m"}}
    with gateway_over(tmp_path, ("one", "two"), config={"roles": roles}, instances=rules) as gateway:
        kept(gateway, "two", "minilm:latest")
        wait_for(
            lambda: {one["name"]: one["keep_warm"] for one in gateway.get("lanes")["lanes"]}["vectors"],
            lambda found: (
                found
                == [
                    {
                        "instance": "one",
                        "is_kept": False,
                        "reason": "host_denied",
                        "detail": "it is denied there (max_parameters 1m)",
                    },
                    {"instance": "two", "is_kept": True, "reason": None, "detail": ""},
                ]
            ),
            within_s=15,
        )
        (event,) = events(gateway, "keep_warm_failed")
        assert (event["instance"], event["reason"]) == ("one", "host_denied")
        assert loaded(gateway, "one") == {}


def test_what_cannot_be_kept_is_told_once_and_tried_again(tmp_path: Path) -> None:
    roles = {
        "chat": {"model": "tiny", "keep_warm": ["one"]},
        "other": {"model": "nope", "keep_warm": ["one"]},
    }
    knobs = {"one": {"queue_full": True}}
    with gateway_over(tmp_path, ("one",), knobs=knobs, config={"roles": roles}) as gateway:
        found = wait_for(lambda: events(gateway, "keep_warm_failed"), lambda found: len(found) == 2)
        assert {event["reason"] for event in found} == {"overloaded", "model_missing"}
        gateway.servers["one"].set(queue_full=False)
        kept(gateway, "one", "tiny:latest", within_s=30)
        assert len(events(gateway, "keep_warm_failed")) == 2
        requests.post(
            f"{gateway.servers['one'].url}/api/copy",
            json={"source": "tiny", "destination": "nope"},
            timeout=10,
        ).raise_for_status()
        kept(gateway, "one", "tiny:latest", "nope:latest")


def test_a_denied_model_is_not_loaded_for_a_role(tmp_path: Path) -> None:
    roles = {"vectors": {"kind": "embed", "model": "minilm", "keep_warm": ["one"]}}
    rules = {"one": {"max_parameters": "1m"}}
    with gateway_over(tmp_path, ("one",), instances=rules, config={"roles": roles}) as gateway:
        (event,) = wait_for(lambda: events(gateway, "keep_warm_failed"), lambda found: found)
        assert event["reason"] == "host_denied"
        assert loaded(gateway, "one") == {}
        until = {"until": "2999-01-01T00:00:00Z"}
        assert gateway.call("POST", "instances/one/lift", json=until).status_code == 200
        kept(gateway, "one", "minilm:latest")
        wait_for(lambda: events(gateway, "kept_warm"), lambda found: found)
        assert gateway.call("DELETE", "instances/one/lift").status_code == 200
        wait_for(lambda: loaded(gateway, "one"), lambda found: found == {}, within_s=15)
        assert [event["reason"] for event in events(gateway, "keep_warm_failed")] == ["host_denied"] * 2
        assert gateway.call("POST", "instances/one/lift", json=until).status_code == 200
        kept(gateway, "one", "minilm:latest")
