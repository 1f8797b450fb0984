"""The instances: a card for each, with everything that an operator can do to it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from manager.domain.instance import MANAGED_DRIVERS
from manager.web.controls import TELLING, can_stop_now, main_controls, more_controls
from manager.web.page import Fragment, Page, element_id
from manager.web.speeds import instance_speeds
from manager.web.state import instance_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import Request

    from manager.api.backend import Backend
    from manager.web.page import Sections
    from manager.web.viewer import Viewer

# Below this share a card shows it: sizes of servers are rounded.
_WHOLE_SHARE = 0.995


def _fragments(sections: Sections, _viewer: Viewer) -> Mapping[str, Fragment]:
    instances: list[dict[str, Any]] = sections["instances"]
    slots = {one["id"]: one for one in sections["lanes"]["instances"]}
    speeds = instance_speeds(sections["requests"])
    states = Counter(instance_state(one) for one in instances)
    return {
        "summary": Fragment("instances/summary.html", {"states": states, "count": len(instances)}),
        **{
            element_id("instance", one["id"]): Fragment(
                "instances/card.html",
                _card(one, slots.get(one["id"]), speeds.get(one["id"]), sections["models"]),
            )
            for one in instances
        },
    }


def _card(
    instance: Mapping[str, Any],
    slots: Mapping[str, Any] | None,
    speed: float | None,
    models: list[dict[str, Any]],
) -> dict[str, Any]:
    id_ = instance["id"]
    loadable = [one["name"] for one in models if id_ in one["instances"] and id_ not in one["loaded_on"]]
    main, more = main_controls(instance), more_controls(instance, loadable)
    shown = (
        "driver", "protocol", "node", "template", "image", "endpoint", "target", "phase", "health", "reason",
        "start", "in_flight", "pinned", "ttl_s", "ttl_ends_at", "started_at", "starts", "container",
        "image_override", "drained", "lifted", "rules", "loading", "breaker",
    )  # fmt: skip
    return {
        "one": {"id": id_, **{name: instance[name] for name in shown}},
        "state": instance_state(instance),
        "device": _device(instance["device"]),
        "models": [_model(one, is_gpu=instance["device"]["kind"] != "cpu") for one in instance["models"]],
        "loadable": loadable,
        "slots": slots["slots"] if slots else None,
        "queued": slots["queued"] if slots else 0,
        "speed": None if speed is None else round(speed, 1 if speed < 10 else None),  # noqa: PLR2004
        "main": main,
        "more": more,
        "hints": _hints({why for why in (main | more).values() if why in TELLING}),
        "can_stop_now": can_stop_now(instance),
        "is_managed": instance["driver"] in MANAGED_DRIVERS,
    }


def _hints(whys: set[str]) -> list[str]:
    """Return what is told below the buttons; `drained_runs` says all that `drained` says."""
    return sorted(whys - {"drained"} if "drained_runs" in whys else whys)


def _device(device: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a card shows of a device: nothing of its memory, which changes with every reading."""
    cards = [
        {"index": one["index"], "name": one["name"] or one["uuid"], "host": one["host"]}
        for one in device["cards"]
    ]
    return {"kind": device["kind"], "cards": cards}


def _model(model: Mapping[str, Any], *, is_gpu: bool) -> dict[str, Any]:
    size = model["size_bytes"]
    share = min(1.0, model["vram_bytes"] / size) if size else None
    return {
        "name": model["name"],
        "size_bytes": size or None,
        "vram_bytes": model["vram_bytes"],
        "share": share,
        "is_offloaded": is_gpu and share is not None and share < _WHOLE_SHARE,
        "expires_at": model["expires_at"],
    }


async def _context(backend: Backend, viewer: Viewer, _request: Request) -> Mapping[str, Any]:
    return {"images": sorted(backend.fleet.images()) if viewer.may("operator") else []}


INSTANCES = Page("instances", "/ui/instances", fragments=_fragments, context=_context)
