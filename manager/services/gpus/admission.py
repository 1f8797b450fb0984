"""Memory of cards that was promised: to instances that run, and to loads that are not over."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manager.domain.gpu import (
    Load,
    admitted_load,
    divide,
    missing_bytes,
    outstanding_bytes,
    promised_bytes,
    room_bytes,
    unlisted_room_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from manager.domain.gpu import Gpu
    from manager.services.gpus.cards import Cards

# A load that has not ended by then has failed: Ollama gives up after 5 minutes without progress.
_LONGEST_LOAD_S = 300.0
_MOST_LOADS = 32
# A load that has taken this much of what was reserved for it is over.
_SEEN_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class _Reserved:
    """A load, by the UUID of each card that it may take memory of."""

    loads: Mapping[str, Load]
    until: float

    @property
    def held_bytes(self) -> int:
        return sum(load.held_bytes for load in self.loads.values())


class Admission:
    """Owns the claims of instances and the reservations of loads, for each card.

    A claim lasts as long as its instance runs. A reservation lasts until the memory is seen in use, until
    the load has ended, or for `_LONGEST_LOAD_S`. Beyond `_MOST_LOADS` of an instance the oldest is dropped.
    An instance over several cards holds what it was promised on each of them.

    Args:
        cards: their memory.
        held: returns the memory that an instance is seen to hold, by the UUID of each of its cards; None
            where that cannot be told.
        now: seconds on a monotonic clock.
        holders: returns the instances that may hold memory although they were promised none.
    """

    def __init__(
        self,
        cards: Cards,
        *,
        held: Callable[[str], Mapping[str, int | None]],
        now: Callable[[], float],
        holders: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._cards = cards
        self._held = held
        self._now = now
        self._holders = holders
        self._claims: dict[str, Mapping[str, int]] = {}
        self._loads: dict[str, dict[str, _Reserved]] = {}

    def claim(self, instance: str, needed_bytes: int, likely: Mapping[str, int]) -> None:
        """Set memory aside for an instance, whatever is free; `likely` is as in `domain.gpu.divide`."""
        if needed_bytes:
            self._claims[instance] = self._divided(instance, needed_bytes, likely)

    def drop(self, instance: str) -> None:
        """The instance has ended."""
        self._claims.pop(instance, None)
        self._loads.pop(instance, None)

    def reserve(self, instance: str, key: str, needed_bytes: int, likely: Mapping[str, int]) -> None:
        """Set memory aside for the load of a model, until the load is over. The same load counts once."""
        loads = self._loads.setdefault(instance, {})
        if key in loads and self._now() < loads[key].until:
            return
        if len(loads) >= _MOST_LOADS:
            del loads[next(iter(loads))]
        rooms, used = self.rooms(instance), self._used(instance)
        admitted = {
            uuid: admitted_load(room_bytes=rooms[uuid], needed_bytes=share, held_bytes=used.get(uuid, 0))
            for uuid, share in self._divided(instance, needed_bytes, likely).items()
        }
        loads.pop(key, None)
        loads[key] = _Reserved(admitted, self._now() + _LONGEST_LOAD_S)

    def stands_still(self, instance: str, key: str) -> None:
        """A model is in memory, and its instance holds no more than a moment ago: its load is over.

        A load that has not taken anything yet stands still as well, where the memory of processes is known.
        """
        loads, used = self._loads.get(instance, {}), total(self._held(instance))
        reserved = loads.get(key)
        if reserved is not None and (used is None or used > reserved.held_bytes):
            del loads[key]

    def end_loads(self, instance: str) -> None:
        """No load goes on at the instance."""
        self._loads.pop(instance, None)

    def look(self) -> None:
        """Drop the reservations whose memory is in use by now, after a new reading."""
        now = self._now()
        for instance, loads in list(self._loads.items()):
            going_on = {key: one for key, one in loads.items() if now < one.until}
            promised = sum(_promised({}, going_on).values())
            used = total(self._held(instance))
            if not going_on or (used is not None and used >= _SEEN_SHARE * promised):
                del self._loads[instance]
            else:
                self._loads[instance] = going_on

    def sharers(self) -> Mapping[str, Sequence[str]]:
        """Return the instances that were promised memory of each card, or may hold some, by UUID."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for instance in {*self._claims, *self._loads, *self._holders()}:
            loads = self._loads.get(instance, {}).values()
            promised = (uuid for load in loads for uuid in load.loads)
            for uuid in {*self._cards.uuids_of(instance), *self._claims.get(instance, ()), *promised}:
                found[uuid].append(instance)
        return found

    def rooms(
        self, instance: str, sharers: Mapping[str, Sequence[str]] | None = None
    ) -> dict[str, int | None]:
        """Return the memory that the instance may still take on each of its cards, by UUID.

        Of a card whose processes are not listed it is an upper bound: `domain.gpu.unlisted_room_bytes`.

        Args:
            instance: the instance.
            sharers: as of now, for a caller that asks about many instances.
        """
        uuids = self._cards.uuids_of(instance)
        sharers = self.sharers() if sharers is None else sharers
        others = {other for uuid in uuids for other in sharers.get(uuid, ())} - {instance}
        reserved = self._reserved_for(others)
        rooms = {}
        for uuid in uuids:
            gpu = self._cards.gpu(uuid)
            if gpu is None or gpu.lists_processes:
                rooms[uuid] = room_bytes(gpu.vram_free_bytes if gpu else None, reserved[uuid])
            else:
                rooms[uuid] = self._unlisted_room(instance, gpu, others)
        return rooms

    def lacking(self, instance: str, needed_bytes: int) -> int:
        """Return the memory that is missing on the cards of the instance for as much more; 0 if unknown."""
        return missing_bytes(needed_bytes, self.rooms(instance).values())

    def reserved_for_others(self, instance: str) -> Counter[str]:
        """Return the memory of each card that others were promised and do not hold yet, by UUID."""
        return self._reserved_for((self._claims.keys() | self._loads.keys()) - {instance})

    def reserved(self) -> dict[str, int | None]:
        """Return the memory of each card that was promised and is not held yet, by UUID.

        None for a card on which somebody who was promised memory may hold some: that cannot be told.
        """
        reserved: dict[str, int | None] = {}
        for instance in self._claims.keys() | self._loads.keys():
            promised = _promised(self._claims.get(instance, {}), self._loads.get(instance, {}))
            held = self._held(instance)
            for uuid, left in outstanding_bytes(promised, self._used(instance)).items():
                before = reserved.get(uuid, 0)
                is_known = before is not None and held.get(uuid, 0) is not None
                reserved[uuid] = before + left if is_known and before is not None else None
        return reserved

    # --- helpers ---

    def _reserved_for(self, instances: Iterable[str]) -> Counter[str]:
        """Return the memory of each card that instances were promised and do not hold yet, by UUID."""
        reserved: Counter[str] = Counter()
        for one in instances:
            promised = _promised(self._claims.get(one, {}), self._loads.get(one, {}))
            if promised:
                reserved.update(outstanding_bytes(promised, self._used(one)))
        return reserved

    def _unlisted_room(self, instance: str, gpu: Gpu, others: Iterable[str]) -> int | None:
        uuid, outstanding, most = gpu.uuid, 0, 0
        for other in others:
            promised = _promised(self._claims.get(other, {}), self._loads.get(other, {}))
            held = self._held(other).get(uuid, 0)
            if held is not None:  # else all that it was promised may be in use already
                outstanding += outstanding_bytes(promised, self._used(other)).get(uuid, 0)
            most += max(promised.get(uuid, 0), held or 0)
        own = self._used(instance).get(uuid, 0)
        return unlisted_room_bytes(gpu, outstanding_bytes=outstanding, promised_bytes=most, held_bytes=own)

    def _divided(self, instance: str, needed_bytes: int, likely: Mapping[str, int]) -> dict[str, int]:
        """Divide memory among the cards of an instance: what it holds itself is room, too."""
        used = self._used(instance)
        rooms = {
            uuid: None if room is None else max(0, room) + used.get(uuid, 0)
            for uuid, room in self.rooms(instance).items()
        }
        return divide(needed_bytes, rooms, likely) if rooms else {}

    def _used(self, instance: str) -> dict[str, int]:
        return {uuid: used or 0 for uuid, used in self._held(instance).items()}


def total(amounts: Mapping[str, int | None]) -> int | None:
    """Return the sum; None where one of the amounts is unknown."""
    known = [amount for amount in amounts.values() if amount is not None]
    return sum(known) if len(known) == len(amounts) else None


def _promised(claims: Mapping[str, int], loads: Mapping[str, _Reserved]) -> dict[str, int]:
    """Return the memory of each card that an instance may come to hold."""
    uuids = dict.fromkeys([*claims, *(uuid for one in loads.values() for uuid in one.loads)])
    return {
        uuid: promised_bytes(
            claims.get(uuid, 0), [one.loads[uuid] for one in loads.values() if uuid in one.loads]
        )
        for uuid in uuids
    }
