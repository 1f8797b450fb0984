from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.instance import Phase
from manager.domain.lifecycle import Fact, advance
from manager.errors import IllegalTransitionError


def after(phase: Phase, fact: Fact) -> Phase | None:
    try:
        return advance(phase, fact)
    except IllegalTransitionError:
        return None


TABLE = {
    (phase, fact): there for phase, fact in product(Phase, Fact) if (there := after(phase, fact)) is not None
}


def walked(*facts: Fact, begin: Phase = Phase.UNAVAILABLE) -> list[Phase]:
    phases = []
    for fact in facts:
        begin = advance(begin, fact)
        phases.append(begin)
    return phases


def test_a_whole_life_goes_from_absent_over_ready_to_stopped() -> None:
    assert walked(
        Fact.FOUND_ABSENT,
        Fact.START_BEGUN,
        Fact.BECAME_READY,
        Fact.DRAIN_BEGUN,
        Fact.STOP_BEGUN,
        Fact.REMOVED,
    ) == [Phase.STOPPED, Phase.STARTING, Phase.READY, Phase.DRAINING, Phase.STOPPING, Phase.STOPPED]


def test_an_illegal_transition_raises_and_names_phase_and_fact() -> None:
    with pytest.raises(
        IllegalTransitionError, match=r"no transition from stopped when .*answered \(BECAME_READY\)"
    ):
        advance(Phase.STOPPED, Fact.BECAME_READY)


@pytest.mark.parametrize("phase", [Phase.UNAVAILABLE, Phase.STOPPED, Phase.FAILED, Phase.READY])
def test_a_container_that_runs_is_adopted_as_one_that_starts(phase: Phase) -> None:
    assert advance(phase, Fact.FOUND_RUNNING) is Phase.STARTING


@pytest.mark.parametrize("phase", [Phase.STOPPING, Phase.DRAINING])
def test_a_container_that_is_on_its_way_out_is_not_adopted(phase: Phase) -> None:
    with pytest.raises(IllegalTransitionError):
        advance(phase, Fact.FOUND_RUNNING)


def test_a_failed_start_is_not_the_end() -> None:
    assert walked(Fact.START_FAILED, Fact.START_BEGUN, begin=Phase.STARTING) == [Phase.FAILED, Phase.STARTING]


def test_what_dies_while_it_is_drained_goes_on_being_stopped() -> None:
    assert advance(Phase.DRAINING, Fact.DIED_IN_DRAIN) is Phase.STOPPING


def test_an_external_server_comes_and_goes() -> None:
    assert walked(Fact.BECAME_READY, Fact.LOST, Fact.BECAME_READY) == [
        Phase.READY,
        Phase.UNAVAILABLE,
        Phase.READY,
    ]


def test_every_phase_can_be_reached_and_left() -> None:
    assert set(TABLE.values()) == set(Phase)
    assert {phase for phase, _ in TABLE} == set(Phase)


def test_every_fact_is_legal_somewhere() -> None:
    assert {fact for _, fact in TABLE} == set(Fact)


def test_only_a_removed_container_ends_a_stop() -> None:
    assert [fact for phase, fact in TABLE if phase is Phase.STOPPING] == [Fact.REMOVED]


def test_ready_is_only_what_has_answered() -> None:
    to_ready = {fact for (_, fact), there in TABLE.items() if there is Phase.READY}
    assert to_ready == {Fact.BECAME_READY, Fact.DRAIN_ENDED}


def test_a_drain_that_is_taken_back_leads_from_where_it_began_to_there() -> None:
    assert walked(Fact.DRAIN_BEGUN, Fact.DRAIN_ENDED, begin=Phase.READY) == [Phase.DRAINING, Phase.READY]
    assert [phase for phase, fact in TABLE if fact is Fact.DRAIN_ENDED] == [Phase.DRAINING]


def test_every_phase_with_a_container_can_be_stopped() -> None:
    for phase in (Phase.STARTING, Phase.READY, Phase.DRAINING, Phase.FAILED, Phase.UNAVAILABLE):
        assert walked(Fact.STOP_BEGUN, Fact.REMOVED, begin=phase) == [Phase.STOPPING, Phase.STOPPED]


@given(st.lists(st.sampled_from(Fact), max_size=30))
def test_whatever_happens_a_container_instance_is_unavailable_only_before_the_first_listing(
    facts: list[Fact],
) -> None:
    phase = Phase.UNAVAILABLE
    for fact in facts:
        # LOST and an answer out of nowhere are for external servers only.
        if fact is Fact.LOST or (phase is Phase.UNAVAILABLE and fact is Fact.BECAME_READY):
            continue
        before, phase = phase, after(phase, fact) or phase
        assert before is Phase.UNAVAILABLE or phase is not Phase.UNAVAILABLE


@pytest.mark.parametrize("phase", Phase)
def test_only_what_was_ready_is_stopped_by_being_scaled_to_zero(phase: Phase) -> None:
    assert after(phase, Fact.PARKED) is (Phase.STOPPED if phase is Phase.READY else None)
