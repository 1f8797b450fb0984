"""Vectors that are the same for the same number, and what of them is nearest."""

from __future__ import annotations

import random
import struct
from datetime import UTC, datetime
from functools import lru_cache

from manager.services.embeddings.ports import TableFacts, VectorRow

AT = datetime(2026, 1, 2, 3, 4, 5, 678, UTC)
DIM = 16
FACTS = TableFacts("nomic-embed-text:v1.5", DIM, "3")


@lru_cache(maxsize=50_000)
def unit(number: int, dim: int = DIM) -> bytes:
    """A vector of length 1."""
    source = random.Random(number)
    values = [source.gauss(0, 1) for _ in range(dim)]
    length = sum(value * value for value in values) ** 0.5
    return struct.pack(f"<{dim}f", *[value / length for value in values])


def cosine(one: bytes, other: bytes) -> float:
    count = len(one) // 4
    pairs = zip(struct.unpack(f"<{count}f", one), struct.unpack(f"<{count}f", other), strict=True)
    return float(sum(a * b for a, b in pairs))


def row(number: int, dim: int = DIM) -> VectorRow:
    return VectorRow(number, f"item-{number}", unit(number, dim))


def rows(*numbers: int) -> list[VectorRow]:
    return [row(number) for number in numbers]


def nearest(vector: bytes, numbers: set[int] | range, count: int) -> list[int]:
    """The numbers of the rows that an exact search finds."""
    dim = len(vector) // 4
    return sorted(numbers, key=lambda number: -cosine(vector, unit(number, dim)))[:count]
