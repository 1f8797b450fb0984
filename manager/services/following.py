"""Follows what other gateways change in the database that they share with this one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from manager.domain.drained import drained_from
from manager.domain.lifted import lifted_from
from manager.domain.registry import OrderKind
from manager.errors import ManagerError, RegistryCorruptError, RegistryUnwritableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import datetime

    from manager.services.accounts.quotas import Quotas
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.lifts import Lifts
    from manager.services.instances.service import Service
    from manager.services.journal import Journal
    from manager.services.ports import KeyUse, Registry, Shared

_log = structlog.get_logger("following")

# A change elsewhere is in force so much later, and the time of one look.
_LOOK_S = 0.5


class Following:
    """Looks twice a second what has changed, and has it read again. Lives on the event loop.

    While the database is away everything stays as it was: keys that were revoked elsewhere work on here. So
    that is an event and a line in the log, and `trouble` says it as long as it lasts.

    Args:
        shared: tells what has changed.
        journal: takes an event when the database is away, and when it is back.
        reloads: what to do after a change, by its kind. One that fails because of the database is done again.
        quotas: take and give the use of keys.
    """

    def __init__(
        self,
        shared: Shared,
        journal: Journal,
        *,
        reloads: Mapping[str, Callable[[], Awaitable[None]]],
        quotas: Quotas,
    ) -> None:
        self._shared = shared
        self._journal = journal
        self._reloads = reloads
        self._quotas = quotas
        self._known: dict[str, int] = {}
        self._is_doubled = False
        self.trouble: str | None = None

    async def run(self) -> None:
        """Follow until cancelled. The first look reads everything: it may have changed during the start."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_S)

    async def look(self) -> None:
        """Look once."""
        try:
            self._told_of_double(is_held=await self._shared.hold())
            numbers = await self._exchange()
            for topic, reload in self._reloads.items():
                number = numbers.get(topic, 0)
                if self._known.get(topic) != number:
                    await self._reload(topic, reload)
                    self._known[topic] = number
        except (RegistryUnwritableError, RegistryCorruptError) as error:
            if self.trouble is None:
                detail = f"changes of other gateways are not in force here: {error.message}"
                self._journal.record("database_away", detail=detail)
            self.trouble = error.message
            # What failed here meanwhile, such as a revocation, is stored with the next reading.
            self._known.clear()
        else:
            if self.trouble is not None:
                self._journal.record("database_back", detail="changes of other gateways are in force again")
            self.trouble = None

    async def _reload(self, topic: str, reload: Callable[[], Awaitable[None]]) -> None:
        try:
            await reload()
        except (RegistryUnwritableError, RegistryCorruptError):
            raise
        except ManagerError as error:  # it does not fit what there is here, and would not fit the next time
            _log.warning("change_not_followed", topic=topic, error=error.message)

    async def _exchange(self) -> Mapping[str, int]:
        own: Mapping[str, KeyUse] = self._quotas.own_uses()
        numbers, others = await self._shared.exchange(own)
        self._quotas.was_told(own)
        self._quotas.take_others(others)
        return numbers

    def _told_of_double(self, *, is_held: bool) -> None:
        if not is_held and not self._is_doubled:
            _log.warning(
                "gateway_doubled",
                detail="another process has the name of this gateway: its state directory was copied, or the "
                "server has not noticed yet that an earlier process has ended",
            )
        self._is_doubled = not is_held


class FollowedOrders:
    """Carries out the orders for instances that were given at another gateway.

    The other gateway stops and starts containers; here an instance gets no requests, or gets them again.

    Args:
        registry: has the orders.
        fleet: the instances.
        service: takes them out of service, and back.
        lifts: lift their deny rules.
        utcnow: the wall clock.
    """

    def __init__(
        self,
        registry: Registry,
        fleet: Fleet,
        service: Service,
        lifts: Lifts,
        *,
        utcnow: Callable[[], datetime],
    ) -> None:
        self._registry = registry
        self._fleet = fleet
        self._service = service
        self._lifts = lifts
        self._utcnow = utcnow

    async def drains(self) -> None:
        """Take those out of service that are elsewhere, and put the others back."""
        before = {one.id: one.drained for one in self._fleet.instances()}
        wanted = await self._registry.orders(OrderKind.DRAINED, drained_from)
        for instance in self._fleet.instances():
            known, order = instance.drained, wanted.get(instance.id)
            if instance.id not in before or known != before[instance.id]:
                continue  # changed here meanwhile: the next look has that
            if order is None:
                if known is not None:
                    await self._service.resume(instance.id)
            elif not order.has_passed(self._utcnow()) and (
                known is None
                or (order.reason, order.until, order.stops) != (known.reason, known.until, known.stops)
            ):
                await self._service.drain(
                    instance.id, reason=order.reason, until=order.until, stops=order.stops
                )

    async def lifted(self) -> None:
        """Lift the deny rules that are lifted elsewhere, and put the others in force."""
        before = {one.id: self._lifts.of(one.id) for one in self._fleet.instances()}
        wanted = await self._registry.orders(OrderKind.LIFTED, lifted_from)
        for instance_id, known in before.items():
            order = wanted.get(instance_id)
            if self._lifts.of(instance_id) != known:
                continue
            if order is None:
                if known is not None:
                    await self._lifts.end(instance_id)
            elif not order.has_passed(self._utcnow()) and (
                known is None or (order.until, order.reason) != (known.until, known.reason)
            ):
                await self._lifts.lift(instance_id, until=order.until, reason=order.reason)
