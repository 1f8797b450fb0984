"""What fits where: only what was measured fits for certain, and unknown stays unknown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.gpu import GpuProcess
from manager.domain.instance import DeviceKind
from manager.services.gpus import Need, Room
from manager.services.models.fitting import Fit, Fitting
from tests.support.gpu_machine import GIB, A, B, Machine, card, filled, model

if TYPE_CHECKING:
    from manager.services.gpus import Gpus

BIG = {"name": "big:1b", "digest": "big", "size": 12 * GIB}
SMALL = {"name": "small:1b", "digest": "small", "size": GIB}
PID = 7


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize(
    ("rooms", "held", "need", "fits"),
    [
        ((10,), 0, Need(10, "measured"), True),
        ((10,), 0, Need(11, "measured"), False),
        ((10,), 5, Need(15, "measured"), True),  # the server frees what it holds itself
        ((10,), 0, Need(11, "file"), False),
        ((10,), 0, Need(9, "file"), None),
        ((10,), 0, Need(9, "elsewhere"), None),
        ((6, 6), 0, Need(11, "measured"), True),  # it is divided
        ((12, -4), 0, Need(12, "measured"), True),  # the debt of one card is none of the other's
        ((None,), 0, Need(1, "measured"), None),
        ((6, None), 0, Need(100, "measured"), None),
        ((), 0, Need(1, "measured"), None),
    ],
)
def test_a_model_fits_where_its_measured_size_has_room(
    rooms: tuple[int | None, ...], held: int, need: Need, fits: bool | None
) -> None:
    assert Room(held, rooms).fits(need) is fits


class Stage:
    """Instances with models on cards."""

    def __init__(self, gpus: Gpus, **instances: DeviceKind) -> None:
        self.models: dict[str, Any] = {}
        specs = [
            SimpleNamespace(id=id_, spec=SimpleNamespace(device_kind=kind), gpus=gpus)
            for id_, kind in instances.items()
        ]
        fleet, overviews = (
            SimpleNamespace(instances=lambda: specs),
            SimpleNamespace(models=lambda: self.models),
        )
        self.fitting = Fitting(fleet, overviews)  # type: ignore[arg-type]

    def show(self, **entries: Any) -> None:
        """Have models, each in one place with these instances: key=(entry, instances)."""
        self.models = {
            key: SimpleNamespace(places=(SimpleNamespace(entry=entry, instances=instances),))
            for key, (entry, instances) in entries.items()
        }


async def test_what_is_measured_decides_and_a_reading_that_changes_nothing_is_the_same_object(
    machine: Machine,
) -> None:
    machine.containers = {PID: "c" * 64}
    machine.cards = (card(A, free=20 * GIB), card(B, free=10 * GIB))
    gpus = await machine.gpus(one=A, two=B)
    gpus.note_container("c" * 64, "one")
    stage = Stage(gpus, one=DeviceKind.GPU, two=DeviceKind.GPU, cpu=DeviceKind.CPU)
    stage.show(big=(BIG, ("one", "two", "cpu")), small=(SMALL, ("one",)), odd=({"name": "odd"}, ("two",)))
    first = stage.fitting.current()
    assert {id_: room.bytes for id_, room in first.rooms.items()} == {"one": 20 * GIB, "two": 10 * GIB}
    assert first.models == (
        Fit("big", "one", Need(12 * GIB, "file"), None),
        Fit("big", "two", Need(12 * GIB, "file"), False),
        Fit("small", "one", Need(GIB, "file"), None),
        Fit("odd", "two", None, None),
    )
    assert stage.fitting.current() is first
    machine.cards = (filled((PID, 2 * GIB), uuid=A), card(B, free=10 * GIB))
    for _ in range(2):
        machine.advance(2)
        await gpus.refresh()
        await gpus.learn("one", [model("small:1b", digest="small")])
    stage.show(big=(BIG, ("one",)), small=(SMALL, ("one", "two")))
    second = stage.fitting.current()
    assert second.rooms["one"] == Room(2 * GIB, (22 * GIB,))
    assert second.models[1:] == (
        Fit("small", "one", Need(2 * GIB, "measured"), True),
        Fit("small", "two", Need(2 * GIB, "elsewhere"), None),
    )
    await machine.show(gpus, filled((PID, 2 * GIB), (99, 21 * GIB), uuid=A), card(B, free=10 * GIB))
    third = stage.fitting.current()
    assert third.rooms["one"] == Room(2 * GIB, (GIB,))
    assert third.models[0] == Fit("big", "one", Need(12 * GIB, "file"), False)


async def test_a_card_that_cannot_be_read_makes_it_unknown(machine: Machine) -> None:
    machine.cards = (card(A, free=20 * GIB, processes=(GpuProcess(1, GIB),)),)
    gpus = await machine.gpus(one=A)
    stage = Stage(gpus, one=DeviceKind.GPU)
    stage.show(big=({**BIG, "size": 30 * GIB}, ("one",)))
    assert stage.fitting.current().models[0].fits is False
    await machine.refuse(gpus)
    assert stage.fitting.current().models[0].fits is None
    assert stage.fitting.current().rooms["one"].bytes is None


async def test_a_size_that_a_server_tells_is_no_measured_one_from_the_moment_that_processes_are_not_listed(
    machine: Machine,
) -> None:
    machine.cards = (filled((PID, 2 * GIB)),)
    machine.containers = {PID: "c" * 64}
    gpus = await machine.gpus(one=A)
    gpus.note_container("c" * 64, "one")
    for _ in range(2):
        await gpus.learn("one", [model("small:1b", digest="small")])
    stage = Stage(gpus, one=DeviceKind.GPU)
    stage.show(small=(SMALL, ("one",)))
    assert stage.fitting.current().models == (Fit("small", "one", Need(2 * GIB, "measured"), True),)
    await machine.show(gpus, card(A, free=20 * GIB, lists_processes=False))
    assert stage.fitting.current().models == (Fit("small", "one", Need(2 * GIB, "server"), None),)
