"""The table of benchmarks: a row for each, with its figures and the requests that were measured."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import orjson
from sqlalchemy import JSON, Column, DateTime, LargeBinary, String, Table, Text, delete, func, select

from manager.adapters.registry.dialects import Whole, upsert
from manager.adapters.registry.tables import aware, metadata, storable, stored
from manager.domain.benchmark_results import OPEN, Benchmark, BenchmarkStatus
from manager.domain.benchmarks import Figure, Group, Sample, Target

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, Row

benchmarks = Table(
    "benchmarks",
    metadata,
    Column("number", Whole, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("status", String, nullable=False),
    Column("source", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("workloads", JSON, nullable=False),
    Column("targets", JSON, nullable=False),
    Column("repeat", Whole, nullable=False),
    Column("total", Whole, nullable=False),
    Column("done", Whole, nullable=False),
    Column("created_at", DateTime, nullable=False),
    Column("started_at", DateTime),
    Column("ended_at", DateTime),
    Column("error", Text),
    Column("groups", LargeBinary, nullable=False),
    Column("samples", LargeBinary, nullable=False),
)

# All that a list shows: the requests of a benchmark are read for one of them only.
_LISTED = [column for column in benchmarks.c if column.name != "samples"]
_OPEN = sorted(OPEN)


def save(connection: Connection, benchmark: Benchmark, samples: Sequence[Sample], kept: int) -> None:
    """Store a benchmark in place of an earlier state of it; forget the oldest ended ones beyond `kept`."""
    values = _from_benchmark(benchmark, samples)
    connection.execute(upsert(connection, benchmarks), values)
    has_ended = benchmarks.c.status.not_in(_OPEN)
    beyond = select(benchmarks.c.number).where(has_ended).order_by(benchmarks.c.number.desc())
    last = beyond.offset(kept).limit(1).scalar_subquery()
    connection.execute(delete(benchmarks).where(has_ended & (benchmarks.c.number <= last)))


def load(connection: Connection) -> tuple[Benchmark, ...]:
    """Return all of them, the newest first."""
    statement = select(*_LISTED).order_by(benchmarks.c.number.desc())
    return tuple(map(_to_benchmark, connection.execute(statement)))


def find(connection: Connection, benchmark_id: str) -> tuple[Benchmark, tuple[Sample, ...]] | None:
    row = connection.execute(select(benchmarks).where(benchmarks.c.id == benchmark_id)).first()
    if row is None:
        return None
    return _to_benchmark(row), tuple([Sample(*values) for values in orjson.loads(row.samples)])


def last_number(connection: Connection) -> int:
    return connection.execute(select(func.max(benchmarks.c.number))).scalar() or 0


def forget(connection: Connection, benchmark_id: str) -> None:
    connection.execute(delete(benchmarks).where(benchmarks.c.id == benchmark_id))


def _from_benchmark(one: Benchmark, samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "number": one.number,
        "id": one.id,
        "status": one.status.value,
        "source": storable(one.source),
        "project": storable(one.project),
        "workloads": list(one.workloads),
        "targets": [list(target) for target in one.targets],
        "repeat": one.repeat,
        "total": one.total,
        "done": one.done,
        "created_at": stored(one.created_at),
        "started_at": stored(one.started_at),
        "ended_at": stored(one.ended_at),
        "error": one.error and storable(one.error),
        "groups": orjson.dumps([_group_values(group) for group in one.groups]),
        "samples": orjson.dumps([_sample_values(sample) for sample in samples]),
    }


def _to_benchmark(row: Row[Any]) -> Benchmark:
    return Benchmark(
        number=row.number,
        id=row.id,
        status=BenchmarkStatus(row.status),
        source=row.source,
        project=row.project,
        workloads=tuple(row.workloads),
        targets=tuple([Target(*pair) for pair in row.targets]),
        repeat=row.repeat,
        total=row.total,
        done=row.done,
        created_at=aware(row.created_at),
        started_at=row.started_at and aware(row.started_at),
        ended_at=row.ended_at and aware(row.ended_at),
        error=row.error,
        groups=tuple([_to_group(values) for values in orjson.loads(row.groups)]),
    )


def _group_values(one: Group) -> list[Any]:
    figures = (one.ttft_ms, one.tokens_per_s, one.success, one.quality)
    return [one.workload, one.instance, one.model, *(list(astuple(figure)) for figure in figures)]


def _to_group(values: list[Any]) -> Group:
    workload, instance, model, *figures = values
    return Group(workload, instance, model, *(Figure(*figure) for figure in figures))


def _sample_values(one: Sample) -> list[Any]:
    *values, error = astuple(one)
    return [*values, error and storable(error)]
