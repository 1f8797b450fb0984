"""The owner of the breakers: permits, events, timers, and what routing and the operator are shown."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

import pytest

from manager.domain.breaker import BreakerLimits, BreakerState
from manager.errors import Reason
from manager.services.routing.breakers import Breakers, BreakerView
from manager.services.world import Revision
from tests.support.attempts import Clock, Journal
from tests.support.inside import until

if TYPE_CHECKING:
    from collections.abc import Callable

BEGIN = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
TIMEOUT = Reason.ATTEMPT_TIMEOUT


class Timer:
    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at = at
        self.call = call
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Bench:
    """Breakers whose clock and timers belong to the test."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.began_at = self.clock.now
        self.journal = Journal()
        self.revision = Revision()
        self.timers: list[Timer] = []
        self.breakers = Breakers(
            cast("Any", self.journal),
            self.revision,
            limits=BreakerLimits(),
            now=self.clock,
            utcnow=lambda: BEGIN + timedelta(seconds=self.clock.now - self.began_at),
            call_later=self.call_later,
        )

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.clock.now + delay_s, call))
        return self.timers[-1]

    def passes(self, seconds: float) -> None:
        """Let time pass, and the timers that are due fire."""
        self.clock.advance(seconds)
        for timer in self.timers[:]:
            if not timer.is_cancelled and timer.at <= self.clock.now:
                self.timers.remove(timer)
                timer.call()

    def fails(self, times: int = 1, instance: str = "a", reason: Reason = TIMEOUT) -> None:
        for _ in range(times):
            self.breakers.failed(instance, self.breakers.admit(instance), reason)

    def state(self, instance: str = "a") -> BreakerState:
        return self.breakers.view(instance).state


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_two_failures_in_a_row_open_a_breaker_and_that_is_an_event(bench: Bench) -> None:
    bench.fails()
    assert bench.breakers.view("a") == BreakerView(BreakerState.CLOSED, 1, None, None, TIMEOUT)
    assert (bench.journal.events, bench.revision.number) == ([], 0)
    bench.fails(reason=Reason.UPSTREAM_ERROR)
    assert bench.journal.events == [("breaker_opened", "a", Reason.UPSTREAM_ERROR)]
    assert bench.journal.details == ["2 failures in a row; no request for 30 s"]
    assert bench.revision.number == 1
    retry_at = BEGIN + timedelta(seconds=30)
    bench.clock.advance(7)
    expected = BreakerView(BreakerState.OPEN, 2, BEGIN, retry_at, Reason.UPSTREAM_ERROR)
    assert bench.breakers.view("a") == expected
    assert bench.breakers.admit("a") == 0
    assert bench.breakers.why_shut("a") == (
        "breaker open after 2 failures in a row, the last one upstream_error; retry at 2026-11-28T12:00:30Z"
    )
    assert bench.breakers.retry_after_s(["a"]) == 23
    assert bench.breakers.why_shut("b") == ""
    assert bench.breakers.admit("b")


def test_a_success_ends_the_row_and_closed_breakers_make_no_events(bench: Bench) -> None:
    for _ in range(3):
        bench.fails()
        bench.breakers.succeeded("a", bench.breakers.admit("a"))
        bench.breakers.cancelled("a", bench.breakers.admit("a"))
    assert bench.breakers.view("a") == BreakerView(BreakerState.CLOSED, 0, None, None, None)
    assert bench.journal.events == []


def test_what_never_failed_is_not_kept(bench: Bench) -> None:
    for _ in range(3):
        bench.breakers.succeeded("a", bench.breakers.admit("a"))
        bench.breakers.cancelled("a", bench.breakers.admit("a"))
    assert bench.breakers._breakers == {}


def test_the_timer_half_opens_it_and_one_request_is_the_probe(bench: Bench) -> None:
    bench.fails(2)
    bench.passes(29.9)
    assert bench.state() is BreakerState.OPEN
    bench.passes(0.2)
    assert bench.state() is BreakerState.HALF_OPEN
    assert bench.journal.events[-1] == ("breaker_half_open", "a", None)
    assert bench.breakers.why_shut("a") == ""
    before = bench.revision.number
    permit = bench.breakers.admit("a")
    assert permit
    assert bench.revision.number == before + 1, "the others are decided anew"
    assert bench.breakers.admit("a") == 0
    assert bench.breakers.why_shut("a") == (
        "breaker half-open after 2 failures in a row, the last one attempt_timeout; one request is trying it"
    )
    assert bench.breakers.retry_after_s(["a"]) == 1
    bench.breakers.succeeded("a", permit)
    assert bench.journal.events[-1] == ("breaker_closed", "a", None)
    assert bench.journal.details[-1] == "the request that tried it was answered"
    assert bench.breakers.admit("a")
    assert len(bench.journal.events) == 3


def test_a_timer_that_fires_early_is_set_again(bench: Bench) -> None:
    bench.fails(2)
    timer = bench.timers.pop()
    bench.clock.advance(29.999)
    timer.call()
    assert bench.state() is BreakerState.OPEN
    bench.passes(0.01)
    assert bench.state() is BreakerState.HALF_OPEN


def test_a_failed_probe_opens_it_for_twice_as_long(bench: Bench) -> None:
    bench.fails(2)
    bench.passes(31)
    bench.fails()
    assert bench.breakers.retry_after_s(["a"]) == 60
    assert bench.journal.details[-1] == "3 failures in a row; no request for 60 s"
    bench.passes(59)
    assert bench.breakers.admit("a") == 0
    bench.passes(2)
    assert bench.breakers.admit("a")


def test_a_cancelled_probe_gives_its_slot_to_the_next_at_once(bench: Bench) -> None:
    bench.fails(2)
    bench.passes(31)
    first = bench.breakers.admit("a")
    bench.breakers.cancelled("a", first)
    second = bench.breakers.admit("a")
    assert second
    bench.breakers.succeeded("a", first)
    assert bench.state() is BreakerState.HALF_OPEN, "the first one has no say any more"
    bench.breakers.succeeded("a", second)
    assert bench.state() is BreakerState.CLOSED


def test_a_request_of_before_a_reset_counts_for_nothing_after_it(bench: Bench) -> None:
    slow = [bench.breakers.admit("a") for _ in range(3)]
    bench.breakers.reset("a")
    bench.fails()
    for permit in slow:
        bench.breakers.failed("a", permit, TIMEOUT)
    assert bench.breakers.view("a").failures == 1
    assert bench.journal.events == []


@pytest.mark.parametrize(
    ("how", "why"),
    [("reset", "reset by the operator"), ("server_changed", "its server was stopped or replaced")],
)
def test_a_reset_and_a_new_server_close_an_open_breaker(bench: Bench, how: str, why: str) -> None:
    bench.fails(2)
    getattr(bench.breakers, how)("a")
    assert bench.breakers.view("a") == BreakerView(BreakerState.CLOSED, 0, None, None, None)
    assert bench.journal.events[-1] == ("breaker_closed", "a", None)
    assert bench.journal.details[-1] == why
    bench.passes(100)
    assert bench.journal.kinds == ["breaker_opened", "breaker_closed"], "its timer was cancelled"


def test_other_limits_hold_for_an_open_breaker_at_once(bench: Bench) -> None:
    bench.fails(2)
    bench.breakers.reconfigure(BreakerLimits())
    assert len(bench.timers) == 1
    bench.breakers.reconfigure(BreakerLimits(failures=1, open_s=5, max_open_s=8))
    assert bench.breakers.retry_after_s(["a"]) == 5
    bench.passes(5.1)
    assert bench.state() is BreakerState.HALF_OPEN
    bench.fails(instance="b")
    assert bench.state("b") is BreakerState.OPEN


def test_the_earliest_of_several_is_what_a_client_waits_for(bench: Bench) -> None:
    bench.fails(2, "a")
    bench.clock.advance(10)
    bench.fails(2, "b")
    assert bench.breakers.retry_after_s(["a", "b"]) == 20
    assert bench.breakers.retry_after_s(["b"]) == 30
    assert bench.breakers.retry_after_s([]) == 1


async def test_the_event_loop_half_opens_it_where_nothing_else_does() -> None:
    journal = Journal()
    breakers = Breakers(
        cast("Any", journal),
        Revision(),
        limits=BreakerLimits(failures=1, open_s=0.02, max_open_s=1),
        now=monotonic,
        utcnow=lambda: datetime.now(UTC),
    )
    breakers.failed("a", breakers.admit("a"), TIMEOUT)
    await until(lambda: breakers.view("a").state is BreakerState.HALF_OPEN, within_s=5)
    assert journal.kinds == ["breaker_opened", "breaker_half_open"]
