"""The registry as the services see it."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import delete, func, insert, select

from manager.adapters.registry import (
    benchmarks,
    changes,
    documents,
    gpu_minutes,
    instances,
    keys,
    orders,
    runs,
    tables,
)
from manager.adapters.registry.database import SqliteDatabase
from manager.adapters.registry.dialects import insert_new, upsert
from manager.adapters.registry.ledger import SqlLedger
from manager.adapters.registry.requests import SqlRequests
from manager.domain.registry import PINS_AND_TTLS
from manager.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from sqlalchemy import Connection

    from manager.adapters.registry.database import Database
    from manager.domain.benchmark_results import Benchmark
    from manager.domain.benchmarks import Sample
    from manager.domain.gpu_history import CardMinute
    from manager.domain.keys import Grant, Key
    from manager.domain.registry import Event, InstanceRow, LearnedSize, OrderKind, PinAndTtl
    from manager.domain.runs import Run, RunStatus

T = TypeVar("T")

KEPT_EVENTS = 10_000
_GATEWAY = "gateway"
_BUSY_TIMEOUT_S = 5.0

_BEYOND = select(tables.events.c.id).order_by(tables.events.c.id.desc()).offset(KEPT_EVENTS).limit(1)
_PRUNE_EVENTS = delete(tables.events).where(tables.events.c.id <= _BEYOND.scalar_subquery())


async def open_registry(
    path: Path,
    *,
    busy_timeout_s: float = _BUSY_TIMEOUT_S,
    stores: bool = True,
    shared: Database | None = None,
) -> SqlRegistry:
    """Open the registry at `path`, create it where there is none, bring it up to date where it is older.

    The caller holds the state directory's lock.

    Args:
        path: of the file.
        busy_timeout_s: how long another process may have it locked.
        stores: whether what is saved is written; a dry run leaves every row as it is.
        shared: has what several gateways share, not opened yet; None: all of it is in the file.

    Raises:
        RegistryCorruptError: what is there cannot be used; it is left exactly as it is.
        RegistryUnwritableError: it could not be read, created or brought up to date.
    """
    own = SqliteDatabase(path, busy_timeout_s=busy_timeout_s)
    registry = (SqlRegistry if stores else UnchangedRegistry)(own, own if shared is None else shared)
    try:
        await registry.open()
    except BaseException:
        registry.abandon()
        raise
    return registry


class SqlRegistry:
    """Implements `services.ports.Registry`. A call that was cancelled happened completely or not at all.

    Args:
        own: has what belongs to one gateway: events, runs, benchmarks, requests, readings of its cards.
        shared: has the rest. Where nothing is shared it is the same as `own`.

    Attributes:
        gateway: the random name that this one keeps among those that share a database; None where nothing is
            shared.
    """

    def __init__(self, own: SqliteDatabase, shared: Database) -> None:
        self._own = own
        self._shared = shared
        self._databases = tuple(dict.fromkeys((own, shared)))
        self.gateway: str | None = None
        self._ports: dict[str, int | None] = {}

    async def open(self) -> None:
        """Called once, by `open_registry`."""
        await self._own.open()
        if self._shared is not self._own:
            await self._shared.open()
            self.gateway = await self._own_name()

    async def instances(self) -> dict[str, InstanceRow]:
        """Return the rows by id.

        Of what several gateways share a row has the pin, the TTL and the port; the rest is of this gateway.
        """
        own = await self._own.read(instances.load)
        if self._shared is self._own:
            return own
        return instances.merged(own, await self._shared.read(instances.load))

    async def save_instance(self, row: InstanceRow) -> None:
        """Store a row in place of an earlier one, but for its pin and TTL where gateways share these."""
        await self._own.write(partial(instances.save, row=row))
        if self._shared is not self._own and self._ports.get(row.id) != row.loopback_port:
            await self._shared.write(partial(instances.save_new_port, row=row))
            self._ports[row.id] = row.loopback_port

    async def pins_and_ttls(self) -> dict[str, PinAndTtl]:
        return await self._shared.read(instances.pins_and_ttls)

    async def save_pin_and_ttl(self, instance: str, values: PinAndTtl) -> None:
        await self._change(
            PINS_AND_TTLS, partial(instances.save_pin_and_ttl, instance=instance, values=values)
        )

    async def bindings(self) -> dict[str, str]:
        def work(connection: Connection) -> dict[str, str]:
            return {row.instance: row.uuid for row in connection.execute(select(tables.bindings))}

        return await self._shared.read(work)

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
                connection.execute(
                    insert_new(connection, tables.bindings), {"instance": instance, "uuid": uuid}
                )

        await self._shared.write(work)

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

        await self._own.write(work)

    async def events_after(self, event_id: int, limit: int) -> tuple[Event, ...]:
        """The oldest `limit` events after that id, in order."""
        statement = (
            select(tables.events)
            .where(tables.events.c.id > event_id)
            .order_by(tables.events.c.id)
            .limit(max(0, limit))
        )
        return await self._own.read(
            lambda connection: tuple(map(tables.to_event, connection.execute(statement)))
        )

    async def last_event_id(self) -> int:
        """The highest id ever stored, 0 when there is none."""
        statement = select(func.max(tables.events.c.id))
        return await self._own.read(lambda connection: connection.execute(statement).scalar() or 0)

    async def learned_sizes(self) -> tuple[LearnedSize, ...]:
        statement = select(tables.learned_sizes)
        return await self._shared.read(
            lambda connection: tuple(map(tables.to_learned_size, connection.execute(statement)))
        )

    async def save_learned_size(self, size: LearnedSize) -> None:
        """Store a size, in place of an older one of the same instance, model and digest."""
        values = tables.from_learned_size(size)
        await self._shared.write(
            lambda connection: connection.execute(upsert(connection, tables.learned_sizes), values)
        )

    async def overrides(self) -> dict[str, Any]:
        def work(connection: Connection) -> dict[str, Any]:
            return {row.key: row.value for row in connection.execute(select(tables.overrides))}

        return await self._shared.read(work)

    async def save_overrides(
        self, overrides: Mapping[str, Any], was: Mapping[str, Any] | None = None
    ) -> None:
        """Store these and no others; one that stays as it is keeps the time when it was saved.

        Args:
            overrides: by key.
            was: those that are stored; None: whatever is.

        Raises:
            ConflictError: others are stored than `was`; nothing was changed.
        """
        rows = tables.from_overrides(overrides, datetime.now(UTC))

        def work(connection: Connection) -> None:
            found = connection.execute(select(tables.overrides))
            known = {row.key: tables.value_text(row.value) for row in found}
            if was is not None and known != {key: tables.value_text(value) for key, value in was.items()}:
                raise ConflictError("another gateway has changed settings just now; try again")
            gone = [key for key in known if key not in overrides]
            changed = [row for row in rows if known.get(row["key"]) != tables.value_text(row["value"])]
            for key in gone:
                connection.execute(delete(tables.overrides).where(tables.overrides.c.key == key))
            if changed:
                connection.execute(upsert(connection, tables.overrides), changed)

        await self._change("overrides", work)

    async def model_lists(self) -> dict[str, tuple[Mapping[str, Any], ...]]:
        statement = select(tables.model_lists)

        def work(connection: Connection) -> dict[str, tuple[Mapping[str, Any], ...]]:
            return {row.volume: tables.to_model_list(row) for row in connection.execute(statement)}

        return await self._shared.read(work)

    async def save_model_list(self, volume: str, entries: Sequence[Mapping[str, Any]]) -> None:
        values = tables.from_model_list(volume, entries, datetime.now(UTC))
        await self._shared.write(
            lambda connection: connection.execute(upsert(connection, tables.model_lists), values)
        )

    async def orders(self, kind: OrderKind, read: Callable[[Mapping[str, Any]], T]) -> dict[str, T]:
        return await self._shared.read(partial(orders.load, kind=kind, read=read))

    async def save_order(self, instance: str, kind: OrderKind, value: Mapping[str, Any] | None) -> None:
        await self._change(kind.value, partial(orders.save, instance=instance, kind=kind, value=value))

    async def end_order(self, instance: str, kind: OrderKind, until: datetime) -> None:
        await self._change(kind.value, partial(orders.end, instance=instance, kind=kind, until=until))

    async def save_run(self, run: Run) -> None:
        """Store a run, in place of an earlier state of it."""
        await self._own.write(partial(runs.save, run=run))

    async def run(self, run_id: str) -> Run | None:
        return await self._own.read(partial(runs.find, run_id=run_id))

    async def runs(
        self, status: RunStatus | None, limit: int | None, grant: Grant | None = None
    ) -> tuple[Run, ...]:
        """Return the newest runs first, or those of a key; None is no limit."""
        return await self._own.read(partial(runs.newest, status=status, limit=limit, grant=grant))

    async def due_runs(self, now: datetime, limit: int) -> tuple[Run, ...]:
        """Return runs whose result has been kept for long enough."""
        return await self._own.read(partial(runs.due, now=now, limit=limit))

    async def next_run_expiry(self) -> datetime | None:
        return await self._own.read(runs.next_expiry)

    async def forget_runs(self, ended_before: datetime, kept: int) -> tuple[Run, ...]:
        """Remove runs that ended before a time or are older than the newest `kept`; return some at a time."""
        found = await self._own.read(partial(runs.forgettable, ended_before=ended_before, kept=kept))
        if found:
            await self._own.write(partial(runs.forget, ids=[run.id for run in found]))
        return found

    async def keys(self) -> tuple[Key, ...]:
        return await self._shared.read(keys.load)

    async def save_key(self, key: Key) -> None:
        """Store a key, in place of an earlier state of it."""
        await self._change("keys", partial(keys.save, key=key))

    async def replace_key(self, before: Key | None, key: Key) -> None:
        """Store a key in place of `before`, unless another gateway has changed it; None: there was none.

        Raises:
            ConflictError: the stored key is another one by now; nothing was stored.
        """
        name = key.grant.name

        def work(connection: Connection) -> None:
            if not keys.is_unchanged(connection, name, before):
                raise ConflictError(f"another gateway has changed the key {name!r} just now; try again")
            keys.save(connection, key)

        await self._change("keys", work)

    async def forget_key(self, name: str) -> None:
        await self._change("keys", partial(keys.forget, name=name))

    async def save_last_used(self, used: Mapping[str, datetime]) -> None:
        """Store when keys were used last; one that is gone stays so."""
        await self._shared.write(partial(keys.save_last_used, used=used))

    async def gpu_minutes(self, since_s: int) -> dict[int, tuple[CardMinute, ...]]:
        return await self._own.read(partial(gpu_minutes.load, since_s=since_s))

    async def save_gpu_minutes(self, minutes: Mapping[int, Sequence[CardMinute]], before_s: int) -> None:
        """Store minutes in place of earlier ones, and forget those that began before a time."""
        await self._own.write(partial(gpu_minutes.save, minutes=minutes, before_s=before_s))

    async def benchmarks(self) -> tuple[Benchmark, ...]:
        """Return all benchmarks, the newest first."""
        return await self._own.read(benchmarks.load)

    async def benchmark(self, benchmark_id: str) -> tuple[Benchmark, tuple[Sample, ...]] | None:
        return await self._own.read(partial(benchmarks.find, benchmark_id=benchmark_id))

    async def last_benchmark(self) -> int:
        """Return the highest number of a benchmark, 0 where there is none."""
        return await self._own.read(benchmarks.last_number)

    async def save_benchmark(self, benchmark: Benchmark, samples: Sequence[Sample], kept: int) -> None:
        """Store a benchmark in place of an earlier state; forget the oldest ended ones beyond `kept`."""
        await self._own.write(partial(benchmarks.save, benchmark=benchmark, samples=samples, kept=kept))

    async def forget_benchmark(self, benchmark_id: str) -> None:
        await self._own.write(partial(benchmarks.forget, benchmark_id=benchmark_id))

    async def check(self) -> None:
        """Look whether the files are still those that were opened.

        Raises:
            RegistryUnwritableError: one was deleted, moved or replaced; nothing can be written.
        """
        await self._own.check()

    def requests(self) -> SqlRequests:
        """Return the history of requests, which is closed before the registry is."""
        own = self._own
        return SqlRequests(own.path, own.files.refuse_others, busy_timeout_s=own.busy_timeout_s)

    def ledger(self) -> SqlLedger:
        """Return the ledger of paid requests, which is closed before the registry is."""
        return SqlLedger(self._shared.ledger_connection(), self.gateway)

    async def close(self) -> None:
        """End after the calls that are under way. What was committed stays; closing twice is no error."""
        for database in self._databases:
            await database.close()

    async def _own_name(self) -> str:
        made = token_hex(8)
        await self._own.write(partial(documents.save_new, name=_GATEWAY, value=made))
        return str(await self._own.read(partial(documents.load, name=_GATEWAY)))

    async def _change(self, topic: str, work: Callable[[Connection], Any]) -> None:
        """Write what gateways share, and have the others read it again."""
        if self._shared is self._own:
            await self._shared.write(work)
            return

        def counted(connection: Connection) -> None:
            work(connection)
            changes.count(connection, topic)

        await self._shared.write(counted)

    def abandon(self) -> None:
        """Close without waiting; a second time is no error."""
        for database in self._databases:
            database.abandon()


class UnchangedRegistry(SqlRegistry):
    """Reads as the others do, and drops whatever is to be saved."""

    async def save_instance(self, row: InstanceRow) -> None: ...
    async def save_pin_and_ttl(self, instance: str, values: PinAndTtl) -> None: ...
    async def add_bindings(self, bindings: dict[str, str]) -> None: ...
    async def append_events(self, events: Sequence[Event]) -> None: ...
    async def save_learned_size(self, size: LearnedSize) -> None: ...
    async def save_overrides(
        self, overrides: Mapping[str, Any], was: Mapping[str, Any] | None = None
    ) -> None: ...
    async def save_model_list(self, volume: str, entries: Sequence[Mapping[str, Any]]) -> None: ...
    async def save_order(self, instance: str, kind: OrderKind, value: Mapping[str, Any] | None) -> None: ...
    async def end_order(self, instance: str, kind: OrderKind, until: datetime) -> None: ...
    async def save_run(self, run: Run) -> None: ...
    async def save_key(self, key: Key) -> None: ...
    async def replace_key(self, before: Key | None, key: Key) -> None: ...
    async def forget_key(self, name: str) -> None: ...
    async def save_last_used(self, used: Mapping[str, datetime]) -> None: ...
    async def save_gpu_minutes(self, minutes: Mapping[int, Sequence[CardMinute]], before_s: int) -> None: ...
    async def save_benchmark(self, benchmark: Benchmark, samples: Sequence[Sample], kept: int) -> None: ...
    async def forget_benchmark(self, benchmark_id: str) -> None: ...
    async def forget_runs(self, ended_before: datetime, kept: int) -> tuple[Run, ...]:  # noqa: ARG002
        return ()

    def requests(self) -> SqlRequests:
        own = self._own
        return SqlRequests(own.path, own.files.refuse_others, busy_timeout_s=own.busy_timeout_s, stores=False)
