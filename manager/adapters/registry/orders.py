"""The orders of operators for instances."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import delete, select

from manager.adapters.registry import tables
from manager.adapters.registry.dialects import upsert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Connection

    from manager.domain.registry import OrderKind

T = TypeVar("T")

_TABLE = tables.operator_state


def load(connection: Connection, kind: OrderKind, read: Callable[[Mapping[str, Any]], T]) -> dict[str, T]:
    found = connection.execute(select(_TABLE).where(_TABLE.c.kind == kind))
    return {row.instance: read(tables.to_order(row)) for row in found}


def save(connection: Connection, instance: str, kind: OrderKind, value: Mapping[str, Any] | None) -> None:
    """Store an order in place of an earlier one; None forgets it."""
    if value is None:
        connection.execute(delete(_TABLE).where(_TABLE.c.instance == instance, _TABLE.c.kind == kind))
    else:
        row = tables.from_order(instance, kind, value, datetime.now(UTC))
        connection.execute(upsert(connection, _TABLE), row)


def end(connection: Connection, instance: str, kind: OrderKind, until: datetime) -> None:
    """Forget an order that ends at that time; one that another gateway has stored since then stays."""
    which = (_TABLE.c.instance == instance, _TABLE.c.kind == kind)
    row = connection.execute(select(_TABLE).where(*which).with_for_update()).first()
    if row is not None and tables.to_order(row).get("until") == until.isoformat():
        connection.execute(delete(_TABLE).where(*which))
