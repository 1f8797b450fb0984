from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from manager.domain.breaker import (
    NEW,
    Admitted,
    Breaker,
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
    is_counted,
    step,
)
from manager.errors import IllegalTransitionError, Reason

LIMITS = BreakerLimits(failures=2, open_s=30, max_open_s=100)
TIMEOUT = Reason.ATTEMPT_TIMEOUT


def after(*events: BreakerEvent, begin: Breaker = NEW, limits: BreakerLimits = LIMITS) -> Breaker:
    for event in events:
        begin = step(begin, event, limits)
    return begin


def failed(breaker: Breaker, now: float, reason: Reason = TIMEOUT) -> Breaker:
    return step(breaker, Failed(breaker.generation, reason, now), LIMITS)


def opened(now: float = 0.0) -> Breaker:
    return failed(failed(NEW, now), now)


def test_so_many_failures_in_a_row_open_it_and_one_fewer_does_not() -> None:
    once = failed(NEW, 5, Reason.UPSTREAM_ERROR)
    assert (once.state, once.failures, once.reason) == (BreakerState.CLOSED, 1, Reason.UPSTREAM_ERROR)
    assert admits(once, 5)
    twice = failed(once, 6)
    assert (twice.state, twice.failures, twice.reason) == (BreakerState.OPEN, 2, TIMEOUT)
    assert (twice.opened_at, twice.retry_at) == (6, 36)
    assert not admits(twice, 35.9)
    assert admits(twice, 36)


def test_a_success_between_two_failures_begins_the_row_anew() -> None:
    once = failed(NEW, 1)
    healed = step(once, Succeeded(once.generation), LIMITS)
    assert healed == NEW
    assert failed(healed, 2).state is BreakerState.CLOSED


def test_a_request_that_says_nothing_neither_counts_nor_ends_the_row() -> None:
    once = failed(NEW, 1)
    assert step(once, Cancelled(once.generation), LIMITS) == once


def timed_out(breaker: Breaker, now: float, *, loads: bool, limits: BreakerLimits = LIMITS) -> Breaker:
    return step(breaker, Failed(breaker.generation, TIMEOUT, now, loads), limits)


def test_a_time_out_while_the_model_is_loaded_counts_only_with_the_next_one() -> None:
    once = timed_out(NEW, 1, loads=True)
    assert (once.state, once.failures, once.is_in_doubt) == (BreakerState.CLOSED, 0, True)
    for loads in (True, False):
        twice = timed_out(once, 2, loads=loads)
        assert (twice.state, twice.failures, twice.reason) == (BreakerState.OPEN, 2, TIMEOUT)
    healed = step(once, Succeeded(once.generation), LIMITS)
    assert healed == NEW
    assert timed_out(healed, 3, loads=True).state is BreakerState.CLOSED


def test_a_time_out_of_a_load_that_another_fault_follows_does_not_count() -> None:
    once = failed(timed_out(NEW, 1, loads=True), 2, Reason.UPSTREAM_ERROR)
    assert (once.state, once.failures, once.is_in_doubt) == (BreakerState.CLOSED, 1, False)


def test_a_time_out_that_follows_a_failure_counts_at_once() -> None:
    assert timed_out(failed(NEW, 1), 2, loads=True).state is BreakerState.OPEN
    probed = step(opened(), Admitted(30), LIMITS)
    assert timed_out(probed, 31, loads=True).openings == 2


def test_with_other_limits_as_many_time_outs_in_a_row_open_it_but_never_one_load_alone() -> None:
    three = BreakerLimits(failures=3)
    breaker = NEW
    for now in range(2):
        breaker = timed_out(breaker, now, loads=True, limits=three)
    assert (breaker.state, breaker.failures) == (BreakerState.CLOSED, 2)
    assert timed_out(breaker, 3, loads=True, limits=three).state is BreakerState.OPEN
    one = BreakerLimits(failures=1)
    once = timed_out(NEW, 0, loads=True, limits=one)
    assert once.state is BreakerState.CLOSED
    assert timed_out(once, 1, loads=True, limits=one).state is BreakerState.OPEN


def test_a_late_result_of_an_older_generation_changes_nothing() -> None:
    before, now = NEW.generation, opened()
    half = step(now, OpenTimeEnded(30), LIMITS)
    for breaker in (now, half, after(Reset(), begin=now)):
        for result in (Succeeded(before), Failed(before, TIMEOUT, 99), Cancelled(before)):
            assert step(breaker, result, LIMITS) == breaker


def test_after_the_open_time_it_is_half_open_and_admits_one_request() -> None:
    breaker = opened()
    assert step(breaker, OpenTimeEnded(29.9), LIMITS) == breaker
    half = step(breaker, OpenTimeEnded(30), LIMITS)
    assert half.state is BreakerState.HALF_OPEN
    assert step(half, OpenTimeEnded(31), LIMITS) == half
    assert admits(half, 30)
    probed = step(half, Admitted(30), LIMITS)
    assert not admits(probed, 31)
    with pytest.raises(IllegalTransitionError, match="Admitted"):
        step(probed, Admitted(31), LIMITS)


def test_a_request_that_comes_before_the_timer_is_the_probe() -> None:
    probed = step(opened(), Admitted(30), LIMITS)
    assert (probed.state, probed.is_probed) == (BreakerState.HALF_OPEN, True)
    with pytest.raises(IllegalTransitionError):
        step(opened(), Admitted(29), LIMITS)


def test_a_probe_that_succeeds_closes_it_and_the_next_opening_is_short_again() -> None:
    probed = step(opened(), Admitted(30), LIMITS)
    closed = step(probed, Succeeded(probed.generation), LIMITS)
    assert closed == Breaker(generation=probed.generation + 1)
    again = failed(failed(closed, 40), 40)
    assert (again.openings, again.retry_at) == (1, 70)


def test_each_failed_probe_doubles_the_open_time_up_to_the_most() -> None:
    breaker, times = opened(), []
    for _ in range(4):
        assert breaker.opened_at is not None
        assert breaker.retry_at is not None
        times.append(breaker.retry_at - breaker.opened_at)
        breaker = failed(step(breaker, Admitted(breaker.retry_at), LIMITS), breaker.retry_at)
    assert times == [30, 60, 100, 100]
    assert breaker.failures == 6
    assert LIMITS.open_time_s(5000) == 100


def test_a_cancelled_probe_gives_its_slot_back_and_its_late_result_changes_nothing() -> None:
    probed = step(opened(), Admitted(30), LIMITS)
    given_back = step(probed, Cancelled(probed.generation), LIMITS)
    assert given_back.state is BreakerState.HALF_OPEN
    assert admits(given_back, 30)
    assert step(given_back, Failed(probed.generation, TIMEOUT, 31), LIMITS) == given_back
    second = step(given_back, Admitted(31), LIMITS)
    assert step(second, Succeeded(probed.generation), LIMITS) == second
    assert step(second, Succeeded(second.generation), LIMITS).state is BreakerState.CLOSED


def test_a_reset_closes_it_in_every_state_and_begins_a_generation() -> None:
    half = step(opened(), OpenTimeEnded(30), LIMITS)
    for breaker in (NEW, failed(NEW, 1), opened(), half, step(half, Admitted(30), LIMITS)):
        assert step(breaker, Reset(), LIMITS) == Breaker(generation=breaker.generation + 1)


def test_other_limits_move_the_retry_of_an_open_one_only() -> None:
    other = BreakerLimits(failures=5, open_s=3, max_open_s=100)
    assert step(opened(10), LimitsChanged(), other).retry_at == 13
    half = step(opened(), OpenTimeEnded(30), LIMITS)
    for breaker in (NEW, failed(NEW, 1), half):
        assert step(breaker, LimitsChanged(), other) == breaker


def test_what_cannot_happen_raises() -> None:
    breaker = opened()
    for event in (Succeeded(breaker.generation), Cancelled(breaker.generation)):
        with pytest.raises(IllegalTransitionError, match="no transition from"):
            step(breaker, event, LIMITS)
    with pytest.raises(IllegalTransitionError):
        step(NEW, OpenTimeEnded(1), LIMITS)


@pytest.mark.parametrize("reason", Reason)
def test_only_faults_of_the_server_count(reason: Reason) -> None:
    faults = {
        Reason.ATTEMPT_TIMEOUT,
        Reason.UPSTREAM_UNREACHABLE,
        Reason.UPSTREAM_ERROR,
        Reason.INSTANCE_UNHEALTHY,
    }
    assert is_counted(reason, is_loaded=False) is (reason in faults)
    assert is_counted(reason, is_loaded=True) is (reason in {*faults, Reason.MODEL_LOAD_FAILED})


class Breakers(RuleBasedStateMachine):
    """Any order of requests, results, resets and settings, with results that come late."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = LIMITS
        self.breaker = NEW
        self.now = 0.0
        self.open_requests: list[int] = []
        self.row = 0
        self.in_doubt = False

    def take(self, event: BreakerEvent) -> None:
        before, self.breaker = self.breaker, step(self.breaker, event, self.limits)
        assert self.breaker.generation >= before.generation
        if self.breaker.state is not before.state:
            assert self.breaker.generation > before.generation
        if self.breaker.state is BreakerState.CLOSED and before.state is not BreakerState.CLOSED:
            self.row = 0

    @rule()
    def a_request_comes(self) -> None:
        if admits(self.breaker, self.now):
            self.take(Admitted(self.now))
            self.open_requests.append(self.breaker.generation)

    @rule(
        which=st.integers(0, 50),
        how=st.sampled_from(["succeeds", "fails", "times out in a load", "is cancelled"]),
    )
    @precondition(lambda self: self.open_requests)
    def a_request_ends(self, which: int, how: str) -> None:
        generation = self.open_requests.pop(which % len(self.open_requests))
        before = self.breaker
        events: dict[str, BreakerEvent] = {
            "succeeds": Succeeded(generation),
            "fails": Failed(generation, TIMEOUT, self.now),
            "times out in a load": Failed(generation, TIMEOUT, self.now, loads=True),
            "is cancelled": Cancelled(generation),
        }
        self.take(events[how])
        if generation != before.generation:
            assert self.breaker == before
        elif how == "succeeds":
            assert self.breaker.state is BreakerState.CLOSED
            self.row = 0
            self.in_doubt = False
        elif (
            how == "times out in a load"
            and before.state is BreakerState.CLOSED
            and not self.row
            and not self.in_doubt
        ):
            self.in_doubt = True
            assert self.breaker.state is BreakerState.CLOSED
        elif how != "is cancelled":
            self.row += 1 + self.in_doubt
            self.in_doubt = False
            is_open = before.state is BreakerState.HALF_OPEN or self.row >= self.limits.failures
            assert (self.breaker.state is BreakerState.OPEN) is is_open
            if is_open:
                assert not admits(self.breaker, self.now)
        else:
            assert self.breaker.state is before.state

    @rule(seconds=st.sampled_from([0.5, 30.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    @precondition(lambda self: self.breaker.state is BreakerState.OPEN)
    def the_timer_fires(self) -> None:
        due = self.breaker.retry_at is not None and self.now >= self.breaker.retry_at
        self.take(OpenTimeEnded(self.now))
        assert (self.breaker.state is BreakerState.HALF_OPEN) is due

    @rule()
    def the_operator_resets_it(self) -> None:
        self.take(Reset())
        assert self.breaker.state is BreakerState.CLOSED
        self.row = 0
        self.in_doubt = False

    @rule(failures=st.integers(1, 4), open_s=st.sampled_from([1.0, 30.0]))
    def settings_change(self, failures: int, open_s: float) -> None:
        self.limits = BreakerLimits(failures, open_s, 100)
        self.take(LimitsChanged())

    @invariant()
    def at_most_one_request_of_a_breaker_that_is_not_closed_is_current(self) -> None:
        current = self.open_requests.count(self.breaker.generation)
        if self.breaker.state is BreakerState.OPEN:
            assert current == 0
        elif self.breaker.state is BreakerState.HALF_OPEN:
            assert current == int(self.breaker.is_probed)

    @invariant()
    def it_is_never_shut_for_longer_than_the_most(self) -> None:
        breaker = self.breaker
        assert (breaker.retry_at is None) is (breaker.state is BreakerState.CLOSED)
        if breaker.state is BreakerState.OPEN:
            assert admits(breaker, (breaker.opened_at or 0.0) + self.limits.max_open_s)


TestBreakers = Breakers.TestCase
