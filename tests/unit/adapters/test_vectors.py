# ruff: noqa: ASYNC240  (a test's loop has nothing else to do meanwhile)
"""Tables of vectors: real LanceDB in a directory of the test's own."""

from __future__ import annotations

import math
import random
import struct
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from manager.adapters.vectors import LanceVectors
from manager.services.embeddings.ports import TableFacts, VectorRow

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

AT = datetime(2026, 1, 2, 3, 4, 5, 678, UTC)
DIM = 8
FACTS = TableFacts("nomic-embed-text:v1.5", DIM, "3")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "vectors"


@pytest.fixture
async def vectors(directory: Path) -> AsyncIterator[LanceVectors]:
    vectors = LanceVectors(directory)
    yield vectors
    await vectors.close()


def unit(number: int, dim: int = DIM) -> bytes:
    """A vector of length 1 that is the same for the same number."""
    values = [random.Random(number * dim + place).gauss(0, 1) for place in range(dim)]
    length = sum(value * value for value in values) ** 0.5
    return struct.pack(f"<{dim}f", *[value / length for value in values])


def cosine(one: bytes, other: bytes) -> float:
    count = len(one) // 4
    pairs = zip(struct.unpack(f"<{count}f", one), struct.unpack(f"<{count}f", other), strict=True)
    return math.fsum(a * b for a, b in pairs)


def row(number: int) -> VectorRow:
    return VectorRow(number, f"item-{number}", unit(number))


def rows(*numbers: int) -> list[VectorRow]:
    return [row(number) for number in numbers]


def nearest(vector: bytes, numbers: range, count: int) -> list[int]:
    return sorted(numbers, key=lambda number: -cosine(vector, unit(number)))[:count]


async def test_rows_are_found_best_first_with_their_cosine(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(*range(1, 60)), AT)
    await vectors.add(1, FACTS, rows(*range(60, 101)), AT)
    hits = await vectors.search(1, unit(7), 5)
    assert [hit.number for hit in hits] == nearest(unit(7), range(1, 101), 5)
    assert hits[0].number == 7
    for hit in hits:
        assert hit.score == pytest.approx(cosine(unit(7), unit(hit.number)), abs=1e-5)
        assert -1 <= hit.score <= 1


async def test_rows_are_kept_as_they_are(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(*range(1, 21)), AT)
    assert await vectors.get(1, 13) == unit(13)
    assert await vectors.get(1, 21) is None
    assert await vectors.numbers(1) == frozenset(range(1, 21))
    assert await vectors.count(1) == 20
    assert await vectors.tables() == {1}


async def test_removed_rows_are_gone_and_missing_ones_are_no_error(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(*range(1, 21)), AT)
    await vectors.remove(1, [3, 4, 4, 99])
    assert await vectors.numbers(1) == frozenset(range(1, 21)) - {3, 4}
    assert await vectors.count(1) == 18
    assert await vectors.get(1, 3) is None
    assert 3 not in [hit.number for hit in await vectors.search(1, unit(3), 20)]


async def test_a_table_that_does_not_exist_is_empty(vectors: LanceVectors, directory: Path) -> None:
    assert await vectors.tables() == frozenset()
    assert await vectors.search(5, unit(1), 3) == []
    assert await vectors.get(5, 1) is None
    assert await vectors.count(5) == 0
    assert await vectors.numbers(5) == frozenset()
    await vectors.remove(5, [1])
    await vectors.drop(5)
    await vectors.add(5, FACTS, [], AT)
    assert not directory.exists()


async def test_only_the_numbers_that_are_named_are_searched(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(*range(1, 101)), AT)
    hits = await vectors.search(1, unit(7), 3, among={2, 9, 30, 31, 32, 500})
    expected = sorted([2, 9, 30, 31, 32], key=lambda number: -cosine(unit(7), unit(number)))[:3]
    assert [hit.number for hit in hits] == expected
    assert await vectors.search(1, unit(7), 3, among=set()) == []


async def test_a_dropped_table_is_gone_and_its_number_can_be_used(vectors: LanceVectors) -> None:
    await vectors.add(1, FACTS, rows(1, 2), AT)
    await vectors.add(2, FACTS, rows(1, 2), AT)
    assert await vectors.search(1, unit(1), 1)
    await vectors.drop(1)
    assert await vectors.tables() == {2}
    assert await vectors.search(1, unit(1), 1) == []
    await vectors.add(1, FACTS, rows(3), AT)
    assert [hit.number for hit in await vectors.search(1, unit(1), 5)] == [3]


def test_nothing_of_lancedb_is_loaded_before_it_is_needed() -> None:
    code = (
        "import sys, manager.app, manager.adapters.vectors as v; assert v.installed();"
        "print(sorted({'lancedb', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
