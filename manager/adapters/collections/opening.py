"""How the store of collections is opened, in earnest and for a dry run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.adapters.collections.store import SqlCollections

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from manager.domain.embeddings import Backfill, Collection, Counts, Failure, Version
    from manager.services.embeddings.ports import StoredItem


async def open_collections(path: Path, *, stores: bool = True, first_version: int = 1) -> SqlCollections:
    """Open the file of collections at `path`; where there is none, the first collection makes it.

    The caller holds the state directory's lock.

    Args:
        path: of the file.
        stores: whether what is saved is written; a dry run leaves every row as it is.
        first_version: the first key of a version in a file that is made. Keys name tables of vectors, which
            may be left of a file that was lost.

    Raises:
        RegistryCorruptError: what is there cannot be used; it is left as it is.
        RegistryUnwritableError: it could not be read.
    """
    store = (SqlCollections if stores else UnchangedCollections)(path, first_version)
    try:
        await store.open()
    except BaseException:
        await store.abandon()
        raise
    return store


class UnchangedCollections(SqlCollections):
    """Reads as the other one does, and drops whatever is to be saved. 0 is the key of all that is new."""

    async def open(self) -> None:
        await self._writer.call(self._open, doing="opened")

    async def create(self, collection: Collection) -> int:  # noqa: ARG002
        return 0

    async def remove(self, collection: int) -> None: ...
    async def add_version(self, version: Version) -> int:  # noqa: ARG002
        return 0

    async def save_versions(self, *versions: Version) -> None: ...
    async def remove_version(self, version: int) -> None: ...
    async def save_backfill(self, backfill: Backfill) -> None: ...
    async def begin_backfill(self, backfill: Backfill, *changed: Version) -> None: ...
    async def switch(
        self,
        wanted: Version,  # noqa: ARG002
        replaced: Version | None,  # noqa: ARG002
        collection: Collection,  # noqa: ARG002
        allowed: Callable[[Counts], bool],  # noqa: ARG002
    ) -> Counts | None:
        return None

    async def allocate(self, count: int) -> int:
        first, self._next_number = self._next_number, self._next_number + count
        return first

    async def put(
        self,
        collection: int,  # noqa: ARG002
        items: Sequence[StoredItem],  # noqa: ARG002
        marks: Mapping[int, Sequence[int]],  # noqa: ARG002
        active: int,  # noqa: ARG002
    ) -> bool:
        return True

    async def delete(self, collection: int, item: str) -> bool:
        return await self.item(collection, item) is not None

    async def mark(self, version: int, numbers: Sequence[int], at: datetime) -> int:  # noqa: ARG002
        return len(numbers)

    async def failed(self, version: int, number: int, message: str, *, at_once: bool) -> Failure | None:  # noqa: ARG002
        return None

    async def unmark(self, version: int, numbers: Sequence[int] | None) -> int:  # noqa: ARG002
        return 0

    async def add_rubbish(self, version: int, numbers: Sequence[int]) -> None: ...
    async def swept(self, version: int, numbers: Sequence[int]) -> None: ...
    async def close(self) -> None:
        await self.abandon()
