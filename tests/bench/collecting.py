"""Collections through the whole daemon: items embedded and written a second, and queries by text.

The server makes vectors of hashes, so the figures are those of the daemon and not of a model.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.idle import cpu_s, resident_bytes
from tests.bench.table import Row, at_most, percentile
from tests.support.daemon import Daemon, wait_for
from tests.support.embedding_server import MODEL, EmbeddingServer

if TYPE_CHECKING:
    from collections.abc import Iterator

_BASE = "/api/v1/collections"
_DIMENSIONS = 384
_AT_ONCE = 1000
_EMBEDDED = 10_000
_SINGLE = 200
_QUERIES = 300
# The daemon looks after its tables every 30 s.
_TENDED_WITHIN_S = 40.0


def collections() -> Iterator[Row]:
    """Write, query and backfill a collection of 10,000 texts."""
    with tempfile.TemporaryDirectory() as home, EmbeddingServer() as server:
        server.dimensions = _DIMENSIONS
        config = {"gpus": "none", "instances": {"one": {"driver": "external", "url": server.url}}}
        with Daemon(Path(home), config, engine_url="unix:///nonexistent/docker.sock") as daemon:
            daemon.start(until_ready=False)
            daemon.wait_until_alive()
            yield from _measured(daemon)


def _measured(daemon: Daemon) -> Iterator[Row]:
    assert daemon.process is not None  # it was started
    _ask(daemon, "POST", _BASE, {"name": "docs", "model": MODEL})
    pid, before_s = daemon.process.pid, cpu_s(daemon.process.pid)
    passed_s = _put(daemon, _EMBEDDED, _AT_ONCE)
    share = (cpu_s(pid) - before_s) / _EMBEDDED * 1e3
    yield Row(
        f"embed and write {_EMBEDDED:,} texts x {_DIMENSIONS}, {_AT_ONCE} a call",
        f"{_EMBEDDED / passed_s:,.0f} rows/s  ({share:.2f} ms of CPU a row)",
    )
    passed_s = _put(daemon, _SINGLE, 1)
    yield Row("embed and write one text a call, one client", f"{_SINGLE / passed_s:,.0f} rows/s")
    yield _queried(daemon, f"right after {_SINGLE} small writes")
    time.sleep(_TENDED_WITHIN_S)
    yield _queried(daemon, "once its files are merged")
    _ask(daemon, "POST", f"{_BASE}/docs/backfill", {"prefix": "passage: "})
    began = time.perf_counter()
    wait_for(
        lambda: _ask(daemon, "GET", f"{_BASE}/docs/backfill")["status"],
        lambda one: one != "running",
        within_s=600,
    )
    passed_s = time.perf_counter() - began
    yield Row(f"backfill {_EMBEDDED:,} rows", f"{_EMBEDDED / passed_s:,.0f} rows/s")
    yield Row("resident memory of the daemon after it", f"{resident_bytes(pid) / 2**20:,.0f} MiB")


def _queried(daemon: Daemon, when: str) -> Row:
    took = []
    for number in range(_QUERIES):
        began = time.perf_counter()
        found = _ask(daemon, "POST", f"{_BASE}/docs/query", {"text": _text(number), "k": 10})
        took.append((time.perf_counter() - began) * 1e3)
        assert found["items"][0]["id"] == str(number)
    beside = f"p50 {percentile(took, 0.5):.1f} ms"
    what = f"query by text over 10,000 rows {when}, p95"
    return at_most(what, percentile(took, 0.95), 50, " ms", beside=beside)


def _put(daemon: Daemon, count: int, at_once: int) -> float:
    """Write texts; return the seconds that it took."""
    began = time.perf_counter()
    for start in range(0, count, at_once):
        items = [{"id": str(number), "text": _text(number)} for number in range(start, start + at_once)]
        _ask(daemon, "PUT", f"{_BASE}/docs/items", {"items": items})
    return time.perf_counter() - began


def _text(number: int) -> str:
    return f"This is the text of item {number}, which is about as long as a title."


def _ask(daemon: Daemon, method: str, path: str, body: Any = None) -> Any:
    answer = daemon.call(method, path, **({} if body is None else {"json": body}))
    answer.raise_for_status()
    return answer.json()
