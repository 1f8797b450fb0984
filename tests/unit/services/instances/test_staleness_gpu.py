"""Signs that a GPU container computes on the CPU, and what only looks like one."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from manager.domain.instance import ContainerFacts
from manager.services.instances.staleness import Staleness
from tests.support.gpu_machine import GIB, A, Machine, filled, model

if TYPE_CHECKING:
    from manager.services.gpus import Gpus

CONTAINER = "c" * 64
STARTED = datetime(2026, 1, 1, tzinfo=UTC)
FACTS = ContainerFacts(CONTAINER, "default-ollama-one", "image", "running", pid=5, started_at=STARTED)
ON_GPU = 'level=INFO msg="inference compute" id=GPU-a library=cuda'
ON_CPU = 'level=INFO msg="inference compute" id=cpu library=cpu'
BIG = model("big:latest", digest="big", size=4 * GIB)
SLOW = model("slow:latest", digest="slow", size=GIB, vram_bytes=0)


class Bench:
    """The staleness of `one`, whose container runs on a card where processes are seen."""

    def __init__(self, machine: Machine, gpus: Gpus) -> None:
        self.machine = machine
        self.gpus = gpus
        self.log: tuple[str, ...] = (ON_GPU,)
        self._world = SimpleNamespace(
            is_shared=False,
            gpus=gpus,
            engine=SimpleNamespace(logs_between=self._logs),
            now=machine.now,
            utcnow=lambda: machine.time,
        )
        self.staleness = Staleness(cast("Any", self._world), "one")
        self.staleness.fresh(FACTS, wanted_hash=None, on_gpu=True)

    async def _logs(self, _container: str, _since: object, _until: object) -> tuple[str, ...]:
        return self.log

    async def probed(self, *models: Any, after_s: float = 2.0) -> bool:
        self.machine.advance(after_s)
        return await self.staleness.prove_device(FACTS, models)

    @property
    def code(self) -> str | None:
        return self.staleness.why.code if self.staleness.why else None


@pytest.fixture
async def bench() -> Bench:
    machine = Machine()
    machine.containers = {5: CONTAINER, 7: CONTAINER}
    machine.cards = (filled((7, 4 * GIB)),)
    gpus = await machine.gpus(one=A)
    gpus.note_container(CONTAINER, "one", 5)
    await gpus.refresh()
    return Bench(machine, gpus)


# A card that was lost inside the container


async def test_a_loaded_model_without_memory_on_the_card_is_a_fallback(bench: Bench) -> None:
    assert not await bench.probed(BIG)
    await bench.machine.show(bench.gpus, filled())
    assert not await bench.probed(BIG, after_s=0)
    assert not await bench.probed(BIG, after_s=4.5)
    assert await bench.probed(BIG, after_s=0.6)
    assert bench.code == "gpu_fallback"
    assert bench.staleness.why is not None
    assert "no process of the container holds memory on the card" in bench.staleness.why.message
    assert not await bench.probed(BIG)  # it is said once


async def test_the_last_reading_may_be_older_than_the_load(bench: Bench) -> None:
    await bench.machine.show(bench.gpus, filled())
    bench.machine.cards = (filled((7, 4 * GIB)),)
    for _ in range(5):
        assert not await bench.probed(BIG)
    assert bench.code is None


async def test_a_moment_without_memory_is_no_fallback(bench: Bench) -> None:
    for _ in range(5):  # one model makes way for the next
        bench.machine.cards = (filled(),)
        await bench.gpus.refresh()
        assert not await bench.probed(BIG, after_s=4)
        bench.machine.cards = (filled((7, GIB)),)
        await bench.gpus.refresh()
        assert not await bench.probed(BIG, after_s=4)


async def test_without_a_model_in_memory_nothing_is_missing(bench: Bench) -> None:
    await bench.machine.show(bench.gpus, filled())
    assert not await bench.probed(BIG)
    assert not await bench.probed(after_s=10)
    assert not await bench.probed(BIG, after_s=4)  # counted from anew
    assert bench.code is None


async def test_a_driver_that_lists_no_processes_proves_no_fallback(bench: Bench) -> None:
    await bench.machine.show(bench.gpus, filled())
    await bench.machine.refuse(bench.gpus, "timeout")
    for _ in range(5):
        assert not await bench.probed(BIG)


async def test_what_one_container_lacked_is_not_held_against_the_next(bench: Bench) -> None:
    await bench.machine.show(bench.gpus, filled())
    assert not await bench.probed(BIG)
    bench.staleness.fresh(FACTS, wanted_hash=None, on_gpu=True)
    assert not await bench.probed(BIG, after_s=10)


# Models on the processor


@pytest.fixture
async def idle(bench: Bench) -> Bench:
    """Nothing of the instance is on its card."""
    await bench.machine.show(bench.gpus, filled())
    assert not await bench.probed()
    return bench


async def test_a_model_on_the_processor_is_a_fallback_where_no_request_asked_for_it(idle: Bench) -> None:
    assert await idle.probed(SLOW)
    assert idle.code == "gpu_fallback"


async def test_what_a_request_asked_for_is_no_fallback(idle: Bench) -> None:
    idle.staleness.expect_on_cpu("Slow")  # another spelling of its name
    for _ in range(500):
        assert not await idle.probed(SLOW)
    assert idle.code is None
    other = model("other:latest", digest="other", vram_bytes=0)
    assert await idle.probed(SLOW, other)  # nobody asked for that one


async def test_a_model_that_is_loaded_anew_for_the_processor_is_no_fallback(bench: Bench) -> None:
    on_gpu = model("slow:latest", digest="slow")
    assert not await bench.probed(on_gpu)
    bench.staleness.expect_on_cpu("slow:latest")
    await bench.machine.show(bench.gpus, filled())
    assert not await bench.probed()
    assert not await bench.probed(SLOW)


async def test_a_request_excuses_its_model_until_that_is_unloaded(idle: Bench) -> None:
    idle.staleness.expect_on_cpu("slow")
    assert not await idle.probed(after_s=300)
    assert not await idle.probed(SLOW, after_s=0)
    assert not await idle.probed(SLOW, after_s=299)
    assert not await idle.probed(after_s=2)
    assert await idle.probed(SLOW)


async def test_a_request_excuses_nothing_of_the_next_container(idle: Bench) -> None:
    idle.staleness.expect_on_cpu("slow")
    idle.staleness.clear()
    assert await idle.probed(SLOW)


async def test_requests_for_many_models_are_remembered_up_to_a_bound(idle: Bench) -> None:
    for number in range(65):
        idle.staleness.expect_on_cpu(f"m{number}")
    assert not await idle.probed(model("m64:latest", vram_bytes=0))
    assert await idle.probed(model("m0:latest", vram_bytes=0))


async def test_a_model_on_the_processor_beside_one_on_the_card_is_no_fault_of_the_container(
    bench: Bench,
) -> None:
    assert not await bench.probed(BIG, SLOW)
    assert bench.code is None


async def test_a_log_that_names_the_processor_alone_is_a_fallback_whatever_was_asked_for(idle: Bench) -> None:
    idle.staleness.fresh(FACTS, wanted_hash=None, on_gpu=True)
    idle.log = (ON_CPU,)
    idle.staleness.expect_on_cpu("slow")
    assert await idle.probed(SLOW)
