"""The step that a start is at: what it waits for, since when, and how long at most."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from manager.domain.instance import ALIVE, Phase

if TYPE_CHECKING:
    from datetime import datetime

    from manager.domain.instance import ContainerFacts


class StartStep(StrEnum):
    """The steps in their order. An adopted container begins with the last one."""

    MEMORY = "memory"
    CONTAINER = "container"
    ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class StartProgress:
    """One step. `until` is the moment at which the start is given up, None where nothing limits the step."""

    step: StartStep
    since: datetime | None
    until: datetime | None


@dataclass(frozen=True, slots=True)
class Begun:
    """A start as it was begun.

    Attributes:
        at: the moment of that.
        memory_until: the end of the wait for memory of cards, None while it does not wait for any.
    """

    at: datetime
    memory_until: datetime | None = None


def start_progress(
    phase: Phase, container: ContainerFacts | None, begun: Begun | None, *, start_timeout_s: float
) -> StartProgress | None:
    """Return the step of a start; None where none goes on.

    Args:
        phase: of the instance.
        container: as last inspected.
        begun: the current or last start.
        start_timeout_s: how long its server may take to answer.
    """
    if phase is not Phase.STARTING or begun is None:
        return None
    if container is not None and container.status in ALIVE:
        since = container.started_at if container.started_at is not None else begun.at
        # An adopted container has run before: its server has the whole time from now on.
        since = max(since, begun.at)
        return StartProgress(StartStep.ANSWER, since, since + timedelta(seconds=start_timeout_s))
    if begun.memory_until is not None:
        return StartProgress(StartStep.MEMORY, begun.at, begun.memory_until)
    return StartProgress(StartStep.CONTAINER, begun.at, None)
