"""Breakers: an instance whose requests fail is passed over for a while, then tried with one request."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, Protocol

from manager.domain.breaker import (
    NEW,
    Admitted,
    BreakerEvent,
    BreakerLimits,
    BreakerState,
    Cancelled,
    Failed,
    LimitsChanged,
    OpenTimeEnded,
    Reset,
    Succeeded,
    admits,
    step,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from manager.domain.breaker import Breaker
    from manager.errors import Reason
    from manager.services.journal import Journal
    from manager.services.world import Revision

_CLOSED = BreakerState.CLOSED
# The wait for the result of a probe that is under way.
_PROBE_RETRY_S = 1.0
# A timer of the event loop counts whole milliseconds, and may fire before the time has come.
_TIMER_SLACK_S = 0.002


class BreakerView(NamedTuple):
    """One breaker as it is shown. `reason` is that of the last failure, None without one."""

    state: BreakerState
    failures: int
    opened_at: datetime | None
    retry_at: datetime | None
    reason: Reason | None


class Timer(Protocol):
    def cancel(self) -> None: ...


def _call_later(delay_s: float, call: Callable[[], None]) -> Timer:
    return asyncio.get_running_loop().call_later(delay_s, call)


class Breakers:
    """Owns the breakers, at most one an instance. One that was never needed is not kept.

    Every change of state is an event in the journal, and advances the revision of the fleet, so that routing
    takes it in at once.

    Args:
        journal: takes the events.
        revision: of the fleet.
        limits: when breakers open, and for how long.
        now: seconds on a monotonic clock.
        utcnow: the wall clock.
        call_later: calls back on the event loop after so many seconds.
    """

    def __init__(
        self,
        journal: Journal,
        revision: Revision,
        *,
        limits: BreakerLimits,
        now: Callable[[], float],
        utcnow: Callable[[], datetime],
        call_later: Callable[[float, Callable[[], None]], Timer] = _call_later,
    ) -> None:
        self._journal = journal
        self._revision = revision
        self._limits = limits
        self._now = now
        self._utcnow = utcnow
        self._call_later = call_later
        self._breakers: dict[str, Breaker] = {}
        # The wall clock when each opened last.
        self._opened_at: dict[str, datetime] = {}
        # Of those that are open.
        self._timers: dict[str, Timer] = {}

    # --- what a request calls ---

    def admit(self, instance: str) -> int:
        """Return the permit of a request that is about to be sent; 0 where none may be sent now.

        Each permit is given to exactly one of `succeeded`, `failed` and `cancelled`.
        """
        breaker = self._breakers.get(instance, NEW)
        if breaker.state is _CLOSED:
            return breaker.generation
        now = self._now()
        if not admits(breaker, now):
            return 0
        return self._take(instance, Admitted(now)).generation

    def succeeded(self, instance: str, permit: int) -> None:
        """A request was answered to its end."""
        breaker = self._breakers.get(instance)
        if breaker is not None and (breaker.failures or breaker.is_in_doubt or breaker.state is not _CLOSED):
            self._take(instance, Succeeded(permit))

    def is_half_open(self, instance: str) -> bool:
        """Return whether a breaker is half-open."""
        breaker = self._breakers.get(instance)
        return breaker is not None and breaker.state is BreakerState.HALF_OPEN

    def begun(self, instance: str, permit: int) -> int:
        """The answer to a request has begun well: that closes the half-open breaker that it tries.

        Returns:
            The permit from now on: what becomes of the rest of the answer is a result of its own.
        """
        if not self.is_half_open(instance):
            return permit
        after = self._take(instance, Succeeded(permit))
        return after.generation if after.state is _CLOSED else permit

    def failed(self, instance: str, permit: int, reason: Reason, *, loads: bool = False) -> None:
        """A request failed, and the server is at fault; for `loads` see `domain.breaker.Failed`."""
        self._take(instance, Failed(permit, reason, self._now(), loads))

    def cancelled(self, instance: str, permit: int) -> None:
        """A request ended in a way that says nothing about the server."""
        breaker = self._breakers.get(instance)
        if breaker is not None and breaker.state is not _CLOSED:
            self._take(instance, Cancelled(permit))

    # --- what the operator and the fleet call ---

    def reset(self, instance: str, why: str = "reset by the operator") -> None:
        """Close a breaker. Requests that are under way count for nothing."""
        self._take(instance, Reset(), why)

    def server_changed(self, instance: str) -> None:
        """Take in that an instance has another server than before, or none."""
        self._take(instance, Reset(), "its server was stopped or replaced")

    def reconfigure(self, limits: BreakerLimits) -> None:
        """Put other limits in force, for open breakers too."""
        if limits != self._limits:
            self._limits = limits
            for instance in list(self._breakers):
                self._take(instance, LimitsChanged())

    # --- what others read ---

    def view(self, instance: str) -> BreakerView:
        """Return the breaker of an instance as it is."""
        breaker = self._breakers.get(instance, NEW)
        return BreakerView(
            breaker.state,
            breaker.failures,
            None if breaker.opened_at is None else self._opened_at[instance],
            self._retry_at(instance, breaker),
            breaker.reason,
        )

    def why_shut(self, instance: str) -> str:
        """Return why no request may go to an instance now; empty where one may."""
        breaker = self._breakers.get(instance)
        if breaker is None or breaker.state is _CLOSED or admits(breaker, self._now()):
            return ""
        after = f"after {breaker.failures} failures in a row, the last one {breaker.reason}"
        if breaker.state is BreakerState.HALF_OPEN:
            return f"breaker half-open {after}; one request is trying it"
        retry_at = self._retry_at(instance, breaker)
        return f"breaker open {after}; retry at {retry_at:%Y-%m-%dT%H:%M:%SZ}"

    def retry_after_s(self, instances: Iterable[str]) -> float:
        """Return the seconds until the first of these instances may be tried."""
        now = self._now()
        waits = [
            max(0.0, (breaker.retry_at or now) - now)
            for instance in instances
            if (breaker := self._breakers.get(instance)) is not None
        ]
        return max(_PROBE_RETRY_S, min(waits, default=0.0))

    # --- helpers ---

    def _take(self, instance: str, event: BreakerEvent, why: str = "") -> Breaker:
        before = self._breakers.get(instance, NEW)
        after = self._breakers[instance] = step(before, event, self._limits)
        if after.state is not before.state or after.is_probed is not before.is_probed:
            self._revision.advance()
        if after.opened_at is not None and after.opened_at != before.opened_at:
            self._opened_at[instance] = self._utcnow()
        if after.state is not before.state:
            self._record(instance, after, why)
        if (after.state, after.retry_at) != (before.state, before.retry_at):
            self._set_timer(instance, after)
        return after

    def _record(self, instance: str, breaker: Breaker, why: str) -> None:
        match breaker.state:
            case BreakerState.OPEN:
                open_s = (breaker.retry_at or 0.0) - (breaker.opened_at or 0.0)
                self._journal.record(
                    "breaker_opened",
                    instance=instance,
                    reason=breaker.reason,
                    detail=f"{breaker.failures} failures in a row; no request for {open_s:g} s",
                )
            case BreakerState.HALF_OPEN:
                detail = "one request at a time tries it"
                self._journal.record("breaker_half_open", instance=instance, detail=detail)
            case BreakerState.CLOSED:
                self._journal.record(
                    "breaker_closed",
                    instance=instance,
                    detail=why or "the request that tried it was answered",
                )

    def _set_timer(self, instance: str, breaker: Breaker) -> None:
        timer = self._timers.pop(instance, None)
        if timer is not None:
            timer.cancel()
        if breaker.state is BreakerState.OPEN and breaker.retry_at is not None:
            delay_s = max(0.0, breaker.retry_at - self._now()) + _TIMER_SLACK_S
            self._timers[instance] = self._call_later(delay_s, lambda: self._time_ended(instance))

    def _time_ended(self, instance: str) -> None:
        del self._timers[instance]
        breaker = self._take(instance, OpenTimeEnded(self._now()))
        if breaker.state is BreakerState.OPEN:
            self._set_timer(instance, breaker)

    def _retry_at(self, instance: str, breaker: Breaker) -> datetime | None:
        if breaker.retry_at is None or breaker.opened_at is None:
            return None
        return self._opened_at[instance] + timedelta(seconds=breaker.retry_at - breaker.opened_at)
