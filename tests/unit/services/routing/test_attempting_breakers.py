"""A request takes a permit of the breaker with its lease, and says exactly once what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.breaker import BreakerLimits, BreakerState
from manager.domain.judgement import ABOUT_THE_REQUEST, Judgement
from manager.domain.roles import RequestKind
from manager.domain.routing import PassedOver, Refused
from manager.domain.target import Target
from manager.errors import Reason
from manager.services.routing.attempting import WAIT, Attempting, Trouble
from tests.support.attempts import FACTS, Stage, attempt, decision, shown

if TYPE_CHECKING:
    from manager.domain.record import Outcome
    from manager.services.routing.attempting import Step

LIMITS = BreakerLimits()
DOWN = Judgement(Reason.UPSTREAM_ERROR, may_start=False)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    one = Stage(attempt("a"), breaker=LIMITS)
    one.use_clock(monkeypatch)
    return one


def failures(stage: Stage, instance: str = "a") -> int:
    return stage.breakers.view(instance).failures


def state(stage: Stage, instance: str = "a") -> BreakerState:
    return stage.breakers.view(instance).state


def shut(stage: Stage, instance: str = "a") -> None:
    for _ in range(2):
        permit = stage.breakers.admit(instance)
        stage.breakers.failed(instance, permit, Reason.UPSTREAM_ERROR)


def trouble(step: Step | None) -> Trouble:
    assert isinstance(step, Trouble), step
    return step


@pytest.mark.parametrize("outcome", ["client_error", "client_gone", "refused", "upstream_error", "cut"])
def test_only_a_whole_answer_ends_a_row_of_failures(stage: Stage, outcome: Outcome) -> None:
    permit = stage.breakers.admit("a")
    stage.breakers.failed("a", permit, Reason.UPSTREAM_ERROR)
    one = stage.sent()
    assert one.answered(ABOUT_THE_REQUEST) is None
    one.close(outcome)
    assert failures(stage) == 1
    one = stage.sent()
    assert one.answered(ABOUT_THE_REQUEST) is None
    one.close("ok")
    assert failures(stage) == 0


def test_each_attempt_counts_once_whatever_is_reported_of_it_afterwards(stage: Stage) -> None:
    one = stage.sent()
    one.answered(DOWN)
    one.broke_off(Reason.ATTEMPT_TIMEOUT)
    one.close("upstream_error")
    assert failures(stage) == 1


def test_a_failed_attempt_counts_against_its_own_instance(stage: Stage) -> None:
    stage.router.decision = decision(attempt("a"), attempt("b"))
    one = stage.sent()
    assert shown(one.answered(DOWN)) == "b"
    one.sent()
    assert one.answered(ABOUT_THE_REQUEST) is None
    one.close("ok")
    assert (failures(stage, "a"), failures(stage, "b")) == (1, 0)


async def test_a_refused_connection_of_the_last_attempt_counts_before_the_closer_look(stage: Stage) -> None:
    one = stage.request()
    one.enter(FACTS)
    assert one.failed(Reason.UPSTREAM_UNREACHABLE, "refused", sent=False) is WAIT
    assert failures(stage) == 1
    assert trouble(await one.wait()).reason is Reason.UPSTREAM_UNREACHABLE
    one.close("upstream_error")
    assert failures(stage) == 1


@pytest.mark.parametrize(
    "failure",
    [
        {"reason": Reason.OVERLOADED, "sent": False, "ours": True},
        {"reason": Reason.UPSTREAM_UNREACHABLE, "sent": False, "ours": True},
        {"reason": Reason.CANCELLED, "sent": True},
        {"reason": Reason.MODEL_MISSING, "sent": True},
    ],
)
def test_what_is_no_fault_of_the_server_gives_the_permit_back(stage: Stage, failure: dict[str, Any]) -> None:
    one = stage.sent()
    one.failed(**{"message": "", **failure})
    one.close("refused")
    assert failures(stage) == 0


def test_a_server_that_the_operator_stops_is_not_at_fault(stage: Stage) -> None:
    one = stage.sent()
    stage.placement.books["a"].cut("a was stopped")
    one.delivered()
    one.failed(Reason.UPSTREAM_ERROR, "broke off", sent=True)
    one.close("cut")
    other = stage.sent()
    stage.placement.books["a"].cut("a was stopped")
    other.broke_off(Reason.UPSTREAM_ERROR)
    other.close("cut")
    assert failures(stage) == 0


@pytest.mark.parametrize(("because", "counted"), [("loaded", 1), ("running", 0)])
def test_a_load_that_fails_counts_where_the_model_was_loaded(because: Any, counted: int) -> None:
    stage = Stage(attempt("a", because), breaker=LIMITS)
    one = stage.sent()
    one.answered(Judgement(Reason.MODEL_LOAD_FAILED))
    one.close("upstream_error")
    assert failures(stage) == counted


def test_the_total_deadline_counts_while_the_first_byte_is_waited_for(stage: Stage) -> None:
    for waits in (True, False):
        one = stage.sent()
        if not waits:
            one.answered(ABOUT_THE_REQUEST)
        assert trouble(one.look(one.total_deadline)).reason is Reason.ATTEMPT_TIMEOUT
        one.close("timeout")
    assert failures(stage) == 1


@pytest.mark.parametrize("because", ["loaded", "startable"])
async def test_a_breaker_that_opens_after_the_decision_is_found_with_the_lease(because: Any) -> None:
    stage = Stage(attempt("a", because), attempt("b"), breaker=LIMITS)
    stage.placement.prepares["a"] = None
    shut(stage)
    one = stage.request()
    step: Step | None = one.enter(FACTS)
    while step is WAIT:
        step = await one.wait()
    assert isinstance(step, Target)
    assert step.instance == "b"
    assert stage.placement.held == {"b": 1}
    assert one.record.failed_attempts == (("a", Reason.BREAKER_OPEN),)
    one.sent()
    one.answered(ABOUT_THE_REQUEST)
    one.close("ok")
    assert (one.record.fallback_reason, stage.blamed()) == (Reason.BREAKER_OPEN, {})


def test_where_no_other_follows_the_client_is_told_when_to_try_again(stage: Stage) -> None:
    shut(stage)
    one = stage.request()
    found = trouble(one.enter(FACTS))
    assert (found.reason, found.refused, found.retry_after_s) == (Reason.BREAKER_OPEN, "unavailable", 30)
    assert found.message.startswith("a: breaker open after 2 failures in a row, the last one upstream_error")
    assert stage.placement.held == {}
    one.close("refused")


def test_a_decision_in_which_all_are_shut_tells_the_earliest_retry(stage: Stage) -> None:
    shut(stage, "b")
    stage.clock.advance(10)
    shut(stage, "a")
    passed = tuple(PassedOver(name, "tiny", Reason.BREAKER_OPEN, "shut") for name in "ab")
    refused = Refused("unavailable", Reason.BREAKER_OPEN, "a cannot be used now")
    stage.router.decision = decision(refused=refused, passed_over=passed)
    assert trouble(stage.request().enter(FACTS)).retry_after_s == 20


def test_a_half_open_breaker_lets_one_request_pass_until_it_has_ended(stage: Stage) -> None:
    shut(stage)
    stage.clock.advance(30)
    probe = stage.sent()
    assert trouble(stage.request().enter(FACTS)).retry_after_s == 1
    probe.close("client_gone")
    second = stage.sent()
    second.answered(ABOUT_THE_REQUEST)
    assert state(stage) is BreakerState.HALF_OPEN, "it is judged by the end of the answer"
    second.close("ok")
    assert state(stage) is BreakerState.CLOSED


def test_what_manages_models_and_an_unload_ask_for_no_permit(stage: Stage) -> None:
    shut(stage)
    managing: Attempting = stage.request(kind=None)
    assert shown(managing.enter(FACTS)) == "a"
    managing.close("ok")
    stage.router.running = {"a"}
    unloading = stage.request()
    assert shown(unloading.enter_running(FACTS)) == "a"
    unloading.close("ok")
    assert state(stage) is BreakerState.OPEN


def test_a_request_that_a_breaker_shuts_out_gives_its_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(attempt("a"), attempt("b"), breaker=LIMITS)
    stage.use_clock(monkeypatch)
    stage.slots_of = {"a": 1, "b": 1}
    stage.slots.refresh()
    shut(stage)
    one = stage.request()
    assert shown(one.enter(FACTS)) == "b"
    assert {row.id: row.in_use for row in stage.slots.instances()} == {"a": 0, "b": 1}
    one.close("client_gone")
    assert {row.id: row.in_use for row in stage.slots.instances()} == {"a": 0, "b": 0}


# --- overload ---


def test_a_server_that_refuses_a_request_is_overloaded_for_as_long_as_it_says(stage: Stage) -> None:
    one = stage.sent()
    one.answered(Judgement(Reason.OVERLOADED), retry_after_s=7)
    one.close("upstream_error")
    stage.clock.advance(6.9)
    assert stage.overload.of("a") is not None
    stage.clock.advance(0.2)
    assert stage.overload.of("a") is None
    managing = stage.request(kind=None)
    managing.enter(FACTS)
    managing.sent()
    managing.answered(Judgement(Reason.OVERLOADED))
    managing.close("upstream_error")
    assert stage.overload.of("a") is None


def answers(stage: Stage, first_token_ms: float, outcome: Outcome = "ok", **record: Any) -> None:
    """One request, which waits a second before it is sent."""
    one = stage.request(**{"stream": True, **record})
    one.enter(FACTS)
    stage.clock.advance(1.0)
    one.sent()
    stage.clock.advance(first_token_ms / 1000)
    one.answered(ABOUT_THE_REQUEST)
    one.record.ttfb_ms = 1000 + first_token_ms
    one.close(outcome)


def known(stage: Stage) -> dict[tuple[str, str], float]:
    return {place: round(one.usual_ms, 3) for place, one in stage.overload._latencies.items()}


def test_the_first_token_is_timed_from_the_sending(stage: Stage) -> None:
    answers(stage, 250)
    assert known(stage) == {("a", "tiny:latest"): 250.0}


def test_the_speed_is_counted_from_the_first_token_to_the_end(stage: Stage) -> None:
    one = stage.request(stream=True)
    one.enter(FACTS)
    one.sent()
    stage.clock.advance(0.25)
    one.answered(ABOUT_THE_REQUEST)
    one.record.ttfb_ms = 250.0
    one.record.output_tokens = 101
    stage.clock.advance(2.0)
    one.close("ok")
    assert stage.overload.tokens_per_s("a", "tiny:latest") == 50.0
    answers(stage, 250)
    assert stage.overload.tokens_per_s("a", "tiny:latest") == 50.0, "nothing was counted"


@pytest.mark.parametrize(
    "record", [{"stream": False}, {"kind": RequestKind.EMBED}, {"outcome": "client_gone"}, {"kind": None}]
)
def test_only_streams_that_ended_well_are_timed(stage: Stage, record: dict[str, Any]) -> None:
    answers(stage, 250, **record)
    assert known(stage) == {}


@pytest.mark.parametrize("because", ["running", "unread", "startable", "pull"])
async def test_the_time_of_a_load_or_a_start_is_not_counted(because: Any) -> None:
    stage = Stage(attempt("a", because), breaker=LIMITS)
    one = stage.request(stream=True)
    step: Step | None = one.enter(FACTS)
    while step is WAIT:
        step = await one.wait()
    one.sent()
    one.answered(ABOUT_THE_REQUEST)
    one.record.ttfb_ms = 9000.0
    one.close("ok")
    assert known(stage) == {}
    stage.router.decision = decision(attempt("a", "loaded"))
    stage.placement.prepares["a"] = 5.0
    one = stage.request(stream=True)
    assert one.enter(FACTS) is WAIT
    await one.wait()
    one.sent()
    one.answered(ABOUT_THE_REQUEST)
    one.record.ttfb_ms = 9000.0
    one.close("ok")
    assert known(stage) == {}, "it was started for the request"
