"""The table of documents: values by name, such as the owner that gateways share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from manager.adapters.registry import tables
from manager.adapters.registry.dialects import insert_new, upsert

if TYPE_CHECKING:
    from sqlalchemy import Connection


def load(connection: Connection, name: str) -> Any:
    """Return a value; None where there is none."""
    return connection.execute(
        select(tables.documents.c.value).where(tables.documents.c.name == name)
    ).scalar()


def save(connection: Connection, name: str, value: Any) -> None:
    connection.execute(upsert(connection, tables.documents), {"name": name, "value": value})


def save_new(connection: Connection, name: str, value: Any) -> None:
    """Store a value, unless there is one."""
    connection.execute(insert_new(connection, tables.documents), {"name": name, "value": value})
