"""Removal in slices. The owner of the rows goes first, so nobody sees them; then they go, some at a time.

`removed` names what is being removed, so that the next process goes on where this one ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import sqlite3

# Rows in one transaction. Other writes wait for so many at most.
SLICE = 2000
_VERSIONS_OF = "SELECT key FROM versions WHERE collection = ?"
_NOTE = "INSERT INTO removed (kind, key) VALUES (?, ?)"
_FORGET = "DELETE FROM removed WHERE kind = ? AND key = ?"
_PENDING = "SELECT kind, key FROM removed ORDER BY kind DESC, key"
_ROWS_OF_VERSION = tuple(
    f"""DELETE FROM {table} WHERE version = ?1 AND number IN
    (SELECT number FROM {table} WHERE version = ?1 ORDER BY number LIMIT ?2)"""  # noqa: S608
    for table in ("vectors", "failures", "rubbish")
)
_ROWS_OF_COLLECTION = (
    """DELETE FROM items WHERE number IN
    (SELECT number FROM items WHERE collection = ?1 ORDER BY number LIMIT ?2)""",
)


class Removed(NamedTuple):
    """A collection or a version whose rows are being removed; `kind` is `collection` or `version`."""

    kind: str
    key: int


def remove_version(connection: sqlite3.Connection, version: int) -> list[Removed]:
    """Remove a version but its rows; return what is to be removed still."""
    connection.execute("DELETE FROM backfills WHERE version = ?", (version,))
    if not connection.execute("DELETE FROM versions WHERE key = ?", (version,)).rowcount:
        return []
    connection.execute(_NOTE, ("version", version))
    return [Removed("version", version)]


def remove_collection(connection: sqlite3.Connection, collection: int) -> list[Removed]:
    """Remove a collection and its versions but their rows; return what is to be removed still."""
    keys = [row[0] for row in connection.execute(_VERSIONS_OF, (collection,))]
    # Versions go first: an item has no vectors any more when its turn comes.
    left = [one for key in keys for one in remove_version(connection, key)]
    if not connection.execute("DELETE FROM collections WHERE key = ?", (collection,)).rowcount:
        return left
    connection.execute(_NOTE, ("collection", collection))
    return [*left, Removed("collection", collection)]


def pending(connection: sqlite3.Connection) -> list[Removed]:
    """Return what an earlier process has not removed, versions first."""
    return [Removed(*row) for row in connection.execute(_PENDING)]


def remove_rows(connection: sqlite3.Connection, removed: Removed) -> bool:
    """Remove some rows; return whether that were all."""
    left = SLICE
    for statement in _ROWS_OF_VERSION if removed.kind == "version" else _ROWS_OF_COLLECTION:
        left -= connection.execute(statement, (removed.key, left)).rowcount
        if left <= 0:
            return False
    connection.execute(_FORGET, removed)
    return True
