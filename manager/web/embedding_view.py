"""The embeddings runtime as the page `roles` shows it: which model, where, and what has become of that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.domain.instance import DeviceKind
from manager.domain.models import model_key
from manager.domain.roles import Policy, RequestKind
from manager.web.page import Fragment
from manager.web.state import BAD, OFF, OK, State, instance_state
from manager.wire.details import details_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.api.backend import Backend
    from manager.web.page import Sections

_ROLE = "embedding"
_UP = ("ready", "draining")
_GONE = ("unavailable", "failed")


def embedding_facts(backend: Backend) -> Mapping[str, Any]:
    """Return what the live sections do not say of the role `embedding`: plain values.

    `dimensions` is the length of vectors, None where no server has said it; `is_unread` says that asking may
    help.
    """
    routing = backend.model_settings.routing
    role = routing.roles[_ROLE]
    serving = [
        one.id
        for one in backend.fleet.instances()
        if not one.spec.is_paid and RequestKind.EMBED in one.spec.serves
    ]
    known = None if role.model is None else backend.overviews.models().get(model_key(role.model))
    changes = routing.changes_for(role.model or "", _ROLE)
    asked = changes.overrides.get("dimensions")
    length = details_of(known.entry).embedding_length if known else None
    return {
        "model": role.model,
        "policy": role.policy,
        "target": role.target,
        "serving": serving,
        "unread": [one.id for one in backend.router.snapshot().unread()],
        "dimensions": asked if isinstance(asked, int) else length,
        "is_asked": isinstance(asked, int),
        "instances": list(known.instances) if known else [],
        "loaded_on": list(known.loaded_on) if known else [],
        "is_unread": known is not None and length is None,
    }


def embedding_fragment(sections: Sections) -> Fragment:
    """Return what is in effect for embeddings, and whether it is what was asked for."""
    facts, now = sections["embedding"], sections["routing"][_ROLE]
    devices = {one["id"]: one["device"] for one in sections["instances"]}
    device = devices.get(now["effective_target"])
    context = {
        "model": now["model"],
        "dimensions": facts["dimensions"],
        "is_asked": facts["is_asked"],
        "effective_target": now["effective_target"],
        "requested_target": now["requested_target"],
        "reason": now["fallback_reason"],
        "message": now["message"],
        "device": device and {name: device[name] for name in ("kind", "index", "name")},
        "fell_to_cpu": _fell_to_cpu(facts["policy"], now, devices),
        "last": _last(sections["requests"], devices),
    }
    return Fragment("roles/embedding.html", context)


def _fell_to_cpu(policy: str, now: Mapping[str, Any], devices: Mapping[str, Any]) -> bool:
    device = devices.get(now["effective_target"])
    if device is None or device["kind"] != DeviceKind.CPU:
        return False
    wanted = devices.get(now["requested_target"])
    is_from_gpu = wanted is not None and wanted["kind"] == DeviceKind.GPU
    return policy == Policy.PREFER_GPU or (now["fallback_reason"] is not None and is_from_gpu)


def _last(requests: list[dict[str, Any]], devices: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the last embedding request where it was answered elsewhere than it was meant to be."""
    found = next((one for one in requests if one["role"] == _ROLE and not one["open"]), None)
    if found is None or not found["fallback"]:
        return None
    device = devices.get(found["effective_target"])
    return {
        "request_id": found["request_id"],
        "effective_target": found["effective_target"],
        "reason": found["fallback_reason"],
        "kind": device and device["kind"],
    }


def health_fragment(sections: Sections) -> Fragment:
    """Return a card for each instance that could embed."""
    facts = sections["embedding"]
    cards = [
        {
            "id": one["id"],
            "state": runtime_state(one),
            "detail": instance_state(one),
            "device": {name: one["device"][name] for name in ("kind", "index", "name")},
            "reason": one["reason"]["message"] if one["reason"] else None,
            "model": facts["model"],
            "has_model": one["id"] in facts["instances"],
            "is_unread": one["id"] in facts["unread"],
            "is_loaded": one["id"] in facts["loaded_on"],
            "is_target": one["id"] == facts["target"],
            "in_effect": one["id"] == sections["routing"][_ROLE]["effective_target"],
            "is_allowed": facts["policy"] != Policy.CPU_ONLY or one["device"]["kind"] == DeviceKind.CPU,
        }
        for one in sections["instances"]
        if one["id"] in facts["serving"]
    ]
    return Fragment("roles/health.html", {"cards": cards})


def runtime_state(instance: Mapping[str, Any]) -> State:
    """Return Running, Stopped or Unavailable: whether an instance answers, could be started, or cannot."""
    phase = instance["phase"]
    if phase in _GONE or (phase in _UP and instance["health"] == "unhealthy"):
        return State(BAD, "runtime_unavailable")
    if phase in _UP:
        return State(OK, "runtime_running")
    return State(OFF, "runtime_stopped")
