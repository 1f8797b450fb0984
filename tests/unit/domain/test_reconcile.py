from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.instance import Phase, Target
from manager.domain.reconcile import (
    Action,
    Bury,
    Look,
    Recreate,
    Situation,
    Start,
    Stop,
    Wait,
    next_action,
)
from manager.domain.registry import Operation

NOW = 1000.0
QUIET_S = 15.0
CALM = Situation(
    now=NOW,
    engine_up=True,
    target=Target.STOPPED,
    phase=Phase.STOPPED,
    intent=None,
    retry_at=0.0,
    look_at=None,
    bury_at=None,
    recreate_at=None,
    unused_since=None,
    quiet_s=QUIET_S,
)
READY = replace(CALM, target=Target.RUNNING, phase=Phase.READY)
FAILED = replace(CALM, phase=Phase.FAILED)

times = st.floats(min_value=0, max_value=1e6)
perhaps = st.none() | times
situations = st.builds(
    Situation,
    now=times,
    engine_up=st.booleans(),
    target=st.sampled_from(Target),
    phase=st.sampled_from(Phase),
    intent=st.none() | st.sampled_from(Operation),
    retry_at=times,
    look_at=st.none() | st.floats(-10, 10),
    bury_at=perhaps,
    recreate_at=perhaps,
    unused_since=perhaps,
    quiet_s=st.floats(min_value=0, max_value=100),
)


@pytest.mark.parametrize("situation", [CALM, READY, FAILED])
def test_without_a_reason_nothing_is_done(situation: Situation) -> None:
    assert next_action(situation) == Wait(None)


@pytest.mark.parametrize(("intent", "action"), [(Operation.START, Start()), (Operation.STOP, Stop())])
def test_what_was_asked_for_is_done(intent: Operation, action: Action) -> None:
    assert next_action(replace(READY, intent=intent)) == action


@pytest.mark.parametrize("intent", list(Operation))
def test_what_has_failed_is_tried_again_only_after_a_while(intent: Operation) -> None:
    assert next_action(replace(READY, intent=intent, retry_at=NOW + 4)) == Wait(4)
    assert next_action(replace(READY, intent=intent, retry_at=NOW)) == next_action(
        replace(READY, intent=intent)
    )


def test_a_reason_to_look_comes_before_everything_but_an_operation() -> None:
    due = replace(READY, look_at=0, bury_at=0, recreate_at=0, unused_since=0)
    assert next_action(due) == Look()
    assert next_action(replace(due, intent=Operation.STOP)) == Stop()
    assert next_action(replace(due, intent=Operation.STOP, retry_at=NOW + 1)) == Wait(1)


def test_only_what_should_run_is_started_again_after_a_failure() -> None:
    wanted = replace(FAILED, target=Target.RUNNING, retry_at=NOW + 1)
    assert next_action(wanted) == Wait(1)
    assert next_action(replace(wanted, now=NOW + 1)) == Start()
    assert next_action(replace(wanted, target=Target.STOPPED, now=NOW + 1)) == Wait(None)


def test_an_ended_container_is_buried_in_time_unless_it_is_started_again() -> None:
    ended = replace(FAILED, bury_at=NOW + 15)
    assert next_action(ended) == Wait(15)
    assert next_action(replace(ended, now=NOW + 15)) == Bury()
    assert next_action(replace(ended, now=NOW + 15, target=Target.RUNNING)) == Start()


def test_a_container_is_recreated_when_it_is_both_time_and_quiet() -> None:
    stale = replace(READY, recreate_at=NOW + 5, unused_since=NOW + 9 - QUIET_S)
    assert next_action(stale) == Wait(9)
    assert next_action(replace(stale, recreate_at=NOW + 11)) == Wait(11)
    assert next_action(replace(stale, now=NOW + 9)) == Recreate()


@pytest.mark.parametrize("quiet_s", [QUIET_S, 0.0])
def test_a_recreation_that_is_due_while_the_container_is_in_use_is_looked_at_again(quiet_s: float) -> None:
    used = replace(READY, recreate_at=0.0, unused_since=None, quiet_s=quiet_s)
    action = next_action(used)
    assert action == Wait(quiet_s or 1.0)
    # The last lease is given back, and no notice of it arrives: the end of the wait finds it.
    released = replace(used, now=NOW + 20, unused_since=NOW + 1)
    assert next_action(released) == Recreate()


def test_a_recreation_that_is_due_later_is_waited_for_even_in_use() -> None:
    used = replace(READY, recreate_at=NOW + 100, unused_since=None)
    assert next_action(used) == Wait(100)


@pytest.mark.parametrize("changes", [{"recreate_at": None}, {"phase": Phase.STARTING}])
def test_a_container_in_order_is_not_recreated(changes: dict[str, Phase | None]) -> None:
    stale = replace(READY, recreate_at=0.0, unused_since=0.0)
    assert next_action(replace(stale, **changes)) == Wait(None)  # type: ignore[arg-type]


@given(situations)
def test_without_an_engine_everything_waits_for_it(situation: Situation) -> None:
    assert next_action(replace(situation, engine_up=False)) == Wait(None)


@given(situations)
def test_a_wait_is_never_in_vain(situation: Situation) -> None:
    action = next_action(situation)
    if isinstance(action, Wait) and action.for_s is not None:
        assert action.for_s > 0
        # A float may be so large that what is left is lost in it: a little later is late enough.
        later = replace(situation, now=situation.now + action.for_s + 1e-3)
        if situation.unused_since is None:
            later = replace(later, unused_since=situation.now)  # its last lease was given back
        assert not isinstance(next_action(later), Wait)


@given(situations)
def test_nothing_is_begun_on_its_own_while_an_operation_was_asked_for(situation: Situation) -> None:
    action = next_action(situation)
    if situation.intent is Operation.STOP:
        assert isinstance(action, Stop | Wait)
    elif situation.intent is Operation.START:
        assert isinstance(action, Start | Wait)
    else:
        assert not isinstance(action, Stop)


@given(situations)
def test_only_a_ready_container_is_recreated_and_only_a_failed_one_started_by_itself(
    situation: Situation,
) -> None:
    action = next_action(situation)
    if isinstance(action, Recreate):
        assert situation.phase is Phase.READY
    if isinstance(action, Start) and situation.intent is None:
        assert (situation.phase, situation.target) == (Phase.FAILED, Target.RUNNING)
