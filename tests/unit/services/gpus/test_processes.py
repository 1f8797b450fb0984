"""Whose the processes on a card are, and when the absence of one means something."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from manager.domain.gpu import GpuProcess
from tests.support.gpu_machine import GIB, A, B, card, filled

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.services.gpus import Gpus
    from tests.support.gpu_machine import Machine

CONTAINER = "c" * 64


async def test_processes_are_those_of_the_instance_whose_container_they_run_in(machine: Machine) -> None:
    machine.containers = {7: CONTAINER, 8: CONTAINER, 9: "another"}
    machine.names = {7: "ollama", 10: "python3"}
    machine.cards = (filled((7, GIB), (8, None), (9, GIB), (10, GIB)),)
    gpus = await machine.gpus(one=A)
    gpus.note_container(CONTAINER, "one")
    held = gpus.holdings("one")[A]
    assert held.pids == frozenset({7, 8})
    assert held.used_bytes is None  # the driver does not tell of one of them
    assert [(it.pid, it.name, it.instance) for it in gpus.holders(machine.cards[0])] == [
        (7, "ollama", "one"),
        (8, None, "one"),
        (9, None, None),
        (10, "python3", None),
    ]
    gpus.forget_container(CONTAINER)
    assert gpus.holdings("one")[A].pids == frozenset()
    assert gpus.instance_of(99) is None


async def test_a_process_of_a_container_is_looked_at_once_and_a_foreign_one_again(machine: Machine) -> None:
    machine.containers = {7: CONTAINER}
    machine.names = {7: "ollama", 8: "ollama"}
    machine.cards = (filled((7, GIB), (8, GIB)),)
    gpus = await machine.gpus(one=A)
    gpus.note_container(CONTAINER, "one")
    machine.asked_pids.clear()
    machine.containers[8] = CONTAINER  # it has joined the container since
    await gpus.refresh()
    assert machine.asked_pids == [8]
    assert gpus.held_bytes("one") == 2 * GIB
    await machine.show(gpus, filled())
    await machine.show(gpus, filled((7, GIB)))
    assert machine.asked_pids == [8, 7]  # it may be another process with the number of one that has ended


async def test_what_is_told_late_of_a_process_is_a_new_version_of_the_same_reading(machine: Machine) -> None:
    machine.containers = {7: CONTAINER}
    machine.cards = (filled((7, GIB)),)
    gpus = await machine.gpus(one=A)

    async def told(change: Callable[[], object]) -> tuple[str | None, str | None]:
        before = gpus.holders_version
        change()
        await gpus.refresh()
        assert gpus.holders_version > before
        before = gpus.holders_version
        await gpus.refresh()
        assert gpus.holders_version == before, "nothing has changed"
        (holder,) = gpus.holders(machine.cards[0])
        return holder.name, holder.instance

    assert await told(lambda: gpus.note_container(CONTAINER, "one")) == (None, "one")
    gpus.note_container(CONTAINER, "one")
    assert await told(lambda: machine.names.update({7: "ollama"})) == ("ollama", "one")
    assert await told(lambda: gpus.forget_container(CONTAINER)) == ("ollama", None)
    before = gpus.holders_version
    gpus.forget_container(CONTAINER)
    assert gpus.holders_version == before


async def ready(machine: Machine, *, pid: int | None = 5) -> Gpus:
    """An instance whose container runs with the first process 5, on an empty card."""
    machine.containers = {5: CONTAINER}
    machine.cards = (filled((99, GIB)),)
    gpus = await machine.gpus(one=A)
    gpus.note_container(CONTAINER, "one", pid)
    await machine.show(gpus, filled())
    return gpus


async def test_a_driver_that_never_listed_a_process_proves_nothing_by_listing_none(machine: Machine) -> None:
    machine.containers = {5: CONTAINER}
    machine.cards = (filled(),)
    gpus = await machine.gpus(one=A)
    gpus.note_container(CONTAINER, "one", 5)
    await gpus.refresh()
    assert gpus.holds_memory("one") is None
    await machine.show(gpus, filled((99, GIB)))
    assert gpus.holds_memory("one") is False


async def test_an_instance_holds_memory_while_one_of_its_processes_is_on_its_card(machine: Machine) -> None:
    gpus = await ready(machine)
    assert gpus.holds_memory("one") is False
    machine.containers[7] = CONTAINER
    await machine.show(gpus, filled((7, None)))
    assert gpus.holds_memory("one") is True
    await machine.show(gpus, filled((8, GIB)))
    assert gpus.holds_memory("one") is False


async def test_the_first_process_of_a_container_proves_that_its_processes_would_be_seen(
    machine: Machine,
) -> None:
    gpus = await ready(machine, pid=6)  # as in another pid namespace: the engine's number is somebody else's
    assert gpus.holds_memory("one") is None
    gpus = await ready(machine, pid=None)
    assert gpus.holds_memory("one") is None
    machine.containers[7] = CONTAINER
    await machine.show(gpus, filled((7, GIB)))
    await machine.show(gpus, filled())
    assert gpus.holds_memory("one") is False  # a process of it was seen before


async def test_whether_memory_is_held_cannot_be_told_of_a_card_that_does_not_tell(machine: Machine) -> None:
    gpus = await ready(machine)
    await machine.show(gpus, card(lists_processes=False))
    assert gpus.holds_memory("one") is None
    await machine.show(gpus, card(lost="it is lost"))
    assert gpus.holds_memory("one") is None
    await machine.show(gpus, filled())
    assert gpus.holds_memory("one") is False
    await machine.refuse(gpus, "timeout")
    assert gpus.holds_memory("one") is None


async def test_whether_memory_is_held_cannot_be_told_without_a_container_or_a_card(machine: Machine) -> None:
    gpus = await ready(machine)
    gpus.forget_container(CONTAINER)
    assert gpus.holds_memory("one") is None
    assert gpus.holds_memory("unbound") is None
    assert gpus.holdings("unbound") == {}


# What a stop waits for


async def stopping(machine: Machine, used: int | None = 6 * GIB, driver: int = GIB) -> Gpus:
    machine.containers = {7: CONTAINER}
    machine.cards = (filled((7, used), driver=driver),)
    gpus = await machine.gpus(one=A)
    gpus.note_container(CONTAINER, "one")
    return gpus


async def test_memory_is_given_back_when_the_processes_have_gone_and_it_is_free(machine: Machine) -> None:
    gpus = await stopping(machine)
    held = gpus.holdings("one")
    assert await gpus.given_back(held, 0) == (A,)
    machine.cards = (filled(driver=7 * GIB),)  # nobody's, and not free either
    assert await gpus.given_back(held, 0) == (A,)
    machine.cards = (filled(driver=GIB + 6 * GIB // 20),)
    assert await gpus.given_back(held, 0) == ()


async def test_memory_that_others_take_meanwhile_does_not_keep_a_stop_waiting(machine: Machine) -> None:
    gpus = await stopping(machine)
    held = gpus.holdings("one")
    machine.cards = (filled((9, 15 * GIB), driver=GIB),)
    assert await gpus.given_back(held, 0) == ()


@pytest.mark.parametrize("cards", [(), (card(free=None),), (card(lost="lost"),), (filled((9, None)),)])
async def test_a_card_that_tells_nothing_keeps_no_stop_waiting(machine: Machine, cards: tuple[()]) -> None:
    gpus = await stopping(machine)
    held = gpus.holdings("one")
    machine.cards = cards
    assert await gpus.given_back(held, 0) == ()


async def test_without_figures_memory_is_given_back_when_the_processes_have_gone(machine: Machine) -> None:
    gpus = await stopping(machine, None)
    held = gpus.holdings("one")
    assert await gpus.given_back(held, 0) == (A,)
    machine.cards = (filled(driver=12 * GIB),)
    assert await gpus.given_back(held, 0) == ()


async def test_an_instance_without_a_process_on_its_card_has_nothing_to_give_back(machine: Machine) -> None:
    machine.cards = (card(B),)
    gpus = await machine.gpus(one=A)
    machine.cards = (card(A, processes=(GpuProcess(7, GIB),)),)
    assert await gpus.given_back(gpus.holdings("one"), 0) == ()
    assert gpus.snapshot.gpus[0].uuid == B  # not even a reading


async def test_a_stop_goes_on_as_soon_as_memory_is_given_back(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = await stopping(machine)

    async def passes(seconds: float) -> None:
        machine.advance(seconds)
        if machine.now() - begun >= 1:
            machine.cards = (filled(driver=GIB),)

    begun = machine.now()
    monkeypatch.setattr("manager.services.gpus.gpus.asyncio.sleep", passes)
    assert await gpus.given_back(gpus.holdings("one"), 20) == ()
    assert machine.now() - begun == pytest.approx(1)
