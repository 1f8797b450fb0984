"""The one table of transitions. Whatever is not in it is a defect and raises."""

from __future__ import annotations

from enum import Enum

from manager.domain.instance import Phase
from manager.errors import IllegalTransitionError


class Fact(Enum):
    """Something that has happened to an instance."""

    FOUND_ABSENT = "the engine lists no container of it"
    FOUND_RUNNING = "the engine lists a running container of it that we did not just start"
    FOUND_DEAD = "the engine lists a container of it that has ended"
    START_BEGUN = "a start was begun"
    BECAME_READY = "its HTTP server answered"
    START_FAILED = "the start ended without a ready server"
    DRAIN_BEGUN = "it takes no new leases and waits for the open ones"
    DRAIN_ENDED = "it takes new leases again: the stop was taken back while open ones were waited for"
    STOP_BEGUN = "its container is being ended"
    DIED = "its container ended without us"
    DIED_IN_DRAIN = "its container ended without us while leases were waited for"
    PARKED = "its server was stopped from outside, in order"
    REMOVED = "its container is gone and what it held is given back"
    LOST = "an external server stopped answering"


_TABLE: dict[tuple[Phase, Fact], Phase] = {
    # Before the first listing of the engine nothing is known.
    (Phase.UNAVAILABLE, Fact.FOUND_ABSENT): Phase.STOPPED,
    (Phase.UNAVAILABLE, Fact.FOUND_RUNNING): Phase.STARTING,
    (Phase.UNAVAILABLE, Fact.FOUND_DEAD): Phase.FAILED,
    # A container that somebody started by hand is adopted like one found after our own restart.
    (Phase.STOPPED, Fact.FOUND_RUNNING): Phase.STARTING,
    (Phase.FAILED, Fact.FOUND_RUNNING): Phase.STARTING,
    (Phase.READY, Fact.FOUND_RUNNING): Phase.STARTING,
    (Phase.STOPPED, Fact.START_BEGUN): Phase.STARTING,
    (Phase.FAILED, Fact.START_BEGUN): Phase.STARTING,
    (Phase.STARTING, Fact.BECAME_READY): Phase.READY,
    (Phase.STARTING, Fact.START_FAILED): Phase.FAILED,
    (Phase.STARTING, Fact.STOP_BEGUN): Phase.STOPPING,
    (Phase.STARTING, Fact.DIED): Phase.FAILED,
    (Phase.READY, Fact.DRAIN_BEGUN): Phase.DRAINING,
    (Phase.READY, Fact.STOP_BEGUN): Phase.STOPPING,
    (Phase.READY, Fact.DIED): Phase.FAILED,
    (Phase.READY, Fact.PARKED): Phase.STOPPED,
    (Phase.DRAINING, Fact.DRAIN_ENDED): Phase.READY,
    # What dies while it is being stopped was going to end anyway: the stop goes on and cleans up.
    (Phase.DRAINING, Fact.DIED_IN_DRAIN): Phase.STOPPING,
    (Phase.DRAINING, Fact.STOP_BEGUN): Phase.STOPPING,
    (Phase.FAILED, Fact.STOP_BEGUN): Phase.STOPPING,
    (Phase.STOPPING, Fact.REMOVED): Phase.STOPPED,
    # A stop that was begun by a daemon that is no more.
    (Phase.UNAVAILABLE, Fact.STOP_BEGUN): Phase.STOPPING,
    # An external server is only ever there or not there.
    (Phase.UNAVAILABLE, Fact.BECAME_READY): Phase.READY,
    (Phase.READY, Fact.LOST): Phase.UNAVAILABLE,
}


def advance(phase: Phase, fact: Fact) -> Phase:
    """The phase after `fact`.

    Raises:
        IllegalTransitionError: the table has no such row.
    """
    try:
        return _TABLE[phase, fact]
    except KeyError:
        raise IllegalTransitionError(phase.value, f"{fact.value} ({fact.name})") from None
