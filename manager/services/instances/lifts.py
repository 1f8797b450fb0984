"""Deny rules that an operator has lifted: stored, and in force again once their time has passed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from manager.domain.lifted import Lifted, lifted_from
from manager.domain.registry import OrderKind
from manager.errors import InvalidRequestError, RegistryUnwritableError
from manager.services.instances.container_run import happens

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from manager.services.instances.fleet import Fleet
    from manager.services.world import World

# The system's clock may be set, and stands still while the machine sleeps: the end of a lift is late by this
# at most.
_LOOK_S = 15.0


class Lifts:
    """Owns which instances have their deny rules lifted. An order is stored before it holds.

    Args:
        world: the registry, the journal and the clock.
        fleet: the instances.
        stored: the orders of an earlier run, by instance.
    """

    def __init__(self, world: World, fleet: Fleet, stored: Mapping[str, Lifted]) -> None:
        self._world = world
        self._fleet = fleet
        self._lifted = dict(stored)
        self._turn = asyncio.Lock()
        self._news = asyncio.Event()

    def of(self, instance_id: str) -> Lifted | None:
        """Return the order for an instance; None where its rules hold."""
        lifted = self._lifted.get(instance_id)
        return None if lifted is None or lifted.has_passed(self._world.utcnow()) else lifted

    async def lift(self, instance_id: str, *, until: datetime, reason: str | None) -> bool:
        """Lift the rules of an instance, or change such an order; False when it stands like that already.

        Raises:
            UnknownInstanceError: there is none of that id.
            InvalidRequestError: `until` has passed.
            RegistryUnwritableError: it could not be stored; nothing was changed.
        """
        self._fleet.get(instance_id)
        now = self._world.utcnow()
        if until <= now:
            message = f"until: expected a time in the future, after {_text(now)}; not {_text(until)}"
            raise InvalidRequestError(message, instance=instance_id)
        async with self._turn:
            before = self.of(instance_id)
            lifted = Lifted(now, until, reason)
            if before is not None:
                lifted = replace(before, until=until, reason=reason)
            if lifted == before:
                return False
            await self._world.registry.save_order(instance_id, OrderKind.LIFTED, lifted.stored())
            self._take(instance_id, lifted)
        return True

    async def end(self, instance_id: str) -> bool:
        """Put the rules of an instance in force again; False when they were.

        Raises:
            UnknownInstanceError: there is none of that id.
            RegistryUnwritableError: it could not be stored; nothing was changed.
        """
        self._fleet.get(instance_id)
        async with self._turn:
            if instance_id not in self._lifted:
                return False
            await self._world.registry.save_order(instance_id, OrderKind.LIFTED, None)
            self._forget(instance_id, "asked for")
        return True

    async def follow(self) -> None:
        """Carry out the stored orders, which may have been given at another gateway. Nothing is stored.

        Raises:
            ManagerError: they could not be read; nothing was changed.
        """
        async with self._turn:
            stored = await self._world.registry.orders(OrderKind.LIFTED, lifted_from)
            now = self._world.utcnow()
            for instance in self._fleet.instances():
                known, order = self._lifted.get(instance.id), stored.get(instance.id)
                if order is None:
                    if known is not None:
                        self._forget(instance.id, "asked for at another gateway")
                elif order != known and not order.has_passed(now):
                    self._take(instance.id, order)

    async def run(self) -> None:
        """End the orders whose time has passed, until cancelled."""
        while True:
            self._news.clear()
            now = self._world.utcnow()
            for instance_id in [id_ for id_, lifted in self._lifted.items() if lifted.has_passed(now)]:
                await self._pass(instance_id)
            if self._lifted:
                left_s = min((one.until - now).total_seconds() for one in self._lifted.values())
                await happens(self._news, min(_LOOK_S, max(0.0, left_s)))
            else:
                await self._news.wait()

    # --- helpers ---

    def _take(self, instance_id: str, lifted: Lifted) -> None:
        self._lifted[instance_id] = lifted
        self._world.revision.advance()
        self._news.set()
        detail = f"until {_text(lifted.until)}" + (f": {lifted.reason}" if lifted.reason else "")
        self._world.journal.record("deny_rules_lifted", instance=instance_id, detail=detail)

    async def _pass(self, instance_id: str) -> None:
        async with self._turn:
            lifted = self._lifted.get(instance_id)
            if lifted is None or not lifted.has_passed(self._world.utcnow()):
                return  # the order was changed meanwhile
            self._forget(instance_id, "its time has passed")
            with suppress(RegistryUnwritableError):  # a later daemon ends it as well
                await self._world.registry.end_order(instance_id, OrderKind.LIFTED, lifted.until)

    def _forget(self, instance_id: str, detail: str) -> None:
        del self._lifted[instance_id]
        self._world.revision.advance()
        self._world.journal.record("deny_rules_in_force", instance=instance_id, detail=detail)


def _text(time: datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"
