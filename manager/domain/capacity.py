"""`max_running`: whether one more instance may run, and which one is stopped for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from manager.domain import backoff

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from manager.domain.instance import Explanation


@dataclass(frozen=True, slots=True)
class Occupant:
    """One instance that could run, as the decision sees it.

    `occupies` is whether it counts as running. `is_ending` is whether a stop is under way or was asked for.
    `unused_since` is a monotonic time, None while the instance is in use, pinned or not ready. `may_return`
    is whether it could be started again: its image and its card are there.
    """

    id: str
    priority: int
    occupies: bool
    is_ending: bool
    in_use: bool
    pinned: bool
    unused_since: float | None
    may_return: bool


@dataclass(frozen=True, slots=True)
class PlaceFree:
    """One more instance may run."""


@dataclass(frozen=True, slots=True)
class AwaitEnd:
    """Wait for the stop of this instance."""

    instance: str


@dataclass(frozen=True, slots=True)
class Evict:
    """Stop this instance, unless a closer look finds it in use."""

    instance: str


@dataclass(frozen=True, slots=True)
class CannotStart:
    """Nothing is stopped for an instance that would not start."""

    why: Explanation


@dataclass(frozen=True, slots=True)
class NoPlace:
    """No instance may be stopped. `not_returning` are unused instances that could not start again."""

    running: tuple[str, ...]
    not_returning: tuple[str, ...] = ()


Verdict: TypeAlias = PlaceFree | AwaitEnd | Evict | CannotStart | NoPlace


def running(wanted: str, occupants: Sequence[Occupant], promised: Collection[str]) -> tuple[str, ...]:
    """Return the instances that hold a place, without `wanted`.

    Args:
        wanted: the instance that would be started.
        occupants: all instances.
        promised: instances that have a place and have not begun to start.
    """
    holders = [one.id for one in occupants if one.occupies]
    holders += [id_ for id_ in promised if id_ not in holders]
    return tuple(id_ for id_ in holders if id_ != wanted)


def place_for(
    wanted: str,
    occupants: Sequence[Occupant],
    *,
    max_running: int | None,
    promised: Collection[str] = (),
    keep: Collection[str] = (),
    obstacle: Explanation | None = None,
) -> Verdict:
    """Return what has to happen before one more instance may start.

    An instance that ends anyway is waited for. Otherwise an unused one is stopped: the one of the lowest
    priority, and of these the one that was used least recently. Only current use and a pin protect an
    instance. Nothing is stopped for an instance that would not start, and no instance that would not start
    again.

    Args:
        wanted: the instance that is to be started.
        occupants: all instances, this one among them.
        max_running: how many may run, None for any number.
        promised: see `running`.
        keep: instances that are not to be stopped.
        obstacle: why the wanted instance would not start, None when it may.
    """
    holders = running(wanted, occupants, promised)
    has_place = any(one.id == wanted and one.occupies for one in occupants)
    if has_place or max_running is None or len(holders) < max_running:
        return PlaceFree()
    if obstacle is not None:
        return CannotStart(obstacle)
    others = [one for one in occupants if one.id != wanted]
    for one in others:
        # One that is pinned starts again, one in use may drain for long.
        if one.is_ending and not one.in_use and not one.pinned:
            return AwaitEnd(one.id)
    unused = [
        (one.priority, one.unused_since, one)
        for one in others
        if one.unused_since is not None and one.id not in keep
    ]
    evictable = [entry for entry in unused if entry[2].may_return]
    if evictable:
        return Evict(min(evictable, key=lambda entry: entry[:2])[2].id)
    return NoPlace(holders, tuple(one.id for *_, one in unused))


def is_failing(failures: int, retry_at: float, now: float) -> bool:
    """Whether an instance is too likely to fail again for another one to be stopped for it.

    It is from its first failure until a while after its back-off. A crash loop would otherwise stop a good
    instance at each of its turns.

    Args:
        failures: its failures in a row.
        retry_at: the monotonic time at which its back-off ends.
        now: the monotonic time.
    """
    return failures > 0 and now < retry_at + backoff.STABLE_S
