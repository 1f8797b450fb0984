"""Keeps tables and store in agreement: finds lost vectors, removes rubbish, notices builds that changed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from manager.domain.embeddings import VersionState
from manager.errors import ManagerError, Reason, VectorsDamagedError
from manager.services.finishing import finish

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import datetime

    from manager.domain.embeddings import Version
    from manager.services.embeddings.shelf import Shelf
    from manager.services.journal import Journal

_log = structlog.get_logger("collections")

# How often builds of models are compared with those of the versions, and how often the tables are tended.
_BUILDS_EVERY_S = 5.0
_TABLES_EVERY_S = 30.0
# So many writes leave so many small files that a search of them takes longer: they are merged sooner.
MOST_WRITES = 32
_SOON_S = 2.0
# Rows that are removed from a table in one go.
_RUBBISH_AT_ONCE = 5000


class Tending:
    """Looks after the tables of all versions. Lives on the event loop.

    Args:
        shelf: the collections.
        journal: takes events.
        digests_of: model -> the builds of it by digest, as the lists of all instances have them.
        refresh: reads the lists of all instances that run.
        utcnow: the wall clock.
    """

    def __init__(
        self,
        shelf: Shelf,
        journal: Journal,
        *,
        digests_of: Callable[[str], Mapping[str, tuple[str, ...]]],
        refresh: Callable[[], Awaitable[None]],
        utcnow: Callable[[], datetime],
    ) -> None:
        self._shelf = shelf
        self._journal = journal
        self._digests_of = digests_of
        self._refresh = refresh
        self._utcnow = utcnow
        self._suspects: dict[int, Version] = {}
        # Writes since a table was last tended, by key.
        self._writes: dict[int, int] = {}
        self._news = asyncio.Event()

    def written(self, *versions: Version) -> None:
        """Note that tables were written: they are tended some time later, soon after many writes."""
        for version in versions:
            writes = self._writes[version.key] = self._writes.get(version.key, 0) + 1
            if writes == MOST_WRITES:
                self._news.set()

    def suspect(self, version: Version) -> None:
        """Have a table looked at soon that may be damaged."""
        self._suspects[version.key] = version
        self._news.set()

    async def run(self) -> None:
        """Compare all tables with the store, then look after them, until cancelled."""
        if not self._shelf.is_installed:
            await asyncio.Event().wait()
        was_closed = await self._shelf.store.was_closed()
        for version in self._versions():
            await self._tried(self._agree(version, whole=not was_closed))
        # Writes of the last process may not be tended yet.
        self.written(*self._versions())
        self._shelf.checked()
        now = asyncio.get_running_loop().time
        soon_at, tables_at = now(), now() + _TABLES_EVERY_S
        while True:
            while self._suspects:
                _, version = self._suspects.popitem()
                await self._tried(self.mend(version))
            if now() >= tables_at:
                await self.tend()
                tables_at = now() + _TABLES_EVERY_S
            elif self._is_soon() and now() >= soon_at:
                await self._keep_all_fast(MOST_WRITES)
                soon_at = now() + _SOON_S
            next_at = soon_at if self._is_soon() else tables_at
            with suppress(TimeoutError):
                async with asyncio.timeout(next_at - now()):
                    await self._news.wait()
            self._news.clear()

    async def follow_builds(self) -> None:
        """Compare the builds of models with those of the versions again and again, until cancelled."""
        if not self._shelf.is_installed:
            await asyncio.Event().wait()
        while True:
            await self._look_at_builds()
            await asyncio.sleep(_BUILDS_EVERY_S)

    async def tend(self) -> None:
        """Remove rubbish and tables that nobody needs; compare the others; keep them fast."""
        await self._tried(self._drop_unknown())
        for version in self._versions():
            await self._tried(self._agree(version, whole=False))
            await self._tried(self._sweep(version))
        await self._keep_all_fast(1)

    async def mend(self, version: Version) -> None:
        """Compare a table with the store row by row; forget the vectors that it has lost.

        Raises:
            RegistryUnwritableError, VectorsUnavailableError: it could not be looked at.
        """
        await finish(self._mend(version))

    async def look_at_build(self, version: Version) -> Version:
        """Ask the instances that run which builds they have; return the version as it is then.

        Called where a request has found another build, and where it needs a version that is stale.
        """
        with suppress(ManagerError):
            await self._refresh()
        await self._tried(self._look_at_build(version))
        shelved = self._shelf.of(version)
        return version if shelved is None else shelved.versions.get(version.key, version)

    # --- helpers, in call order ---

    def _versions(self) -> list[Version]:
        return [version for shelved in self._shelf.all() for version in shelved.versions.values()]

    async def _tried(self, work: Awaitable[None]) -> None:
        """Do a piece of work whose failure is no reason to end: it is tried again later."""
        try:
            await work
        except ManagerError as error:
            _log.warning("collections_not_tended", error=error.message)

    async def _agree(self, version: Version, *, whole: bool) -> None:
        """Mend a table that has fewer rows than the store says; with `whole` look at each row in any case."""
        store, vectors, table = self._shelf.store, self._shelf.vectors, version.key
        if not whole:
            rows = (await store.counts(table)).rows
            try:
                # A row that was removed meanwhile is counted in none of both.
                whole = bool(rows) and await vectors.count(table) < (await store.counts(table)).rows
            except VectorsDamagedError:
                whole = True
        if whole:
            await self.mend(version)

    async def _mend(self, version: Version) -> None:
        store, vectors, table = self._shelf.store, self._shelf.vectors, version.key
        async with self._shelf.tables.owning(table):
            shelved = self._shelf.of(version)
            if shelved is None or table not in shelved.versions:
                return
            marked = await store.marked(table)
            try:
                there = await vectors.numbers(table)
                lost = await store.unmark(table, sorted(marked - there)) if marked - there else 0
            except VectorsDamagedError as error:
                _log.warning("table_damaged", version=version.id, error=error.message)
                lost = await store.unmark(table, None)
                await vectors.drop(table)
            else:
                await store.add_rubbish(table, sorted(there - marked))
        if lost:
            name = shelved.collection.name
            self._journal.record(
                "vectors_lost",
                reason=Reason.INSTANCE_UNAVAILABLE,
                detail=f"{name}: version {version.id} has lost the vectors of {lost} items; "
                "a backfill makes new ones",
            )

    async def _look_at_builds(self) -> None:
        for shelved in self._shelf.all():
            for version in (shelved.active, shelved.building):
                if version is not None:
                    await self._tried(self._look_at_build(version))

    async def _look_at_build(self, version: Version) -> None:
        """Note that no instance has the build of a version any more, or that one has it again."""
        recipe = version.recipe
        shelved = self._shelf.of(version)
        if recipe.digest is None or shelved is None:
            return
        if version.stale_since is None and recipe.digest not in self._digests_of(recipe.model):
            # The build may be newer than the lists: a backfill begins as soon as a server has it.
            with suppress(ManagerError):
                await self._refresh()
        digests = self._digests_of(recipe.model)
        if not digests:
            return
        is_stale = recipe.digest not in digests
        async with shelved.changing:
            current = shelved.versions.get(version.key)
            if (
                current is None
                or current.state is VersionState.ARCHIVED
                or is_stale is (current.stale_since is not None)
            ):
                return
            changed = replace(current, stale_since=self._utcnow() if is_stale else None)
            await self._shelf.store.save_versions(changed)
            shelved.take(changed)
        name = shelved.collection.name
        if is_stale:
            self._journal.record(
                "version_stale",
                reason=Reason.MODEL_MISSING,
                detail=f"{name}: the build of {recipe.model} that made version {version.id} was replaced; "
                "nothing is written into it until a backfill, or the former build, is there",
            )
        else:
            detail = f"{name}: the build of {recipe.model} that made version {version.id} is there again"
            self._journal.record("version_current", detail=detail)

    async def _drop_unknown(self) -> None:
        """Remove the tables of versions that were removed.

        Where there are no collections at all, their file may be lost: what is left of them is not touched.
        """
        tables = await self._shelf.vectors.tables()
        if tables and not self._shelf.all():
            _log.info("vectors_without_collections", tables=len(tables))
            return
        for table in tables - self._shelf.tables_known():
            if not self._shelf.tables.is_used(table):
                async with self._shelf.tables.owning(table):
                    await self._shelf.vectors.drop(table)

    async def _sweep(self, version: Version) -> None:
        """Remove the rows of items that were changed or removed.

        Nobody writes meanwhile: a backfill may add the row of an item anew whose former one is rubbish.
        """
        while await finish(self._swept(version)):
            self.written(version)

    async def _swept(self, version: Version) -> bool:
        """Remove some rubbish; False where there is none."""
        store, table = self._shelf.store, version.key
        async with self._shelf.tables.owning(table):
            if table not in self._shelf.tables_known():
                return False
            rubbish = await store.rubbish(table, _RUBBISH_AT_ONCE)
            if rubbish:
                try:
                    await self._shelf.vectors.remove(table, rubbish)
                except VectorsDamagedError:
                    self.suspect(version)
                    raise
                await store.swept(table, rubbish)
        return bool(rubbish)

    def _is_soon(self) -> bool:
        return any(writes >= MOST_WRITES for writes in self._writes.values())

    async def _keep_all_fast(self, least: int) -> None:
        """Tend the tables that had so many writes."""
        due = [key for key, writes in self._writes.items() if writes >= least]
        versions = {version.key: version for version in self._versions()}
        for key in due:
            del self._writes[key]
            if key in versions:
                await self._tried(self._keep_fast(versions[key]))

    async def _keep_fast(self, version: Version) -> None:
        async with self._shelf.tables.using(version.key):
            if version.key in self._shelf.tables_known():
                try:
                    await self._shelf.vectors.tend(version.key)
                except VectorsDamagedError:
                    self.suspect(version)
                    raise
