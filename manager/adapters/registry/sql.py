"""The registry as the services see it."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Engine, QueuePool, create_engine, delete, event, func, select
from sqlalchemy.dialects.sqlite import Insert, insert
from sqlalchemy.exc import DBAPIError, IntegrityError

from manager.adapters.registry import benchmarks, gpu_minutes, keys, runs, tables
from manager.adapters.registry.ledger import SqlLedger
from manager.adapters.registry.opening import connect_existing, prepare, refusal, translated
from manager.adapters.registry.requests import SqlRequests
from manager.adapters.registry.same_files import SameFiles
from manager.errors import RegistryUnwritableError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from sqlalchemy import Connection, Table

    from manager.domain.benchmark_results import Benchmark
    from manager.domain.benchmarks import Sample
    from manager.domain.gpu_history import CardMinute
    from manager.domain.keys import Grant, Key
    from manager.domain.registry import Event, InstanceRow, LearnedSize, OrderKind
    from manager.domain.runs import Run, RunStatus

T = TypeVar("T")

KEPT_EVENTS = 10_000
_BUSY_TIMEOUT_S = 5.0


def _upsert(table: Table) -> Insert:
    statement = insert(table)
    changed = {column.name: statement.excluded[column.name] for column in table.c if not column.primary_key}
    return statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=changed)


_SAVE_INSTANCE = _upsert(tables.instances)
_SAVE_LEARNED_SIZE = _upsert(tables.learned_sizes)
_SAVE_OVERRIDE = _upsert(tables.overrides)
_SAVE_MODEL_LIST = _upsert(tables.model_lists)
_SAVE_ORDER = _upsert(tables.operator_state)
_BEYOND = select(tables.events.c.id).order_by(tables.events.c.id.desc()).offset(KEPT_EVENTS).limit(1)
_PRUNE_EVENTS = delete(tables.events).where(tables.events.c.id <= _BEYOND.scalar_subquery())


async def open_registry(
    path: Path, *, busy_timeout_s: float = _BUSY_TIMEOUT_S, stores: bool = True
) -> SqlRegistry:
    """Open the registry at `path`, create it where there is none, bring it up to date where it is older.

    The caller holds the state directory's lock.

    Args:
        path: of the file.
        busy_timeout_s: how long another process may have it locked.
        stores: whether what is saved is written; a dry run leaves every row as it is.

    Raises:
        RegistryCorruptError: what is there cannot be used; it is left exactly as it is.
        RegistryUnwritableError: it could not be read, created or brought up to date.
    """
    kind = SqlRegistry if stores else UnchangedRegistry
    registry = kind(path, busy_timeout_s=busy_timeout_s)
    try:
        await registry.open()
    except BaseException:
        registry.abandon()
        raise
    return registry


class SqlRegistry:
    """Implements `services.ports.Registry`. All SQL runs in one thread of its own, in the order of the calls.

    A call that was cancelled either happened completely or not at all.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float) -> None:
        self._path = path.absolute()
        self._busy_timeout_s = busy_timeout_s
        self._files = SameFiles(self._path)
        self._reads = _engine(self._path, busy_timeout_s)
        self._writes = self._reads.execution_options(begin="BEGIN IMMEDIATE")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")
        self._closed = False

    async def open(self) -> None:
        """Called once, by `open_registry`."""
        await self._call(self._open)

    async def instances(self) -> dict[str, InstanceRow]:
        def work(connection: Connection) -> dict[str, InstanceRow]:
            return {row.id: tables.to_instance(row) for row in connection.execute(select(tables.instances))}

        return await self._read(work)

    async def save_instance(self, row: InstanceRow) -> None:
        values = tables.from_instance(row)
        await self._write(lambda connection: connection.execute(_SAVE_INSTANCE, values))

    async def bindings(self) -> dict[str, str]:
        def work(connection: Connection) -> dict[str, str]:
            return {row.instance: row.uuid for row in connection.execute(select(tables.bindings))}

        return await self._read(work)

    async def add_bindings(self, bindings: dict[str, str]) -> None:
        """Store bindings for good.

        Raises:
            ValueError: an instance is bound to another card already; none of them was stored.
        """
        wanted = dict(bindings)

        def work(connection: Connection) -> None:
            known = {row.instance: row.uuid for row in connection.execute(select(tables.bindings))}
            for instance, uuid in wanted.items():
                if known.setdefault(instance, uuid) != uuid:
                    raise ValueError(f"{instance} is bound to {known[instance]}, it never moves to {uuid}")
                statement = insert(tables.bindings).values(instance=instance, uuid=uuid)
                connection.execute(statement.on_conflict_do_nothing())

        await self._write(work)

    async def append_events(self, events: Sequence[Event]) -> None:
        """Store events and drop the oldest beyond the newest `KEPT_EVENTS`.

        Raises:
            ValueError: their ids do not grow, or were used before; none of them was stored.
        """
        rows = [tables.from_event(event) for event in events]
        if not rows:
            return

        def work(connection: Connection) -> None:
            last = connection.execute(select(func.max(tables.events.c.id))).scalar() or 0
            for row in rows:
                if row["id"] <= last:
                    raise ValueError(f"event id {row['id']} does not come after {last}")
                last = row["id"]
            connection.execute(insert(tables.events), rows)
            connection.execute(_PRUNE_EVENTS)

        await self._write(work)

    async def events_after(self, event_id: int, limit: int) -> tuple[Event, ...]:
        """The oldest `limit` events after that id, in order."""
        statement = (
            select(tables.events)
            .where(tables.events.c.id > event_id)
            .order_by(tables.events.c.id)
            .limit(max(0, limit))
        )
        return await self._read(lambda connection: tuple(map(tables.to_event, connection.execute(statement))))

    async def last_event_id(self) -> int:
        """The highest id ever stored, 0 when there is none."""
        statement = select(func.max(tables.events.c.id))
        return await self._read(lambda connection: connection.execute(statement).scalar() or 0)

    async def learned_sizes(self) -> tuple[LearnedSize, ...]:
        statement = select(tables.learned_sizes)
        return await self._read(
            lambda connection: tuple(map(tables.to_learned_size, connection.execute(statement)))
        )

    async def save_learned_size(self, size: LearnedSize) -> None:
        """Store a size, in place of an older one of the same instance, model and digest."""
        values = tables.from_learned_size(size)
        await self._write(lambda connection: connection.execute(_SAVE_LEARNED_SIZE, values))

    async def overrides(self) -> dict[str, Any]:
        def work(connection: Connection) -> dict[str, Any]:
            return {row.key: row.value for row in connection.execute(select(tables.overrides))}

        return await self._read(work)

    async def save_overrides(self, overrides: Mapping[str, Any]) -> None:
        """Store these and no others; one that stays as it is keeps the time when it was saved."""
        rows = tables.from_overrides(overrides, datetime.now(UTC))

        def work(connection: Connection) -> None:
            # As text: to Python 1 and true are equal.
            found = connection.execute(select(tables.overrides))
            known = {row.key: json.dumps(row.value) for row in found}
            gone = [key for key in known if key not in overrides]
            changed = [row for row in rows if known.get(row["key"]) != json.dumps(row["value"])]
            for key in gone:
                connection.execute(delete(tables.overrides).where(tables.overrides.c.key == key))
            if changed:
                connection.execute(_SAVE_OVERRIDE, changed)

        await self._write(work)

    async def model_lists(self) -> dict[str, tuple[Mapping[str, Any], ...]]:
        statement = select(tables.model_lists)

        def work(connection: Connection) -> dict[str, tuple[Mapping[str, Any], ...]]:
            return {row.volume: tables.to_model_list(row) for row in connection.execute(statement)}

        return await self._read(work)

    async def save_model_list(self, volume: str, entries: Sequence[Mapping[str, Any]]) -> None:
        values = tables.from_model_list(volume, entries, datetime.now(UTC))
        await self._write(lambda connection: connection.execute(_SAVE_MODEL_LIST, values))

    async def orders(self, kind: OrderKind, read: Callable[[Mapping[str, Any]], T]) -> dict[str, T]:
        statement = select(tables.operator_state).where(tables.operator_state.c.kind == kind)

        def work(connection: Connection) -> dict[str, T]:
            return {row.instance: read(tables.to_order(row)) for row in connection.execute(statement)}

        return await self._read(work)

    async def save_order(self, instance: str, kind: OrderKind, value: Mapping[str, Any] | None) -> None:
        if value is None:
            table = tables.operator_state
            gone = delete(table).where(table.c.instance == instance, table.c.kind == kind)
            await self._write(lambda connection: connection.execute(gone))
        else:
            row = tables.from_order(instance, kind, value, datetime.now(UTC))
            await self._write(lambda connection: connection.execute(_SAVE_ORDER, row))

    async def save_run(self, run: Run) -> None:
        """Store a run, in place of an earlier state of it."""
        await self._write(partial(runs.save, run=run))

    async def run(self, run_id: str) -> Run | None:
        return await self._read(partial(runs.find, run_id=run_id))

    async def runs(
        self, status: RunStatus | None, limit: int | None, grant: Grant | None = None
    ) -> tuple[Run, ...]:
        """Return the newest runs first, or those of a key; None is no limit."""
        return await self._read(partial(runs.newest, status=status, limit=limit, grant=grant))

    async def due_runs(self, now: datetime, limit: int) -> tuple[Run, ...]:
        """Return runs whose result has been kept for long enough."""
        return await self._read(partial(runs.due, now=now, limit=limit))

    async def next_run_expiry(self) -> datetime | None:
        return await self._read(runs.next_expiry)

    async def forget_runs(self, ended_before: datetime, kept: int) -> tuple[Run, ...]:
        """Remove runs that ended before a time or are older than the newest `kept`; return some at a time."""
        found = await self._read(partial(runs.forgettable, ended_before=ended_before, kept=kept))
        if found:
            await self._write(partial(runs.forget, ids=[run.id for run in found]))
        return found

    async def keys(self) -> tuple[Key, ...]:
        return await self._read(keys.load)

    async def save_key(self, key: Key) -> None:
        """Store a key, in place of an earlier state of it."""
        await self._write(partial(keys.save, key=key))

    async def forget_key(self, name: str) -> None:
        await self._write(partial(keys.forget, name=name))

    async def save_last_used(self, used: Mapping[str, datetime]) -> None:
        """Store when keys were used last; one that is gone stays so."""
        await self._write(partial(keys.save_last_used, used=used))

    async def gpu_minutes(self, since_s: int) -> dict[int, tuple[CardMinute, ...]]:
        return await self._read(partial(gpu_minutes.load, since_s=since_s))

    async def save_gpu_minutes(self, minutes: Mapping[int, Sequence[CardMinute]], before_s: int) -> None:
        """Store minutes in place of earlier ones, and forget those that began before a time."""
        await self._write(partial(gpu_minutes.save, minutes=minutes, before_s=before_s))

    async def benchmarks(self) -> tuple[Benchmark, ...]:
        """Return all benchmarks, the newest first."""
        return await self._read(benchmarks.load)

    async def benchmark(self, benchmark_id: str) -> tuple[Benchmark, tuple[Sample, ...]] | None:
        return await self._read(partial(benchmarks.find, benchmark_id=benchmark_id))

    async def last_benchmark(self) -> int:
        """Return the highest number of a benchmark, 0 where there is none."""
        return await self._read(benchmarks.last_number)

    async def save_benchmark(self, benchmark: Benchmark, samples: Sequence[Sample], kept: int) -> None:
        """Store a benchmark in place of an earlier state; forget the oldest ended ones beyond `kept`."""
        await self._write(partial(benchmarks.save, benchmark=benchmark, samples=samples, kept=kept))

    async def forget_benchmark(self, benchmark_id: str) -> None:
        await self._write(partial(benchmarks.forget, benchmark_id=benchmark_id))

    async def check(self) -> None:
        """Look whether the files are still those that were opened.

        Raises:
            RegistryUnwritableError: one was deleted, moved or replaced; nothing can be written.
        """
        await self._call(self._files.refuse_others)

    def requests(self) -> SqlRequests:
        """Return the history of requests, which is closed before the registry is."""
        return SqlRequests(self._path, self._files.refuse_others, busy_timeout_s=self._busy_timeout_s)

    def ledger(self) -> SqlLedger:
        """Return the ledger of paid requests, which is closed before the registry is."""
        return SqlLedger(self._path, self._files.refuse_others, busy_timeout_s=self._busy_timeout_s)

    async def close(self) -> None:
        """End after the calls that are under way. What was committed stays; closing twice is no error."""
        if not self._closed:
            await asyncio.wrap_future(self.abandon())

    def abandon(self) -> Future[None]:
        """Close without waiting; once only."""
        self._closed = True
        last = self._thread.submit(self._reads.dispose)
        self._thread.shutdown(wait=False)
        return last

    def _open(self) -> None:
        prepare(self._path)
        try:
            with self._reads.connect() as connection:
                connection.execute(select(func.count()).select_from(tables.instances))
        except DBAPIError as exc:
            raise translated(self._path, exc.orig, "opened") from exc
        self._files.remember()

    async def _read(self, work: Callable[[Connection], T]) -> T:
        def run() -> T:
            try:
                with self._reads.connect() as connection:
                    return work(connection)
            except DBAPIError as exc:
                raise translated(self._path, exc.orig, "read") from exc
            except (LookupError, TypeError, ValueError) as exc:
                raise refusal(self._path, f"a row in it cannot be read: {exc}") from exc

        return await self._call(run)

    async def _write(self, work: Callable[[Connection], Any]) -> None:
        def run() -> None:
            self._files.refuse_others()
            try:
                with self._writes.begin() as connection:
                    work(connection)
            except IntegrityError:
                raise  # the caller's mistake, not the file's
            except DBAPIError as exc:
                raise translated(self._path, exc.orig, "written") from exc

        await self._call(run)

    async def _call(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise RegistryUnwritableError(f"the registry {self._path} is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class UnchangedRegistry(SqlRegistry):
    """Reads as the others do, and drops whatever is to be saved."""

    async def save_instance(self, row: InstanceRow) -> None: ...
    async def add_bindings(self, bindings: dict[str, str]) -> None: ...
    async def append_events(self, events: Sequence[Event]) -> None: ...
    async def save_learned_size(self, size: LearnedSize) -> None: ...
    async def save_overrides(self, overrides: Mapping[str, Any]) -> None: ...
    async def save_model_list(self, volume: str, entries: Sequence[Mapping[str, Any]]) -> None: ...
    async def save_order(self, instance: str, kind: OrderKind, value: Mapping[str, Any] | None) -> None: ...
    async def save_run(self, run: Run) -> None: ...
    async def save_key(self, key: Key) -> None: ...
    async def forget_key(self, name: str) -> None: ...
    async def save_last_used(self, used: Mapping[str, datetime]) -> None: ...
    async def save_gpu_minutes(self, minutes: Mapping[int, Sequence[CardMinute]], before_s: int) -> None: ...
    async def save_benchmark(self, benchmark: Benchmark, samples: Sequence[Sample], kept: int) -> None: ...
    async def forget_benchmark(self, benchmark_id: str) -> None: ...
    async def forget_runs(self, ended_before: datetime, kept: int) -> tuple[Run, ...]:  # noqa: ARG002
        return ()

    def requests(self) -> SqlRequests:
        return SqlRequests(
            self._path, self._files.refuse_others, busy_timeout_s=self._busy_timeout_s, stores=False
        )


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
