"""A database that the registry is in: its connections, its thread, and what its errors mean."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sqlalchemy import Engine, QueuePool, create_engine, event, func, select
from sqlalchemy.exc import DBAPIError, IntegrityError

from manager.adapters.registry import tables
from manager.adapters.registry.opening import connect_existing, prepare, refusal, translated
from manager.adapters.registry.own_connection import OwnConnection
from manager.adapters.registry.same_files import SameFiles
from manager.errors import RegistryUnwritableError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

    from sqlalchemy import Connection

    from manager.adapters.registry.own_connection import LedgerConnection

T = TypeVar("T")


class Database(Protocol):
    """All SQL runs in one thread, in the order of the calls.

    A call that was cancelled either happened completely or not at all.

    Raises:
        RegistryCorruptError: what is there cannot be used, or a row in it cannot be read.
        RegistryUnwritableError: the database refused or is away; nothing changed.
    """

    async def open(self) -> None:
        """Create or update the schema, and connect; once."""
        ...

    async def read(self, work: Callable[[Connection], T]) -> T: ...
    async def write(self, work: Callable[[Connection], Any]) -> None:
        """Run `work` in one transaction that excludes all other writers.

        Raises:
            IntegrityError: the caller's mistake; nothing changed.
        """
        ...

    async def check(self) -> None:
        """Look whether what is written can still be found after a restart."""
        ...

    def ledger_connection(self) -> LedgerConnection:
        """Return a connection for the ledger, which is closed before the database is."""
        ...

    async def close(self) -> None:
        """End after the calls that are under way; closing twice is no error."""
        ...

    def abandon(self) -> Future[None]:
        """Close without waiting; a second time is no error."""
        ...


class SqliteDatabase:
    """Implements `Database` over one SQLite file.

    Args:
        path: of the file.
        busy_timeout_s: how long another process may have it locked.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float) -> None:
        self.path = path.absolute()
        self.busy_timeout_s = busy_timeout_s
        self.files = SameFiles(self.path)
        self._reads = _engine(self.path, busy_timeout_s)
        self._writes = self._reads.execution_options(begin="BEGIN IMMEDIATE")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")
        self._last: Future[None] | None = None

    async def open(self) -> None:
        await self._call(self._open)

    async def read(self, work: Callable[[Connection], T]) -> T:
        def run() -> T:
            try:
                with self._reads.connect() as connection:
                    return work(connection)
            except DBAPIError as exc:
                raise translated(self.path, exc.orig, "read") from exc
            except (LookupError, TypeError, ValueError) as exc:
                raise refusal(self.path, f"a row in it cannot be read: {exc}") from exc

        return await self._call(run)

    async def write(self, work: Callable[[Connection], Any]) -> None:
        def run() -> None:
            self.files.refuse_others()
            try:
                with self._writes.begin() as connection:
                    work(connection)
            except IntegrityError:
                raise  # the caller's mistake, not the file's
            except DBAPIError as exc:
                raise translated(self.path, exc.orig, "written") from exc

        await self._call(run)

    async def check(self) -> None:
        await self._call(self.files.refuse_others)

    def ledger_connection(self) -> OwnConnection:
        """Every write of it is flushed to the disk before the call returns."""
        return OwnConnection(
            self.path,
            self.files.refuse_others,
            name="ledger",
            synchronous="FULL",
            busy_timeout_s=self.busy_timeout_s,
        )

    async def close(self) -> None:
        await asyncio.wrap_future(self.abandon())

    def abandon(self) -> Future[None]:
        if self._last is None:
            self._last = self._thread.submit(self._reads.dispose)
            self._thread.shutdown(wait=False)
        return self._last

    def _open(self) -> None:
        prepare(self.path)
        try:
            with self._reads.connect() as connection:
                connection.execute(select(func.count()).select_from(tables.instances))
        except DBAPIError as exc:
            raise translated(self.path, exc.orig, "opened") from exc
        self.files.remember()

    async def _call(self, work: Callable[[], T]) -> T:
        if self._last is not None:
            raise RegistryUnwritableError(f"the registry {self.path} is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _engine(path: Path, busy_timeout_s: float) -> Engine:
    def connect() -> sqlite3.Connection:
        connection = connect_existing(path, busy_timeout_s)
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}").close()
        except BaseException:
            connection.close()
            raise
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_size=1, max_overflow=0)

    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine
