"""A model that is to stay in memory: when it is loaded, and when it is left alone for a while."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from manager.domain import backoff

if TYPE_CHECKING:
    from datetime import datetime

    from manager.errors import Reason

# A model that leaves memory sooner than this is loaded with a pause: something else wants the memory.
_STAYS_S = 60.0
_LONGEST_PAUSE_S = 30.0
# A time in memory that ends sooner than this is renewed.
RENEWED_S = 60.0


@dataclass(frozen=True, slots=True)
class Keeping:
    """One model on one instance.

    Attributes:
        is_kept: it was in memory when it was looked at last, or has left it since.
        trouble: why it could not be loaded, as the last event says; None while there is none.
        detail: adds to the trouble in words.
        failures: loads in a row that have failed.
        losses: loads in a row after which it left memory soon.
        loaded_at: the monotonic time of the last load that succeeded.
        retry_at: the monotonic time before which it is not loaded.
    """

    is_kept: bool = False
    trouble: Reason | None = None
    detail: str = ""
    failures: int = 0
    losses: int = 0
    loaded_at: float | None = None
    retry_at: float = 0.0

    def loaded(self, now: float) -> Keeping:
        """It was loaded a moment ago."""
        soon = self.loaded_at is not None and now - self.loaded_at < _STAYS_S + _LONGEST_PAUSE_S
        losses = self.losses + 1 if soon else 0
        pause_s = min(_LONGEST_PAUSE_S, backoff.delay_s(losses))
        return replace(self, failures=0, losses=losses, loaded_at=now, retry_at=now + pause_s)

    def kept(self) -> Keeping:
        """It is in memory, and there is no trouble."""
        return replace(self, is_kept=True, trouble=None, detail="", failures=0)

    def failed(self, now: float, reason: Reason, wait_s: float | None, *, detail: str = "") -> Keeping:
        """A load has failed; `wait_s` is when another one is worth a try, None where that is unknown."""
        failures = self.failures + 1
        pause_s = max(backoff.delay_s(failures), wait_s or 0.0)
        return replace(
            self,
            is_kept=False,
            trouble=reason,
            detail=detail,
            failures=failures,
            retry_at=now + pause_s,
        )

    def barred(self, reason: Reason, detail: str = "") -> Keeping:
        """It is not to be loaded for now: it is denied there, or is not there."""
        return replace(self, is_kept=False, trouble=reason, detail=detail)


def is_kept(expires_at: datetime | None, now: datetime) -> bool:
    """Return whether a model in memory stays there; None is a time too far away to be compared with."""
    return expires_at is None or (expires_at - now).total_seconds() > RENEWED_S
