"""The nodes of a swarm, and the instances that they give."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.instance import ContainerFacts, Driver
from manager.domain.swarm import Node
from manager.errors import (
    ConfigurationError,
    EngineError,
    GpuQueryError,
    Reason,
    RegistryUnwritableError,
)
from manager.services.instances import nodes as module
from manager.services.instances.nodes import FoundInstance, FoundNodes, Nodes
from tests.support.fleet_rig import Journal, Rig, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from manager.services.instances.instance import Instance

BOX = Node(
    "n1",
    "gpu-box",
    "10.0.0.3",
    is_up=True,
    is_active=True,
    is_manager=False,
    cards=("GPU-1", "GPU-2"),
    labels={},
)
DESK = Node("n2", "desk", "10.0.0.2", is_up=True, is_active=True, is_manager=True, cards=(), labels={})


class Reader:
    """Implements `NodeReader`."""

    def __init__(self, *found: Node, own: str | None = None) -> None:
        self.found = found
        self.own = own
        self.trouble: EngineError | None = None
        self.asked: list[str] = []

    async def nodes(self) -> tuple[Node, ...]:
        self.asked.append("nodes")
        if self.trouble is not None:
            raise self.trouble
        return self.found

    async def own_node(self) -> str | None:
        self.asked.append("own")
        return self.own


class Bindings:
    """The part of a registry that is used here. It outlives a daemon."""

    def __init__(self, **stored: str) -> None:
        self.stored = stored
        self.is_full = False

    async def bindings(self) -> dict[str, str]:
        return dict(self.stored)

    async def add_bindings(self, bindings: dict[str, str]) -> None:
        if self.is_full:
            raise RegistryUnwritableError("the disk is full")
        self.stored |= bindings


class Cards:
    def __init__(self) -> None:
        self.readings = 0
        self.named: dict[str, tuple[str, ...]] = {}

    async def refresh(self) -> None:
        self.readings += 1

    def name_cards(self, instance: str, uuids: tuple[str, ...]) -> None:
        self.named[instance] = uuids


class Ground:
    """One run of the daemon, as far as nodes go."""

    def __init__(self, reader: Reader, registry: Bindings | None = None, *, wanted: Any = "all") -> None:
        self.rig = Rig()
        self.registry = registry or Bindings()
        self.cards = Cards()
        self.refusals: dict[str, str] = {}
        self.placements: dict[str, tuple[str, str | None]] = {}
        self.nodes = Nodes(reader)
        outside: Any = {"registry": self.registry, "gpus": self.cards}
        self.found = FoundNodes(
            replace(self.rig.world, **outside),
            self.nodes,
            self.rig.fleet,
            self.rig.link,
            wanted=wanted,
            make=self.make,
            interval_s=0.01,
        )

    def make(self, found: FoundInstance) -> Instance:
        if found.id in self.refusals:
            raise ConfigurationError(self.refusals[found.id])
        self.placements[found.id] = (found.node.id, found.card)
        return self.rig.make(found.id, gpu=found.card is not None, driver=Driver.SWARM)

    @property
    def ids(self) -> list[str]:
        return [one.id for one in self.rig.fleet.instances()]

    @property
    def journal(self) -> Journal:
        return self.rig.journal


async def looked(reader: Reader, registry: Bindings | None = None, **settings: Any) -> Ground:
    ground = Ground(reader, registry, **settings)
    await ground.found.look()
    return ground


# --- readings ---


async def test_a_failed_reading_keeps_the_one_before_and_says_what_is_wrong() -> None:
    reader = Reader(BOX, own="n2")
    nodes = Nodes(reader)
    assert nodes.trouble == "Docker Swarm has not been asked yet"
    with pytest.raises(GpuQueryError, match="has not been asked yet"):
        await nodes.advertised()
    await nodes.refresh()
    assert (nodes.current, nodes.own, nodes.trouble) == ((BOX,), "n2", "")
    reader.trouble = EngineError("no majority", reason=Reason.ENGINE_UNAVAILABLE)
    reader.found = ()
    await nodes.refresh()
    assert (nodes.current, nodes.trouble) == ((BOX,), "no majority")
    with pytest.raises(GpuQueryError, match="no majority"):
        await nodes.advertised()
    reader.trouble = None
    await nodes.refresh()
    assert (nodes.current, nodes.trouble) == ((), "")
    assert reader.asked.count("own") == 1


async def test_cards_are_advertised_with_their_node_and_are_lost_with_it() -> None:
    nodes = Nodes(Reader(BOX, replace(BOX, id="n3", cards=("GPU-3",), is_up=False)))
    await nodes.refresh()
    cards = await nodes.advertised()
    assert [(one.uuid, one.node_id, one.hostname, one.address) for one in cards] == [
        ("GPU-1", "n1", "gpu-box", "10.0.0.3"),
        ("GPU-2", "n1", "gpu-box", "10.0.0.3"),
        ("GPU-3", "n3", "gpu-box", "10.0.0.3"),
    ]
    assert [one.lost for one in cards] == [None, None, "its node gpu-box is down"]


async def test_an_instance_is_on_the_node_of_its_service_and_else_on_the_one_that_it_can_run_on() -> None:
    nodes = Nodes(Reader(BOX, DESK))
    await nodes.refresh()
    spec = Rig().make("a", driver=Driver.SWARM).spec
    running = ContainerFacts("1", "m-ollama-a", "image", "running", node="desk")
    assert nodes.name_for(spec, running) == "desk"
    assert nodes.name_for(spec, replace(running, node=None)) is None
    assert nodes.name_for(spec, None) is None
    assert nodes.name_for(replace(spec, placement=("node.id==n1",)), None) == "gpu-box"
    assert nodes.name_for(replace(spec, device="GPU-1"), None) == "gpu-box"
    assert nodes.name_for(replace(spec, devices=("GPU-1", "GPU-2")), None) == "gpu-box"
    assert nodes.name_for(replace(spec, driver=Driver.DOCKER), running) is None


# --- instances ---


async def test_each_node_gives_an_instance_for_its_cpu_and_for_each_card() -> None:
    ground = await looked(Reader(BOX, DESK))
    assert ground.ids == ["gpu-box-cpu", "gpu-box-gpu0", "gpu-box-gpu1", "desk-cpu"]
    assert ground.placements == {
        "gpu-box-cpu": ("n1", None),
        "gpu-box-gpu0": ("n1", "GPU-1"),
        "gpu-box-gpu1": ("n1", "GPU-2"),
        "desk-cpu": ("n2", None),
    }
    assert ground.cards.named == {"gpu-box-gpu0": ("GPU-1",), "gpu-box-gpu1": ("GPU-2",)}
    assert ground.journal.details_of("found") == [
        "CPU of node gpu-box",
        "GPU-1 of node gpu-box",
        "GPU-2 of node gpu-box",
        "CPU of node desk",
    ]


@pytest.mark.parametrize(
    ("wanted", "ids"),
    [
        ("none", []),
        ("auto", ["desk-cpu"]),
        ("all", ["gpu-box-cpu", "gpu-box-gpu0", "gpu-box-gpu1", "desk-cpu"]),
    ],
)
async def test_auto_leaves_out_the_node_of_this_daemon_which_has_containers(
    wanted: str, ids: list[str]
) -> None:
    ground = await looked(Reader(BOX, DESK, own="n1"), wanted=wanted)
    assert ground.ids == ids
    assert ground.cards.readings == 1


async def test_nothing_is_made_while_swarm_does_not_answer() -> None:
    reader = Reader(BOX)
    reader.trouble = EngineError("no majority", reason=Reason.ENGINE_UNAVAILABLE)
    ground = await looked(reader)
    assert ground.ids == []
    reader.trouble = None
    await ground.found.look()
    assert len(ground.ids) == 3


async def test_instances_are_made_once_and_stay_when_their_node_is_removed() -> None:
    reader = Reader(BOX)
    ground = await looked(reader)
    first = ground.rig.fleet.instances()
    reader.found = (DESK,)
    await ground.found.look()
    assert ground.rig.fleet.instances()[:3] == first
    assert ground.ids[3:] == ["desk-cpu"]


async def test_a_configured_instance_of_that_id_stands_above_the_one_of_a_node() -> None:
    ground = Ground(Reader(BOX))
    configured = ground.rig.add("gpu-box-cpu")
    await ground.found.look()
    assert ground.rig.fleet.get("gpu-box-cpu") is configured
    assert "gpu-box-cpu" not in ground.placements


async def test_two_nodes_of_one_host_name_keep_their_ids_over_a_restart() -> None:
    first = replace(BOX, id="aaaaaaaa", cards=("GPU-1",))
    second = replace(BOX, id="bbbbbbbb", cards=("GPU-2",))
    before = await looked(Reader(second, first))
    assert before.placements == {
        "gpu-box-aaaaaa-cpu": ("aaaaaaaa", None),
        "gpu-box-aaaaaa-gpu0": ("aaaaaaaa", "GPU-1"),
        "gpu-box-bbbbbb-cpu": ("bbbbbbbb", None),
        "gpu-box-bbbbbb-gpu0": ("bbbbbbbb", "GPU-2"),
    }
    after = await looked(Reader(first, second), before.registry)
    assert after.placements == before.placements


async def test_a_card_keeps_its_number_for_good() -> None:
    registry = Bindings(gpu0="GPU-9")
    await looked(Reader(BOX), registry)
    assert registry.stored == {
        "gpu0": "GPU-9",
        "swarm:gpu-box-gpu0": "GPU-1",
        "swarm:gpu-box-gpu1": "GPU-2",
    }
    left = await looked(Reader(replace(BOX, cards=("GPU-3", "GPU-2"))), registry)
    assert left.cards.named == {"gpu-box-gpu2": ("GPU-3",), "gpu-box-gpu1": ("GPU-2",)}


async def test_a_card_that_was_moved_to_another_host_gets_an_id_of_that_host() -> None:
    registry = Bindings()
    await looked(Reader(BOX), registry)
    ground = await looked(Reader(replace(DESK, cards=("GPU-2",))), registry)
    assert ground.ids == ["desk-cpu", "desk-gpu0"]


async def test_a_card_has_no_instance_as_long_as_its_number_cannot_be_stored() -> None:
    registry = Bindings()
    registry.is_full = True
    ground = await looked(Reader(BOX), registry)
    assert ground.ids == ["gpu-box-cpu"]
    registry.is_full = False
    await ground.found.look()
    assert ground.ids == ["gpu-box-cpu", "gpu-box-gpu0", "gpu-box-gpu1"]


async def test_more_than_most_are_not_made_and_that_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_FOUND", 2)
    ground = await looked(Reader(BOX, DESK))
    await ground.found.look()
    assert ground.ids == ["gpu-box-cpu", "gpu-box-gpu0"]
    assert ground.journal.details_of("found_unusable") == [
        "there are 2 instances already; no more are made",
        "there are 2 instances already; no more are made",
    ]


async def test_an_instance_that_cannot_be_made_says_why_once_and_the_others_are_made() -> None:
    ground = Ground(Reader(BOX))
    ground.refusals["gpu-box-cpu"] = "expected a template"
    await ground.found.look()
    await ground.found.look()
    assert ground.ids == ["gpu-box-gpu0", "gpu-box-gpu1"]
    assert ground.journal.details_of("found_unusable") == ["expected a template"]


async def test_a_new_node_is_found_while_the_daemon_runs_and_told_what_the_engine_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = Reader()
    ground = Ground(reader)
    joined: list[str] = []
    monkeypatch.setattr(ground.rig.link, "join", lambda one: joined.append(one.id))
    async with _running(ground):
        reader.found = (DESK,)
        await until(lambda: joined == ["desk-cpu"])


@asynccontextmanager
async def _running(ground: Ground) -> AsyncIterator[None]:
    task = asyncio.ensure_future(ground.found.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
