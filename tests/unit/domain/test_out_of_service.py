"""Every transition of the condition of an instance that an operator takes out of service, or restarts."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain import condition as c
from manager.domain.drained import Drained, drained_from, why_out
from manager.domain.instance import Phase, Target
from manager.domain.registry import Operation
from manager.errors import IllegalTransitionError
from tests.unit.domain.test_condition import (
    EVENTS,
    EXITED,
    FAILED,
    NEW,
    NOW,
    READY,
    RUNNING,
    STARTING,
    STOPPED,
    STOPPING,
    WHY,
    after,
)

T0 = datetime(2026, 8, 1, 10, tzinfo=UTC)
ORDER = Drained(T0)
KEEP = Drained(T0, stops=False)
OUT = c.TakenOutOfService(ORDER)
OUT_RUNNING = c.TakenOutOfService(KEEP)
BACK = c.PutBackInService()
STOP_OF_ORDER = replace(READY, drained=ORDER, intent=Operation.STOP, target=Target.STOPPED, is_patient=True)


# --- the order ---


def test_an_order_says_why_until_when_and_how_it_ends() -> None:
    assert ORDER.detail == "drained"
    order = Drained(T0, T0 + timedelta(hours=2), "driver update")
    assert order.detail == "drained: driver update"
    assert why_out("gpu0", order) == (
        "gpu0 is out of service until 2026-08-01T12:00:00Z (drained: driver update); "
        "`ollama-manager resume gpu0` puts it back"
    )
    assert why_out("gpu0", ORDER).startswith("gpu0 is out of service (drained);")


def test_an_order_passes_when_its_time_has_come() -> None:
    order = Drained(T0, T0 + timedelta(hours=2))
    assert not order.has_passed(T0 + timedelta(hours=2, microseconds=-1))
    assert order.has_passed(T0 + timedelta(hours=2))
    assert (order.left_s(T0), order.left_s(T0 + timedelta(hours=3))) == (7200.0, 0.0)
    assert not ORDER.has_passed(T0 + timedelta(days=10_000))
    assert ORDER.left_s(T0) is None


@pytest.mark.parametrize("order", [ORDER, KEEP, Drained(T0, T0 + timedelta(hours=2), "why", ran=True)])
def test_an_order_comes_back_as_it_was_stored(order: Drained) -> None:
    assert drained_from(order.stored()) == order


@pytest.mark.parametrize("change", [{"since": "soon"}, {"until": 5}, {"reason": 5}])
def test_something_else_than_an_order_is_not_read(change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        drained_from(ORDER.stored() | change)
    with pytest.raises(LookupError):
        drained_from({})


# --- out of service ---


@pytest.mark.parametrize("before", [READY, replace(STARTING, container=RUNNING), STARTING])
def test_what_runs_or_starts_is_stopped_patiently(before: c.Condition) -> None:
    found = after(before, OUT)
    assert (found.intent, found.target, found.is_patient) == (Operation.STOP, Target.STOPPED, True)
    assert (found.phase, found.drained, found.usable_endpoint) == (before.phase, ORDER, None)


def test_a_container_that_could_not_be_taken_over_is_stopped_too() -> None:
    assert after(replace(FAILED, container=RUNNING), OUT).intent is Operation.STOP


@pytest.mark.parametrize("before", [STOPPED, FAILED, replace(STOPPED, intent=Operation.START)])
@pytest.mark.parametrize("event", [OUT, OUT_RUNNING])
def test_where_nothing_runs_a_start_that_has_not_begun_is_taken_back(
    before: c.Condition, event: c.TakenOutOfService
) -> None:
    found = after(replace(before, target=Target.RUNNING), event)
    assert (found.intent, found.target, found.drained) == (None, Target.STOPPED, event.drained)


def test_a_container_that_is_to_run_on_gives_no_leases() -> None:
    found = after(READY, OUT_RUNNING)
    assert (found.phase, found.intent, found.target) == (Phase.READY, None, Target.RUNNING)
    assert (found.usable_endpoint, found.is_ready, found.is_in_service) == (None, False, False)
    assert READY.is_in_service


def test_a_start_of_what_is_to_run_on_goes_on() -> None:
    found = after(after(STARTING, OUT_RUNNING), c.BecameReady("http://a"))
    assert (found.phase, found.target, found.usable_endpoint) == (Phase.READY, Target.RUNNING, None)


@pytest.mark.parametrize("event", [OUT, OUT_RUNNING])
def test_a_stop_that_goes_on_is_not_followed_by_a_start(event: c.TakenOutOfService) -> None:
    wanted = replace(STOPPING, target=Target.RUNNING)
    found = after(wanted, event)
    assert (found.intent, found.target) == (Operation.STOP, Target.STOPPED)
    gone = after(found, c.Stopped(may_start=True))
    assert (gone.phase, gone.intent, gone.target, gone.drained) == (
        Phase.STOPPED,
        None,
        Target.STOPPED,
        event.drained,
    )


def test_an_order_to_stop_what_was_to_run_on_stops_it_and_the_other_way_round() -> None:
    kept = after(READY, OUT_RUNNING)
    assert after(kept, OUT).intent is Operation.STOP
    back = after(after(READY, OUT), OUT_RUNNING)
    assert (back.intent, back.target, back.drained) == (None, Target.RUNNING, KEEP)


def test_a_start_that_was_wanted_after_the_stop_does_not_follow_it() -> None:
    wanted = replace(STOPPING, target=Target.RUNNING, drained=ORDER)
    gone = after(wanted, c.Stopped(may_start=True))
    assert (gone.phase, gone.intent, gone.target) == (Phase.STOPPED, None, Target.STOPPED)


def test_before_the_first_listing_an_order_only_makes_sure_that_nothing_is_started() -> None:
    found = after(replace(NEW, target=Target.RUNNING), OUT)
    assert (found.phase, found.intent, found.target) == (Phase.UNAVAILABLE, None, Target.STOPPED)


@pytest.mark.parametrize("event", [c.StartRequested(explicit=True), c.RestartDue(), c.RestartRequested()])
@pytest.mark.parametrize("before", [STOPPED, FAILED, STOPPING, READY])
def test_nothing_starts_what_is_out_of_service(before: c.Condition, event: c.Event) -> None:
    out = replace(before, drained=KEEP, target=Target.STOPPED)
    if isinstance(event, c.RestartRequested) and before is READY:
        return  # refused by the caller: see `Replacing.refuse`
    found = after(out, event)
    assert (found.intent, found.target) == (out.intent, Target.STOPPED)


@pytest.mark.parametrize("drained", [ORDER, KEEP])
def test_the_end_of_a_container_out_of_service_is_told_and_nothing_starts_it(drained: Drained) -> None:
    found = after(replace(READY, pinned=True, drained=drained), c.Inspected(EXITED))
    assert (found.phase, found.target) == (Phase.FAILED, Target.STOPPED)
    failed = after(replace(STARTING, pinned=True, drained=drained), c.StartFailed(WHY))
    assert (failed.phase, failed.target) == (Phase.FAILED, Target.STOPPED)


# --- what is found ---


@pytest.mark.parametrize("unfinished", [None, *Operation])
def test_a_container_that_a_listing_finds_is_stopped_and_not_used(unfinished: Operation | None) -> None:
    found = after(replace(NEW, drained=ORDER), c.Listed(RUNNING, unfinished))
    assert (found.intent, found.target, found.usable_endpoint) == (Operation.STOP, Target.STOPPED, None)


def test_a_container_that_is_to_run_on_is_adopted_and_not_used() -> None:
    found = after(replace(NEW, drained=KEEP), c.Listed(RUNNING, None))
    assert (found.phase, found.intent) == (Phase.STARTING, Operation.START)
    assert after(found, c.BecameReady("http://a")).usable_endpoint is None


@pytest.mark.parametrize("unfinished", [None, Operation.START])
@pytest.mark.parametrize("container", [None, EXITED])
def test_a_listing_without_a_running_container_starts_nothing(
    container: Any, unfinished: Operation | None
) -> None:
    found = after(replace(NEW, drained=ORDER), c.Listed(container, unfinished))
    assert (found.phase, found.intent, found.failure) == (Phase.STOPPED, None, None)


@pytest.mark.parametrize("before", [STOPPED, FAILED])
def test_a_container_started_by_hand_is_stopped_again(before: c.Condition) -> None:
    found = after(replace(before, drained=ORDER, bury_at=NOW), c.Inspected(RUNNING))
    assert (found.intent, found.target, found.bury_at) == (Operation.STOP, Target.STOPPED, None)
    assert after(found, c.StopBegun()).phase is Phase.STOPPING
    kept = after(replace(before, drained=KEEP), c.Inspected(RUNNING))
    assert (kept.phase, kept.intent) == (Phase.STARTING, Operation.START)


# --- back in service ---


def test_a_stop_that_waits_for_leases_is_taken_back_and_the_container_inspected() -> None:
    for before in (STOP_OF_ORDER, after(STOP_OF_ORDER, c.DrainBegun())):
        found = after(before, BACK)
        assert (found.phase, found.intent, found.target) == (Phase.READY, None, Target.RUNNING)
        assert (found.drained, found.is_patient, found.look_at) == (None, False, NOW)
        assert found.usable_endpoint == READY.endpoint


def test_a_stop_that_has_begun_goes_on_and_the_next_start_follows_it() -> None:
    found = after(after(STOP_OF_ORDER, c.StopBegun()), BACK)
    assert (found.phase, found.intent, found.drained) == (Phase.STOPPING, Operation.STOP, None)
    wanted = after(found, c.StartRequested(explicit=False))
    assert after(wanted, c.Stopped(may_start=True)).intent is Operation.START


def test_a_plain_stop_of_what_is_drained_is_not_taken_back() -> None:
    plain = after(STOP_OF_ORDER, c.StopRequested())
    assert not plain.is_patient
    assert after(plain, BACK).intent is Operation.STOP


def test_what_ran_on_gives_leases_again_and_what_was_stopped_can_be_started() -> None:
    assert after(after(READY, OUT_RUNNING), BACK) == READY
    found = after(replace(STOPPED, drained=ORDER), BACK)
    assert found == STOPPED
    assert after(found, c.StartRequested(explicit=False)).intent is Operation.START
    assert after(READY, BACK) == READY


# --- restart ---


@pytest.mark.parametrize("before", [READY, STARTING, replace(FAILED, container=RUNNING)])
def test_a_restart_is_a_patient_stop_of_what_stays_wanted(before: c.Condition) -> None:
    found = after(before, c.RestartRequested())
    assert (found.intent, found.target, found.is_patient) == (Operation.STOP, Target.RUNNING, True)
    assert found.usable_endpoint is None


def test_after_the_stop_of_a_restart_comes_a_start() -> None:
    found = after(after(READY, c.RestartRequested()), c.StopBegun())
    gone = after(found, c.Stopped(may_start=True))
    assert (gone.phase, gone.intent, gone.is_patient) == (Phase.STOPPED, Operation.START, False)


@pytest.mark.parametrize("before", [STOPPED, FAILED])
def test_a_restart_of_what_does_not_run_is_a_start(before: c.Condition) -> None:
    found = after(replace(before, start_retry=c.Retry(1, NOW + 9)), c.RestartRequested())
    assert (found.intent, found.target, found.start_retry.at) == (Operation.START, Target.RUNNING, 0.0)


def test_a_restart_during_a_stop_is_the_start_after_it() -> None:
    found = after(STOPPING, c.RestartRequested())
    assert (found.intent, found.target) == (Operation.STOP, Target.RUNNING)


def test_a_stop_during_a_restart_has_the_last_word() -> None:
    found = after(after(READY, c.RestartRequested()), c.StopRequested())
    assert (found.target, found.is_patient) == (Target.STOPPED, False)


def test_an_order_during_a_restart_makes_a_drain_of_it() -> None:
    found = after(after(READY, c.RestartRequested()), OUT)
    assert (found.target, found.intent, found.is_patient) == (Target.STOPPED, Operation.STOP, True)


# --- whatever happens ---

ORDERS: st.SearchStrategy[c.Event] = st.one_of(
    st.builds(c.TakenOutOfService, st.sampled_from([ORDER, KEEP])),
    st.just(BACK),
    st.just(c.RestartRequested()),
)


@given(st.lists(EVENTS | ORDERS, max_size=40))
def test_whatever_happens_nothing_out_of_service_gives_leases_or_begins_a_start(
    events: list[c.Event],
) -> None:
    condition = NEW
    for event in events:
        if condition.phase is Phase.UNAVAILABLE and isinstance(event, c.BecameReady):
            continue  # an answer out of nowhere is for external servers only
        if condition.intent is not Operation.START and isinstance(event, c.StartBegun):
            continue  # only a requested start is begun: see `Starting.once`
        before = condition
        if isinstance(event, c.BecameReady) and before.phase is Phase.UNAVAILABLE:
            continue  # only an external server becomes ready so
        try:
            condition = after(condition, event)
        except IllegalTransitionError:
            continue
        if condition.drained is None:
            continue
        assert condition.usable_endpoint is None
        adopts = isinstance(event, c.Listed | c.Inspected) and condition.is_alive
        if condition.intent is Operation.START and not adopts:
            assert before.intent is Operation.START
        if condition.drained.stops and condition.phase is Phase.READY:
            assert condition.ends
