from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.instance import Explanation, Health, Phase
from manager.domain.shown import shown
from manager.errors import Reason

STOP = Explanation(Reason.START_FAILED, "it could not be stopped yet")
FAILURE = Explanation(Reason.CONTAINER_EXITED, "it ended")


def seen(
    phase: Phase,
    *,
    health: Health = Health.HEALTHY,
    engine: str | None = None,
    gpu: str | None = None,
    explanations: tuple[Explanation | None, ...] = (None, None),
) -> tuple[Phase, Explanation | None]:
    unusable = None if gpu is None else Explanation(Reason.GPU_MISSING, gpu)
    return shown(phase, health, engine_trouble=engine, unusable=unusable, explanations=explanations)


@pytest.mark.parametrize("phase", list(Phase))
def test_a_phase_without_trouble_is_shown_as_it_is_and_without_a_reason(phase: Phase) -> None:
    assert seen(phase) == (phase, None)


def test_the_most_important_explanation_is_shown() -> None:
    assert seen(Phase.STOPPING, explanations=(STOP, FAILURE))[1] is STOP
    assert seen(Phase.FAILED, explanations=(None, FAILURE))[1] is FAILURE


@pytest.mark.parametrize("phase", [Phase.STOPPED, Phase.FAILED, Phase.UNAVAILABLE])
def test_without_an_engine_what_does_not_run_is_unavailable(phase: Phase) -> None:
    assert seen(phase, engine="it is away", explanations=(FAILURE,)) == (
        Phase.UNAVAILABLE,
        Explanation(Reason.ENGINE_UNAVAILABLE, "it is away"),
    )


@pytest.mark.parametrize("phase", [Phase.READY, Phase.DRAINING])
@pytest.mark.parametrize(
    ("health", "usable"), [(Health.HEALTHY, True), (Health.UNKNOWN, True), (Health.UNHEALTHY, False)]
)
def test_without_an_engine_what_answers_is_there_all_the_same(
    phase: Phase, health: Health, usable: bool
) -> None:
    there, why = seen(phase, health=health, engine="it is away")
    assert there is (phase if usable else Phase.UNAVAILABLE)
    assert why is not None
    assert why.code is Reason.ENGINE_UNAVAILABLE


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.STOPPING])
def test_without_an_engine_what_is_being_moved_is_tracked_on(phase: Phase) -> None:
    assert seen(phase, health=Health.UNHEALTHY, engine="it is away")[0] is phase


@pytest.mark.parametrize("phase", [Phase.STOPPED, Phase.FAILED])
def test_what_could_not_be_started_for_want_of_its_card_is_unavailable(phase: Phase) -> None:
    assert seen(phase, gpu="no card", explanations=(FAILURE,)) == (
        Phase.UNAVAILABLE,
        Explanation(Reason.GPU_MISSING, "no card"),
    )


@pytest.mark.parametrize("phase", sorted(set(Phase) - {Phase.STOPPED, Phase.FAILED}))
def test_what_runs_is_not_taken_away_because_its_card_cannot_be_seen(phase: Phase) -> None:
    assert seen(phase, gpu="no card", explanations=(None, FAILURE)) == (phase, FAILURE)


@given(st.sampled_from(Phase), st.sampled_from(Health), st.none() | st.text(), st.none() | st.text())
def test_what_is_unavailable_for_a_known_cause_says_so(
    phase: Phase, health: Health, engine: str | None, gpu: str | None
) -> None:
    there, why = seen(phase, health=health, engine=engine, gpu=gpu)
    assert there in (phase, Phase.UNAVAILABLE)
    if there is not phase:
        assert why is not None
        assert why.message == (gpu if engine is None else engine)


def test_a_running_container_without_its_card_is_unavailable_and_says_why() -> None:
    lost = Explanation(Reason.GPU_MISSING, "the card is gone")
    seen = shown(
        Phase.READY, Health.HEALTHY, engine_trouble=None, unusable=lost, explanations=(), card_lost=True
    )
    assert seen == (Phase.UNAVAILABLE, lost)
