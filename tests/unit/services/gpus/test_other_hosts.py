"""Cards of other hosts: their processes are never listed, and their memory may be unknown."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.gpu import Gpu, GpuProcess
from manager.errors import UnavailableError
from manager.services.gpus import Need
from tests.support.gpu_machine import GIB, A, B, card, filled, model

if TYPE_CHECKING:
    from manager.services.gpus import Gpus
    from tests.support.gpu_machine import Machine

LISTED: list[dict[str, Any]] = [{"name": "tiny:latest", "digest": "sha", "size": 4 * GIB}]
NO_EXPORTER = "no exporter is set"


@pytest.fixture(autouse=True)
def time(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits take no time but the machine's."""

    async def passes(seconds: float) -> None:
        machine.advance(seconds)

    monkeypatch.setattr("manager.services.gpus.gpus.asyncio.sleep", passes)


def away(uuid: str = A, *, free: int | None = 24 * GIB, total: int | None = 24 * GIB, **more: Any) -> Gpu:
    """A card of 24 GiB in another host, as its exporter tells it."""
    why = None if free is not None else NO_EXPORTER
    values: dict[str, Any] = {
        "host": "node-1",
        "pci_bus_id": "",
        "lists_processes": False,
        "why_unknown": why,
    } | more
    return replace(card(uuid, free=free), vram_total_bytes=total, **values)


@pytest.fixture
async def gpus(machine: Machine) -> Gpus:
    """Two instances that share a card of another host, and one over two cards."""
    machine.cards = (away(A), away(B, index=1))
    return await machine.gpus(one=A, two=A, both=(A, B))


# --- what is held, and learned ---


async def test_what_a_server_says_of_its_models_is_what_its_instance_holds(
    machine: Machine, gpus: Gpus
) -> None:
    assert gpus.held("one") == {A: None}
    await gpus.learn("one", [model(size=6 * GIB), model("other:latest", size=2 * GIB)])
    assert gpus.held("one") == {A: 8 * GIB}
    await gpus.learn("one", [])
    assert gpus.held("one") == {A: 0}
    gpus.drop_claim("one")
    assert gpus.held("one") == {A: None}


async def test_how_a_server_divides_its_models_among_several_cards_is_unknown(gpus: Gpus) -> None:
    await gpus.learn("both", [model(size=6 * GIB)])
    assert gpus.held("both") == {A: None, B: None}
    assert gpus.held_bytes("both") is None


async def test_processes_that_are_listed_count_and_not_the_word_of_the_server(machine: Machine) -> None:
    machine.cards = (filled((7, 5 * GIB)),)
    machine.containers = {7: "c" * 64}
    gpus = await machine.gpus(one=A)
    gpus.note_container("c" * 64, "one")
    await gpus.learn("one", [model(size=4 * GIB)])
    assert gpus.held("one") == {A: 5 * GIB}


@pytest.mark.parametrize("free", [10 * GIB, None])
async def test_a_size_is_learned_from_what_the_server_says(machine: Machine, free: int | None) -> None:
    machine.cards = (away(free=free, total=None),)
    gpus = await machine.gpus(one=A)
    await gpus.learn("one", [model(size=6 * GIB)])
    assert gpus.need_of("one", None) == 0
    await gpus.learn("one", [model(size=6 * GIB)])
    assert gpus.need_of("one", None) == 6 * GIB
    assert [size.vram_bytes for size in machine.stored_sizes] == [6 * GIB]


async def test_what_is_partly_on_the_processor_is_not_learned(gpus: Gpus) -> None:
    for _ in range(3):
        await gpus.learn("one", [model(size=6 * GIB, vram_bytes=5 * GIB)])
    assert gpus.need_of("one", None) == 0


async def test_nothing_is_learned_over_several_cards_without_a_reading(machine: Machine, gpus: Gpus) -> None:
    for _ in range(3):
        await gpus.learn("both", [model(size=6 * GIB)])
    assert machine.stored_sizes == []


# --- starts and loads ---


async def test_where_nothing_is_known_a_start_is_let_in_and_the_status_says_so(machine: Machine) -> None:
    machine.cards = (away(free=None, total=None),)
    gpus = await machine.gpus(one=A, two=A)
    await gpus.admit("one", needed_bytes=20 * GIB, wait_s=0)
    await gpus.admit("two", needed_bytes=20 * GIB, wait_s=0)
    assert gpus.take_room("one", "tiny", LISTED)
    assert gpus.trouble is not None
    assert gpus.trouble.code == "vram_unknown"
    assert gpus.trouble.message == f"the memory of {A} on node-1 is unknown: {NO_EXPORTER}"
    assert gpus.why_missing("one") is None
    assert machine.events == []


async def test_promises_are_held_against_each_other_where_only_the_total_is_known(machine: Machine) -> None:
    machine.cards = (away(free=None),)
    gpus = await machine.gpus(one=A, two=A)
    await gpus.admit("one", needed_bytes=16 * GIB, wait_s=0)
    with pytest.raises(UnavailableError) as caught:
        await gpus.admit("two", needed_bytes=9 * GIB, wait_s=0)
    assert caught.value.details["lacking_bytes"] == GIB
    await gpus.admit("two", needed_bytes=8 * GIB, wait_s=0)


async def test_what_the_server_has_loaded_is_not_reserved_a_second_time(machine: Machine, gpus: Gpus) -> None:
    await gpus.admit("one", needed_bytes=10 * GIB, wait_s=0)
    assert gpus.reserved() == {A: None}, "it may hold what it was promised, or nothing"
    await gpus.learn("one", [model(size=9 * GIB)])
    await machine.show(gpus, away(free=15 * GIB), away(B))
    assert gpus.reserved() == {A: GIB}
    await gpus.admit("two", needed_bytes=14 * GIB, wait_s=0)
    gpus.drop_claim("two")
    with pytest.raises(UnavailableError):
        await gpus.admit("two", needed_bytes=14 * GIB + 1, wait_s=0)


async def test_before_the_server_has_said_anything_all_of_its_promise_may_be_in_use(
    machine: Machine, gpus: Gpus
) -> None:
    await gpus.admit("one", needed_bytes=10 * GIB, wait_s=0)
    await machine.show(gpus, away(free=14 * GIB), away(B))
    await gpus.admit("two", needed_bytes=14 * GIB, wait_s=0)


async def test_a_reading_from_before_a_load_does_not_let_in_another(machine: Machine, gpus: Gpus) -> None:
    """The server tells at once that the load is over; an exporter may tell it half a minute later."""
    await gpus.admit_load("one", "tiny", [LISTED[0] | {"size": 15 * GIB}], wait_s=0)
    for _ in range(2):
        await gpus.learn("one", [model(size=15 * GIB)])
    assert not gpus._admission._loads.get("one"), "its load is over"
    with pytest.raises(UnavailableError):
        await gpus.admit("two", needed_bytes=10 * GIB, wait_s=0)
    await gpus.admit("two", needed_bytes=9 * GIB, wait_s=0)


async def test_memory_of_others_on_the_host_counts_because_it_is_measured(
    machine: Machine, gpus: Gpus
) -> None:
    await machine.show(gpus, away(free=3 * GIB), away(B))
    with pytest.raises(UnavailableError):
        await gpus.admit("one", needed_bytes=4 * GIB, wait_s=0)


async def test_the_next_model_takes_the_room_of_the_one_before(machine: Machine, gpus: Gpus) -> None:
    await gpus.learn("one", [model(size=20 * GIB)])
    await machine.show(gpus, away(free=4 * GIB), away(B))
    other = [{"name": "other:latest", "digest": "other", "size": 15 * GIB}]
    assert gpus.take_room("one", "other", other)
    assert not gpus.take_room("two", "other", other)


async def test_the_total_counts_what_the_instance_holds_itself(machine: Machine) -> None:
    machine.cards = (away(free=None),)
    gpus = await machine.gpus(one=A, two=A)
    await gpus.learn("one", [model(size=20 * GIB)])
    await gpus.admit("two", needed_bytes=4 * GIB, wait_s=0)
    assert gpus._admission.rooms("one") == {A: 0}
    assert gpus._admission.rooms("two") == {A: 4 * GIB}


# --- what would fit ---


async def test_nothing_is_said_to_fit_that_is_not_known(machine: Machine, gpus: Gpus) -> None:
    for _ in range(2):
        await gpus.learn("one", [model(size=6 * GIB)])
    need = gpus.need("one", "tiny:latest", LISTED[0])
    assert need == Need(6 * GIB, "server")
    assert not gpus.measures("one")
    assert gpus.room("two").fits(need) is None, "the memory of its process is missing in what a server says"
    await machine.show(gpus, away(free=5 * GIB), away(B))
    assert gpus.room("two").fits(need) is False
    await machine.show(gpus, away(free=None), away(B))
    assert gpus.room("two").bytes is None
    assert gpus.room("two").fits(need) is None


# --- the list of cards ---


async def test_cards_are_listed_by_host_and_number(machine: Machine) -> None:
    machine.cards = (
        away("GPU-4", index=1, host="node-2"),
        away("GPU-3", index=0, host="node-2"),
        away("GPU-2", index=1),
        away("GPU-1", index=0),
        card("GPU-0"),
    )
    gpus = await machine.gpus()
    assert [gpu.uuid for gpu in gpus.snapshot.gpus] == [f"GPU-{n}" for n in range(5)]


async def test_a_card_that_its_host_advertises_no_more_is_lost(machine: Machine, gpus: Gpus) -> None:
    await machine.show(gpus, away(B))
    assert gpus.why_missing("one") == f"GPU {A} is not advertised by node-1 (any more)"
    assert gpus.trouble is not None
    assert gpus.trouble.code == "gpu_lost"
    lost = gpus.gpu(A)
    assert lost is not None
    assert lost.host == "node-1"
    await machine.show(gpus, away(A), away(B))
    assert gpus.why_missing("one") is None
    assert gpus.trouble is None


async def test_hosts_that_cannot_be_asked_lose_no_card(machine: Machine, gpus: Gpus) -> None:
    await machine.show(gpus, away(A, free=None), away(B))
    await machine.refuse(gpus)
    assert gpus.why_missing("one") is None
    assert gpus.trouble is not None
    assert gpus.trouble.code == "gpu_query_failed"
    assert [gpu.why_unknown for gpu in gpus.snapshot.gpus] == [None, None]


async def test_a_slot_is_one_of_the_own_machine(machine: Machine) -> None:
    there = away(A, pci_bus_id="00000000:01:00.0")
    machine.cards = (there,)
    gpus = await machine.gpus(one="01:00.0")
    assert gpus.why_missing("one") == "GPU 01:00.0 was not found"
    await machine.show(gpus, there, card(B))
    assert gpus.uuids_of("one") == (B,)


async def test_whether_memory_is_held_cannot_be_told(machine: Machine, gpus: Gpus) -> None:
    machine.containers = {7: "c" * 64}
    gpus.note_container("c" * 64, "one", 7)
    await machine.show(gpus, away(A), card(B, processes=(GpuProcess(7, GIB),)))
    await gpus.learn("one", [model(size=6 * GIB)])
    assert gpus.holds_memory("one") is None
