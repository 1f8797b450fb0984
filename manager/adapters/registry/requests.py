"""The history of requests in the registry, through a connection and a thread of its own.

Nothing here holds up the registry's other calls for longer than one small transaction takes. A write is not
flushed to the disk at once (`synchronous=NORMAL`): it survives the end of the process, and a loss of power
may take the last ones. The registry's other connection flushes all of its own writes.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import orjson

from manager.adapters.registry.own_connection import OwnConnection
from manager.adapters.registry.tables import storable
from manager.adapters.registry.usage import add_usage, forget_usage, read_model_use, read_usage
from manager.adapters.request_log import encodable
from manager.domain.history import MOST_CHARACTERS, decision_values, record_values
from manager.domain.models import model_key
from manager.domain.usage import Group, Sample, Sums, sample_of, sums_of
from manager.services.ports import StoredPage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from pathlib import Path

    from manager.domain.history import Ended, Filters
    from manager.domain.record import RequestRecord
    from manager.domain.usage import Dimension, Span

Row: TypeAlias = "tuple[str, int, str, str | None, str | None, str | None, str, str | None, bytes, bytes]"

_COLUMNS = "request_id, ended_us, project, role, model, instance, outcome, key, record, decision"
# A batch whose commit was reported as failed is written again: what is stored already stays as it is.
_ROW = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_ADD = f"INSERT OR IGNORE INTO requests ({_COLUMNS}) VALUES {_ROW}"  # noqa: S608
# A statement gives up the interpreter's lock once, so that a busy event loop holds up few of them.
_MANY = 100
_ADD_MANY = ", ".join([_ADD, *[_ROW] * (_MANY - 1)])
_GET = "SELECT record, decision FROM requests WHERE request_id = ?"
_RECORD = "SELECT request_id, record FROM requests WHERE id = ?"
_LAST_ID = "SELECT max(id) FROM requests"
_IS_STORED = "SELECT 1 FROM requests WHERE request_id = ?"
_OLD = """DELETE FROM requests WHERE id IN (
    SELECT id FROM requests WHERE ended_us < ? ORDER BY ended_us LIMIT ?)"""
# The difference of two ids bounds the number of rows between them: nothing is counted.
_BEYOND = """DELETE FROM requests WHERE id IN (
    SELECT id FROM requests WHERE id <= (SELECT max(id) FROM requests) - ? ORDER BY id LIMIT ?)"""
_OPTIONS = orjson.OPT_UTC_Z


class SqlRequests:
    """Implements `services.ports.RequestStore`. All SQL runs in one thread, in the order of the calls.

    Args:
        path: of the registry, which is open.
        refuse_if_moved: raises where the registry's files are not those any more that were opened.
        busy_timeout_s: how long another connection may have it locked.
        stores: whether anything is written.
    """

    def __init__(
        self,
        path: Path,
        refuse_if_moved: Callable[[], None],
        *,
        busy_timeout_s: float,
        stores: bool = True,
    ) -> None:
        self._own = OwnConnection(
            path, refuse_if_moved, name="requests", synchronous="NORMAL", busy_timeout_s=busy_timeout_s
        )
        self._stores = stores
        # A write has failed: whether it was stored is not known.
        self._is_doubtful = False

    async def add(self, batch: Sequence[Ended], *, keeps: bool = True) -> None:
        await self._own.call(lambda: self._insert(_rows(batch), _samples(batch), keeps=keeps))

    async def encoded(self, batch: Sequence[Ended]) -> bytes:
        # Also once the store is closed.
        return await asyncio.to_thread(lambda: _encoded(_rows(batch), _samples(batch)))

    async def add_encoded(self, rows: bytes, *, keeps: bool = True) -> None:
        await self._own.call(lambda: self._insert(*_decoded(rows), keeps=keeps))

    async def usage(
        self, wanted: Span, by: Sequence[Dimension], *, now_s: int
    ) -> tuple[dict[tuple[str, ...], Sums], Span]:
        return await self._own.call(
            lambda: read_usage(self._own.open(), wanted, by, now_s=now_s), doing="read"
        )

    async def model_use(
        self, *, since_s: int
    ) -> tuple[list[tuple[str, int]], list[tuple[int, str, int, int, int]]]:
        return await self._own.call(lambda: read_model_use(self._own.open(), since_s), doing="read")

    async def forget_usage(self, *, now_s: int, days: int) -> None:
        def work() -> None:
            self._own.refuse_if_moved()
            forget_usage(self._own.open(), now_s=now_s, days=days)

        if self._stores:
            await self._own.call(work)

    async def last(
        self, filters: Filters, limit: int, *, after: int | None = None, before: int | None = None
    ) -> StoredPage:
        found, values = search(filters, after, before)

        def work() -> StoredPage:
            connection = self._own.open()
            last = connection.execute(_LAST_ID).fetchone()[0] or 0
            ids = [row[0] for row in connection.execute(found, [*values, limit + 1])]
            ids, is_more = ids[:limit], len(ids) > limit
            cursor = last if after is None or len(ids) < limit else ids[-1]
            if after is not None:
                ids.reverse()
            rows = [connection.execute(_RECORD, (id_,)).fetchone() for id_ in ids]
            items = [(row[0], orjson.loads(row[1])) for row in rows]
            older = ids[-1] if after is None and is_more else None
            return StoredPage(items, max(cursor, after or 0), older)

        return await self._own.call(work, doing="read")

    async def get(self, request_id: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        def work() -> tuple[dict[str, Any], dict[str, Any]] | None:
            row = self._own.open().execute(_GET, (request_id,)).fetchone()
            return None if row is None else (orjson.loads(row[0]), orjson.loads(row[1]))

        return await self._own.call(work, doing="read")

    async def prune(self, before: datetime, *, most_rows: int, at_most: int) -> bool:
        def work() -> bool:
            self._own.refuse_if_moved()
            connection = self._own.open()
            old = connection.execute(_OLD, (int(before.timestamp() * 1e6), at_most)).rowcount
            beyond = connection.execute(_BEYOND, (most_rows, at_most)).rowcount
            return old >= at_most or beyond >= at_most

        return self._stores and await self._own.call(work)

    async def close(self) -> None:
        """End after the calls that are under way; closing twice is no error."""
        await self._own.close()

    def _insert(self, rows: list[Row], samples: list[Sample | None], *, keeps: bool) -> None:
        """Store requests and what they have used, both or neither."""
        if not self._stores:
            return
        with self._own.transaction() as connection:
            was_doubtful, self._is_doubtful = self._is_doubtful, True
            if was_doubtful:  # nothing is counted twice
                news = [connection.execute(_IS_STORED, row[:1]).fetchone() is None for row in rows]
                samples = [sample for sample, is_new in zip(samples, news, strict=True) if is_new]
            add_usage(connection, [sample for sample in samples if sample is not None])
            if not keeps:
                rows = []
            whole = len(rows) - len(rows) % _MANY
            for start in range(0, whole, _MANY):
                connection.execute(_ADD_MANY, tuple(chain.from_iterable(rows[start : start + _MANY])))
            connection.executemany(_ADD, rows[whole:])
        self._is_doubtful = False


def search(filters: Filters, after: int | None, before: int | None = None) -> tuple[str, list[Any]]:
    """Return the statement that finds ids, and its parameters but the limit.

    Args:
        filters: what is wanted.
        after: None: the requests that ended last, newest first; else the first ones behind this id, in order.
        before: only those that ended before the one of this id; none where that one is forgotten.
    """
    pairs = (
        ("project = ?", filters.project),
        ("role = ?", filters.role),
        ("model = ?", filters.wanted_model),
        ("instance = ?", filters.instance),
        ("outcome = ?", filters.outcome),
        ("key = ?", filters.key),
        ("ended_us >= ?", filters.since and int(filters.since.timestamp() * 1e6)),
        ("id > ?", after),
        ("(ended_us, id) < (SELECT ended_us, id FROM requests WHERE id = ?)", before),
    )
    named = [(condition, value) for condition, value in pairs if value is not None]
    conditions = " AND ".join(condition for condition, _ in named) or "true"
    order = "ended_us DESC, id DESC" if after is None else "id"
    statement = f"SELECT id FROM requests WHERE {conditions} ORDER BY {order} LIMIT ?"  # noqa: S608  (constants)
    return statement, [value for _, value in named]


def _rows(batch: Sequence[Ended]) -> list[Row]:
    # Requests with one decision that were answered at once have the same document.
    plain: dict[Any, bytes] = {}
    return [_row(ended, plain) for ended in batch]


def _row(ended: Ended, plain: dict[Any, bytes]) -> Row:
    record, attempts = ended.record, ended.attempts
    key = None
    if attempts is not None and not ended.failures and not ended.message:
        key = (id(attempts.decision), tuple(attempts.made), record.outcome)
    decision = None if key is None else plain.get(key)
    if decision is None:
        decision = _json(decision_values(ended))
        if key is not None:
            plain[key] = decision
    return (
        record.request_id,
        int(record.ts.timestamp() * 1e6 + record.duration_ms * 1000),
        storable(record.project_id),
        record.role,
        None if record.model is None else storable(model_key(record.model)),
        record.effective_target,
        record.outcome,
        record.key,
        _record(record),
        decision,
    )


def _record(record: RequestRecord) -> bytes:
    """Return the fields of a record that were set. Most records are short, and need no look at each text."""
    if not record.failed_attempts:
        with suppress(TypeError):
            data = orjson.dumps(record.__dict__, option=_OPTIONS)
            if len(data) <= MOST_CHARACTERS:  # so no text in it is longer
                return data
    return _json(record_values(record))


def _json(values: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(values, option=_OPTIONS)
    except TypeError:
        return orjson.dumps(_plain(values), option=_OPTIONS)


def _plain(value: Any) -> Any:
    """Return a value with nothing that JSON has no form for, such as a lone surrogate."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return encodable(value)


def _samples(batch: Sequence[Ended]) -> list[Sample | None]:
    """Return what each request has used, in texts that can be stored."""
    samples: list[Sample | None] = []
    for ended in batch:
        sample = sample_of(ended.record)
        samples.append(None if sample is None else sample._replace(group=Group(*map(storable, sample.group))))
    return samples


def _encoded(rows: list[Row], samples: list[Sample | None]) -> bytes:
    documents = [(*row[:-2], row[-2].decode(), row[-1].decode()) for row in rows]
    return orjson.dumps([documents, [None if one is None else _sample_values(one) for one in samples]])


def _decoded(encoded: bytes) -> tuple[list[Row], list[Sample | None]]:
    documents, samples = orjson.loads(encoded)
    rows = [(*row[:-2], row[-2].encode(), row[-1].encode()) for row in documents]
    return rows, [None if one is None else _sample(*one) for one in samples]


def _sample_values(sample: Sample) -> tuple[int, list[str], list[int], str]:
    *counts, latencies = (getattr(sample.sums, name) for name in Sums.__slots__)
    return sample.ended_s, list(sample.group), counts, f"{latencies:x}"


def _sample(ended_s: int, group: list[str], counts: list[int], latencies: str) -> Sample:
    return Sample(ended_s, Group(*group), sums_of(counts, int(latencies, 16)))
