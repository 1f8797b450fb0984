"""What a version lacks, what failed in it, and what its table has in vain: the SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from manager.adapters.collections.catalogue import counts
from manager.adapters.collections.rows import ITEM, microseconds, snapshot, to_failure, to_item
from manager.adapters.registry.tables import storable
from manager.domain.embeddings import MOST_FAILURES
from manager.services.embeddings.ports import Lacking

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence
    from datetime import datetime

    from manager.domain.embeddings import Failure
    from manager.services.embeddings.ports import StoredItem

_THESE = "(SELECT value FROM json_each(?))"
_IS_VERSION = "EXISTS (SELECT 1 FROM versions WHERE key = ?)"
_COLLECTION = "SELECT collection FROM versions WHERE key = ?"
_MISSING = """FROM items INDEXED BY items_in_order WHERE collection = ? AND number > ?
    AND NOT EXISTS (SELECT 1 FROM vectors WHERE version = ? AND vectors.number = items.number)
    AND NOT EXISTS (SELECT 1 FROM failures
        WHERE version = ? AND failures.number = items.number AND is_quarantined)
    ORDER BY number LIMIT ?"""
_MISSING_ITEMS = f"SELECT {ITEM} {_MISSING}"
_MISSING_IDS = f"SELECT id {_MISSING}"
_MARK = f"""INSERT INTO vectors (version, number, at)
    SELECT ?, number, ? FROM items WHERE number IN {_THESE} AND collection = ?
    ON CONFLICT (version, number) DO UPDATE SET at = excluded.at"""  # noqa: S608
_FAIL = f"""INSERT INTO failures (version, number, attempts, message, is_quarantined)
    SELECT key, number, 1, ?, ? OR 1 >= {MOST_FAILURES} FROM versions JOIN items USING (collection)
    WHERE key = ? AND number = ?
    AND NOT EXISTS (SELECT 1 FROM vectors WHERE version = key AND vectors.number = items.number)
    ON CONFLICT (version, number) DO UPDATE SET attempts = attempts + 1, message = excluded.message,
    is_quarantined = is_quarantined OR excluded.is_quarantined OR attempts + 1 >= {MOST_FAILURES}"""  # noqa: S608
_FAILURES = "SELECT id, attempts, message, is_quarantined FROM failures JOIN items USING (number)"
_FAILURE = f"{_FAILURES} WHERE version = ? AND number = ?"
_ALL_FAILURES = f"{_FAILURES} WHERE version = ? AND {_IS_VERSION} ORDER BY number LIMIT ?"
_QUARANTINED = f"""SELECT id FROM failures JOIN items USING (number)
    WHERE version = ? AND is_quarantined AND {_IS_VERSION} ORDER BY number LIMIT ?"""  # noqa: S608
_UNMARK = f"DELETE FROM vectors WHERE version = ? AND number IN {_THESE}"  # noqa: S608
_UNMARK_ALL = "DELETE FROM vectors WHERE version = ?"
_LEAVES_RUBBISH = "UPDATE versions SET leaves_rubbish = ? WHERE key = ?"
_RUBBISH = f"SELECT number FROM rubbish WHERE version = ? AND {_IS_VERSION} ORDER BY number LIMIT ?"  # noqa: S608
_ADD_RUBBISH = """INSERT OR IGNORE INTO rubbish
    SELECT versions.key, one.value FROM versions JOIN json_each(?) AS one WHERE versions.key = ?
    AND NOT EXISTS (SELECT 1 FROM vectors WHERE version = versions.key AND number = one.value)"""
_SWEPT = f"DELETE FROM rubbish WHERE version = ? AND number IN {_THESE}"  # noqa: S608
_SWEPT_ALL = "DELETE FROM rubbish WHERE version = ?"


def missing(connection: sqlite3.Connection, version: int, after: int, limit: int) -> tuple[StoredItem, ...]:
    with snapshot(connection):
        collection = _lacks(connection, version)
        if collection is None:
            return ()
        values = (collection, after, version, version, max(0, limit))
        return tuple(map(to_item, connection.execute(_MISSING_ITEMS, values)))


def lacking(connection: sqlite3.Connection, version: int, limit: int) -> Lacking:
    with snapshot(connection):
        collection = _lacks(connection, version)
        missing: list[tuple[str]] = []
        if collection is not None:
            values = (collection, 0, version, version, max(0, limit))
            missing = connection.execute(_MISSING_IDS, values).fetchall()
        quarantined = connection.execute(_QUARANTINED, (version, version, max(0, limit))).fetchall()
    return Lacking(tuple(row[0] for row in missing), tuple(row[0] for row in quarantined))


def mark(connection: sqlite3.Connection, version: int, numbers: Sequence[int], at: datetime) -> int:
    row = connection.execute(_COLLECTION, (version,)).fetchone()
    if row is None:
        return 0
    these = _json(numbers)
    marked = connection.execute(_MARK, (version, microseconds(at), these, row[0])).rowcount
    add_rubbish(connection, version, numbers)
    return marked


def failed(
    connection: sqlite3.Connection, version: int, number: int, message: str, *, at_once: bool
) -> Failure | None:
    if not connection.execute(_FAIL, (storable(message), at_once, version, number)).rowcount:
        return None
    return to_failure(connection.execute(_FAILURE, (version, number)).fetchone())


def failures(connection: sqlite3.Connection, version: int, limit: int) -> tuple[Failure, ...]:
    rows = connection.execute(_ALL_FAILURES, (version, version, max(0, limit)))
    return tuple(map(to_failure, rows))


def unmark(connection: sqlite3.Connection, version: int, numbers: Sequence[int] | None) -> int:
    if connection.execute(_COLLECTION, (version,)).fetchone() is None:
        return 0
    if numbers is not None:
        return connection.execute(_UNMARK, (version, _json(numbers))).rowcount
    connection.execute(_LEAVES_RUBBISH, (False, version))
    had = connection.execute(_UNMARK_ALL, (version,)).rowcount
    connection.execute(_SWEPT_ALL, (version,))
    connection.execute(_LEAVES_RUBBISH, (True, version))
    return had


def rubbish(connection: sqlite3.Connection, version: int, limit: int) -> tuple[int, ...]:
    return tuple(row[0] for row in connection.execute(_RUBBISH, (version, version, max(0, limit))))


def add_rubbish(connection: sqlite3.Connection, version: int, numbers: Sequence[int]) -> None:
    """Note rows that nobody needs; one that an item has is needed."""
    connection.execute(_ADD_RUBBISH, (_json(numbers), version))


def swept(connection: sqlite3.Connection, version: int, numbers: Sequence[int]) -> None:
    connection.execute(_SWEPT, (version, _json(numbers)))


def _lacks(connection: sqlite3.Connection, version: int) -> int | None:
    """Return the collection of a version, None where no item lacks a vector: a look would read all items."""
    known = counts(connection, version)
    if known is None or known.missing <= 0:
        return None
    return int(connection.execute(_COLLECTION, (version,)).fetchone()[0])


def _json(numbers: Sequence[int]) -> str:
    return orjson.dumps([*numbers]).decode()
