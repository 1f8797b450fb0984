"""The hosts of `/v1/cluster/hosts`: the machine, the nodes of a swarm, and others."""

from __future__ import annotations

import platform
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from manager.api.cluster import HostsBody, _host, _hosts
from manager.domain.gpu import Gpu
from manager.domain.instance import Driver
from manager.domain.swarm import Node

BOX = Node(
    "n1", "gpu-box", "10.0.0.3", is_up=True, is_active=True, is_manager=False, cards=("GPU-1",), labels={}
)
DESK = Node("n2", "desk", "", is_up=True, is_active=True, is_manager=True, cards=("GPU-9",), labels={})
HERE = platform.node()


def state(instance: str, driver: Driver, node: str | None = None, url: str | None = None) -> Any:
    spec = SimpleNamespace(id=instance, driver=driver, url=url)
    return SimpleNamespace(view=SimpleNamespace(spec=spec), node=node)


def card(uuid: str, host: str | None = None) -> Any:
    return SimpleNamespace(gpu=Gpu(uuid, 0, "", "Card", 8, 2, 6, host=host))


STATES = [
    state("cpu", Driver.DOCKER),
    state("far", Driver.SWARM, "gpu-box"),
    state("near", Driver.SWARM, "desk"),
    state("anywhere", Driver.SWARM),
    state("nas", Driver.EXTERNAL, url="http://nas:1"),
]
CARDS = [card("GPU-9"), card("GPU-9", "desk"), card("GPU-1", "gpu-box")]


def hosts(
    *nodes: Node, own: str | None = None, url: str = "unix:///docker.sock", swarm: bool = True
) -> list[dict[str, Any]]:
    backend: Any = SimpleNamespace(
        nodes=SimpleNamespace(current=nodes, own=own) if swarm else None,
        engine=SimpleNamespace(url=url),
        link=SimpleNamespace(up=True, trouble=""),
    )
    overview: Any = SimpleNamespace(instances=STATES, cards=CARDS)
    found = list(_hosts(backend, overview))
    HostsBody.model_validate({"hosts": found, "count": len(found)})
    return found


def brief(found: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    return [
        (one["name"], one["kind"], one["state"], one["address"], [gpu["uuid"] for gpu in one["gpus"]])
        for one in found
    ]


def test_without_a_swarm_there_are_the_machine_and_the_hosts_in_urls() -> None:
    found = hosts(swarm=False)
    assert brief(found) == [
        (HERE, "machine", None, None, ["GPU-9"]),
        ("nas", "external", None, None, []),
    ]
    assert [one["instances"] for one in found] == [["cpu"], ["nas"]]


def test_the_node_of_the_daemons_engine_is_the_machine_and_the_others_are_nodes() -> None:
    found = hosts(BOX, DESK, own="n2")
    assert brief(found) == [
        (HERE, "machine", "ready", None, ["GPU-9"]),
        ("gpu-box", "node", "ready", "10.0.0.3", ["GPU-1"]),
        ("nas", "external", None, None, []),
    ]
    assert [one["instances"] for one in found] == [["cpu", "near"], ["far"], ["nas"]]
    assert found[1]["engine"] is None


def test_an_engine_on_another_machine_is_a_node_of_its_own() -> None:
    found = hosts(BOX, DESK, own="n2", url="tcp://desk:2376")
    assert [(one["name"], one["instances"]) for one in found] == [
        (HERE, ["cpu"]),
        ("gpu-box", ["far"]),
        ("desk", ["near"]),
        ("nas", ["nas"]),
    ]


def test_a_node_is_down_or_drained_before_it_is_ready() -> None:
    down, drained = replace(BOX, is_up=False, is_active=False), replace(BOX, id="n3", is_active=False)
    assert [one["state"] for one in hosts(down, drained, BOX)[1:4]] == ["down", "drained", "ready"]


def test_a_service_without_a_node_has_no_host() -> None:
    assert [_host(one, HERE) for one in STATES] == [HERE, "gpu-box", "desk", None, "nas"]
