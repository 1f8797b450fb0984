"""Models that an instance must not run, and the time for which an operator permits it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.daemon import wait_for
from tests.support.gateway import gateway_over

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import requests

    from tests.support.gateway import Gateway

PATHS = ("/api/chat", "/v1/chat/completions", "/v1/messages")


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    knobs = {
        "one": {"models": "tiny:32b,tiny,minilm"},
        "two": {"models": "tiny:32b,tiny", "pullable": "new:70b"},
    }
    rules: dict[str, dict[str, Any]] = {
        "one": {"deny_models": ["*:32b", "*:70B"], "max_parameters": "1m"},
        "two": {"deny_models": ["*:70b"]},
    }
    with gateway_over(tmp_path, ("one", "two"), knobs=knobs, instances=rules) as gateway:
        yield gateway


def asked(gateway: Gateway, model: str, path: str = "/api/chat", **headers: str) -> requests.Response:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False}
    if path == "/v1/messages":
        body["max_tokens"] = 8
    return gateway.call("POST", path, json=body, headers=headers)


def in_time(**left: float) -> str:
    return (datetime.now(UTC) + timedelta(**left)).isoformat()


def lift(gateway: Gateway, instance: str, until: str, **more: Any) -> requests.Response:
    return gateway.call("POST", f"instances/{instance}/lift", json={"until": until, **more})


def test_a_denied_model_is_answered_elsewhere_and_nowhere_by_force(gateway: Gateway) -> None:
    for _ in range(3):
        answer = asked(gateway, "tiny:32b")
        assert (answer.status_code, answer.headers["X-Instance"]) == (200, "two"), answer.text
    for path in PATHS:
        answer = asked(gateway, "tiny:32b@one", path)
        assert answer.status_code == 403
        error = answer.json()["error"]
        message = error if isinstance(error, str) else error["message"]
        assert "'tiny:32b' must not run on: one (deny_models *:32b)" in message
        assert "ollama-manager lift one" in message
    assert asked(gateway, "tiny:32b", **{"X-Instance": "one"}).status_code == 403
    assert asked(gateway, "tiny@one").status_code == 200


def test_a_model_is_denied_by_what_its_own_metadata_says_of_its_size(gateway: Gateway) -> None:
    body = {"model": "minilm", "input": "hi"}
    answer = gateway.call("POST", "/api/embed", json=body)  # it has 22 million parameters
    assert answer.status_code == 403
    assert "one (max_parameters 1m)" in answer.json()["error"]
    explained = gateway.call("POST", "routing/explain", json={"model": "minilm", "kind": "embed"}).json()
    assert explained["passed_over"] == [
        {"instance": "one", "model": "minilm", "reason": "host_denied", "detail": "max_parameters 1m"}
    ]
    assert explained["refused"]["what"] == "denied"


def test_an_operator_may_not_load_it_either(gateway: Gateway) -> None:
    answer = gateway.call("POST", "instances/one/load", json={"model": "tiny:32b"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "host_denied"), answer.text
    assert "deny_models *:32b" in answer.json()["error"]["message"]


def test_the_rules_do_not_hold_while_they_are_lifted_also_after_a_restart(gateway: Gateway) -> None:
    until = in_time(hours=1)
    answer = lift(gateway, "one", until, reason="maintenance")
    assert (answer.status_code, answer.json()["changed"]) == (200, True), answer.text
    lifted = answer.json()["instance"]["lifted"]
    assert lifted["reason"] == "maintenance"
    assert datetime.fromisoformat(lifted["until"]) - datetime.fromisoformat(until) < timedelta(seconds=1)
    assert not lift(gateway, "one", until, reason="maintenance").json()["changed"]
    assert asked(gateway, "tiny:32b@one").status_code == 200
    gateway.kill()
    gateway.start(until_ready=False)
    gateway.wait_until_alive()
    gateway.wait_until_usable("one", "two")
    assert gateway.instance("one")["lifted"] == lifted
    assert asked(gateway, "tiny:32b@one").status_code == 200
    ended = gateway.call("DELETE", "instances/one/lift")
    assert (ended.status_code, ended.json()["changed"], ended.json()["instance"]["lifted"]) == (
        200,
        True,
        None,
    )
    assert asked(gateway, "tiny:32b@one").status_code == 403
    assert not gateway.call("DELETE", "instances/one/lift").json()["changed"]
    kinds = [event["kind"] for event in gateway.events() if event["instance"] == "one"]
    assert [kind for kind in kinds if kind.startswith("deny")] == ["deny_rules_lifted", "deny_rules_in_force"]


def test_a_lift_passes_by_itself(gateway: Gateway) -> None:
    assert lift(gateway, "one", in_time(seconds=1.5)).status_code == 200
    assert asked(gateway, "tiny:32b@one").status_code == 200
    wait_for(lambda: gateway.instance("one")["lifted"], lambda lifted: lifted is None, within_s=10)
    wait_for(lambda: asked(gateway, "tiny:32b@one").status_code, lambda status: status == 403, within_s=5)
    (event,) = [one for one in gateway.events() if one["kind"] == "deny_rules_in_force"]
    assert (event["instance"], event["detail"]) == ("one", "its time has passed")


@pytest.mark.parametrize(
    ("instance", "body", "status", "words"),
    [
        ("nope", {"until": "2999-01-01T00:00:00Z"}, 404, "there is no instance 'nope'"),
        ("one", {"until": "2020-01-01T00:00:00Z"}, 422, "until: expected a time in the future"),
        ("one", {"until": "tomorrow"}, 422, "body.until"),
        ("one", {"until": "2999-01-01T00:00:00"}, 422, "body.until"),
        ("one", {}, 422, "body.until"),
        ("one", {"until": "2999-01-01T00:00:00Z", "reason": ""}, 422, "body.reason"),
    ],
)
def test_a_lift_that_makes_no_sense_is_refused(
    gateway: Gateway, instance: str, body: dict[str, Any], status: int, words: str
) -> None:
    answer = gateway.call("POST", f"instances/{instance}/lift", json=body)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_denied_model_is_not_pulled_for_a_request_but_by_an_operator(tmp_path: Path) -> None:
    knobs = {"one": {"models": "tiny", "pullable": "new:70b,big=embed"}}
    rules = {"one": {"deny_models": ["*:70b"], "max_parameters": "1m"}}
    config = {"models": {"auto_pull": True}}
    with gateway_over(tmp_path, ("one",), knobs=knobs, instances=rules, config=config) as gateway:
        assert asked(gateway, "new:70b").status_code == 403
        names = [model["name"] for model in gateway.get("/api/tags")["models"]]
        assert "new:70b" not in names
        answer = gateway.call("POST", "/api/embed", json={"model": "big", "input": "hi"})
        assert answer.status_code == 403, "its size is known once it was pulled"
        assert "max_parameters 1m" in answer.json()["error"]
        pulled = gateway.call("POST", "/api/pull", json={"model": "new:70b", "stream": False})
        assert pulled.json() == {"status": "success"}
        assert asked(gateway, "new:70b").status_code == 403
