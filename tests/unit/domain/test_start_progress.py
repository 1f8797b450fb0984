"""The step of a start: memory, container, answer; each with the time that it has."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from manager.domain.instance import ContainerFacts, ContainerStatus, Phase
from manager.domain.start_progress import Begun, StartProgress, StartStep, start_progress

BEGUN = datetime(2026, 8, 1, 12, tzinfo=UTC)


def after(seconds: float) -> datetime:
    return BEGUN + timedelta(seconds=seconds)


def container(status: ContainerStatus, started_at: datetime | None = None) -> ContainerFacts:
    return ContainerFacts(id="c", name="c", image="i", status=status, started_at=started_at)


@pytest.mark.parametrize(
    ("facts", "begun", "expected"),
    [
        (None, Begun(BEGUN, after(9)), StartProgress(StartStep.MEMORY, BEGUN, after(9))),
        (None, Begun(BEGUN), StartProgress(StartStep.CONTAINER, BEGUN, None)),
        (container("created"), Begun(BEGUN), StartProgress(StartStep.CONTAINER, BEGUN, None)),
        (
            container("running", after(2)),
            Begun(BEGUN),
            StartProgress(StartStep.ANSWER, after(2), after(22)),
        ),
        (container("paused"), Begun(BEGUN), StartProgress(StartStep.ANSWER, BEGUN, after(20))),
        # Adopted: it has run for an hour, and its server has the whole time from the adoption on.
        (
            container("running", after(-3600)),
            Begun(BEGUN),
            StartProgress(StartStep.ANSWER, BEGUN, after(20)),
        ),
    ],
)
def test_the_step_follows_from_container_and_wait(
    facts: ContainerFacts | None, begun: Begun, expected: StartProgress
) -> None:
    assert start_progress(Phase.STARTING, facts, begun, start_timeout_s=20) == expected


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.STARTING])
def test_without_a_start_there_is_no_step(phase: Phase) -> None:
    assert start_progress(phase, container("running"), Begun(BEGUN), start_timeout_s=20) is None


def test_a_start_that_has_not_begun_has_no_step() -> None:
    assert start_progress(Phase.STARTING, None, None, start_timeout_s=20) is None
