"""A fresh daemon over a volume full of models lists them, and starts nothing for that."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.test_volumes import chat, names, pull, sharing, volume
from tests.simulated.image import IMAGE
from tests.support.daemon import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import docker

    from tests.support.daemon import Daemon
    from tests.support.engine import Engine
    from tests.support.fixtures import NewDaemon

__all__ = ["volume"]

MODELS = ("big", "someone/other:7b", "registry.example.com:5000/team/third:latest")
READER = "ollama-manager.reader"


def on(volume: str, *ids: str, **knobs: object) -> dict[str, Any]:
    """What a daemon is made with: instances on one volume, whose servers have no models of their own."""
    return {
        "instances": {id_: {"template": "sim"} for id_ in ids or ("one",)},
        "templates": sharing(volume, models="", pullable=",".join(MODELS), **knobs),
        "config": {"allow": {"volumes": [volume]}},
    }


def listed(daemon: Daemon) -> list[dict[str, Any]]:
    """The models as they are listed, without what only a running server tells when it is asked about one."""
    models: list[dict[str, Any]] = daemon.get("/api/tags")["models"]
    for model in models:
        model.pop("capabilities", None)
        for name in ("context_length", "embedding_length"):
            model["details"].pop(name, None)
    return models


def fill(new_daemon: NewDaemon, volume: str) -> list[dict[str, Any]]:
    """Pull models to the volume through a first daemon, which goes; what its server lists."""
    with new_daemon(**on(volume), name="first").start() as first:
        for model in MODELS:
            assert pull(first, model)[-1] == {"status": "success"}
        assert first.call("POST", "/api/create", json={"model": "Made", "from": "big", "system": "x"}).ok
        found = listed(first)
        first.stopped("one")
        first.stop()
    return found


def starts(daemon: Daemon) -> int:
    return sum(one["starts"] for one in daemon.get("instances")["instances"])


def readers(client: docker.DockerClient, manager_id: str) -> list[str]:
    found = client.api.containers(all=True, filters={"label": f"{READER}={manager_id}"})
    return [container["Id"] for container in found]


class Watched:
    """The events of the engine about one manager's readers, and about all starts."""

    def __init__(self) -> None:
        self.created: list[str] = []
        self.started: list[str] = []
        self.networks: list[str] = []


@contextmanager
def watching(client: docker.DockerClient) -> Iterator[Watched]:
    watched = Watched()
    stream = client.events(decode=True)

    def follow() -> None:
        for event in stream:
            name = event.get("Actor", {}).get("Attributes", {}).get("name", "")
            if event.get("Type") == "container" and "-reader-" in name:
                watched.created += [name] if event["Action"] == "create" else []
                watched.started += [name] if event["Action"] == "start" else []
            elif event.get("Type") == "network" and event["Action"] == "connect":
                watched.networks.append(event["Actor"]["Attributes"].get("container", ""))

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield watched
    finally:
        stream.close()
        thread.join(10)


def test_a_fresh_daemon_lists_what_is_on_a_volume_and_a_client_picks_one(
    new_daemon: NewDaemon, volume: str, docker_client: docker.DockerClient, manager_id: str, engine: Engine
) -> None:
    before = fill(new_daemon, volume)
    assert sorted(model["name"] for model in before) == [
        "Made:latest",
        "big:latest",
        "registry.example.com:5000/team/third:latest",
        "someone/other:7b",
    ]
    with closing(engine.client()) as client, watching(client) as watched:
        daemon = new_daemon(**on(volume, "one", "two")).start()
        assert listed(daemon) == before, "every value as the server lists it"
        openai = {entry["id"]: entry for entry in daemon.get("/v1/models")["data"]}
        assert set(openai) == {model["name"] for model in before}
        assert openai["big:latest"]["instances"] == ["one", "two"]
        assert starts(daemon) == 0
        assert [one["phase"] for one in daemon.get("instances")["instances"]] == ["stopped", "stopped"]
        wait_for(lambda: readers(docker_client, manager_id), lambda left: left == [])
        assert (len(watched.created), watched.started, watched.networks) == (1, [], [])
    kinds = [event["kind"] for event in daemon.events()]
    assert "unknown_container" not in kinds
    assert kinds.count("volume_read") == 1
    assert daemon.call("POST", "/api/chat", json={"model": "nobody-has-this"}).status_code == 404
    assert starts(daemon) == 0
    picked = before[0]["name"]
    assert chat(daemon, picked, "two") == 200
    assert starts(daemon) == 1
    assert listed(daemon) == before, "now the server's own list"


def test_the_list_survives_a_restart_and_a_volume_is_read_once(
    new_daemon: NewDaemon, volume: str, docker_client: docker.DockerClient, manager_id: str, engine: Engine
) -> None:
    fill(new_daemon, volume)
    daemon = new_daemon(**on(volume)).start()
    listed = names(daemon)
    assert len(listed) == 4
    wait_for(lambda: [event["kind"] for event in daemon.events()], lambda kinds: "volume_read" in kinds)
    daemon.stop()
    with closing(engine.client()) as client, watching(client) as watched:
        daemon.start()
        assert names(daemon) == listed
        assert watched.created == []
    assert readers(docker_client, manager_id) == []


def test_what_a_killed_daemon_left_is_removed_by_the_next(
    new_daemon: NewDaemon, volume: str, docker_client: docker.DockerClient, manager_id: str
) -> None:
    docker_client.containers.create(IMAGE, name=f"{manager_id}-reader-left", labels={READER: manager_id})
    foreign = docker_client.containers.create(IMAGE, labels={READER: f"{manager_id}x"})
    daemon = new_daemon(**on(volume)).start()
    wait_for(lambda: readers(docker_client, manager_id), lambda left: left == [])
    foreign.reload()
    foreign.remove(v=True)
    assert [one["id"] for one in daemon.get("instances")["instances"]] == ["one"]


def test_a_volume_that_does_not_exist_is_not_made_and_a_new_one_is_no_empty_list(
    new_daemon: NewDaemon, volume: str, docker_client: docker.DockerClient
) -> None:
    daemon = new_daemon(**on(volume)).start()
    assert names(daemon) == []
    assert docker_client.volumes.list(filters={"name": volume}) == []
    assert pull(daemon, "big")[-1] == {"status": "success"}
    assert names(daemon) == ["big:latest"]


def test_an_image_that_is_missing_leaves_the_reading_to_another_instance_s(
    new_daemon: NewDaemon, volume: str
) -> None:
    before = fill(new_daemon, volume)
    made = on(volume)
    made["instances"] = {"none": {"template": "none"}, **made["instances"]}
    made["templates"]["none"] = {**made["templates"]["sim"], "image": "ollama-manager/simulated:none"}
    daemon = new_daemon(**made).start()
    assert listed(daemon) == before
    daemon.stop()
    made["instances"] = {"none": {"template": "none"}}
    daemon = new_daemon(**made, name="second").start()
    assert names(daemon) == []
    (event,) = [event for event in daemon.events() if event["kind"] == "volume_not_read"]
    assert event["reason"] == "image_missing"


def test_a_host_directory_is_read_as_a_volume_is(
    new_daemon: NewDaemon, docker_client: docker.DockerClient, volume: str, tmp_path: Path
) -> None:
    before = fill(new_daemon, volume)
    source = docker_client.volumes.get(volume).attrs["Mountpoint"]
    made = on(source)
    made["config"] = {"allow": {"binds": [f"{source}:rw"]}}
    daemon = new_daemon(**made).start()
    assert listed(daemon) == before
    assert starts(daemon) == 0


@pytest.mark.parametrize("auto_pull", [False, True])
def test_a_name_that_nobody_has_starts_one_of_four_on_a_volume_that_was_never_read(
    new_daemon: NewDaemon, volume: str, *, auto_pull: bool
) -> None:
    made = on(volume, "a", "b", "c", "d")
    made["config"]["models"] = {"auto_pull": auto_pull}
    daemon = new_daemon(**made).start()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: _ask(daemon, "typo-model"), range(4)))
    assert found == [404] * 4
    assert starts(daemon) == 1
    assert _ask(daemon, "another-typo") == 404
    assert starts(daemon) == 1


def test_a_name_that_cannot_be_pulled_is_404_at_max_running(new_daemon: NewDaemon, volume: str) -> None:
    made = on(volume, "a", "b")
    made["config"]["models"] = {"auto_pull": True}
    made["lifecycle"] = {"max_running": 1}
    daemon = new_daemon(**made).start()
    assert pull(daemon, "big")[-1] == {"status": "success"}
    assert _ask(daemon, "typo-model") == 404
    assert starts(daemon) == 1


def _ask(daemon: Daemon, model: str) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": False}
    return daemon.call("POST", "/api/chat", json=body).status_code
