"""Events about fallbacks: one when a fallback begins, one when it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.record import RequestRecord
    from manager.errors import Reason
    from manager.services.journal import Journal

# A fallback has ended once no request fell back for so long: instances that take turns make no events.
_QUIET_S = 30.0
# The oldest entry makes room for a new one.
_MAX_ENTRIES = 1024
# One event for each target and reason of a fallback, up to this many.
_MAX_TARGETS = 16


@dataclass(slots=True)
class _Fallback:
    targets: set[tuple[str, Reason]]
    last_at: float


class FallbackEvents:
    """Owns which roles and models fall back now. Each has one entry, whichever client asks.

    Args:
        journal: takes the events.
        now: seconds on a monotonic clock.
    """

    def __init__(self, journal: Journal, *, now: Callable[[], float]) -> None:
        self._journal = journal
        self._now = now
        self._active: dict[tuple[str, str | None], _Fallback] = {}

    def ended(self, record: RequestRecord) -> None:
        """Take in a request that has ended."""
        if not record.fallback and not self._active:
            return
        if record.effective_target is None or record.outcome != "ok":
            return
        key = (record.role or record.model or "", record.requested_target)
        if record.fallback and record.fallback_reason is not None:
            self._fell_back(key, record, record.fallback_reason)
        else:
            self._is_back(key, record)

    def _fell_back(self, key: tuple[str, str | None], record: RequestRecord, reason: Reason) -> None:
        target = record.effective_target or ""
        known = self._active.get(key)
        if known is None:
            if len(self._active) >= _MAX_ENTRIES:
                del self._active[next(iter(self._active))]
            known = self._active[key] = _Fallback(set(), 0.0)
        known.last_at = self._now()
        if (target, reason) in known.targets or len(known.targets) >= _MAX_TARGETS:
            return
        known.targets.add((target, reason))
        wanted = record.requested_target or record.policy or "auto"
        self._journal.record(
            "fallback",
            instance=target,
            reason=reason,
            detail=f"{key[0]} (wanted: {wanted}) is answered by {target}",
        )

    def _is_back(self, key: tuple[str, str | None], record: RequestRecord) -> None:
        known = self._active.get(key)
        if known is None or self._now() - known.last_at < _QUIET_S:
            return
        del self._active[key]
        self._journal.record("fallback_ended", instance=record.effective_target, detail=f"{key[0]} is back")
