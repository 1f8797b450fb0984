"""Admission: what is free, what is promised, and what a refusal says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from manager.errors import UnavailableError
from tests.support.gpu_machine import GIB, A, B, card, filled, model

if TYPE_CHECKING:
    from manager.services.gpus import Gpus
    from tests.support.gpu_machine import Machine

ONE, TWO = "c" * 64, "d" * 64
PID_ONE, PID_TWO = 11, 22


@pytest.fixture(autouse=True)
def time(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits take no time but the machine's."""

    async def passes(seconds: float) -> None:
        machine.advance(seconds)

    monkeypatch.setattr("manager.services.gpus.gpus.asyncio.sleep", passes)


# Starts


async def test_where_nothing_is_known_of_a_card_a_start_is_let_in(machine: Machine) -> None:
    machine.cards = (card(free=None),)
    gpus = await machine.gpus(one=A)
    await gpus.admit("one", needed_bytes=100 * GIB, wait_s=0)
    await machine.refuse(gpus)
    await gpus.admit("one", needed_bytes=100 * GIB, wait_s=0)


async def test_a_start_that_needs_nothing_does_not_even_read_the_cards(machine: Machine) -> None:
    gpus = await machine.gpus(one=A)
    machine.cards = (card(),)
    await gpus.admit("one", needed_bytes=0, wait_s=0)
    gpus.claim("one", 0)
    assert gpus.snapshot.gpus == ()


async def test_a_refused_start_says_how_much_is_lacking_and_who_holds_it(machine: Machine) -> None:
    machine.names = {77: "python3"}
    machine.cards = (filled((77, 21 * GIB)),)
    gpus = await machine.gpus(one=A, two=A)
    gpus.claim("two", GIB)
    with pytest.raises(UnavailableError) as caught:
        await gpus.admit("one", needed_bytes=5 * GIB, wait_s=10)
    assert caught.value.message == (
        "one needs 5.0 GiB of GPU memory, 3.0 GiB more than are free; held by python3 (pid 77) 21.0 GiB; "
        "1.0 GiB are reserved for other instances"
    )
    assert caught.value.reason == "vram_insufficient"
    assert caught.value.details == {
        "needed_bytes": 5 * GIB,
        "lacking_bytes": 3 * GIB,
        "reserved_bytes": GIB,
        "vram_free_bytes": 3 * GIB,
        "cards": [{"uuid": A, "vram_free_bytes": 3 * GIB, "reserved_bytes": GIB}],
        "holders": [{"pid": 77, "name": "python3", "instance": None, "used_bytes": 21 * GIB}],
    }


async def test_a_start_waits_until_memory_is_free_and_no_longer_than_it_may(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.cards = (card(free=GIB),)
    gpus = await machine.gpus(one=A)
    begun = machine.now()
    with pytest.raises(UnavailableError):
        await gpus.admit("one", needed_bytes=2 * GIB, wait_s=10)
    assert machine.now() - begun == pytest.approx(10)

    async def passes(seconds: float) -> None:
        machine.advance(seconds)
        machine.cards = (card(free=2 * GIB),)

    monkeypatch.setattr("manager.services.gpus.gpus.asyncio.sleep", passes)
    await gpus.admit("one", needed_bytes=2 * GIB, wait_s=10)


async def test_a_promise_ends_with_its_instance_and_holds_on_its_card_alone(machine: Machine) -> None:
    machine.cards = (card(A), card(B))
    gpus = await machine.gpus(one=A, two=A, other=B)
    await gpus.admit("one", needed_bytes=8 * GIB, wait_s=0)
    await gpus.admit("other", needed_bytes=8 * GIB, wait_s=0)
    with pytest.raises(UnavailableError):
        await gpus.admit("two", needed_bytes=8 * GIB, wait_s=0)
    await gpus.admit("one", needed_bytes=10 * GIB, wait_s=0)  # its own earlier promise is not in its way
    gpus.drop_claim("one")
    await gpus.admit("two", needed_bytes=8 * GIB, wait_s=0)


async def test_what_was_promised_and_is_not_held_yet_is_reserved(machine: Machine) -> None:
    machine.cards = (card(A), card(B))
    machine.containers = {PID_ONE: ONE}
    gpus = await machine.gpus(one=A, two=A, other=B)
    gpus.note_container(ONE, "one")
    assert gpus.reserved() == {}
    gpus.claim("one", 3 * GIB)
    gpus.claim("two", 2 * GIB)
    assert gpus.reserved() == {A: 5 * GIB}
    await machine.show(gpus, filled((PID_ONE, 1 * GIB)), card(B))
    assert gpus.reserved() == {A: 4 * GIB}
    await machine.show(gpus, filled((PID_ONE, 4 * GIB)), card(B))
    assert gpus.reserved() == {A: 2 * GIB}, "what an instance holds beyond its claim is nobody's promise"
    await machine.show(gpus, filled((PID_ONE, None)), card(B))
    assert gpus.reserved() == {A: None}, "it may hold what it was promised, or nothing"
    gpus.drop_claim("one")
    assert gpus.reserved() == {A: 2 * GIB}


# Loads

LISTED: list[dict[str, Any]] = [
    {"name": "big:latest", "digest": "big", "size": 4 * GIB},
    {"name": "other:latest", "digest": "big", "size": 4 * GIB},
    {"name": "huge:latest", "digest": "huge", "size": 23 * GIB},
    {"name": "odd:latest", "digest": 5, "size": "4 GB"},
]


def free(amount: int, *processes: tuple[int, int]) -> Any:
    """A card with so much free, these processes, and the rest in use by somebody else."""
    foreign = 24 * GIB - amount - sum(used for _, used in processes)
    return filled(*processes, (99, foreign))


@pytest.fixture
async def gpus(machine: Machine) -> Gpus:
    """Two running instances on one card, the first of which has learned that `big` takes 8 GiB."""
    machine.containers = {PID_ONE: ONE, PID_TWO: TWO}
    machine.cards = (filled((PID_ONE, 8 * GIB)),)
    gpus = await machine.gpus(one=A, two=A, away=B)
    gpus.note_container(ONE, "one")
    gpus.note_container(TWO, "two")
    for _ in range(2):
        await gpus.learn("one", [model("big:latest", digest="big", size=7 * GIB)])
    return gpus


async def test_a_load_needs_what_the_model_took_before(machine: Machine, gpus: Gpus) -> None:
    await machine.show(gpus, free(7 * GIB))
    assert not gpus.take_room("one", "big", LISTED)
    assert not gpus.take_room("one", "BIG:latest")  # by its name, where the list is unknown
    assert gpus.take_room("one", "unknown", LISTED)
    assert gpus.take_room("away", "unknown", LISTED)
    await machine.show(gpus, free(8 * GIB))
    assert gpus.take_room("one", "big", LISTED)


async def test_the_digest_tells_that_two_names_are_one_model(machine: Machine, gpus: Gpus) -> None:
    await machine.show(gpus, free(7 * GIB))
    assert not gpus.take_room("one", "other", LISTED)
    assert gpus.take_room("one", "other")


async def test_the_digest_tells_that_a_name_is_of_another_model_than_before(
    machine: Machine, gpus: Gpus
) -> None:
    await machine.show(gpus, free(7 * GIB))
    assert gpus.take_room("one", "big", [{"name": "big:latest", "digest": "new", "size": 2 * GIB}])


async def test_a_model_that_was_never_loaded_needs_at_least_what_it_took_elsewhere_or_its_file(
    machine: Machine, gpus: Gpus
) -> None:
    await machine.show(gpus, free(7 * GIB))
    assert not gpus.take_room("two", "big", LISTED)
    unknown = [{"name": "new:latest", "digest": "new", "size": 7 * GIB + 1}]
    assert not gpus.take_room("two", "new", unknown)
    await machine.show(gpus, free(7 * GIB + 1))
    assert gpus.take_room("two", "new", unknown)


async def test_a_model_that_is_too_large_for_the_card_in_any_case_is_left_to_its_server(
    machine: Machine, gpus: Gpus
) -> None:
    await machine.show(gpus, free(7 * GIB))
    assert gpus.take_room("one", "huge", LISTED)  # it is split between card and processor
    assert gpus.take_room("one", "odd", LISTED)
    await machine.show(gpus, card(free=None))
    assert gpus.take_room("one", "other", LISTED)


async def test_what_an_instance_holds_itself_makes_room_for_its_next_model(
    machine: Machine, gpus: Gpus
) -> None:
    await machine.show(gpus, free(2 * GIB, (PID_ONE, 6 * GIB)))
    assert gpus.take_room("one", "big", LISTED)
    await machine.show(gpus, free(GIB, (PID_ONE, 6 * GIB)))
    gpus.end_loads("one")
    assert not gpus.take_room("one", "big", LISTED)
    await machine.show(gpus, free(0, (PID_ONE, 9 * GIB)))
    gpus.claim("two", GIB)  # even where more was promised than there is
    assert gpus.take_room("one", "big", LISTED)


async def test_two_loads_at_once_are_not_let_in_by_the_same_memory(machine: Machine, gpus: Gpus) -> None:
    await machine.show(gpus, free(12 * GIB))
    assert gpus.take_room("one", "big", LISTED)
    assert not gpus.take_room("two", "big", LISTED)
    with pytest.raises(UnavailableError, match=r"8\.0 GiB are reserved for other instances"):
        await gpus.admit_load("two", "big", LISTED, wait_s=1)
    assert gpus.take_room("one", "big", LISTED)  # the same load, asked for twice
    gpus.end_loads("one")
    await gpus.admit_load("two", "big", LISTED, wait_s=0)
    assert not gpus.take_room("one", "big", LISTED)


async def test_a_load_that_is_seen_in_memory_is_reserved_no_more(machine: Machine, gpus: Gpus) -> None:
    await machine.show(gpus, free(17 * GIB))
    assert gpus.take_room("one", "big", LISTED)
    await machine.show(gpus, free(13 * GIB, (PID_ONE, 4 * GIB)))  # 4 GiB of it are still to come
    assert gpus.take_room("two", "big", LISTED)
    gpus.end_loads("two")
    await machine.show(gpus, free(11 * GIB, (PID_ONE, 4 * GIB)))
    assert not gpus.take_room("two", "big", LISTED)
    await machine.show(gpus, free(9 * GIB, (PID_ONE, 8 * GIB)))
    await machine.show(gpus, free(9 * GIB))  # what was seen does not come back when it is unloaded
    assert gpus.take_room("two", "big", LISTED)


async def test_a_load_that_took_less_than_was_reserved_is_over_once_it_stands_still(
    machine: Machine, gpus: Gpus
) -> None:
    await machine.show(gpus, free(17 * GIB))
    assert gpus.take_room("one", "big", LISTED)
    await machine.show(gpus, free(10 * GIB, (PID_ONE, 5 * GIB)))
    in_memory = [model("big:latest", digest="big", size=4 * GIB)]
    await gpus.learn("one", in_memory)
    assert not gpus.take_room("two", "big", LISTED)
    await gpus.learn("one", in_memory)
    assert gpus.take_room("two", "big", LISTED)


async def test_where_the_driver_tells_nothing_of_processes_a_load_is_over_once_it_is_listed_twice(
    machine: Machine, gpus: Gpus
) -> None:
    await machine.show(gpus, free(12 * GIB))
    assert gpus.take_room("one", "big", LISTED)
    hidden = filled((PID_ONE, None), driver=12 * GIB)
    await machine.show(gpus, hidden)
    in_memory = [model("big:latest", digest="big"), model("more:latest")]
    await gpus.learn("one", in_memory)
    assert not gpus.take_room("two", "big", LISTED)
    await gpus.learn("one", in_memory)
    assert gpus.take_room("two", "big", LISTED)


async def test_a_load_that_never_ends_is_reserved_for_five_minutes(machine: Machine, gpus: Gpus) -> None:
    await machine.show(gpus, free(12 * GIB))
    assert gpus.take_room("one", "big", LISTED)
    machine.advance(299)
    await gpus.refresh()
    assert not gpus.take_room("two", "big", LISTED)
    machine.advance(2)
    await gpus.admit_load("two", "big", LISTED, wait_s=0)
    assert "one" not in gpus._admission._loads


async def test_the_loads_of_an_instance_add_up_and_are_bounded(
    machine: Machine, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [{"name": f"m{number}:latest", "digest": str(number), "size": 3 * GIB} for number in range(9)]
    await machine.show(gpus, free(12 * GIB))
    assert gpus.take_room("one", "m0", listed)
    assert gpus.take_room("one", "m1", listed)
    assert gpus.take_room("two", "m2", listed)  # 12 - 6
    assert gpus.take_room("two", "m3", listed)
    with pytest.raises(UnavailableError, match=r"6\.0 GiB are reserved for other instances"):
        await gpus.admit("one", needed_bytes=7 * GIB, wait_s=0)
    gpus.end_loads("two")
    monkeypatch.setattr("manager.services.gpus.admission._MOST_LOADS", 3)
    for number in range(9):
        gpus.take_room("one", f"m{number}", listed)
    assert list(gpus._admission._loads["one"]) == ["m6:latest", "m7:latest", "m8:latest"]


async def test_an_instance_that_ends_reserves_nothing(machine: Machine, gpus: Gpus) -> None:
    await machine.show(gpus, free(12 * GIB))
    assert gpus.take_room("one", "big", LISTED)
    gpus.drop_claim("one")
    assert gpus.take_room("two", "big", LISTED)


async def test_a_load_that_waits_is_let_in_by_the_end_of_the_one_before(
    machine: Machine, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await machine.show(gpus, free(12 * GIB))
    await gpus.admit_load("one", "big", LISTED, wait_s=0)

    async def passes(seconds: float) -> None:
        machine.advance(seconds)
        gpus.end_loads("one")  # it has failed

    monkeypatch.setattr("manager.services.gpus.gpus.asyncio.sleep", passes)
    await gpus.admit_load("two", "big", LISTED, wait_s=5)
    assert not gpus.take_room("one", "big", LISTED)


async def test_an_instance_says_that_a_model_does_not_fit_until_it_does(machine: Machine, gpus: Gpus) -> None:
    await machine.show(gpus, free(7 * GIB))
    assert gpus.shortage("one") is None
    with pytest.raises(UnavailableError) as caught:
        await gpus.admit_load("one", "big", LISTED, wait_s=1)
    shortage = gpus.shortage("one")
    assert shortage is not None
    assert (shortage.code, shortage.message) == ("vram_insufficient", caught.value.message)
    assert shortage.message.startswith("big on one needs 8.0 GiB of GPU memory, 1.0 GiB more than are free")
    await gpus.refresh()
    assert gpus.shortage("one") is not None
    await machine.show(gpus, free(8 * GIB))
    assert gpus.shortage("one") is None


@pytest.mark.parametrize("end", ["another load is let in", "the instance ends"])
async def test_a_shortage_is_over_when(machine: Machine, gpus: Gpus, end: str) -> None:
    await machine.show(gpus, free(7 * GIB))
    with pytest.raises(UnavailableError):
        await gpus.admit_load("one", "big", LISTED, wait_s=0)
    if end == "the instance ends":
        gpus.drop_claim("one")
    else:
        assert gpus.take_room("one", "unknown")
    assert gpus.shortage("one") is None


async def test_a_load_of_unknown_need_is_let_in_without_a_reading(machine: Machine, gpus: Gpus) -> None:
    machine.cards = ()
    await gpus.admit_load("one", "unknown", LISTED, wait_s=0)
    assert gpus.snapshot.gpus


async def test_a_reading_that_is_old_lets_no_load_in(machine: Machine, gpus: Gpus) -> None:
    await machine.show(gpus, free(8 * GIB))
    machine.advance(0.25)
    assert gpus.take_room("one", "big", LISTED)
    gpus.end_loads("one")
    machine.advance(0.05)
    assert not gpus.take_room("one", "big", LISTED)
    assert gpus.take_room("one", "unknown")  # it would be let in whatever is free
    await gpus.refresh()
    assert gpus.take_room("one", "big", LISTED)


async def test_a_load_that_is_listed_and_has_taken_nothing_yet_is_not_over(
    machine: Machine, gpus: Gpus
) -> None:
    await machine.show(gpus, free(12 * GIB))
    assert gpus.take_room("one", "big", LISTED)
    for _ in range(3):  # Ollama lists a model while it is being loaded
        await gpus.learn("one", [model("big:latest", digest="big")])
    assert not gpus.take_room("two", "big", LISTED)


async def test_a_load_that_is_asked_for_again_half_way_reserves_no_more_and_no_longer(
    machine: Machine, gpus: Gpus
) -> None:
    await machine.show(gpus, free(17 * GIB))
    assert gpus.take_room("one", "big", LISTED)
    await machine.show(gpus, free(13 * GIB, (PID_ONE, 4 * GIB)))
    machine.advance(200)
    await gpus.refresh()
    assert gpus.take_room("one", "big", LISTED)
    with pytest.raises(UnavailableError, match=r"4\.0 GiB are reserved for other instances"):
        await gpus.admit("two", needed_bytes=20 * GIB, wait_s=0)
    machine.advance(101)
    await gpus.refresh()
    assert gpus._admission.reserved_for_others("two")[A] == 0
