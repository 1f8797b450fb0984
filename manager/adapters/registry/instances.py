"""The rows of instances: of one gateway, and the part of them that gateways share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from manager.adapters.registry.dialects import insert_or, upsert
from manager.adapters.registry.tables import from_instance, to_instance
from manager.adapters.registry.tables import instances as _table
from manager.domain.registry import InstanceRow, PinAndTtl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection


def load(connection: Connection) -> dict[str, InstanceRow]:
    return {row.id: to_instance(row) for row in connection.execute(select(_table))}


def merged(own: Mapping[str, InstanceRow], shared: Mapping[str, InstanceRow]) -> dict[str, InstanceRow]:
    """Return the rows of a gateway with what it shares with others."""
    rows = {}
    for instance in (*own, *(one for one in shared if one not in own)):
        of_all = shared.get(instance, InstanceRow(instance))
        rows[instance] = replace(
            own.get(instance, InstanceRow(instance)),
            pinned=of_all.pinned,
            ttl_s=of_all.ttl_s,
            loopback_port=of_all.loopback_port,
        )
    return rows


def save(connection: Connection, row: InstanceRow) -> None:
    connection.execute(upsert(connection, _table), from_instance(row))


def save_new_port(connection: Connection, row: InstanceRow) -> None:
    """Store the port of an instance, unless it has one."""
    first = from_instance(InstanceRow(row.id, loopback_port=row.loopback_port))
    _save(connection, first, {"loopback_port": func.coalesce(_table.c.loopback_port, row.loopback_port)})


def pins_and_ttls(connection: Connection) -> dict[str, PinAndTtl]:
    found = connection.execute(select(_table.c.id, _table.c.pinned, _table.c.ttl_s))
    return {row.id: PinAndTtl(pinned=row.pinned, ttl_s=row.ttl_s) for row in found}


def save_pin_and_ttl(connection: Connection, instance: str, values: PinAndTtl) -> None:
    """Store those of the two that are given, and leave the rest of the row as it is."""
    _save(connection, from_instance(InstanceRow(instance, **values)), {**values})


def _save(connection: Connection, first: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
    """Store the first row of an instance, or change columns of the one that there is."""
    statement = insert_or(connection, _table).values(first)
    connection.execute(statement.on_conflict_do_update(index_elements=[_table.c.id], set_=changed))
