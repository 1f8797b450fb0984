"""Moments instead of what is left of a time: a page counts down by itself, and is sent nothing meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# A moment that is computed from what is left moves a little with each reading.
_TOLERANCE_S = 1.5
_CLOCKS = frozenset({"ttl_remaining_s", "last_used_at", "last_seen_at"})


class Ends:
    """Remembers when the TTL of each instance ends: the moment stays the same while nothing happens."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}

    def without_clocks(self, sections: Mapping[str, Any], now: float) -> Mapping[str, Any]:
        """Return the sections with `ttl_ends_at` (Unix seconds, None without an end) in place of clocks.

        Args:
            sections: of the live channel.
            now: Unix seconds.
        """
        instances = [self._without_clocks(one, now) for one in sections["instances"]]
        self._ends = {one["id"]: one["ttl_ends_at"] for one in instances if one["ttl_ends_at"] is not None}
        return {**sections, "instances": instances}

    def _without_clocks(self, instance: Mapping[str, Any], now: float) -> dict[str, Any]:
        left_s = instance["ttl_remaining_s"]
        kept = {name: value for name, value in instance.items() if name not in _CLOCKS}
        if left_s is None:
            return {**kept, "ttl_ends_at": None}
        end, before = round(now + left_s, 1), self._ends.get(instance["id"])
        return {**kept, "ttl_ends_at": before if before and abs(end - before) < _TOLERANCE_S else end}
