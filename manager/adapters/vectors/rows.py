"""What the calls of the port do with an open table."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

from manager.services.embeddings.ports import Hit

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from datetime import datetime

    import numpy as np
    import pyarrow as pa
    from lancedb.table import Table

    from manager.services.embeddings.ports import TableFacts, VectorRow

_FLOAT_BYTES = 4
# So many numbers are named in a statement.
_MOST_LISTED = 20_000
# All partitions of an index with up to eight million rows: each vector's code is looked at, so that nearest
# rows are found whatever the vectors are like.
_PROBES = 1000
# The codes name so many candidates, of which the vectors decide.
_CANDIDATES = 100
_FEWEST_CANDIDATES_A_HIT = 2
# A row that is looked up costs as much as so many rows that are read one after the other.
_ROWS_A_LOOKUP = 32
_BATCH_ROWS = 1024


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


def search(table: Table, vector: bytes, count: int) -> list[Hit]:
    query = _query(table, vector, count)
    factor = max(_FEWEST_CANDIDATES_A_HIT, -(-_CANDIDATES // count))
    if factor * count * _ROWS_A_LOOKUP < table.count_rows():
        query = query.nprobes(_PROBES).refine_factor(factor)
    else:
        query = query.bypass_vector_index()
    found = query.to_arrow()
    # The distance is the square of the Euclidean one: 2 less twice the cosine.
    return [
        Hit(number, _cosine(1 - distance / 2))
        for number, distance in zip(found["number"].to_pylist(), found["_distance"].to_pylist(), strict=True)
    ]


def search_among(table: Table, vector: bytes, count: int, among: Collection[int]) -> list[Hit]:
    """Look at the vectors of the rows themselves: LanceDB would look at those of all rows."""
    import numpy as np  # noqa: PLC0415

    if not among:
        return []
    values = _values(table, vector)
    wanted = np.unique(np.fromiter(among, np.int64, len(among)))
    found: list[Hit] = []
    for batch in _batches(table, wanted.tolist()):
        numbers = batch["number"].to_numpy()
        chosen = np.isin(numbers, wanted)
        vectors = batch["vector"].flatten().to_numpy().reshape(len(numbers), len(values))[chosen]
        scores = (vectors @ values).tolist()
        found += map(Hit, numbers[chosen].tolist(), map(_cosine, scores))
        found = heapq.nlargest(count, found, key=_score)
    return found


def _batches(table: Table, wanted: list[int]) -> Iterator[pa.RecordBatch]:
    """Yield the rows with these numbers, of one state of the table, perhaps among others."""
    query = table.search().select(["number", "vector"])
    if len(wanted) * _ROWS_A_LOOKUP < table.count_rows() and len(wanted) <= _MOST_LISTED:
        query = query.where(_listed(wanted))
    yield from query.to_batches(_BATCH_ROWS)


def _score(hit: Hit) -> float:
    return hit.score


def _cosine(value: float) -> float:
    """Return a cosine that rounding has not taken out of its bounds."""
    return min(1.0, max(-1.0, value))


def _values(table: Table, vector: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    import numpy as np  # noqa: PLC0415

    if len(vector) != table.schema.field("vector").type.list_size * _FLOAT_BYTES:
        raise DimensionError("the vector has another number of values than those of the table")
    return np.frombuffer(vector, "<f4")


def _query(table: Table, vector: bytes, count: int) -> Any:
    query: Any = table.search(_values(table, vector), vector_column_name="vector", query_type="vector")
    return query.distance_type("l2").select(["number", "_distance"]).limit(count)


def _parts(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), _MOST_LISTED):
        yield numbers[start : start + _MOST_LISTED]


def _listed(numbers: Sequence[int]) -> str:
    return f"number IN ({','.join(str(int(number)) for number in numbers)})"
