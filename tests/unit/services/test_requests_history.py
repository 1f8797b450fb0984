"""Each request that has ended is in the history exactly once, or counted as dropped; none is waited for."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from contextlib import asynccontextmanager, closing, suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import structlog

from manager.adapters.registry import SqlRegistry, open_registry, usage
from manager.adapters.registry.requests import search
from manager.domain.history import Ended, Filters
from manager.domain.roles import Policy, RequestKind
from manager.domain.routing import Attempt, Decision, PassedOver, RequestFacts
from manager.domain.usage import Span, Sums
from manager.errors import Reason, RegistryUnwritableError
from manager.services import requests_history
from manager.services.requests_history import BATCH, MOST_INHERITED, MOST_WAITING, History, Retention
from tests.support.inside import until
from tests.support.records import a_record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

NOW = datetime(2026, 8, 1, 12, 0, tzinfo=UTC)
_numbers = count(1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite3"


@pytest_asyncio.fixture
async def registry(path: Path) -> AsyncIterator[SqlRegistry]:
    opened = await open_registry(path, busy_timeout_s=0.05)
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def history(registry: SqlRegistry) -> AsyncIterator[History]:
    made = new_history(registry)
    yield made
    await made.store.close()


def new_history(registry: SqlRegistry, days: int = 14, most_rows: int = 10**6) -> History:
    return History(registry.requests(), retention=Retention(days, most_rows), utcnow=lambda: NOW)


def ended(message: str = "", **values: Any) -> Ended:
    facts = RequestFacts("thinking", RequestKind.GENERATE)
    passed_over = (PassedOver("gpu1", "qwen3:8b", Reason.INSTANCE_UNAVAILABLE, "drained"),)
    decision = Decision(facts, "thinking", Policy.AUTO, None, (), passed_over)
    made = (Attempt("gpu0", "qwen3:8b", "thinking", "loaded"),)
    record = a_record(**{"ts": NOW, "request_id": f"r{next(_numbers)}", **values})
    return Ended(record, SimpleNamespace(decision=decision, made=made), (), message)


def rows(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute("SELECT request_id FROM requests ORDER BY id")]


def set_aside(path: Path) -> None:
    """Nothing can be written from now on."""
    if path.exists():
        path.rename(path.with_name("away"))


def put_back(path: Path) -> None:
    if path.with_name("away").exists():
        path.with_name("away").rename(path)


@asynccontextmanager
async def running(history: History) -> AsyncIterator[None]:
    task = asyncio.ensure_future(history.run())
    try:
        yield
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as lines:
        yield lines


# --- what is stored


async def test_a_request_comes_back_with_its_record_and_its_decision(history: History) -> None:
    one = ended("an error", lane="output", start_ms=12.5, outcome="cut")
    history.add(one)
    await history.flush()
    found = await history.store.get(one.record.request_id)
    assert found is not None
    record, decision = found
    assert record["ts"] == "2026-08-01T12:00:00Z"
    assert (record["lane"], record["start_ms"], record["outcome"]) == ("output", 12.5, "cut")
    assert decision["message"] == "an error"
    assert [one["outcome"] for one in decision["attempts"]] == ["cut"]
    assert decision["passed_over"][0]["detail"] == "drained"
    assert await history.store.get("unknown") is None


async def test_requests_of_one_batch_keep_their_own_outcomes(history: History) -> None:
    batch = [ended(outcome=outcome) for outcome in ("ok", "cut", "ok")]
    batch.append(ended("why", outcome="ok"))
    for one in batch:
        history.add(one)
    await history.flush()
    for one in batch:
        found = await history.store.get(one.record.request_id)
        assert found is not None
        assert found[1]["attempts"][0]["outcome"] == one.record.outcome
        assert found[1]["message"] == one.message


async def test_texts_that_json_has_no_form_for_are_stored_as_text(history: History) -> None:
    history.add(ended("\ud800", model="bad\ud800", project_id="p\udfff"))
    await history.flush()
    assert history.stored == 1
    page = await history.store.last(Filters(), 10)
    assert page.items[0][1]["model"] == "bad\\ud800"


async def test_the_filters_find_what_they_name_newest_first(history: History) -> None:
    made = [
        ended(project_id="a", role="thinking", model="tiny", effective_target="cpu", outcome="ok"),
        ended(project_id="b", role=None, model="tiny:latest", effective_target="gpu0", outcome="cut"),
        ended(project_id="b", role="output", model="big", effective_target=None, outcome="refused"),
        ended(project_id="a", ts=NOW - timedelta(hours=3), role=None, model=None, outcome="ok"),
    ]
    for one in made:
        history.add(one)
    await history.flush()
    ids = [one.record.request_id for one in made]

    async def found(limit: int = 10, **filters: Any) -> list[int]:
        page = await history.store.last(Filters(**filters), limit)
        return [ids.index(id_) for id_, _ in page.items]

    assert await found() == [2, 1, 0, 3]
    assert await found(2) == [2, 1]
    assert await found(project="a") == [0, 3]
    assert await found(role="output") == [2]
    assert await found(model="Tiny") == [1, 0]
    assert await found(instance="cpu") == [0]
    assert await found(outcome="cut", project="b") == [1]
    assert await found(since=NOW - timedelta(hours=1)) == [2, 1, 0]
    assert await found(project="nobody") == []


async def test_a_cursor_leads_through_everything_once(history: History) -> None:
    for _ in range(25):
        history.add(ended())
    await history.flush()
    assert (await history.store.last(Filters(), 5)).cursor == 25
    seen: list[str] = []
    cursor = 0
    while (page := await history.store.last(Filters(), 10, after=cursor)).items:
        seen += [id_ for id_, _ in reversed(page.items)]
        cursor = page.cursor
    assert cursor == 25
    assert len(seen) == len(set(seen)) == 25
    assert (await history.store.last(Filters(project="nobody"), 10, after=3)).cursor == 25


async def test_older_pages_lead_through_everything_once_whatever_ends_meanwhile(history: History) -> None:
    # They are ordered by their end: two end at once, one was stored late.
    made = [ended(project_id="a" if number % 2 else "b") for number in range(20)]
    made.append(ended(ts=NOW - timedelta(hours=1), project_id="a"))
    for one in made:
        history.add(one)
    await history.flush()
    page = await history.store.last(Filters(), 7)
    seen = [id_ for id_, _ in page.items]
    sizes = [len(page.items)]
    while page.older is not None:
        history.add(ended())
        await history.flush()
        page = await history.store.last(Filters(), 7, before=page.older)
        seen += [id_ for id_, _ in page.items]
        sizes.append(len(page.items))
    ids = [one.record.request_id for one in made]
    assert seen == [*reversed(ids[:20]), ids[20]]
    assert sizes == [7, 7, 7], "a full last page is known to be the last one"
    only = await history.store.last(Filters(project="a"), 4)
    assert only.older is not None
    rest = await history.store.last(Filters(project="a"), 40, before=only.older)
    assert [len(only.items), len(rest.items), rest.older] == [4, 7, None]
    assert (await history.store.last(Filters(), 7, before=10_000)).items == []


@pytest.mark.parametrize(
    ("filters", "plan"),
    [
        (Filters(project="x", model="y", outcome="ok"), "SCAN requests USING COVERING INDEX requests_by_end"),
        (
            Filters(since=NOW, role="x", instance="y"),
            "SEARCH requests USING COVERING INDEX requests_by_end (ended_us>?)",
        ),
    ],
)
async def test_a_search_reads_the_index_alone(
    path: Path, registry: SqlRegistry, filters: Filters, plan: str
) -> None:
    statement, values = search(filters, None)
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute(f"EXPLAIN QUERY PLAN {statement}", [*values, 10]).fetchall()
    assert [row[3] for row in found] == [plan]


async def test_a_search_for_older_ones_begins_in_the_index(path: Path, registry: SqlRegistry) -> None:
    statement, values = search(Filters(), None, 7)
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute(f"EXPLAIN QUERY PLAN {statement}", [*values, 10]).fetchall()
    assert found[0][3] == "SEARCH requests USING COVERING INDEX requests_by_end (ended_us<?)"


async def test_a_dry_run_stores_no_request(path: Path) -> None:
    await (await open_registry(path)).close()
    registry = await open_registry(path, stores=False)
    history = new_history(registry)
    history.add(ended())
    await history.flush()
    await history.prune()
    await history.store.close()
    await registry.close()
    assert rows(path) == []


# --- when it is stored


async def test_a_batch_waits_for_a_moment_and_a_full_one_does_not(
    history: History, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_history, "EVERY_S", 0.05)
    async with running(history):
        history.add(ended())
        await until(lambda: history.stored == 1)
        assert history.waiting == 0
    monkeypatch.setattr(requests_history, "EVERY_S", 3600.0)
    async with running(history):
        for _ in range(3 * BATCH + 1):
            history.add(ended())
        await until(lambda: history.stored >= 3 * BATCH + 2)
    assert len(rows(path)) == 3 * BATCH + 2


async def test_what_ends_during_a_write_is_written_after_it(history: History, path: Path) -> None:
    history.add(ended())
    flushing = asyncio.ensure_future(history.flush())
    await asyncio.sleep(0)
    history.add(ended())
    await flushing
    assert history.stored + history.waiting == 2
    async with running(history):
        await until(lambda: history.stored == 2)
    assert len(set(rows(path))) == 2


async def test_a_cancelled_write_neither_loses_nor_doubles(history: History, path: Path) -> None:
    for _ in range(3 * BATCH):
        history.add(ended())
    for _ in range(5):
        flushing = asyncio.ensure_future(history.flush())
        await asyncio.sleep(0.001)
        flushing.cancel()
        with suppress(asyncio.CancelledError):
            await flushing
    await history.flush()
    assert history.stored == 3 * BATCH
    assert len(rows(path)) == len(set(rows(path))) == 3 * BATCH


async def test_closing_writes_what_waits(history: History, path: Path) -> None:
    history.add(ended())
    await history.close()
    assert len(rows(path)) == 1
    history.add(ended())
    await history.flush()
    assert (len(rows(path)), history.waiting) == (1, 1)


# --- what can go wrong


async def test_a_full_buffer_drops_counts_and_says_so_once(history: History, logged: list[Any]) -> None:
    for _ in range(MOST_WAITING + 3):
        history.add(ended())
    assert (history.waiting, history.dropped) == (MOST_WAITING, 3)
    assert [line["event"] for line in logged] == ["requests_not_stored"]
    await history.flush()
    assert (history.stored, history.dropped) == (MOST_WAITING, 3)
    assert [line["event"] for line in logged] == ["requests_not_stored", "requests_stored_again"]


async def test_a_registry_that_cannot_be_written_is_said_once_and_tried_again(
    history: History, path: Path, logged: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_history, "EVERY_S", 0.01)
    monkeypatch.setattr(requests_history, "_RETRY_S", 0.01)
    set_aside(path)
    async with running(history):
        for _ in range(3):
            history.add(ended())
            await asyncio.sleep(0.03)
        assert (history.stored, history.dropped, history.waiting) == (0, 0, 3)
        assert [line["event"] for line in logged] == ["requests_not_stored"]
        put_back(path)
        await until(lambda: history.stored == 3)
    assert [line["event"] for line in logged] == ["requests_not_stored", "requests_stored_again"]
    assert len(rows(path)) == 3


async def test_a_full_disk_loses_history_and_nothing_else(
    history: History, registry: SqlRegistry, logged: list[Any]
) -> None:
    history.add(ended())
    await history.flush()
    store: Any = history.store

    def bound(pages: int) -> None:
        store._own._connection.execute(f"PRAGMA max_page_count={pages}")

    size = await store._own.call(lambda: store._own._connection.execute("PRAGMA page_count").fetchone()[0])
    await store._own.call(lambda: bound(size))
    for _ in range(BATCH):
        history.add(ended("x" * 1000))
    await history.flush()
    assert (history.stored, history.waiting) == (1, BATCH)
    assert "the disk is full" in logged[0]["error"]
    await store._own.call(lambda: bound(10**6))
    await history.flush()
    assert (history.stored, history.waiting, history.dropped) == (BATCH + 1, 0, 0)


async def test_a_registry_that_another_process_locks_is_tried_again(history: History, path: Path) -> None:
    history.add(ended())
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        await history.flush()
        assert (history.stored, history.waiting) == (0, 1)
        other.execute("ROLLBACK")
    await history.flush()
    assert (history.stored, history.waiting) == (1, 0)


async def test_a_defect_costs_its_batch_and_nothing_else(
    history: History, path: Path, logged: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_history, "BATCH", 2)
    for broken in (None, None, 7, None, None):
        history.add(ended() if broken is None else Ended(broken, None, (), ""))  # type: ignore[arg-type]
    async with running(history):
        await until(lambda: history.waiting == 0)
        assert (history.stored, history.dropped) == (3, 2)
        assert [(line["event"], line["log_level"]) for line in logged] == [("requests_not_stored", "error")]
        history.add(ended())
        await history.flush()
    assert len(rows(path)) == 4


async def test_reading_says_why_it_cannot(history: History, path: Path) -> None:
    await history.store.close()
    with pytest.raises(RegistryUnwritableError):
        await history.store.last(Filters(), 1)
    await history.store.close()


async def test_a_close_that_cannot_write_says_how_many_are_lost(
    history: History, path: Path, logged: list[Any]
) -> None:
    history.add(ended())
    set_aside(path)
    await history.close()
    await history.close()
    assert [line.get("count") for line in logged] == [None, 1]
    put_back(path)


# --- a daemon that is replaced


async def test_what_ends_after_the_claims_were_given_up_goes_to_the_next_daemon(
    registry: SqlRegistry, path: Path
) -> None:
    old, new = new_history(registry), new_history(registry)
    old.add(ended())
    await old.close()
    await old.store.close()
    for _ in range(BATCH + 1):
        old.add(ended())

    def take(encoded: bytes) -> bool:
        new.inherit(encoded)
        return True

    async with running(new):
        await old.hand_over(take)
        await until(lambda: len(rows(path)) == BATCH + 2)
    assert (old.waiting, old.dropped) == (0, 0)
    assert len(set(rows(path))) == BATCH + 2
    await new.store.close()


async def test_what_nobody_takes_is_counted(history: History, logged: list[Any]) -> None:
    await history.close()
    history.add(ended())
    await history.hand_over(lambda _encoded: False)
    assert (history.waiting, history.dropped) == (0, 1)
    assert [line["count"] for line in logged] == [1]


async def test_what_is_inherited_has_a_bound(history: History) -> None:
    encoded = await history.store.encoded([ended()])
    for _ in range(MOST_INHERITED + 1):
        history.inherit(encoded)
    assert len(history._inherited) == MOST_INHERITED
    await history.flush()
    assert not history._inherited


# --- usage


WHOLE = Span(int((NOW - timedelta(days=1)).timestamp()), int((NOW + timedelta(days=1)).timestamp()))


async def used(history: History) -> Sums:
    sums, _ = await history.store.usage(WHOLE, (), now_s=int(NOW.timestamp()))
    return sums.get((), Sums())


async def test_what_requests_have_used_is_told_by_group(history: History) -> None:
    for number in range(20):
        history.add(
            ended(
                ts=NOW, project_id=f"p{number % 2}", key="bot" if number % 4 == 0 else None, duration_ms=100.0
            )
        )
    history.add(ended(ts=NOW, kind=None))
    await history.flush()
    sums, span = await history.store.usage(WHOLE, ("project", "key", "day"), now_s=int(NOW.timestamp()))
    day = f"{NOW:%Y-%m-%d}"
    assert {names: one.requests for names, one in sums.items()} == {
        ("p0", "bot", day): 5,
        ("p0", "", day): 5,
        ("p1", "", day): 10,
    }
    assert sums["p1", "", day].output_tokens == 340
    assert sums["p1", "", day].percentile_ms(0.95) == pytest.approx(100, rel=0.1)
    assert span.begins <= WHOLE.begins
    assert span.ends >= WHOLE.ends


async def test_a_batch_that_is_written_twice_is_counted_once(
    history: History, registry: SqlRegistry, path: Path
) -> None:
    for _ in range(3):
        history.add(ended(ts=NOW))
    batch = tuple(history._waiting)
    await history.flush()
    history.store._is_doubtful = True  # type: ignore[attr-defined]  # its commit was reported as failed
    await history.store.add((*batch, ended(ts=NOW)))
    assert len(rows(path)) == 4
    assert (await used(history)).requests == 4


async def test_usage_of_another_process_comes_with_its_requests(history: History, path: Path) -> None:
    encoded = await history.store.encoded([ended(ts=NOW), ended(ts=NOW, kind=None)])
    history.inherit(encoded)
    await history.flush()
    assert len(rows(path)) == 2
    sums = await used(history)
    assert (sums.requests, sums.output_tokens) == (1, 34)
    assert sums.percentile_ms(0.5) is not None


async def test_groups_beyond_the_bound_are_counted_together(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "MOST_GROUPS", 3)
    for number in range(8):
        history.add(ended(ts=NOW, project_id=f"p{number}"))
        history.add(ended(ts=NOW, project_id="p1"))
    await history.flush()
    sums, _ = await history.store.usage(WHOLE, ("project",), now_s=int(NOW.timestamp()))
    assert {names[0]: one.requests for names, one in sums.items()} == {"p0": 1, "p1": 9, "p2": 1, "other": 5}


async def test_usage_is_forgotten_in_its_own_time(history: History, path: Path) -> None:
    history.retention = Retention(1, 10, usage_days=200)
    for age in (1, 150, 300):
        history.add(ended(ts=NOW - timedelta(days=age)))
    await history.flush()
    await history.prune()
    with closing(sqlite3.connect(path)) as connection:
        counts = [
            connection.execute(f"SELECT count(*) FROM usage_{table}").fetchone()[0]
            for table in ("hours", "days")
        ]
    assert counts == [1, 2]
    assert len(rows(path)) <= 1


# --- what is forgotten


async def test_no_retention_keeps_no_request_and_still_adds_up_what_it_has_used(
    history: History, path: Path
) -> None:
    history.retention = Retention(0, 10)
    history.add(ended())
    await history.flush()
    assert rows(path) == []
    assert (await used(history)).requests == 1


async def test_what_is_too_old_is_forgotten(history: History, path: Path) -> None:
    kept = ended(ts=NOW - timedelta(days=13))
    for age in (15, 20, 30):
        history.add(ended(ts=NOW - timedelta(days=age)))
    history.add(kept)
    await history.flush()
    await history.prune()
    assert rows(path) == [kept.record.request_id]


async def test_the_oldest_beyond_the_most_rows_are_forgotten_in_steps(
    history: History, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_history, "_PRUNE_STEP", 7)
    monkeypatch.setattr(requests_history, "_PRUNE_EVERY_S", 0.01)
    for _ in range(100):
        history.add(ended())
    await history.flush()
    newest = rows(path)[-10:]
    history.retention = Retention(14, 10)
    async with running(history):
        await until(lambda: rows(path) == newest)
        history.add(ended())
        await history.flush()
        await until(lambda: rows(path)[:-1] == newest[1:])


async def test_pruning_survives_a_registry_that_cannot_be_written(history: History, path: Path) -> None:
    set_aside(path)
    await history.prune()
    put_back(path)


# --- the property


@pytest.mark.parametrize("seed", range(8))
async def test_every_request_is_stored_once_waits_or_was_dropped(
    history: History, path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_history, "MOST_WAITING", 40)
    monkeypatch.setattr(requests_history, "BATCH", 7)
    monkeypatch.setattr(requests_history, "EVERY_S", 0.002)
    monkeypatch.setattr(requests_history, "_RETRY_S", 0.002)
    chance = random.Random(seed)
    added: list[str] = []
    flushes: list[asyncio.Future[None]] = []
    async with running(history):
        for _ in range(300):
            match chance.randrange(8):
                case 0:
                    flushes.append(asyncio.ensure_future(history.flush()))
                case 1 if flushes:
                    flushes.pop(chance.randrange(len(flushes))).cancel()
                case 2:
                    set_aside(path)
                case 3:
                    put_back(path)
                case 4:
                    await asyncio.sleep(chance.random() / 200)
                case _:
                    for _ in range(chance.randrange(12)):
                        one = ended()
                        added.append(one.record.request_id)
                        history.add(one)
            assert history.waiting <= 40
        put_back(path)
        await asyncio.gather(*flushes, return_exceptions=True)
        await until(lambda: history.waiting == 0)
    kept = rows(path)
    assert len(kept) == len(set(kept)) == history.stored
    assert set(kept) <= set(added)
    assert history.stored + history.dropped == len(added)
