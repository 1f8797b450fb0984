"""Devices and what is on them, as the pages show them: pure functions of the live sections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.web import words

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_FILLS = 6


def card_parts(gpu: Mapping[str, Any], fills: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the parts of a card's memory: by instance, by foreign process, the rest in use, and reserved.

    Each has `name`, `bytes`, `share` of the card, `fill` and `label`. None where the card does not say how
    much it has or uses: unknown is not zero. What was reserved and is not in use yet comes last.
    """
    total, used = gpu["vram_total_bytes"], gpu["vram_used_bytes"]
    if not total or used is None:
        return []
    by_name: dict[tuple[str, str], int] = {}
    for process in gpu["processes"]:
        owner = process["instance"]
        name = owner or process["name"] or f"pid {process['pid']}"
        fill = fills.get(owner, "foreign") if owner else "foreign"
        by_name[name, fill] = by_name.get((name, fill), 0) + (process["used_bytes"] or 0)
    known = sum(by_name.values())
    if used > known:
        by_name["other", "foreign"] = used - known
    reserved = gpu["reserved_bytes"]
    if reserved:
        by_name["reserved", "reserved"] = min(reserved, max(0, total - used))
    return [
        {
            "name": name,
            "bytes": count,
            "share": min(1.0, count / total),
            "fill": fill,
            "label": f"{name}: {words.size(count)}",
        }
        for (name, fill), count in by_name.items()
        if count
    ]


def fills_of(instances: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the colour of each instance: the same one on every page."""
    return {one["id"]: str(number % _FILLS + 1) for number, one in enumerate(instances)}


def on_device(instance: Mapping[str, Any], uuid: str) -> bool:
    """Return whether an instance is bound to a card."""
    return any(card["uuid"] == uuid for card in instance["device"]["cards"])
