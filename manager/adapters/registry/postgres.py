"""The registry in PostgreSQL, where several gateways share it. It needs the extra `postgresql`."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from sqlalchemy import NullPool, QueuePool, create_engine, event
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from manager.adapters.postgres import (
    PostgresThread,
    connect,
    lock_key,
    name_of,
    refusal,
    translated,
)
from manager.adapters.registry.dialects import conditions_for_postgresql
from manager.adapters.registry.opening import create_schema, revision_problem, run_migrations
from manager.adapters.registry.tables import HEAD, metadata
from manager.errors import RegistryDoubtfulError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from concurrent.futures import Future

    from sqlalchemy import Connection, Engine

    from manager.adapters.registry.own_connection import Cursor

T = TypeVar("T")

conditions_for_postgresql(metadata)

# As `BEGIN IMMEDIATE` of SQLite: a transaction that writes excludes all others that do, of every gateway. It
# may read first and write what follows from that, as budgets, bindings and keys do. Locks of rows would not
# do: what a budget must not exceed is the sum of rows, some of which are not there yet. The ledger has a lock
# of its own, so that nothing else holds up a paid request.
_WRITING = lock_key("registry")
_PAYING = lock_key("ledger")
_SCHEMA = lock_key("schema")
_MIGRATION_S = 100.0
_SHOWN_TABLES = 3
# A table of the first revision, whose name hardly any other program has.
_OURS = "learned_sizes"

_TABLES = """SELECT relname FROM pg_catalog.pg_class WHERE relkind IN ('r', 'p', 'v', 'm', 'f')
    AND relnamespace = (SELECT oid FROM pg_catalog.pg_namespace WHERE nspname = current_schema())
    ORDER BY relname"""
# https://www.postgresql.org/docs/current/view-pg-locks.html: a key of 64 bits is in two columns.
_HELD = """SELECT (classid::bigint << 32) | objid::bigint FROM pg_catalog.pg_locks
    WHERE locktype = 'advisory' AND objsubid = 1 AND granted
    AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())"""


def gateway_lock(gateway: str) -> str:
    """Return the name of the lock that a gateway holds while it lives."""
    return f"gateway/{gateway}"


class PostgresDatabase:
    """Implements `Database` over PostgreSQL. A call ends within 10 s, and fails while the server is away.

    Args:
        url: of the database.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = name_of(url)
        self._thread = PostgresThread(url, "database", autocommit=False)
        self._reads = create_engine(
            "postgresql+psycopg://",
            creator=self._thread.connect,
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=0,
            # A server that was restarted meanwhile costs no call.
            pool_pre_ping=True,
            use_native_hstore=False,
        )
        self._writes = self._reads.execution_options(lock=_WRITING)
        _lock_at_begin(self._reads)

    async def open(self) -> None:
        """Create the schema, or bring it up to date. Several gateways may do so at once."""
        await self._thread.call(lambda: prepare(self.url), doing="opened")

    async def revision(self) -> str | None:
        """Return the revision of the schema; None where the database is empty. Nothing is changed."""
        return await self._thread.call(lambda: verify(self.url), doing="opened")

    async def read(self, work: Callable[[Connection], T]) -> T:
        def run() -> T:
            try:
                with self._reads.connect() as connection:
                    return work(connection)
            except DBAPIError as exc:
                raise translated(self.name, exc.orig, "read") from exc
            except (LookupError, TypeError, ValueError) as exc:
                raise refusal(self.name, f"a row in it cannot be read: {exc}") from exc

        return await self._thread.call(run, doing="read")

    async def write(self, work: Callable[[Connection], Any]) -> None:
        def run() -> None:
            try:
                with self._writes.begin() as connection:
                    work(connection)
            except IntegrityError:
                raise  # the caller's mistake
            except DBAPIError as exc:
                raise translated(self.name, exc.orig, "written") from exc

        await self._thread.call(run)

    async def check(self) -> None:
        """There is nothing to look at: a call that fails says so."""

    def ledger_connection(self) -> PostgresLedgerConnection:
        return PostgresLedgerConnection(self.url)

    async def close(self) -> None:
        await self._thread.close(self._reads.dispose)

    def abandon(self) -> Future[None]:
        return self._thread.abandon(self._reads.dispose)


class PostgresLedgerConnection:
    """Implements `LedgerConnection`. The server has every commit on its disk (`synchronous_commit`)."""

    def __init__(self, url: str) -> None:
        self._thread = PostgresThread(url, "ledger")
        self._begin = f"BEGIN; SELECT pg_advisory_xact_lock({_PAYING})".encode()

    async def call(self, work: Callable[[], T], *, doing: str = "written") -> T:
        return await self._thread.call(work, doing=doing)

    def open(self) -> _Session:
        return _Session(self._thread.open())

    @contextmanager
    def transaction(self) -> Iterator[_Session]:
        connection = self._thread.open()
        try:
            # A lock that is not given in time leaves a transaction too.
            connection.execute(self._begin)
            yield _Session(connection)
        except BaseException:
            with suppress(psycopg.Error):
                connection.rollback()
            raise
        try:
            connection.execute(b"COMMIT")
        except psycopg.Error as error:
            self._thread.drop()
            raise RegistryDoubtfulError(translated(self._thread.name, error, "written").message) from error

    def living(self, gateways: Collection[str]) -> frozenset[str]:
        held = {key for (key,) in self._thread.open().execute(_HELD.encode()).fetchall()}
        return frozenset(one for one in gateways if lock_key(gateway_lock(one)) in held)

    async def close(self) -> None:
        await self._thread.close()


class _Session:
    """Implements `Session` over a connection of psycopg."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> Cursor:
        return self._connection.execute(_marked(statement), values)


@cache
def _marked(statement: str) -> bytes:
    """Return a statement of the registry, which has no question marks but for values, as psycopg has it."""
    return statement.replace("%", "%%").replace("?", "%s").encode()


def _lock_at_begin(engine: Engine) -> None:
    @event.listens_for(engine, "begin")
    def _(connection: Connection) -> None:
        lock = connection.get_execution_options().get("lock")
        if lock is not None:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({lock})")


# --- the schema ---


def prepare(url: str) -> None:
    """Leave a registry of the newest schema in the database.

    Raises:
        RegistryCorruptError: what is there cannot be used; it is left exactly as it is.
        RegistryUnwritableError: it could not be created or brought up to date.
        psycopg.Error: it could not be reached.
    """
    name = name_of(url)
    revision = verify(url)
    if revision is None:
        try:
            with schema_transaction(url) as connection:
                if not connection.exec_driver_sql(_TABLES).first():  # else another gateway was faster
                    create_schema(connection)
        except DBAPIError as exc:
            raise translated(name, exc.orig, "created") from exc
        except SQLAlchemyError as exc:
            raise refusal(name, str(exc)) from exc
        revision = verify(url)
    if revision != HEAD:
        run_migrations(name, "-", url=url)


def verify(url: str) -> str | None:
    """Return the revision of the schema; None where the database is empty.

    Raises:
        RegistryCorruptError: it cannot be used.
        psycopg.Error: it could not be reached.
    """
    name = name_of(url)
    with connect(url) as connection:
        row = connection.execute("SELECT current_schema()").fetchone()
        if row is None or row[0] is None:
            raise refusal(name, "there is no schema to use in it; see the search_path of its user")
        tables = [str(table) for (table,) in connection.execute(_TABLES.encode()).fetchall()]
        if not tables:
            return None
        if not {"alembic_version", _OURS} <= {*tables}:
            shown = ", ".join(tables[:_SHOWN_TABLES]) + (", …" if len(tables) > _SHOWN_TABLES else "")
            raise refusal(name, f"it has tables of some other program ({shown}); name a database of its own")
        found = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    revisions = [str(revision) for (revision,) in found]
    if problem := revision_problem(revisions):
        raise refusal(name, problem)
    return revisions[0]


@contextmanager
def schema_transaction(url: str) -> Iterator[Connection]:
    """Change the schema in one transaction, while no other gateway does: all of it happens or nothing."""
    engine = create_engine(
        "postgresql+psycopg://",
        creator=lambda: connect(url, statement_s=_MIGRATION_S, autocommit=False),
        poolclass=NullPool,
        use_native_hstore=False,
        execution_options={"lock": _SCHEMA},
    )
    _lock_at_begin(engine)
    with engine.begin() as connection:
        yield connection
