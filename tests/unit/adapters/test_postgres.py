"""The registry in PostgreSQL: its schema, what an outage costs, and gateways that use it at once."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from manager.adapters import postgres as module
from manager.adapters.postgres import AdvisoryLocks, name_of
from manager.adapters.registry import SqlRegistry, ledger, open_registry, tables
from manager.adapters.registry import postgres as registry_in_postgres
from manager.adapters.registry.migrate import upgrade
from manager.adapters.registry.postgres import (
    PostgresDatabase,
    PostgresLedgerConnection,
    gateway_lock,
    prepare,
    schema_transaction,
    verify,
)
from manager.domain.budgets import Balance, Budget, Closing, Overdrawn, Period, Reservation
from manager.errors import (
    ConflictError,
    RegistryCorruptError,
    RegistryDoubtfulError,
    RegistryUnwritableError,
    UnavailableError,
)
from tests.support.daemon import ROOT
from tests.support.inside import until
from tests.support.keys import grant
from tests.support.ledger import Books

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.postgres import Postgres

GLOBAL = Budget("global", Period.MONTH, hard_micro_usd=1_000_000)
DAY = "2026-11-28"


@asynccontextmanager
async def opened(home: Path, url: str) -> AsyncIterator[SqlRegistry]:
    registry = await open_registry(home / "registry.sqlite3", shared=PostgresDatabase(url))
    try:
        yield registry
    finally:
        await registry.close()


def reservation(number: int, amount: int = 10, *, project: str = "shop") -> Reservation:
    return Reservation(
        id=f"r{number}",
        amount=amount,
        day=DAY,
        at_us=number,
        request_id=f"q{number}",
        project=project,
        key=None,
        role=None,
        instance="openai",
        model="gpt",
    )


def lost(reservation: str, amount: int) -> Closing:
    return Closing(reservation, "recovered", amount)


# --- the schema ---


def test_the_migrations_lead_to_the_schema_of_a_new_database(postgres: Postgres) -> None:
    migrated, made = postgres.database(), postgres.database()
    with schema_transaction(migrated) as connection:
        upgrade(connection)
    prepare(made)
    columns = """SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns
        WHERE table_schema = 'public' ORDER BY 1, 2"""
    indexes = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1"
    for query in (columns, indexes, "SELECT version_num FROM alembic_version"):
        assert postgres.sql(migrated, query) == postgres.sql(made, query)
    with schema_transaction(migrated) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
    assert verify(migrated) == tables.HEAD
    assert ("ledger", "amount", "bigint", "NO") in postgres.sql(made, columns)


async def test_an_older_schema_is_brought_up_to_date_and_keeps_what_it_has(
    postgres: Postgres, tmp_path: Path
) -> None:
    url = postgres.database()
    with schema_transaction(url) as connection:
        upgrade(connection, "0002")
    postgres.sql(url, "INSERT INTO model_lists VALUES ('v', '[\"tiny\"]', '2026-01-01'), ('w', '[]', 'now')")
    async with opened(tmp_path, url) as registry:
        assert await registry.model_lists() == {"v": ({"name": "tiny"},), "w": ()}
    assert verify(url) == tables.HEAD


async def test_gateways_that_start_at_once_make_the_schema_once(postgres: Postgres) -> None:
    url = postgres.database()
    await asyncio.gather(*(asyncio.to_thread(prepare, url) for _ in range(6)))
    assert postgres.sql(url, "SELECT version_num FROM alembic_version") == [(tables.HEAD,)]
    older = postgres.database()
    with schema_transaction(older) as connection:
        upgrade(connection, "0011")
    await asyncio.gather(*(asyncio.to_thread(prepare, older) for _ in range(2)))
    assert postgres.sql(older, "SELECT version_num FROM alembic_version") == [(tables.HEAD,)]


@pytest.mark.parametrize(
    ("statements", "says"),
    [
        (("CREATE TABLE visits (at int)",), "tables of some other program (visits)"),
        (
            (
                "CREATE TABLE alembic_version (version_num text)",
                "INSERT INTO alembic_version VALUES ('0001')",
            ),
            "tables of some other program (alembic_version)",
        ),
    ],
)
async def test_a_database_of_another_program_is_refused_and_left(
    postgres: Postgres, tmp_path: Path, statements: tuple[str, ...], says: str
) -> None:
    url = postgres.database()
    for statement in statements:
        postgres.sql(url, statement)
    listed = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    before = postgres.sql(url, listed)
    with pytest.raises(RegistryCorruptError) as refused:
        async with opened(tmp_path, url):
            pass
    assert says in refused.value.message
    assert "left as it is" in refused.value.message
    assert postgres.sql(url, listed) == before


@pytest.mark.parametrize("revision", ["0999", None])
async def test_a_schema_of_a_newer_version_is_refused(
    postgres: Postgres, tmp_path: Path, revision: str | None
) -> None:
    url = postgres.database()
    prepare(url)
    change = (
        "DELETE FROM alembic_version"
        if revision is None
        else "UPDATE alembic_version SET version_num = '0999'"
    )
    postgres.sql(url, change)
    with pytest.raises(RegistryCorruptError, match="revision"):
        async with opened(tmp_path, url):
            pass


# --- what is stored ---


async def test_texts_that_postgresql_has_no_form_for_are_escaped(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.database()
    async with opened(tmp_path, url) as registry:
        await registry.save_model_list("v\0w", ({"name": "a\0b"},))
        assert await registry.model_lists() == {"v\\x00w": ({"name": "a\0b"},)}
        store = registry.ledger()
        reserved = await store.reserve(reservation(1, project="p\0\ud800"), {GLOBAL: DAY})
        await store.close()
    assert reserved == {GLOBAL: Balance(0, 10)}
    assert postgres.sql(url, "SELECT project FROM ledger") == [("p\\x00\\ud800",)]


async def test_a_key_that_another_gateway_has_changed_is_not_overwritten(
    postgres: Postgres, tmp_path: Path
) -> None:
    from manager.domain.keys import Key  # noqa: PLC0415

    url = postgres.database()
    async with opened(tmp_path / "a", url) as one, opened(tmp_path / "b", url) as other:
        assert one.gateway != other.gateway
        key = Key(grant("bot"), ())
        await one.replace_key(None, key)
        with pytest.raises(ConflictError, match="'bot'"):
            await other.replace_key(None, key)
        now = grant("bot").created_at
        await one.save_last_used({"bot": now})
        revoked = key.revoked(now)
        await other.replace_key(key, revoked)  # its last use is no change
        with pytest.raises(ConflictError):
            await one.replace_key(key, key)
        assert [one.revoked_at for one in await one.keys()] == [now]
        await one.save_overrides({"a": 1}, was={})
        with pytest.raises(ConflictError, match="settings"):
            await other.save_overrides({"b": 1}, was={})
        assert await other.overrides() == {"a": 1}


async def test_a_gateway_keeps_its_name(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.database()
    names = set()
    for _ in range(2):
        async with opened(tmp_path, url) as registry:
            names.add(registry.gateway)
    assert len(names) == 1


# --- outages ---


async def test_a_server_that_is_away_fails_calls_at_once_and_is_used_again_once_it_is_back(
    postgres: Postgres, tmp_path: Path
) -> None:
    url = postgres.database()
    async with opened(tmp_path, url) as registry:
        store = registry.ledger()
        await registry.save_overrides({"a": 1})
        await store.reserve(reservation(1), {GLOBAL: DAY})
        postgres.kill()
        try:
            began = time.monotonic()
            calls = (registry.overrides(), registry.save_overrides({}), store.reserve(reservation(2), {}))
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, RegistryUnwritableError), outcome
                assert "no connection" in outcome.message or "ended the call" in outcome.message, (
                    outcome.message
                )
            assert time.monotonic() - began < 3
            with pytest.raises(RegistryUnwritableError, match="there is no connection"):
                await registry.overrides()
        finally:
            postgres.start()
        await asyncio.sleep(module._PAUSE_S)
        assert await registry.overrides() == {"a": 1}
        assert await store.balances({GLOBAL: DAY}) == {GLOBAL: Balance(0, 10)}
        # A restart between two calls costs none of them.
        postgres.kill()
        postgres.start()
        await store.reserve(reservation(3), {GLOBAL: DAY})
        await registry.save_overrides({"a": 2})
        assert await registry.overrides() == {"a": 2}
        await store.close()


async def test_a_server_that_says_nothing_is_given_up_and_the_loop_turns_meanwhile(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CALL_S", 1.0)
    url = postgres.database()
    async with opened(tmp_path, url) as registry:
        own = PostgresLedgerConnection(url)

        def half() -> None:
            with own.transaction() as session:
                session.execute("INSERT INTO documents VALUES (?, ?)", ("half", "1"))
                postgres.freeze()

        await registry.overrides()
        gaps, last = [0.0], time.monotonic()
        reading = None
        try:
            committing = asyncio.ensure_future(own.call(half))
            while not committing.done() or reading is None or not reading.done():
                await asyncio.sleep(0.01)
                gaps.append(time.monotonic() - last)
                last = time.monotonic()
                if committing.done() and reading is None:
                    reading = asyncio.ensure_future(registry.overrides())
        finally:
            postgres.thaw()
        with pytest.raises(RegistryDoubtfulError):
            committing.result()
        with pytest.raises(RegistryUnwritableError):
            reading.result()
        assert max(gaps) < 0.5
        await asyncio.sleep(module._PAUSE_S)
        assert await registry.overrides() == {}
        await own.close()


async def test_money_whose_commit_was_in_doubt_is_released_once_the_server_is_back(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CALL_S", 1.0)
    url = postgres.database()
    async with opened(tmp_path, url) as registry:
        books = Books(registry, tmp_path / "registry.sqlite3", url)
        execute = registry_in_postgres._Session.execute

        def freezing(self: Any, statement: str, *values: Any) -> Any:
            result = execute(self, statement, *values)
            if statement.startswith("INSERT INTO ledger_days"):
                # The statements before the commit have been executed; the commit reaches the server.
                monkeypatch.setattr(registry_in_postgres._Session, "execute", execute)
                postgres.freeze()
            return result

        monkeypatch.setattr(registry_in_postgres._Session, "execute", freezing)
        monkeypatch.setattr(ledger, "_balances", lambda *_: {})
        try:
            with pytest.raises(UnavailableError, match="no paid request is sent"):
                await books.reserve(400_000)
        finally:
            postgres.thaw()
        monkeypatch.undo()
        assert books.ledger.unwritten == 1
        await asyncio.sleep(module._PAUSE_S)
        assert await books.ledger.flush()
        assert await books.global_balance() == Balance(0, 0)
        await books.store.close()


async def test_a_gateway_that_holds_the_ledger_holds_up_the_others_for_seconds_only(
    postgres: Postgres, tmp_path: Path
) -> None:
    url = postgres.database()
    async with opened(tmp_path, url) as registry:
        store, own = registry.ledger(), PostgresLedgerConnection(url)
        with psycopg.connect(url) as other:
            other.execute(own._begin.decode().partition(";")[2].encode())
            began = time.monotonic()
            with pytest.raises(RegistryUnwritableError, match=r"another gateway has it locked|took too long"):
                await store.reserve(reservation(1), {GLOBAL: DAY})
            assert time.monotonic() - began < 7
        await store.reserve(reservation(1), {GLOBAL: DAY})
        await store.close()
        await own.close()


async def test_no_error_shows_a_password(tmp_path: Path) -> None:
    url = "postgresql://om:s3cr3t@127.0.0.1:1/om?sslpassword=s3cr3t"
    with pytest.raises(RegistryUnwritableError) as refused:
        async with opened(tmp_path, url):
            pass
    assert "s3cr3t" not in refused.value.message
    assert (
        "postgresql://om:…@127.0.0.1:1/om could not be opened: there is no connection"
        in refused.value.message
    )
    assert name_of(url) == "postgresql://om:…@127.0.0.1:1/om"


# --- the ledger of several gateways ---

_RACE = """
import asyncio, sys
from pathlib import Path
from manager.adapters.registry import open_registry
from manager.adapters.registry.postgres import PostgresDatabase
from tests.unit.adapters.test_postgres import DAY, GLOBAL, reservation
from manager.domain.budgets import Overdrawn

async def main(home, url, first):
    registry = await open_registry(Path(home), shared=PostgresDatabase(url))
    store = registry.ledger()
    print("ready", flush=True)
    sys.stdin.readline()
    calls = (store.reserve(reservation(first + i, 13_000), {GLOBAL: DAY}) for i in range(100))
    outcomes = await asyncio.gather(*calls)
    print(sum(not isinstance(one, Overdrawn) for one in outcomes), flush=True)
    await store.close()
    await registry.close()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def test_two_gateways_with_200_requests_at_once_reserve_what_there_is_and_not_more(
    postgres: Postgres, tmp_path: Path
) -> None:
    url = postgres.database()
    gateways = [
        subprocess.Popen(
            [sys.executable, "-c", _RACE, tmp_path / f"{number}.sqlite3", url, str(number * 1000)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for number in (1, 2)
    ]
    with gateways[0], gateways[1]:
        for one in gateways:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        for one in gateways:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
        counts = [int(one.stdout.readline()) for one in gateways if one.stdout is not None]
    assert sum(counts) == 1_000_000 // 13_000 == 76
    assert all(counts), "both had their turn"
    found = postgres.sql(url, "SELECT count(*), sum(amount), count(DISTINCT gateway) FROM ledger")
    assert found == [(76, 76 * 13_000, 2)]
    assert postgres.sql(url, "SELECT spent, reserved FROM ledger_days") == [(0, 76 * 13_000)]


async def test_a_gateway_settles_its_own_reservations_and_those_of_gateways_that_have_ended(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.database()
    ages: dict[str, Any] = {"before_us": 2**63 - 1, "at_us": 0}
    async with opened(tmp_path / "a", url) as one, opened(tmp_path / "b", url) as other:
        assert one.gateway is not None
        first, second, locks = one.ledger(), other.ledger(), AdvisoryLocks(url)
        assert await locks.try_exclusive(gateway_lock(one.gateway))
        for number in (1, 2):
            await first.reserve(reservation(number), {})
        await second.reserve(reservation(3), {})
        # Its own one; those of the first gateway, which lives, stay however old they are.
        assert await second.recover(lost, **ages) == 1
        monkeypatch.setattr(ledger, "GONE_S", 0.3)
        for _ in range(2):
            assert await second.recover(lost, **ages) == 0
            await asyncio.sleep(0.31)
        # A server that was restarted has forgotten all sessions: gateways have a while to come back.
        await locks.close()
        assert await second.recover(lost, **ages) == 0
        locks = AdvisoryLocks(url)
        assert await locks.try_exclusive(gateway_lock(one.gateway))
        await asyncio.sleep(0.31)
        assert await second.recover(lost, **ages) == 0
        await locks.close()
        assert await second.recover(lost, **ages) == 0
        await asyncio.sleep(0.31)
        assert await second.recover(lost, **ages) == 2
        # The first one was not gone after all: what it closes now is closed already.
        assert not await first.close_reservation(Closing("r1", "settled", 4), 0)
        assert await first.balances({GLOBAL: DAY}) == {GLOBAL: Balance(30, 0)}
        await first.close()
        await second.close()


async def test_a_commit_in_doubt_is_found_out_and_paid_once(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.database()
    async with opened(tmp_path, url) as registry:
        store = registry.ledger()
        await store.reserve(reservation(1, 100), {GLOBAL: DAY})
        # The answer to the first closing was lost: it is written again.
        assert await store.close_reservation(Closing("r1", "settled", 40), 1)
        assert not await store.close_reservation(Closing("r1", "settled", 40), 2)
        assert await store.balances({GLOBAL: DAY}) == {GLOBAL: Balance(40, 0)}
        refused = await store.reserve(reservation(2, 999_961), {GLOBAL: DAY})
        assert isinstance(refused, Overdrawn)
        await store.close()


# --- advisory locks ---


@asynccontextmanager
async def locked(url: str, **options: Any) -> AsyncIterator[AdvisoryLocks]:
    locks = AdvisoryLocks(url, **options)
    try:
        yield locks
    finally:
        await locks.close()


async def test_a_lock_is_held_exclusively_or_shared(postgres: Postgres) -> None:
    url = postgres.database()
    async with locked(url) as one, locked(url) as other:
        assert await one.try_exclusive("cpu")
        assert not await one.try_exclusive("cpu")
        assert not await one.try_shared("cpu")
        assert not await other.try_exclusive("cpu")
        assert not await other.try_shared("cpu")
        assert await other.try_exclusive("gpu0")
        assert one.held == {"cpu"}
        assert other.held == {"gpu0"}
        assert not await one.release("cpu", shared=True)
        assert await one.release("cpu")
        assert not await one.release("cpu")
        for _ in range(2):
            assert await one.try_shared("cpu")
            assert await other.try_shared("cpu")
        assert not await one.try_exclusive("cpu")
        for _ in range(2):
            assert not await other.try_exclusive("cpu")
            assert await one.release("cpu", shared=True)
        assert not await one.try_exclusive("cpu")  # the other one has two shares
        await other.close()
        await until(lambda: postgres.sql(url, "SELECT 1 FROM pg_locks WHERE locktype = 'advisory'") == [])
        assert await one.try_exclusive("cpu")


async def test_locks_are_lost_with_the_connection_and_the_holder_is_told(postgres: Postgres) -> None:
    url = postgres.database()
    told: list[frozenset[str]] = []
    async with locked(url, on_lost=told.append) as locks:
        assert await locks.try_exclusive("cpu")
        assert await locks.try_shared("gpu0")
        postgres.kill()
        try:
            await until(lambda: told)
            assert told == [frozenset({"cpu", "gpu0"})]
            assert not locks.held
            assert not await locks.release("cpu")
            with pytest.raises(RegistryUnwritableError):
                await locks.try_exclusive("cpu")
        finally:
            postgres.start()
        await asyncio.sleep(module._PAUSE_S)
        assert await locks.try_exclusive("cpu")
        assert len(told) == 1


async def test_a_caller_that_leaves_leaves_no_lock_and_takes_none_of_another(postgres: Postgres) -> None:
    url = postgres.database()
    told: list[frozenset[str]] = []
    async with locked(url, on_lost=told.append) as locks, locked(url) as other:
        assert await locks.try_exclusive("kept")
        taking = asyncio.ensure_future(locks.try_exclusive("cpu"))
        await asyncio.sleep(0)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        await until(lambda: not locks._rests)
        assert await other.try_exclusive("cpu")
        assert locks.held == {"kept"}
        assert not told


async def test_a_holder_of_a_server_that_says_nothing_is_told(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CALL_S", 1.0)
    told: list[frozenset[str]] = []
    async with locked(postgres.database(), on_lost=told.append) as locks:
        assert await locks.try_exclusive("cpu")
        postgres.freeze()
        try:
            await until(lambda: told)
        finally:
            postgres.thaw()
