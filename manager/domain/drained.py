"""An operator's order to keep an instance out of service."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Drained:
    """Out of service: no request goes there, and nothing starts it. Times are UTC.

    `until` is None where only a resume ends it. `stops` is whether the container is stopped once its open
    requests have ended. `ran` is whether the instance was to run when the order came.
    """

    since: datetime
    until: datetime | None = None
    reason: str | None = None
    stops: bool = True
    ran: bool = False

    @property
    def detail(self) -> str:
        """`drained`, with the operator's reason where one was given."""
        return f"drained: {self.reason}" if self.reason else "drained"

    def has_passed(self, now: datetime) -> bool:
        return self.until is not None and self.until <= now

    def left_s(self, now: datetime) -> float | None:
        """Return the seconds until it ends by itself; None where it does not."""
        return None if self.until is None else max(0.0, (self.until - now).total_seconds())

    def stored(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "since": self.since.isoformat(),
            "until": None if self.until is None else self.until.isoformat(),
            "reason": self.reason,
            "stops": self.stops,
            "ran": self.ran,
        }


def drained_from(stored: Mapping[str, Any]) -> Drained:
    """Return what `Drained.stored` gave.

    Raises:
        LookupError, TypeError, ValueError: it is something else.
    """
    until, reason = stored["until"], stored["reason"]
    if not isinstance(reason, str | None):
        raise TypeError(f"the reason of a drain is {reason!r}")
    return Drained(
        since=datetime.fromisoformat(stored["since"]),
        until=None if until is None else datetime.fromisoformat(until),
        reason=reason,
        stops=bool(stored["stops"]),
        ran=bool(stored["ran"]),
    )


def why_out(instance: str, drained: Drained) -> str:
    """Return the sentence for callers that want the instance to run."""
    until = "" if drained.until is None else f" until {drained.until:%Y-%m-%dT%H:%M:%SZ}"
    return (
        f"{instance} is out of service{until} ({drained.detail}); "
        f"`ollama-manager resume {instance}` puts it back"
    )
