"""The cards: who holds their memory, what they measure now, and how that was over the last hour or day."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.services.gpus.history import Span
from manager.web.devices import by_card, card_parts, fills_of
from manager.web.page import Fragment, Page, element_id
from manager.web.state import instance_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fastapi import Request

    from manager.api.backend import Backend
    from manager.web.page import Sections
    from manager.web.viewer import Viewer

_MOST_PROCESSES = 24
_SHORT_UUID = 12
_SHOWN = (
    "uuid", "index", "pci_bus_id", "name", "vram_total_bytes", "vram_used_bytes", "vram_free_bytes",
    "reserved_bytes", "lost", "host", "memory_unknown", "utilisation_percent", "temperature_c", "power_watts",
    "power_limit_watts",
)  # fmt: skip


async def _context(_backend: Backend, _viewer: Viewer, request: Request) -> Mapping[str, Any]:
    asked = request.query_params.get("span")
    span = next((one for one in Span if one == asked), Span.HOUR)
    return {"span": span.value, "spans": [one.value for one in Span]}


def _fragments(sections: Sections, _viewer: Viewer) -> Mapping[str, Fragment]:
    instances: list[dict[str, Any]] = sections["instances"]
    gpus, fills, bound = sections["gpus"]["gpus"], fills_of(instances), by_card(instances)
    notice = {"count": len(gpus), "problem": _problem(sections["gpus"], instances), "fills": fills}
    return {
        "gpus-notice": Fragment("gpus/notice.html", notice),
        **{
            element_id("gpu", gpu["uuid"]): Fragment(
                "gpus/card.html", _card(gpu, bound.get(gpu["uuid"], ()), fills)
            )
            for gpu in gpus
        },
    }


def _problem(gpus: Mapping[str, Any], instances: list[dict[str, Any]]) -> str | None:
    """Return why cards cannot be read. Without an instance for a card nothing is missing.

    A card that is lost, or whose memory is unknown, says so itself.
    """
    is_wanted = any(one["device"]["kind"] == "gpu" for one in instances)
    if gpus["error"] is None or not is_wanted:
        return None
    if any(gpu["lost"] or gpu["memory_unknown"] for gpu in gpus["gpus"]):
        return None
    message: str = gpus["error"]["message"]
    return message


def _card(
    gpu: Mapping[str, Any], bound: Iterable[Mapping[str, Any]], fills: Mapping[str, str]
) -> dict[str, Any]:
    processes = sorted(gpu["processes"], key=lambda one: -(one["used_bytes"] or 0))
    return {
        "gpu": {name: gpu[name] for name in _SHOWN},
        "short_uuid": _short(gpu["uuid"]),
        "parts_of": card_parts(gpu, fills),
        "processes": processes[:_MOST_PROCESSES],
        "more_processes": max(0, len(processes) - _MOST_PROCESSES),
        "instances": [_instance(one, gpu, fills) for one in bound],
    }


def _instance(
    instance: Mapping[str, Any], gpu: Mapping[str, Any], fills: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "id": instance["id"],
        "fill": fills[instance["id"]],
        "state": instance_state(instance),
        "models": [
            {"name": model["name"], "vram_bytes": model["vram_bytes"]} for model in instance["models"]
        ],
        "loading": instance["loading"],
        "here_bytes": _held(gpu["processes"], instance["id"]),
        "cards": len(instance["device"]["cards"]),
    }


def _held(processes: list[dict[str, Any]], instance: str) -> int | None:
    """Return the memory of an instance on a card; None where it holds none, or how much is unknown."""
    held = [one["used_bytes"] for one in processes if one["instance"] == instance]
    return None if None in held or not held else sum(held)


def _short(uuid: str) -> str:
    return uuid if len(uuid) <= _SHORT_UUID else f"{uuid[:_SHORT_UUID]}\N{HORIZONTAL ELLIPSIS}"


GPUS = Page("gpus", "/ui/gpus", fragments=_fragments, context=_context)
