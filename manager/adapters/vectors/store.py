"""`Vectors` with LanceDB, one table a directory `v{number}.lance`."""

from __future__ import annotations

import asyncio
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from anyio import CancelScope

from manager.adapters.vectors import files, rows
from manager.adapters.vectors.tables import Tables
from manager.errors import VectorsUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from datetime import datetime
    from pathlib import Path

    from manager.services.embeddings.ports import Hit, TableFacts, VectorRow

T = TypeVar("T")

_READERS = 3


def installed() -> bool:
    """Return whether the libraries are there; they are not loaded."""
    return all(importlib.util.find_spec(name) is not None for name in ("lancedb", "pyarrow"))


class LanceVectors:
    """Implements `services.embeddings.ports.Vectors`.

    All of it happens in threads: one that writes, three that read. A call that is cancelled has either
    happened or not, and nothing of it goes on afterwards.

    LanceDB flushes nothing to the disk by itself; rows are flushed here, before `add` and `remove` return.

    Args:
        directory: of the tables. It is made at the first write, for the user alone.
    """

    def __init__(self, directory: Path) -> None:
        self._tables = Tables(directory)
        self._writer = ThreadPoolExecutor(1, "vectors writing")
        self._readers = ThreadPoolExecutor(_READERS, "vectors reading")
        self._is_closed = False

    async def tables(self) -> frozenset[int]:
        def work() -> frozenset[int]:
            try:
                return files.tables_in(self._tables.directory)
            except OSError as error:
                raise VectorsUnavailableError(f"the tables of vectors: {error.strerror}") from error

        return await self._call(self._readers, work)

    async def add(self, table: int, facts: TableFacts, rows_: Sequence[VectorRow], at: datetime) -> None:
        def work() -> None:
            data = rows.arrow_of(facts, rows_, at)
            self._tables.write(table, lambda handle: rows.add(handle, data), None, schema=data.schema)

        if rows_:
            await self._call(self._writer, work)

    async def remove(self, table: int, numbers: Sequence[int]) -> None:
        def work() -> None:
            self._tables.write(table, lambda handle: rows.remove(handle, numbers), None)

        if numbers:
            await self._call(self._writer, work)

    async def search(
        self, table: int, vector: bytes, count: int, among: Collection[int] | None = None
    ) -> list[Hit]:
        def work() -> list[Hit]:
            return self._tables.read(table, lambda handle: rows.search(handle, vector, count, among), [])

        return await self._call(self._readers, work)

    async def get(self, table: int, number: int) -> bytes | None:
        def work() -> bytes | None:
            return self._tables.read(table, lambda handle: rows.get(handle, number), None)

        return await self._call(self._readers, work)

    async def numbers(self, table: int) -> frozenset[int]:
        return await self._call(self._readers, lambda: self._tables.read(table, rows.numbers, frozenset()))

    async def count(self, table: int) -> int:
        def work() -> int:
            return self._tables.read(table, lambda handle: handle.count_rows(), 0)

        return await self._call(self._readers, work)

    async def drop(self, table: int) -> None:
        await self._call(self._writer, lambda: self._tables.drop(table))

    async def tend(self, table: int) -> None:
        pass

    async def close(self) -> None:
        self._is_closed = True

        def wait() -> None:
            self._writer.shutdown()
            self._readers.shutdown()

        await asyncio.to_thread(wait)

    async def _call(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        if self._is_closed:
            raise VectorsUnavailableError("the tables of vectors are closed")
        waiting = pool.submit(work)
        future = asyncio.wrap_future(waiting)
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            # What has not begun never will; what has begun ends first.
            waiting.cancel()
            with CancelScope(shield=True):  # a cancelled scope cancels again on every turn of the loop
                while not future.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait({future})
            if not future.cancelled():
                future.exception()  # nobody is left to be told
            raise
        return future.result()
