"""The tables of vectors by themselves: written, tended and searched, in a process of their own each.

The vectors are synthetic: random ones, of which none is near another, so that an index has nothing to go by,
and clustered ones, which are more like those of texts. `tests.bench.collecting` measures the whole daemon.

`python -m tests.bench.embeddings ROWS random|clustered` measures one table and prints JSON.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from manager.adapters.vectors import LanceVectors
from manager.services.embeddings.ports import TableFacts, VectorRow
from tests.bench.rig import MeasurementError
from tests.bench.table import Row, at_most, percentile

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    import numpy as np

    from manager.services.embeddings.ports import Hit

    Matrix = np.ndarray[Any, np.dtype[np.float32]]

_DIMENSIONS = 384
_BATCH = 1000
_QUERIES = 500
_WIDE_QUERIES = 100
_AMONG_QUERIES = 50
_AMONG = 20_000
_SOME = "k=10 of 20,000 rows by number"
_CLUSTERS = 1000
_SPREAD = 0.05
_ALL_AT_ONCE = 20_000
_MIB = 1024**2
_FACTS = TableFacts("bench", _DIMENSIONS, "1")
_P95_MS = 50
_RECALL = 0.95


def embeddings() -> Iterator[Row]:
    """1,000 and 100,000 rows: two minutes on a quiet machine."""
    yield from _measured(1_000, "random")
    yield from _measured(100_000, "random")
    yield from _measured(100_000, "clustered")


def a_million_embeddings() -> Iterator[Row]:
    """1,000,000 rows: some minutes, 3 GiB of disk and 2 GiB of memory."""
    yield from _measured(1_000_000, "random")
    yield from _measured(1_000_000, "clustered")


def _measured(rows: int, kind: str) -> Iterator[Row]:
    command = [sys.executable, "-m", "tests.bench.embeddings", str(rows), kind]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise MeasurementError(f"{rows} {kind} vectors: exit {done.returncode}")
    figures: dict[str, float] = json.loads(done.stdout)
    what = f"{rows:,} {kind} vectors"
    yield Row(f"{what}: written, {_BATCH} at a time", f"{figures['rows_a_s']:.0f} a second")
    yield Row(f"{what}: files merged, index built", f"{figures['tend_s']:.1f} s")
    for name, queries in (("k=10", _QUERIES), ("k=1000", _WIDE_QUERIES), (_SOME, _AMONG_QUERIES)):
        p50, p95 = figures[f"{name} p50"], figures[f"{name} p95"]
        if name == "k=10":
            yield at_most(f"{what}: {name}, p95", p95, _P95_MS, " ms", beside=f"p50 {p50:.1f} ms, {queries}")
        else:
            yield Row(f"{what}: {name}, p95", f"{p95:.1f} ms  (p50 {p50:.1f} ms, {queries})")
    recall = figures["recall"]
    yield Row(
        f"{what}: recall of 10", f"{recall:.3f}", f">= {_RECALL}", "ok" if recall >= _RECALL else "OVER"
    )
    yield Row(
        f"{what}: resident", f"{figures['resident']:.0f} MiB  (peak {figures['peak']:.0f} MiB, libraries 190)"
    )
    yield Row(f"{what}: on the disk", f"{figures['disk']:.0f} MiB")


class _Timed(NamedTuple):
    """Searches one after the other, and the numbers that each has found."""

    found: list[list[int]]
    p50_ms: float
    p95_ms: float


class _Source:
    """Vectors in pieces, and the nearest of all that were made, to compare with."""

    def __init__(self, kind: str) -> None:
        import numpy as np  # noqa: PLC0415

        self._random = np.random.default_rng(1)
        self._centres = self._units(_CLUSTERS) if kind == "clustered" else None
        self.asked = self.make(_QUERIES)
        self._best: list[list[tuple[float, int]]] = [[] for _ in range(_QUERIES)]

    def make(self, count: int) -> Matrix:
        if self._centres is None:
            return self._units(count)
        noise = _SPREAD * self._random.standard_normal((count, _DIMENSIONS), dtype="float32")
        return self._scaled(self._centres[self._random.integers(0, _CLUSTERS, count)] + noise)

    def compare(self, first: int, made: Matrix) -> None:
        """Keep the nearest ten of what was made so far."""
        import numpy as np  # noqa: PLC0415

        scores = self.asked @ made.T
        for asked, best in enumerate(self._best):
            near = np.argpartition(-scores[asked], min(10, len(made) - 1))[:10]
            best += [(float(scores[asked, at]), first + int(at)) for at in near]
            best[:] = heapq.nlargest(10, best)

    def recall(self, asked: int, found: Iterable[int]) -> float:
        return len({number for _, number in self._best[asked]} & set(found)) / 10

    def _units(self, count: int) -> Matrix:
        return self._scaled(self._random.standard_normal((count, _DIMENSIONS), dtype="float32"))

    @staticmethod
    def _scaled(vectors: Matrix) -> Matrix:
        import numpy as np  # noqa: PLC0415

        lengths: Matrix = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(vectors / lengths, dtype="float32")


async def _figures(rows: int, kind: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        vectors = LanceVectors(Path(folder) / "vectors")
        source = _Source(kind)
        await vectors.add(
            2, _FACTS, [VectorRow(0, "", source.asked[0].tobytes())], datetime.now(UTC)
        )  # it loads
        figures = {"rows_a_s": rows / await _written(vectors, source, rows)}
        began = time.perf_counter()
        await vectors.tend(1)
        figures["tend_s"] = time.perf_counter() - began
        asked = [vector.tobytes() for vector in source.asked]
        among = set(range(0, rows, max(1, rows // _AMONG)))
        nearest = await _timed(lambda vector: vectors.search(1, vector, 10), asked)
        wide = await _timed(lambda vector: vectors.search(1, vector, 1000), asked[:_WIDE_QUERIES])
        some = await _timed(lambda vector: vectors.search(1, vector, 10, among), asked[:_AMONG_QUERIES])
        for name, timed in (("k=10", nearest), ("k=1000", wide), (_SOME, some)):
            figures |= {f"{name} p50": timed.p50_ms, f"{name} p95": timed.p95_ms}
        recalled = [source.recall(number, hits) for number, hits in enumerate(nearest.found)]
        figures["recall"] = sum(recalled) / _QUERIES
        figures |= {"resident": _memory("VmRSS"), "peak": _memory("VmHWM")}
        figures["disk"] = _disk(Path(folder))
        await vectors.close()
    return figures


async def _written(vectors: LanceVectors, source: _Source, rows: int) -> float:
    """Return the seconds that it took; making the vectors does not count."""
    spent = 0.0
    for first in range(0, rows, _ALL_AT_ONCE):
        made = source.make(min(_ALL_AT_ONCE, rows - first))
        source.compare(first, made)
        for start in range(0, len(made), _BATCH):
            piece = [
                VectorRow(first + start + place, f"item-{first + start + place}", vector.tobytes())
                for place, vector in enumerate(made[start : start + _BATCH])
            ]
            began = time.perf_counter()
            await vectors.add(1, _FACTS, piece, datetime.now(UTC))
            spent += time.perf_counter() - began
    return spent


async def _timed(search: Callable[[bytes], Awaitable[list[Hit]]], asked: list[bytes]) -> _Timed:
    await search(asked[0])  # the first one reads the index
    spent_ms, found = [], []
    for vector in asked:
        began = time.perf_counter()
        hits = await search(vector)
        spent_ms.append((time.perf_counter() - began) * 1000)
        found.append([hit.number for hit in hits])
    return _Timed(found, percentile(spent_ms, 0.5), percentile(spent_ms, 0.95))


def _disk(folder: Path) -> float:
    """In MiB."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*")) / _MIB


def _memory(what: str) -> float:
    """Of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_figures(int(sys.argv[1]), sys.argv[2]))))
