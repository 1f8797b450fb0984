"""Keys: who a client is, and what it may do. Pure; the secret itself is never here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

from manager.domain.denial import denying
from manager.domain.wording import listed

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from datetime import datetime

# Secrets of one key that are in force at once: each rotation within the overlap of the last one adds one.
MOST_SECRETS = 4


class Scope(StrEnum):
    """The purpose of a key.

    `client` is inference and the lists of models, `read` status, metrics and usage. `operator` starts, stops
    and changes, and includes `read`. `admin` manages keys and budgets, and includes all others. An operator
    does not use models: its key need not count as a client's.
    """

    CLIENT = "client"
    READ = "read"
    OPERATOR = "operator"
    ADMIN = "admin"


INCLUDED: Mapping[Scope, frozenset[Scope]] = MappingProxyType(
    {
        Scope.CLIENT: frozenset({Scope.CLIENT}),
        Scope.READ: frozenset({Scope.READ}),
        Scope.OPERATOR: frozenset({Scope.OPERATOR, Scope.READ}),
        Scope.ADMIN: frozenset(Scope),
    }
)


@dataclass(frozen=True, slots=True)
class Permit:
    """The bounds of requests with a key; None is no bound. Hashable: decisions are remembered by it.

    `roles` are names of roles, `models` patterns of names (as in `deny_models`), `instances` ids. `owner` is
    the name of the key, for messages.

    A name with a `/` is matched only by a pattern that has one, or that begins with `*`: `qwen3*` permits no
    model of the host `qwen3.example.org`.

    The methods return the limit that something is beyond, in words; empty where it is permitted.
    """

    owner: str
    roles: frozenset[str] | None = None
    models: tuple[str, ...] | None = None
    instances: frozenset[str] | None = None

    def limit_of_model(self, key: str) -> str:
        """`key` is that of the model (`model_key`)."""
        patterns = self.models
        if patterns is None:
            return ""
        if "/" in key:
            patterns = tuple([one for one in patterns if "/" in one or one.strip().startswith("*")])
        return "" if denying(patterns, key) else self._limit("models", self.models or (), key)

    def limit_of_role(self, name: str) -> str:
        if self.roles is None or name in self.roles:
            return ""
        return self._limit("roles", sorted(self.roles), name)

    def limit_of_instance(self, id_: str) -> str:
        if self.instances is None or id_ in self.instances:
            return ""
        return self._limit("instances", sorted(self.instances), id_)

    def limit_of_bare_model(self, name: str) -> str:
        """The limit of a model that is named without a role: roles alone permit none."""
        if self.roles is None or self.models is not None:
            return ""
        return self._limit("roles", sorted(self.roles), name)

    def _limit(self, what: str, permitted: Collection[str], name: str) -> str:
        return f"the key {self.owner!r} may use only the {what} {listed(permitted)}, not {name!r}"


# Limits of a key beside its project, as the API names them.
LIMIT_NAMES = (
    "roles",
    "models",
    "instances",
    "concurrency",
    "rpm",
    "tokens_per_day",
    "usd_per_month",
    "local_only",
)


@dataclass(frozen=True, slots=True)
class Grant:
    """One key as it is stored, without its secret.

    `permit` is None where the key may go anywhere. `project` replaces the one that a client names.
    `concurrency` bounds its requests in flight, `rpm` those that begin in a minute, `tokens_per_day` its
    tokens of a UTC day and `micro_usd_per_month` its cost of a UTC month; None is no limit. `is_local`
    forbids paid servers.
    """

    name: str
    scopes: frozenset[Scope]
    created_at: datetime
    permit: Permit | None = None
    project: str | None = None
    concurrency: int | None = None
    rpm: int | None = None
    tokens_per_day: int | None = None
    micro_usd_per_month: int | None = None
    expires_at: datetime | None = None
    is_local: bool = False

    def may(self, scope: Scope) -> bool:
        """Return whether the key has a scope, or one that includes it."""
        return any(scope in INCLUDED[one] for one in self.scopes)


class KeyState(StrEnum):
    """Return whether a key opens anything."""

    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Secret:
    """One secret of a key as it is stored: its SHA-256 and its first characters, which people know it by.

    `ends_at` is the end of the overlap of a rotation; None for the newest one.
    """

    digest: bytes
    prefix: str
    created_at: datetime
    ends_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the registry, with its secrets in the order of their creation, the newest last."""

    grant: Grant
    secrets: tuple[Secret, ...]
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None

    def state(self, now: datetime) -> KeyState:
        if self.revoked_at is not None:
            return KeyState.REVOKED
        expires_at = self.grant.expires_at
        return KeyState.EXPIRED if expires_at is not None and expires_at <= now else KeyState.ACTIVE

    def digests(self, now: datetime) -> tuple[bytes, ...]:
        """Return the digests of the secrets that open something at a time."""
        if self.state(now) is not KeyState.ACTIVE:
            return ()
        return tuple(one.digest for one in self.secrets if one.ends_at is None or one.ends_at > now)

    def next_end(self, now: datetime) -> datetime | None:
        """Return when the key or one of its secrets ends next by itself; None if none does."""
        if self.state(now) is not KeyState.ACTIVE:
            return None
        ends = [self.grant.expires_at, *(one.ends_at for one in self.secrets)]
        return min((end for end in ends if end is not None and end > now), default=None)

    def rotated(self, secret: Secret, now: datetime, old_ends_at: datetime) -> Key:
        """Return the key with a new secret; the others end with the overlap, those that have ended go."""
        kept = [one for one in self.secrets if one.ends_at is None or one.ends_at > now]
        old = [
            replace(one, ends_at=old_ends_at if one.ends_at is None else min(one.ends_at, old_ends_at))
            for one in kept
            if old_ends_at > now
        ]
        return replace(self, secrets=(*old, secret))

    def revoked(self, now: datetime) -> Key:
        """Return the key without its secrets: its name stays, so that the daemon stays closed."""
        return replace(self, secrets=(), revoked_at=self.revoked_at or now)
