"""The states of async runs, the order of their queue, and what follows a restart."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.runs import (
    MOST_EXECUTIONS,
    OPEN,
    Remove,
    Run,
    RunError,
    RunFact,
    RunResult,
    RunStatus,
    Save,
    advance,
    body_file,
    cancelled,
    ended,
    expired,
    files_of,
    interrupted,
    is_due,
    is_final,
    next_run,
    paid,
    pause_s,
    postponed,
    recovery,
    result_file,
    sent,
    withdrawn,
)
from manager.errors import IllegalTransitionError
from tests.support.runs import NOW, a_run

LATER = NOW + timedelta(seconds=30)
RESULT = RunResult(200, "application/json", 5)
ERROR = RunError("upstream_error", "no")
Q, R, S, F, C, I, E = RunStatus  # noqa: E741

LEGAL = {
    (Q, RunFact.SENT): R,
    (Q, RunFact.POSTPONED): Q,
    (Q, RunFact.FAILED): F,
    (Q, RunFact.CANCELLED): C,
    (R, RunFact.SUCCEEDED): S,
    (R, RunFact.FAILED): F,
    (R, RunFact.CANCELLED): C,
    (R, RunFact.INTERRUPTED): I,
    (R, RunFact.WITHDRAWN): Q,
    (I, RunFact.REQUEUED): Q,
    (S, RunFact.EXPIRED): E,
    (F, RunFact.EXPIRED): E,
}


@pytest.mark.parametrize(("status", "fact"), list(product(RunStatus, RunFact)))
def test_only_the_transitions_of_the_table_are_possible(status: RunStatus, fact: RunFact) -> None:
    if (status, fact) in LEGAL:
        assert advance(status, fact) is LEGAL[status, fact]
        return
    with pytest.raises(IllegalTransitionError, match=rf"{status.value} .*\({fact.name}\)"):
        advance(status, fact)


def test_a_run_goes_from_the_queue_to_its_result_and_that_expires() -> None:
    run = sent(a_run(), NOW, instance="gpu0", request_id="r1")
    assert (run.status, run.started_at, run.executions) == (R, NOW, 1)
    assert (run.instance, run.request_id) == ("gpu0", "r1")
    assert not is_final(run)
    run = ended(run, LATER, result=RESULT, error=None)
    assert (run.status, run.ended_at, run.result, run.error) == (S, LATER, RESULT, None)
    assert (run.expires_at, run.instance, run.request_id) == (LATER + timedelta(seconds=60), "gpu0", "r1")
    assert is_final(run)
    assert not is_due(run, LATER + timedelta(seconds=59))
    assert is_due(run, LATER + timedelta(seconds=60))
    run = expired(run)
    assert (run.status, run.result) == (E, None)
    assert not is_due(run, LATER + timedelta(days=1))


def test_a_run_with_an_error_has_failed_whether_it_was_sent_or_not() -> None:
    assert ended(a_run(), NOW, result=RESULT, error=ERROR).status is F
    run = ended(
        sent(a_run(), NOW, instance="a", request_id="1"),
        NOW,
        result=None,
        error=ERROR,
        instance="b",
        request_id="2",
    )
    assert (run.status, run.error, run.instance, run.request_id) == (F, ERROR, "b", "2")


@pytest.mark.parametrize("run", [a_run(), sent(a_run(), NOW, instance="a", request_id="1")])
def test_a_run_that_has_not_ended_can_be_cancelled(run: Run) -> None:
    over = cancelled(run, LATER)
    assert (over.status, over.ended_at, over.result, over.expires_at) == (C, LATER, None, None)


def test_a_run_that_was_not_sent_after_all_is_as_it_was() -> None:
    run = withdrawn(sent(a_run(), NOW, instance="a", request_id="1"))
    assert (run.status, run.started_at, run.executions) == (Q, None, 0)


@pytest.mark.parametrize("run", [a_run(), sent(a_run(), NOW, instance="a", request_id="1")])
def test_a_run_that_nothing_could_serve_is_queued_and_tells_why_until_it_is_sent_or_over(run: Run) -> None:
    run = postponed(run, ERROR)
    assert (run.status, run.started_at, run.executions, run.error) == (Q, None, 0, ERROR)
    assert postponed(run, ERROR) == run
    assert sent(run, NOW, instance="a", request_id="1").error is None
    assert cancelled(run, NOW).error is None
    assert found(run, "run_1.body") == ()


def test_the_pauses_of_a_run_that_nothing_can_serve_double_up_to_a_minute() -> None:
    assert [pause_s(failures) for failures in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_an_interrupted_run_is_queued_again_only_if_it_is_idempotent() -> None:
    once = interrupted(sent(a_run(), NOW, instance="a", request_id="1"), LATER)
    assert (once.status, once.ended_at, once.executions) == (I, LATER, 1)
    assert once.error is not None
    assert once.error.code == "interrupted"
    again = interrupted(sent(a_run(idempotent=True), NOW, instance="a", request_id="1"), LATER)
    assert (again.status, again.ended_at, again.started_at, again.error) == (Q, None, None, None)
    assert again.executions == 1


def test_a_run_that_was_paid_for_is_not_executed_again() -> None:
    run = paid(sent(a_run(idempotent=True), NOW, instance="a", request_id="1"), instance="cloud")
    assert (run.instance, run.idempotent, run.status) == ("cloud", False, R)
    assert interrupted(run, LATER).status is I


def test_an_idempotent_run_is_not_executed_without_end() -> None:
    run = a_run(idempotent=True)
    for number in range(1, MOST_EXECUTIONS + 1):
        assert run.status is Q
        run = interrupted(sent(run, NOW, instance="a", request_id="1"), LATER)
        assert run.executions == number
    assert run.status is I
    assert run.error is not None
    assert f"{MOST_EXECUTIONS} executions" in run.error.message


def test_the_oldest_run_of_the_queue_with_the_fewest_begun_is_next() -> None:
    one, two = a_run(1, lane="a"), a_run(2, lane="a")
    three, four = a_run(3), a_run(4, model="a")
    assert next_run([two, one, three], []) == one
    assert next_run([two, three], [one]) == three
    assert next_run([four, two], [three]) == two
    assert next_run([four], [one]) == four
    assert next_run([], [one]) is None
    assert (one.queue, three.queue) == ("a", "tiny")


# --- recovery -------------------------------------------------------------------------------------


def found(run: Run, *files: str) -> tuple[Save | Remove, ...]:
    return recovery([run], files, LATER)


def test_a_queued_run_goes_on_with_its_body_and_fails_without() -> None:
    assert found(a_run(), "run_1.body") == ()
    (action,) = found(a_run())
    assert isinstance(action, Save)
    assert action.run.status is F
    assert action.run.error is not None
    assert action.run.error.code == "body_lost"


def test_a_run_that_was_executed_is_interrupted_and_its_files_go() -> None:
    run = sent(a_run(), NOW, instance="a", request_id="1")
    over = interrupted(run, LATER)
    assert found(run, "run_1.body", "run_1.result", ".run_1.result.part") == (
        Save(over),
        Remove(".run_1.result.part"),
        Remove("run_1.body"),
        Remove("run_1.result"),
    )


def test_an_idempotent_run_that_was_executed_is_queued_again_and_keeps_its_body() -> None:
    run = sent(a_run(idempotent=True), NOW, instance="a", request_id="1")
    assert found(run, "run_1.body", "run_1.result") == (Save(interrupted(run, LATER)), Remove("run_1.result"))
    (action,) = found(run)
    assert isinstance(action, Save)
    assert action.run.status is F, "its body is gone"


@pytest.mark.parametrize("error", [None, ERROR])
def test_a_result_is_kept_until_it_is_due_or_lost(error: RunError | None) -> None:
    run = ended(sent(a_run(), NOW, instance="a", request_id="1"), NOW, result=RESULT, error=error)
    assert found(run, "run_1.result") == ()
    assert found(run, "run_1.result", "run_1.body") == (Remove("run_1.body"),)
    assert found(run) == (Save(expired(run)),)
    due = replace(run, expires_at=LATER)
    assert found(due, "run_1.result") == (Save(expired(due)), Remove("run_1.result"))


def test_a_failed_run_without_a_result_needs_no_file() -> None:
    run = ended(a_run(), NOW, result=None, error=ERROR)
    assert files_of(run) == frozenset()
    assert found(run) == ()


@pytest.mark.parametrize("status", [C, I, E])
def test_what_is_over_stays_as_it_is(status: RunStatus) -> None:
    run = a_run(status=status, ended_at=NOW)
    assert found(run) == ()
    assert found(run, "run_1.body") == (Remove("run_1.body"),)


def test_files_without_a_run_are_removed() -> None:
    assert recovery([], ["x", "run_9.body"], NOW) == (Remove("run_9.body"), Remove("x"))


@st.composite
def stored(draw: st.DrawFn) -> Run:
    number = draw(st.integers(1, 4))
    status = draw(st.sampled_from(RunStatus))
    return a_run(
        number,
        status=status,
        idempotent=draw(st.booleans()),
        executions=draw(st.integers(0, MOST_EXECUTIONS)),
        expires_at=draw(st.sampled_from([None, NOW, LATER + timedelta(seconds=1)])),
        result=draw(st.sampled_from([None, RESULT])) if status in (S, F) else None,
    )


NAMES = st.sets(
    st.sampled_from([make(f"run_{number}") for number in range(1, 6) for make in (body_file, result_file)])
)


@given(runs=st.lists(stored(), unique_by=lambda run: run.number), files=NAMES)
def test_recovery_loses_nothing_executes_nothing_twice_and_can_be_repeated(
    runs: list[Run], files: set[str]
) -> None:
    actions = recovery(runs, files, LATER)
    after = {run.id: run for run in runs}
    left = set(files)
    for action in actions:
        if isinstance(action, Save):
            assert after[action.run.id] != action.run
            after[action.run.id] = action.run
        else:
            left.remove(action.file)
    assert len(after) == len(runs)
    for before in runs:
        run = after[before.id]
        assert run.status is not R
        if before.status not in OPEN:
            assert run.status in (before.status, E)
        if run.status is Q:
            assert before.status is Q or before.idempotent
        assert files_of(run) <= left
    assert left == {file for run in after.values() for file in files_of(run)}
    assert recovery(after.values(), left, LATER) == ()
