"""The tables, through LanceDB's blocking interface. Several threads may call it at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from manager.adapters.vectors import files
from manager.adapters.vectors.faults import is_conflict, is_panic, translated
from manager.adapters.vectors.rows import DimensionError
from manager.errors import ManagerError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pyarrow as pa
    from lancedb import DBConnection
    from lancedb.table import Table

T = TypeVar("T")

# What LanceDB may keep in memory of indexes, and of manifests and the heads of files.
INDEX_CACHE_BYTES = 512 * 1024**2
METADATA_CACHE_BYTES = 64 * 1024**2
_MOST_OPEN = 32
_TRIES = 8


class Tables:
    """The open tables of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        self._connection: DBConnection | None = None
        self._open: OrderedDict[int, Table] = OrderedDict()

    def read(self, table: int, work: Callable[[Table], T], default: T) -> T:
        """Do something with a table; `default` where it does not exist.

        What fails is done once more with a table that is opened anew: tend may have removed the files of
        a state that the first one was reading, and what was damaged may have been dropped.
        """
        try:
            return self._tried(table, work, default)
        except BaseException as error:  # noqa: BLE001
            self._refuse_foreign(error)
            self.forget(table)
            if files.is_missing(self._path(table)):
                return default
        return self._told(table, lambda: self._tried(table, work, default), default)

    def write(self, table: int, work: Callable[[Table], T], default: T, schema: pa.Schema | None = None) -> T:
        """Change a table, on disk when this returns; it is created where `schema` is given.

        A commit that another one has overtaken has changed nothing, and is repeated.
        """

        def tried() -> T:
            unsynced = files.Unsynced(self._path(table))
            for _ in range(_TRIES - 1):
                try:
                    result = self._tried(table, work, default, schema)
                    break
                except (RuntimeError, ValueError) as error:
                    if not is_conflict(error):
                        raise
            else:
                result = self._tried(table, work, default, schema)
            if not files.is_missing(self._path(table)):
                unsynced.sync()
            return result

        return self._told(table, tried, default, creates=schema is not None)

    def drop(self, table: int) -> None:
        self._told(table, lambda: files.remove(self._path(table)), None)
        with self._lock:
            # LanceDB remembers files by their path, in a cache that all tables of a connection share.
            self._connection = None
            self._open.clear()

    def forget(self, table: int) -> None:
        """Open the table anew next time."""
        with self._lock:
            self._open.pop(table, None)

    def _told(self, table: int, work: Callable[[], T], default: T, *, creates: bool = False) -> T:
        try:
            return work()
        except BaseException as error:
            self._refuse_foreign(error)
            self.forget(table)
            if not creates and files.is_missing(self._path(table)):
                return default  # it was dropped meanwhile
            raise translated(error, table) from error

    @staticmethod
    def _refuse_foreign(error: BaseException) -> None:
        """Raise what is not LanceDB's: an end of the process, and what this package has said itself."""
        if isinstance(error, ManagerError | DimensionError) or not (
            isinstance(error, Exception) or is_panic(error)
        ):
            raise error

    def _tried(
        self, table: int, work: Callable[[Table], T], default: T, schema: pa.Schema | None = None
    ) -> T:
        handle = self._handle(table, schema)
        return default if handle is None else work(handle)

    def _handle(self, table: int, schema: pa.Schema | None) -> Table | None:
        path = self._path(table)
        with self._lock:
            if files.is_missing(path):
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
        path = self._path(table)
        if schema is not None:
            files.open_directory(self.directory)
            files.remove_dropped(self.directory)
        connection = self._connected()
        name = path.stem
        if files.is_missing(path) or not files.has_manifest(path):
            if files.has_rows(path):
                raise FileNotFoundError(2, "there are rows, but no manifest says which")
            if schema is None:
                return None
            return connection.create_table(name, schema=schema)
        return connection.open_table(name)

    def _connected(self) -> DBConnection:
        if self._connection is None:
            import lancedb  # noqa: PLC0415  (it takes two seconds and 100 MiB)

            self._connection = lancedb.connect(
                self.directory,
                # Each call sees what the other process of a handover has written before.
                read_consistency_interval=timedelta(0),
                session=lancedb.Session(INDEX_CACHE_BYTES, METADATA_CACHE_BYTES),
            )
        return self._connection

    def _path(self, table: int) -> Path:
        return files.path_of(self.directory, table)
