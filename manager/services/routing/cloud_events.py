"""Events about answers that cost money: at most one a minute for each role and paid server."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from manager.domain.record import RequestRecord
    from manager.services.journal import Journal

_EVERY = timedelta(minutes=1)
# The oldest entry makes room for a new one.
_MOST_ENTRIES = 256


@dataclass(slots=True)
class _Used:
    told_at: datetime
    since: int = 0


class CloudEvents:
    """Owns when each use of a paid server was last reported.

    Args:
        journal: takes the events.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._entries: dict[tuple[str, str], _Used] = {}

    def ended(self, record: RequestRecord) -> None:
        """Take in a request that a paid server was asked for."""
        key = (record.role or record.model or "", record.provider)
        entry = self._entries.get(key)
        if entry is not None and record.ts - entry.told_at < _EVERY:
            entry.since += 1
            return
        more = f"; {entry.since} more since the last event" if entry is not None and entry.since else ""
        if entry is None and len(self._entries) >= _MOST_ENTRIES:
            del self._entries[next(iter(self._entries))]
        self._entries[key] = _Used(record.ts)
        self._journal.record(
            "cloud_used",
            instance=record.provider,
            reason=record.fallback_reason,
            detail=f"{key[0]} was put to {record.provider} ({record.model}): {record.outcome}{more}",
        )
