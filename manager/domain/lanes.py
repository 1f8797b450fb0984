"""Slots and lanes: the one function that decides which waiting request gets which free slot.

An instance has slots, a lane (a role) has rules. A lane may take a slot while it uses fewer of the instance
than it has reserved there, or while a slot is free that no lane has reserved. Where several lanes wait for a
slot, weighted start-time fair queuing decides (Goyal, Vin and Cheng, "Start-time Fair Queuing", SIGCOMM
1996), with linear ageing; within a lane the same rule is fair between projects. Each instance has a virtual
time of its own, which begins when a first request waits and which reserved slots do not advance: lanes share
what they compete for. No request is due before the one that got the last slot.

After each call no request waits that could have a slot. So a newcomer that can have one overtakes nobody.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

# The lane of requests without a role. No role can have that name.
NO_ROLE = "*"
# The lane of work in the background. It takes slots that are free and never waits for one.
BACKGROUND = "*background"
# Ten seconds of waiting count as much as one request of weight 1. The order of two lanes depends on tag and
# arrival alone, because all of them age at the same rate.
AGEING_PER_S = 0.1
_LONG_AGO = float("-inf")
# A run lets so many waiting requests of its lane go first.
RUN_PENALTY = 100.0
# Projects that a lane remembers while requests wait.
_MOST_PROJECTS = 4096
# Entries of requests that left are dropped from a queue when they outnumber the others by this.
_MOST_LEFT = 64


@dataclass(frozen=True, slots=True)
class LaneRules:
    """The rules of a lane; see `domain.roles.Role`. `reserved` holds on each of `instances`."""

    weight: int = 1
    concurrency: int | None = None
    reserved: int = 0
    instances: tuple[str, ...] = ()
    queue_length: int = 100


_NO_RULES = LaneRules()


class Waiter:
    """A request that has a slot, or waits for one. `instance` is where its slot is, None while it waits."""

    __slots__ = ("entry", "instance", "instances", "is_run", "key", "lane", "since", "tag")

    def __init__(self, lane: str, instances: tuple[str, ...], since: float) -> None:
        self.lane = lane
        self.instances = instances
        self.since = since
        self.instance: str | None = None
        self.is_run = False
        self.tag = 0.0
        self.key: tuple[float, int] = (0.0, 0)
        self.entry: _Entry | None = None  # in the queues of `instances`, while it waits

    @property
    def is_waiting(self) -> bool:
        return self.entry is not None


class LaneLoad(NamedTuple):
    """The load of a lane. `oldest_since` is the arrival of the request that waits longest."""

    in_flight: int
    queued: int
    oldest_since: float | None


class SlotLoad(NamedTuple):
    """The slots of an instance. `reserved_free` are reserved and not in use."""

    slots: int | None
    in_use: int
    reserved_free: int


class _Entry(NamedTuple):
    """A place in queues; `number` is unique."""

    tag: float
    number: int
    waiter: Waiter


# `granted` and `waits` are final until the next call; the others leave nothing behind.
Entry: TypeAlias = Literal["granted", "waits", "full", "never"]


class _Lane:
    """One lane. `queues` has its waiting requests by instance, in order.

    Entries of requests that wait there no longer stay for a while.
    """

    __slots__ = (
        "at",
        "concurrency",
        "in_flight",
        "projects",
        "queues",
        "rules",
        "step",
        "waiting",
        "waiting_runs",
    )

    def __init__(self) -> None:
        self.configure(_NO_RULES)
        self.in_flight = 0
        self.at = 0.0  # virtual time within the lane, among projects
        self.projects: dict[str, float] = {}
        self.waiting: dict[Waiter, None] = {}
        self.waiting_runs = 0  # they do not count against the length of the queue
        self.queues: dict[str, list[_Entry]] = {}

    def configure(self, rules: LaneRules) -> None:
        self.rules = rules
        self.concurrency = rules.concurrency
        self.step = 1.0 / rules.weight

    def dequeue(self, waiter: Waiter) -> None:
        del self.waiting[waiter]
        self.waiting_runs -= waiter.is_run

    @property
    def has_room(self) -> bool:
        limit = self.concurrency
        return limit is None or self.in_flight < limit


class _Slots:
    """The slots of one instance: how many, whose, and how many of them are reserved."""

    __slots__ = (
        "at",
        "reserved",
        "shared",
        "shared_used",
        "slots",
        "tags",
        "total",
        "used",
        "waiting_lanes",
    )

    def __init__(self) -> None:
        self.slots: int | None = None
        self.total = 0
        self.used: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.shared = 0  # slots that no lane has reserved
        self.shared_used = 0  # slots in use beyond what their lane has reserved
        self.at = _LONG_AGO  # virtual time: the turn of the request that got the last shared slot
        self.tags: dict[str, float] = {}  # the next turn of each lane, without what ageing adds
        self.waiting_lanes: dict[str, None] = {}

    @property
    def is_full(self) -> bool:
        return self.slots is not None and self.total >= self.slots

    @property
    def has_shared(self) -> bool:
        """Return whether every lane can have a slot, where the instance is not full."""
        return self.slots is None or self.shared_used < self.shared

    def has_room_for(self, lane: str) -> bool:
        slots = self.slots
        return slots is None or (
            self.total < slots and (self.shared_used < self.shared or self.has_reserved(lane))
        )

    def has_reserved(self, lane: str) -> bool:
        return self.used.get(lane, 0) < self.reserved.get(lane, 0)

    def could_serve(self, lane: str) -> bool:
        """Return whether the lane can ever have a slot here."""
        return self.slots is None or self.shared > 0 or self.reserved.get(lane, 0) > 0

    def turn(self, lane: str, since: float) -> float:
        """Return the virtual time at which a request of a lane is due."""
        return max(self.at, self.tags.get(lane, 0.0) + AGEING_PER_S * since)

    def wait(self, lane: str) -> None:
        """A first request of a lane waits here. The first lane finds no debts of earlier times."""
        if not self.waiting_lanes:
            self.at = _LONG_AGO
            self.tags.clear()
        self.waiting_lanes[lane] = None

    def take(self, lane: str, step: float, since: float) -> None:
        used = self.used.get(lane, 0)
        self.used[lane] = used + 1
        self.total += 1
        if used >= self.reserved.get(lane, 0):
            self.shared_used += 1
            if self.waiting_lanes:
                self.at = self.turn(lane, since)
                self.tags[lane] = self.at - AGEING_PER_S * since + step

    def give_back(self, lane: str) -> None:
        used = self.used[lane] - 1
        if used:
            self.used[lane] = used
        else:
            del self.used[lane]
        self.total -= 1
        if used >= self.reserved.get(lane, 0):
            self.shared_used -= 1

    def configure(self, slots: int | None, reserved: dict[str, int]) -> None:
        self.slots = slots
        self.reserved = reserved
        self.shared = (slots or 0) - sum(reserved.values())
        self.shared_used = sum(max(0, used - reserved.get(lane, 0)) for lane, used in self.used.items())


class Lanes:
    """Gives slots to requests. A call costs O(lanes that wait + instances of the request * log of the queue).

    Memory is bounded by the requests that hold a slot or wait; those of a lane are bounded by its queue.
    """

    def __init__(self) -> None:
        self._lanes: dict[str, _Lane] = {}
        self._instances: dict[str, _Slots] = {}
        self._entries = 0

    # --- events ---

    def configure(self, slots: Mapping[str, int | None], rules: Mapping[str, LaneRules]) -> list[Waiter]:
        """Take over settings; return the waiting requests that have a slot now.

        A lane or an instance that is gone keeps its requests until they end. Slots that are in use beyond a
        smaller number stay in use.

        Args:
            slots: of each instance; None is no limit.
            rules: of each lane.
        """
        for name, lane in [*self._lanes.items()]:
            if name not in rules:
                lane.configure(_NO_RULES)
                self._forget(name, lane)
        for name, given in rules.items():
            self._lane(name).configure(given)
        for id_ in {**self._instances, **slots}:
            instance = self._slots(id_)
            reserved = {name: one.reserved for name, one in rules.items() if id_ in one.instances}
            instance.configure(slots.get(id_), {name: count for name, count in reserved.items() if count})
            if id_ not in slots and not instance.total and not instance.waiting_lanes:
                del self._instances[id_]
        return self._assign([*self._instances])

    def enter(self, waiter: Waiter, project: str, *, is_run: bool = False) -> Entry:
        """Give a request a slot, or let it wait for one.

        `full`: no slot is free, and as many wait already as the lane allows. `never`: no slot of those
        instances is for that lane. A run is not bounded by the length of the queue.
        """
        if self.take(waiter):
            return "granted"
        lane = self._lane(waiter.lane)
        if not self.could_serve(waiter, waiter.instances):
            self._forget(waiter.lane, lane)
            return "never"
        if not is_run and len(lane.waiting) - lane.waiting_runs >= lane.rules.queue_length:
            self._forget(waiter.lane, lane)
            return "full"
        self._entries += 1
        tag = waiter.tag = max(lane.at, lane.projects.get(project, 0.0))
        self._remember_project(lane, project, tag + 1.0)
        waiter.key = (tag + RUN_PENALTY if is_run else tag, self._entries)
        waiter.is_run = is_run
        lane.waiting_runs += is_run
        lane.waiting[waiter] = None
        self._queue(waiter, lane)
        return "waits"

    def take(self, waiter: Waiter) -> bool:
        """Give a request the first free slot of its instances; return whether it has one."""
        lane = self._lane(waiter.lane)
        if lane.has_room:
            for id_ in waiter.instances:
                if self._slots(id_).has_room_for(waiter.lane):
                    self._grant(waiter, lane, id_)
                    return True
        return False

    def hold(self, waiter: Waiter, instance: str) -> None:
        """Count a slot that a request uses already, whether or not one is free."""
        self._grant(waiter, self._lane(waiter.lane), instance)

    def change(self, waiter: Waiter, instances: tuple[str, ...]) -> bool:
        """Let a waiting request wait for slots of other instances; return whether it has one now.

        It keeps its place.
        """
        if instances == waiter.instances:
            return False
        lane = self._lanes[waiter.lane]
        waiter.entry = None
        waiter.instances = instances
        if self.take(waiter):
            lane.dequeue(waiter)
            return True
        self._queue(waiter, lane)
        return False

    def could_serve(self, waiter: Waiter, instances: Iterable[str]) -> bool:
        """Return whether the lane of a request can ever have a slot of one of these instances."""
        return any(self._slots(id_).could_serve(waiter.lane) for id_ in instances)

    def leave(self, waiter: Waiter) -> list[Waiter]:
        """Take a slot back, or a place in the queue; return the waiting requests that have a slot now."""
        lane = self._lanes.get(waiter.lane)
        if lane is None:
            return []
        if waiter.is_waiting:
            waiter.entry = None
            lane.dequeue(waiter)
            self._forget(waiter.lane, lane)
            return []
        id_, waiter.instance = waiter.instance, None
        if id_ is None:
            return []
        had_room = lane.has_room
        lane.in_flight -= 1
        instance = self._instances[id_]
        instance.give_back(waiter.lane)
        found: list[Waiter] = []
        if instance.waiting_lanes or not had_room:
            others = [] if had_room or not lane.has_room else [one for one in lane.queues if one != id_]
            found = self._assign([id_, *others])
        self._forget(waiter.lane, lane)
        return found

    # --- what others read ---

    def lane(self, name: str) -> LaneLoad:
        """Return the load of a lane."""
        lane = self._lanes.get(name)
        if lane is None:
            return LaneLoad(0, 0, None)
        oldest = min((waiter.since for waiter in lane.waiting), default=None)
        return LaneLoad(lane.in_flight, len(lane.waiting), oldest)

    def lanes(self) -> Iterator[str]:
        """Yield the names of the lanes that have rules, or requests."""
        yield from self._lanes

    def slots(self, instance: str) -> SlotLoad:
        """Return the use of an instance's slots."""
        found = self._instances.get(instance)
        if found is None:
            return SlotLoad(None, 0, 0)
        free = sum(max(0, count - found.used.get(name, 0)) for name, count in found.reserved.items())
        return SlotLoad(found.slots, found.total, free)

    def has_room(self, name: str, instance: str) -> bool:
        """Return whether a request of a lane would get a slot of an instance now."""
        lane, slots = self._lanes.get(name), self._instances.get(instance)
        return (lane is None or lane.has_room) and (slots is None or slots.has_room_for(name))

    def waiting(self) -> Iterator[Waiter]:
        """Yield all requests that wait."""
        for lane in self._lanes.values():
            yield from lane.waiting

    def before(self, waiter: Waiter) -> int:
        """Return how many requests of its lane are ahead of a waiting one."""
        return sum(1 for one in self._lanes[waiter.lane].waiting if one.key < waiter.key)

    # --- helpers ---

    def _assign(self, ids: Iterable[str]) -> list[Waiter]:
        """Give each free slot of these instances to the waiting request that is due."""
        found: list[Waiter] = []
        for id_ in ids:
            instance = self._instances.get(id_)
            while instance is not None and instance.waiting_lanes:
                waiter = self._due(id_, instance)
                if waiter is None:
                    break
                lane = self._lanes[waiter.lane]
                waiter.entry = None
                lane.dequeue(waiter)
                self._grant(waiter, lane, id_)
                found.append(waiter)
        return found

    def _due(self, id_: str, instance: _Slots) -> Waiter | None:
        """Return the waiting request that gets the next slot of an instance; None where none can have one."""
        if instance.is_full:
            return None
        best: Waiter | None = None
        best_at = 0.0
        idle: list[str] = []
        has_shared, lanes = instance.has_shared, self._lanes
        for name in instance.waiting_lanes:
            lane = lanes[name]
            limit = lane.concurrency
            if (limit is not None and lane.in_flight >= limit) or not (
                has_shared or instance.has_reserved(name)
            ):
                continue
            head = _head(lane.queues[id_])
            if head is None:
                idle.append(name)
                continue
            at = instance.turn(name, head.since)
            if best is None or at < best_at:
                best, best_at = head, at
        for name in idle:
            del lanes[name].queues[id_], instance.waiting_lanes[name]
        return best

    def _grant(self, waiter: Waiter, lane: _Lane, id_: str) -> None:
        lane.at = max(lane.at, waiter.tag)
        lane.in_flight += 1
        self._slots(id_).take(waiter.lane, lane.step, waiter.since)
        waiter.instance = id_

    def _queue(self, waiter: Waiter, lane: _Lane) -> None:
        entry = waiter.entry = _Entry(*waiter.key, waiter)
        queues = lane.queues
        for id_ in waiter.instances:
            queue = queues.get(id_)
            if queue is None:
                queues[id_] = [entry]
                self._slots(id_).wait(waiter.lane)
            elif entry > queue[-1]:
                queue.append(entry)
            else:
                insort(queue, entry)
            if queue is not None and len(queue) > 2 * len(lane.waiting) + _MOST_LEFT:
                queue[:] = [one for one in queue if one.waiter.entry is one]

    def _remember_project(self, lane: _Lane, project: str, tag: float) -> None:
        if len(lane.projects) >= _MOST_PROJECTS:
            # A project whose turn is over begins where the lane is, as if it were new.
            lane.projects = {name: at for name, at in lane.projects.items() if at > lane.at}
            if len(lane.projects) >= _MOST_PROJECTS:
                lane.projects.clear()
        lane.projects[project] = tag

    def _forget(self, name: str, lane: _Lane) -> None:
        """Drop what nothing needs any more."""
        if not lane.waiting and (lane.queues or lane.projects):
            lane.projects.clear()
            for id_ in lane.queues:
                del self._instances[id_].waiting_lanes[name]
            lane.queues.clear()
        if lane.rules is _NO_RULES and not lane.in_flight and not lane.waiting:
            del self._lanes[name]

    def _lane(self, name: str) -> _Lane:
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = _Lane()
        return lane

    def _slots(self, id_: str) -> _Slots:
        instance = self._instances.get(id_)
        if instance is None:
            instance = self._instances[id_] = _Slots()
        return instance


def _head(queue: list[_Entry]) -> Waiter | None:
    """Drop the first entries whose requests wait here no longer; return the first one that does."""
    for number, entry in enumerate(queue):
        if entry.waiter.entry is entry:
            if number:
                del queue[:number]
            return entry.waiter
    return None
