"""The breaker of one instance: one table of transitions, pure.

Closed: every request passes. Open: none does, until the open time has ended. Half-open: one request at a
time passes, the probe; its success closes the breaker, its failure opens it for twice as long. The states are
those of resilience4j (https://resilience4j.readme.io/docs/circuitbreaker).

Each request carries the generation in which it was admitted. The generation grows with every change of state
and with every probe, and a result of an older one changes nothing.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from manager.errors import IllegalTransitionError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerLimits(NamedTuple):
    """`failures` in a row open a breaker for `open_s`, twice as long each time, at most for `max_open_s`."""

    failures: int = 2
    open_s: float = 30.0
    max_open_s: float = 300.0

    def open_time_s(self, openings: int) -> float:
        """Seconds that a breaker stays open which has opened so often in a row."""
        # The exponent is bounded too: 2.0**1024 overflows.
        return min(self.max_open_s, self.open_s * 2.0 ** min(openings - 1, 32))


class Breaker(NamedTuple):
    """One breaker. Times are monotonic seconds.

    `failures` and `openings` are those since the last success, `reason` that of the last failure. `opened_at`
    and `retry_at` are None while it is closed. `is_probed` is whether the half-open breaker's one request is
    under way. `is_in_doubt` is whether the last request timed out while its model was loaded: that counts if
    the next one times out too.
    """

    state: BreakerState = BreakerState.CLOSED
    generation: int = 1
    failures: int = 0
    openings: int = 0
    reason: Reason | None = None
    opened_at: float | None = None
    retry_at: float | None = None
    is_probed: bool = False
    is_in_doubt: bool = False


NEW: Final = Breaker()


class Admitted(NamedTuple):
    """A request is sent to the instance. Only where the breaker `admits` one."""

    now: float


class OpenTimeEnded(NamedTuple):
    """The time of a retry may have come."""

    now: float


class Succeeded(NamedTuple):
    """A request that was admitted in this generation was answered; a stream that is a probe, begun."""

    generation: int


class Failed(NamedTuple):
    """A request that was admitted in this generation failed, and the server is at fault.

    `loads` is whether it timed out while the server may have been loading its model.
    """

    generation: int
    reason: Reason
    now: float
    loads: bool = False


class Cancelled(NamedTuple):
    """A request that was admitted in this generation ended, and says nothing about the server."""

    generation: int


class Reset(NamedTuple):
    """The operator closes the breaker, or the instance has another server."""


class LimitsChanged(NamedTuple):
    """The limits are others than before."""


BreakerEvent: TypeAlias = Admitted | OpenTimeEnded | Succeeded | Failed | Cancelled | Reset | LimitsChanged


# A load that fails says that the model does not fit there, and nothing about other models. Where the model
# was loaded already the same words mean that its runner has died.
_COUNTED = frozenset(
    {Reason.ATTEMPT_TIMEOUT, Reason.UPSTREAM_UNREACHABLE, Reason.UPSTREAM_ERROR, Reason.INSTANCE_UNHEALTHY}
)


def is_counted(reason: Reason, *, is_loaded: bool) -> bool:
    """Return whether a failed attempt counts against its server.

    Args:
        reason: of the failure.
        is_loaded: the server had the model in memory when the request was sent.
    """
    return reason in _COUNTED or (reason is Reason.MODEL_LOAD_FAILED and is_loaded)


def admits(breaker: Breaker, now: float) -> bool:
    """Return whether a request may be sent now."""
    if breaker.state is BreakerState.CLOSED:
        return True
    return not breaker.is_probed and _is_due(breaker, now)


def step(breaker: Breaker, event: BreakerEvent, limits: BreakerLimits) -> Breaker:
    """Return the breaker after `event`.

    Raises:
        IllegalTransitionError: it cannot happen in this state; that is a defect.
    """
    if isinstance(event, (Succeeded, Failed, Cancelled)) and event.generation != breaker.generation:
        return breaker
    follow = _TABLE.get((breaker.state, type(event)))
    if follow is None:
        raise IllegalTransitionError(breaker, event)
    return follow(breaker, event, limits)


def _is_due(breaker: Breaker, now: float) -> bool:
    return breaker.retry_at is not None and now >= breaker.retry_at


def _same(breaker: Breaker, _event: BreakerEvent, _limits: BreakerLimits) -> Breaker:
    return breaker


def _probed(breaker: Breaker, event: Admitted, _limits: BreakerLimits) -> Breaker:
    if not admits(breaker, event.now):
        raise IllegalTransitionError(breaker, event)
    return breaker._replace(state=BreakerState.HALF_OPEN, generation=breaker.generation + 1, is_probed=True)


def _half_opened(breaker: Breaker, event: OpenTimeEnded, _limits: BreakerLimits) -> Breaker:
    if not _is_due(breaker, event.now):
        return breaker
    return breaker._replace(state=BreakerState.HALF_OPEN, generation=breaker.generation + 1)


def _healed(breaker: Breaker, _event: Succeeded, _limits: BreakerLimits) -> Breaker:
    return breaker._replace(failures=0, reason=None, is_in_doubt=False)


def _closed(breaker: Breaker, _event: BreakerEvent, _limits: BreakerLimits) -> Breaker:
    return Breaker(generation=breaker.generation + 1)


def _failed_closed(breaker: Breaker, event: Failed, limits: BreakerLimits) -> Breaker:
    if event.loads and not breaker.failures and not breaker.is_in_doubt:
        return breaker._replace(is_in_doubt=True)
    if breaker.is_in_doubt:
        # The first time-out was none of a load, or of one that does not end in the time that there is.
        is_second = event.reason is Reason.ATTEMPT_TIMEOUT
        breaker = breaker._replace(failures=breaker.failures + is_second, is_in_doubt=False)
    if breaker.failures + 1 < limits.failures:
        return breaker._replace(failures=breaker.failures + 1, reason=event.reason)
    return _opened(breaker, event, limits)


def _opened(breaker: Breaker, event: Failed, limits: BreakerLimits) -> Breaker:
    openings = breaker.openings + 1
    return Breaker(
        state=BreakerState.OPEN,
        generation=breaker.generation + 1,
        failures=breaker.failures + 1,
        openings=openings,
        reason=event.reason,
        opened_at=event.now,
        retry_at=event.now + limits.open_time_s(openings),
    )


def _given_back(breaker: Breaker, _event: Cancelled, _limits: BreakerLimits) -> Breaker:
    return breaker._replace(generation=breaker.generation + 1, is_probed=False)


def _rescheduled(breaker: Breaker, _event: LimitsChanged, limits: BreakerLimits) -> Breaker:
    opened_at = breaker.opened_at or 0.0  # an open breaker has one
    return breaker._replace(retry_at=opened_at + limits.open_time_s(breaker.openings))


# An open breaker has no request of its generation: a result of one is a defect, and so is a timer of another
# state. A half-open breaker without a probe has none either, since a probe's end begins a generation.
_TABLE: Mapping[tuple[BreakerState, type[BreakerEvent]], Callable[[Breaker, Any, BreakerLimits], Breaker]] = {
    (BreakerState.CLOSED, Admitted): _same,
    (BreakerState.CLOSED, Succeeded): _healed,
    (BreakerState.CLOSED, Failed): _failed_closed,
    (BreakerState.CLOSED, Cancelled): _same,
    (BreakerState.CLOSED, Reset): _closed,
    (BreakerState.CLOSED, LimitsChanged): _same,
    (BreakerState.OPEN, Admitted): _probed,
    (BreakerState.OPEN, OpenTimeEnded): _half_opened,
    (BreakerState.OPEN, Reset): _closed,
    (BreakerState.OPEN, LimitsChanged): _rescheduled,
    (BreakerState.HALF_OPEN, Admitted): _probed,
    (BreakerState.HALF_OPEN, OpenTimeEnded): _same,
    (BreakerState.HALF_OPEN, Succeeded): _closed,
    (BreakerState.HALF_OPEN, Failed): _opened,
    (BreakerState.HALF_OPEN, Cancelled): _given_back,
    (BreakerState.HALF_OPEN, Reset): _closed,
    (BreakerState.HALF_OPEN, LimitsChanged): _same,
}
