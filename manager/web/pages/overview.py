"""The overview: the whole machine on one screen."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from manager.web.devices import card_parts, fills_of, on_device
from manager.web.page import Fragment, Page, element_id
from manager.web.state import BAD, WARN, instance_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.web.page import Sections
    from manager.web.viewer import Viewer

_MOST_REQUESTS = 8
_MOST_PROBLEMS = 8


def _fragments(sections: Sections, _viewer: Viewer) -> Mapping[str, Fragment]:
    instances: list[dict[str, Any]] = sections["instances"]
    lanes, slots = sections["lanes"]["lanes"], {one["id"]: one for one in sections["lanes"]["instances"]}
    return {
        "verdict": Fragment("overview/verdict.html", _verdict(instances, sections["gpus"])),
        **_devices(instances, sections["gpus"]["gpus"], slots),
        "lanes": Fragment("overview/lanes.html", {"lanes": lanes}),
        "requests": Fragment("overview/requests.html", {"requests": _requests(sections["requests"])}),
    }


def _verdict(instances: list[dict[str, Any]], gpus: Mapping[str, Any]) -> dict[str, Any]:
    states = {one["id"]: instance_state(one) for one in instances}
    problems = [one for one in instances if states[one["id"]].kind in (BAD, WARN)]
    problems.sort(key=lambda one: states[one["id"]].kind != BAD)
    worst = next((states[one["id"]].kind for one in problems), "ok")
    lost = [gpu for gpu in gpus["gpus"] if gpu["lost"]]
    return {
        "kind": BAD if lost else worst,
        "counts": Counter(state.word for state in states.values()),
        "problems": [
            {"id": one["id"], "state": states[one["id"]], "reason": one["reason"], "breaker": one["breaker"]}
            for one in problems[:_MOST_PROBLEMS]
        ],
        "more": max(0, len(problems) - _MOST_PROBLEMS),
        "lost": [{"name": gpu["name"], "index": gpu["index"], "why": gpu["lost"]} for gpu in lost],
        "gpu_error": gpus["error"],
    }


def _devices(
    instances: list[dict[str, Any]], gpus: list[dict[str, Any]], slots: Mapping[str, Any]
) -> dict[str, Fragment]:
    fills = fills_of(instances)
    rows = {one["id"]: _row(one, slots.get(one["id"]), fills) for one in instances}
    found = {
        element_id("card", gpu["uuid"]): Fragment(
            "overview/device.html",
            {
                "gpu": gpu,
                "title": None,
                "parts_of": card_parts(gpu, fills),
                "rows": [rows[one["id"]] for one in instances if on_device(one, gpu["uuid"])],
            },
        )
        for gpu in gpus
    }
    for kind in ("cpu", "gpu", "external", "cloud"):
        known = {gpu["uuid"] for gpu in gpus}
        here = [
            rows[one["id"]]
            for one in instances
            if _place(one) == kind and not any(on_device(one, uuid) for uuid in known)
        ]
        if here:
            context = {"gpu": None, "title": kind, "parts_of": [], "rows": here}
            found[f"place-{kind}"] = Fragment("overview/device.html", context)
    return found


def _place(instance: Mapping[str, Any]) -> str:
    driver: str = instance["driver"]
    if driver != "docker":
        return driver
    return "cpu" if instance["device"]["kind"] == "cpu" else "gpu"


def _row(
    instance: Mapping[str, Any], slots: Mapping[str, Any] | None, fills: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "id": instance["id"],
        "fill": fills[instance["id"]],
        "state": instance_state(instance),
        "models": [model["name"] for model in instance["models"]],
        "in_flight": instance["in_flight"],
        "slots": slots["slots"] if slots else None,
        "ttl_ends_at": instance["ttl_ends_at"],
        "pinned": instance["pinned"],
        "phase": instance["phase"],
    }


def _requests(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("request_id", "open", "role", "model", "effective_target", "requested_target", "outcome")
    more = ("fallback", "fallback_reason", "project_id")
    return [
        {
            **{name: one[name] for name in (*names, *more)},
            # The duration of an open request is a clock.
            "duration_ms": None if one["open"] else one["duration_ms"],
        }
        for one in requests[:_MOST_REQUESTS]
    ]


OVERVIEW = Page("overview", "/ui", fragments=_fragments)
