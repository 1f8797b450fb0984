"""Bindings of instances to cards, and cards that are lost and come back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from manager.domain.gpu import GpuProcess
from manager.errors import GpuQueryError
from tests.support.gpu_machine import GIB, A, B, card

if TYPE_CHECKING:
    from typing import Any

    from manager.domain.gpu import Gpu
    from manager.services.gpus import Gpus
    from tests.support.gpu_machine import Machine

XID = "it has fallen off the bus; look for Xid 79"


def kinds(machine: Machine) -> list[tuple[str, str | None, str | None]]:
    return [event[:3] for event in machine.events]


def second(**more: Any) -> Gpu:
    return replace(card(B, **more), index=1, pci_bus_id="00000000:02:00.0")


async def seen(machine: Machine) -> Gpus:
    """Two cards, each with an instance, and one of two instances on the first card named by its slot."""
    machine.cards = (card(A), second())
    return await machine.gpus(one=A, slot="01:00.0", two=B)


async def test_a_card_that_says_that_it_is_lost_is_missing_for_its_instances_alone(machine: Machine) -> None:
    gpus = await seen(machine)
    assert kinds(machine) == []
    await machine.show(gpus, card(A, free=None, lost=XID), second())
    for instance in ("one", "slot"):
        assert gpus.why_missing(instance) == f"GPU {A} is lost: {XID}"
    assert gpus.why_missing("two") is None
    assert gpus.trouble is not None
    assert (gpus.trouble.code, gpus.trouble.message) == ("gpu_lost", f"GPU {A} is lost: {XID}")
    assert kinds(machine) == [("gpu_lost", "one", "gpu_missing"), ("gpu_lost", "slot", "gpu_missing")]
    assert XID in machine.events[0][3]


async def test_a_card_that_vanishes_stays_listed_as_lost_with_nothing_known_of_its_memory(
    machine: Machine,
) -> None:
    gpus = await seen(machine)
    busy = second(processes=(GpuProcess(1, GIB),))
    await machine.show(gpus, busy)
    lost = next(gpu for gpu in gpus.snapshot.gpus if gpu.uuid == A)
    assert (lost.name, lost.pci_bus_id) == ("Card", "00000000:01:00.0")
    assert (lost.vram_total_bytes, lost.vram_free_bytes, lost.processes) == (None, None, ())
    assert lost.lost == gpus.why_missing("one") == f"GPU {A} is not in this machine (any more)"
    assert gpus.why_missing("slot") == lost.lost  # the slot is that of the card that was in it
    assert gpus.gpu(B) == busy


async def test_a_card_that_is_back_is_back_once(machine: Machine) -> None:
    gpus = await seen(machine)
    both = machine.cards
    await machine.show(gpus, both[1])
    await machine.show(gpus, both[1])
    machine.events.clear()
    await machine.show(gpus, *both)
    await machine.show(gpus, *both)
    assert kinds(machine) == [("gpu_back", "one", None), ("gpu_back", "slot", None)]
    assert gpus.trouble is None
    assert gpus.why_missing("one") is None
    assert gpus.snapshot.gpus == both


async def test_the_first_reason_of_a_loss_is_kept_when_the_driver_lists_the_card_no_more(
    machine: Machine,
) -> None:
    gpus = await seen(machine)
    await machine.show(gpus, card(A, lost=XID), second())
    await machine.show(gpus, second())
    assert XID in (gpus.why_missing("one") or "")
    assert len(machine.events) == 2


@pytest.mark.parametrize("name", ["driver_not_loaded", "library_missing", "gpu_lost", "reset_required"])
async def test_with_a_driver_that_has_gone_every_card_that_was_seen_is_lost(
    machine: Machine, name: str
) -> None:
    gpus = await seen(machine)
    both = machine.cards
    await machine.refuse(gpus, name)
    assert gpus.why_missing("one") == f"GPU {A} cannot be used: the driver is gone"
    assert gpus.why_missing("two") == f"GPU {B} cannot be used: the driver is gone"
    assert gpus.trouble is not None
    assert gpus.trouble.code == name
    assert [(gpu.uuid, gpu.vram_used_bytes) for gpu in gpus.snapshot.gpus] == [(A, None), (B, None)]
    assert all(gpu.lost for gpu in gpus.snapshot.gpus)
    assert [event[:2] for event in machine.events] == [
        ("gpu_lost", "one"),
        ("gpu_lost", "slot"),
        ("gpu_lost", "two"),
    ]
    await machine.show(gpus, *both)
    assert [event[0] for event in machine.events[3:]] == ["gpu_back"] * 3


@pytest.mark.parametrize("name", ["timeout", "unknown", "version_mismatch", "not_supported", None])
async def test_a_driver_that_fails_for_another_reason_is_no_proof_that_a_card_is_lost(
    machine: Machine, name: str | None
) -> None:
    gpus = await seen(machine)
    await machine.refuse(gpus, name)
    assert gpus.why_missing("one") is None
    assert machine.events == []
    assert gpus.trouble is not None
    assert gpus.trouble.code == (name or "gpu_query_failed")
    assert gpus.snapshot.attempted
    assert [(gpu.uuid, gpu.lost, gpu.vram_free_bytes) for gpu in gpus.snapshot.gpus] == [
        (A, None, None),
        (B, None, None),
    ]


async def test_what_was_lost_before_the_driver_fails_stays_lost(machine: Machine) -> None:
    gpus = await seen(machine)
    await machine.show(gpus, second())
    await machine.refuse(gpus, "timeout")
    assert gpus.why_missing("one") is not None
    assert gpus.why_missing("two") is None


async def test_a_card_that_was_never_seen_for_want_of_a_driver_is_not_lost(machine: Machine) -> None:
    machine.refusal = GpuQueryError("the driver is gone", details={"nvml": "driver_not_loaded"})
    gpus = await machine.gpus(one=A)
    await gpus.refresh()
    assert gpus.why_missing("one") is None  # the engine may know better
    assert gpus.snapshot.gpus == ()
    assert machine.events == []


async def test_a_card_that_was_missing_from_the_start_is_no_event_until_it_comes(machine: Machine) -> None:
    gpus = await machine.gpus(one=A)
    await gpus.refresh()
    assert gpus.why_missing("one") is not None
    assert machine.events == []
    await machine.show(gpus, card(A))
    assert kinds(machine) == [("gpu_back", "one", None)]


async def test_a_card_without_an_instance_is_an_event_of_nobody_and_is_listed_while_it_answers(
    machine: Machine,
) -> None:
    machine.cards = (card(A), card(B))
    gpus = await machine.gpus(one=A)
    await machine.show(gpus, card(A), card(B, lost=XID))
    assert kinds(machine) == [("gpu_lost", None, "gpu_missing")]
    await machine.show(gpus, card(A))
    assert [gpu.uuid for gpu in gpus.snapshot.gpus] == [A]


async def test_the_card_of_an_instance_that_nobody_configured_is_lost_and_back_too(machine: Machine) -> None:
    machine.cards = (card(A),)
    gpus = await machine.gpus(auto=True)
    assert gpus.instance_ids() == ("gpu0",)
    await machine.show(gpus)
    assert kinds(machine) == [("gpu_lost", "gpu0", "gpu_missing")]
    assert gpus.why_missing("gpu0")


async def test_a_full_disk_keeps_nothing_but_a_binding_from_being_known(machine: Machine) -> None:
    machine.cards = (card(A),)
    machine.disk_full = True
    gpus = await machine.gpus(auto=True)
    assert gpus.instance_ids() == ()  # what is not stored could come out differently next time
    assert gpus.snapshot.gpus
    machine.disk_full = False
    await gpus.refresh()
    assert gpus.instance_ids() == ("gpu0",)
    assert (await machine.gpus()).instance_ids() == ()  # without `auto` no card has an instance by itself


async def test_a_selector_that_names_no_card_says_which(machine: Machine) -> None:
    machine.cards = (card(A),)
    gpus = await machine.gpus(slot="07:00.0", first="auto", second="auto")
    assert gpus.why_missing("slot") == "GPU 07:00.0 was not found"
    assert gpus.why_missing("first") is None
    assert gpus.why_missing("second") == "no free GPU was found"
    assert gpus.cards_of("second") == ()
    await machine.refuse(gpus)
    assert gpus.why_missing("second") == "no free GPU was found: the driver is gone"


async def test_another_card_in_a_slot_is_the_card_of_the_slot(machine: Machine) -> None:
    machine.cards = (card(A),)
    gpus = await machine.gpus(slot="01:00.0")
    await machine.show(gpus)
    await machine.show(gpus, card(B))
    assert gpus.uuids_of("slot") == (B,)
    assert gpus.why_missing("slot") is None


async def test_an_instance_without_a_selector_takes_the_card_of_one_that_was_found(machine: Machine) -> None:
    machine.stored_bindings = {"gpu0": A}
    machine.cards = (card(A),)
    gpus = await machine.gpus(auto=True, mine="auto")
    assert gpus.uuids_of("mine") == (A,)
    assert gpus.instance_ids() == ()


async def test_an_instance_that_takes_a_found_card_adds_no_instance_for_the_others(machine: Machine) -> None:
    machine.stored_bindings = {"gpu0": A, "gpu1": B}
    machine.cards = (card(A), card(B))
    gpus = await machine.gpus(auto=True, mine="auto")
    assert gpus.uuids_of("mine") == (A,)
    assert gpus.instance_ids() == ("gpu1",)
    assert set(machine.stored_bindings.values()) == {A, B}
    assert set(machine.stored_bindings) == {"gpu0", "gpu1", "mine"}


async def test_the_eleventh_card_comes_after_the_third(machine: Machine) -> None:
    machine.cards = tuple(card(f"GPU-{number:02}") for number in range(12))
    gpus = await machine.gpus(auto=True)
    assert gpus.instance_ids() == tuple(f"gpu{number}" for number in range(12))


# --- cards of other machines ---


async def test_bindings_of_the_nodes_of_a_swarm_are_not_of_this_machine(machine: Machine) -> None:
    machine.stored_bindings = {"swarm:gpu-box-gpu0": A}
    machine.cards = (card(A),)
    gpus = await machine.gpus(auto=True)
    assert gpus.instance_ids() == ("gpu0",)
    assert machine.stored_bindings == {"swarm:gpu-box-gpu0": A, "gpu0": A}


async def test_an_instance_that_was_found_gets_its_cards_by_name(machine: Machine) -> None:
    machine.cards = (card(A), second())
    gpus = await machine.gpus()
    assert gpus.uuids_of("gpu-box-gpu0") == ()
    gpus.name_cards("gpu-box-gpu0", (B,))
    await gpus.refresh()
    assert gpus.uuids_of("gpu-box-gpu0") == (B,)
    assert gpus.why_missing("gpu-box-gpu0") is None


async def test_a_card_that_is_missing_is_said_to_be_missing_where_it_was(machine: Machine) -> None:
    gpus = await machine.gpus(place="advertised by a node of the swarm", one=A)
    assert gpus.why_missing("one") == f"GPU {A} is not advertised by a node of the swarm (any more)"
