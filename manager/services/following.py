"""Follows what other gateways change in the database that they share with this one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from manager.domain.image_override import override_from
from manager.domain.registry import OrderKind, PinAndTtl
from manager.errors import ManagerError, RegistryCorruptError, RegistryUnwritableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from manager.services.accounts.quotas import Quotas
    from manager.services.instances.fleet import Fleet
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
        members: returns the ids of all instances. One that joins gets its orders with the next look.
    """

    def __init__(
        self,
        shared: Shared,
        journal: Journal,
        *,
        reloads: Mapping[str, Callable[[], Awaitable[None]]],
        quotas: Quotas,
        members: Callable[[], frozenset[str]],
    ) -> None:
        self._shared = shared
        self._journal = journal
        self._reloads = reloads
        self._quotas = quotas
        self._members = members
        self._known: dict[str, int] = {}
        self._known_members: frozenset[str] = frozenset()
        self._unread: dict[str, str] = {}
        self._is_doubled = False
        self._is_away = False
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
            members = self._members()
            if members != self._known_members:
                self._known.clear()
                self._known_members = members
            for topic, reload in self._reloads.items():
                number = numbers.get(topic, 0)
                if self._known.get(topic) != number:
                    await self._reload(topic, number, reload)
        except (RegistryUnwritableError, RegistryCorruptError) as error:
            if not self._is_away:
                detail = f"changes of other gateways are not in force here: {error.message}"
                self._journal.record("database_away", detail=detail)
            self._is_away, self.trouble = True, error.message
            # What failed here meanwhile, such as a revocation, is stored with the next reading.
            self._known.clear()
        else:
            if self._is_away:
                self._journal.record("database_back", detail="changes of other gateways are in force again")
            self._is_away, self.trouble = False, next(iter(self._unread.values()), None)

    async def _reload(self, topic: str, number: int, reload: Callable[[], Awaitable[None]]) -> None:
        try:
            await reload()
        except RegistryUnwritableError:
            raise
        except RegistryCorruptError as error:  # it is tried again; the other topics are followed meanwhile
            if topic not in self._unread:
                _log.warning("change_not_followed", topic=topic, error=error.message)
            self._unread[topic] = f"changes of {topic} are not in force here: {error.message}"
            return
        except ManagerError as error:  # it does not fit what there is here, and would not fit the next time
            _log.warning("change_not_followed", topic=topic, error=error.message)
        self._unread.pop(topic, None)
        self._known[topic] = number

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
    """Puts in force what was ordered of instances with containers at another gateway. Stores nothing.

    Args:
        registry: has the orders.
        journal: takes an event for each.
        fleet: the instances.
        may_use: whether the operator allows an image here.
    """

    def __init__(
        self, registry: Registry, journal: Journal, fleet: Fleet, *, may_use: Callable[[str], bool]
    ) -> None:
        self._registry = registry
        self._journal = journal
        self._fleet = fleet
        self._may_use = may_use

    async def images(self) -> None:
        """Use the images that were chosen elsewhere. The other gateway replaces what runs."""
        before = {one.id: one.replacing.override for one in self._fleet.supervisors()}
        stored = await self._registry.orders(OrderKind.IMAGE, override_from)
        for supervisor in self._fleet.supervisors():
            known, chosen = supervisor.replacing.override, stored.get(supervisor.id)
            if chosen is not None and not self._may_use(chosen.image):
                detail = f"{chosen.image} is not in allow.images here: its template's image is used"
                self._journal.record("image_not_allowed", instance=supervisor.id, detail=detail)
                chosen = None
            # One that was changed here meanwhile is read by the next look.
            if supervisor.id in before and known == before[supervisor.id] and chosen != known:
                earlier = supervisor.replacing.image
                supervisor.follow_image(chosen)
                detail = f"{earlier} -> {supervisor.replacing.image}, at another gateway"
                self._journal.record("image_changed", instance=supervisor.id, detail=detail)

    async def pins_and_ttls(self) -> None:
        """Take over pins and TTLs that were changed elsewhere."""
        before = {one.id: one.overrides for one in self._fleet.supervisors()}
        stored = await self._registry.pins_and_ttls()
        as_configured = PinAndTtl(pinned=None, ttl_s=None)
        for supervisor in self._fleet.supervisors():
            known, wanted = supervisor.overrides, stored.get(supervisor.id, as_configured)
            if known == before.get(supervisor.id) and wanted != known:
                supervisor.follow(wanted)
