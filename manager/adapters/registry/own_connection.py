"""A connection to a database, such as a second one to the registry, with a thread of its own."""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

from manager.adapters.registry.opening import REGISTRY, connect_existing, translated
from manager.errors import RegistryUnwritableError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

T = TypeVar("T")
# FULL: a commit is on the disk. NORMAL: it survives the end of the process, not a loss of power.
Synchronous: TypeAlias = Literal["FULL", "NORMAL"]


class Cursor(Protocol):
    """The result of a statement."""

    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...


class Session(Protocol):
    """Runs statements in SQL that SQLite and PostgreSQL both understand; values stand for question marks."""

    def execute(self, statement: str, values: Sequence[Any] = ..., /) -> Cursor: ...


class LedgerConnection(Protocol):
    """A connection of its own, with a thread of its own. A commit is on the disk."""

    async def call(self, work: Callable[[], T], *, doing: str = "written") -> T:
        """Run `work` in the thread; `doing` is what an error says could not be done.

        Raises:
            RegistryCorruptError, RegistryUnwritableError: the database refused, or the connection is closed.
        """
        ...

    def open(self) -> Session:
        """Return the connection; only within `call`."""
        ...

    def transaction(self) -> AbstractContextManager[Session]:
        """Write in one transaction that excludes all other writers; only within `call`."""
        ...

    def living(self, gateways: Collection[str]) -> frozenset[str]:
        """Return those of the gateways that have a session now; only within `call`."""
        ...

    async def close(self) -> None: ...


class OwnConnection:
    """Runs SQL in one thread, in the order of the calls. The connection is made by the first of them.

    Args:
        path: of the registry, which is open.
        refuse_if_moved: raises where the registry's files are not those any more that were opened.
        name: of the thread.
        synchronous: how durable a commit is.
        busy_timeout_s: how long another connection may have the registry locked.
        pragmas: others that hold for the connection, such as `foreign_keys=ON`.
        what: names the file in errors.
    """

    def __init__(
        self,
        path: Path,
        refuse_if_moved: Callable[[], None],
        *,
        name: str,
        synchronous: Synchronous,
        busy_timeout_s: float,
        pragmas: tuple[str, ...] = (),
        what: str = REGISTRY,
    ) -> None:
        self._path = path
        self.refuse_if_moved = refuse_if_moved
        self._pragmas = (f"synchronous={synchronous}", *pragmas)
        self._what = what
        self._busy_timeout_s = busy_timeout_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    async def call(self, work: Callable[[], T], *, doing: str = "written") -> T:
        """Run `work` in the thread; `doing` is what an error says could not be done.

        Raises:
            RegistryCorruptError, RegistryUnwritableError: SQLite refused, or the connection is closed.
        """
        if self._closed:
            raise RegistryUnwritableError(f"{self._what} {self._path} is closed")

        def run() -> T:
            try:
                return work()
            except sqlite3.Error as error:
                raise translated(self._path, error, doing, self._what) from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def open(self) -> sqlite3.Connection:
        """Return the connection; only within `call`."""
        if self._connection is None:
            connection = connect_existing(self._path, self._busy_timeout_s)
            try:
                for pragma in self._pragmas:
                    connection.execute(f"PRAGMA {pragma}").close()
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write in one transaction, which happens completely or not at all; only within `call`."""
        self.refuse_if_moved()
        connection = self.open()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def living(self, gateways: Collection[str]) -> frozenset[str]:  # noqa: ARG002
        """A file is of one gateway: no other one has a session."""
        return frozenset()

    async def close(self) -> None:
        """End after the calls that are under way; closing twice is no error."""
        if not self._closed:
            self._closed = True
            last = self._thread.submit(self._disconnect)
            self._thread.shutdown(wait=False)
            await asyncio.wrap_future(last)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
