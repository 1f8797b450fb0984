"""Cards that are found while the daemon runs get instances of their own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from manager.errors import ConfigurationError
from manager.services.instances.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.services.instances.engine_link import EngineLink
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance
    from manager.services.world import World


class FoundCards:
    """Reads the cards again and again, and adds an instance for each new one.

    Args:
        world: the cards and the journal.
        fleet: gets the new instances.
        link: tells them what the engine says.
        make: makes the instance of that id; raises ConfigurationError where there is no template for it.
        interval_s: between two readings.
    """

    def __init__(
        self,
        world: World,
        fleet: Fleet,
        link: EngineLink,
        *,
        make: Callable[[str], Instance],
        interval_s: float,
    ) -> None:
        self._world = world
        self._fleet = fleet
        self._link = link
        self._make = make
        self._interval_s = interval_s
        self._unusable: set[str] = set()

    async def run(self) -> None:
        """Watch the cards, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self.look()

    async def look(self) -> None:
        """Read the cards once."""
        await self._world.gpus.refresh()
        for instance_id in self._world.gpus.instance_ids():
            if instance_id not in self._fleet and instance_id not in self._unusable:
                self._add(instance_id)

    def _add(self, instance_id: str) -> None:
        try:
            instance = self._make(instance_id)
        except ConfigurationError as error:
            # A card that somebody plugs in must not end a daemon that works without it.
            self._unusable.add(instance_id)
            self._world.journal.record("found_unusable", instance=instance_id, detail=error.message)
            return
        self._fleet.add(instance)
        self._world.journal.record(
            "found", instance=instance.id, detail=", ".join(self._world.gpus.uuids_of(instance.id))
        )
        if isinstance(instance, Supervisor):
            self._link.join(instance)
