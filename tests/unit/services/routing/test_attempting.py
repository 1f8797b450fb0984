"""What follows a failure, and that every request gives back what it has and ends once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, get_args

import pytest

from manager.domain.judgement import ABOUT_THE_REQUEST, Judgement
from manager.domain.record import FailedAttempt, Outcome
from manager.domain.roles import BodyChanges, Policy
from manager.domain.routing import PassedOver, Refused
from manager.domain.target import Target
from manager.errors import ConflictError, LimitReachedError, ManagerError, Reason
from manager.services.routing.attempting import WAIT, FixedAttempts, Trouble, Wait, first_target
from tests.support.attempts import FACTS, NOBODY, Stage, attempt, decision, shown, target, unavailable

if TYPE_CHECKING:
    from manager.domain.routing import Because
    from manager.services.routing.attempting import Attempting, Step

OVERLOADED = Judgement(Reason.OVERLOADED)
MISSING = Judgement(Reason.MODEL_MISSING)
UNKNOWN = Judgement(Reason.UPSTREAM_ERROR, may_start=False)
DIED: dict[str, Any] = {"reason": Reason.UPSTREAM_ERROR, "message": "a: the connection broke", "sent": True}
REFUSED: dict[str, Any] = {
    "reason": Reason.UPSTREAM_UNREACHABLE,
    "message": "a cannot be reached",
    "sent": False,
}
STALE: dict[str, Any] = {**REFUSED, "stale": True}
FIRST_BYTE_S, TOTAL_S = 60.0, 600.0


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return on_stage(monkeypatch, attempt("a"), attempt("b"))


def on_stage(monkeypatch: pytest.MonkeyPatch, *attempts: Any) -> Stage:
    made = Stage(*attempts)
    made.use_clock(monkeypatch)
    return made


def trouble(step: Step | None) -> Trouble:
    assert isinstance(step, Trouble), step
    return step


async def waited(one: Attempting, step: Step | None) -> Step | None:
    assert step is WAIT, step
    return await one.wait()


# --- the way to a target ---


def test_an_instance_that_runs_is_a_target_without_waiting(stage: Stage) -> None:
    one = stage.request()
    assert shown(one.enter(FACTS)) == "a"
    record = one.record
    assert (record.attempts, record.effective_target, record.endpoint) == (1, "a", "http://a:11434")
    assert (record.policy, record.role, record.fallback, one.is_waiting) == ("auto", None, False, False)
    assert stage.placement.held == {"a": 1}
    one.close("ok")
    assert stage.placement.held == {}


def test_the_record_says_which_role_and_target_were_asked_for(stage: Stage) -> None:
    stage.router.decision = decision(
        attempt("a", role="thinking"), role="thinking", policy=Policy.PREFER_GPU, requested_target="gpu0"
    )
    record = (one := stage.request()).record
    one.enter(FACTS)
    assert (record.role, record.policy, record.requested_target) == ("thinking", "prefer_gpu", "gpu0")


def test_the_body_is_changed_as_model_and_role_of_the_current_attempt_say(stage: Stage) -> None:
    stage.router.decision = decision(attempt("a", role="r"), attempt("b", model="other", role="s"))
    changes = stage.router.changes = {("tiny", "r"): BodyChanges(think=False), ("other", "s"): BodyChanges()}
    one = stage.sent()
    assert one.changes is changes["tiny", "r"]
    one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True)
    assert one.changes is changes["other", "s"]


async def test_a_start_is_waited_for_and_its_time_is_not_counted_as_waiting_in_a_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a", "startable"))
    stage.placement.prepares["a"] = 2000.0
    one = stage.request()
    assert one.enter(FACTS) is WAIT
    assert stage.placement.held == {}
    stage.clock.advance(2.5)
    assert shown(await one.wait()) == "a"
    assert await one.wait() is None, "it is waited for once"
    assert stage.placement.held == {"a": 1}
    one.sent()
    assert one.record.start_ms == 2000.0
    assert one.record.queue_ms == pytest.approx(500.0)
    (said,) = stage.placement.prepared
    assert (said["patient"], said["failed_on"], said["puller"]) == (True, frozenset(), stage.routing.puller)


async def test_the_last_attempt_is_patient_and_spares_what_the_request_has_failed_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a"), attempt("b", "startable"), attempt("c", "startable"))
    stage.placement.prepares["b"] = unavailable(instance="b")
    one = stage.sent()
    step = await first_target(one, one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True))
    assert shown(step) == "c"
    assert [(said["patient"], said["failed_on"]) for said in stage.placement.prepared] == [
        (False, {"a"}),
        (True, {"a", "b"}),
    ]


async def test_progress_of_a_pull_is_heard_until_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = on_stage(monkeypatch, attempt("a", "pull"), attempt("b"))
    stage.placement.progress = ("pulling 5 %", "pulling 10 %")
    stage.placement.prepares["a"] = asyncio.get_running_loop().create_future()
    one = stage.request()
    waiting = asyncio.ensure_future(waited(one, one.enter(FACTS)))
    await asyncio.sleep(0)
    assert one.heard == "pulling 10 %"
    stage.placement.prepares["a"].set_result(unavailable(Reason.MODEL_MISSING))
    assert shown(await waiting) == "b"
    assert one.heard == ""


@pytest.mark.parametrize(
    ("because", "told"), [("pull", Reason.MODEL_MISSING), ("startable", Reason.OVERLOADED)]
)
async def test_what_keeps_an_instance_from_pulling_does_not_hide_that_nobody_has_the_model(
    monkeypatch: pytest.MonkeyPatch, because: Because, told: Reason
) -> None:
    stage = on_stage(monkeypatch, attempt("a", "pull"), attempt("b", because))
    stage.placement.prepares |= {
        "a": unavailable(Reason.MODEL_MISSING),
        "b": unavailable(Reason.OVERLOADED),
    }
    one = stage.request()
    step = await first_target(one, one.enter(FACTS))
    assert isinstance(step, Trouble)
    assert step.reason is told


async def test_starts_of_several_attempts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = on_stage(monkeypatch, attempt("a", "startable"), attempt("b", "startable"))
    stage.placement.prepares |= {"a": 1000.0, "b": 500.0}
    one = stage.request()
    assert shown(await waited(one, one.enter(FACTS))) == "a"
    one.sent()
    assert shown(await waited(one, one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True))) == "b"
    assert one.start_ms == 1500.0


@pytest.mark.parametrize("what", ["unknown", "impossible", "unavailable", "contradiction"])
def test_a_decision_without_attempts_is_reported_with_what_is_wrong(stage: Stage, what: Any) -> None:
    stage.router.decision = decision(refused=Refused(what, Reason.POLICY, "no"))
    one = stage.request()
    found = trouble(one.enter(FACTS))
    assert (found.refused, found.reason, found.message, found.attempt) == (what, Reason.POLICY, "no", None)
    assert (one.record.attempts, one.record.fallback_reason) == (0, Reason.POLICY)


# --- after the start of the daemon (P16) ---


@pytest.mark.parametrize("what", ["unknown", "unavailable"])
async def test_a_daemon_that_knows_nothing_yet_looks_first_and_decides_then(stage: Stage, what: Any) -> None:
    def learns() -> None:
        stage.router.is_known = True
        stage.router.decision = found

    found = decision(attempt("a", role="r"), role="r", requested_target="a")
    stage.router.is_known = False
    stage.router.decision = decision(refused=Refused(what, Reason.ENGINE_UNAVAILABLE, "not yet"))
    stage.router.learns = learns
    one = stage.request()
    assert shown(await waited(one, one.enter(FACTS))) == "a"
    assert stage.router.waits == [15.0]
    assert (one.record.role, one.record.requested_target, one.record.attempts) == ("r", "a", 1)
    assert one.record.fallback_reason is None


async def test_what_is_still_refused_after_the_first_look_is_recorded_as_it_is_then(stage: Stage) -> None:
    def learns() -> None:
        no = Refused("contradiction", Reason.POLICY, "the role embeds")
        stage.router.decision = decision(refused=no, role="embedding", policy=Policy.CPU_ONLY)

    stage.router.is_known = False
    stage.router.decision = decision(refused=NOBODY)
    stage.router.learns = learns
    one = stage.request()
    found = trouble(await waited(one, one.enter(FACTS)))
    assert (found.refused, found.message) == ("contradiction", "the role embeds")
    assert (one.record.role, one.record.policy) == ("embedding", "cpu_only")
    assert one.record.fallback_reason is Reason.POLICY


async def test_a_daemon_that_learns_nothing_in_time_says_what_it_knows(stage: Stage) -> None:
    stage.router.is_known = False
    stage.router.decision = decision(refused=NOBODY)
    one = stage.request()
    stage.clock.advance(TOTAL_S - 4)
    assert trouble(await waited(one, one.enter(FACTS))).refused == "unavailable"
    assert stage.router.waits == [4.0], "no longer than the request may take"
    late = stage.request()
    step = late.enter(FACTS)
    stage.clock.advance(TOTAL_S + 1)
    assert trouble(await waited(late, step)).refused == "unavailable"
    assert stage.router.waits == [4.0, 0.0]


@pytest.mark.parametrize("what", ["impossible", "contradiction"])
def test_what_no_fleet_could_serve_does_not_wait_for_one(stage: Stage, what: Any) -> None:
    stage.router.is_known = False
    stage.router.decision = decision(refused=Refused(what, Reason.MODEL_MISSING, "no such name"))
    assert trouble(stage.request().enter(FACTS)).refused == what


def test_an_attempt_that_there_is_does_not_wait_for_the_rest_of_the_fleet(stage: Stage) -> None:
    stage.router.is_known = False
    assert shown(stage.request().enter(FACTS)) == "a"


# --- a server that cannot have begun ---


def test_an_instance_that_cannot_be_reached_is_left_for_the_next(stage: Stage) -> None:
    one = stage.request()
    one.enter(FACTS)
    assert shown(one.failed(**REFUSED)) == "b"
    assert stage.placement.held == {"b": 1}
    assert stage.placement.looked_for == [], "the next one is at hand: nobody waits for a start"
    record = one.record
    assert (record.attempts, record.effective_target) == (2, "b")
    assert record.failed_attempts == (FailedAttempt("a", Reason.UPSTREAM_UNREACHABLE),)
    assert (record.fallback, record.fallback_reason) == (True, Reason.UPSTREAM_UNREACHABLE)
    assert record.fallback_from == "a"
    assert stage.blamed() == {("a", "upstream_unreachable"): 1}


def test_a_request_that_met_a_closed_connection_is_sent_once_more_to_the_same_target(stage: Stage) -> None:
    one = stage.sent()
    again = one.failed(**STALE)
    assert again is one.target
    assert (shown(again), one.record.attempts, one.is_waiting) == ("a", 2, False)
    assert (one.record.failed_attempts, one.record.fallback, stage.blamed()) == ((), False, {})
    assert stage.placement.granted == ["a"], "on the lease that it has"
    one.sent()
    assert shown(one.failed(**STALE)) == "b", "not a third time"
    assert one.record.attempts == 3


def test_each_target_may_have_closed_a_connection_that_was_kept(stage: Stage) -> None:
    one = stage.sent()
    for expected in ("a", "b", "b"):
        assert shown(one.failed(**STALE)) == expected
        one.sent()
    assert one.record.attempts == 4


async def test_the_last_instance_is_started_again_where_it_has_just_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a"))
    stage.placement.gone.add("a")
    one = stage.request()
    one.enter(FACTS)
    step = one.failed(**REFUSED)
    assert stage.placement.held == {}, "a lease would keep the dead instance from being started again"
    stage.placement.prepares["a"] = 700.0
    assert shown(await waited(one, step)) == "a"
    assert (one.record.attempts, one.record.start_ms, one.start_ms) == (2, None, 700.0)
    assert (one.record.fallback, stage.blamed()) == (False, {})
    assert stage.placement.held == {"a": 1}
    found = trouble(one.failed(**REFUSED))
    assert (found.reason, stage.placement.looked_for) == (Reason.UPSTREAM_UNREACHABLE, ["a"]), "only once"


async def test_an_instance_that_is_there_but_cannot_be_reached_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a"))
    one = stage.request()
    one.enter(FACTS)
    found = trouble(await waited(one, one.failed(**REFUSED, retry_after_s=None)))
    assert (found.reason, found.message) == (Reason.UPSTREAM_UNREACHABLE, "a cannot be reached")
    assert (one.record.attempts, stage.placement.prepared) == (1, [])
    assert stage.blamed() == {("a", "upstream_unreachable"): 1}


async def test_an_instance_that_cannot_be_started_again_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = on_stage(monkeypatch, attempt("a"))
    stage.placement.gone.add("a")
    one = stage.request()
    one.enter(FACTS)
    step = one.failed(**REFUSED)
    stage.placement.prepares["a"] = unavailable(Reason.START_FAILED, retry_after_s=7.0)
    found = trouble(await waited(one, step))
    assert (found.reason, found.retry_after_s) == (Reason.START_FAILED, 7.0)
    assert (stage.placement.held, one.record.attempts, one.target) == ({}, 2, None)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (unavailable(Reason.VRAM_INSUFFICIENT), Reason.VRAM_INSUFFICIENT),
        (LimitReachedError("max_running is 2"), Reason.OVERLOADED),
        (ConflictError("held elsewhere"), Reason.INSTANCE_UNAVAILABLE),
    ],
)
async def test_an_instance_that_cannot_be_prepared_is_followed_by_the_next(
    monkeypatch: pytest.MonkeyPatch, error: ManagerError, reason: Reason
) -> None:
    stage = on_stage(monkeypatch, attempt("a", "startable"), attempt("b"))
    stage.placement.prepares["a"] = error
    one = stage.request()
    assert shown(await waited(one, one.enter(FACTS))) == "b"
    assert one.record.failed_attempts == (("a", reason),)
    assert stage.placement.looked_for == [], "it was started a moment ago: nobody looks again"
    assert stage.placement.held == {"b": 1}


def test_a_model_is_not_to_blame_for_a_server_that_was_never_asked(stage: Stage) -> None:
    one = stage.request()
    one.enter(FACTS)
    one.failed(Reason.ATTEMPT_TIMEOUT, "a could not be connected to", sent=False)
    assert stage.status.idle_status("tiny:latest") == "not_loaded"
    one.sent()
    one.failed(Reason.ATTEMPT_TIMEOUT, "b did not answer", sent=True)
    assert stage.status.idle_status("tiny:latest") == "error"


def test_an_instance_that_is_being_prepared_has_no_endpoint_yet(stage: Stage) -> None:
    stage.router.decision = decision(attempt("a"), attempt("b", "startable"))
    one = stage.sent()
    assert one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True) is WAIT
    record = one.record
    assert (record.effective_target, record.endpoint, one.target) == ("b", None, None)


async def test_where_no_instance_can_be_prepared_the_first_trouble_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a", "startable"), attempt("b", "startable"))
    stage.placement.prepares["a"] = unavailable(Reason.GPU_MISSING)
    stage.placement.prepares["b"] = unavailable(Reason.START_FAILED, instance="b")
    one = stage.request()
    found = await first_target(one, one.enter(FACTS))
    assert trouble(found).reason is Reason.GPU_MISSING
    record = one.record
    assert (record.effective_target, record.fallback, record.fallback_from) == ("a", False, None)
    assert (record.fallback_reason, record.attempts) == (Reason.GPU_MISSING, 2)


# --- a server that may have begun ---


def test_a_request_that_killed_its_server_takes_no_other_one_down(stage: Stage) -> None:
    one = stage.sent()
    found = trouble(one.failed(**DIED))
    assert (found.reason, found.message) == (Reason.UPSTREAM_ERROR, "a: the connection broke")
    assert stage.placement.granted == ["a"]
    assert (stage.placement.held, stage.placement.looked_for) == ({}, [])
    assert (one.record.attempts, one.record.effective_target, one.record.fallback) == (1, "a", False)
    assert stage.blamed() == {("a", "upstream_error"): 1}
    assert stage.status.idle_status("tiny:latest") == "error"


@pytest.mark.parametrize("reason", [Reason.ATTEMPT_TIMEOUT, Reason.INSTANCE_UNHEALTHY])
def test_a_server_that_was_abandoned_is_followed_by_the_next(stage: Stage, reason: Reason) -> None:
    one = stage.sent()
    assert shown(one.failed(reason, "it is slow", sent=True)) == "b"
    assert stage.placement.released == ["a"]
    assert (one.record.fallback_reason, one.record.fallback_from) == (reason, "a")


@pytest.mark.parametrize("reason", [*Reason])
def test_of_all_failures_only_time_silence_and_a_stop_let_another_server_have_a_request(
    stage: Stage, reason: Reason
) -> None:
    one = stage.sent()
    follows = shown(one.failed(reason, "", sent=True))
    assert (follows == "b") is (
        reason in (Reason.ATTEMPT_TIMEOUT, Reason.INSTANCE_UNHEALTHY, Reason.CANCELLED)
    )


def test_what_kills_the_second_server_is_told_as_the_trouble_with_the_first(stage: Stage) -> None:
    stage.router.decision = decision(attempt("a"), attempt("b"), attempt("c"))
    one = stage.sent()
    one.failed(Reason.ATTEMPT_TIMEOUT, "a did not answer", sent=True)
    one.sent()
    found = trouble(one.failed(Reason.UPSTREAM_ERROR, "b: the connection broke", sent=True))
    assert (found.message, stage.placement.granted) == ("a did not answer", ["a", "b"])
    assert one.record.failed_attempts == (("a", Reason.ATTEMPT_TIMEOUT), ("b", Reason.UPSTREAM_ERROR))
    assert one.record.effective_target == "a"


@pytest.mark.parametrize("sent", [False, True])
def test_a_lack_of_our_own_is_no_fault_of_an_instance_and_no_reason_for_another(
    stage: Stage, *, sent: bool
) -> None:
    one = stage.request()
    one.enter(FACTS)
    found = trouble(one.failed(Reason.OVERLOADED, "no descriptors", sent=sent, ours=True, retry_after_s=1.0))
    assert (found.reason, found.retry_after_s) == (Reason.OVERLOADED, 1.0)
    assert (stage.blamed(), stage.placement.held, stage.placement.granted) == ({}, {}, ["a"])
    assert stage.placement.looked_for == [], "nor is it looked for"
    assert stage.status.idle_status("tiny:latest") == "not_loaded"


def test_a_body_that_is_spent_is_sent_nowhere_else(stage: Stage) -> None:
    for failure in ({**REFUSED}, {**STALE}, {**DIED, "reason": Reason.ATTEMPT_TIMEOUT}):
        one = stage.sent()
        one.spend()
        assert not one.might_follow(OVERLOADED)
        assert trouble(one.failed(**failure)).reason is failure["reason"]
        one.close("upstream_error")
    assert set(stage.placement.granted) == {"a"}
    assert stage.placement.looked_for == []


# --- targets that are not repeatable ---


@pytest.fixture
def once(stage: Stage) -> Stage:
    stage.placement.targets["a"] = target("a", repeatable=False)
    return stage


@pytest.mark.parametrize(
    "failure",
    [DIED, STALE, {**DIED, "reason": Reason.ATTEMPT_TIMEOUT}, {**DIED, "reason": Reason.INSTANCE_UNHEALTHY}],
)
def test_a_request_to_a_target_that_is_not_repeatable_is_sent_once_whatever_becomes_of_it(
    once: Stage, failure: Any
) -> None:
    once.placement.gone.add("a")
    one = once.sent()
    assert trouble(one.failed(**failure)).reason is failure["reason"]
    assert once.placement.granted == ["a"]
    assert (once.placement.held, one.record.attempts) == ({}, 1)


async def test_a_target_that_is_not_repeatable_and_was_never_sent_anything_may_be_followed(
    once: Stage,
) -> None:
    one = once.request()
    one.enter(FACTS)
    assert shown(await waited(one, one.failed(**REFUSED))) == "b"
    assert once.placement.held == {"b": 1}


def test_an_error_of_a_target_that_is_not_repeatable_is_the_clients(once: Stage) -> None:
    one = once.sent()
    assert not one.might_follow(OVERLOADED)
    assert one.answered(OVERLOADED, "busy", "its answer") is None
    one.close("upstream_error")
    assert once.placement.granted == ["a"]


def test_silence_of_a_target_that_is_not_repeatable_changes_nothing(once: Stage) -> None:
    one = once.sent()
    once.placement.silent.add("a")
    assert one.look(once.clock()) is None


# --- answers with an error ---


@pytest.mark.parametrize("judgement", [OVERLOADED, MISSING, UNKNOWN, Judgement(Reason.MODEL_LOAD_FAILED)])
def test_a_server_that_answers_with_an_error_is_followed_by_the_next(
    stage: Stage, judgement: Judgement
) -> None:
    one = stage.sent()
    assert one.might_follow(judgement)
    assert shown(one.answered(judgement, "no", "its answer")) == "b"
    assert (stage.placement.released, one.is_waiting) == (["a"], False)
    assert one.record.failed_attempts == (("a", judgement.reason),)
    assert (one.record.fallback, one.record.fallback_reason) == (True, judgement.reason)
    one.sent()
    assert one.answered(ABOUT_THE_REQUEST) is None
    one.close("ok")
    assert stage.ended[0].outcome == "ok"
    assert stage.ended[0].effective_target == "b"


def test_an_error_about_the_request_goes_to_the_client_and_starts_nobody(stage: Stage) -> None:
    """R12: every server would answer the same."""
    one = stage.sent()
    assert not one.might_follow(ABOUT_THE_REQUEST)
    assert one.answered(ABOUT_THE_REQUEST, "option must be of type integer", "its answer") is None
    assert (stage.placement.granted, stage.blamed(), one.record.failed_attempts) == (["a"], {}, ())
    assert stage.status.idle_status("tiny:latest") == "not_loaded"


def test_an_unknown_error_uses_instances_that_run_and_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = on_stage(
        monkeypatch, attempt("a"), attempt("b", "startable"), attempt("c", "running"), attempt("d", "unread")
    )
    one = stage.sent()
    assert one.might_follow(UNKNOWN)
    assert shown(one.answered(UNKNOWN, "something", "the answer of a")) == "c"
    one.sent()
    assert one.answered(UNKNOWN, "something", "the answer of c") is None
    assert stage.placement.granted == ["a", "c"]


def test_an_unknown_error_where_all_others_are_stopped_is_the_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a"), attempt("b", "startable"))
    one = stage.sent()
    assert one.might_follow(UNKNOWN), "its words are not known yet"
    assert one.answered(UNKNOWN, "something", "the answer of a") is None
    assert stage.placement.held == {"a": 1}, "it is being answered by it"
    assert one.record.failed_attempts == ()


def test_a_change_of_the_settings_does_not_take_back_that_nobody_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a"), attempt("b", "running"))
    one = stage.sent()
    stage.router.version += 1
    stage.router.decision = decision(attempt("c", "startable"), attempt("d", "running"))
    assert shown(one.answered(UNKNOWN, "something", "the answer of a")) == "d"


def test_a_model_that_is_missing_after_all_has_the_list_read_again(stage: Stage) -> None:
    one = stage.sent()
    one.answered(MISSING, "not found")
    assert stage.placement.reread == ["a"]


@pytest.mark.parametrize("ends", ["it died", "it ran out of time"])
def test_when_no_later_attempt_answers_the_client_gets_the_first_servers_own_answer(
    stage: Stage, ends: str
) -> None:
    stage.router.decision = decision(attempt("a"), attempt("b", model="other"))
    one = stage.sent()
    one.answered(OVERLOADED, "busy", "the answer of a")
    assert one.record.model == "other"
    one.sent()
    reason = Reason.UPSTREAM_ERROR if ends == "it died" else Reason.ATTEMPT_TIMEOUT
    found = trouble(one.failed(reason, "b failed", sent=True))
    assert (found.answer, found.message, found.reason) == ("the answer of a", "busy", Reason.OVERLOADED)
    record = one.record
    assert (record.effective_target, record.endpoint, record.attempts) == ("a", "http://a:11434", 2)
    assert record.model == "tiny"
    assert one.attempt == attempt("a"), "that is where the client is told that it comes from"
    assert (record.fallback, record.fallback_from, record.fallback_reason) == (
        False,
        None,
        Reason.OVERLOADED,
    )
    one.close("upstream_error")
    assert stage.placement.held == {}


async def test_the_first_servers_own_answer_outweighs_an_instance_that_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """R12: the second instance on the volume lacks its image."""
    stage = on_stage(monkeypatch, attempt("a"), attempt("b", "startable"))
    stage.placement.prepares["b"] = unavailable(Reason.IMAGE_MISSING, "b")
    one = stage.sent()
    found = await first_target(one, one.answered(OVERLOADED, "busy", "the answer of a") or WAIT)
    assert trouble(found).answer == "the answer of a"


def test_a_model_missing_here_says_less_than_what_failed_there(stage: Stage) -> None:
    one = stage.sent()
    one.answered(MISSING, "not found", "404 of a")
    one.sent()
    found = trouble(one.failed(Reason.UPSTREAM_ERROR, "b died", sent=True))
    assert (found.message, found.answer) == ("b died", None)
    assert one.record.effective_target == "b"


def test_a_model_missing_in_the_end_does_not_hide_what_failed_before(stage: Stage) -> None:
    one = stage.sent()
    one.answered(Judgement(Reason.MODEL_LOAD_FAILED), "out of memory", "500 of a")
    one.sent()
    assert one.might_follow(MISSING)
    found = trouble(one.answered(MISSING, "not found", "404 of b"))
    assert (found.answer, found.reason) == ("500 of a", Reason.MODEL_LOAD_FAILED)
    assert one.record.failed_attempts == (("a", Reason.MODEL_LOAD_FAILED), ("b", Reason.MODEL_MISSING))
    assert stage.placement.held == {}


def test_an_answer_that_the_client_is_to_get_whatever_it_says_stays_its_own(stage: Stage) -> None:
    one = stage.sent()
    one.answered(OVERLOADED, "busy", "503 of a")
    one.sent()
    one.spend()
    assert one.answered(MISSING) is None
    assert stage.placement.held == {"b": 1}


def test_a_model_that_all_servers_lack_is_told_in_the_words_of_the_last(stage: Stage) -> None:
    one = stage.sent()
    one.answered(MISSING, "not found", "404 of a")
    one.sent()
    assert trouble(one.answered(MISSING, "not found", "404 of b")).answer == "404 of b"


def test_the_error_of_the_last_server_is_passed_on_as_it_comes(stage: Stage) -> None:
    one = stage.sent()
    one.answered(OVERLOADED, "busy", "503 of a")
    one.sent()
    assert not one.might_follow(OVERLOADED)
    assert one.answered(OVERLOADED) is None
    assert stage.placement.held == {"b": 1}
    assert stage.blamed() == {("a", "overloaded"): 1, ("b", "overloaded"): 1}


# --- after the first byte ---


def test_nothing_follows_once_the_client_has_a_byte(stage: Stage) -> None:
    for failure in (DIED, REFUSED, STALE, {**DIED, "reason": Reason.ATTEMPT_TIMEOUT}):
        one = stage.sent()
        assert not one.is_delivered
        one.delivered()
        assert one.is_delivered
        assert not one.might_follow(OVERLOADED)
        assert trouble(one.failed(**failure, retry_after_s=3.0)).retry_after_s == 3.0
        assert one.record.failed_attempts == (("a", failure["reason"]),)
        one.close("upstream_error")
    assert set(stage.placement.granted) == {"a"}
    assert stage.placement.looked_for == []


def test_an_error_after_the_first_byte_is_the_clients(stage: Stage) -> None:
    one = stage.sent()
    one.delivered()
    assert one.answered(OVERLOADED, "busy", "its answer") is None
    assert stage.blamed() == {("a", "overloaded"): 1}


async def test_nothing_follows_a_start_that_failed_after_a_sign_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a", "startable"), attempt("b"))
    stage.placement.prepares["a"] = unavailable(Reason.START_TIMEOUT)
    one = stage.request()
    step = one.enter(FACTS)
    one.delivered()
    assert trouble(await waited(one, step)).reason is Reason.START_TIMEOUT
    assert stage.placement.held == {}


# --- deadlines ---


def test_nothing_is_looked_at_before_a_request_was_sent(stage: Stage) -> None:
    one = stage.request()
    assert one.look(stage.clock()) is None
    one.enter(FACTS)
    stage.placement.silent.add("a")
    stage.clock.advance(FIRST_BYTE_S * 2)
    assert one.look(stage.clock()) is None


async def test_each_attempt_has_its_time_for_the_first_byte(stage: Stage) -> None:
    one = stage.sent()
    assert one.look(stage.clock.advance(FIRST_BYTE_S - 0.1)) is None
    step = one.look(stage.clock.advance(0.1))
    assert shown(await waited(one, step)) == "b"
    assert one.record.failed_attempts == (("a", Reason.ATTEMPT_TIMEOUT),)
    one.sent()
    assert one.look(stage.clock.advance(FIRST_BYTE_S - 0.1)) is None
    found = trouble(await waited(one, one.look(stage.clock.advance(0.1))))
    assert (found.reason, found.message) == (Reason.ATTEMPT_TIMEOUT, "a did not answer within 60 s")


async def test_a_load_that_goes_on_is_waited_for_a_while_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = on_stage(monkeypatch, attempt("a", "running"), attempt("b"))
    stage.placement.loading["a"] = True
    one = stage.sent()
    assert one.may_load
    assert await waited(one, one.look(stage.clock.advance(FIRST_BYTE_S))) is None
    assert one.look(stage.clock.advance(9.9)) is None
    assert await waited(one, one.look(stage.clock.advance(0.1))) is None
    stage.placement.loading["a"] = False
    assert shown(await waited(one, one.look(stage.clock.advance(10.0)))) == "b"


async def test_nobody_is_patient_with_a_server_that_has_the_model_in_memory(stage: Stage) -> None:
    stage.placement.loading["a"] = True
    one = stage.sent()
    assert not one.may_load
    assert shown(await waited(one, one.look(stage.clock.advance(FIRST_BYTE_S)))) == "b"


async def test_an_answer_during_the_look_at_a_load_ends_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = on_stage(monkeypatch, attempt("a", "running"), attempt("b"))
    looking = stage.placement.loading["a"] = asyncio.get_running_loop().create_future()
    one = stage.sent()
    step = one.look(stage.clock.advance(FIRST_BYTE_S))
    assert one.look(stage.clock()) is None, "one look at a time"
    waiting = asyncio.ensure_future(waited(one, step))
    await asyncio.sleep(0)
    assert one.answered(ABOUT_THE_REQUEST) is None
    looking.set_result(False)
    assert await waiting is None
    assert stage.placement.granted == ["a"]


async def test_an_answer_before_the_look_at_a_load_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = on_stage(monkeypatch, attempt("a", "running"), attempt("b"))
    one = stage.sent()
    assert one.look(stage.clock.advance(FIRST_BYTE_S)) is WAIT
    one.answered(ABOUT_THE_REQUEST)
    assert await one.wait() is None


def test_a_server_that_has_stopped_answering_is_left_for_another(stage: Stage) -> None:
    one = stage.sent()
    assert one.look(stage.clock.advance(1)) is None
    stage.placement.silent.add("a")
    assert shown(one.look(stage.clock())) == "b"
    assert one.record.failed_attempts == (("a", Reason.INSTANCE_UNHEALTHY),)


def test_a_silent_server_is_blamed_for_its_silence_where_nothing_is_started(stage: Stage) -> None:
    one = stage.request()
    none = Trouble(Reason.INSTANCE_UNAVAILABLE, "no instance may write")
    assert shown(one.enter_fixed([attempt("a"), attempt("b")], none, starts=False)) == "a"
    one.sent()
    stage.placement.silent.add("a")
    assert shown(one.look(stage.clock())) == "b"
    assert one.record.failed_attempts == (("a", Reason.INSTANCE_UNHEALTHY),)


def test_a_server_that_has_stopped_answering_is_kept_where_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a"))
    stage.placement.silent.add("a")
    assert stage.sent().look(stage.clock()) is None


def test_all_attempts_together_have_one_deadline(stage: Stage) -> None:
    one = stage.sent()
    stage.clock.advance(100)
    one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True)
    one.sent()
    assert one.total_deadline == 1000.0 + TOTAL_S
    stage.clock.now = one.total_deadline - 0.01
    assert one.look(stage.clock()) is WAIT, "that is the one for its first byte"
    found = trouble(one.look(one.total_deadline))
    assert (found.reason, found.message) == (Reason.ATTEMPT_TIMEOUT, "no end within 600 s")
    assert not one.is_waiting
    assert stage.blamed() == {("a", "attempt_timeout"): 1, ("b", "attempt_timeout"): 1}
    assert (one.record.fallback, one.record.fallback_from) == (False, None), "no fallback has answered"


def test_a_server_that_is_asked_at_the_total_deadline_is_to_blame(stage: Stage) -> None:
    one = stage.sent()
    trouble(one.look(one.total_deadline))
    assert one.record.failed_attempts == (("a", Reason.ATTEMPT_TIMEOUT),)
    assert stage.blamed() == {("a", "attempt_timeout"): 1}
    assert stage.status.idle_status("tiny:latest") == "error"


def test_a_fallback_that_has_begun_to_answer_stays_one_at_the_total_deadline(stage: Stage) -> None:
    one = stage.sent()
    one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True)
    one.sent()
    one.answered(ABOUT_THE_REQUEST)
    one.delivered()
    trouble(one.look(one.total_deadline))
    assert (one.record.fallback, one.record.fallback_from) == (True, "a")


def test_the_total_deadline_holds_in_every_state(stage: Stage) -> None:
    unsent, streaming = stage.request(), stage.sent()
    streaming.answered(ABOUT_THE_REQUEST)
    streaming.delivered()
    for one in (unsent, streaming):
        assert one.look(one.total_deadline - 0.01) is None
        assert trouble(one.look(one.total_deadline)).reason is Reason.ATTEMPT_TIMEOUT
        assert one.record.failed_attempts == (), "no server is waited for"
        one.close("timeout")
    assert stage.placement.held == {}


# --- fallbacks ---


def test_an_attempt_that_is_a_fallback_by_the_decision_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch)
    reason = Reason.GPU_MISSING
    stage.router.decision = decision(
        attempt("cpu", fallback=reason),
        policy=Policy.PREFER_GPU,
        passed_over=(PassedOver("gpu1", "tiny", Reason.POLICY), PassedOver("gpu0", "tiny", reason)),
    )
    record = (one := stage.request()).record
    one.enter(FACTS)
    assert (record.fallback, record.fallback_reason, record.fallback_from) == (True, reason, "gpu0")


@pytest.mark.parametrize(("wanted", "told"), [("gpu0", "gpu0"), (None, "prefer_gpu")])
def test_a_fallback_is_from_what_was_asked_for_or_else_from_the_policy(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, told: str
) -> None:
    stage = on_stage(monkeypatch)
    stage.router.decision = decision(
        attempt("cpu", fallback=Reason.GPU_MISSING), policy=Policy.PREFER_GPU, requested_target=wanted
    )
    record = (one := stage.request()).record
    one.enter(FACTS)
    assert record.fallback_from == told


def test_a_fallback_keeps_its_first_reason_and_where_it_is_from(stage: Stage) -> None:
    stage.router.decision = decision(attempt("a"), attempt("b", fallback=Reason.POLICY), attempt("c"))
    one = stage.sent()
    one.answered(MISSING, "not found")
    one.sent()
    one.answered(OVERLOADED, "busy")
    record = one.record
    assert (record.effective_target, record.attempts) == ("c", 3)
    assert (record.fallback_reason, record.fallback_from) == (Reason.MODEL_MISSING, "a")


def test_a_fallback_by_the_decision_keeps_its_reason_when_its_instance_fails(stage: Stage) -> None:
    stage.router.decision = decision(attempt("a", fallback=Reason.GPU_MISSING), attempt("b"))
    one = stage.sent()
    one.answered(OVERLOADED, "busy")
    record = one.record
    assert (record.fallback_reason, record.fallback_from) == (Reason.GPU_MISSING, "auto")


def test_a_request_that_fell_back_makes_an_event(stage: Stage) -> None:
    one = stage.sent()
    one.answered(OVERLOADED, "busy")
    one.close("ok")
    assert stage.journal.events == [("fallback", "b", Reason.OVERLOADED)]


def test_a_record_names_a_bounded_number_of_attempts_and_counts_them_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, *(attempt(f"i{number}") for number in range(40)))
    one = stage.sent()
    for _ in range(39):
        one.answered(OVERLOADED, "busy")
        one.sent()
    assert (one.record.attempts, len(one.record.failed_attempts)) == (40, 16)
    assert one.record.failed_attempts[0].target == "i0"


def test_an_attempt_that_follows_obeys_the_settings_of_that_moment(stage: Stage) -> None:
    one = stage.sent()
    stage.router.version += 1
    stage.router.decision = decision(attempt("a"), attempt("c"))
    assert shown(one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True)) == "c"


# --- attempts that no decision was made for ---


def test_fixed_attempts_are_made_in_order(stage: Stage) -> None:
    one = stage.request()
    none = Trouble(Reason.INSTANCE_UNAVAILABLE, "no instance may write")
    assert shown(one.enter_fixed([attempt("a"), attempt("b")], none)) == "a"
    one.sent()
    assert shown(one.answered(OVERLOADED, "busy", "503 of a")) == "b"
    assert (one.record.fallback_from, one.record.fallback_reason) == ("a", Reason.OVERLOADED)
    one.sent()
    found = trouble(one.failed(Reason.UPSTREAM_ERROR, "b died", sent=True))
    assert found.answer == "503 of a"


async def test_the_trouble_that_there_is_no_attempt_is_told_only_where_there_is_none(stage: Stage) -> None:
    none = Trouble(Reason.INSTANCE_UNAVAILABLE, "no instance may write")
    one = stage.request()
    assert one.enter_fixed([], none) is none
    assert (one.record.attempts, one.record.fallback_reason) == (0, Reason.INSTANCE_UNAVAILABLE)
    other = stage.request()
    other.enter_fixed([attempt("a")], none)
    assert trouble(await waited(other, other.failed(**REFUSED))).message == "a cannot be reached"


def test_fixed_attempts_of_stopped_instances_fall_away_where_none_is_started() -> None:
    fixed = FixedAttempts([attempt("a"), attempt("b", "startable"), attempt("c", "running")])
    assert fixed.next() == attempt("a")
    fixed.start_no_other()
    assert (fixed.more, fixed.failed_on) == (True, frozenset())
    assert fixed.next() == attempt("c", "running")
    assert (fixed.more, fixed.next(), fixed.failed_on) == (False, None, frozenset({"a"}))


# --- the model's status (P15) ---


def test_a_model_is_at_work_from_the_sending_of_the_request_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a", "running"), attempt("b"))
    one = stage.request()
    one.enter(FACTS)
    assert stage.status.at_work() == {}
    one.sent()
    assert stage.status.at_work() == {"tiny:latest": "loading"}
    stage.fleet.loaded["a"] = ("tiny:latest",)
    assert stage.status.at_work() == {"tiny:latest": "in_use"}
    one.answered(ABOUT_THE_REQUEST)
    assert stage.status.at_work() == {"tiny:latest": "in_use"}, "its answer still comes"
    one.close("ok")
    assert stage.status.at_work() == {}


def test_a_model_that_was_loaded_when_it_was_asked_is_in_use(stage: Stage) -> None:
    stage.sent()
    assert stage.status.at_work() == {"tiny:latest": "in_use"}


def test_a_server_that_was_left_works_on_nothing(stage: Stage) -> None:
    one = stage.sent()
    one.failed(Reason.ATTEMPT_TIMEOUT, "", sent=True)
    assert stage.status.at_work() == {}


# --- what is given back ---


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_a_request_ends_once_however_often_it_is_closed(stage: Stage, outcome: Outcome) -> None:
    one = stage.sent()
    stage.clock.advance(1.25)
    one.close(outcome)
    one.close("ok")
    one.close("cut")
    assert (stage.placement.released, one.is_waiting) == (["a"], False)
    assert [(record.outcome, record.duration_ms) for record in stage.ended] == [(outcome, 1250.0)]
    assert stage.traffic.requests == {("a", "", outcome): 1}


async def test_a_request_that_is_closed_while_it_waits_gets_no_lease(stage: Stage) -> None:
    stage.placement.prepares["a"] = asyncio.get_running_loop().create_future()
    one = stage.request()
    waiting = asyncio.ensure_future(waited(one, one.enter(FACTS)))
    await asyncio.sleep(0)
    waiting.cancel()
    one.close("client_gone")
    stage.placement.prepares["a"].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (stage.placement.held, len(stage.ended)) == ({}, 1)
    assert await one.wait() is None


async def test_a_request_that_is_closed_before_it_waits_gets_no_lease(stage: Stage) -> None:
    stage.placement.prepares["a"] = None
    one = stage.request()
    assert one.enter(FACTS) is WAIT
    one.close("client_gone")
    assert await one.wait() is None
    assert stage.placement.granted == []


async def test_a_defect_while_an_instance_is_prepared_leaves_nothing_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a", "startable"))
    stage.placement.prepares["a"] = ZeroDivisionError()
    one = stage.request()
    one.enter(FACTS)
    with pytest.raises(ZeroDivisionError):
        await one.wait()
    one.close("refused")
    assert stage.placement.held == {}


async def test_a_wait_that_nothing_was_asked_for_changes_nothing(stage: Stage) -> None:
    one = stage.sent()
    assert await one.wait() is None
    assert one.is_waiting


def test_a_request_that_ended_well_mends_the_status_of_its_model(stage: Stage) -> None:
    stage.status.failed("tiny", Reason.UPSTREAM_ERROR)
    stage.sent().close("client_gone")
    assert stage.status.idle_status("tiny:latest") == "error"
    stage.sent().close("ok")
    assert stage.status.idle_status("tiny:latest") == "not_loaded"
    stage.request(model=None).close("ok")


async def test_first_target_follows_waits_to_a_target_or_a_trouble(stage: Stage) -> None:
    stage.router.decision = decision(attempt("a", "startable"), attempt("b", "startable"))
    stage.placement.prepares["a"] = unavailable()
    one = stage.request()
    found = await first_target(one, one.enter(FACTS))
    assert isinstance(found, Target)
    assert found.instance == "b"
    assert isinstance(WAIT, Wait)


# --- requests that start nothing ------------------------------------------------------------------


def test_an_unload_goes_to_instances_that_run_and_starts_none(stage: Stage) -> None:
    one = stage.request()
    step = one.enter_running(FACTS)
    assert (shown(step), one.may_load) == ("a", False)
    assert all(other.instance != "a" for other in one.others)
    one.close("ok")
    assert stage.placement.held == {}


def test_a_missing_model_on_one_of_the_instances_of_a_volume_asks_no_other(stage: Stage) -> None:
    one = stage.request()
    one.enter_fixed((attempt("a", "running"), attempt("b", "running")), Trouble(Reason.OVERLOADED, "none"))
    one.sent()
    missing = Judgement(Reason.MODEL_MISSING)
    assert not one.might_follow(missing)
    assert one.answered(missing) is None
    assert one.record.failed_attempts == ()
    one.close("client_error")
    assert stage.placement.held == {}


# --- a pull that failed ---


async def test_a_failed_pull_starts_no_other_instance_and_stays_the_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a", "pull"), attempt("b", "pull"), attempt("c", "pull"))
    stage.placement.prepares["a"] = unavailable(Reason.MODEL_MISSING)
    stage.placement.prepares["b"] = LimitReachedError("lifecycle.max_running is 1; running already: a")
    one = stage.request()
    step = await first_target(one, one.enter(FACTS))
    assert isinstance(step, Trouble)
    assert step.reason is Reason.MODEL_MISSING
    assert [said["instance"] for said in stage.placement.prepared] == ["a"]


async def test_after_a_failed_pull_a_running_instance_may_pull_and_a_fallback_may_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(
        monkeypatch,
        attempt("a", "pull"),
        attempt("b", "pull"),
        attempt("c", "pull"),
        attempt("d", "startable"),
    )
    stage.router.running = {"a", "c"}
    for name in ("a", "c"):
        stage.placement.prepares[name] = unavailable(Reason.MODEL_MISSING)
    one = stage.request()
    assert shown(await first_target(one, one.enter(FACTS))) == "d"
    assert [said["instance"] for said in stage.placement.prepared] == ["a", "c", "d"]


async def test_another_failure_than_a_missing_model_lets_the_next_instance_pull(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = on_stage(monkeypatch, attempt("a", "pull"), attempt("b", "pull"))
    stage.placement.prepares["a"] = unavailable(Reason.CONTAINER_EXITED)
    one = stage.request()
    assert shown(await first_target(one, one.enter(FACTS))) == "b"


def test_a_request_that_the_operators_stop_cuts_before_its_first_byte_goes_to_another_instance(
    stage: Stage,
) -> None:
    one = stage.sent()
    assert one.cut is None
    stage.placement.books["a"].cut("a was stopped")
    assert one.cut == "a was stopped"
    assert shown(one.failed(Reason.UPSTREAM_UNREACHABLE, "broke", sent=True)) == "b"
    assert stage.blamed() == {("a", "cancelled"): 1}
