"""The stores of collections, as the services need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection as Some
    from collections.abc import Sequence
    from datetime import datetime


class VectorRow(NamedTuple):
    """One vector of a table.

    `number` is unique for all time: a changed item gets another one. `vector` has little-endian float32
    values of length 1 (Euclidean).
    """

    number: int
    id: str
    vector: bytes


class TableFacts(NamedTuple):
    """What each row of a table says of its origin."""

    embedding_model: str
    embedding_dim: int
    embedding_version: str


class Hit(NamedTuple):
    """A row that a search has found. `score` is the cosine similarity, from -1 to 1."""

    number: int
    score: float


class Vectors(Protocol):
    """Tables of vectors. A call that returns has happened; one that raises may have happened in part.

    Rows are only added and removed, never changed. Tables are named by a number that is never used again.

    Raises:
        VectorsDamagedError: a table, or a part of it, is missing or unreadable.
        VectorsUnavailableError: the disk or the process is at fault, not the table.
    """

    async def tables(self) -> frozenset[int]:
        """Return the tables that exist."""
        ...

    async def add(self, table: int, facts: TableFacts, rows: Sequence[VectorRow], at: datetime) -> None:
        """Add rows; the first ones create the table. Rows with a number that is there already are doubled."""
        ...

    async def remove(self, table: int, numbers: Sequence[int]) -> None:
        """Remove rows; one that is missing, and a table that does not exist, are no error."""
        ...

    async def search(
        self, table: int, vector: bytes, count: int, among: Some[int] | None = None
    ) -> list[Hit]:
        """Return the nearest rows, best first; none where the table does not exist.

        Args:
            table: where to look.
            vector: as in `VectorRow`.
            count: at most so many, at least 1.
            among: only rows with these numbers; None is all. Rows are found exactly where it is given.
        """
        ...

    async def get(self, table: int, number: int) -> bytes | None:
        """Return the vector of a row."""
        ...

    async def numbers(self, table: int) -> frozenset[int]:
        """Read the whole table, vectors too, and return the numbers of its rows."""
        ...

    async def count(self, table: int) -> int:
        """Return the number of rows, without reading them; 0 where the table does not exist."""
        ...

    async def drop(self, table: int) -> None:
        """Remove a table, damaged or not; a missing one is no error."""
        ...

    async def tend(self, table: int) -> None:
        """Do what keeps the table fast and small: build the index, merge small files, drop old states.

        Cheap where nothing is due. Other calls go on meanwhile.
        """
        ...

    async def close(self) -> None:
        """Wait for the calls that go on; later ones raise VectorsUnavailableError."""
        ...
