"""The stores of collections, as the services need them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from collections.abc import Collection as Some
    from datetime import datetime
    from typing import Any

    from manager.domain.embeddings import Backfill, Collection, Counts, Failure, Version


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


class StoredItem(NamedTuple):
    """An item as it is stored. `number` is unique for all time: a changed item gets another one.

    `text` is None where it is not kept, or where the client has given a vector. `metadata` is JSON.
    """

    number: int
    id: str
    text: str | None
    metadata: bytes
    created_at: datetime


class Found(NamedTuple):
    """An item that has a vector in a version, which was written at `embedded_at`."""

    number: int
    id: str
    metadata: bytes
    embedded_at: datetime


class Lacking(NamedTuple):
    """Items without a vector in a version, by id; of each kind some at most."""

    missing: tuple[str, ...]
    quarantined: tuple[str, ...]


class CollectionStore(Protocol):
    """The metadata of collections: items, versions, and which item has a vector in which version.

    A call that returns is committed. Each call happens completely or not at all, also when it is cancelled.

    Raises:
        RegistryUnwritableError: it could not be read or written.
        RegistryCorruptError: the file cannot be used.
    """

    # --- collections, versions, backfills ---

    async def collections(self) -> tuple[Collection, ...]: ...
    async def versions(self) -> tuple[Version, ...]: ...
    async def backfills(self) -> tuple[Backfill, ...]:
        """Return the latest backfill of each collection."""
        ...

    async def create(self, collection: Collection) -> int:
        """Store a new collection, whose `key` does not count; return its key.

        Raises:
            ValueError: its name is taken.
        """
        ...

    async def remove(self, collection: int) -> None:
        """Remove a collection with all that belongs to it; a missing one is no error."""
        ...

    async def add_version(self, version: Version) -> int:
        """Store a new version, whose `key` does not count; return its key.

        Raises:
            ValueError: its collection is gone, or has another active version.
        """
        ...

    async def save_versions(self, *versions: Version) -> None:
        """Store versions that exist in their new state, all together."""
        ...

    async def remove_version(self, version: int) -> None:
        """Remove a version and the backfill of it; a missing one is no error."""
        ...

    async def save_backfill(self, backfill: Backfill) -> None:
        """Store the backfill of a collection in place of the last one."""
        ...

    async def begin_backfill(self, backfill: Backfill, *changed: Version) -> None:
        """Store a backfill and versions together, and forget the failures of its version."""
        ...

    async def switch(
        self,
        wanted: Version,
        replaced: Version | None,
        collection: Collection,
        allowed: Callable[[Counts], bool],
    ) -> Counts | None:
        """Store two versions and their collection in their new states, if the counts of `wanted` allow it.

        Check and change are one transaction. Returns None where it happened, else the counts.
        """
        ...

    async def counts(self, version: int) -> Counts: ...
    async def all_counts(self) -> Mapping[int, Counts]:
        """Return the counts of every version."""
        ...

    async def item_counts(self) -> Mapping[int, int]:
        """Return the number of items of every collection."""
        ...

    # --- items ---

    async def allocate(self, count: int) -> int:
        """Return the first of `count` numbers for items, which nobody else gets."""
        ...

    async def put(
        self, collection: int, items: Sequence[StoredItem], marks: Mapping[int, Sequence[int]], active: int
    ) -> bool:
        """Store items in place of those with the same ids, and mark which versions have vectors of them.

        Args:
            collection: its key.
            items: each id once.
            marks: version -> numbers of the items.
            active: the version that must be active still.

        Returns:
            False where the collection, or `active`, is not there or not active any more; nothing is stored.
        """
        ...

    async def delete(self, collection: int, item: str) -> bool:
        """Remove an item; return whether it was there."""
        ...

    async def item(self, collection: int, item: str) -> tuple[StoredItem, Mapping[int, datetime]] | None:
        """Return an item, and when its vector was written by version."""
        ...

    async def page(self, collection: int, after: str | None, limit: int) -> tuple[StoredItem, ...]:
        """Return items in the order of their ids, those behind `after`."""
        ...

    async def found(self, version: int, numbers: Sequence[int]) -> Mapping[int, Found]:
        """Return those of the items that exist now and have a vector in the version, by number."""
        ...

    async def matching(self, version: int, is_wanted: Callable[[Mapping[str, Any]], bool]) -> frozenset[int]:
        """Return the numbers of the items with a vector in the version whose metadata are wanted.

        Other calls go on meanwhile: items that are stored meanwhile may be missing.
        """
        ...

    # --- backfill ---

    async def missing(self, version: int, after: int, limit: int) -> tuple[StoredItem, ...]:
        """Return items without a vector in the version and not in quarantine, by number, those behind one."""
        ...

    async def mark(self, version: int, numbers: Sequence[int], at: datetime) -> int:
        """Mark that a version has vectors of items; return how many. The others are rubbish in its table."""
        ...

    async def failed(self, version: int, number: int, message: str, *, at_once: bool) -> Failure | None:
        """Count a failure of an item; `at_once` puts it into quarantine.

        Returns None where the item is gone, or has a vector meanwhile.
        """
        ...

    async def failures(self, version: int, limit: int) -> tuple[Failure, ...]: ...
    async def lacking(self, version: int, limit: int) -> Lacking: ...

    # --- the tables ---

    async def marked(self, version: int) -> frozenset[int]:
        """Return the numbers of all items that have a vector in the version."""
        ...

    async def unmark(self, version: int, numbers: Sequence[int] | None) -> int:
        """Forget that items have vectors; return how many had.

        Their rows are rubbish. With None it is all items of a table that was dropped: it has no rubbish.
        """
        ...

    async def rubbish(self, version: int, limit: int) -> tuple[int, ...]:
        """Return numbers of rows in the table of a version that nobody needs."""
        ...

    async def add_rubbish(self, version: int, numbers: Sequence[int]) -> None:
        """Note rubbish; the row of an item that has a vector is none."""
        ...

    async def swept(self, version: int, numbers: Sequence[int]) -> None:
        """Forget rubbish that was removed from the table."""
        ...

    async def was_closed(self) -> bool:
        """Return whether the last process that had it open has closed it."""
        ...

    async def close(self) -> None:
        """Note that everything is in order, and close; closing twice is no error."""
        ...
