"""The tables, through LanceDB's blocking interface. Several threads may call it at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from manager.adapters.vectors import files
from manager.adapters.vectors.faults import is_conflict, is_panic, translated
from manager.adapters.vectors.rows import DimensionError
from manager.errors import ManagerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import pyarrow as pa
    from lancedb import DBConnection, Session
    from lancedb.table import Table

    from manager.adapters.vectors.tending import Tending

T = TypeVar("T")

# What LanceDB may keep in memory of indexes, and of manifests and the heads of files.
INDEX_CACHE_BYTES = 512 * 1024**2
METADATA_CACHE_BYTES = 64 * 1024**2
_NEXT_TO_NOTHING_BYTES = 1024**2
# Each call sees what the other process of a handover has written before.
_ALWAYS_NEWEST = timedelta(0)
_MOST_OPEN = 32
_TRIES = 8


class Tables:
    """The open tables of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._connection: DBConnection | None = None
        self._open: OrderedDict[int, Table] = OrderedDict()
        self._calls: dict[object, int] = {}
        # Who holds it may write, or remove files that no state knows.
        self.writing = threading.Lock()

    def read(self, table: int, work: Callable[[Table], T], default: T) -> T:
        """Do something with a table; `default` where it does not exist.

        What fails is done once more with a table that is opened anew: tend may have removed the files of
        the state that was read, and what was damaged may have been dropped.
        """

        def tried() -> T:
            try:
                return self._tried(table, work, default)
            except BaseException as error:  # noqa: BLE001
                _refuse_foreign(error)
                self._forget(table)
            return self._tried(table, work, default)

        return self._told(table, tried, default)

    def read_from_disk(self, table: int, work: Callable[[Table], T], default: T) -> T:
        """Do as `read`, with nothing that is remembered from before: damage shows."""

        def tried(_: Table) -> T:
            connection = _connect(self.directory, _session(_NEXT_TO_NOTHING_BYTES, _NEXT_TO_NOTHING_BYTES))
            return work(connection.open_table(self.path(table).stem))

        return self.read(table, tried, default)

    def write(self, table: int, work: Callable[[Table], T], default: T, schema: pa.Schema | None = None) -> T:
        """Change a table, on disk when this returns; it is created where `schema` is given.

        A commit that another one has overtaken has changed nothing, and is repeated.
        """

        def tried() -> T:
            unsynced = files.Unsynced(self.path(table))
            for left in reversed(range(_TRIES)):
                try:
                    with self.writing:
                        result = self._tried(table, work, default, schema)
                except (RuntimeError, ValueError, OSError) as error:
                    if not left or not is_conflict(error):
                        raise
                else:
                    break
            unsynced.sync()
            return result

        return self._told(table, tried, default, creates=schema is not None)

    def drop(self, table: int) -> None:
        self._told(table, lambda: files.remove(self.path(table)), None)

    async def tend(self, table: int, tending: Tending) -> None:
        """Tend a table in the running event loop, on which nothing else depends."""
        try:
            import lancedb  # noqa: PLC0415

            if files.states(self.path(table)):
                with self._lock:
                    session = self._shared_session()
                connection = await lancedb.connect_async(
                    self.directory, read_consistency_interval=_ALWAYS_NEWEST, session=session
                )
                handle = await connection.open_table(self.path(table).stem)
                await tending.tend(table, self.path(table), handle, self)
        except BaseException as error:
            _refuse_foreign(error)
            if not self._is_dropped(table):
                raise translated(error, table) from error

    def path(self, table: int) -> Path:
        return files.path_of(self.directory, table)

    def _told(self, table: int, work: Callable[[], T], default: T, *, creates: bool = False) -> T:
        try:
            with self._called(table):
                return work()
        except BaseException as error:
            _refuse_foreign(error)
            self._forget(table)
            if not creates and self._is_dropped(table):
                return default
            raise translated(error, table) from error

    def _tried(
        self, table: int, work: Callable[[Table], T], default: T, schema: pa.Schema | None = None
    ) -> T:
        handle = self._handle(table, schema)
        return default if handle is None else work(handle)

    def _handle(self, table: int, schema: pa.Schema | None) -> Table | None:
        with self._lock:
            if files.is_missing(self.path(table)):
                self._open.pop(table, None)
                if schema is None:
                    return None
            elif (handle := self._open.get(table)) is not None:
                self._open.move_to_end(table)
                return handle
            handle = self._opened(table, schema)
            if handle is not None:
                self._open[table] = handle
                if len(self._open) > _MOST_OPEN:
                    self._open.popitem(last=False)
            return handle

    def _opened(self, table: int, schema: pa.Schema | None) -> Table | None:
        path = self.path(table)
        if schema is not None:
            files.open_directory(self.directory)
            files.remove_dropped(self.directory)
        if not files.states(path):
            # A table is created without rows: one that has some once had a state.
            if files.has_rows(path):
                raise FileNotFoundError(2, "there are rows, but nothing says which")
            if schema is None:
                return None
            return self._connected().create_table(path.stem, schema=schema)
        return self._connected().open_table(path.stem)

    def _connected(self) -> DBConnection:
        if self._connection is None:
            self._connection = _connect(self.directory, self._shared_session())
        return self._connection

    def _shared_session(self) -> Session:
        if self._session is None:
            self._session = _session(INDEX_CACHE_BYTES, METADATA_CACHE_BYTES)
        return self._session

    @contextmanager
    def _called(self, table: int) -> Iterator[None]:
        call = object()
        with self._lock:
            self._calls[call] = table
        try:
            yield
        finally:
            with self._lock:
                del self._calls[call]

    def calls_on(self, table: int) -> frozenset[object]:
        with self._lock:
            return frozenset(call for call, of in self._calls.items() if of == table)

    def _forget(self, table: int) -> None:
        """Open the table anew next time."""
        with self._lock:
            self._open.pop(table, None)

    def _is_dropped(self, table: int) -> bool:
        try:
            return files.is_missing(self.path(table))
        except OSError:  # the error that there is says why
            return False


def _session(index_cache_bytes: int, metadata_cache_bytes: int) -> Session:
    import lancedb  # noqa: PLC0415  (it takes two seconds and 100 MiB)

    return lancedb.Session(index_cache_bytes, metadata_cache_bytes)


def _connect(directory: Path, session: Session) -> DBConnection:
    import lancedb  # noqa: PLC0415

    return lancedb.connect(directory, read_consistency_interval=_ALWAYS_NEWEST, session=session)


def _refuse_foreign(error: BaseException) -> None:
    """Raise what is not LanceDB's: an end of the process, and what this package has said itself."""
    is_own = isinstance(error, ManagerError | DimensionError)
    if is_own or not (isinstance(error, Exception) or is_panic(error)):
        raise error
