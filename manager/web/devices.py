"""Devices and what is on them, as the pages show them: pure functions of the live sections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_FILLS = 6


def card_parts(gpu: Mapping[str, Any], fills: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the parts of a card's memory: by instance, by foreign process, the rest in use, and reserved.

    Each has `name`, or `word` for the text that names it, `bytes`, `share` of the card and `fill`. There are
    none where the card does not say how much it has or uses: unknown is not zero. What was reserved and is
    not in use yet comes last.
    """
    total, used = gpu["vram_total_bytes"], gpu["vram_used_bytes"]
    if not total or used is None:
        return []
    # By name, text and colour.
    found: dict[tuple[str | None, str | None, str], int] = {}
    for process in gpu["processes"]:
        owner = process["instance"]
        name = owner or process["name"] or f"pid {process['pid']}"
        fill = fills.get(owner, "foreign") if owner else "foreign"
        key = name, None, fill
        found[key] = found.get(key, 0) + (process["used_bytes"] or 0)
    known = sum(found.values())
    if used > known:
        found[None, "other", "foreign"] = used - known
    reserved = gpu["reserved_bytes"]
    if reserved:
        found[None, "reserved", "reserved"] = min(reserved, max(0, total - used))
    return [
        {"name": name, "word": word, "bytes": count, "share": min(1.0, count / total), "fill": fill}
        for (name, word, fill), count in found.items()
        if count
    ]


def fills_of(instances: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the colour of each instance: the same one on every page."""
    return {one["id"]: str(number % _FILLS + 1) for number, one in enumerate(instances)}


def by_card(instances: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the instances that are bound to each card, by its UUID, in their order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in instances:
        for uuid in {card["uuid"] for card in one["device"]["cards"]}:
            found.setdefault(uuid, []).append(one)
    return found
