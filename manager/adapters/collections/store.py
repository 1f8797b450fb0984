"""The store of collections as the services see it."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from manager.adapters.collections import catalogue, file, removal
from manager.adapters.collections import items as on_items
from manager.adapters.collections import marks as on_marks
from manager.adapters.registry.opening import refusal
from manager.adapters.registry.own_connection import OwnConnection
from manager.adapters.registry.same_files import SameFiles
from manager.domain.embeddings import Counts
from manager.errors import RegistryCorruptError, RegistryUnwritableError
from manager.services.embeddings.ports import Lacking

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from manager.adapters.collections.removal import Removed
    from manager.domain.embeddings import Backfill, Collection, Failure, Version
    from manager.services.embeddings.ports import Found, StoredItem

T = TypeVar("T")
R = TypeVar("R", bound="tuple[Any, ...]")

_log = structlog.get_logger("collections")

_BUSY_TIMEOUT_S = 5.0
# Rows that one look reads. Other reads go on between two of them.
_LOOK = 5000
_NEXT_NUMBER = "SELECT next_number FROM meta"
_TAKE_NUMBERS = "UPDATE meta SET next_number = ?"
_IS_CLOSED = "SELECT is_closed FROM meta"
_NOTE_CLOSED = "UPDATE meta SET is_closed = ?"


class SqlCollections:
    """Implements `services.embeddings.ports.CollectionStore`; `open_collections` makes it.

    All writes run in one thread, in the order of the calls; all reads run in another one, in their order.
    What a write has committed is on the disk, and every later read sees it. Without a file, reads find
    nothing, and only `create` writes: it makes the file.
    """

    def __init__(self, path: Path, first_version: int = 1) -> None:
        self._path = path.absolute()
        self._first_version = first_version
        self._files = SameFiles(self._path, file.WHAT)
        connection = partial(
            OwnConnection,
            self._path,
            self._files.refuse_others,
            synchronous="FULL",
            busy_timeout_s=_BUSY_TIMEOUT_S,
            what=file.WHAT,
        )
        # A copy by SQLite itself has no write-ahead log.
        pragmas = ("journal_mode=WAL", "foreign_keys=ON")
        self._writer = connection(name="collections", pragmas=pragmas)
        self._reader = connection(name="collections-reads", pragmas=("query_only=ON",))
        self._is_there = False
        self._was_closed = True
        # Whether the file says that it is open.
        self._is_noted = False
        # Without a file, numbers come from here.
        self._next_number = 1
        self._removals: set[asyncio.Task[None]] = set()
        self._closed = False

    async def open(self) -> None:
        """Called once, by `open_collections`."""
        left = await self._writer.call(self._open, doing="opened")
        if left:
            self._removing(self._remove_rows(left))

    # --- collections, versions, backfills ---

    async def collections(self) -> tuple[Collection, ...]:
        return await self._read(catalogue.collections, ())

    async def versions(self) -> tuple[Version, ...]:
        return await self._read(catalogue.versions, ())

    async def backfills(self) -> tuple[Backfill, ...]:
        return await self._read(catalogue.backfills, ())

    async def create(self, collection: Collection) -> int:
        """Store a new collection.

        Raises:
            ValueError: its name is taken.
        """

        def work() -> int:
            if not self._is_there:
                file.create(self._path, self._first_version)
                self._begin()
                with self._transaction() as connection:
                    connection.execute(_TAKE_NUMBERS, (self._next_number,))
            with self._transaction() as connection:
                return catalogue.create(connection, collection)

        return await self._call_writer(work)

    async def remove(self, collection: int) -> None:
        """Remove a collection: at once for all who look, while its rows go in many small transactions.

        It goes on where this call is cancelled. What the process leaves goes at the next opening.
        """
        await self._remove(partial(removal.remove_collection, collection=collection))

    async def add_version(self, version: Version) -> int:
        """Store a new version.

        Raises:
            ValueError: its collection is gone, or has another active version.
        """
        key = await self._write(partial(catalogue.add_version, version=version), None)
        if key is None:
            raise ValueError("there is no collection")
        return key

    async def save_versions(self, *versions: Version) -> None:
        await self._write(partial(catalogue.save_versions, versions=versions), None)

    async def remove_version(self, version: int) -> None:
        """Remove a version and the backfill of it, as `remove` does."""
        await self._remove(partial(removal.remove_version, version=version))

    async def save_backfill(self, backfill: Backfill) -> None:
        await self._write(partial(catalogue.save_backfill, backfill=backfill), None)

    async def begin_backfill(self, backfill: Backfill, *changed: Version) -> None:
        await self._write(partial(catalogue.begin_backfill, backfill=backfill, changed=changed), None)

    async def switch(
        self,
        wanted: Version,
        replaced: Version | None,
        collection: Collection,
        allowed: Callable[[Counts], bool],
    ) -> Counts | None:
        def work(connection: sqlite3.Connection) -> Counts | None:
            return catalogue.switch(connection, wanted, replaced, collection, allowed)

        return await self._write(work, Counts(0, 0))

    async def counts(self, version: int) -> Counts:
        return await self._read(partial(catalogue.counts, version=version), None) or Counts(0, 0)

    async def all_counts(self) -> Mapping[int, Counts]:
        return await self._read(catalogue.all_counts, {})

    async def item_counts(self) -> Mapping[int, int]:
        return await self._read(catalogue.item_counts, {})

    # --- items ---

    async def allocate(self, count: int) -> int:
        def work() -> int:
            if not self._is_there:
                first, self._next_number = self._next_number, self._next_number + count
                return first
            with self._transaction() as connection:
                (first,) = connection.execute(_NEXT_NUMBER).fetchone()
                connection.execute(_TAKE_NUMBERS, (first + count,))
            return int(first)

        return await self._call_writer(work)

    async def put(
        self, collection: int, items: Sequence[StoredItem], marks: Mapping[int, Sequence[int]], active: int
    ) -> bool:
        """Store items and marks.

        Raises:
            ValueError: an id is there twice, a number was used before, or a mark is of none of the items.
        """
        work = partial(on_items.put, collection=collection, items=items, marks=marks, active=active)
        return await self._write(work, without=False)

    async def delete(self, collection: int, item: str) -> bool:
        return await self._write(partial(on_items.delete, collection=collection, item=item), without=False)

    async def item(self, collection: int, item: str) -> tuple[StoredItem, Mapping[int, datetime]] | None:
        return await self._read(partial(on_items.item, collection=collection, item=item), None)

    async def page(self, collection: int, after: str | None, limit: int) -> tuple[StoredItem, ...]:
        return await self._read(partial(on_items.page, collection=collection, after=after, limit=limit), ())

    async def found(self, version: int, numbers: Sequence[int]) -> Mapping[int, Found]:
        return await self._read(partial(on_items.found, version=version, numbers=numbers), {})

    async def matching(self, version: int, is_wanted: Callable[[Mapping[str, Any]], bool]) -> frozenset[int]:
        """Return the numbers of the items whose metadata are wanted; what is no JSON is not.

        Other reads go on meanwhile: an item that is stored meanwhile may be missing.
        """
        found: set[int] = set()
        async for rows in self._looks(partial(on_items.metadata_after, version=version)):
            found.update(await self._reader.call(partial(on_items.wanted, rows, is_wanted), doing="read"))
        return frozenset(found)

    # --- backfill ---

    async def missing(self, version: int, after: int, limit: int) -> tuple[StoredItem, ...]:
        return await self._read(partial(on_marks.missing, version=version, after=after, limit=limit), ())

    async def mark(self, version: int, numbers: Sequence[int], at: datetime) -> int:
        return await self._write(partial(on_marks.mark, version=version, numbers=numbers, at=at), 0)

    async def failed(self, version: int, number: int, message: str, *, at_once: bool) -> Failure | None:
        """Count a failure of an item. None where the item is gone, or has a vector."""
        work = partial(on_marks.failed, version=version, number=number, message=message, at_once=at_once)
        return await self._write(work, None)

    async def failures(self, version: int, limit: int) -> tuple[Failure, ...]:
        return await self._read(partial(on_marks.failures, version=version, limit=limit), ())

    async def lacking(self, version: int, limit: int) -> Lacking:
        return await self._read(partial(on_marks.lacking, version=version, limit=limit), Lacking((), ()))

    # --- the tables ---

    async def marked(self, version: int) -> frozenset[int]:
        """Return the numbers of all items that have a vector in the version; see `matching`."""
        found: set[int] = set()
        async for rows in self._looks(partial(on_items.marked_after, version=version)):
            found.update(row[0] for row in rows)
        return frozenset(found)

    async def unmark(self, version: int, numbers: Sequence[int] | None) -> int:
        """Forget that items have vectors. Their rows are rubbish; with None, the table has none."""
        return await self._write(partial(on_marks.unmark, version=version, numbers=numbers), 0)

    async def rubbish(self, version: int, limit: int) -> tuple[int, ...]:
        return await self._read(partial(on_marks.rubbish, version=version, limit=limit), ())

    async def add_rubbish(self, version: int, numbers: Sequence[int]) -> None:
        """Note rubbish; the row of an item that has a vector is none."""
        await self._write(partial(on_marks.add_rubbish, version=version, numbers=numbers), None)

    async def swept(self, version: int, numbers: Sequence[int]) -> None:
        await self._write(partial(on_marks.swept, version=version, numbers=numbers), None)

    async def was_closed(self) -> bool:
        return self._was_closed

    async def close(self) -> None:
        """Note that everything is in order, and close. Where the note fails, the file stays noted as open."""
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(*self._removals)
        with suppress(RegistryCorruptError, RegistryUnwritableError):
            await self._writer.call(self._note_closed)
        await self.abandon()

    async def abandon(self) -> None:
        """Close without a note."""
        self._closed = True
        await self._reader.close()
        await self._writer.close()

    # --- threads and transactions ---

    def _open(self) -> list[Removed]:
        if not file.verify(self._path):
            return []
        self._begin()
        with self._refusing():
            return removal.pending(self._writer.open())

    def _begin(self) -> None:
        """Open a file that is there."""
        with self._refusing():
            (is_closed,) = self._writer.open().execute(_IS_CLOSED).fetchone()
        self._was_closed = bool(is_closed)
        self._files.remember()
        self._is_there = True

    def _note_closed(self) -> None:
        if self._is_there:
            with self._writer.transaction() as connection:
                connection.execute(_NOTE_CLOSED, (True,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Write in one transaction. Before the first change, the file is noted as open, for good."""
        if not self._is_noted:
            with self._writer.transaction() as connection:
                connection.execute(_NOTE_CLOSED, (False,))
            self._is_noted = True
        try:
            with self._writer.transaction() as connection:
                yield connection
        except sqlite3.IntegrityError as error:
            # The caller's mistake, not the file's.
            raise ValueError(f"it cannot be stored: {error}") from error

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Refuse the file where a row in it has another form than expected."""
        try:
            yield
        except (LookupError, TypeError, ValueError) as error:
            raise refusal(self._path, f"a row in it cannot be read: {error}", file.WHAT) from error

    async def _read(self, work: Callable[[sqlite3.Connection], T], without: T) -> T:
        """Read; return `without` where there is no file."""

        def run() -> T:
            if not self._is_there:
                return without
            with self._refusing():
                return work(self._reader.open())

        self._refuse_if_closed()
        return await self._reader.call(run, doing="read")

    async def _looks(self, look: Callable[..., list[R]]) -> AsyncIterator[list[R]]:
        """Return rows that start with a growing number, some at a time."""
        after, nothing = 0, list[R]()
        while rows := await self._read(partial(look, after=after, limit=_LOOK), nothing):
            yield rows
            after = rows[-1][0]

    async def _write(self, work: Callable[[sqlite3.Connection], T], without: T) -> T:
        """Write in one transaction; return `without` where there is no file."""

        def run() -> T:
            if not self._is_there:
                return without
            with self._transaction() as connection:
                return work(connection)

        return await self._call_writer(run)

    async def _call_writer(self, work: Callable[[], T]) -> T:
        self._refuse_if_closed()
        return await self._writer.call(work)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            error = RegistryUnwritableError(
                f"{file.WHAT} is closed: this daemon ends, or another one takes over; try again"
            )
            error.retry_after_s = 1
            raise error

    async def _remove(self, begin: Callable[[sqlite3.Connection], list[Removed]]) -> None:
        async def work() -> None:
            await self._remove_rows(await self._write(begin, []))

        await asyncio.shield(self._removing(work()))

    def _removing(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)
        return task

    async def _remove_rows(self, left: list[Removed]) -> None:
        """Remove rows that nobody sees any more, some at a time; other calls go on in between.

        An error is no error of the removal, which has happened: the next opening goes on.
        """
        for one in left:
            is_done = False
            while not is_done:
                if self._closed:
                    return
                try:
                    is_done = await self._write(partial(removal.remove_rows, removed=one), without=True)
                except (RegistryCorruptError, RegistryUnwritableError) as error:
                    _log.warning("rows_left", kind=one.kind, key=one.key, error=str(error))
                    return
