"""Items, and which of them have vectors: the SQL. What is being removed is not seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from manager.adapters.collections.rows import (
    ITEM,
    chunks,
    from_item,
    marks_of,
    snapshot,
    time,
    to_found,
    to_item,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from manager.services.embeddings.ports import Found, StoredItem

# A statement gives up the interpreter's lock once, so that a busy event loop holds up few of them.
_MANY = 100
_IS_THERE = "EXISTS (SELECT 1 FROM collections WHERE key = ?)"
_IS_ACTIVE = "SELECT 1 FROM versions WHERE collection = ? AND state = 'active' AND key = ?"
_IS_VERSION = "SELECT 1 FROM versions WHERE key = ? AND collection = ?"
_REPLACE = "DELETE FROM items WHERE collection = ? AND id IN"
_ADD = "INSERT INTO items (number, collection, id, metadata, created_at, text) VALUES"
_MARK = """INSERT INTO vectors (version, number, at)
    SELECT ?, number, created_at FROM items
    WHERE number IN (SELECT value FROM json_each(?)) AND collection = ?"""
_DELETE = f"DELETE FROM items WHERE collection = ? AND id = ? AND {_IS_THERE}"  # noqa: S608
_ITEM = f"SELECT {ITEM} FROM items WHERE collection = ? AND id = ? AND {_IS_THERE}"  # noqa: S608
_VECTORS = "SELECT version, at FROM vectors JOIN versions ON key = version WHERE number = ? ORDER BY version"
_PAGE = f"""SELECT {ITEM} FROM items WHERE collection = ? AND id > ? AND {_IS_THERE}
    ORDER BY id LIMIT ?"""  # noqa: S608
_FIRST_PAGE = _PAGE.replace("id > ?", "id >= ?")
_FOUND = """SELECT number, items.id, metadata, at FROM json_each(?) AS one
    CROSS JOIN vectors ON number = one.value AND version = ? CROSS JOIN items USING (number)
    WHERE EXISTS (SELECT 1 FROM versions WHERE key = version)"""
_METADATA = """SELECT number, metadata FROM vectors CROSS JOIN items USING (number)
    WHERE version = ? AND number > ? AND EXISTS (SELECT 1 FROM versions WHERE key = version)
    ORDER BY number LIMIT ?"""
_MARKED = """SELECT number FROM vectors
    WHERE version = ? AND number > ? AND EXISTS (SELECT 1 FROM versions WHERE key = version)
    ORDER BY number LIMIT ?"""


def put(
    connection: sqlite3.Connection,
    collection: int,
    items: Sequence[StoredItem],
    marks: Mapping[int, Sequence[int]],
    active: int,
) -> bool:
    """Store items and marks.

    Raises:
        ValueError: an id is there twice, or a number was used before; nothing may be stored.
    """
    if connection.execute(_IS_ACTIVE, (collection, active)).fetchone() is None:
        return False
    if len({item.id for item in items}) < len(items):
        raise ValueError("expected each id once")
    for some in chunks(items, _MANY):
        connection.execute(f"{_REPLACE} {marks_of(len(some), 1)}", (collection, *(one.id for one in some)))
        values = [value for one in some for value in from_item(collection, one)]
        connection.execute(f"{_ADD} {marks_of(6, len(some))}", values)
    for version, numbers in marks.items():
        # A version that was removed meanwhile has no table any more.
        if connection.execute(_IS_VERSION, (version, collection)).fetchone() is not None:
            wanted = set(numbers)
            stored = connection.execute(_MARK, (version, orjson.dumps([*wanted]).decode(), collection))
            if stored.rowcount != len(wanted):
                raise ValueError(f"{len(wanted) - stored.rowcount} numbers are of no item")
    return True


def delete(connection: sqlite3.Connection, collection: int, item: str) -> bool:
    return connection.execute(_DELETE, (collection, item, collection)).rowcount > 0


def item(
    connection: sqlite3.Connection, collection: int, item: str
) -> tuple[StoredItem, dict[int, datetime]] | None:
    with snapshot(connection):
        row = connection.execute(_ITEM, (collection, item, collection)).fetchone()
        if row is None:
            return None
        found = to_item(row)
        return found, {version: time(at) for version, at in connection.execute(_VECTORS, (found.number,))}


def page(
    connection: sqlite3.Connection, collection: int, after: str | None, limit: int
) -> tuple[StoredItem, ...]:
    statement, first = (_FIRST_PAGE, "") if after is None else (_PAGE, after)
    return tuple(map(to_item, connection.execute(statement, (collection, first, collection, max(0, limit)))))


def found(connection: sqlite3.Connection, version: int, numbers: Sequence[int]) -> dict[int, Found]:
    rows = connection.execute(_FOUND, (orjson.dumps([*set(numbers)]).decode(), version))
    return {row[0]: to_found(row) for row in rows}


def metadata_after(
    connection: sqlite3.Connection, version: int, after: int, limit: int
) -> list[tuple[int, bytes]]:
    """Return numbers and metadata of items with a vector in the version, behind a number, in order."""
    return connection.execute(_METADATA, (version, after, limit)).fetchall()


def marked_after(connection: sqlite3.Connection, version: int, after: int, limit: int) -> list[tuple[int]]:
    """Return numbers of items with a vector in the version, behind a number, in order."""
    return connection.execute(_MARKED, (version, after, limit)).fetchall()


def wanted(rows: list[tuple[int, bytes]], is_wanted: Callable[[Mapping[str, Any]], bool]) -> list[int]:
    """Return the numbers whose metadata are wanted; what is no JSON is not."""
    numbers: list[int] = []
    for number, metadata in rows:
        try:
            values = orjson.loads(metadata)
        except orjson.JSONDecodeError:
            continue
        if is_wanted(values):
            numbers.append(number)
    return numbers
