"""What keeps a table fast and small: small files are merged, the index is built and follows the rows.

LanceDB's `optimize` does three things in this order. It merges files whose rows are not in the index, and
writes those anew of which a tenth is removed. It removes the files of old states. It puts the rows that are
not in the index into it, as a further segment. Segments and their files are merged by a new index alone,
which costs time in proportion to the rows: it is built only once the table has grown by a share.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from manager.adapters.vectors import files
from manager.adapters.vectors.faults import is_conflict
from manager.adapters.vectors.libraries import give_back_memory

if TYPE_CHECKING:
    import threading
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from lancedb.table import AsyncTable

# Fewer rows are searched in about 10 ms without an index.
INDEX_FROM_ROWS = 10_000
ROWS_A_PARTITION = 8192
# Of each value of a vector, in the index.
_INDEX_BITS = 3
# So many files that are not in the index cost a search about 15 ms.
MOST_NEW_FILES = 32
# A search reads the rows that are not in the index: about 1 ms for 1,000.
_MOST_NEW_SHARE = 0.05
_FEW_NEW_ROWS = 1000
MOST_SEGMENTS = 16
_GROWTH = 1.3
# However slowly the table grows, the index is built anew.
_MOST_SEGMENTS_EVER = 128
MOST_STATES = 64
_NAME = "rows_"

_KEPT = timedelta(seconds=1)
_ALL_KEPT = timedelta(days=36_500)
_LONGEST_CALL_S = 60.0
_TURN_S = 0.02


class Others(Protocol):
    """The calls that go on meanwhile."""

    writing: threading.Lock

    def calls_on(self, table: int) -> frozenset[object]: ...


class _Index(NamedTuple):
    """The index of a table. `rows` is how many it had when it was built; its name says it."""

    name: str
    rows: int
    segments: int
    new_rows: int


class Tending:
    """Tends tables, one at a time. What it remembers of them only saves work."""

    def __init__(self) -> None:
        # The files of a table after it was last tended.
        self._files: dict[int, int] = {}

    async def tend(self, table: int, path: Path, handle: AsyncTable, others: Others) -> None:
        """Do what is due; the event loop is of this call alone."""
        index = await _index(handle)
        rows, count = await _extent(handle)
        if not self._is_due(table, path, index, rows, count):
            return
        merge = partial(handle.optimize, cleanup_older_than=_ALL_KEPT)
        await _changed(path, merge, others)
        index = await _index(handle)
        if _is_index_due(index, rows):
            await _changed(path, partial(_build, handle, rows), others)
            await _changed(path, merge, others)
        # Whatever replaces the old files is on the disk now. Files that no state knows are of changes that
        # have failed, as nobody writes.
        if await _ended(table, others):
            prune = partial(handle.optimize, cleanup_older_than=_KEPT, delete_unverified=True)
            async with _alone(others):
                await _changed(path, prune, None)
        _, self._files[table] = await _extent(handle)
        give_back_memory()

    def forget(self, table: int) -> None:
        self._files.pop(table, None)

    def _is_due(self, table: int, path: Path, index: _Index | None, rows: int, count: int) -> bool:
        before = self._files.get(table, index.segments if index else 1)
        if count - before >= MOST_NEW_FILES or files.states(path) > MOST_STATES:
            return True
        if index is None:
            return rows >= INDEX_FROM_ROWS
        return index.new_rows > max(_FEW_NEW_ROWS, rows * _MOST_NEW_SHARE)


def _is_index_due(index: _Index | None, rows: int) -> bool:
    if index is None:
        return rows >= INDEX_FROM_ROWS
    has_grown = rows >= index.rows * _GROWTH
    return index.segments >= (MOST_SEGMENTS if has_grown else _MOST_SEGMENTS_EVER)


async def _build(handle: AsyncTable, rows: int) -> None:
    """Build an index, and drop those before it: a search uses one of them until then."""
    from lancedb.index import IvfFlat, IvfRq  # noqa: PLC0415

    vector = (await handle.schema()).field("vector").type
    partitions = max(1, rows // ROWS_A_PARTITION)
    config: Any = (
        IvfRq(distance_type="l2", num_partitions=partitions, num_bits=_INDEX_BITS)
        if vector.list_size % 8 == 0  # no other vectors can be rotated
        else IvfFlat(distance_type="l2", num_partitions=partitions)
    )
    name = f"{_NAME}{rows}"
    await handle.create_index("vector", config=config, name=name, replace=True)
    for other in await handle.list_indices():
        if other.name != name:
            await handle.drop_index(other.name)


async def _index(handle: AsyncTable) -> _Index | None:
    found = [
        _Index(
            entry.name,
            int(entry.name.removeprefix(_NAME)),
            entry.num_segments or 1,
            entry.num_unindexed_rows or 0,
        )
        for entry in await handle.list_indices()
    ]
    return max(found, key=lambda index: index.rows, default=None)


async def _extent(handle: AsyncTable) -> tuple[int, int]:
    """Return the numbers of rows and of files."""
    stats: Any = await handle.stats()
    return stats["num_rows"], stats["fragment_stats"]["num_fragments"]


async def _changed(path: Path, change: Callable[[], Awaitable[object]], others: Others | None) -> None:
    """Make a change, and flush it to the disk.

    A change that another one has overtaken is made again while nobody writes; `others` is None where that
    is so already.
    """
    unsynced = files.Unsynced(path)
    try:
        await change()
    except (RuntimeError, ValueError, OSError) as error:
        if others is None or not is_conflict(error):
            raise
        async with _alone(others):
            await change()
    unsynced.sync()


@asynccontextmanager
async def _alone(others: Others) -> AsyncIterator[None]:
    """Keep the writer waiting. Only this event loop waits for it."""
    while not others.writing.acquire(blocking=False):  # noqa: ASYNC110  (of threads)
        await asyncio.sleep(_TURN_S)
    try:
        yield
    finally:
        others.writing.release()


async def _ended(table: int, others: Others) -> bool:
    """Wait for the calls that may read the state from before; later ones read the newest.

    Returns:
        Whether they have ended in time.
    """
    before = others.calls_on(table)
    deadline = time.monotonic() + _LONGEST_CALL_S
    while before & others.calls_on(table):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_TURN_S)
    return True
