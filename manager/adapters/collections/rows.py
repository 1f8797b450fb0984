"""Rows of the store of collections, from and to the values of the domain."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from manager.adapters.registry.tables import storable
from manager.domain.embeddings import (
    Backfill,
    BackfillStatus,
    Collection,
    Failure,
    Recipe,
    Version,
    VersionState,
)
from manager.services.embeddings.ports import Found, StoredItem

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Sequence

Row: TypeAlias = "tuple[Any, ...]"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

# The columns that the functions below read and write, in their order.
COLLECTION: Final = "name, model, prefix, asked, truncates, keeps_text, created_at"
VERSION: Final = (
    "collection, model, digest, dimensions, prefix, truncates, asked, "
    "state, created_at, activated_at, archived_at, stale_since, policy"
)
BACKFILL: Final = (
    "collection, version, status, threshold, rate, auto_cutover, project, started_at, ended_at, error"
)
ITEM: Final = "number, id, text, metadata, created_at"


def microseconds(at: datetime) -> int:
    """Return a time as microseconds since 1970.

    Raises:
        ValueError: it has no time zone.
    """
    if at.tzinfo is None:
        raise ValueError(f"{at!r} has no time zone: whether it is UTC cannot be known")
    return (at - _EPOCH) // _MICROSECOND


def time(at_us: int) -> datetime:
    return _EPOCH + at_us * _MICROSECOND


def _microseconds_or_none(at: datetime | None) -> int | None:
    return None if at is None else microseconds(at)


def _time_or_none(at_us: int | None) -> datetime | None:
    return None if at_us is None else time(at_us)


def from_collection(one: Collection) -> Row:
    return (
        one.name,
        one.model,
        one.prefix,
        one.asked,
        one.truncate,
        one.keep_text,
        microseconds(one.created_at),
    )


def to_collection(row: Row) -> Collection:
    key, name, model, prefix, asked, truncates, keeps_text, created_at = row
    return Collection(key, name, model, prefix, asked, bool(truncates), bool(keeps_text), time(created_at))


def from_version(one: Version) -> Row:
    recipe = one.recipe
    return (
        one.collection,
        recipe.model,
        recipe.digest,
        recipe.dimensions,
        recipe.prefix,
        recipe.truncate,
        recipe.asked,
        one.state.value,
        microseconds(one.created_at),
        *map(_microseconds_or_none, (one.activated_at, one.archived_at, one.stale_since)),
        one.policy,
    )


def to_version(row: Row) -> Version:
    (
        key,
        collection,
        model,
        digest,
        dimensions,
        prefix,
        truncates,
        asked,
        state,
        created_at,
        *times,
        policy,
    ) = row
    recipe = Recipe(model, digest, dimensions, prefix, truncate=bool(truncates), asked=asked)
    activated_at, archived_at, stale_since = map(_time_or_none, times)
    return Version(
        key,
        collection,
        recipe,
        VersionState(state),
        time(created_at),
        activated_at,
        archived_at,
        stale_since,
        policy,
    )


def from_backfill(one: Backfill) -> Row:
    return (
        one.collection,
        one.version,
        one.status.value,
        one.threshold,
        one.rate,
        one.auto_cutover,
        storable(one.project),
        microseconds(one.started_at),
        _microseconds_or_none(one.ended_at),
        None if one.error is None else storable(one.error),
    )


def to_backfill(row: Row) -> Backfill:
    collection, version, status, threshold, rate, auto_cutover, project, started_at, ended_at, error = row
    return Backfill(
        collection,
        version,
        BackfillStatus(status),
        threshold,
        rate,
        auto_cutover=bool(auto_cutover),
        project=project,
        started_at=time(started_at),
        ended_at=_time_or_none(ended_at),
        error=error,
    )


def from_item(collection: int, one: StoredItem) -> Row:
    return one.number, collection, one.id, one.metadata, microseconds(one.created_at), one.text


def to_item(row: Row) -> StoredItem:
    number, id_, text, metadata, created_at = row
    return StoredItem(number, id_, text, metadata, time(created_at))


def to_found(row: Row) -> Found:
    number, id_, metadata, at = row
    return Found(number, id_, metadata, time(at))


def to_failure(row: Row) -> Failure:
    id_, attempts, message, is_quarantined = row
    return Failure(id_, attempts, message, bool(is_quarantined))


def marks_of(columns: int, rows: int) -> str:
    """Return the question marks of `rows` rows in one statement."""
    return ", ".join([f"({', '.join('?' * columns)})"] * rows)


def chunks(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


@contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """Let several statements see one state."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("COMMIT")
