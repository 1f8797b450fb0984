"""Events about fallbacks: one when a fallback begins, one when it has ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manager.domain.record import RequestRecord
    from manager.errors import Reason
    from manager.services.journal import Journal

# A fallback has ended after so many requests in a row that did not fall back. Instances that take turns make
# no events, and one that comes and goes makes fewer each time: the number doubles with each new beginning.
_FIRST_GOOD = 3
_MAX_GOOD = 1024
# The oldest entry makes room for a new one.
_MAX_ENTRIES = 1024
# One event for each target and reason of a fallback, up to this many.
_MAX_TARGETS = 16


@dataclass(slots=True)
class _Fallback:
    """`good` requests in a row did not fall back, of the `needed` ones."""

    needed: int = _FIRST_GOOD
    good: int = 0
    is_active: bool = False
    targets: set[tuple[str, Reason]] = field(default_factory=set)


class FallbackEvents:
    """Owns which roles and models fall back now. Each has one entry, whichever client asks.

    Args:
        journal: takes the events.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._entries: dict[tuple[str, str | None], _Fallback] = {}

    def ended(self, record: RequestRecord) -> None:
        """Take in a request that has ended."""
        if not record.fallback and not self._entries:
            return
        if record.effective_target is None or record.outcome != "ok":
            return
        key = (record.role or record.model or "", record.requested_target)
        if record.fallback and record.fallback_reason is not None:
            self._fell_back(key, record, record.fallback_reason)
        else:
            self._did_not(key, record)

    def _fell_back(self, key: tuple[str, str | None], record: RequestRecord, reason: Reason) -> None:
        target = record.effective_target or ""
        entry = self._entries.get(key)
        if entry is None:
            if len(self._entries) >= _MAX_ENTRIES:
                del self._entries[next(iter(self._entries))]
            entry = self._entries[key] = _Fallback()
        elif not entry.is_active:
            entry.needed = min(2 * entry.needed, _MAX_GOOD)
            entry.targets.clear()
        entry.is_active = True
        entry.good = 0
        if (target, reason) in entry.targets or len(entry.targets) >= _MAX_TARGETS:
            return
        entry.targets.add((target, reason))
        wanted = record.requested_target or record.policy or "auto"
        self._journal.record(
            "fallback",
            instance=target,
            reason=reason,
            detail=f"{key[0]} (wanted: {wanted}) is answered by {target}",
        )

    def _did_not(self, key: tuple[str, str | None], record: RequestRecord) -> None:
        entry = self._entries.get(key)
        if entry is None or not entry.is_active:
            return
        entry.good += 1
        if entry.good < entry.needed:
            return
        entry.is_active = False
        self._journal.record("fallback_ended", instance=record.effective_target, detail=f"{key[0]} is back")
