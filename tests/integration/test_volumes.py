"""Several containers on one volume of models: one of them writes, and all see what it did."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.compare import differences, load_recordings, replay
from tests.contract.test_gateway import without_what_is_ours
from tests.support.daemon import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemon import Daemon
    from tests.support.engine import Engine
    from tests.support.fixtures import NewDaemon

SLOW_PULL_S = 2.0


@pytest.fixture
def volume(engine: Engine, manager_id: str) -> Iterator[str]:
    """A named volume of the test's own."""
    name = f"models-{manager_id}"
    yield name
    with closing(engine.client()) as client:
        for container in client.containers.list(all=True, filters={"volume": name}):
            container.remove(force=True)
        for found in client.volumes.list(filters={"name": name}):
            found.remove(force=True)


def sharing(volume: str, **knobs: object) -> dict[str, Any]:
    """Templates `sim`, which writes to the volume, and `reads`, which only reads it, with these knobs."""
    env = {f"OLLAMA_SIM_{name.upper()}": str(value) for name, value in knobs.items()}
    mount = {"source": volume, "target": "/root/.ollama"}
    return {
        "sim": {"volumes": [mount], "env": env},
        "reads": {"volumes": [{**mount, "read_only": True}], "env": env},
    }


def pull(daemon: Daemon, model: str, **more: object) -> list[dict[str, Any]]:
    answer = daemon.call("POST", "/api/pull", json={"model": model, **more})
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def names(daemon: Daemon) -> list[str]:
    return sorted(model["name"] for model in daemon.get("/api/tags")["models"])


def chat(daemon: Daemon, model: str, instance: str) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False}
    return daemon.call("POST", "/api/chat", json=body, headers={"X-Instance": instance}).status_code


@pytest.mark.parametrize("count", [1, 3])
def test_the_contract_holds_through_the_gateway_with_containers(
    new_daemon: NewDaemon, volume: str, count: int
) -> None:
    ids = ("one", "two", "three")[:count]
    daemon = new_daemon(
        instances={id_: {"template": "sim"} for id_ in ids},
        templates=sharing(volume),
        config={"allow": {"volumes": [volume]}},
    ).start()
    for id_ in ids:
        daemon.started(id_)
    answers = replay(daemon.url)
    wrong = {
        recording["name"]: found
        for recording in load_recordings()
        if (found := differences(recording, without_what_is_ours(recording, answers[recording["name"]])))
    }
    assert wrong == {}


def test_what_one_pulls_all_have_at_once_and_what_one_deletes_is_gone_for_all(
    new_daemon: NewDaemon, volume: str
) -> None:
    daemon = new_daemon(
        instances={"one": {"template": "sim"}, "two": {"template": "sim"}},
        templates=sharing(volume, pullable="big"),
        config={"allow": {"volumes": [volume]}},
    ).start()
    for id_ in ("one", "two"):
        daemon.started(id_)
    before = {id_: daemon.instance(id_)["container"]["id"] for id_ in ("one", "two")}
    assert pull(daemon, "big")[-1] == {"status": "success"}
    assert [chat(daemon, "big", id_) for id_ in ("one", "two")] == [200, 200]
    listed = {entry["id"]: entry["instances"] for entry in daemon.get("/v1/models")["data"]}
    assert listed["big:latest"] == ["one", "two"]
    assert daemon.call("DELETE", "/api/delete", json={"model": "big"}).status_code == 200
    assert [chat(daemon, "big", id_) for id_ in ("one", "two")] == [404, 404]
    assert "big:latest" not in names(daemon)
    assert {id_: daemon.instance(id_)["container"]["id"] for id_ in ("one", "two")} == before


def test_the_chosen_writer_is_started_and_kept_while_it_writes(new_daemon: NewDaemon, volume: str) -> None:
    daemon = new_daemon(
        instances={
            "one": {"template": "sim"},
            "writer": {"template": "sim", "ttl_s": 1},
            "reader": {"template": "reads", "priority": 100},
        },
        templates=sharing(volume, pullable="big", pull_s=SLOW_PULL_S),
        config={"allow": {"volumes": [volume]}, "models": {"writers": {volume: "writer"}}},
    ).start()
    daemon.started("one")
    answer = daemon.call("POST", "/api/pull", json={"model": "big"})
    assert json.loads(answer.text.splitlines()[-1]) == {"status": "success"}
    assert answer.headers["x-instance"] == "writer"
    assert int(answer.headers["x-start-ms"]) > 0
    assert daemon.instance("writer")["starts"] == 1, "longer than its TTL"
    daemon.wait_for_phase("writer", "stopped")
    assert daemon.instance("reader")["starts"] == 0
    assert daemon.call("POST", "/api/show", json={"model": "big"}).headers["x-instance"] == "one"


def test_looking_at_a_model_starts_one_only_if_none_runs(new_daemon: NewDaemon, volume: str) -> None:
    daemon = new_daemon(
        instances={"low": {"template": "sim"}, "high": {"template": "sim", "priority": 5}},
        templates=sharing(volume),
        config={"allow": {"volumes": [volume]}},
    ).start()
    first = daemon.call("POST", "/api/show", json={"model": "tiny"})
    assert (first.status_code, first.headers["x-instance"]) == (200, "high")
    assert "x-start-ms" in first.headers
    again = daemon.call("POST", "/api/show", json={"model": "tiny"})
    assert (again.headers["x-instance"], "x-start-ms" in again.headers) == ("high", False)
    daemon.stopped("high")
    daemon.started("low")
    assert daemon.call("POST", "/api/show", json={"model": "tiny"}).headers["x-instance"] == "low"
    assert daemon.instance("high")["phase"] == "stopped"
    daemon.stopped("low")
    unknown = daemon.call("POST", "/api/show", json={"model": "nope"})
    assert unknown.status_code == 404, "the volume has been read: nobody is started to say no"
    assert daemon.instance("low")["phase"] == daemon.instance("high")["phase"] == "stopped"


def test_one_that_cannot_be_started_leaves_it_to_the_next(new_daemon: NewDaemon, volume: str) -> None:
    templates = sharing(volume, pullable="big")
    daemon = new_daemon(
        instances={"broken": {"template": "none", "priority": 9}, "works": {"template": "sim"}},
        templates={**templates, "none": {**templates["sim"], "image": "ollama-manager/simulated:none"}},
        config={"allow": {"volumes": [volume]}},
    ).start()
    assert pull(daemon, "big")[-1] == {"status": "success"}
    assert daemon.instance("works")["phase"] == "ready"
    assert daemon.instance("broken")["reason"]["code"] == "image_missing"


def test_pulls_to_two_volumes_do_not_wait_for_each_other(new_daemon: NewDaemon, volume: str) -> None:
    daemon = new_daemon(
        instances={"shared": {"template": "sim"}, "alone": {"template": "own"}},
        templates={
            **sharing(volume, pullable="big,other", pull_s=SLOW_PULL_S),
            "own": {"env": {"OLLAMA_SIM_PULLABLE": "big"}},
        },
        config={"allow": {"volumes": [volume]}},
    ).start()
    for instance in ("shared", "alone"):
        daemon.started(instance)  # what is measured is a pull, not a start
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(pull, daemon, "big")
        wait_for(lambda: daemon.instance("shared")["in_flight"])
        assert pull(daemon, "big@alone")[-1] == {"status": "success"}
        assert not slow.done()
        waits = pool.submit(pull, daemon, "other@shared")
        assert slow.result()[-1] == {"status": "success"}
        assert waits.result()[0] == {"status": "waiting for the pull of big"}
