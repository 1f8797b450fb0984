"""The set of instances."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from manager.domain.wording import listed
from manager.errors import ConflictError, UnknownInstanceError
from manager.services.instances.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manager.domain.instance import InstanceSpec
    from manager.services.instances.instance import Instance
    from manager.services.world import World


class Fleet:
    """Owns the set of instances. Others read views, which are copies.

    Args:
        world: what the instances share.
        save_interval_s: how often the last use of each instance is stored.
    """

    def __init__(self, world: World, *, save_interval_s: float) -> None:
        self._world = world
        self._save_interval_s = save_interval_s
        self._instances: dict[str, Instance] = {}
        self._joined: asyncio.Queue[Instance] = asyncio.Queue()

    def add(self, instance: Instance) -> None:
        """Take in one more instance, in the last place. It runs as long as `run` does."""
        self._instances[instance.id] = instance
        self._joined.put_nowait(instance)
        self._world.revision.advance()

    def reconfigure(self, specs: Iterable[InstanceSpec]) -> None:
        """Take over new specs of the same instances; only what may change while they run differs."""
        for spec in specs:
            self.get(spec.id).reconfigure(spec)
        self._world.revision.advance()

    def get(self, instance_id: str) -> Instance:
        """Return the instance of that id.

        Raises:
            UnknownInstanceError: there is none; the message names all instances.
        """
        try:
            return self._instances[instance_id]
        except KeyError:
            message = f"there is no instance {instance_id!r}; there is: {listed(self._instances)}"
            raise UnknownInstanceError(message, instance=instance_id) from None

    def managed(self, instance_id: str) -> Supervisor:
        """Return the instance of that id, which must be one with a container.

        Raises:
            UnknownInstanceError: there is none.
            ConflictError: it is an external one.
        """
        instance = self.get(instance_id)
        if not isinstance(instance, Supervisor):
            raise ConflictError(
                f"{instance_id} is {instance.spec.driver.value}: it has no container of ours",
                instance=instance_id,
            )
        return instance

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._instances

    def instances(self) -> tuple[Instance, ...]:
        """Return all instances: the configured ones in order, then those of cards that were found."""
        return tuple(self._instances.values())

    def supervisors(self) -> list[Supervisor]:
        """Return the instances with containers."""
        return [instance for instance in self._instances.values() if isinstance(instance, Supervisor)]

    def images(self) -> tuple[str, ...]:
        """Return the images of the instances, each once."""
        templates = (instance.spec.template for instance in self._instances.values())
        return tuple(dict.fromkeys(template.image for template in templates if template is not None))

    async def run(self) -> None:
        """Run every instance, until cancelled. An error here is a defect and ends the daemon."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._save_forever(), name="saving")
            while True:
                instance = await self._joined.get()
                tasks.create_task(instance.run(), name=f"instance {instance.id}")

    async def save(self) -> None:
        """Store the last use of each instance."""
        for supervisor in self.supervisors():
            await supervisor.save_use()

    async def _save_forever(self) -> None:
        while True:
            await asyncio.sleep(self._save_interval_s)
            await self.save()
