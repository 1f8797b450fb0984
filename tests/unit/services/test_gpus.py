"""Cards of which the driver tells little, and what is remembered of models."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from manager.domain.gpu import Gpu, GpuProcess
from manager.domain.instance import Model
from manager.errors import GpuQueryError, RegistryUnwritableError, UnavailableError
from manager.services.gpus import Gpus

if TYPE_CHECKING:
    from manager.domain.registry import LearnedSize

GIB = 2**30
A = "GPU-a"
B = "GPU-b"
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
CONTAINER = "c" * 64


def card(uuid: str = A, *, free: int | None = 10 * GIB, processes: tuple[GpuProcess, ...] = ()) -> Gpu:
    total = None if free is None else 24 * GIB
    used = None if free is None else 24 * GIB - free
    return Gpu(uuid, 0, "00000000:01:00.0", "Card", total, used, free, processes)


class Machine:
    """The cards, the processes, the registry and the clock, as a test sets them."""

    def __init__(self) -> None:
        self.cards: tuple[Gpu, ...] = ()
        self.refusal: GpuQueryError | None = None
        self.containers: dict[int, str] = {}
        self.stored_bindings: dict[str, str] = {}
        self.stored_sizes: list[LearnedSize] = []
        self.disk_full = False
        self.time = BEGIN

    def now(self) -> float:
        return self.time.timestamp()

    # GpuReader
    async def read(self) -> tuple[Gpu, ...]:
        if self.refusal is not None:
            raise self.refusal
        return self.cards

    # ContainerPids
    def container_of(self, pid: int) -> str | None:
        return self.containers.get(pid)

    # the part of Registry that is used
    async def bindings(self) -> dict[str, str]:
        return dict(self.stored_bindings)

    async def add_bindings(self, bindings: dict[str, str]) -> None:
        self._write()
        self.stored_bindings |= bindings

    async def learned_sizes(self) -> tuple[LearnedSize, ...]:
        return tuple(self.stored_sizes)

    async def save_learned_size(self, size: LearnedSize) -> None:
        self._write()
        self.stored_sizes.append(size)

    def _write(self) -> None:
        if self.disk_full:
            raise RegistryUnwritableError("the disk is full")

    async def gpus(self, *, auto: bool = False, **selectors: str) -> Gpus:
        gpus = Gpus(
            self,
            self,
            self,  # type: ignore[arg-type]  # of the registry, what has to do with cards
            selectors=selectors,
            taken_ids=selectors,
            auto=auto,
            now=self.now,
            utcnow=lambda: self.time,
        )
        await gpus.load()
        return gpus


@pytest.fixture
def machine() -> Machine:
    return Machine()


def model(name: str = "tiny:latest", *, vram_bytes: int = GIB) -> Model:
    return Model(name, "sha", GIB, vram_bytes, None)


async def test_where_nothing_is_known_of_a_card_a_start_is_let_in(machine: Machine) -> None:
    machine.cards = (card(free=None),)
    gpus = await machine.gpus(one=A)
    await gpus.admit("one", needed_bytes=100 * GIB, wait_s=0)
    machine.refusal = GpuQueryError("the driver is gone")
    await gpus.admit("one", needed_bytes=100 * GIB, wait_s=0)
    assert gpus.why_missing("one") is None  # a driver that says nothing is no proof that a card is missing


async def test_a_refused_start_says_how_much_is_lacking(machine: Machine) -> None:
    machine.cards = (card(free=3 * GIB),)
    gpus = await machine.gpus(one=A)
    with pytest.raises(UnavailableError) as caught:
        await gpus.admit("one", needed_bytes=5 * GIB, wait_s=0)
    assert caught.value.details == {
        "needed_bytes": 5 * GIB,
        "lacking_bytes": 2 * GIB,
        "vram_free_bytes": 3 * GIB,
    }


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


async def test_memory_of_processes_that_the_driver_does_not_tell_is_unknown_and_not_none(
    machine: Machine,
) -> None:
    machine.containers = {7: CONTAINER, 8: CONTAINER, 9: "another"}
    processes = (GpuProcess(7, GIB), GpuProcess(8, None), GpuProcess(9, GIB), GpuProcess(10, GIB))
    machine.cards = (card(processes=processes),)
    gpus = await machine.gpus(one=A)
    gpus.note_container(CONTAINER, "one")
    held = gpus.holding("one")
    assert held.pids == frozenset({7, 8})
    assert held.used_bytes is None
    assert gpus.instance_of(9) is None
    gpus.forget_container(CONTAINER)
    assert gpus.holding("one").pids == frozenset()


async def test_without_figures_memory_is_given_back_when_the_processes_have_gone(machine: Machine) -> None:
    machine.containers = {7: CONTAINER}
    machine.cards = (card(processes=(GpuProcess(7, None),)),)
    gpus = await machine.gpus(one=A)
    gpus.note_container(CONTAINER, "one")
    held = gpus.holding("one")
    assert not await gpus.given_back("one", held, 14 * GIB, 0)
    machine.cards = (card(),)
    assert await gpus.given_back("one", held, 14 * GIB, 0)
    machine.cards = ()  # a card that has gone has nothing to give back
    assert await gpus.given_back("one", held, 14 * GIB, 0)


async def learning(machine: Machine, used: int | None) -> Gpus:
    machine.containers = {7: CONTAINER}
    machine.cards = (card(processes=(GpuProcess(7, used),)),)
    gpus = await machine.gpus(one=A)
    gpus.note_container(CONTAINER, "one")
    return gpus


async def test_only_a_real_difference_is_learned_anew_and_the_newest_model_counts(machine: Machine) -> None:
    gpus = await learning(machine, 5 * GIB)
    await gpus.learn("one", [model()])
    assert gpus.need_of("one", None) == 5 * GIB
    assert gpus.need_of("one", 7 * GIB) == 7 * GIB  # what the template says comes first
    machine.cards = (card(processes=(GpuProcess(7, 5 * GIB + 1000),)),)
    await gpus.refresh()
    await gpus.learn("one", [model()])
    assert len(machine.stored_sizes) == 1
    machine.time += timedelta(minutes=1)
    machine.cards = (card(processes=(GpuProcess(7, 2 * GIB),)),)
    await gpus.refresh()
    await gpus.learn("one", [model("small:latest")])
    assert gpus.need_of("one", None) == 2 * GIB
    assert (await machine.gpus(one=A)).need_of("one", None) == 2 * GIB
    assert gpus.need_of("another", None) == 0


@pytest.mark.parametrize(
    ("used", "models"),
    [
        (5 * GIB, []),
        (5 * GIB, [model(), model("small:latest")]),
        (5 * GIB, [model(vram_bytes=0)]),
        (None, [model()]),
        (0, [model()]),
    ],
)
async def test_what_cannot_be_told_apart_is_not_learned(
    machine: Machine, used: int | None, models: list[Model]
) -> None:
    gpus = await learning(machine, used)
    await gpus.learn("one", models)
    assert gpus.need_of("one", None) == 0
    assert machine.stored_sizes == []


async def test_a_full_disk_keeps_nothing_from_being_known_but_a_binding(machine: Machine) -> None:
    gpus = await learning(machine, 5 * GIB)
    machine.disk_full = True
    await gpus.learn("one", [model()])
    assert gpus.need_of("one", None) == 5 * GIB
    gpus = await machine.gpus(auto=True)
    assert gpus.instance_ids() == ()  # what is not stored could come out differently next time
    assert gpus.snapshot.gpus
    machine.disk_full = False
    await gpus.refresh()
    assert gpus.instance_ids() == ("gpu0",)


async def test_the_eleventh_card_comes_after_the_third(machine: Machine) -> None:
    machine.cards = tuple(card(f"GPU-{number:02}") for number in range(12))
    gpus = await machine.gpus(auto=True)
    assert gpus.instance_ids() == tuple(f"gpu{number}" for number in range(12))


async def test_a_selector_that_names_no_card_says_which(machine: Machine) -> None:
    machine.cards = (card(A),)
    gpus = await machine.gpus(slot="07:00.0", first="auto", second="auto")
    assert gpus.why_missing("slot") == "GPU 07:00.0 was not found"
    assert gpus.why_missing("first") is None
    assert gpus.why_missing("second") == "no free GPU was found"
    machine.refusal = GpuQueryError("the driver is gone")
    await gpus.refresh()
    assert gpus.why_missing("second") == "no free GPU was found: the driver is gone"


async def learned(machine: Machine, model: str, size: int) -> Gpus:
    """Cards that know what a model took on `gpu0`, and are as they were again."""
    gpus = await machine.gpus(gpu0=A)
    await gpus.refresh()
    machine.containers[7] = CONTAINER
    gpus.note_container(CONTAINER, "gpu0")
    before = machine.cards
    machine.cards = (card(processes=(GpuProcess(7, size),)),)
    await gpus.refresh()
    await gpus.learn("gpu0", (Model(model, "d", size, size, None),))
    machine.cards = before
    await gpus.refresh()
    return gpus


async def test_a_load_needs_what_the_model_took_before() -> None:
    machine = Machine()
    machine.cards = (card(free=3 * GIB),)
    gpus = await learned(machine, "qwen3:latest", 5 * GIB)
    assert gpus.load_lacks("gpu0", "qwen3") == 2 * GIB
    assert gpus.load_lacks("gpu0", "unknown") == 0
    assert gpus.load_lacks("gpu1", "qwen3") == 0
    with pytest.raises(UnavailableError, match="2147483648 more than are free") as caught:
        await gpus.admit_load("gpu0", "qwen3", wait_s=0)
    assert caught.value.reason == "vram_insufficient"
    machine.cards = (card(free=5 * GIB),)
    await gpus.admit_load("gpu0", "qwen3", wait_s=0)
    await gpus.admit_load("gpu0", "unknown", wait_s=0)


async def test_what_an_instance_holds_itself_makes_room_for_its_next_model() -> None:
    machine = Machine()
    machine.cards = (card(free=1 * GIB, processes=(GpuProcess(7, 4 * GIB),)),)
    gpus = await learned(machine, "qwen3", 5 * GIB)
    assert gpus.load_lacks("gpu0", "qwen3") == 0
