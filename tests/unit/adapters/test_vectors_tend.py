# ruff: noqa: ASYNC240  (a test's loop has nothing else to do meanwhile)
"""Tending of tables of vectors: the index, small files, old states, and what goes on meanwhile."""

from __future__ import annotations

import asyncio
import random
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from manager.adapters.vectors import LanceVectors, tending
from manager.errors import VectorsUnavailableError
from manager.services.embeddings.ports import TableFacts
from tests.support.vectors import AT, FACTS, cosine, nearest, row, rows, unit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

MANY = 12_000


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "vectors"


@pytest.fixture
async def vectors(directory: Path) -> AsyncIterator[LanceVectors]:
    vectors = LanceVectors(directory)
    yield vectors
    await vectors.close()


@pytest.fixture
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tending, "_KEPT", timedelta(milliseconds=1))


def files(directory: Path, part: str) -> int:
    return sum(path.is_file() for path in (directory / "v1.lance" / part).rglob("*"))


def states(directory: Path) -> int:
    return len(list((directory / "v1.lance" / "_versions").glob("*.manifest")))


def index_of(directory: Path) -> Any:
    import lancedb  # noqa: PLC0415

    found = list(lancedb.connect(directory).open_table("v1").list_indices())
    assert len(found) <= 1
    return next(iter(found), None)


async def recall(vectors: LanceVectors, numbers: set[int], dim: int = 16) -> float:
    """Of the ten nearest rows of 20 vectors, those that are found."""
    found = 0
    for asked in range(900_000, 900_020):
        vector = unit(asked, dim)
        hits = await vectors.search(1, vector, 10)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        for hit in hits:
            assert hit.score == pytest.approx(cosine(vector, unit(hit.number, dim)), abs=1e-5)
        found += len({hit.number for hit in hits} & set(nearest(vector, numbers, 10)))
    return found / 200


async def test_an_index_finds_what_an_exact_search_finds_and_new_rows_too(
    vectors: LanceVectors, directory: Path
) -> None:
    await vectors.add(1, FACTS, rows(*range(MANY)), AT)
    assert index_of(directory) is None
    await vectors.tend(1)
    built = index_of(directory)
    assert (built.index_type, built.num_indexed_rows) == ("IvfRq", MANY)
    assert await recall(vectors, set(range(MANY))) >= 0.95

    await vectors.add(1, FACTS, rows(*range(MANY, MANY + 30)), AT)
    await vectors.remove(1, [7])
    assert [hit.number for hit in await vectors.search(1, unit(MANY + 3), 1)] == [MANY + 3]
    assert [hit.number for hit in await vectors.search(1, unit(7), 1)] != [7]
    await vectors.tend(1)
    assert index_of(directory).num_unindexed_rows == 30

    await vectors.add(1, FACTS, rows(*range(MANY + 30, MANY + 1500)), AT)
    await vectors.remove(1, range(0, 6000, 2))
    await vectors.tend(1)
    assert index_of(directory).num_unindexed_rows == 0
    there = set(range(MANY + 1500)) - set(range(0, 6000, 2)) - {7}
    assert await vectors.numbers(1) == there
    assert await recall(vectors, there) >= 0.95


async def test_more_hits_are_asked_for_than_an_index_is_good_for(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(*range(MANY)), AT)
    await vectors.tend(1)
    assert len({hit.number for hit in await vectors.search(1, unit(1), 2 * MANY)}) == MANY
    assert [hit.number for hit in await vectors.search(1, unit(1), 3000)] == nearest(
        unit(1), range(MANY), 3000
    )


async def test_an_index_takes_vectors_of_any_length(vectors: LanceVectors, directory: Path) -> None:
    odd = TableFacts("odd", 5, "1")
    await vectors.add(1, odd, [row(number, 5) for number in range(MANY)], AT)
    await vectors.tend(1)
    assert index_of(directory).num_indexed_rows == MANY
    assert await recall(vectors, set(range(MANY)), 5) >= 0.95


async def test_an_index_is_built_anew_once_the_table_has_grown(
    vectors: LanceVectors, directory: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_kept: None
) -> None:
    monkeypatch.setattr(tending, "INDEX_FROM_ROWS", 500)
    monkeypatch.setattr(tending, "MOST_SEGMENTS", 3)
    await vectors.add(1, FACTS, rows(*range(5000)), AT)
    await vectors.tend(1)
    names, rows_there = [index_of(directory).name], 5000
    for _ in range(4):
        await vectors.add(1, FACTS, rows(*range(rows_there, rows_there + 1200)), AT)
        rows_there += 1200
        await vectors.tend(1)
        index = index_of(directory)
        assert index.num_unindexed_rows == 0
        names.append(index.name)
    assert names == ["rows_5000", "rows_5000", "rows_7400", "rows_7400", "rows_9800"]
    assert index.num_segments == 1
    assert files(directory, "data") == 1
    assert await recall(vectors, set(range(rows_there))) >= 0.95


async def test_many_small_adds_become_few_files(
    vectors: LanceVectors, directory: Path, nothing_is_kept: None
) -> None:
    for number in range(100):
        await vectors.add(1, FACTS, rows(number), AT)
    await vectors.remove(1, [3])
    assert (files(directory, "data"), states(directory)) == (100, 102)
    leftover = directory / "v1.lance" / "data" / f"{'01' * 12}ab5e48299e40dfcf9af7023f.lance"
    leftover.write_bytes(b"of an add that was killed")
    await vectors.tend(1)
    assert (files(directory, "data"), states(directory)) == (1, 1)
    assert await vectors.numbers(1) == set(range(100)) - {3}


async def test_many_removals_become_few_files(
    vectors: LanceVectors, directory: Path, nothing_is_kept: None
) -> None:
    await vectors.add(1, FACTS, rows(*range(1000)), AT)
    for number in range(70):
        await vectors.remove(1, [number])
    assert states(directory) == 72
    await vectors.tend(1)
    assert (states(directory), files(directory, "_deletions")) == (1, 1)
    assert await vectors.numbers(1) == set(range(70, 1000))


async def test_where_nothing_is_due_nothing_is_written(vectors: LanceVectors, directory: Path) -> None:
    await vectors.add(1, FACTS, rows(*range(200)), AT)
    for number in range(200, 210):
        await vectors.add(1, FACTS, rows(number), AT)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    await vectors.tend(1)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


async def test_calls_go_on_during_tends_and_no_row_is_lost(
    vectors: LanceVectors, monkeypatch: pytest.MonkeyPatch, nothing_is_kept: None
) -> None:
    monkeypatch.setattr(tending, "MOST_NEW_FILES", 3)
    monkeypatch.setattr(tending, "INDEX_FROM_ROWS", 1000)
    there = set(range(2000))
    await vectors.add(1, FACTS, rows(*there), AT)
    is_over = False

    async def write() -> None:
        nonlocal is_over
        for first in range(2000, 2800, 20):
            await vectors.add(1, FACTS, rows(*range(first, first + 20)), AT)
            there.update(range(first, first + 20))
            gone = random.Random(first).sample(sorted(there), 40)
            await vectors.remove(1, gone)
            there.difference_update(gone)
        is_over = True

    async def read() -> None:
        while not is_over:
            assert len(await vectors.search(1, unit(1), 10)) == 10
            assert len(await vectors.numbers(1)) >= 1000

    async def tend() -> int:
        tends = 0
        while not is_over:
            await vectors.tend(1)
            tends += 1
        return tends

    _, _, tends = await asyncio.gather(write(), read(), tend())
    assert tends >= 3
    assert await vectors.numbers(1) == there
    assert await vectors.count(1) == len(there)


async def test_a_change_that_is_overtaken_is_made_again_while_nobody_writes(
    vectors: LanceVectors, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lancedb.table import AsyncTable  # noqa: PLC0415

    optimize, tries = AsyncTable.optimize, []

    async def overtaken(table: AsyncTable, **options: Any) -> object:
        tries.append(vectors._tables.writing.locked())
        if len(tries) == 1:
            raise RuntimeError("lance error: Retryable commit conflict for version 7: preempted")
        return await optimize(table, **options)

    monkeypatch.setattr(AsyncTable, "optimize", overtaken)
    for number in range(40):
        await vectors.add(1, FACTS, rows(number), AT)
    await vectors.tend(1)
    assert tries == [False, True, True]
    assert not vectors._tables.writing.locked()
    assert await vectors.numbers(1) == set(range(40))


async def test_a_write_that_is_overtaken_is_made_again(
    vectors: LanceVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lancedb.table import LanceTable  # noqa: PLC0415

    await vectors.add(1, FACTS, rows(1, 2, 3), AT)
    delete, conflicts = LanceTable.delete, 3

    def overtaken(table: LanceTable, where: str) -> object:
        nonlocal conflicts
        conflicts -= 1
        if conflicts >= 0:
            raise RuntimeError("lance error: Too many concurrent writers. Commit conflict for version 7")
        return delete(table, where)

    monkeypatch.setattr(LanceTable, "delete", overtaken)
    await vectors.remove(1, [1])
    assert await vectors.numbers(1) == {2, 3}
    conflicts = 1000
    with pytest.raises(VectorsUnavailableError, match="conflict"):
        await vectors.remove(1, [2])
    assert conflicts == 1000 - 8


async def test_old_states_stay_while_a_call_reads_them(
    vectors: LanceVectors, directory: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_kept: None
) -> None:
    for number in range(40):
        await vectors.add(1, FACTS, rows(number), AT)
    is_reading, free = threading.Event(), threading.Event()

    def read(_: object) -> None:
        is_reading.set()
        free.wait()

    looks = []

    def watched(table: int) -> frozenset[object]:
        looks.append(table)
        return calls_on(table)

    calls_on = vectors._tables.calls_on
    monkeypatch.setattr(vectors._tables, "calls_on", watched)
    reading = vectors._readers.submit(vectors._tables.read, 1, read, None)
    await asyncio.to_thread(is_reading.wait)
    tend = asyncio.ensure_future(vectors.tend(1))
    while len(looks) < 5 and not tend.done():  # noqa: ASYNC110  (another thread looks)
        await asyncio.sleep(0)
    assert files(directory, "data") == 41  # the merged one came on top
    free.set()
    await tend
    assert reading.done()
    assert files(directory, "data") == 1


async def test_a_read_whose_files_have_gone_is_made_again(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(1, 2), AT)
    handles = []

    def read(handle: Any) -> int:
        handles.append(handle)
        if len(handles) == 1:
            raise RuntimeError("lance error: Not found: tmp/v1.lance/data/1.lance")
        return int(handle.count_rows())

    assert vectors._tables.read(1, read, 0) == 2
    assert handles[0] is not handles[1]


class Stuck:
    """Stands for an index that takes long."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.tables: list[object] = []

    async def build(self, handle: Any, rows_there: int) -> None:
        self.tables.append(handle)
        self.begun.set()
        await asyncio.sleep(1000)


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Stuck:
    stuck = Stuck()
    monkeypatch.setattr(tending, "_build", stuck.build)
    monkeypatch.setattr(tending, "INDEX_FROM_ROWS", 50)
    return stuck


async def begun(vectors: LanceVectors, stuck: Stuck) -> asyncio.Task[None]:
    await vectors.add(1, FACTS, rows(*range(100)), AT)
    tend = asyncio.ensure_future(vectors.tend(1))
    await asyncio.to_thread(stuck.begun.wait)
    return tend


async def test_a_drop_cuts_off_the_tend_of_the_table(
    vectors: LanceVectors, directory: Path, stuck: Stuck
) -> None:
    tend = await begun(vectors, stuck)
    await vectors.add(2, FACTS, rows(1), AT)
    await vectors.drop(2)
    assert not tend.done()
    await vectors.drop(1)
    await tend
    assert list(directory.iterdir()) == []


async def test_close_cuts_off_a_tend(vectors: LanceVectors, stuck: Stuck) -> None:
    tend = await begun(vectors, stuck)
    await vectors.add(1, FACTS, rows(*range(100, 110)), AT)
    await vectors.close()
    with pytest.raises(VectorsUnavailableError):
        await tend


async def test_a_cancelled_tend_ends(vectors: LanceVectors, stuck: Stuck) -> None:
    tend = await begun(vectors, stuck)
    tend.cancel()
    with pytest.raises(asyncio.CancelledError):
        await tend
    for thread in threading.enumerate():
        if thread.name == "vectors tending":  # it has told its end, and is about to be over
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()
    assert await vectors.numbers(1) == set(range(100))


async def test_one_table_is_tended_at_a_time(vectors: LanceVectors, stuck: Stuck) -> None:
    tend = await begun(vectors, stuck)
    await vectors.add(2, FACTS, rows(*range(100)), AT)
    other = asyncio.ensure_future(vectors.tend(2))
    await asyncio.sleep(0)
    assert [thread.name for thread in threading.enumerate()].count("vectors tending") == 1
    stuck.begun.clear()
    tend.cancel()
    await asyncio.to_thread(stuck.begun.wait)
    assert len(stuck.tables) == 2
    other.cancel()
    await asyncio.gather(tend, other, return_exceptions=True)
