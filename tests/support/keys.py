"""Keys for tests that need no keyring."""

from __future__ import annotations

from datetime import UTC, datetime

from manager.domain.keys import Grant, Scope
from manager.wire.keys import Keys, digest_of

AT = datetime(2026, 1, 1, tzinfo=UTC)
OPEN = Keys()


def grant(name: str = "tester", *scopes: Scope) -> Grant:
    return Grant(name, frozenset(scopes or (Scope.ADMIN,)), AT)


def keys(*secrets: str | None, of: Grant | None = None) -> Keys:
    """Return keys in force: each secret is one of `of`, an admin key by default; None alone means open."""
    given = [secret for secret in secrets if secret is not None]
    return Keys({digest_of(secret.encode()): of or grant() for secret in given}, are_required=bool(given))
