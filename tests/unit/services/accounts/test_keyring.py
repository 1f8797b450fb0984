"""The keyring, over a real registry and a clock that a test moves."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from manager.adapters.registry import SqlRegistry, open_registry
from manager.adapters.registry.postgres import PostgresDatabase
from manager.domain.keys import MOST_SECRETS, Grant, KeyState, Permit, Scope
from manager.errors import KeyConflictError, RegistryUnwritableError, UnknownKeyError
from manager.services.accounts import keyring as module
from manager.services.accounts.keyring import FILE_KEY, SESSION_S, Keyring
from manager.services.journal import Journal
from manager.wire.keys import Keys, digest_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

START = datetime(2026, 8, 1, 12, 0, tzinfo=UTC)


class Rig:
    """A keyring, its registry, its clock, and the keys in force as it tells them."""

    def __init__(self, registry: SqlRegistry) -> None:
        self.registry = registry
        self.now = START
        self.in_force = Keys()
        self.journal = Journal(registry, last_id=0, utcnow=lambda: self.now)

    async def opened(self) -> Keyring:
        """A keyring that begins with what is stored."""
        keyring = Keyring(self.registry, self.journal, utcnow=lambda: self.now)
        await keyring.load()
        keyring.tell(self.take)
        return keyring

    def take(self, keys: Keys) -> None:
        self.in_force = keys

    def opens(self, secret: str) -> str | None:
        """The name of the key that a secret opens with; None where it opens nothing."""
        found = self.in_force.grants.get(digest_of(secret.encode()))
        return None if found is None else found.name

    def grant(self, name: str, *scopes: Scope, **limits: object) -> Grant:
        return Grant(name, frozenset(scopes or (Scope.CLIENT,)), self.now, **limits)  # type: ignore[arg-type]

    def after(self, seconds: float) -> None:
        self.now = START + timedelta(seconds=seconds)


@pytest_asyncio.fixture(params=["file", "postgresql"])
async def rig(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    url = None if request.param == "file" else request.getfixturevalue("postgres").database()
    shared = None if url is None else PostgresDatabase(url)
    registry = await open_registry(tmp_path / "registry.sqlite3", busy_timeout_s=0.05, shared=shared)
    yield Rig(registry)
    await registry.close()


@pytest_asyncio.fixture
async def keyring(rig: Rig) -> Keyring:
    """A keyring with an admin key."""
    keyring = await rig.opened()
    await keyring.create(rig.grant("root", Scope.ADMIN))
    return keyring


async def test_without_any_key_none_is_required(rig: Rig) -> None:
    keyring = await rig.opened()
    assert (rig.in_force.are_required, keyring.are_required, keyring.has_admin()) == (False, False, False)


async def test_a_key_is_stored_whole_and_without_its_secret(rig: Rig, keyring: Keyring) -> None:
    permit = Permit("ci", frozenset({"r"}), ("qwen3:*", "tiny"), frozenset({"gpu0", "cpu"}))
    grant = rig.grant(
        "ci", Scope.CLIENT, Scope.READ, permit=permit, project="shop", concurrency=1, rpm=2, tokens_per_day=3,
        micro_usd_per_month=4, expires_at=START + timedelta(days=1), is_local=True,
    )  # fmt: skip
    made = await keyring.create(grant)
    assert rig.opens(made.secret) == "ci"
    again = await rig.opened()
    assert again.all() == keyring.all()
    assert again.grant("ci") == grant
    assert (len(made.secret), made.key.secrets[0].prefix) == (46, made.secret[:8])
    assert rig.opens(made.secret) == "ci"


async def test_the_first_key_must_be_able_to_manage_keys_unless_a_file_has_one(rig: Rig) -> None:
    keyring = await rig.opened()
    with pytest.raises(KeyConflictError) as caught:
        await keyring.create(rig.grant("ci"))
    assert (caught.value.code, rig.in_force.are_required) == ("no_admin_key", False)
    keyring.use_files(["operator"])
    await keyring.create(rig.grant("ci"))
    assert rig.opens("operator") == FILE_KEY


async def test_a_name_is_taken_until_its_key_is_revoked(rig: Rig, keyring: Keyring) -> None:
    first = await keyring.create(rig.grant("ci"))
    with pytest.raises(KeyConflictError, match="already") as caught:
        await keyring.create(rig.grant("ci"))
    assert caught.value.code == "key_exists"
    await keyring.revoke("ci")
    second = await keyring.create(rig.grant("ci", project="new"))
    assert (rig.opens(first.secret), rig.opens(second.secret)) == (None, "ci")
    assert (await rig.opened()).grant("ci") == second.key.grant


async def test_the_number_of_keys_is_bounded(
    rig: Rig, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_KEYS", 2)
    await keyring.create(rig.grant("one"))
    with pytest.raises(KeyConflictError) as caught:
        await keyring.create(rig.grant("two"))
    assert caught.value.code == "too_many_keys"
    await keyring.revoke("one", forgets=True)
    await keyring.create(rig.grant("two"))


async def test_a_rotated_key_opens_with_both_secrets_until_the_overlap_ends(
    rig: Rig, keyring: Keyring
) -> None:
    old = (await keyring.create(rig.grant("ci"))).secret
    new = (await keyring.rotate("ci", 60)).secret
    assert (rig.opens(old), rig.opens(new)) == ("ci", "ci")
    rig.after(59)
    keyring.look()
    assert rig.opens(old) == "ci"
    rig.after(60)
    keyring.look()
    assert (rig.opens(old), rig.opens(new)) == (None, "ci")
    await rig.opened()
    assert (rig.opens(old), rig.opens(new)) == (None, "ci")


async def test_a_key_that_is_not_in_force_cannot_be_rotated_nor_one_with_many_secrets(
    rig: Rig, keyring: Keyring
) -> None:
    await keyring.create(rig.grant("ci", expires_at=START + timedelta(seconds=9)))
    for _ in range(MOST_SECRETS - 1):
        await keyring.rotate("ci", 5)
    with pytest.raises(KeyConflictError) as caught:
        await keyring.rotate("ci", 5)
    assert caught.value.code == "too_many_secrets"
    await keyring.rotate("ci", 0)
    rig.after(9)
    with pytest.raises(KeyConflictError, match="is expired") as caught:
        await keyring.rotate("ci", 5)
    assert caught.value.code == "key_not_active"
    with pytest.raises(UnknownKeyError):
        await keyring.rotate("nobody", 5)


async def test_an_expired_key_opens_nothing_and_has_no_grant(rig: Rig, keyring: Keyring) -> None:
    made = await keyring.create(rig.grant("ci", expires_at=START + timedelta(seconds=9)))
    rig.after(9)
    keyring.look()
    assert (rig.opens(made.secret), keyring.grant("ci")) == (None, None)
    assert keyring.state(keyring.all()[0]) is KeyState.EXPIRED


async def test_a_revoked_key_keeps_the_daemon_closed_until_its_name_is_forgotten(
    rig: Rig, keyring: Keyring
) -> None:
    await keyring.revoke("root")
    for one in (keyring, await rig.opened()):
        assert (one.are_required, one.has_admin(), rig.in_force.are_required) == (True, False, True)
        assert not rig.in_force.grants
    await keyring.revoke("root", forgets=True)
    assert (keyring.all(), keyring.are_required) == ([], False)
    assert not (await rig.opened()).are_required
    with pytest.raises(UnknownKeyError):
        await keyring.revoke("root")


async def test_a_revocation_holds_although_it_could_not_be_stored(rig: Rig, keyring: Keyring) -> None:
    made = await keyring.create(rig.grant("ci"))
    await rig.registry.close()
    with pytest.raises(RegistryUnwritableError):
        await keyring.revoke("ci")
    assert rig.opens(made.secret) is None
    with pytest.raises(RegistryUnwritableError):
        await keyring.create(rig.grant("new"))
    assert keyring.grant("new") is None


async def test_a_change_whose_client_leaves_is_in_force_as_stored(rig: Rig, keyring: Keyring) -> None:
    asking = asyncio.ensure_future(keyring.create(rig.grant("ci")))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert (await rig.opened()).all() == keyring.all()
    assert keyring.grant("ci") is not None


async def test_the_keys_of_the_files_are_replaced_as_a_whole(rig: Rig, keyring: Keyring) -> None:
    keyring.use_files(["one", "two"])
    assert (rig.opens("one"), rig.opens("two")) == (FILE_KEY, FILE_KEY)
    file_grant = keyring.grant(FILE_KEY)
    assert file_grant is not None
    assert file_grant.may(Scope.ADMIN)
    keyring.use_files(["two"])
    assert (rig.opens("one"), rig.opens("two")) == (None, FILE_KEY)
    keyring.use_files([])
    assert (rig.opens("two"), keyring.grant(FILE_KEY)) == (None, None)
    with pytest.raises(UnknownKeyError, match="lines of those files"):
        await keyring.revoke(FILE_KEY)


async def test_use_is_noted_and_stored_in_batches(rig: Rig, keyring: Keyring) -> None:
    await keyring.create(rig.grant("ci"))
    keyring.used.update(("ci", FILE_KEY, "gone"))
    rig.after(5)
    keyring.look()
    assert keyring.used == set()
    assert [key.last_used_at for key in keyring.all()] == [rig.now, None]
    assert [key.last_used_at for key in (await rig.opened()).all()] == [None, None]
    await keyring.save_last_used()
    assert [key.last_used_at for key in (await rig.opened()).all()] == [rig.now, None]


async def test_use_that_cannot_be_stored_waits(rig: Rig, keyring: Keyring) -> None:
    keyring.used.add("root")
    keyring.look()
    await rig.registry.close()
    await keyring.save_last_used()
    assert keyring._unsaved == {"root": START}


async def test_a_keyring_that_ends_stores_the_last_use(rig: Rig, keyring: Keyring) -> None:
    running = asyncio.ensure_future(keyring.run())
    await asyncio.sleep(0)
    keyring.used.add("root")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [key.last_used_at for key in (await rig.opened()).all()] == [START]


async def test_a_session_lasts_as_long_as_its_key_and_its_time(rig: Rig, keyring: Keyring) -> None:
    made = await keyring.create(rig.grant("ci"))
    assert keyring.sign_in(b"wrong") is None
    sessions = [keyring.sign_in(made.secret.encode()) for _ in range(3)]
    assert {grant.name for grant in rig.in_force.sessions.values()} == {"ci"}
    assert len(rig.in_force.sessions) == len(set(sessions)) == 3
    keyring.sign_out(str(sessions[0]).encode())
    keyring.sign_out(b"unknown")
    assert len(rig.in_force.sessions) == 2
    rig.after(SESSION_S)
    keyring.look()
    assert not rig.in_force.sessions
    assert keyring.sign_in(made.secret.encode())
    await keyring.revoke("ci")
    assert not rig.in_force.sessions


async def test_the_number_of_sessions_is_bounded(
    rig: Rig, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_SESSIONS", 2)
    made = await keyring.create(rig.grant("ci"))
    first, second, third = (keyring.sign_in(made.secret.encode()) for _ in range(3))
    kept = {digest_of(str(session).encode()) for session in (second, third)}
    assert set(rig.in_force.sessions) == kept
    assert digest_of(str(first).encode()) not in kept


async def test_a_key_with_many_sessions_ends_none_of_others(
    rig: Rig, keyring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_SESSIONS", 3)
    operator, program = await keyring.create(rig.grant("ops")), await keyring.create(rig.grant("ci"))
    of_operator = str(keyring.sign_in(operator.secret.encode()))
    for _ in range(5):
        latest = str(keyring.sign_in(program.secret.encode()))
    in_force = rig.in_force.sessions
    assert [grant.name for grant in in_force.values()] == ["ops", "ci", "ci"]
    assert {digest_of(one.encode()) for one in (of_operator, latest)} <= set(in_force)


async def test_changes_are_events_without_a_secret(rig: Rig, keyring: Keyring) -> None:
    secrets = [(await keyring.create(rig.grant("ci"))).secret, (await keyring.rotate("ci", 60)).secret]
    await keyring.revoke("ci")
    await keyring.revoke("ci")
    await rig.journal.flush()
    events = await rig.registry.events_after(0, 100)
    assert [event.kind for event in events] == ["key_created", "key_created", "key_rotated", "key_revoked"]
    assert not any(secret in event.detail for secret in secrets for event in events)


async def test_the_monthly_limits_of_keys_are_known_by_name(rig: Rig, keyring: Keyring) -> None:
    assert keyring.monthly_limits() == {}
    await keyring.create(rig.grant("ci", Scope.CLIENT, micro_usd_per_month=0))
    await keyring.create(rig.grant("loose"))
    assert keyring.monthly_limits() == {"ci": 0}
