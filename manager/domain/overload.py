"""Overloaded instances: they go behind those that can answer instead, and none is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

# The order of an instance among those that can be used: stage, rank, place, tier and priority, see `routing`.
Order: TypeAlias = tuple[int, int, int, int, int]
# The priority of the last one of its kind.
_LAST = 2**63


class Overloaded(NamedTuple):
    """An instance that is overloaded for a model. `refuses` is whether its server refuses requests."""

    why: str
    refuses: bool


class Overloads(NamedTuple):
    """The overload of one instance. Both say why in words.

    Attributes:
        refuses: its server has refused a request a moment ago; empty where it has not.
        slow: keys of the models that have become slow there.
    """

    refuses: str
    slow: Mapping[str, str]

    def of(self, key: str) -> Overloaded | None:
        """Return the overload for a model of this key; None where there is none."""
        if self.refuses:
            return Overloaded(self.refuses, refuses=True)
        why = self.slow.get(key)
        return None if why is None else Overloaded(why, refuses=False)


def behind_others(
    in_order: list[tuple[Order, list[str]]], busy: Mapping[str, Overloaded]
) -> tuple[list[tuple[Order, list[str]]], Mapping[str, Order]]:
    """Move overloaded instances behind those that can answer instead.

    One whose server refuses requests goes behind all that run, whatever their device: it would refuse this
    one as well, and they would follow. One that is slow goes behind those of the same rank that have the
    model loaded: a slow card may still be faster than the CPU, and is faster than a load.

    Returns:
        The groups in order, and the order of those instances that were moved.
    """
    groups = [(order, [id_ for id_ in ids if id_ not in busy]) for order, ids in in_order]
    rest = [(order, ids) for order, ids in groups if ids]
    placed = [(order, order, ids) for order, ids in rest]
    moved: dict[str, Order] = {}
    for order, ids in in_order:
        for id_ in ids:
            if id_ in busy:
                others = [one for one, _ in rest if _stands_in(one, order, busy[id_])]
                place = order
                if others:
                    place = (*max(others)[:4], _LAST)
                    moved[id_] = order
                placed.append((place, order, [id_]))
    placed.sort(key=lambda one: one[0])
    return [(order, ids) for _, order, ids in placed], moved


def _stands_in(other: Order, order: Order, overloaded: Overloaded) -> bool:
    stage, rank, _, tier, _ = other
    if stage:
        return False
    if overloaded.refuses:
        return tier <= 1  # it runs
    return tier == 0 and rank == order[1]
