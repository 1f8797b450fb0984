# ruff: noqa: ASYNC240  (a test's loop has nothing else to do meanwhile)
"""Tables of vectors: real LanceDB in a directory of the test's own."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from manager.adapters.vectors import LanceVectors, installed
from manager.adapters.vectors.rows import DimensionError
from manager.errors import VectorsUnavailableError
from manager.services.embeddings.ports import TableFacts
from tests.support.vectors import AT, DIM, FACTS, cosine, nearest, row, rows, unit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "vectors"


@pytest.fixture
async def vectors(directory: Path) -> AsyncIterator[LanceVectors]:
    vectors = LanceVectors(directory)
    yield vectors
    await vectors.close()


async def test_rows_are_found_best_first_with_their_cosine(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(*range(1, 60)), AT)
    await vectors.add(1, FACTS, rows(*range(60, 101)), AT)
    hits = await vectors.search(1, unit(7), 5)
    assert [hit.number for hit in hits] == nearest(unit(7), range(1, 101), 5)
    assert hits[0].number == 7
    for hit in hits:
        assert hit.score == pytest.approx(cosine(unit(7), unit(hit.number)), abs=1e-5)
        assert -1 <= hit.score <= 1


async def test_as_many_rows_are_found_as_there_are(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(*range(1, 101)), AT)
    assert len(await vectors.search(1, unit(7), 20_000)) == 100
    assert len(await vectors.search(1, unit(7), 99)) == 99
    assert len(await vectors.search(1, unit(7), 1)) == 1


async def test_rows_are_kept_as_they_are(vectors: LanceVectors, directory: Path) -> None:
    await vectors.add(1, FACTS, rows(*range(1, 21)), AT)
    assert await vectors.get(1, 13) == unit(13)
    assert await vectors.get(1, 21) is None
    assert await vectors.numbers(1) == frozenset(range(1, 21))
    assert await vectors.count(1) == 20
    assert await vectors.tables() == {1}

    import lancedb  # noqa: PLC0415

    kept = lancedb.connect(directory).open_table("v1").search().where("number = 13").to_arrow().to_pylist()
    assert {name: value for name, value in kept[0].items() if name != "vector"} == {
        "number": 13,
        "id": "item-13",
        "embedding_model": "nomic-embed-text:v1.5",
        "embedding_dim": DIM,
        "embedding_version": "3",
        "created_at": AT,
    }


async def test_a_number_that_is_added_twice_is_there_twice(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(4, 5), AT)
    await vectors.add(1, FACTS, rows(5), AT)
    assert await vectors.count(1) == 3
    assert await vectors.numbers(1) == {4, 5}
    await vectors.remove(1, [5])
    assert await vectors.count(1) == 1


async def test_removed_rows_are_gone_and_missing_ones_are_no_error(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(*range(1, 21)), AT)
    await vectors.remove(1, [3, 4, 4, 99])
    await vectors.remove(1, [])
    assert await vectors.numbers(1) == frozenset(range(1, 21)) - {3, 4}
    assert await vectors.count(1) == 18
    assert await vectors.get(1, 3) is None
    assert 3 not in [hit.number for hit in await vectors.search(1, unit(3), 20)]
    await vectors.remove(1, range(30_000))
    assert await vectors.count(1) == 0
    assert await vectors.search(1, unit(3), 20) == []


async def test_a_table_that_does_not_exist_is_empty(vectors: LanceVectors, directory: Path) -> None:
    assert await vectors.tables() == frozenset()
    assert await vectors.search(5, unit(1), 3) == []
    assert await vectors.search(5, unit(1), 3, among={1}) == []
    assert await vectors.get(5, 1) is None
    assert await vectors.count(5) == 0
    assert await vectors.numbers(5) == frozenset()
    await vectors.remove(5, [1])
    await vectors.drop(5)
    await vectors.tend(5)
    await vectors.add(5, FACTS, [], AT)
    assert not directory.exists()


async def test_only_the_numbers_that_are_named_are_searched(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(*range(1, 101)), AT)
    hits = await vectors.search(1, unit(7), 3, among={2, 9, 30, 31, 32, 500})
    assert [hit.number for hit in hits] == nearest(unit(7), {2, 9, 30, 31, 32}, 3)
    assert hits[0].score == pytest.approx(cosine(unit(7), unit(hits[0].number)), abs=1e-5)
    assert await vectors.search(1, unit(7), 3, among=set()) == []


async def test_however_many_numbers_are_named(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(*range(1, 3001)), AT)
    for last in 100, 3000, 60_000:
        among = set(range(2, last + 1, 2))
        expected = nearest(unit(7), among & set(range(1, 3001)), 5)
        assert [hit.number for hit in await vectors.search(1, unit(7), 5, among=among)] == expected


async def test_vectors_of_another_length_are_refused_and_change_nothing(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(1), AT)
    other = TableFacts("other", 12, "1")
    with pytest.raises(DimensionError):
        await vectors.add(1, other, [row(2, 12)], AT)
    with pytest.raises(DimensionError):
        await vectors.add(1, FACTS, [row(2), row(3, 12)], AT)
    for among in None, {1}:
        with pytest.raises(DimensionError):
            await vectors.search(1, unit(1, 12), 3, among)
    assert await vectors.numbers(1) == {1}


async def test_a_dropped_table_is_gone_and_its_number_can_be_used(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(1, 2), AT)
    await vectors.add(2, FACTS, rows(1, 2), AT)
    assert await vectors.search(1, unit(1), 1)
    await vectors.drop(1)
    assert await vectors.tables() == {2}
    assert await vectors.search(1, unit(1), 1) == []
    await vectors.add(1, FACTS, rows(3), AT)
    assert [hit.number for hit in await vectors.search(1, unit(1), 5)] == [3]


async def test_a_drop_that_was_interrupted_is_finished(vectors: LanceVectors, directory: Path) -> None:
    await vectors.add(1, FACTS, rows(1, 2), AT)
    (directory / "v1.lance").rename(directory / "v1.dropped")
    assert await vectors.tables() == frozenset()
    await vectors.add(2, FACTS, rows(1, 2), AT)
    assert [path.name for path in directory.iterdir()] == ["v2.lance"]


async def test_a_table_whose_creation_was_interrupted_is_empty(
    vectors: LanceVectors, directory: Path
) -> None:
    (directory / "v1.lance" / "_transactions").mkdir(parents=True)
    assert await vectors.search(1, unit(1), 3) == []
    assert await vectors.numbers(1) == frozenset()
    await vectors.tend(1)
    await vectors.add(1, FACTS, rows(1, 2), AT)
    assert await vectors.numbers(1) == {1, 2}


async def test_the_directory_is_for_the_user_alone(vectors: LanceVectors, directory: Path) -> None:
    await vectors.add(1, FACTS, rows(1), AT)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.chmod(0o755)
    await vectors.add(2, FACTS, rows(1), AT)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


async def test_what_is_added_is_on_the_disk(
    vectors: LanceVectors, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await vectors.add(1, FACTS, rows(1), AT)
    before = set(directory.rglob("*"))
    flushed = []
    flush = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    await vectors.add(1, FACTS, rows(2), AT)
    new = {str(path) for path in set(directory.rglob("*")) - before if path.is_file()}
    assert len(new) >= 3
    # The hint of the newest state keeps its name, and may get lost.
    assert new <= set(flushed)
    assert {str(directory / "v1.lance" / name) for name in ("data", "_versions")} <= set(flushed)


async def test_another_process_sees_what_was_written(vectors: LanceVectors, directory: Path) -> None:
    other = LanceVectors(directory)
    await vectors.add(1, FACTS, rows(1), AT)
    assert await other.numbers(1) == {1}
    assert len(await other.search(1, unit(1), 9)) == 1
    await vectors.add(1, FACTS, rows(2), AT)
    assert len(await other.search(1, unit(1), 9)) == 2
    await vectors.drop(1)
    assert await other.search(1, unit(1), 9) == []
    await other.close()


async def test_a_cancelled_call_has_happened_or_not(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(1), AT)
    free, is_held = threading.Event(), threading.Event()

    def hold() -> None:
        is_held.set()
        free.wait()

    held = asyncio.ensure_future(vectors._call(vectors._writer, hold))
    await asyncio.to_thread(is_held.wait)
    queued = asyncio.ensure_future(vectors.add(1, FACTS, rows(2), AT))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    held.cancel()
    await asyncio.sleep(0)
    assert not held.done()
    free.set()
    with pytest.raises(asyncio.CancelledError):
        await held
    assert await vectors.numbers(1) == {1}


async def test_after_close_every_call_is_refused(directory: Path) -> None:
    vectors = LanceVectors(directory)
    adding = asyncio.ensure_future(vectors.add(1, FACTS, rows(*range(2000)), AT))
    await asyncio.sleep(0)
    await vectors.close()
    assert adding.done()
    await adding
    calls = [
        vectors.tables(),
        vectors.add(1, FACTS, rows(1), AT),
        vectors.remove(1, [1]),
        vectors.search(1, unit(1), 1),
        vectors.get(1, 1),
        vectors.numbers(1),
        vectors.count(1),
        vectors.drop(1),
        vectors.tend(1),
    ]
    for call in calls:
        with pytest.raises(VectorsUnavailableError):
            await call
    await vectors.close()


def test_nothing_of_lancedb_is_loaded_before_it_is_needed(directory: Path) -> None:
    code = (
        "import asyncio, pathlib, sys, threading, manager.app, manager.adapters.vectors as v\n"
        "assert v.installed()\n"
        f"vectors = v.LanceVectors(pathlib.Path({str(directory)!r}))\n"
        "asyncio.run(vectors.tables())\n"
        "print(sorted({'lancedb', 'pyarrow', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_installed_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pyarrow" else object())
    assert not installed()


def test_what_is_set_in_the_environment_stays(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.delenv("LANCEDB_LOG", raising=False)
    monkeypatch.setenv("LANCE_DEFAULT_BATCH_SIZE", "77")
    LanceVectors(directory)
    assert os.environ["LANCEDB_LOG"] == "error"
    assert os.environ["LANCE_DEFAULT_BATCH_SIZE"] == "77"
