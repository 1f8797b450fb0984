"""An operator's order that the deny rules of an instance do not hold for a time."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Lifted:
    """The rules do not hold from `since` until `until`. Times are UTC."""

    since: datetime
    until: datetime
    reason: str | None = None

    def has_passed(self, now: datetime) -> bool:
        return self.until <= now

    def stored(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"since": self.since.isoformat(), "until": self.until.isoformat(), "reason": self.reason}


def lifted_from(stored: Mapping[str, Any]) -> Lifted:
    """Return what `Lifted.stored` gave.

    Raises:
        LookupError, TypeError, ValueError: it is something else.
    """
    reason = stored["reason"]
    if not isinstance(reason, str | None):
        raise TypeError(f"the reason of a lift is {reason!r}")
    return Lifted(datetime.fromisoformat(stored["since"]), datetime.fromisoformat(stored["until"]), reason)
