"""The table of keys. A secret is stored as its SHA-256 only."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import JSON, Column, DateTime, String, Table, bindparam, delete, select, update

from manager.adapters.registry.dialects import upsert
from manager.adapters.registry.tables import aware, metadata, stored
from manager.domain.keys import Grant, Key, Permit, Scope, Secret

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection, Row

keys = Table(
    "keys",
    metadata,
    Column("name", String, primary_key=True),
    Column("scopes", JSON, nullable=False),
    Column("created_at", DateTime, nullable=False),
    Column("limits", JSON, nullable=False),
    Column("expires_at", DateTime),
    Column("secrets", JSON, nullable=False),
    Column("revoked_at", DateTime),
    Column("last_used_at", DateTime),
)

_NUMBERS = ("concurrency", "rpm", "tokens_per_day", "micro_usd_per_month")


def load(connection: Connection) -> tuple[Key, ...]:
    return tuple(map(_to_key, connection.execute(select(keys))))


def save(connection: Connection, key: Key) -> None:
    connection.execute(upsert(connection, keys), _from_key(key))


def is_unchanged(connection: Connection, name: str, before: Key | None) -> bool:
    """Whether the stored key of a name is as it was, but for its last use; None: there was none."""
    row = connection.execute(select(keys).where(keys.c.name == name)).first()
    if row is None or before is None:
        return row is None and before is None
    stored_now, stored_before = (_from_key(replace(one, last_used_at=None)) for one in (_to_key(row), before))
    return stored_now == stored_before


def forget(connection: Connection, name: str) -> None:
    connection.execute(delete(keys).where(keys.c.name == name))


def save_last_used(connection: Connection, used: Mapping[str, datetime]) -> None:
    statement = update(keys).where(keys.c.name == bindparam("key")).values(last_used_at=bindparam("at"))
    connection.execute(statement, [{"key": name, "at": stored(at)} for name, at in used.items()])


def _from_key(key: Key) -> dict[str, Any]:
    grant, permit = key.grant, key.grant.permit
    return {
        "name": grant.name,
        "scopes": sorted(grant.scopes),
        "created_at": stored(grant.created_at),
        "limits": {
            "project": grant.project,
            "roles": permit and _sorted(permit.roles),
            "models": permit and permit.models and list(permit.models),
            "instances": permit and _sorted(permit.instances),
            "local_only": grant.is_local,
            **{name: getattr(grant, name) for name in _NUMBERS},
        },
        "expires_at": stored(grant.expires_at),
        "secrets": [
            {
                "digest": one.digest.hex(),
                "prefix": one.prefix,
                "created_at": one.created_at.isoformat(),
                "ends_at": one.ends_at and one.ends_at.isoformat(),
            }
            for one in key.secrets
        ],
        "revoked_at": stored(key.revoked_at),
        "last_used_at": stored(key.last_used_at),
    }


def _sorted(names: frozenset[str] | None) -> list[str] | None:
    return None if names is None else sorted(names)


def _to_key(row: Row[Any]) -> Key:
    limits = row.limits
    roles, models, instances = limits["roles"], limits["models"], limits["instances"]
    permit = None
    if not roles is models is instances is None:
        permit = Permit(
            row.name,
            roles=None if roles is None else frozenset(roles),
            models=None if models is None else tuple(models),
            instances=None if instances is None else frozenset(instances),
        )
    grant = Grant(
        name=row.name,
        scopes=frozenset(map(Scope, row.scopes)),
        created_at=aware(row.created_at),
        permit=permit,
        project=limits["project"],
        expires_at=row.expires_at and aware(row.expires_at),
        is_local=limits["local_only"],
        **{name: limits[name] for name in _NUMBERS},
    )
    return Key(
        grant,
        tuple(map(_to_secret, row.secrets)),
        revoked_at=row.revoked_at and aware(row.revoked_at),
        last_used_at=row.last_used_at and aware(row.last_used_at),
    )


def _to_secret(stored_secret: dict[str, Any]) -> Secret:
    ends_at = stored_secret["ends_at"]
    return Secret(
        digest=bytes.fromhex(stored_secret["digest"]),
        prefix=stored_secret["prefix"],
        created_at=datetime.fromisoformat(stored_secret["created_at"]),
        ends_at=None if ends_at is None else datetime.fromisoformat(ends_at),
    )
