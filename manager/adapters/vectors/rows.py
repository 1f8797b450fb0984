"""What the calls of the port do with an open table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.services.embeddings.ports import Hit

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from datetime import datetime

    import pyarrow as pa
    from lancedb.table import Table

    from manager.services.embeddings.ports import TableFacts, VectorRow

_FLOAT_BYTES = 4
# A longer list of numbers is sent in several statements.
_MOST_LISTED = 10_000
# One batch of rows that are read at a time; at 4,096 dimensions 64 MiB.
_BATCH_ROWS = 4096


class DimensionError(ValueError):
    """A vector does not have as many values as the table's vectors have."""


def schema_of(dim: int) -> pa.Schema:
    import pyarrow as pa  # noqa: PLC0415

    return pa.schema(
        [
            pa.field("number", pa.int64(), nullable=False),
            pa.field("id", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), dim), nullable=False),
            pa.field("embedding_model", pa.string(), nullable=False),
            pa.field("embedding_dim", pa.int32(), nullable=False),
            pa.field("embedding_version", pa.string(), nullable=False),
            pa.field("created_at", pa.timestamp("us", "UTC"), nullable=False),
        ]
    )


def arrow_of(facts: TableFacts, rows: Sequence[VectorRow], at: datetime) -> pa.Table:
    import pyarrow as pa  # noqa: PLC0415

    dim = facts.embedding_dim
    if any(len(row.vector) != dim * _FLOAT_BYTES for row in rows):
        raise DimensionError(f"a vector does not have {dim} values")
    count = len(rows)
    values = pa.Array.from_buffers(
        pa.float32(), count * dim, [None, pa.py_buffer(b"".join(row.vector for row in rows))]
    )
    schema = schema_of(dim)
    columns = [
        pa.array([row.number for row in rows], pa.int64()),
        pa.array([row.id for row in rows], pa.string()),
        pa.FixedSizeListArray.from_arrays(values, type=schema.field("vector").type),
        pa.repeat(pa.scalar(facts.embedding_model, pa.string()), count),
        pa.repeat(pa.scalar(dim, pa.int32()), count),
        pa.repeat(pa.scalar(facts.embedding_version, pa.string()), count),
        pa.repeat(pa.scalar(at, pa.timestamp("us", "UTC")), count),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def add(table: Table, data: pa.Table) -> None:
    if table.schema.field("vector").type != data.schema.field("vector").type:
        raise DimensionError("the vectors of the table have another number of values")
    table.add(data)


def remove(table: Table, numbers: Sequence[int]) -> None:
    for part in _parts(sorted(set(numbers))):
        table.delete(_listed(part))


def get(table: Table, number: int) -> bytes | None:
    found = table.search().where(_listed([number])).select(["vector"]).limit(1).to_arrow()
    for chunk in found["vector"].chunks:
        if len(chunk):
            return bytes(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    return None


def numbers(table: Table) -> frozenset[int]:
    found: set[int] = set()
    for batch in table.search().to_batches(_BATCH_ROWS):
        found.update(batch["number"].to_pylist())
    return frozenset(found)


def search(table: Table, vector: bytes, count: int, among: Collection[int] | None) -> list[Hit]:
    if among is None:
        return _hits(_query(table, vector, count).to_arrow())
    hits: list[Hit] = []
    for part in _parts(sorted(among)):
        query = _query(table, vector, count).where(_listed(part), prefilter=True).bypass_vector_index()
        hits += _hits(query.to_arrow())
    hits.sort(key=lambda hit: -hit.score)
    return hits[:count]


def _query(table: Table, vector: bytes, count: int) -> Any:
    import numpy as np  # noqa: PLC0415

    values = np.frombuffer(vector, "<f4")
    if len(vector) % _FLOAT_BYTES or table.schema.field("vector").type.list_size != len(values):
        raise DimensionError("the vector has another number of values than those of the table")
    query: Any = table.search(values, vector_column_name="vector", query_type="vector")
    return query.distance_type("dot").select(["number", "_distance"]).limit(count)


def _hits(found: pa.Table) -> list[Hit]:
    """LanceDB's distance of unit vectors is 1 less their cosine, and rounding may take it out of bounds."""
    pairs = zip(found["number"].to_pylist(), found["_distance"].to_pylist(), strict=True)
    return [Hit(number, min(1.0, max(-1.0, 1.0 - distance))) for number, distance in pairs]


def _parts(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), _MOST_LISTED):
        yield numbers[start : start + _MOST_LISTED]


def _listed(numbers: Sequence[int]) -> str:
    return f"number IN ({','.join(str(int(number)) for number in numbers)})"
