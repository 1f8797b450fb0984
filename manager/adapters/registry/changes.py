"""The counts of changes: gateways that share a database see by them what to read again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select, text

from manager.adapters.registry import tables

if TYPE_CHECKING:
    from sqlalchemy import Connection

_COUNT = text(
    "INSERT INTO changes (topic, number) VALUES (:topic, 1)"
    " ON CONFLICT (topic) DO UPDATE SET number = changes.number + 1"
)


def count(connection: Connection, topic: str) -> None:
    """Count a change, within the transaction that makes it."""
    connection.execute(_COUNT, {"topic": topic})


def load(connection: Connection) -> dict[str, int]:
    return {row.topic: row.number for row in connection.execute(select(tables.changes))}
