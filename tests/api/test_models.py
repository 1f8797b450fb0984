"""`/api/runtime/compute/models`: what there is, pulls without clients, and loads without callers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from manager.api.models import ModelsBody
from tests.support.daemon import COMPUTE, wait_for
from tests.support.gateway import gateway_over

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.gateway import Gateway

MODELS = f"{COMPUTE}/models"
ROLES = {"roles": {"thinking": {"model": "tiny"}, "control": {"model": "nobody-has"}}}


KNOBS = {"one": {"pullable": "big,slow"}, "two": {"models": "tiny"}}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("models")
    with gateway_over(home, ("one", "two"), knobs=KNOBS, config=ROLES) as running:
        yield running


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway whose models nothing was done with."""
    with gateway_over(tmp_path, ("one", "two"), knobs=KNOBS, config=ROLES) as running:
        yield running


def models(gateway: Gateway) -> dict[str, Any]:
    body: dict[str, Any] = gateway.get(MODELS)
    ModelsBody.model_validate(body)
    return body


def model(gateway: Gateway, name: str) -> dict[str, Any]:
    (found,) = [one for one in models(gateway)["models"] if one["name"] == name]
    return dict(found)


def test_a_model_is_told_with_its_places_its_roles_and_what_it_can(fresh: Gateway) -> None:
    tiny = wait_for(lambda: model(fresh, "tiny:latest"), lambda one: one["context_length"])
    assert (tiny["context_length"], tiny["capabilities"], tiny["roles"]) == (
        2048,
        ["completion"],
        ["thinking"],
    )
    assert [(one["volume"], one["instances"], one["may_change"]) for one in tiny["places"]] == [
        (None, ["one"], True),
        (None, ["two"], True),
    ]
    assert (tiny["status"], tiny["error"]) == ("not_loaded", None)
    assert models(fresh)["missing"] == [{"model": "nobody-has", "roles": ["control"]}]
    assert models(fresh)["fit"] == {"rooms": [], "models": []}  # there is no card


def test_a_pull_goes_on_without_clients_and_is_cancelled(gateway: Gateway) -> None:
    gateway.servers["one"].set(pull_s=60)
    begun = gateway.call("POST", f"{MODELS}/pulls", json={"model": "slow", "instance": "one"})
    assert (begun.status_code, begun.json()["is_kept"]) == (202, True)
    pull = begun.json()["id"]
    (under_way,) = wait_for(lambda: models(gateway)["pulls"], lambda pulls: pulls[0]["total_bytes"])
    assert (under_way["state"], under_way["instance"], under_way["clients"]) == ("pulling", "one", 0)
    again = gateway.call("POST", f"{MODELS}/pulls", json={"model": "slow:latest"})
    assert again.json()["id"] == pull
    for state in ("cancelled", "cancelled"):  # then it is taken off the list
        assert gateway.call("DELETE", f"{MODELS}/pulls/{pull}").json()["state"] == state
    assert models(gateway)["pulls"] == []
    gone = gateway.call("DELETE", f"{MODELS}/pulls/{pull}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "unknown_pull")
    gateway.servers["one"].set(pull_s=0)
    gateway.call("POST", f"{MODELS}/pulls", json={"model": "big"}).raise_for_status()
    wait_for(lambda: [one["name"] for one in models(gateway)["models"]], lambda names: "big:latest" in names)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "thinking"}, 422, "is a role"),
        ({"model": "no such name"}, 422, "no possible name"),
        ({"model": ""}, 422, "model"),
        ({"model": "big", "instance": "unknown"}, 404, "unknown"),
        ({"model": "big", "more": 1}, 422, "more"),
    ],
)
def test_a_pull_that_cannot_be_is_refused(
    gateway: Gateway, body: dict[str, Any], status: int, words: str
) -> None:
    answer = gateway.call("POST", f"{MODELS}/pulls", json=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_a_load_goes_on_without_its_caller_and_the_model_says_what_became_of_it(gateway: Gateway) -> None:
    gateway.servers["two"].set(load_s=1.5)
    load = f"{COMPUTE}/instances/two/load?wait=false"
    answer = gateway.call("POST", load, json={"model": "tiny"})
    assert (answer.status_code, answer.json()["changed"]) == (202, True)
    assert model(gateway, "tiny:latest")["loading_on"] == ["two"]
    assert gateway.call("POST", load, json={"model": "tiny"}).status_code == 202  # the same one
    tiny = wait_for(lambda: model(gateway, "tiny:latest"), lambda one: one["status"] == "ready")
    assert (tiny["loaded_on"], tiny["loading_on"]) == (["two"], [])
    at_once = gateway.call("POST", load, json={"model": "tiny"})
    assert (at_once.status_code, at_once.json()["changed"]) == (200, False)
    gateway.call("POST", f"{COMPUTE}/instances/two/unload", json={"model": "tiny"}).raise_for_status()
    gateway.servers["two"].set(load_s=1.5, crash="load")
    assert gateway.call("POST", load, json={"model": "tiny"}).status_code == 202
    tiny = wait_for(lambda: model(gateway, "tiny:latest"), lambda one: one["error"])
    assert "two" in tiny["error"]["message"]


def test_a_load_of_what_is_not_there_is_refused_at_once(gateway: Gateway) -> None:
    answer = gateway.call("POST", f"{COMPUTE}/instances/one/load?wait=false", json={"model": "nobody-has"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_missing")
