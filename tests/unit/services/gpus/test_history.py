"""The samples of cards: by 5 seconds, by minutes, over restarts, and within their bounds."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from manager.adapters.registry import open_registry
from manager.domain.gpu import GpuProcess
from manager.domain.gpu_history import CardMinute, Sample
from manager.errors import RegistryCorruptError, RegistryUnwritableError
from manager.services.gpus.history import MOST_CARDS, STEP_S, GpuHistory, Span
from tests.support.gpu_machine import GIB, A, B, card, filled

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from manager.adapters.registry import SqlRegistry
    from manager.services.gpus import Gpus
    from tests.support.gpu_machine import Machine

# 2026-01-01T00:00:00Z, as in `Machine`, on the begin of a minute.
BEGIN = 1767225600


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[SqlRegistry]:
    opened = await open_registry(tmp_path / "registry.sqlite3")
    yield opened
    await opened.close()


def history(machine: Machine, gpus: Gpus, registry: Any) -> GpuHistory:
    return GpuHistory(gpus, registry, now=machine.now, utcnow=lambda: machine.time)


async def show(machine: Machine, gpus: Gpus, it: GpuHistory, *cards: Any, steps: int = 1) -> None:
    """Have the cards read and sampled for some steps of five seconds."""
    for _ in range(steps):
        await machine.show(gpus, *cards)
        it.take()
        machine.advance(STEP_S)


def known(column: Iterable[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in column]


async def test_samples_of_the_hour_have_memory_by_holder_and_gaps_where_nothing_was_read(
    machine: Machine, registry: SqlRegistry
) -> None:
    machine.containers, machine.names = {7: "c" * 64}, {8: "python3"}
    gpus = await machine.gpus(gpu0=A)
    gpus.note_container("c" * 64, "gpu0")
    it = history(machine, gpus, registry)
    busy = replace(filled((7, GIB), (8, 2 * GIB)), utilisation_percent=90, power_watts=300.5)
    await show(machine, gpus, it, busy)
    await machine.refuse(gpus, "timeout")
    it.take()
    machine.advance(STEP_S)
    await show(machine, gpus, it, filled((7, GIB)))
    (found,) = it.cards(Span.HOUR)
    assert (found.uuid, found.name, found.total_bytes) == (A, "Card", 24 * GIB)
    columns = found.columns
    assert (columns.begins_s, columns.step_s) == (BEGIN, 5)
    assert known(columns.used_bytes) == [3 * GIB, None, GIB]
    assert known(columns.utilisation_percent) == [90, None, None]
    assert known(columns.power_watts) == [300.5, None, None]
    assert known(columns.temperature_c) == [None] * 3
    assert {name: known(one) for name, one in columns.instances.items()} == {"gpu0": [GIB, None, GIB]}
    assert {name: known(one) for name, one in columns.processes.items()} == {"python3": [2 * GIB, None, 0]}
    assert it.cards(Span.DAY) == []


async def test_a_minute_is_the_mean_of_its_samples(machine: Machine, registry: SqlRegistry) -> None:
    gpus = await machine.gpus(gpu0=A)
    it = history(machine, gpus, registry)
    await show(machine, gpus, it, replace(filled(), temperature_c=40), steps=6)
    await show(machine, gpus, it, replace(filled((1, GIB)), temperature_c=60), steps=6)
    before = it.version(Span.DAY)
    machine.advance(60)
    await show(machine, gpus, it, filled(), steps=13)
    assert it.version(Span.DAY) > before
    (found,) = it.cards(Span.DAY, A)
    assert (found.columns.begins_s, found.columns.step_s) == (BEGIN, 60)
    assert known(found.columns.used_bytes) == [GIB / 2, None, 0]
    assert known(found.columns.temperature_c) == [50, None, None]
    assert {name: known(one) for name, one in found.columns.processes.items()} == {
        "unknown": [GIB / 2, None, 0]
    }


async def test_a_card_that_is_gone_keeps_its_past_for_the_span_and_comes_last(
    machine: Machine, registry: SqlRegistry
) -> None:
    gpus = await machine.gpus(other=B)
    it = history(machine, gpus, registry)
    await show(machine, gpus, it, card(A), steps=13)
    await show(machine, gpus, it, card(B), steps=2)
    assert [one.uuid for one in it.cards(Span.HOUR)] == [B, A]
    assert it.has(A)
    await show(machine, gpus, it, card(B), steps=720)
    assert [one.uuid for one in it.cards(Span.HOUR)] == [B]
    assert [one.uuid for one in it.cards(Span.DAY)] == [B, A]
    machine.advance(24 * 3600)
    await show(machine, gpus, it, card(B), steps=14)
    assert [one.uuid for one in it.cards(Span.DAY)] == [B]
    assert (it.has(A), it.has(B), it.has("GPU-x")) == (False, True, False)


async def test_minutes_survive_a_restart(machine: Machine, registry: SqlRegistry) -> None:
    machine.names = {8: "python3"}
    gpus = await machine.gpus(gpu0=A)
    it = history(machine, gpus, registry)
    await show(machine, gpus, it, replace(filled((8, GIB)), power_watts=70.5), steps=18)
    await it.close()
    machine.advance(180)
    again = history(machine, gpus, registry)
    await again.load()
    assert again.cards(Span.HOUR) == []
    (found,) = again.cards(Span.DAY)
    assert (found.name, found.total_bytes) == ("Card", 24 * GIB)
    # A minute and a half was read, the rest of four and a half was not.
    assert known(found.columns.used_bytes) == [GIB, GIB, None, None]
    assert known(found.columns.power_watts) == [70.5, 70.5, None, None]
    assert {name: known(one) for name, one in found.columns.processes.items()} == {
        "python3": [GIB, GIB, None, None]
    }


async def test_what_is_older_than_26_hours_is_deleted_and_what_is_to_come_is_not_shown(
    machine: Machine, registry: SqlRegistry
) -> None:
    gpus = await machine.gpus(gpu0=A)
    one = CardMinute(A, "Card", None, Sample(used_bytes=1))
    now_s = int(machine.now())
    await registry.save_gpu_minutes({now_s - 27 * 3600: [one], now_s + 3600: [one], now_s - 60: [one]}, 0)
    it = history(machine, gpus, registry)
    await it.load()
    (found,) = it.cards(Span.DAY)
    assert known(found.columns.used_bytes) == [1]
    await show(machine, gpus, it, card(A), steps=13)
    await it.flush()
    assert list(await registry.gpu_minutes(0)) == [now_s - 60, now_s, now_s + 3600]


async def test_a_row_that_cannot_be_read_is_a_corrupt_registry(registry: SqlRegistry) -> None:
    odd: Any = CardMinute(A, "Card", 1, Sample(used_bytes="much"))  # type: ignore[arg-type]
    await registry.save_gpu_minutes({60: [odd]}, 0)
    with pytest.raises(RegistryCorruptError):
        await registry.gpu_minutes(0)


class FullDisk:
    """A registry that takes minutes once there is room."""

    def __init__(self) -> None:
        self.is_full = True
        self.saves = 0
        self.minutes: dict[int, Any] = {}

    async def save_gpu_minutes(self, minutes: dict[int, Any], before_s: int) -> None:
        await asyncio.sleep(0)
        if self.is_full:
            raise RegistryUnwritableError("the disk is full")
        self.saves += 1
        self.minutes |= minutes


async def test_a_disk_that_is_full_costs_what_is_older_than_an_hour_and_nothing_else(
    machine: Machine,
) -> None:
    gpus = await machine.gpus(gpu0=A)
    disk = FullDisk()
    it = history(machine, gpus, disk)
    for _ in range(70):
        await show(machine, gpus, it, card(A))
        machine.advance(60 - STEP_S)
        await it.flush()
    disk.is_full = False
    await it.close()
    assert list(disk.minutes) == [BEGIN + 60 * n for n in range(10, 70)]


async def test_a_minute_that_ends_while_others_are_written_is_written_next(machine: Machine) -> None:
    gpus = await machine.gpus(gpu0=A)
    disk = FullDisk()
    disk.is_full = False
    it = history(machine, gpus, disk)
    await show(machine, gpus, it, card(A), steps=13)
    writing = asyncio.create_task(it.flush())
    await asyncio.sleep(0)
    await show(machine, gpus, it, card(A), steps=12)
    await writing
    assert list(disk.minutes) == [BEGIN]
    await it.flush()
    assert list(disk.minutes) == [BEGIN, BEGIN + 60]
    await it.flush()
    assert disk.saves == 2, "nothing is written twice"


async def test_slices_that_come_and_go_for_ever_are_not_remembered_for_ever(
    machine: Machine, registry: SqlRegistry
) -> None:
    gpus = await machine.gpus()
    it = history(machine, gpus, registry)
    for n in range(MOST_CARDS + 10):
        await show(machine, gpus, it, card(f"MIG-{n}"))
    found = [one.uuid for one in it.cards(Span.HOUR)]
    assert set(found) == {f"MIG-{n}" for n in range(10, MOST_CARDS + 10)}
    await show(machine, gpus, it, *(card(f"GPU-{n}") for n in range(MOST_CARDS + 1)))
    assert {one.uuid for one in it.cards(Span.HOUR)} == {f"GPU-{n}" for n in range(MOST_CARDS)}


async def test_cards_that_are_watched_at_longer_intervals_are_read_for_each_sample(
    machine: Machine, registry: SqlRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.cards = (card(A),)
    gpus = await machine.gpus(gpu0=A)
    it = history(machine, gpus, registry)
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:  # somebody else reads the cards, three seconds before the sample
            machine.advance(seconds - 3)
            await machine.show(gpus, card(A, free=GIB))
            machine.advance(3)
        else:
            machine.advance(seconds)
        machine.cards = (card(A, free=len(waits)),)
        if len(waits) == 58:
            assert await registry.gpu_minutes(0) == {}
        if len(waits) > 70:
            raise asyncio.CancelledError

    machine.advance(1.5)
    monkeypatch.setattr("manager.services.gpus.history.asyncio.sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await it.run()
    assert waits[:3] == [3.5, 5, 5]
    (found,) = it.cards(Span.HOUR)
    free = [24 * GIB - int(value) for value in found.columns.used_bytes]
    assert free == [1, 2, GIB, *range(4, 71)]
    assert len(await registry.gpu_minutes(0)) == 5, "five minutes are written together"


def busy_machine(machine: Machine, cards: int) -> list[Any]:
    """Cards with two instances and six foreign processes each."""
    processes = tuple(GpuProcess(pid, GIB + pid) for pid in range(8))
    machine.names = {pid: f"program{pid}" for pid in range(8)}
    machine.containers = {0: "a" * 64, 1: "b" * 64}
    sensors = {"utilisation_percent": 90, "temperature_c": 70, "power_watts": 300.0}
    return [
        replace(card(f"GPU-{n:02}", processes=processes), index=n, **sensors)  # type: ignore[arg-type]
        for n in range(cards)
    ]


async def test_a_sample_of_sixteen_cards_takes_a_millisecond(machine: Machine, registry: SqlRegistry) -> None:
    gpus = await machine.gpus()
    for container, instance in (("a", "gpu0"), ("b", "gpu1")):
        gpus.note_container(container * 64, instance)
    it = history(machine, gpus, registry)
    await machine.show(gpus, *busy_machine(machine, 16))
    taken = []
    for _ in range(48):
        begun = time.perf_counter()
        it.take()
        taken.append(time.perf_counter() - begun)
        machine.advance(STEP_S)
    # 0.4 ms; coverage and a slow machine take ten times as long.
    assert min(taken) < 0.010
    assert len(it.cards(Span.HOUR)) == 16
