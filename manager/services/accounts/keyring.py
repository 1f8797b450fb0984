"""The keys: makes, rotates and revokes them, and has them end when their time is over."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from secrets import token_urlsafe
from typing import TYPE_CHECKING, NamedTuple

import structlog

from manager.domain.keys import MOST_SECRETS, Grant, Key, KeyState, Scope, Secret
from manager.errors import KeyConflictError, ManagerError, UnknownKeyError
from manager.services.finishing import finish
from manager.wire.keys import Keys, digest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from manager.services.journal import Journal
    from manager.services.ports import Registry

_log = structlog.get_logger("keys")

MOST_KEYS = 1000
# Sessions of pages. Beyond it the oldest one ends of the secret that has the most: a key with many of them
# ends none of another key that has fewer.
MOST_SESSIONS = 1000
SESSION_S = 12 * 3600
# The key of `server.key_file`. No other can have its name, which has a dot.
FILE_KEY = "server.key_file"
_FILE_GRANT = Grant(FILE_KEY, frozenset({Scope.ADMIN}), datetime(2000, 1, 1, tzinfo=UTC))
_SECRET_BYTES = 32
_PREFIX_CHARACTERS = 8
# A key may end so much later, and its use is seen so much later.
_TICK_S = 0.5
_WRITE_EVERY_S = 60.0


class MadeKey(NamedTuple):
    """A key with its new secret, which is never seen again."""

    key: Key
    secret: str


class _Session(NamedTuple):
    secret: bytes
    ends_at: datetime


class Keyring:
    """Owns the keys. Lives on the event loop; a change is in force when its call returns.

    A change is stored before it is in force, but for a revocation: that holds until the end of the process
    although it could not be stored. A daemon that has had a key requires one from then on, until the last
    name is forgotten: a revoked key keeps its name.

    Gateways that share a database have the same keys: `reload` takes over what another one has changed.

    Args:
        registry: stores the keys.
        journal: records the changes.
        utcnow: the wall clock.

    Attributes:
        used: names of the keys of requests since the last look. Each request adds its own.
    """

    def __init__(self, registry: Registry, journal: Journal, *, utcnow: Callable[[], datetime]) -> None:
        self._registry = registry
        self._journal = journal
        self._utcnow = utcnow
        self._keys: dict[str, Key] = {}
        self._files: frozenset[bytes] = frozenset()
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()
        self._users: list[Callable[[Keys], None]] = []
        self._in_force = Keys()
        self._changing = asyncio.Lock()
        self._next_end: datetime | None = None
        self._unsaved: dict[str, datetime] = {}
        # Revoked here, and not stored as such.
        self._unstored: dict[str, Key] = {}
        self.used: set[str] = set()

    async def load(self) -> None:
        """Read the keys of the registry; once."""
        self._keys = {key.grant.name: key for key in await self._registry.keys()}
        self._put_in_force()

    async def reload(self) -> None:
        """Take over the keys of the registry, which another gateway has changed.

        A key that was revoked here stays so, although that could not be stored; it is tried again.

        Raises:
            ManagerError: the registry cannot be read or written; the keys are as they were.
        """
        await finish(self._reload())

    async def _reload(self) -> None:
        async with self._changing:
            for name, revoked in tuple(self._unstored.items()):
                await self._registry.save_key(revoked)
                del self._unstored[name]
            found = {key.grant.name: key for key in await self._registry.keys()}
            self._keys = {name: self._lately_used(key) for name, key in found.items()}
            self._put_in_force()

    def _lately_used(self, key: Key) -> Key:
        """Return a key with the later one of its last uses here and elsewhere."""
        known = self._keys.get(key.grant.name)
        uses = [one.last_used_at for one in (key, known) if one is not None and one.last_used_at is not None]
        return replace(key, last_used_at=max(uses, default=None))

    def use_files(self, secrets: Iterable[str]) -> None:
        """Take the keys of the operator's files, in place of the earlier ones."""
        self._files = frozenset(digest_of(secret.encode()) for secret in secrets)
        self._put_in_force()

    def tell(self, user: Callable[[Keys], None]) -> None:
        """Have `user` get the keys in force, now and at each change."""
        self._users.append(user)
        user(self._in_force)

    @property
    def are_required(self) -> bool:
        """Return whether a request needs a key."""
        return bool(self._files or self._keys)

    def now(self) -> datetime:
        """Return the time by which keys end."""
        return self._utcnow()

    def all(self) -> list[Key]:
        """Return every key of the registry, by name."""
        return [self._keys[name] for name in sorted(self._keys)]

    def grant(self, name: str) -> Grant | None:
        """Return a key that is in force, by name; None where there is none."""
        if name == FILE_KEY:
            return _FILE_GRANT if self._files else None
        key = self._keys.get(name)
        return key.grant if key is not None and key.state(self._utcnow()) is KeyState.ACTIVE else None

    def monthly_limits(self) -> Mapping[str, int]:
        """Return the cost of a month that keys are limited to, in micro-dollars, by name."""
        return {
            name: limit
            for name, key in self._keys.items()
            if (limit := key.grant.micro_usd_per_month) is not None
        }

    def state(self, key: Key) -> KeyState:
        return key.state(self._utcnow())

    def has_admin(self) -> bool:
        """Return whether a key is in force that can manage keys."""
        return bool(self._files) or any(
            Scope.ADMIN in key.grant.scopes and key.digests(self._utcnow()) for key in self._keys.values()
        )

    # --- changes ---

    async def create(self, grant: Grant) -> MadeKey:
        """Make a key.

        Raises:
            ConflictError: the name is taken, there are too many, or nobody could manage keys afterwards.
            RegistryUnwritableError: it could not be stored, and there is none.
        """
        return await finish(self._create(grant))

    async def _create(self, grant: Grant) -> MadeKey:
        async with self._changing:
            known = self._keys.get(grant.name)
            if known is not None and known.revoked_at is None:
                raise KeyConflictError(
                    "key_exists", f"there is a key {grant.name!r} already; rotate it, or revoke it first"
                )
            if known is None and len(self._keys) >= MOST_KEYS:
                raise KeyConflictError(
                    "too_many_keys", f"there are {MOST_KEYS} keys already, revoked ones included; forget some"
                )
            if Scope.ADMIN not in grant.scopes and not self.has_admin():
                raise KeyConflictError(
                    "no_admin_key",
                    "with it every request needs a key, and this one could not manage keys: make one with "
                    "the scope admin first, or set server.key_file",
                )
            secret = self._new_secret()
            key = Key(grant, (self._stored(secret),))
            await self._registry.replace_key(known, key)
            self._replace(key)
            self._journal.record("key_created", detail=f"{grant.name}: {', '.join(sorted(grant.scopes))}")
            return MadeKey(key, secret)

    async def rotate(self, name: str, overlap_s: float) -> MadeKey:
        """Make another secret for a key; the earlier ones end after the overlap.

        Raises:
            UnknownKeyError: there is no such key.
            ConflictError: it is not in force, has too many secrets, or another gateway changes it.
            RegistryUnwritableError: it could not be stored, and nothing has changed.
        """
        return await finish(self._rotate(name, overlap_s))

    async def _rotate(self, name: str, overlap_s: float) -> MadeKey:
        async with self._changing:
            key, now = self._find(name), self._utcnow()
            state = key.state(now)
            if state is not KeyState.ACTIVE:
                raise KeyConflictError("key_not_active", f"the key {name!r} is {state}; make a new one")
            secret = self._new_secret()
            rotated = key.rotated(self._stored(secret), now, now + timedelta(seconds=overlap_s))
            if len(rotated.secrets) > MOST_SECRETS:
                raise KeyConflictError(
                    "too_many_secrets",
                    f"the key {name!r} has {len(rotated.secrets) - 1} secrets in force; wait until the "
                    "overlap of an earlier rotation is over, or rotate without one",
                )
            await self._registry.replace_key(key, rotated)
            self._replace(rotated)
            self._journal.record("key_rotated", detail=f"{name}: the earlier secret ends in {overlap_s:g} s")
            return MadeKey(rotated, secret)

    async def revoke(self, name: str, *, forgets: bool = False) -> Key:
        """Have a key open nothing any more; a revoked one stays so. Return it.

        Args:
            name: of the key.
            forgets: forget the name too: without any name left and without a key file, requests need no key.

        Raises:
            UnknownKeyError: there is no such key.
            RegistryUnwritableError: it is revoked until the end of this process, and then not any more.
        """
        return await finish(self._revoke(name, forgets=forgets))

    async def _revoke(self, name: str, *, forgets: bool) -> Key:
        async with self._changing:
            key = self._find(name)
            revoked = key.revoked(self._utcnow())
            self._replace(revoked)
            self._unstored[name] = revoked
            if forgets:
                await self._registry.forget_key(name)
                del self._keys[name]
                self._put_in_force()
            else:
                await self._registry.save_key(revoked)
            del self._unstored[name]
            if key.revoked_at is None:
                self._journal.record("key_revoked", detail=name)
            return revoked

    # --- sessions of pages ---

    def sign_in(self, secret: bytes) -> str | None:
        """Begin a session for a key; return its id, or None where the key opens nothing."""
        digest = digest_of(secret)
        if digest not in self._in_force.grants:
            return None
        session = token_urlsafe(_SECRET_BYTES)
        ends_at = self._utcnow() + timedelta(seconds=SESSION_S)
        self._sessions[digest_of(session.encode())] = _Session(digest, ends_at)
        if len(self._sessions) > MOST_SESSIONS:
            self._end_oldest_session()
        self._put_in_force()
        return session

    def _end_oldest_session(self) -> None:
        counts = Counter(one.secret for one in self._sessions.values())
        most = max(counts.values())
        del self._sessions[next(id_ for id_, one in self._sessions.items() if counts[one.secret] == most)]

    def sign_out(self, session: bytes) -> None:
        """End a session; one that is over already is no error."""
        if self._sessions.pop(digest_of(session), None) is not None:
            self._put_in_force()

    # --- what goes on by itself ---

    async def run(self) -> None:
        """Have keys end in time, and store when they were used, until cancelled."""
        loop = asyncio.get_running_loop()
        written_at = loop.time()
        try:
            while True:
                await asyncio.sleep(_TICK_S)
                self.look()
                if self._unsaved and loop.time() - written_at >= _WRITE_EVERY_S:
                    written_at = loop.time()
                    await self.save_last_used()
        finally:
            self.look()
            await self.save_last_used()

    def look(self) -> None:
        """Have keys end whose time is over, and note those that were used."""
        now = self._utcnow()
        if self._next_end is not None and self._next_end <= now:
            self._put_in_force()
        if self.used:
            names = tuple(self.used)
            self.used.clear()
            for name in names:
                if (key := self._keys.get(name)) is not None:
                    self._keys[name] = replace(key, last_used_at=now)
                    self._unsaved[name] = now

    async def save_last_used(self) -> None:
        """Store when keys were used last. What cannot be stored now is stored later."""
        unsaved, self._unsaved = self._unsaved, {}
        if not unsaved:
            return
        try:
            await finish(self._registry.save_last_used(unsaved))
        except ManagerError as error:
            self._unsaved = {**unsaved, **self._unsaved}
            _log.warning("key_use_not_stored", error=error.message)

    # --- helpers ---

    def _find(self, name: str) -> Key:
        key = self._keys.get(name)
        if key is None:
            hint = "; its keys are the lines of those files" if name == FILE_KEY else ""
            raise UnknownKeyError(f"there is no key {name!r}{hint}")
        return key

    def _new_secret(self) -> str:
        return f"om_{token_urlsafe(_SECRET_BYTES)}"

    def _stored(self, secret: str) -> Secret:
        return Secret(digest_of(secret.encode()), secret[:_PREFIX_CHARACTERS], self._utcnow())

    def _replace(self, key: Key) -> None:
        self._keys[key.grant.name] = key
        self._put_in_force()

    def _put_in_force(self) -> None:
        now = self._utcnow()
        grants = {digest: key.grant for key in self._keys.values() for digest in key.digests(now)}
        grants |= dict.fromkeys(self._files, _FILE_GRANT)
        for id_, session in tuple(self._sessions.items()):
            if session.ends_at <= now or session.secret not in grants:
                del self._sessions[id_]
        sessions = {id_: grants[session.secret] for id_, session in self._sessions.items()}
        ends = [key.next_end(now) for key in self._keys.values()]
        ends += [session.ends_at for session in self._sessions.values()]
        self._next_end = min((end for end in ends if end is not None), default=None)
        self._in_force = Keys(grants, sessions, self.are_required)
        for user in self._users:
            user(self._in_force)
