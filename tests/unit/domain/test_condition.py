"""Every transition of an instance's condition: the event, the condition before, what comes of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain import backoff
from manager.domain import condition as c
from manager.domain.instance import ContainerFacts, Explanation, Phase, Target
from manager.domain.registry import Operation
from manager.errors import IllegalTransitionError, Reason

NOW = 1000.0
KEPT_S = 15.0
T0 = datetime(2026, 8, 1, tzinfo=UTC)
RUNNING = ContainerFacts("1", "m-ollama-cpu", "image", "running", address="172.18.0.2", started_at=T0)
EXITED = replace(RUNNING, status="exited", address=None, exit_code=3)
WHY = Explanation(Reason.START_FAILED, "no luck")

NEW = c.Condition("m-ollama-cpu", KEPT_S, Target.STOPPED, pinned=False)
STOPPED = replace(NEW, phase=Phase.STOPPED)
FAILED = replace(NEW, phase=Phase.FAILED, failure=WHY)
STARTING = replace(NEW, phase=Phase.STARTING, intent=Operation.START, target=Target.RUNNING)
READY = replace(
    NEW,
    phase=Phase.READY,
    target=Target.RUNNING,
    container=RUNNING,
    endpoint="http://172.18.0.2:11434",
    ready_since=NOW - 5,
)
STOPPING = replace(READY, phase=Phase.STOPPING, intent=Operation.STOP, target=Target.STOPPED)


def after(before: c.Condition, event: c.Event, now: float = NOW) -> c.Condition:
    return c.step(before, event, now)[0]


def effects(before: c.Condition, event: c.Event) -> list[type[Any]]:
    return [type(effect) for effect in c.step(before, event, NOW)[1]]


# --- the first listing ---


def test_without_a_container_and_without_a_wish_it_is_stopped() -> None:
    assert after(NEW, c.Listed(None, None)) == STOPPED


def test_a_start_that_an_earlier_daemon_had_begun_is_begun_again() -> None:
    wanted = replace(NEW, target=Target.RUNNING)
    found = after(wanted, c.Listed(None, Operation.START))
    assert (found.phase, found.intent, found.bury_at) == (Phase.STOPPED, Operation.START, None)


def test_a_stop_that_an_earlier_daemon_had_begun_goes_on() -> None:
    found = after(NEW, c.Listed(RUNNING, Operation.STOP))
    assert (found.phase, found.intent, found.container) == (Phase.UNAVAILABLE, Operation.STOP, RUNNING)
    assert after(NEW, c.Listed(None, Operation.STOP)).intent is None


def test_a_running_container_is_adopted() -> None:
    found = after(NEW, c.Listed(RUNNING, None))
    assert (found.phase, found.intent, found.target) == (Phase.STARTING, Operation.START, Target.RUNNING)


def test_an_ended_container_of_what_should_run_has_failed_and_is_inspected() -> None:
    found = after(replace(NEW, target=Target.RUNNING), c.Listed(EXITED, None))
    assert (found.phase, found.target, found.look_at) == (Phase.FAILED, Target.STOPPED, NOW)
    assert found.failure is not None
    assert "exit code 3" in found.failure.message
    assert found.bury_at == NOW + KEPT_S


def test_an_ended_container_of_what_should_not_run_is_only_buried() -> None:
    found = after(NEW, c.Listed(EXITED, None))
    assert (found.phase, found.failure, found.bury_at) == (Phase.STOPPED, None, NOW + KEPT_S)


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("unfinished", [None, *Operation])
@pytest.mark.parametrize("container", [None, RUNNING, EXITED])
def test_nothing_is_known_before_the_first_listing_and_something_after_it(
    container: ContainerFacts | None, unfinished: Operation | None, target: Target
) -> None:
    before = replace(NEW, target=target)
    assert not before.is_listed
    assert after(before, c.Listed(container, unfinished)).is_listed
    assert after(before, c.NothingToSweep()).is_listed


def test_a_sweep_that_finds_nothing_starts_nothing() -> None:
    found = after(replace(NEW, target=Target.RUNNING), c.NothingToSweep())
    assert (found.phase, found.intent, found.target) == (Phase.STOPPED, None, Target.RUNNING)


# --- inspections ---


def test_a_ready_container_that_is_as_it_was_changes_nothing() -> None:
    assert c.step(READY, c.Inspected(RUNNING), NOW) == (READY, ())


@pytest.mark.parametrize("facts", [None, EXITED])
def test_a_ready_container_that_ended_has_failed(facts: ContainerFacts | None) -> None:
    found = after(READY, c.Inspected(facts))
    assert (found.phase, found.target, found.endpoint) == (Phase.FAILED, Target.STOPPED, None)
    assert found.start_retry == c.Retry(1, NOW + backoff.FIRST_S)
    assert found.bury_at == (None if facts is None else NOW + KEPT_S)
    assert effects(READY, c.Inspected(facts)) == [c.ForgetServer, c.DropClaim, c.Record, c.FailStarters]


def test_a_pinned_one_stays_wanted() -> None:
    assert after(replace(READY, pinned=True), c.Inspected(None)).target is Target.RUNNING


def test_a_long_run_forgives_earlier_failures() -> None:
    worn = replace(READY, start_retry=c.Retry(failures=6), ready_since=NOW - backoff.STABLE_S)
    assert after(worn, c.Inspected(None)).start_retry.failures == 1
    assert after(replace(worn, ready_since=NOW - 1), c.Inspected(None)).start_retry.failures == 7


@pytest.mark.parametrize(
    "changed",
    [
        {"id": "2"},
        {"started_at": datetime(2026, 8, 2, tzinfo=UTC)},
        {"address": "172.18.0.9"},
        {"address": None, "networks": ()},
    ],
)
def test_another_run_or_another_address_is_adopted_again(changed: dict[str, Any]) -> None:
    facts = replace(RUNNING, **changed)
    found = after(READY, c.Inspected(facts))
    assert (found.phase, found.intent, found.usable_endpoint) == (Phase.STARTING, Operation.START, None)
    assert effects(READY, c.Inspected(facts)) == [c.ForgetServer]


def test_a_container_without_a_network_is_adopted_again_even_at_a_fixed_port() -> None:
    port = replace(READY, container=replace(RUNNING, address=None))
    detached = replace(RUNNING, address=None, networks=())
    assert after(port, c.Inspected(detached)).phase is Phase.STARTING
    assert after(port, c.Inspected(replace(detached, networks=None))).phase is Phase.READY


@pytest.mark.parametrize("before", [STOPPED, FAILED])
def test_a_container_that_was_started_by_hand_is_adopted(before: c.Condition) -> None:
    found = after(replace(before, container=EXITED, bury_at=NOW), c.Inspected(RUNNING))
    assert (found.phase, found.intent, found.bury_at) == (Phase.STARTING, Operation.START, None)
    assert effects(before, c.Inspected(RUNNING)) == []


def test_while_an_operation_goes_on_an_inspection_is_of_the_past() -> None:
    assert c.step(STOPPING, c.Inspected(None), NOW) == (STOPPING, ())


def test_a_killed_process_in_a_running_container_is_told_once() -> None:
    for event in (
        c.Inspected(replace(RUNNING, out_of_memory=True)),
        c.Inspected(RUNNING, out_of_memory=True),
    ):
        found = after(READY, event)
        assert found.failure is not None
        assert (found.phase, found.failure.code) == (Phase.READY, Reason.OUT_OF_MEMORY)
        assert effects(READY, event) == [c.Record]
        assert c.step(found, event, NOW) == (found, ())


def test_a_pause_is_what_an_inspection_has_found() -> None:
    paused = after(READY, c.Inspected(replace(RUNNING, status="paused")))
    assert paused.paused
    assert paused.phase is Phase.READY
    assert not after(paused, c.Inspected(RUNNING)).paused


def test_a_second_look_at_an_ended_container_keeps_its_date() -> None:
    found = after(replace(FAILED, container=EXITED, bury_at=NOW + 3), c.Inspected(EXITED))
    assert found.bury_at == NOW + 3
    assert after(found, c.Inspected(None)).bury_at is None


def test_the_last_lines_belong_to_a_failure() -> None:
    found = after(FAILED, c.LogRead(replace(EXITED, out_of_memory=True), ("one", "two")))
    assert found.failure is not None
    assert (found.failure.code, found.failure.log_tail) == (Reason.OUT_OF_MEMORY, ("one", "two"))
    for before in (READY, replace(FAILED, failure=None)):
        assert after(before, c.LogRead(EXITED, ())) == before


def test_the_earliest_reason_to_look_counts_until_the_look_begins() -> None:
    soon = after(READY, c.LookRequested(0.5))
    assert soon.look_at == NOW + 0.5
    assert after(soon, c.LookRequested()).look_at == NOW
    assert after(soon, c.LookRequested(9)).look_at == NOW + 0.5
    assert after(soon, c.LookBegun()).look_at is None


def test_an_engine_says_what_it_knows_of_the_end() -> None:
    assert "m was removed" in c.explain_end("m", None).message
    assert "(no such file)" in c.explain_end("m", replace(EXITED, error="no such file")).message


# --- starts ---


def test_an_explicit_start_forgets_the_pauses_after_failures() -> None:
    tired = replace(FAILED, start_retry=c.Retry(3, NOW + 9), stop_retry=c.Retry(2, NOW + 9))
    eager = after(tired, c.StartRequested(explicit=True))
    assert (eager.target, eager.intent) == (Target.RUNNING, Operation.START)
    assert (eager.start_retry, eager.stop_retry) == (c.Retry(3, 0.0), c.Retry(2, 0.0))
    assert after(tired, c.StartRequested(explicit=False)).start_retry == tired.start_retry


def test_a_start_during_a_stop_follows_it() -> None:
    asked = after(STOPPING, c.StartRequested(explicit=False))
    assert (asked.intent, asked.target) == (Operation.STOP, Target.RUNNING)
    done = after(asked, c.Stopped(may_start=True))
    assert (done.phase, done.intent) == (Phase.STOPPED, Operation.START)
    refused = after(asked, c.Stopped(may_start=False))
    assert (refused.phase, refused.intent, refused.target) == (Phase.STOPPED, None, Target.STOPPED)


def test_a_failure_is_forgotten_when_the_next_start_begins() -> None:
    asked = replace(FAILED, intent=Operation.START, bury_at=NOW)
    begun = after(asked, c.StartBegun())
    assert (begun.phase, begun.failure, begun.bury_at) == (Phase.STARTING, None, None)
    assert after(STARTING, c.StartBegun()).phase is Phase.STARTING  # an adoption


def test_a_server_that_answers_is_ready() -> None:
    found = after(STARTING, c.BecameReady("http://a"))
    assert (found.phase, found.intent, found.usable_endpoint) == (Phase.READY, None, "http://a")
    assert found.ready_since == NOW


def test_a_stop_at_the_last_moment_of_a_start_is_kept() -> None:
    stopped = after(STARTING, c.StopRequested())
    ready = after(stopped, c.BecameReady("http://a"))
    assert (ready.intent, ready.usable_endpoint) == (Operation.STOP, None)
    failed = after(stopped, c.StartFailed(WHY))
    assert (failed.intent, failed.phase) == (Operation.STOP, Phase.FAILED)


def test_a_failed_start_waits_and_is_wanted_no_more_unless_pinned() -> None:
    found = after(STARTING, c.StartFailed(WHY))
    assert (found.phase, found.intent, found.target) == (Phase.FAILED, None, Target.STOPPED)
    assert (found.failure, found.look_at) == (WHY, None)
    assert effects(STARTING, c.StartFailed(WHY)) == [c.DropClaim, c.Record]
    assert after(replace(STARTING, pinned=True), c.StartFailed(WHY)).target is Target.RUNNING


def test_a_container_that_could_not_be_taken_over_is_inspected_later_and_later() -> None:
    kept = replace(STARTING, container=RUNNING, start_retry=c.Retry(failures=2))
    assert after(kept, c.StartFailed(WHY)).look_at == NOW + backoff.delay_s(3)


def test_a_restart_by_itself() -> None:
    wanted = replace(FAILED, target=Target.RUNNING)
    assert after(wanted, c.RestartDue()).intent is Operation.START
    assert after(wanted, c.RestartRefused()).start_retry == c.Retry(1, NOW + 1)


# --- stops ---


def test_a_stop_that_is_requested_again_is_tried_at_once() -> None:
    first = after(READY, c.StopRequested())
    assert (first.intent, first.target, first.usable_endpoint) == (Operation.STOP, Target.STOPPED, None)
    failed = after(after(first, c.StopBegun()), c.StopFailed(WHY))
    assert (failed.stop_trouble, failed.stop_retry) == (WHY, c.Retry(1, NOW + 1))
    again = after(failed, c.StopRequested())
    assert again.stop_retry == c.Retry(1, 0.0)


def test_a_stop_of_a_start_that_has_not_begun_takes_it_back() -> None:
    asked = after(STOPPED, c.StartRequested(explicit=True))
    assert after(asked, c.StopRequested()) == STOPPED


def test_a_stop_from_the_drain_to_the_end() -> None:
    begun = after(READY, c.StopRequested())
    drained = after(begun, c.DrainBegun())
    assert drained.phase is Phase.DRAINING
    assert after(drained, c.DiedInDrain()).phase is Phase.STOPPING
    ended = after(after(drained, c.StopBegun()), c.RunEnded())
    assert (ended.phase, ended.endpoint, ended.ready_since) == (Phase.STOPPING, None, None)
    assert after(ended, c.StopBegun()).phase is Phase.STOPPING  # a second try
    gone = after(after(ended, c.ContainerChanged(None)), c.Stopped(may_start=True))
    assert (gone.phase, gone.intent, gone.container) == (Phase.STOPPED, None, None)
    assert effects(ended, c.Stopped(may_start=True)) == [c.ForgetServer, c.DropClaim]


def test_a_replacement_is_a_stop_of_what_stays_wanted() -> None:
    found = after(READY, c.ReplacementDue())
    assert (found.intent, found.target) == (Operation.STOP, Target.RUNNING)


def test_a_burial_that_fails_is_tried_again_later() -> None:
    begun = after(replace(FAILED, container=EXITED, bury_at=NOW), c.BurialBegun())
    assert begun.bury_at is None
    assert after(begun, c.BurialFailed()).bury_at == NOW + KEPT_S


# --- the card ---


def test_a_lost_card_takes_a_ready_instance_out_until_it_is_back() -> None:
    lost = after(READY, c.CardLost("GPU-a is gone"))
    assert (lost.usable_endpoint, lost.is_ready) == (None, True)
    assert lost.card_lost == Explanation(Reason.GPU_MISSING, "GPU-a is gone")
    assert effects(READY, c.CardLost("GPU-a is gone")) == [c.Record]
    assert effects(lost, c.CardLost("GPU-a is gone")) == []
    assert effects(lost, c.CardLost("GPU-a is really gone")) == []  # told once, whatever the words
    back = after(lost, c.CardReturned())
    assert back == READY
    assert effects(lost, c.CardReturned()) == [c.Record]
    assert effects(READY, c.CardReturned()) == []


def test_only_a_ready_instance_loses_its_card_and_only_for_its_run() -> None:
    assert after(STARTING, c.CardLost("gone")) == STARTING
    lost = after(READY, c.CardLost("gone"))
    assert after(lost, c.Inspected(None)).card_lost is None


# --- the rest ---


def test_a_pin_that_is_taken_back_ends_the_restarts() -> None:
    pinned = replace(FAILED, pinned=True, target=Target.RUNNING)
    assert after(pinned, c.PinChanged(pinned=False)).target is Target.STOPPED
    assert after(FAILED, c.PinChanged(pinned=True)).pinned
    assert after(READY, c.PinChanged(pinned=False)).target is Target.RUNNING


@pytest.mark.parametrize(
    ("before", "event"),
    [
        (READY, c.StartBegun()),
        (STOPPED, c.BecameReady("http://a")),
        (READY, c.StartFailed(WHY)),
        (STOPPED, c.DrainBegun()),
        (READY, c.DiedInDrain()),
        (STOPPED, c.StopBegun()),
        (READY, c.Stopped(may_start=False)),
        (READY, c.Listed(None, None)),
        (STOPPED, c.NothingToSweep()),
    ],
)
def test_an_event_that_cannot_happen_raises(before: c.Condition, event: c.Event) -> None:
    with pytest.raises(IllegalTransitionError):
        c.step(before, event, NOW)


@pytest.mark.parametrize(
    ("condition", "occupies"),
    [(STOPPED, False), (FAILED, False), (NEW, False), (STARTING, True), (READY, True), (STOPPING, True)],
)
def test_what_has_a_container_that_may_run_occupies_a_place(
    condition: c.Condition, *, occupies: bool
) -> None:
    assert condition.occupies is occupies
    assert replace(condition, intent=Operation.START).occupies


def facts_strategy() -> st.SearchStrategy[ContainerFacts | None]:
    return st.none() | st.builds(
        ContainerFacts,
        id=st.sampled_from(["1", "2"]),
        name=st.just("m-ollama-cpu"),
        image=st.just("image"),
        status=st.sampled_from(["created", "running", "paused", "exited"]),
        address=st.sampled_from([None, "172.18.0.2", "172.18.0.3"]),
        networks=st.sampled_from([None, (), ("net",)]),
        out_of_memory=st.booleans(),
    )


@pytest.mark.parametrize("event", [c.Inspected, c.Listed])
def test_a_card_that_one_run_has_lost_is_not_lost_to_the_next(event: type[Any]) -> None:
    lost = after(READY, c.CardLost("gone"))
    assert lost.card_lost is not None
    again = replace(RUNNING, started_at=datetime(2030, 1, 1, tzinfo=UTC))
    adopted = after(
        lost, c.Inspected(again, out_of_memory=False) if event is c.Inspected else c.Listed(again, None)
    )
    assert (adopted.phase, adopted.card_lost) == (Phase.STARTING, None)


EVENTS: st.SearchStrategy[c.Event] = st.one_of(
    st.builds(c.Listed, facts_strategy(), st.none() | st.sampled_from(Operation)),
    st.builds(c.Inspected, facts_strategy(), st.booleans()),
    st.builds(c.StartRequested, st.booleans()),
    st.just(c.StopRequested()),
    st.just(c.StartBegun()),
    st.just(c.BecameReady("http://a")),
    st.just(c.StartFailed(WHY)),
    st.just(c.DrainBegun()),
    st.just(c.DiedInDrain()),
    st.just(c.StopBegun()),
    st.just(c.RunEnded()),
    st.builds(c.Stopped, st.booleans()),
    st.just(c.StopFailed(WHY)),
    st.just(c.CardLost("gone")),
    st.just(c.CardReturned()),
    st.builds(c.PinChanged, st.booleans()),
    st.builds(c.ContainerChanged, facts_strategy()),
)


@given(st.lists(EVENTS, max_size=30))
def test_whatever_happens_leases_lead_only_to_what_is_ready(events: list[c.Event]) -> None:
    condition = NEW
    for event in events:
        try:
            condition = after(condition, event)
        except IllegalTransitionError:
            continue
        if condition.usable_endpoint is not None:
            assert condition.phase is Phase.READY
            assert condition.intent is None
            assert condition.card_lost is None
        if condition.card_lost is not None:
            assert condition.phase in (Phase.READY, Phase.DRAINING, Phase.STOPPING)
        if condition.phase in (Phase.STOPPED, Phase.FAILED):
            assert condition.endpoint is None


# --- a service of Docker Swarm that was scaled to zero ---

PARKED = replace(RUNNING, status="parked", address=None, started_at=None)


def test_a_ready_service_that_was_scaled_to_zero_is_stopped_and_has_not_failed() -> None:
    found = after(replace(READY, bury_at=NOW), c.Inspected(PARKED))
    assert (found.phase, found.target, found.container) == (Phase.STOPPED, Target.STOPPED, None)
    assert (found.endpoint, found.failure, found.ready_since, found.bury_at) == (None, None, None, None)
    assert found.start_retry.failures == 0


def test_a_service_that_was_scaled_to_zero_tells_why_it_has_stopped() -> None:
    done = c.step(READY, c.Inspected(PARKED), NOW)[1]
    message = "m-ollama-cpu was stopped from outside"
    assert done == (
        c.ForgetServer(),
        c.DropClaim(),
        c.Record("stopped", None, message),
        c.FailStarters(Reason.INSTANCE_STOPPED, message),
    )


def test_a_pinned_service_that_was_scaled_to_zero_stays_stopped() -> None:
    found = after(replace(READY, pinned=True), c.Inspected(PARKED))
    assert (found.phase, found.target, found.container) == (Phase.STOPPED, Target.STOPPED, None)


@pytest.mark.parametrize("before", [STOPPED, FAILED, NEW])
def test_a_service_without_replicas_is_no_container_of_an_instance_that_does_not_run(
    before: c.Condition,
) -> None:
    assert c.step(before, c.Inspected(PARKED), NOW) == c.step(before, c.Inspected(None), NOW)
    assert after(before, c.Inspected(PARKED)).container is None


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("unfinished", [None, *Operation])
def test_a_service_without_replicas_in_the_first_listing_is_no_container(
    target: Target, unfinished: Operation | None
) -> None:
    before = replace(NEW, target=target)
    assert c.step(before, c.Listed(PARKED, unfinished), NOW) == c.step(
        before, c.Listed(None, unfinished), NOW
    )


def test_a_service_without_replicas_does_not_replace_the_reason_of_a_failure() -> None:
    assert after(FAILED, c.LogRead(PARKED, ())) == FAILED


def test_a_service_that_is_scaled_to_zero_by_a_stop_of_ours_waits_for_that_stop() -> None:
    assert c.step(STOPPING, c.Inspected(PARKED), NOW) == (STOPPING, ())


def test_the_end_of_a_service_says_what_the_engine_gives_as_the_reason() -> None:
    lost = replace(EXITED, reason=Reason.INSTANCE_UNAVAILABLE, error="its node gpu-box is down")
    why = c.explain_end("m-ollama-cpu", lost)
    assert why == Explanation(
        Reason.INSTANCE_UNAVAILABLE, "m-ollama-cpu does not run: its node gpu-box is down"
    )
    assert c.explain_end("m-ollama-cpu", replace(lost, out_of_memory=True)).code is Reason.OUT_OF_MEMORY


def test_the_end_of_a_service_without_an_exit_code_says_what_is_known() -> None:
    gone = replace(EXITED, exit_code=None, error="Swarm has no task of it that should run")
    why = c.explain_end("m-ollama-cpu", gone)
    assert why.code is Reason.CONTAINER_EXITED
    assert why.message == "m-ollama-cpu does not run: Swarm has no task of it that should run"


@pytest.mark.parametrize(
    ("node", "exit_code", "words"),
    [
        (None, 137, "as `docker kill`, `docker rm -f` and the system do"),
        (None, 143, "as `docker stop` does"),
        ("gpu-box", 137, "as `docker kill` on its node and the system do"),
        ("gpu-box", 143, "as `docker service update` and `docker node update` do"),
    ],
)
def test_what_ends_a_server_from_outside_is_named_as_it_was_started(
    node: str | None, exit_code: int, words: str
) -> None:
    why = c.explain_end("m-ollama-cpu", replace(EXITED, exit_code=exit_code, node=node))
    assert why.message.endswith(words)


def test_a_server_is_used_here_after_all() -> None:
    let_go = after(READY, c.LetGo())
    assert after(let_go, c.LetGo(takes_back=True)) == READY


def test_a_server_that_was_let_go_gives_no_leases_until_it_is_wanted_again() -> None:
    let_go = after(READY, c.LetGo())
    assert (let_go.phase, let_go.usable_endpoint) == (Phase.READY, None)
    again, done = c.step(let_go, c.WantedAgain(), NOW)
    assert (again.phase, again.intent, again.is_let_go) == (Phase.STARTING, Operation.START, False)
    assert done == (c.ForgetServer(),)
    assert after(again, c.BecameReady("http://x")).usable_endpoint == "http://x"


@pytest.mark.parametrize("facts", [None, replace(RUNNING, status="exited", exit_code=0)])
def test_what_was_let_go_and_has_ended_was_stopped_by_another_gateway(facts: ContainerFacts | None) -> None:
    let_go = after(READY, c.LetGo())
    stopped = after(let_go, c.Inspected(facts))
    assert (stopped.phase, stopped.target, stopped.failure) == (Phase.STOPPED, Target.STOPPED, None)
    assert stopped.is_let_go is False
    assert after(READY, c.Inspected(facts)).phase is Phase.FAILED, "nobody has let that go"
