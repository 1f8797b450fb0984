"""Restarts, upgrades and roll-backs of single instances, on an operator's order."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from manager.domain.image_override import rolled_back, upgraded
from manager.domain.registry import OrderKind
from manager.errors import ConflictError, InvalidRequestError, Reason, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.image_override import ImageOverride
    from manager.services.instances.capacity import Capacity
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.supervisor import Supervisor
    from manager.services.world import World


class Upgrades:
    """Replaces containers. What could not be started again is refused, and then nothing has changed.

    Args:
        world: the engine, the registry, the journal and the clock.
        fleet: the instances.
        capacity: gives a place to an instance that does not run.
        may_use: whether the operator allows an image.
    """

    def __init__(
        self, world: World, fleet: Fleet, capacity: Capacity, *, may_use: Callable[[str], bool]
    ) -> None:
        self._world = world
        self._fleet = fleet
        self._capacity = capacity
        self._may_use = may_use
        self._turn = asyncio.Lock()

    async def restart(self, instance_id: str, *, wait: bool) -> None:
        """Replace the container of an instance by a new one. One that does not run is started.

        New requests prefer other instances, and wait for this one where there is none. Open ones end first,
        however long they take.

        Args:
            instance_id: of an instance with a container.
            wait: until it is ready again.

        Raises:
            UnknownInstanceError, ConflictError: there is none, it is external, or out of service.
            ManagerError: it could not be started again, or was not.
        """
        supervisor = self._fleet.managed(instance_id)
        supervisor.replacing.refuse()
        await self._refuse_absent(supervisor, supervisor.replacing.image)
        supervisor.replacing.refuse()
        await self._replace(supervisor, "to be restarted", wait=wait)

    async def upgrade(self, instance_id: str, image: str, *, wait: bool) -> bool:
        """Choose another image for an instance, and restart it if it runs; False when it has that image.

        Args:
            instance_id: of an instance with a container.
            image: an allowed one that the engine has.
            wait: until the instance is ready again, if it is restarted.

        Raises:
            InvalidRequestError: the image is not allowed.
            ManagerError: as `restart`, or the image is not there, or it could not be stored.
        """
        supervisor = self._fleet.managed(instance_id)
        async with self._turn:
            if image == supervisor.replacing.image:
                return False
            override = upgraded(supervisor.replacing.override, image, self._world.utcnow())
            restarts = await self._change(supervisor, override, image)
        if restarts:
            await self._replace(supervisor, f"to run {image}", wait=wait)
        return True

    async def rollback(self, instance_id: str, *, wait: bool) -> None:
        """Return to the image before the last upgrade, and restart the instance unless it is stopped.

        Raises:
            ConflictError: there is no upgrade.
            ManagerError: as `upgrade`.
        """
        supervisor = self._fleet.managed(instance_id)
        async with self._turn:
            override, chosen = supervisor.replacing.override, supervisor.replacing.in_force
            if override is None or chosen is None:
                message = f"{instance_id} uses the image of its template, {supervisor.replacing.image}"
                raise ConflictError(f"{message}: there is no upgrade to roll back", instance=instance_id)
            earlier = rolled_back(override, self._world.utcnow())
            restarts = await self._change(supervisor, earlier, chosen.previous)
        if restarts:
            await self._replace(supervisor, f"to run {chosen.previous} again", wait=wait)

    # --- helpers, in call order ---

    async def _change(self, supervisor: Supervisor, override: ImageOverride | None, image: str) -> bool:
        """Store and use another image; return whether the instance is to be restarted for it."""
        replacing = supervisor.replacing
        if not self._may_use(image):
            message = f"image: {image!r} is not in allow.images of the configuration"
            raise InvalidRequestError(message, instance=supervisor.id)
        await self._refuse_absent(supervisor, image)
        if supervisor.drained is None:
            replacing.refuse()
        elif replacing.has_container:
            message = f"{supervisor.id} is out of service and its container runs: resume or stop it first"
            raise ConflictError(message, instance=supervisor.id)
        before = replacing.image
        stored = None if override is None else override.stored()
        await self._world.registry.save_order(supervisor.id, OrderKind.IMAGE, stored)
        supervisor.use_image(override)
        self._world.journal.record("image_changed", instance=supervisor.id, detail=f"{before} -> {image}")
        return supervisor.drained is None and not replacing.is_stopped

    async def _refuse_absent(self, supervisor: Supervisor, image: str) -> None:
        if not await supervisor.engine.has_image(image):
            raise UnavailableError(
                f"the engine has no image {image}; pull it with `ollama-manager pull {image}`",
                reason=Reason.IMAGE_MISSING,
                instance=supervisor.id,
            )

    async def _replace(self, supervisor: Supervisor, detail: str, *, wait: bool) -> None:
        self._world.journal.record("restarting", instance=supervisor.id, detail=detail)
        if supervisor.replacing.can_restart:
            supervisor.replacing.begin(detail)
            if wait:
                await supervisor.replacing.ended()
        elif wait:
            await self._capacity.start(supervisor.id)
        else:
            self._capacity.begin_start(supervisor.id)
