"""Slots of instances and queues of lanes: gives each request a slot, or a place in the queue of its lane."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from manager.domain.lanes import NO_ROLE, LaneRules, Lanes, Waiter
from manager.domain.roles import DEFAULT_QUEUE_WAIT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from manager.domain.roles import Role, RoutingSettings

# How often requests that wait are compared with the fleet: an instance may have gone, or another have come.
_RECHECK_S = 0.25
# So many of them at a time: one takes about 15 us.
_SLICE = 64
# A full queue is worth another try after as long as its oldest request waits, at most.
_MOST_RETRY_S = 60.0

# `changed`: no instance is left to wait for; the request is decided anew. `refused`: it may not wait.
Settled: TypeAlias = Literal["granted", "changed", "refused", "timeout"]


class SettingsSource(Protocol):
    """The current routing settings; `version` grows with each change."""

    @property
    def routing(self) -> RoutingSettings: ...
    @property
    def version(self) -> int: ...


class Holder(Protocol):
    """A request that uses an instance. `lane` is the name of its role, if any."""

    @property
    def lane(self) -> str | None: ...
    @property
    def holds(self) -> str:
        """The instance that it uses."""

    def hold_slot(self) -> None:
        """Take a slot of that instance, whether or not one is free."""


class SlotGiver(Protocol):
    """Another daemon that gives the slots of this one, too. It calls `Slots.given` or `Slots.refused`."""

    def holds(self, waiter: Waiter) -> None:
        """Tell it of a slot that is in use."""

    def asks(self, waiter: Waiter, project: str) -> None:
        """Ask it for a slot."""

    def gave_back(self, waiter: Waiter) -> None:
        """Give the slot back to it, or leave its queue. Counts once."""


class LaneState(NamedTuple):
    """One lane; `oldest_wait_s` is how long the first of its waiting requests has waited."""

    name: str
    in_flight: int
    queued: int
    oldest_wait_s: float | None
    concurrency: int | None
    reserved: int


class SlotState(NamedTuple):
    """The slots of one instance; None where they are not limited.

    `queued` are the waiting requests that may use it; each counts for every instance that it may use.
    """

    id: str
    slots: int | None
    in_use: int
    reserved_free: int
    queued: int = 0


class Refusal(NamedTuple):
    """The reason why a request may not even wait."""

    what: Literal["queue_full", "policy"]
    message: str
    retry_after_s: float | None


class Place:
    """The slot of a request, or its place in a queue. `give_back` counts once however often it is called."""

    __slots__ = ("_slots", "_waiting", "choose", "waiter")

    def __init__(self, slots: Slots, waiter: Waiter, choose: Callable[[], tuple[str, ...]]) -> None:
        self._slots = slots
        self.waiter = waiter
        self.choose = choose
        self._waiting: asyncio.Future[Settled] | None = None

    @property
    def instance(self) -> str | None:
        """The instance of the slot; None while the request waits for one."""
        return self.waiter.instance

    @property
    def ahead(self) -> int | None:
        """The number of requests of its lane that are ahead of it; None once it waits no longer."""
        return self._slots.before(self.waiter) if self.waiter.is_waiting else None

    async def settled(self, *, within_s: float | None) -> Settled:
        """Wait for a slot; None waits without end."""
        if self.waiter.instance is not None:
            return "granted"
        waiting: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()
        self._waiting = waiting
        try:
            async with asyncio.timeout(within_s):
                return await waiting
        except TimeoutError:
            return "granted" if self.waiter.instance is not None else "timeout"
        finally:
            self._waiting = None

    def settle(self, how: Settled) -> None:
        """Wake the request."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(how)

    def give_back(self) -> None:
        """Give the slot to the next request, or leave the queue."""
        self._slots.give_back(self)


# The detail of an instance without a free slot.
FULL = "all its slots are taken"


class Slots:
    """Owns the slots of all instances and the queues of all lanes. Lives on the event loop.

    `is_on` is whether any instance has slots or any lane a limit; where it is off a request costs that
    comparison. Memory is bounded by the requests that the daemon has, and the queues by `queue.length`.

    Args:
        settings: the roles.
        slots_of: the slots of every instance there is now, None where they are not limited.
        at_work: the requests that use an instance, for the moment when the first limit is set.
        now: seconds on a monotonic clock.
    """

    def __init__(
        self,
        settings: SettingsSource,
        slots_of: Callable[[], Mapping[str, int | None]],
        at_work: Callable[[], Iterable[Holder]],
        *,
        now: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._slots_of = slots_of
        self._at_work = at_work
        self._now = now
        self._lanes = Lanes()
        self._waiting: dict[Waiter, Place] = {}
        self._version = -1
        self._configured: Mapping[str, int | None] = {}
        self._is_stale = False
        self._has_waiting = asyncio.Event()
        self._giver: SlotGiver | None = None
        self.is_on = False

    def refresh(self) -> None:
        """Take over settings and slots if they have changed. Called with each new snapshot of the fleet."""
        self._is_stale = bool(self._waiting)
        slots = self._slots_of()
        if self._version == self._settings.version and slots == self._configured:
            return
        self._version, self._configured = self._settings.version, slots
        roles = self._settings.routing.roles
        was_on = self.is_on
        self.is_on = any(count is not None for count in slots.values()) or any(
            role.concurrency is not None for role in roles.values()
        )
        if self.is_on and not was_on:
            for holder in self._at_work():
                holder.hold_slot()
        self._wake(self._lanes.configure(slots, {name: rules_of(role) for name, role in roles.items()}))

    def enter(
        self,
        lane: str | None,
        project: str,
        instances: tuple[str, ...],
        choose: Callable[[], tuple[str, ...]],
        *,
        since: float,
        is_run: bool = False,
    ) -> Place | Refusal:
        """Give a request a slot of one of the instances that it may use, or a place in the queue of its lane.

        Args:
            lane: the name of its role, if any.
            project: requests of a lane are fair between projects.
            instances: those that it may use, in order.
            choose: returns them anew when the fleet has changed.
            since: the monotonic time of its arrival.
            is_run: it is an asynchronous run.
        """
        name = lane or NO_ROLE
        waiter = Waiter(name, instances, since)
        place = Place(self, waiter, choose)
        if self._giver is not None:
            waiter.is_run = is_run
            self._waiting[waiter] = place
            self._giver.asks(waiter, project)
            return place
        entry = self._lanes.enter(waiter, project, is_run=is_run)
        if entry == "waits":
            self._waiting[waiter] = place
            self._has_waiting.set()
        elif entry == "full":
            return Refusal("queue_full", f"the queue of {_named(name)} is full", self._retry_after_s(name))
        elif entry == "never":
            allowed = ", ".join(waiter.instances)
            message = f"all slots of {allowed} are reserved for other roles than {_named(name)}"
            return Refusal("policy", message, None)
        return place

    def take(
        self, lane: str | None, instance: str, choose: Callable[[], tuple[str, ...]], since: float
    ) -> Place | None:
        """Give a request a slot of an instance, if one is free; see `enter`."""
        if self._giver is not None:
            return None  # only `enter` can ask
        waiter = Waiter(lane or NO_ROLE, (instance,), since)
        return Place(self, waiter, choose) if self._lanes.take(waiter) else None

    def has_room(self, lane: str | None, instance: str) -> bool:
        """Return whether a request of a lane would get a slot of an instance now."""
        return not self.is_on or self._lanes.has_room(lane or NO_ROLE, instance)

    def hold(self, lane: str | None, instance: str, since: float) -> Place:
        """Count a slot that a request uses already."""
        waiter = Waiter(lane or NO_ROLE, (instance,), since)
        self._lanes.hold(waiter, instance)
        if self._giver is not None:
            self._giver.holds(waiter)
        return Place(self, waiter, tuple)

    def wait_s(self, lane: str | None) -> float:
        """Return how long a request of a lane waits for a slot."""
        role = None if lane is None else self._settings.routing.roles.get(lane)
        return DEFAULT_QUEUE_WAIT_S if role is None else role.queue_wait_s

    def before(self, waiter: Waiter) -> int:
        """Return how many requests of its lane are ahead of a waiting one."""
        return self._lanes.before(waiter)

    def give_back(self, place: Place) -> None:
        """See `Place.give_back`."""
        self._waiting.pop(place.waiter, None)
        if self._giver is not None:
            self._giver.gave_back(place.waiter)
        if granted := self._lanes.leave(place.waiter):
            self._wake(granted)

    # --- while another daemon gives the slots ---

    def leave_to(self, giver: SlotGiver, places: Iterable[tuple[Place, str]]) -> None:
        """Let another daemon give all slots from now on.

        Args:
            giver: is told of the slots in use, and asked for those that requests wait for.
            places: all places there are, with the projects of their requests.
        """
        self._giver = giver
        waiting: list[tuple[Waiter, str]] = []
        for place, project in places:
            waiter = place.waiter
            if waiter.instance is not None:
                giver.holds(waiter)
            elif waiter.is_waiting:
                waiting.append((waiter, project))
        # Once all slots in use are counted, those that wait, in their order.
        waiting.sort(key=lambda one: one[0].key)
        for waiter, project in waiting:
            self._lanes.leave(waiter)
            giver.asks(waiter, project)

    def given(self, waiter: Waiter, instance: str) -> None:
        """The other daemon has given a request a slot of this instance."""
        if waiter in self._waiting:
            self._lanes.hold(waiter, instance)
            self._wake([waiter])

    def refused(self, waiter: Waiter) -> None:
        """The other daemon has no place for a request in the queue of its lane."""
        if waiter in self._waiting:
            self._waiting[waiter].settle("refused")

    def give_again(self, asked: Iterable[tuple[Waiter, str]]) -> None:
        """Give slots as before: the other daemon has ended.

        Args:
            asked: the requests that waited for it, with their projects.
        """
        self._giver = None
        for waiter, project in asked:
            if waiter not in self._waiting:
                continue
            entry = self._lanes.enter(waiter, project, is_run=waiter.is_run)
            if entry == "granted":
                self._wake([waiter])
            elif entry != "waits":
                self.refused(waiter)

    async def run(self, look: Callable[[], object]) -> None:
        """Compare waiting requests with the fleet, until cancelled.

        Args:
            look: renews the snapshot of the fleet, if it has changed.
        """
        while True:
            await self._has_waiting.wait()
            look()
            if self._is_stale:
                self._is_stale = False
                for _ in self.choose_again():
                    await asyncio.sleep(0)
            if not self._waiting:
                self._has_waiting.clear()
            await asyncio.sleep(_RECHECK_S)

    def choose_again(self) -> Iterator[None]:
        """Have every waiting request wait for the instances that it may use now; it keeps its place.

        Yields after each slice of them: other work of the event loop comes in between.
        """
        for number, (waiter, place) in enumerate([*self._waiting.items()]):
            if number % _SLICE == _SLICE - 1:
                yield
            if not waiter.is_waiting:
                continue
            instances = place.choose()
            if not waiter.is_waiting:  # the choice has renewed the snapshot, and with it the settings
                continue
            if not self._lanes.could_serve(waiter, instances):
                place.settle("changed")
            elif self._lanes.change(waiter, instances):
                self._wake([waiter])

    def lanes(self) -> tuple[LaneState, ...]:
        """Return the load of every lane; the last one has the requests without a role, if there are any."""
        roles = self._settings.routing.roles
        now = self._now()
        found = []
        # Without limits no slots are counted.
        at_work = Counter(holder.lane or NO_ROLE for holder in (() if self.is_on else self._at_work()))
        for name in [*roles, *sorted({*self._lanes.lanes(), *at_work} - set(roles), reverse=True)]:
            load, role = self._lanes.lane(name), roles.get(name)
            in_flight = load.in_flight if self.is_on else at_work[name]
            waited_s = None if load.oldest_since is None else round(now - load.oldest_since, 3)
            concurrency, reserved = (role.concurrency, role.reserved) if role else (None, 0)
            found.append(LaneState(name, in_flight, load.queued, waited_s, concurrency, reserved))
        return tuple(found)

    def instances(self) -> tuple[SlotState, ...]:
        """Return the use of the slots of every instance."""
        at_work = Counter(holder.holds for holder in (() if self.is_on else self._at_work()))
        queued = Counter(chain.from_iterable(waiter.instances for waiter in self._waiting))
        return tuple(
            SlotState(id_, *self._used(id_, at_work), queued=queued[id_]) for id_ in self._slots_of()
        )

    def _used(self, instance: str, at_work: Mapping[str, int]) -> tuple[int | None, int, int]:
        """Return slots, those in use, and those that are reserved and free."""
        if self.is_on:
            load = self._lanes.slots(instance)
            return load.slots, load.in_use, load.reserved_free
        return None, at_work.get(instance, 0), 0

    def _wake(self, granted: Iterable[Waiter]) -> None:
        for waiter in granted:
            place = self._waiting.pop(waiter, None)
            if place is not None:
                place.settle("granted")

    def _retry_after_s(self, lane: str) -> float:
        oldest = self._lanes.lane(lane).oldest_since
        return 1.0 if oldest is None else min(_MOST_RETRY_S, max(1.0, self._now() - oldest))


def rules_of(role: Role) -> LaneRules:
    """Return the rules of a role's lane."""
    return LaneRules(
        weight=role.weight,
        concurrency=role.concurrency,
        reserved=role.reserved,
        instances=role.instances or (),
        queue_length=role.queue_length,
    )


def _named(lane: str) -> str:
    return "requests without a role" if lane == NO_ROLE else f"the role {lane!r}"
