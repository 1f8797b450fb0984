"""The nodes of a swarm: what they are now, and the instances that each of them gives."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from manager.domain.gpu_metrics import AdvertisedCard
from manager.domain.instance import Driver
from manager.domain.swarm import Node, home_of, instance_stem, live_nodes, one_node, why_no_node
from manager.errors import ConfigurationError, EngineError, GpuQueryError, RegistryUnwritableError
from manager.services.instances.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.instance import ContainerFacts, InstanceSpec
    from manager.services.instances.engine_link import EngineLink
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance
    from manager.services.ports import Registry
    from manager.services.world import World

# Bindings of cards of nodes stand beside those of this machine; no id of an instance has a colon.
_BINDING = "swarm:"
# Instances that are found beyond these are not made: each has tasks and probes of its own.
MOST_FOUND = 1000


class NodeReader(Protocol):
    """Reads the nodes of a swarm. Raises `EngineError` and its kin only."""

    async def nodes(self) -> tuple[Node, ...]: ...
    async def own_node(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class FoundInstance:
    """An instance that a node gives. `card` is None for the CPU; `placement` is the constraint of the node.

    `number` tells the instances of one node from each other.
    """

    id: str
    node: Node
    card: str | None
    placement: str
    number: int = 0


class Nodes:
    """Owns the last reading of the nodes. A failed reading keeps the one before, and its `trouble`.

    Args:
        reader: of the swarm.
    """

    def __init__(self, reader: NodeReader) -> None:
        self._reader = reader
        self.current: tuple[Node, ...] = ()
        self.own: str | None = None
        self.trouble = "Docker Swarm has not been asked yet"

    async def refresh(self) -> None:
        """Take a new reading."""
        try:
            if self.own is None:
                self.own = await self._reader.own_node()
            self.current = await self._reader.nodes()
        except EngineError as error:
            self.trouble = error.message
        else:
            self.trouble = ""

    def name_for(self, spec: InstanceSpec, container: ContainerFacts | None) -> str | None:
        """Return the host name of the node that an instance runs on, or will run on.

        None is for an instance without a service, and where Swarm has not chosen its node yet.
        """
        if spec.driver is not Driver.SWARM:
            return None
        if container is not None and container.node is not None:
            return container.node
        cards = spec.devices or (() if spec.device is None else (spec.device,))
        return home_of(spec.placement, cards, self.current)

    def why_no_node(self, placement: tuple[str, ...]) -> str | None:
        """Return why no node can take a service with these constraints; None where one can, or may."""
        return None if self.trouble else why_no_node(self.current, placement)

    async def advertised(self) -> tuple[AdvertisedCard, ...]:
        """Return the cards of the nodes, as of the last reading.

        Raises:
            GpuQueryError: Docker Swarm did not tell.
        """
        if self.trouble:
            raise GpuQueryError(self.trouble)
        return tuple(
            AdvertisedCard(
                card,
                node.id,
                node.name,
                node.address.strip("[]"),
                lost=None if node.is_up else f"its node {node.name} is down",
            )
            for node in self.current
            for card in node.cards
        )


class FoundNodes:
    """Reads the nodes again and again, and adds an instance for the CPU and for each card of a new one.

    An instance stays as long as the daemon runs, and the number of a card for good. A node that was removed
    from the swarm leaves its instances out of reach; the next start does not make them.

    Args:
        world: of the instances of the swarm.
        nodes: the readings.
        fleet: gets the new instances.
        link: tells them what Swarm says.
        wanted: the setting `swarm.instances`.
        make: makes an instance; raises ConfigurationError where there is no template for it.
        interval_s: between two readings.
    """

    def __init__(
        self,
        world: World,
        nodes: Nodes,
        fleet: Fleet,
        link: EngineLink,
        *,
        wanted: Literal["none", "auto", "all"],
        make: Callable[[FoundInstance], Instance],
        interval_s: float,
    ) -> None:
        self._world = world
        self._nodes = nodes
        self._fleet = fleet
        self._link = link
        self._wanted = wanted
        self._make = make
        self._interval_s = interval_s
        # By the id of a node: the beginning of the ids of its instances, and its constraint.
        self._stems: dict[str, tuple[str, str]] = {}
        self._cards: dict[str, str] | None = None  # by the id of an instance: its card
        self._unusable: set[str] = set()

    async def run(self) -> None:
        """Watch the nodes, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._interval_s)

    async def look(self) -> None:
        """Read the nodes and their cards once, and add the instances of new ones."""
        await self._nodes.refresh()
        await self._world.gpus.refresh()
        if self._wanted == "none" or self._nodes.trouble:
            return
        for node, is_only in live_nodes(self._nodes.current):
            if node.id != self._nodes.own or self._wanted == "all":
                for found in await self._of(node, is_only=is_only):
                    self._add(found)

    # --- helpers ---

    async def _of(self, node: Node, *, is_only: bool) -> list[FoundInstance]:
        stem, placement = self._stems.get(node.id) or (
            instance_stem(node, is_only=is_only),
            one_node(node, is_only=is_only),
        )
        if len(self._stems) < MOST_FOUND:
            self._stems[node.id] = stem, placement
        found = [FoundInstance(f"{stem}-cpu", node, None, placement)]
        for card in node.cards:
            instance_id = await self._id_of_card(self._world.registry, stem, card)
            if instance_id is not None:
                number = int(instance_id.rpartition("-gpu")[2]) + 1
                found.append(FoundInstance(instance_id, node, card, placement, number))
        return found

    async def _id_of_card(self, registry: Registry, stem: str, card: str) -> str | None:
        """Return the id of a card's instance, which it keeps for good; None where that cannot be told now."""
        try:
            return await self._stored_id(registry, stem, card)
        except RegistryUnwritableError:
            return None  # a full disk ends nothing: the next reading binds again
        except ValueError:
            self._cards = None  # another gateway has bound that id: read again
            return None

    async def _stored_id(self, registry: Registry, stem: str, card: str) -> str:
        if self._cards is None:
            stored = await registry.bindings()
            self._cards = {
                id_.removeprefix(_BINDING): uuid for id_, uuid in stored.items() if id_.startswith(_BINDING)
            }
        for id_, uuid in self._cards.items():
            if uuid == card and id_.rpartition("-")[0] == stem:
                return id_
        new = next(id_ for n in range(len(self._cards) + 1) if (id_ := f"{stem}-gpu{n}") not in self._cards)
        await registry.add_bindings({f"{_BINDING}{new}": card})
        self._cards[new] = card
        return new

    def _add(self, found: FoundInstance) -> None:
        if found.id in self._fleet or found.id in self._unusable:
            return
        if len(self._fleet.instances()) >= MOST_FOUND:
            self._note_unusable(found, f"there are {MOST_FOUND} instances already; no more are made")
            return
        try:
            instance = self._make(found)
        except ConfigurationError as error:
            self._note_unusable(found, error.message)
            return
        if found.card is not None:
            self._world.gpus.name_cards(found.id, (found.card,))
        self._fleet.add(instance)
        where = f"{found.card or 'CPU'} of node {found.node.name}"
        self._world.journal.record("found", instance=instance.id, detail=where)
        if isinstance(instance, Supervisor):
            self._link.join(instance)

    def _note_unusable(self, found: FoundInstance, why: str) -> None:
        if len(self._unusable) < MOST_FOUND:
            self._unusable.add(found.id)
            self._world.journal.record("found_unusable", instance=found.id, detail=why)
