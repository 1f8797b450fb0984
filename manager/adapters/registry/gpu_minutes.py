"""The table of what was read of the cards: a row for each minute, with all cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import Column, LargeBinary, Table, delete, select

from manager.adapters.registry.dialects import Whole, upsert
from manager.adapters.registry.tables import metadata
from manager.domain.gpu_history import CardMinute, sample_from, sample_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Connection

gpu_minutes = Table(
    "gpu_minutes",
    metadata,
    Column("begins", Whole, primary_key=True),
    Column("cards", LargeBinary, nullable=False),
)


def save(connection: Connection, minutes: Mapping[int, Sequence[CardMinute]], before_s: int) -> None:
    """Store minutes in place of earlier ones, and forget those that began before a time."""
    rows = [{"begins": begins, "cards": _encoded(cards)} for begins, cards in minutes.items()]
    if rows:
        connection.execute(upsert(connection, gpu_minutes), rows)
    connection.execute(delete(gpu_minutes).where(gpu_minutes.c.begins < before_s))


def load(connection: Connection, since_s: int) -> dict[int, tuple[CardMinute, ...]]:
    """Return the minutes since a time, in order."""
    statement = select(gpu_minutes).where(gpu_minutes.c.begins >= since_s).order_by(gpu_minutes.c.begins)
    return {row.begins: _decoded(row.cards) for row in connection.execute(statement)}


def _encoded(cards: Sequence[CardMinute]) -> bytes:
    return orjson.dumps([[one.uuid, one.name, one.total_bytes, sample_values(one.sample)] for one in cards])


def _decoded(encoded: bytes) -> tuple[CardMinute, ...]:
    document: Any = orjson.loads(encoded)
    return tuple([CardMinute(uuid, name, total, sample_from(it)) for uuid, name, total, it in document])
