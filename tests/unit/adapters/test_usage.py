"""A year of usage is told at once, however many requests it was."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from manager.adapters.registry import open_registry
from manager.domain.usage import DAY_S, HOUR_S, LATENCY_BYTES, Span

if TYPE_CHECKING:
    from pathlib import Path

NOW_S = int(datetime(2026, 11, 28, tzinfo=UTC).timestamp())
GROUPS = 75
# Ten million requests in a year: so many in each group of each day.
REQUESTS = 10_000_000 // (365 * GROUPS)


async def test_a_year_of_ten_million_requests_is_told_within_300_ms(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite3"
    registry = await open_registry(path)
    latencies = (REQUESTS << (32 * 30)).to_bytes(LATENCY_BYTES, "little")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(
            "INSERT INTO usage_days VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0, 10, 20, 0, 1000, ?)",
            (
                (
                    NOW_S - day * DAY_S,
                    f"project{group % 15}",
                    f"key{group % 5}",
                    "thinking",
                    f"model{group % 25}",
                    f"gpu{group % 3}",
                    REQUESTS,
                    REQUESTS,
                    latencies,
                )
                for day in range(1, 366)
                for group in range(GROUPS)
            ),
        )
    history = registry.requests()
    year = Span(NOW_S - 365 * DAY_S, NOW_S)
    took_s = []
    for _ in range(3):
        began = time.perf_counter()
        sums, span = await history.usage(year, ("project", "model"), now_s=NOW_S)
        took_s.append(time.perf_counter() - began)
    await history.close()
    await registry.close()
    assert span == year
    assert sum(one.requests for one in sums.values()) == REQUESTS * GROUPS * 365
    assert len(sums) == 75
    assert all(one.percentile_ms(0.5) is not None for one in sums.values())
    assert min(took_s) <= 0.3, took_s


async def test_by_hour_each_hour_that_is_kept_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite3"
    registry = await open_registry(path)
    latencies = (1 << (32 * 30)).to_bytes(LATENCY_BYTES, "little")
    values = "(?, 'p', '', '', 'm', 'i', 1, 1, 0, 10, 20, 0, 1000, ?)"
    with closing(sqlite3.connect(path)) as connection, connection:
        for hours_ago in (1, 2, 30):
            row = (NOW_S - hours_ago * HOUR_S, latencies)
            connection.execute(f"INSERT INTO usage_hours VALUES {values}", row)
        # What days say does not count: it is the same requests.
        connection.execute(f"INSERT INTO usage_days VALUES {values}", (NOW_S - 2 * DAY_S, latencies))
    history = registry.requests()
    sums, span = await history.usage(Span(NOW_S - 3 * DAY_S, NOW_S), ("hour", "model"), now_s=NOW_S)
    forgotten, none = await history.usage(Span(0, DAY_S), ("hour",), now_s=NOW_S)
    await history.close()
    await registry.close()
    assert sorted(sums) == [
        ("2026-11-26T18:00:00Z", "m"),
        ("2026-11-27T22:00:00Z", "m"),
        ("2026-11-27T23:00:00Z", "m"),
    ]
    assert span == Span(NOW_S - 3 * DAY_S, NOW_S)
    assert (forgotten, none) == ({}, Span(DAY_S, DAY_S))
