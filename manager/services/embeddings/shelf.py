"""All collections in memory, as they are stored: the one place that the other parts look at."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from manager.domain.embeddings import VersionState
from manager.errors import NotInstalledError, UnknownCollectionError, VectorsUnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from manager.domain.embeddings import Backfill, Collection, Version
    from manager.services.embeddings.ports import CollectionStore, Vectors

HOW_TO_INSTALL = (
    "collections need the extra `embeddings`, which is not installed: "
    "pip install 'ollama-endpoint-manager[embeddings]'"
)


class Shelved:
    """A collection with its versions and its latest backfill. `changing` is held to change any of them.

    Attributes:
        is_leaving: the store removes it: at some time before the end its items are gone.
        leaving: the keys of versions of which the same is true.
        is_removed: it is gone.
    """

    __slots__ = ("backfill", "changing", "collection", "is_leaving", "is_removed", "leaving", "versions")

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.versions: dict[int, Version] = {}
        self.backfill: Backfill | None = None
        self.changing = asyncio.Lock()
        self.is_leaving = False
        self.leaving: set[int] = set()
        self.is_removed = False

    @property
    def active(self) -> Version | None:
        """The version that queries read; None before the first item."""
        return self._in(VersionState.ACTIVE)

    @property
    def building(self) -> Version | None:
        """The version that a backfill fills."""
        return self._in(VersionState.BUILDING)

    @property
    def previous(self) -> Version | None:
        """The version that was active before, and can be rolled back to; a backfill may fill it again."""
        found = [one for one in self.versions.values() if one.state is not VersionState.ACTIVE]
        return max(
            (one for one in found if one.activated_at),
            key=lambda one: (one.activated_at, one.key),
            default=None,
        )

    def version(self, version_id: str) -> Version:
        """Return a version by its id.

        Raises:
            UnknownCollectionError: there is none.
        """
        for one in self.versions.values():
            if one.id == version_id and one.key not in self.leaving:
                return one
        known = ", ".join(one.id for key, one in self.versions.items() if key not in self.leaving) or "none"
        name = self.collection.name
        message = f"the collection {name!r} has no version {version_id[:64]!r}; there are: {known}"
        raise UnknownCollectionError("unknown_version", message)

    def take(self, *versions: Version) -> None:
        """Take in versions as they are stored now."""
        for one in versions:
            self.versions[one.key] = one

    def _in(self, state: VersionState) -> Version | None:
        return next((one for one in self.versions.values() if one.state is state), None)


class Tables:
    """Tells who uses the table of a version: many may add and search, or one may mend or drop it.

    Once closed, nobody begins: whoever asks gets `VectorsUnavailableError`.
    """

    def __init__(self) -> None:
        self._users: Counter[int] = Counter()
        self._owned: set[int] = set()
        self._changed = asyncio.Event()
        self._is_closed = False

    def is_used(self, table: int) -> bool:
        return table in self._owned or self._users[table] > 0

    async def close(self) -> None:
        """Let nobody begin, and wait for those who have begun: what they write is whole then."""
        self._is_closed = True
        self._wake()
        while self._owned or self._users:
            await self._changed.wait()

    @asynccontextmanager
    async def using(self, *tables: int) -> AsyncIterator[None]:
        """Keep tables from being mended and dropped."""
        self._refuse_if_closed()
        while self._owned.intersection(tables):
            await self._changed.wait()
            self._refuse_if_closed()
        self._users.update(tables)
        try:
            yield
        finally:
            self._users.subtract(tables)
            self._users += Counter()  # forgets those that nobody uses
            self._wake()

    @asynccontextmanager
    async def owning(self, table: int) -> AsyncIterator[None]:
        """Wait until nobody uses a table, and keep the others away."""
        self._refuse_if_closed()
        while table in self._owned:
            await self._changed.wait()
            self._refuse_if_closed()
        self._owned.add(table)
        try:
            while self._users[table]:
                await self._changed.wait()
            yield
        finally:
            self._owned.discard(table)
            self._wake()

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise VectorsUnavailableError("this daemon ends, or another one takes over; try again")

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Shelf:
    """All collections, by name and by key.

    Attributes:
        store: has their metadata.
        vectors: has their vectors; None where the extra is not installed.
        tables: who uses which table.
    """

    def __init__(self, store: CollectionStore, vectors: Vectors | None) -> None:
        self.store = store
        self._vectors = vectors
        self.tables = Tables()
        self._by_name: dict[str, Shelved] = {}
        self._by_key: dict[int, Shelved] = {}
        self._is_checked = asyncio.Event()

    @property
    def vectors(self) -> Vectors:
        """The tables.

        Raises:
            NotInstalledError: the extra is not installed.
        """
        if self._vectors is None:
            raise NotInstalledError(HOW_TO_INSTALL)
        return self._vectors

    @property
    def is_installed(self) -> bool:
        return self._vectors is not None

    async def load(self) -> None:
        """Read what is stored."""
        for collection in await self.store.collections():
            self.add(Shelved(collection))
        for version in await self.store.versions():
            self._by_key[version.collection].take(version)
        for backfill in await self.store.backfills():
            self._by_key[backfill.collection].backfill = backfill

    def checked(self) -> None:
        """Note that the tables were compared with the store: what is counted is true from now on."""
        self._is_checked.set()

    async def ready(self) -> None:
        """Wait until the tables were compared with the store.

        Raises:
            NotInstalledError: the extra is not installed.
        """
        if self._vectors is None:
            raise NotInstalledError(HOW_TO_INSTALL)
        await self._is_checked.wait()

    def all(self) -> list[Shelved]:
        """Return all collections that stay, by name."""
        return [one for _, one in sorted(self._by_name.items()) if not one.is_leaving]

    def has(self, name: str) -> bool:
        """Return whether the name is taken, also by one that leaves."""
        return name in self._by_name

    def get(self, name: str) -> Shelved:
        """Return a collection.

        Raises:
            UnknownCollectionError: there is none.
        """
        found = self._by_name.get(name)
        if found is None or found.is_leaving:
            message = f"there is no collection {name[:64]!r}; GET /api/v1/collections lists them"
            raise UnknownCollectionError("unknown_collection", message)
        return found

    def of(self, version: Version) -> Shelved | None:
        """Return the collection of a version; None where it is gone."""
        return self._by_key.get(version.collection)

    def add(self, shelved: Shelved) -> None:
        self._by_name[shelved.collection.name] = shelved
        self._by_key[shelved.collection.key] = shelved

    def discard(self, shelved: Shelved) -> None:
        shelved.is_removed = True
        self._by_name.pop(shelved.collection.name, None)
        self._by_key.pop(shelved.collection.key, None)

    def tables_known(self) -> frozenset[int]:
        """Return the tables of all versions."""
        return frozenset(key for shelved in self._by_key.values() for key in shelved.versions)
