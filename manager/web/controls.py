"""The controls of an instance: which of them take effect in its state, and why the others do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.domain.instance import MANAGED_DRIVERS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ALIVE = ("starting", "ready", "draining", "stopping")
# Reasons that say what keeps an instance from running; the others are plain from its phase.
TELLING = frozenset({"drained", "drained_runs", "engine", "unusable", "waits"})


def main_controls(instance: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the controls that each card has, by name: None, or the name of the text that says why not.

    The same instance always has the same ones, so that no button moves when its state changes.
    """
    drained = instance["drained"] is not None
    last = {"resume": None} if drained else {"drain": None}
    if instance["driver"] not in MANAGED_DRIVERS:
        return dict(last)
    return {
        "start": _why_no_start(instance),
        "stop": _why_no_stop(instance),
        "restart": _why_no_restart(instance),
        **last,
    }


def more_controls(instance: Mapping[str, Any], loadable: Sequence[str]) -> dict[str, str | None]:
    """Return the controls that an instance has besides; one without any meaning for it is left out.

    Args:
        instance: as the API describes it.
        loadable: the models that it has and that are not in its memory.
    """
    found: dict[str, str | None] = {}
    if instance["breaker"]["state"] != "closed":
        found["reset"] = None
    if instance["protocol"] == "ollama" and loadable:
        found["load"] = _why_no_load(instance)
    if instance["driver"] in MANAGED_DRIVERS:
        found["unpin" if instance["pinned"] else "pin"] = None
        found["ttl"] = None
        found["image"] = _why_no_image(instance)
        if instance["image_override"]:
            found["rollback"] = _why_no_image(instance)
    if instance["lifted"]:
        found["end_lift"] = None
    elif instance["rules"]:
        found["lift"] = None
    return found


def can_stop_now(instance: Mapping[str, Any]) -> bool:
    """Return whether a stop waits, or would wait, for open requests."""
    waits = instance["phase"] == "draining" or (instance["phase"] == "ready" and instance["in_flight"] > 0)
    return waits and instance["driver"] in MANAGED_DRIVERS and not _engine_is_away(instance)


def _why_no_start(instance: Mapping[str, Any]) -> str | None:
    if instance["phase"] in _ALIVE:
        return "runs" if instance["phase"] in ("starting", "ready") else "ends"
    if instance["drained"]:
        return "drained"
    if _engine_is_away(instance):
        return "engine"
    if instance["phase"] == "unavailable":
        return "unusable"
    return "waits" if instance["phase"] == "stopped" and instance["target"] == "running" else None


def _why_no_stop(instance: Mapping[str, Any]) -> str | None:
    phase = instance["phase"]
    if phase in ("draining", "stopping"):
        return "ends"
    if phase not in _ALIVE and instance["target"] == "stopped":
        return "stopped"
    return "engine" if _engine_is_away(instance) else None


def _why_no_restart(instance: Mapping[str, Any]) -> str | None:
    if instance["phase"] != "ready":
        return "ends" if instance["phase"] in ("draining", "stopping") else "not_ready"
    if instance["drained"]:
        return "drained"
    return "engine" if _engine_is_away(instance) else None


def _why_no_image(instance: Mapping[str, Any]) -> str | None:
    if _engine_is_away(instance):
        return "engine"
    if instance["drained"]:
        return "drained_runs" if instance["phase"] in _ALIVE else None
    return "unusable" if instance["phase"] == "unavailable" else None


def _why_no_load(instance: Mapping[str, Any]) -> str | None:
    if instance["drained"]:
        return "drained"
    if _engine_is_away(instance):
        return "engine"
    if instance["phase"] in ("draining", "stopping"):
        return "ends"
    return "unusable" if instance["phase"] == "unavailable" else None


def _engine_is_away(instance: Mapping[str, Any]) -> bool:
    reason = instance["reason"]
    return reason is not None and reason["code"] == "engine_unavailable"
