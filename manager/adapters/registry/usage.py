"""The sums of usage by hour and by day. They are written with the requests, in the same transactions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, LargeBinary, Table, Text

from manager.adapters.registry.dialects import Whole
from manager.adapters.registry.tables import metadata
from manager.domain.usage import (
    DAY_S,
    HOUR_S,
    LATENCY_BYTES,
    OTHER,
    Dimension,
    Group,
    Span,
    Sums,
    added,
    covered,
    sums_of,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Sequence

    from manager.domain.usage import Sample

# Groups of one hour or day. The requests of all further ones are counted together, under `other`.
MOST_GROUPS = 2000
# The time that hours are kept. The settings say how long days are.
HOURS_KEPT_S = 100 * DAY_S
_TABLES = (("usage_hours", HOUR_S), ("usage_days", DAY_S))


def _table(name: str) -> Table:
    return Table(
        name,
        metadata,
        Column("begins", Whole, primary_key=True),
        Column("project", Text, primary_key=True),
        Column("key", Text, primary_key=True),
        Column("role", Text, primary_key=True),
        Column("model", Text, primary_key=True),
        Column("instance", Text, primary_key=True),
        Column("requests", Whole, nullable=False),
        Column("ok", Whole, nullable=False),
        Column("fallbacks", Whole, nullable=False),
        Column("input_tokens", Whole, nullable=False),
        Column("output_tokens", Whole, nullable=False),
        Column("cost_micro_usd", Whole, nullable=False),
        Column("answered_us", Whole, nullable=False),
        Column("latencies", LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )


usage_hours, usage_days = (_table(name) for name, _ in _TABLES)

_GROUP = "project, key, role, model, instance"
_SUMS = "requests, ok, fallbacks, input_tokens, output_tokens, cost_micro_usd, answered_us, latencies"
*_COUNTS, _LATENCIES = _SUMS.split(", ")
_TOTALS = ", ".join([*(f"sum({name})" for name in _COUNTS), f"latencies_sum({_LATENCIES})"])
_TIMES = {"day": "date(begins, 'unixepoch')", "hour": "strftime('%Y-%m-%dT%H:00:00Z', begins, 'unixepoch')"}
_IS_GROUP = "begins = ? AND project = ? AND key = ? AND role = ? AND model = ? AND instance = ?"


def add_usage(connection: sqlite3.Connection, samples: Sequence[Sample]) -> None:
    """Add samples to the sums of their hours and days, within the caller's transaction."""
    for table, seconds in _TABLES:
        for (begins, group), sums in added(samples, seconds).items():
            _add(connection, table, begins, group, sums)


def _add(connection: sqlite3.Connection, table: str, begins: int, group: Group, sums: Sums) -> None:
    stored = _stored(connection, table, begins, group)
    if stored is None and _is_full(connection, table, begins):
        group = Group(OTHER, OTHER, OTHER, OTHER, OTHER)
        stored = _stored(connection, table, begins, group)
    if stored is not None:
        sums.add(stored)
    values = (
        *(sums.requests, sums.ok, sums.fallbacks, sums.input_tokens, sums.output_tokens),
        *(sums.cost_micro_usd, sums.answered_us, sums.latencies.to_bytes(LATENCY_BYTES, "little")),
    )
    marks = ", ".join("?" * (1 + len(group) + len(values)))
    statement = f"INSERT OR REPLACE INTO {table} (begins, {_GROUP}, {_SUMS}) VALUES ({marks})"  # noqa: S608
    connection.execute(statement, (begins, *group, *values))


def _stored(connection: sqlite3.Connection, table: str, begins: int, group: Group) -> Sums | None:
    statement = f"SELECT {_SUMS} FROM {table} WHERE {_IS_GROUP}"  # noqa: S608  (constants)
    row = connection.execute(statement, (begins, *group)).fetchone()
    return None if row is None else _sums(row)


def _is_full(connection: sqlite3.Connection, table: str, begins: int) -> bool:
    statement = f"SELECT count(*) FROM {table} WHERE begins = ?"  # noqa: S608  (constants)
    return bool(connection.execute(statement, (begins,)).fetchone()[0] >= MOST_GROUPS)


class _Latencies:
    """An aggregate of SQL: the sum of latencies, lane by lane."""

    def __init__(self) -> None:
        self._sum = 0

    def step(self, lanes: bytes) -> None:
        self._sum += int.from_bytes(lanes, "little")

    def finalize(self) -> bytes:
        return self._sum.to_bytes(LATENCY_BYTES, "little")


def read_usage(
    connection: sqlite3.Connection, wanted: Span, by: Sequence[Dimension], *, now_s: int
) -> tuple[dict[tuple[str, ...], Sums], Span]:
    """Return the sums of a time by group, and the time that they are of: whole hours or days."""
    hours_since = (now_s - HOURS_KEPT_S) // DAY_S * DAY_S + DAY_S
    hours, days = covered(wanted, hours_since=hours_since, needs_hours="hour" in by)
    aggregate: Any = _Latencies  # typeshed takes only whole numbers for results
    connection.create_aggregate("latencies_sum", 1, aggregate)
    found: dict[tuple[str, ...], Sums] = {}
    for table, span in (("usage_days", days), *(("usage_hours", one) for one in hours)):
        for names, sums in _read(connection, table, span, by):
            found.setdefault(names, Sums()).add(sums)
    spans = [span for span in (*hours, days) if span.begins < span.ends]
    if not spans:  # all hours of that time are forgotten
        return found, Span(wanted.ends, wanted.ends)
    return found, Span(min(one.begins for one in spans), max(one.ends for one in spans))


def _read(
    connection: sqlite3.Connection, table: str, span: Span, by: Sequence[Dimension]
) -> Iterator[tuple[tuple[str, ...], Sums]]:
    names = [_TIMES.get(name, name) for name in by]
    groups = ", ".join(str(place + 1) for place in range(len(names)))
    statement = f"SELECT {', '.join([*names, _TOTALS])} FROM {table} WHERE begins >= ? AND begins < ?"  # noqa: S608
    if groups:
        statement += f" GROUP BY {groups}"
    for row in connection.execute(statement, span):
        if row[-2] is not None:  # one row of nothing, where there are no groups
            yield row[: len(names)], _sums(row[len(names) :])


_LAST_USE = """SELECT model, max(begins) FROM (
    SELECT model, begins FROM usage_hours WHERE instance != ''
    UNION ALL SELECT model, begins FROM usage_days WHERE instance != ''
) WHERE model != '' GROUP BY model"""
_LATELY = """SELECT begins, model, sum(requests), sum(input_tokens), sum(output_tokens) FROM usage_hours
WHERE begins >= ? AND instance != '' AND model != '' GROUP BY begins, model"""


def read_model_use(
    connection: sqlite3.Connection, since_s: int
) -> tuple[list[tuple[str, int]], list[tuple[int, str, int, int, int]]]:
    """Return the last use of each model, and the use in each hour from `since_s` on."""
    return connection.execute(_LAST_USE).fetchall(), connection.execute(_LATELY, (since_s,)).fetchall()


def forget_usage(connection: sqlite3.Connection, *, now_s: int, days: int) -> None:
    """Forget the hours and the days that are kept no longer."""
    connection.execute("DELETE FROM usage_hours WHERE begins < ?", (now_s - HOURS_KEPT_S,))
    connection.execute("DELETE FROM usage_days WHERE begins < ?", (now_s - days * DAY_S,))


def _sums(row: Sequence[Any]) -> Sums:
    return sums_of(row[:-1], int.from_bytes(row[-1], "little"))
