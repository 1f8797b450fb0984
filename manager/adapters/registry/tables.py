"""The tables as the newest migration leaves them, and how their rows become what the domain knows.

Times are stored as UTC without an offset, which is all SQLite's DATETIME can say.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    DateTime,
    Float,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

from manager.adapters.registry.dialects import Whole
from manager.domain.idle import UsageSample
from manager.domain.instance import Target
from manager.domain.registry import Event, InstanceRow, LearnedSize, Operation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Row

# The schema this code reads and writes, and every older one it can bring up to it. Kept here so that a
# start needs no Alembic in memory; a test compares both with the migrations.
REVISIONS = tuple(f"{number:04}" for number in range(1, 14))
HEAD = REVISIONS[-1]

metadata = MetaData()

instances = Table(
    "instances",
    metadata,
    Column("id", String, primary_key=True),
    Column("target", String, nullable=False),
    Column("operation", String),
    Column("ttl_s", Float),
    Column("pinned", Boolean),
    Column("starts", Whole, nullable=False),
    Column("loopback_port", Whole),
    Column("last_used_at", DateTime),
    Column("recreated_at", DateTime),
    Column("usage", JSON(none_as_null=True)),
)

bindings = Table(
    "bindings",
    metadata,
    Column("instance", String, primary_key=True),
    Column("uuid", String, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("id", Whole, primary_key=True),
    Column("at", DateTime, nullable=False),
    Column("instance", String),
    Column("kind", String, nullable=False),
    Column("reason", String),
    Column("detail", Text, nullable=False),
)

learned_sizes = Table(
    "learned_sizes",
    metadata,
    Column("instance", String, primary_key=True),
    Column("model", String, primary_key=True),
    Column("digest", String, primary_key=True),
    Column("vram_bytes", Whole, nullable=False),
    Column("measured_at", DateTime, nullable=False),
    Column("by_card", JSON(none_as_null=True)),
)

overrides = Table(
    "overrides",
    metadata,
    Column("key", Text, primary_key=True),
    Column("value", JSON, nullable=False),
    Column("saved_at", DateTime, nullable=False),
)

model_lists = Table(
    "model_lists",
    metadata,
    Column("volume", Text, primary_key=True),
    Column("entries", JSON, nullable=False),
    Column("read_at", DateTime, nullable=False),
)

# Orders of operators for an instance of any driver, beside its row; one row a kind of order.
operator_state = Table(
    "operator_state",
    metadata,
    Column("instance", String, primary_key=True),
    Column("kind", String, primary_key=True),
    Column("value", JSON, nullable=False),
    Column("saved_at", DateTime, nullable=False),
)

# A number that grows with every change of a kind. Gateways that share a database look at it, and read again
# what has changed.
changes = Table(
    "changes",
    metadata,
    Column("topic", Text, primary_key=True),
    Column("number", Whole, nullable=False),
)

# Shared values without a table of their own: the owner of the containers.
documents = Table(
    "documents",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", JSON, nullable=False),
)

# The use of each key at each gateway that shares the database: the requests of the last minute, at the time
# `at_us` of the database, and the tokens of a day.
key_uses = Table(
    "key_uses",
    metadata,
    Column("gateway", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("at_us", Whole, nullable=False),
    Column("minute", Whole, nullable=False),
    Column("day", Text, nullable=False),
    Column("tokens", Whole, nullable=False),
)

# The index has all that the filters look at, so that a search reads no row that it does not return.
requests = Table(
    "requests",
    metadata,
    Column("id", Whole, primary_key=True),
    Column("request_id", Text, nullable=False, unique=True),
    Column("ended_us", Whole, nullable=False),
    Column("project", Text, nullable=False),
    Column("role", Text),
    Column("model", Text),
    Column("instance", Text),
    Column("outcome", Text, nullable=False),
    Column("record", LargeBinary, nullable=False),
    Column("decision", LargeBinary, nullable=False),
    Column("key", Text),
    Index("requests_by_end", "ended_us", "id", "project", "role", "model", "instance", "outcome", "key"),
    sqlite_autoincrement=True,
)


def from_instance(row: InstanceRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "target": row.target.value,
        "operation": row.operation and row.operation.value,
        "ttl_s": row.ttl_s,
        "pinned": row.pinned,
        "starts": row.starts,
        "loopback_port": row.loopback_port,
        "last_used_at": stored(row.last_used_at),
        "recreated_at": stored(row.recreated_at),
        "usage": row.usage and _from_usage(row.usage),
    }


def to_instance(row: Row[Any]) -> InstanceRow:
    return InstanceRow(
        id=row.id,
        target=Target(row.target),
        operation=None if row.operation is None else Operation(row.operation),
        ttl_s=row.ttl_s,
        pinned=row.pinned,
        starts=row.starts,
        loopback_port=row.loopback_port,
        last_used_at=row.last_used_at and aware(row.last_used_at),
        recreated_at=row.recreated_at and aware(row.recreated_at),
        usage=None if row.usage is None else _to_usage(row.usage),
    )


def from_event(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "at": stored(event.at),
        "instance": event.instance,
        "kind": event.kind,
        "reason": event.reason,
        "detail": event.detail,
    }


def to_event(row: Row[Any]) -> Event:
    return Event(
        id=row.id,
        at=aware(row.at),
        instance=row.instance,
        kind=row.kind,
        reason=row.reason,
        detail=row.detail,
    )


def from_learned_size(size: LearnedSize) -> dict[str, Any]:
    return {
        "instance": size.instance,
        "model": size.model,
        "digest": size.digest,
        "vram_bytes": size.vram_bytes,
        "measured_at": stored(size.measured_at),
        "by_card": dict(size.by_card) or None,
    }


def to_learned_size(row: Row[Any]) -> LearnedSize:
    return LearnedSize(
        instance=row.instance,
        model=row.model,
        digest=row.digest,
        vram_bytes=row.vram_bytes,
        measured_at=aware(row.measured_at),
        by_card=_to_shares(row.by_card or {}),
    )


def _to_shares(stored: object) -> dict[str, int]:
    if not isinstance(stored, dict) or not all(type(share) is int for share in stored.values()):
        raise TypeError(f"the shares of a learned size are no numbers by card: {stored!r}")
    return stored


def value_text(value: Any) -> str:
    """Return the text that values of settings are compared by: to Python 1 and true are equal.

    SQLite gives a number without a fraction back as a whole one: a column of type JSON has numeric affinity
    (sqlite.org/datatype3.html, 3.1).
    """
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def from_overrides(values: Mapping[str, Any], at: datetime) -> list[dict[str, Any]]:
    return [{"key": key, "value": value, "saved_at": stored(at)} for key, value in values.items()]


def from_model_list(volume: str, entries: Sequence[Mapping[str, Any]], at: datetime) -> dict[str, Any]:
    return {"volume": volume, "entries": list(entries), "read_at": stored(at)}


def to_model_list(row: Row[Any]) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(row.entries, list) or not all(isinstance(entry, dict) for entry in row.entries):
        raise TypeError(f"the models of {row.volume} are no list of objects")
    return tuple(row.entries)


def from_order(instance: str, kind: str, value: Mapping[str, Any], at: datetime) -> dict[str, Any]:
    return {"instance": instance, "kind": kind, "value": dict(value), "saved_at": stored(at)}


def to_order(row: Row[Any]) -> Mapping[str, Any]:
    if not isinstance(row.value, dict):
        raise TypeError(f"the order {row.kind!r} for {row.instance} is no object")
    return row.value


def storable(text: str) -> str:
    """Return a text with its lone surrogates escaped: SQLite has no form for them."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def stored(at: datetime | None) -> datetime | None:
    if at is None:
        return None
    if at.tzinfo is None:
        raise ValueError(f"{at!r} has no time zone: whether it is UTC cannot be known")
    return at.astimezone(UTC).replace(tzinfo=None)


def aware(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC)


def _from_usage(usage: UsageSample) -> dict[str, Any]:
    return {
        "at": usage.at,
        "network_bytes": usage.network_bytes,
        "own_bytes": usage.own_bytes,
        "cpu_s": usage.cpu_s,
        "expirations": [[name, expiry and expiry.isoformat()] for name, expiry in usage.expirations],
    }


def _to_usage(stored: dict[str, Any]) -> UsageSample:
    return UsageSample(
        at=stored["at"],
        network_bytes=stored["network_bytes"],
        own_bytes=stored["own_bytes"],
        cpu_s=stored["cpu_s"],
        expirations=tuple(
            (name, None if expiry is None else datetime.fromisoformat(expiry))
            for name, expiry in stored["expirations"]
        ),
    )
