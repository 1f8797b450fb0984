"""Memory of cards that was promised: to instances that run, and to loads that are not over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manager.domain.gpu import Claim, Load, admitted_load, missing_bytes, promised_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from manager.services.gpus.cards import Cards

# A load that has not ended by then has failed: Ollama gives up after 5 minutes without progress.
_LONGEST_LOAD_S = 300.0
_MOST_LOADS = 32
# A load that has taken this much of what was reserved for it is over.
_SEEN_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class _Reserved:
    load: Load
    until: float


class Admission:
    """Owns the claims of instances and the reservations of loads.

    A claim lasts as long as its instance runs. A reservation lasts until the memory is seen in use, until
    the load has ended, or for `_LONGEST_LOAD_S`. Beyond `_MOST_LOADS` of an instance the oldest is dropped.

    Args:
        cards: their memory.
        used_bytes: what an instance is seen to hold, None where that cannot be told.
        now: seconds on a monotonic clock.
    """

    def __init__(
        self, cards: Cards, *, used_bytes: Callable[[str], int | None], now: Callable[[], float]
    ) -> None:
        self._cards = cards
        self._used_bytes = used_bytes
        self._now = now
        self._claims: dict[str, int] = {}
        self._loads: dict[str, dict[str, _Reserved]] = {}

    def claim(self, instance: str, needed_bytes: int) -> None:
        """Set memory aside for an instance, whatever is free."""
        if needed_bytes:
            self._claims[instance] = needed_bytes

    def drop(self, instance: str) -> None:
        """The instance has ended."""
        self._claims.pop(instance, None)
        self._loads.pop(instance, None)

    def reserve(self, instance: str, key: str, needed_bytes: int) -> None:
        """Set memory aside for the load of a model, until the load is over. The same load counts once."""
        loads = self._loads.setdefault(instance, {})
        if key in loads and self._now() < loads[key].until:
            return
        if len(loads) >= _MOST_LOADS:
            del loads[next(iter(loads))]
        load = admitted_load(
            free_bytes=self._free_bytes(instance),
            needed_bytes=needed_bytes,
            held_bytes=self._used_bytes(instance) or 0,
            claims=self._claims_of_others(instance),
        )
        loads.pop(key, None)
        loads[key] = _Reserved(load, self._now() + _LONGEST_LOAD_S)

    def stands_still(self, instance: str, key: str) -> None:
        """A model is in memory, and its instance holds no more than a moment ago: its load is over.

        A load that has not taken anything yet stands still as well, where the memory of processes is known.
        """
        loads, used = self._loads.get(instance, {}), self._used_bytes(instance)
        reserved = loads.get(key)
        if reserved is not None and (used is None or used > reserved.load.held_bytes):
            del loads[key]

    def end_loads(self, instance: str) -> None:
        """No load goes on at the instance."""
        self._loads.pop(instance, None)

    def look(self) -> None:
        """Drop the reservations whose memory is in use by now, after a new reading."""
        now = self._now()
        for instance, loads in list(self._loads.items()):
            going_on = {key: one for key, one in loads.items() if now < one.until}
            promised = promised_bytes(0, [one.load for one in going_on.values()])
            used = self._used_bytes(instance)
            if not going_on or (used is not None and used >= _SEEN_SHARE * promised):
                del self._loads[instance]
            else:
                self._loads[instance] = going_on

    def lacking(self, instance: str, needed_bytes: int) -> int:
        """The memory that is missing on the instance's card for as much more; 0 where that is unknown."""
        return missing_bytes(
            free_bytes=self._free_bytes(instance),
            needed_bytes=needed_bytes,
            claims=self._claims_of_others(instance),
        )

    def reserved_for_others(self, instance: str) -> int:
        """The memory that others on the same card were promised and do not hold yet."""
        return sum(max(0, one.needed_bytes - one.used_bytes) for one in self._claims_of_others(instance))

    def _free_bytes(self, instance: str) -> int | None:
        gpu = self._cards.gpu_of(instance)
        return gpu.vram_free_bytes if gpu else None

    def _claims_of_others(self, instance: str) -> list[Claim]:
        return list(self._others(instance))

    def _others(self, instance: str) -> Iterator[Claim]:
        uuid = self._cards.uuid_of(instance)
        for other in self._claims.keys() | self._loads.keys():
            if other == instance or self._cards.uuid_of(other) != uuid:
                continue
            loads = [one.load for one in self._loads.get(other, {}).values()]
            promised = promised_bytes(self._claims.get(other, 0), loads)
            yield Claim(needed_bytes=promised, used_bytes=self._used_bytes(other) or 0)
