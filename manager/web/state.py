"""The state of an instance in one word, one colour and one shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

# Kinds have a colour and a shape each (`page.css`, `icons.html`), in order of concern.
BAD, WARN, WORK, OK, OFF = "bad", "warn", "work", "ok", "off"


class State(NamedTuple):
    """`kind` is one of the kinds above; `word` the name of a text in the table `state`."""

    kind: str
    word: str


_OF_PHASE = {
    "unavailable": State(BAD, "unavailable"),
    "failed": State(BAD, "failed"),
    "starting": State(WORK, "starting"),
    "draining": State(WORK, "draining"),
    "stopping": State(WORK, "stopping"),
    "stopped": State(OFF, "stopped"),
}


def instance_state(instance: Mapping[str, Any]) -> State:
    """Return the state of an instance as the API describes it."""
    if instance["phase"] != "ready":
        return _not_ready(instance)
    if instance["drained"]:
        return State(WARN, "drained")
    if instance["health"] == "unhealthy":
        return State(BAD, "unhealthy")
    if instance["breaker"]["state"] != "closed":
        return State(WARN, f"breaker_{instance['breaker']['state']}")
    if instance["in_flight"]:
        return State(OK, "in_use")
    return State(OK, "ready")


def _not_ready(instance: Mapping[str, Any]) -> State:
    if instance["phase"] == "stopped" and instance["target"] == "running":
        # A start was requested. With a reason it waits for a place.
        return State(WORK, "waiting" if instance["reason"] else "starting")
    state = _OF_PHASE[instance["phase"]]
    return State(OFF, "drained") if instance["drained"] and state.kind == OFF else state
