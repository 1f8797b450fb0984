"""What gateways on one database tell each other, over a real one."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from manager.adapters import postgres as module
from manager.adapters.postgres import AdvisoryLocks
from manager.adapters.registry import SqlRegistry, open_registry
from manager.adapters.registry.postgres import PostgresDatabase, gateway_lock
from manager.adapters.registry.shared import SharedDatabase
from manager.domain.keys import Grant, KeyState, Scope
from manager.domain.ownership import Owner
from manager.errors import ConflictError, InvalidRequestError, RegistryCorruptError, RegistryUnwritableError
from manager.services.accounts.keyring import Keyring
from manager.services.accounts.quotas import Exceeded, Quotas
from manager.services.following import Following
from manager.services.journal import Journal
from manager.services.ports import KeyUse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.postgres import Postgres

START = datetime(2026, 3, 1, tzinfo=UTC)


class Gateway:
    """The parts of a gateway that follow others."""

    def __init__(self, registry: SqlRegistry, shared: SharedDatabase) -> None:
        self.registry, self.shared = registry, shared
        self.now = START
        self.journal = Journal(registry, last_id=0, utcnow=lambda: self.now)
        self.keyring = Keyring(registry, self.journal, utcnow=lambda: self.now)
        self.quotas = Quotas(now=self.seconds, utcnow=lambda: self.now)
        self.readings = 0
        self.members = frozenset({"cpu"})
        self.following = Following(
            shared,
            self.journal,
            reloads={"keys": self.keyring.reload, "overrides": self.reads},
            quotas=self.quotas,
            members=lambda: self.members,
        )

    def seconds(self) -> float:
        return (self.now - START).total_seconds()

    async def reads(self) -> None:
        self.readings += 1

    def kinds(self) -> list[str]:
        return [event.kind for event in self.journal._recent]

    def grant(self, name: str, *scopes: Scope, **limits: Any) -> Grant:
        return Grant(name, frozenset(scopes or (Scope.CLIENT,)), self.now, **limits)


async def gateway(stack: AsyncExitStack, home: Path, url: str) -> Gateway:
    registry = await open_registry(home / "registry.sqlite3", shared=PostgresDatabase(url))
    stack.push_async_callback(registry.close)
    shared = SharedDatabase(PostgresDatabase(url), AdvisoryLocks(url), str(registry.gateway))
    stack.push_async_callback(shared.close)
    made = Gateway(registry, shared)
    await made.keyring.load()
    await made.following.look()
    return made


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.database()


@pytest_asyncio.fixture
async def pair(url: str, tmp_path: Path) -> AsyncIterator[tuple[Gateway, Gateway]]:
    async with AsyncExitStack() as stack:
        yield await gateway(stack, tmp_path / "one", url), await gateway(stack, tmp_path / "other", url)


Two = tuple[Gateway, Gateway]


async def test_keys_are_read_again_after_a_change_elsewhere_and_not_without_one(pair: Two) -> None:
    one, other = pair
    await one.keyring.create(one.grant("root", Scope.ADMIN))
    made = await one.keyring.create(one.grant("bot"))
    await other.following.look()
    assert [key.grant.name for key in other.keyring.all()] == ["bot", "root"]
    before = other.keyring.all()[0]
    await other.following.look()
    assert other.keyring.all()[0] is before, "nothing was read"
    assert other.readings == 1, "the first look reads everything, and a change of keys no settings"
    await other.keyring.revoke("bot")
    await one.following.look()
    assert one.keyring.state(one.keyring.all()[0]) is KeyState.REVOKED
    assert made.key.grant.name == "bot"
    await one.registry.save_overrides({"a": 1})
    await other.following.look()
    assert other.readings == 2


async def test_a_key_keeps_the_later_of_its_last_uses(pair: Two) -> None:
    one, other = pair
    await one.keyring.create(one.grant("root", Scope.ADMIN))
    await other.following.look()
    for stored, seen in ((9, 5), (13, 17)):
        for gateway_, seconds in ((one, stored), (other, seen)):
            gateway_.now = START + timedelta(seconds=seconds)
            gateway_.keyring.used.add("root")
            gateway_.keyring.look()
        await one.keyring.save_last_used()
        await one.keyring.rotate("root", 1)
        await other.following.look()
        assert other.keyring.all()[0].last_used_at == START + timedelta(seconds=max(stored, seen))


async def test_changes_of_a_key_at_once_are_refused_and_made_again(pair: Two) -> None:
    one, other = pair
    await one.keyring.create(one.grant("root", Scope.ADMIN))
    with pytest.raises(ConflictError, match="another gateway has changed"):
        await other.keyring.create(other.grant("root", Scope.ADMIN))
    await other.following.look()
    await one.keyring.revoke("root")
    with pytest.raises(ConflictError):
        await other.keyring.rotate("root", 60)
    assert [key.revoked_at for key in await one.registry.keys()] == [one.now]


async def test_an_outage_is_told_once_and_a_revocation_of_that_time_is_stored_after_it(
    pair: Two, postgres: Postgres
) -> None:
    one, other = pair
    await one.keyring.create(one.grant("root", Scope.ADMIN))
    await one.keyring.create(one.grant("bot"))
    for gateway_ in (one, other):
        await gateway_.following.look()
    postgres.kill()
    try:
        for _ in range(2):
            await one.following.look()
        with pytest.raises(RegistryUnwritableError):
            await one.keyring.revoke("bot")
        assert one.following.trouble is not None
        assert one.keyring.grant("bot") is None
    finally:
        postgres.start()
    await asyncio.sleep(module._PAUSE_S)
    for gateway_ in (one, other):
        await gateway_.following.look()
    assert one.following.trouble is None
    assert one.keyring.grant("bot") is other.keyring.grant("bot") is None
    assert one.keyring.grant("root") is not None
    assert [kind for kind in one.kinds() if kind.startswith("database")] == ["database_away", "database_back"]
    assert one.shared._locks.held == {gateway_lock(str(one.registry.gateway))}, "it is known to live again"


async def test_a_change_that_does_not_fit_here_is_logged_and_holds_up_no_other(
    pair: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = pair
    tries = 0

    async def does_not_fit() -> None:
        nonlocal tries
        tries += 1
        raise InvalidRequestError("until: expected a time in the future")

    other.following._reloads = {"overrides": does_not_fit, "keys": other.keyring.reload}
    await one.registry.save_overrides({"a": 1})
    await one.keyring.create(one.grant("root", Scope.ADMIN))
    with capture_logs() as logs:
        for _ in range(3):
            await other.following.look()
    assert [line["event"] for line in logs] == ["change_not_followed"]
    assert (tries, other.following.trouble) == (1, None)
    assert other.keyring.has_admin()


async def test_orders_are_read_again_for_an_instance_that_has_joined(pair: Two) -> None:
    one, _ = pair
    await one.following.look()
    assert one.readings == 1
    one.members |= {"far"}
    for _ in range(2):
        await one.following.look()
    assert one.readings == 2


async def test_what_cannot_be_read_is_trouble_and_holds_up_no_other_change(pair: Two) -> None:
    one, other = pair

    async def unreadable() -> None:
        raise RegistryCorruptError("a row in it cannot be read")

    other.following._reloads = {"overrides": unreadable, "keys": other.keyring.reload}
    await one.registry.save_overrides({"a": 1})
    await one.keyring.create(one.grant("root", Scope.ADMIN))
    with capture_logs() as logs:
        for _ in range(3):
            await other.following.look()
    assert [line["event"] for line in logs] == ["change_not_followed"]
    assert other.following.trouble == "changes of overrides are not in force here: a row in it cannot be read"
    assert "database_away" not in other.kinds()
    assert other.keyring.has_admin()
    other.following._reloads = {"overrides": other.reads}
    await other.following.look()
    assert other.following.trouble is None
    assert "database_back" not in other.kinds()


async def test_the_use_of_a_key_counts_at_both(pair: Two) -> None:
    one, other = pair
    bot = replace(one.grant("bot"), rpm=2)
    for gateway_ in pair:
        assert not isinstance(gateway_.quotas.enter(bot), Exceeded)
    for gateway_ in (*pair, *pair):
        await gateway_.following.look()
    assert isinstance(one.quotas.enter(bot), Exceeded)
    assert isinstance(other.quotas.enter(bot), Exceeded)


async def test_uses_of_earlier_days_are_forgotten(pair: Two, url: str, postgres: Postgres) -> None:
    one, other = pair
    await one.shared.exchange({"bot": KeyUse(3, "2026-02-28", 7)})
    numbers, uses = await other.shared.exchange({})
    assert [use for _, use in uses.values()] == [KeyUse(3, "2026-02-28", 7)]
    assert numbers == {}
    await other.shared.exchange({"bot": KeyUse(0, "2026-03-01", 1)})
    assert postgres.sql(url, "SELECT day, tokens FROM key_uses") == [("2026-03-01", 1)]


async def test_a_copied_state_directory_is_noticed(url: str, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        one = await gateway(stack, tmp_path, url)
        locks = AdvisoryLocks(url)
        copy = SharedDatabase(PostgresDatabase(url), locks, str(one.registry.gateway))
        stack.push_async_callback(copy.close)
        assert await one.shared.hold()
        assert not await copy.hold()
        await one.shared.close()
        async with asyncio.timeout(10):  # the server ends a session after its connection was closed
            while not await copy.hold():  # noqa: ASYNC110  (asks a database)
                await asyncio.sleep(0.01)


async def test_the_owner_of_the_first_gateway_is_that_of_all(pair: Two) -> None:
    one, other = pair
    first = Owner("first", frozenset({"lost"}), "m")
    assert await one.shared.owner(first) == first
    assert await other.shared.owner(Owner("second")) == first
    wider = replace(first, manager_id="n")
    await other.shared.save_owner(wider)
    assert await one.shared.owner(Owner("third")) == wider
