"""What a model takes is learned from whole loads, at rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.gpu_machine import GIB, A, filled, model

if TYPE_CHECKING:
    from manager.domain.instance import Model
    from manager.services.gpus import Gpus
    from tests.support.gpu_machine import Machine

CONTAINER = "c" * 64
DAY_S = 24 * 3600


@pytest.fixture
async def gpus(machine: Machine) -> Gpus:
    machine.containers = {7: CONTAINER}
    gpus = await machine.gpus(one=A)
    gpus.note_container(CONTAINER, "one")
    return gpus


async def probed(machine: Machine, gpus: Gpus, used: int | None, *models: Model, times: int = 2) -> None:
    """Probes that see these models in memory, and the instance hold so much."""
    await machine.show(gpus, filled((7, used)))
    for _ in range(times):
        machine.advance(2)
        await gpus.learn("one", models)


async def test_a_size_is_learned_and_stored_when_two_measurements_agree(machine: Machine, gpus: Gpus) -> None:
    await probed(machine, gpus, 2 * GIB, model(), times=1)  # the load goes on
    assert gpus.need_of("one", None) == 0
    await probed(machine, gpus, 5 * GIB, model(), times=1)
    assert gpus.need_of("one", None) == 0
    await probed(machine, gpus, 5 * GIB + 1000, model(), times=1)
    assert gpus.need_of("one", None) == 5 * GIB + 1000
    assert gpus.need_of("one", 7 * GIB) == 7 * GIB  # the template's own figure comes first
    assert gpus.need_of("another", None) == 0
    assert len(machine.stored_sizes) == 1
    assert (await machine.gpus(one=A)).need_of("one", None) == 5 * GIB + 1000


async def test_memory_of_the_model_before_is_not_counted(machine: Machine, gpus: Gpus) -> None:
    await probed(machine, gpus, 9 * GIB, model("old:latest", digest="old"), times=1)
    await probed(machine, gpus, 9 * GIB, model(), times=1)  # the old one is on its way out
    await probed(machine, gpus, 3 * GIB, model(), times=2)
    assert gpus.need_of("one", None) == 3 * GIB


@pytest.mark.parametrize(
    ("used", "models"),
    [
        (5 * GIB, []),
        (5 * GIB, [model(), model("small:latest")]),
        (5 * GIB, [model(vram_bytes=0)]),
        (5 * GIB, [model(size=3 * GIB, vram_bytes=GIB)]),  # the rest is computed by the processor
        (5 * GIB, [model(size=3 * GIB, vram_bytes=3 * GIB - 1)]),
        (5 * GIB, [model(size=0, vram_bytes=0)]),
        (None, [model()]),
        (0, [model()]),
    ],
)
async def test_what_is_not_a_whole_load_is_not_learned(
    machine: Machine, gpus: Gpus, used: int | None, models: list[Model]
) -> None:
    await probed(machine, gpus, used, *models, times=3)
    assert gpus.need_of("one", None) == 0
    assert machine.stored_sizes == []


async def test_the_largest_of_recent_measurements_counts(machine: Machine, gpus: Gpus) -> None:
    await probed(machine, gpus, 5 * GIB, model())
    await probed(machine, gpus, 3 * GIB, model())  # with a smaller context
    assert gpus.need_of("one", None) == 5 * GIB
    await probed(machine, gpus, 8 * GIB, model())
    assert gpus.need_of("one", None) == 8 * GIB
    machine.advance(8 * DAY_S)
    await probed(machine, gpus, 3 * GIB, model())
    assert gpus.need_of("one", None) == 3 * GIB


async def test_a_small_difference_is_not_written_down(machine: Machine, gpus: Gpus) -> None:
    await probed(machine, gpus, 5 * GIB, model())
    await probed(machine, gpus, 5 * GIB + 1000, model(), times=5)
    assert len(machine.stored_sizes) == 1


async def test_a_start_needs_what_the_model_learned_last_took(machine: Machine, gpus: Gpus) -> None:
    await probed(machine, gpus, 5 * GIB, model())
    await probed(machine, gpus, 2 * GIB, model("small:latest", digest="small"))
    assert gpus.need_of("one", None) == 2 * GIB


async def test_a_full_disk_keeps_no_size_from_being_known(machine: Machine, gpus: Gpus) -> None:
    machine.disk_full = True
    await probed(machine, gpus, 5 * GIB, model())
    assert gpus.need_of("one", None) == 5 * GIB
    assert machine.stored_sizes == []


async def test_a_measurement_of_a_container_that_has_ended_confirms_nothing(
    machine: Machine, gpus: Gpus
) -> None:
    await probed(machine, gpus, 5 * GIB, model(), times=1)
    gpus.drop_claim("one")
    await probed(machine, gpus, 5 * GIB, model(), times=1)
    assert gpus.need_of("one", None) == 0


@pytest.mark.parametrize(("before", "after"), [(None, 5 * GIB), (5 * GIB, None)])
async def test_a_measurement_is_not_confirmed_by_the_lack_of_one(
    machine: Machine, gpus: Gpus, before: int | None, after: int | None
) -> None:
    await probed(machine, gpus, before, model(), times=1)
    await probed(machine, gpus, after, model(), times=1)
    assert gpus.need_of("one", None) == 0


async def test_the_sizes_of_thousands_of_models_do_not_pile_up(
    machine: Machine, gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.services.gpus.learning._MOST_SIZES", 3)
    for number in range(5):
        await probed(machine, gpus, (number + 1) * GIB, model(f"m{number}:latest", digest=str(number)))
    await machine.show(gpus, filled((7, 0)))
    listed = [{"name": f"m{number}:latest", "digest": str(number)} for number in range(5)]
    sizes = [gpus._learned.here("one", entry["name"], entry["digest"], (A,)) for entry in listed]
    assert [size and size.vram_bytes // GIB for size in sizes] == [None, None, 3, 4, 5]
    assert len((await machine.gpus(one=A))._learned._sizes) == 3
