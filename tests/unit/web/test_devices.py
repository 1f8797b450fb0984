"""Instances by the cards that they are bound to."""

from __future__ import annotations

from typing import Any

from manager.web.devices import by_card


def test_an_instance_stands_once_at_each_of_its_cards_in_the_order_of_the_instances() -> None:
    def instance(id_: str, *uuids: str | None) -> dict[str, Any]:
        return {"id": id_, "device": {"cards": [{"uuid": uuid} for uuid in uuids]}}

    found = by_card([instance("a", "GPU-1"), instance("b"), instance("c", "GPU-2", "GPU-1", "GPU-1")])
    assert {uuid: [one["id"] for one in here] for uuid, here in found.items()} == {
        "GPU-1": ["a", "c"],
        "GPU-2": ["c"],
    }
