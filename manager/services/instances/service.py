"""Instances out of service: an operator's orders, stored, and the end of those whose time has passed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from manager.domain.drained import Drained, drained_from
from manager.domain.instance import Target
from manager.domain.registry import OrderKind
from manager.errors import InvalidRequestError, ManagerError, RegistryUnwritableError, UnavailableError
from manager.services.instances.container_run import happens
from manager.services.instances.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from manager.services.instances.capacity import Capacity
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.instance import Instance
    from manager.services.world import World

# The system's clock may be set, and stands still while the machine sleeps: the end of an order is late by
# this at most.
_LOOK_S = 15.0
_ELSEWHERE = "asked for at another gateway"


class Service:
    """Owns which instances are out of service. An order is stored before it is carried out.

    Args:
        world: the registry, the journal and the clock.
        fleet: the instances.
        capacity: starts those again that are to return.
        asked: each is set once an engine has answered or failed.
    """

    def __init__(
        self, world: World, fleet: Fleet, capacity: Capacity, asked: Sequence[asyncio.Event]
    ) -> None:
        self._world = world
        self._fleet = fleet
        self._capacity = capacity
        self._asked = asked
        self._turn = asyncio.Lock()
        self._news = asyncio.Event()

    async def drain(
        self, instance_id: str, *, reason: str | None, until: datetime | None, stops: bool
    ) -> bool:
        """Take an instance out of service, or change such an order; False when it stands like that already.

        It gets no requests from now on. `Instance.out` waits for the open ones.

        Raises:
            UnknownInstanceError: there is none of that id.
            InvalidRequestError: `until` has passed.
            RegistryUnwritableError: it could not be stored; nothing was changed.
        """
        instance = self._fleet.get(instance_id)
        now = self._world.utcnow()
        if until is not None and until <= now:
            raise InvalidRequestError(
                f"until: expected a time in the future, after {_text(now)}; not {_text(until)}",
                instance=instance_id,
            )
        async with self._turn:
            before = instance.drained
            if before is None:
                ran = instance.view().target is Target.RUNNING
                drained = Drained(now, until, reason, stops, ran)
            else:
                drained = replace(before, until=until, reason=reason, stops=stops)
            if drained == before:
                return False
            await self._world.registry.save_order(instance_id, OrderKind.DRAINED, drained.stored())
            self._take_out(instance, drained, "asked for")
        return True

    async def resume(self, instance_id: str) -> bool:
        """Put an instance back in service; False when it was in service already.

        A pinned one that ran, and one that was to start with the daemon, is started again.

        Raises:
            UnknownInstanceError: there is none of that id.
            RegistryUnwritableError: it could not be stored; nothing was changed.
        """
        instance = self._fleet.get(instance_id)
        async with self._turn:
            if instance.drained is None:
                return False
            await self._world.registry.save_order(instance_id, OrderKind.DRAINED, None)
            self._bring_back(instance, "asked for")
        return True

    async def follow(self) -> None:
        """Carry out the stored orders, which may have been given at another gateway. Nothing is stored.

        Raises:
            ManagerError: they could not be read; nothing was changed.
        """
        async with self._turn:
            stored = await self._world.registry.orders(OrderKind.DRAINED, drained_from)
            now = self._world.utcnow()
            for instance in self._fleet.instances():
                known, order = instance.drained, stored.get(instance.id)
                if order is None:
                    if known is not None:
                        self._bring_back(instance, _ELSEWHERE)
                elif not order.has_passed(now):
                    ran = instance.view().target is Target.RUNNING if known is None else known.ran
                    order = replace(order, ran=order.ran or ran)
                    if order != known:
                        self._take_out(instance, order, _ELSEWHERE)

    async def run(self) -> None:
        """End the orders whose time has passed, until cancelled."""
        for asked in self._asked:
            await asked.wait()  # before that nothing can be started again
        while True:
            self._news.clear()
            now = self._world.utcnow()
            ends = []
            for instance in self._fleet.instances():
                drained = instance.drained
                if drained is not None and drained.has_passed(now):
                    await self._end(instance, drained)
                elif drained is not None and drained.until is not None:
                    ends.append((drained.until - now).total_seconds())
            if ends:
                await happens(self._news, min(_LOOK_S, *ends))
            else:
                await self._news.wait()

    # --- helpers, in call order ---

    def _take_out(self, instance: Instance, drained: Drained, detail: str) -> None:
        self._capacity.withdraw(instance.id)
        instance.take_out(drained)
        self._news.set()
        detail = drained.reason or detail
        if drained.until is not None:
            detail += f"; until {_text(drained.until)}"
        self._world.journal.record("drained", instance=instance.id, detail=detail)

    def _bring_back(self, instance: Instance, detail: str) -> None:
        returns = instance.returns
        instance.bring_back()
        self._world.journal.record("resumed", instance=instance.id, detail=detail)
        if returns and isinstance(instance, Supervisor):
            try:
                self._capacity.begin_start(instance.id)
            except ManagerError as error:
                reason = error.reason if isinstance(error, UnavailableError) else None
                self._world.journal.record(
                    "start_refused", instance=instance.id, reason=reason, detail=error.message
                )

    async def _end(self, instance: Instance, drained: Drained) -> None:
        async with self._turn:
            if instance.drained != drained or drained.until is None:
                return  # the order was changed meanwhile
            self._bring_back(instance, "its time has passed")
            with suppress(RegistryUnwritableError):  # a later daemon ends it as well
                await self._world.registry.end_order(instance.id, OrderKind.DRAINED, drained.until)


def _text(time: datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"
