"""Keys: who a client is, and what it may do. Pure; the secret itself is never here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime


class Scope(StrEnum):
    """What a key is for. None of them includes another one, except that `admin` includes all."""

    CLIENT = "client"
    READ = "read"
    OPERATOR = "operator"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Permit:
    """Where requests with a key may go; None means anywhere. Hashable: decisions are remembered by it.

    `roles` are names of roles, `models` patterns of names (as in `deny_models`), `instances` ids. `owner` is
    the name of the key, for messages.
    """

    owner: str
    roles: frozenset[str] | None = None
    models: tuple[str, ...] | None = None
    instances: frozenset[str] | None = None


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
        """Return whether the key has a scope."""
        return scope in self.scopes or Scope.ADMIN in self.scopes
