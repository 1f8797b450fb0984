"""The counts of all collections as they were last read, for metrics, which do not wait for the store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import structlog

from manager.domain.embeddings import BackfillStatus, Counts, VersionState
from manager.errors import ManagerError

if TYPE_CHECKING:
    from manager.services.embeddings.shelf import Shelf

_log = structlog.get_logger("collections")

# The store keeps counters: reading all of them looks at no item.
_EVERY_S = 5.0


class CountedVersion(NamedTuple):
    """A version with its counts."""

    id: str
    counts: Counts
    is_active: bool
    is_stale: bool


class CountedCollection(NamedTuple):
    """A collection with its counts.

    `is_filled` and `has_failed` are of its latest backfill: whether it runs, and whether it ended as failed.
    """

    name: str
    items: int
    is_filled: bool
    has_failed: bool
    versions: tuple[CountedVersion, ...]


class Counting:
    """Reads the counts of all collections again and again. Lives on the event loop.

    Attributes:
        last: what was read last, the oldest collection first; empty before the first reading.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.last: tuple[CountedCollection, ...] = ()

    async def run(self) -> None:
        """Read the counts every few seconds, until cancelled."""
        if not self._shelf.is_installed:
            await asyncio.Event().wait()
        await self._shelf.ready()
        while True:
            try:
                await self.read()
            except ManagerError as error:
                _log.warning("collections_not_counted", error=error.message)
            await asyncio.sleep(_EVERY_S)

    async def read(self) -> None:
        """Read the counts now.

        Raises:
            RegistryUnwritableError, RegistryCorruptError: they could not be read; `last` stays as it is.
        """
        if not self._shelf.all():
            self.last = ()
            return
        items = await self._shelf.store.item_counts()
        counts = await self._shelf.store.all_counts()
        found = []
        for shelved in sorted(self._shelf.all(), key=lambda one: one.collection.key):
            key, status = shelved.collection.key, shelved.backfill and shelved.backfill.status
            versions = tuple(
                CountedVersion(
                    one.id,
                    counts.get(one.key, Counts(items.get(key, 0), 0)),
                    one.state is VersionState.ACTIVE,
                    one.stale_since is not None and one.state is not VersionState.ARCHIVED,
                )
                for one in sorted(shelved.versions.values(), key=lambda one: one.key)
            )
            found.append(
                CountedCollection(
                    shelved.collection.name,
                    items.get(key, 0),
                    status is BackfillStatus.RUNNING,
                    status is BackfillStatus.FAILED,
                    versions,
                )
            )
        self.last = tuple(found)
