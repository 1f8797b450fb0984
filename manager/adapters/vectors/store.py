"""`Vectors` with LanceDB, one table a directory `v{number}.lance`."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from anyio import CancelScope

from manager.adapters.vectors import files, rows
from manager.adapters.vectors.background import Background
from manager.adapters.vectors.libraries import give_back_memory, prepare
from manager.adapters.vectors.tables import Tables
from manager.adapters.vectors.tending import Tending
from manager.errors import VectorsUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
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

    All of it happens in threads: one writes, three read, and one tends. A call that is cancelled has either
    happened or not, and the table does not change afterwards. A tend that is cut off may use the processor
    for some seconds more.

    LanceDB flushes nothing to the disk (strace of 0.40 shows no fsync). `add`, `remove` and `tend` flush all
    new files before they return, and `tend` does so before it removes the files that they replace. A loss of
    power during a call may leave a table that is damaged; an end of the process leaves none.

    Two processes may have the directory open if one of them writes. The other one sees each call that has
    returned. A read of it may fail once while the first one tends, and is repeated.

    The first call that needs LanceDB loads it: two seconds, 150 MiB, and about ten threads, which a fork does
    not survive. Further threads read files, and end after some seconds without work.

    To build an index LanceDB writes about 200 bytes a row of 384 dimensions to the directory for temporary
    files (`TMPDIR`), readable for all where the umask allows it.

    Args:
        directory: of the tables. It is made at the first write, for the user alone.
    """

    def __init__(self, directory: Path) -> None:
        prepare()
        self._tables = Tables(directory)
        self._writer = ThreadPoolExecutor(1, "vectors writing")
        self._readers = ThreadPoolExecutor(_READERS, "vectors reading")
        self._tending = Tending()
        self._tends = asyncio.Lock()
        self._tended: tuple[int, Background] | None = None
        self._dropping: set[int] = set()
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
            if among is None:
                return self._tables.read(table, lambda handle: rows.search(handle, vector, count), [])
            return self._tables.read(
                table, lambda handle: rows.search_among(handle, vector, count, among), []
            )

        return await self._call(self._readers, work)

    async def get(self, table: int, number: int) -> bytes | None:
        def work() -> bytes | None:
            return self._tables.read(table, lambda handle: rows.get(handle, number), None)

        return await self._call(self._readers, work)

    async def numbers(self, table: int) -> frozenset[int]:
        def work() -> frozenset[int]:
            nothing: frozenset[int] = frozenset()
            found = self._tables.read_from_disk(table, rows.numbers, nothing)
            give_back_memory()
            return found

        return await self._call(self._readers, work)

    async def count(self, table: int) -> int:
        def work() -> int:
            return self._tables.read(table, lambda handle: handle.count_rows(), 0)

        return await self._call(self._readers, work)

    async def drop(self, table: int) -> None:
        """As the port says. A tend of the table is cut off: what it writes would bring the table back."""
        self._dropping.add(table)
        try:
            if self._tended is not None and self._tended[0] == table:
                self._tended[1].cut_off()
                await _result(self._tended[1].ended, _nothing)
            await self._call(self._writer, lambda: self._tables.drop(table))
            self._tending.forget(table)
        finally:
            self._dropping.discard(table)

    async def tend(self, table: int) -> None:
        """As the port says. One table is tended at a time; `close` and `drop` cut it off."""
        async with self._tends:
            self._refuse_if_closed()
            if table in self._dropping:
                return
            tend = Background(lambda: self._tables.tend(table, self._tending), "vectors tending")
            with _of_the_process("tended"):
                tend.start()
            self._tended = table, tend
            try:
                with _of_the_process("tended"):
                    if not await _result(tend.ended, tend.cut_off):
                        self._refuse_if_closed()
            finally:
                self._tended = None

    async def close(self) -> None:
        self._is_closed = True
        if self._tended is not None:
            self._tended[1].cut_off()
        async with self._tends:
            pass
        ended: Future[None] = Future()

        def wait() -> None:
            self._writer.shutdown()
            self._readers.shutdown()
            ended.set_result(None)

        threading.Thread(target=wait, name="vectors closing").start()
        await _result(ended, _nothing)

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise VectorsUnavailableError("the tables of vectors are closed")

    async def _call(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        self._refuse_if_closed()
        with _of_the_process("reached"):
            waiting = pool.submit(work)
        return await _result(waiting, waiting.cancel)


@contextmanager
def _of_the_process(doing: str) -> Iterator[None]:
    """Translate a want of descriptors or threads."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise VectorsUnavailableError(f"the tables of vectors cannot be {doing}: {error}") from error


def _nothing() -> None:
    pass


async def _result(waiting: Future[T], cancel: Callable[[], object]) -> T:
    """Wait for the end of what goes on in a thread, cancelled or not."""
    future = asyncio.wrap_future(waiting)
    try:
        await asyncio.wait({future})
    except asyncio.CancelledError:
        cancel()
        with CancelScope(shield=True):  # a cancelled scope cancels again on every turn of the loop
            while not future.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait({future})
        if not future.cancelled():
            future.exception()  # nobody is left to be told
        raise
    return future.result()
