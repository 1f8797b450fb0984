"""Collections, their versions and backfills: the SQL."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from manager.adapters.collections.rows import (
    BACKFILL,
    COLLECTION,
    VERSION,
    from_backfill,
    from_collection,
    from_version,
    to_backfill,
    to_collection,
    to_version,
)
from manager.domain.embeddings import Counts, VersionState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from manager.domain.embeddings import Backfill, Collection, Version

_COLLECTIONS = f"SELECT key, {COLLECTION} FROM collections ORDER BY key"  # noqa: S608
_VERSIONS = f"SELECT key, {VERSION} FROM versions ORDER BY key"  # noqa: S608
_BACKFILLS = f"SELECT {BACKFILL} FROM backfills ORDER BY collection"  # noqa: S608
_CREATE = f"INSERT INTO collections ({COLLECTION}) VALUES (?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
_SAVE_COLLECTION = f"UPDATE collections SET ({COLLECTION}) = (?, ?, ?, ?, ?, ?, ?) WHERE key = ?"  # noqa: S608
_ADD_VERSION = f"INSERT INTO versions ({VERSION}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
_SAVE_VERSION = f"""UPDATE versions SET ({VERSION}) = (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    WHERE key = ?"""  # noqa: S608
# A backfill whose version was removed meanwhile is not stored.
_SAVE_BACKFILL = f"""INSERT OR REPLACE INTO backfills ({BACKFILL})
    SELECT collection, key, ?, ?, ?, ?, ?, ?, ?, ? FROM versions WHERE collection = ? AND key = ?"""  # noqa: S608
_FORGET_FAILURES = "DELETE FROM failures WHERE version = ?"
_COUNTS = """SELECT versions.key, items, vectors, quarantined
    FROM versions JOIN collections ON collections.key = versions.collection"""
_COUNTS_OF = f"{_COUNTS} WHERE versions.key = ?"
_ITEM_COUNTS = "SELECT key, items FROM collections"


def collections(connection: sqlite3.Connection) -> tuple[Collection, ...]:
    return tuple(map(to_collection, connection.execute(_COLLECTIONS)))


def versions(connection: sqlite3.Connection) -> tuple[Version, ...]:
    return tuple(map(to_version, connection.execute(_VERSIONS)))


def backfills(connection: sqlite3.Connection) -> tuple[Backfill, ...]:
    return tuple(map(to_backfill, connection.execute(_BACKFILLS)))


def create(connection: sqlite3.Connection, collection: Collection) -> int:
    try:
        return _key(connection.execute(_CREATE, from_collection(collection)))
    except sqlite3.IntegrityError as error:
        raise ValueError(f"there is a collection {collection.name} already") from error


def add_version(connection: sqlite3.Connection, version: Version) -> int:
    return _key(connection.execute(_ADD_VERSION, from_version(version)))


def save_versions(connection: sqlite3.Connection, versions: Sequence[Version]) -> None:
    # The one that becomes active comes last: at no time may two of a collection be active.
    for version in sorted(versions, key=lambda one: one.state is VersionState.ACTIVE):
        connection.execute(_SAVE_VERSION, (*from_version(version), version.key))


def save_backfill(connection: sqlite3.Connection, backfill: Backfill) -> None:
    collection, version, *values = from_backfill(backfill)
    connection.execute(_SAVE_BACKFILL, (*values, collection, version))


def begin_backfill(connection: sqlite3.Connection, backfill: Backfill, changed: Sequence[Version]) -> None:
    save_versions(connection, changed)
    save_backfill(connection, backfill)
    connection.execute(_FORGET_FAILURES, (backfill.version,))


def switch(
    connection: sqlite3.Connection,
    wanted: Version,
    replaced: Version | None,
    collection: Collection,
    allowed: Callable[[Counts], bool],
) -> Counts | None:
    found = counts(connection, wanted.key)
    if found is None or not allowed(found):
        return found or Counts(0, 0)
    save_versions(connection, [wanted] if replaced is None else [wanted, replaced])
    connection.execute(_SAVE_COLLECTION, (*from_collection(collection), collection.key))
    return None


def counts(connection: sqlite3.Connection, version: int) -> Counts | None:
    """Return the counts of a version, None where there is no such version."""
    row = connection.execute(_COUNTS_OF, (version,)).fetchone()
    return None if row is None else Counts(*row[1:])


def all_counts(connection: sqlite3.Connection) -> dict[int, Counts]:
    return {key: Counts(*values) for key, *values in connection.execute(_COUNTS)}


def item_counts(connection: sqlite3.Connection) -> dict[int, int]:
    return dict(connection.execute(_ITEM_COUNTS).fetchall())


def _key(cursor: sqlite3.Cursor) -> int:
    key = cursor.lastrowid
    assert key is not None  # noqa: S101  (an INSERT has one)
    return key
