from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, suppress
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest_asyncio
import structlog

from manager.adapters.registry import SqlRegistry, open_registry
from manager.errors import Reason
from manager.services.journal import Journal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest

    from manager.domain.registry import Event

NOW = datetime(2026, 8, 1, 12, 0, tzinfo=UTC)


@pytest_asyncio.fixture
async def registry(tmp_path: Path) -> AsyncIterator[SqlRegistry]:
    opened = await open_registry(tmp_path / "registry.sqlite3", busy_timeout_s=0.05)
    yield opened
    await opened.close()


def new_journal(registry: SqlRegistry, *, last_id: int = 0) -> Journal:
    return Journal(registry, last_id=last_id, utcnow=lambda: NOW)


async def taken(journal: Journal, after_id: int, count: int) -> list[Event]:
    """The first events that a follower gets."""
    found: list[Event] = []
    follower = journal.follow(after_id)
    async with asyncio.timeout(10):
        while len(found) < count:
            found.append(await anext(follower))
    await follower.aclose()  # type: ignore[attr-defined]
    return found


async def stored(registry: SqlRegistry, count: int) -> list[Event]:
    """All that is stored, once there are so many."""
    async with asyncio.timeout(10):
        while len(found := await registry.events_after(0, 1000)) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # the registry tells nobody of a write
    return list(found)


async def falls_silent(journal: Journal, after_id: int) -> bool:
    """Whether a follower waits for what is to come. It must wait, not turn in circles."""
    upcoming = asyncio.ensure_future(anext(journal.follow(after_id)))
    done, _ = await asyncio.wait({upcoming}, timeout=0.05)
    upcoming.cancel()
    with suppress(asyncio.CancelledError):
        await upcoming
    return not done


async def test_events_are_numbered_without_a_gap_from_the_last_one_stored(registry: SqlRegistry) -> None:
    journal = new_journal(registry, last_id=41)
    journal.record("ready", instance="cpu", detail="http://there")
    journal.record("start_failed", reason=Reason.IMAGE_MISSING)
    await journal.flush()
    first, second = await registry.events_after(0, 10)
    assert (first.id, first.at, first.instance, first.kind, first.reason, first.detail) == (
        42,
        NOW,
        "cpu",
        "ready",
        None,
        "http://there",
    )
    assert (second.id, second.reason) == (43, "image_missing")
    assert journal.last_id == 43


async def test_an_event_with_a_reason_is_logged_as_a_warning(
    registry: SqlRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One that was used before may be bound to the processors of that time.
    monkeypatch.setattr("manager.services.journal._log", structlog.get_logger("events"))
    journal = new_journal(registry)
    with structlog.testing.capture_logs() as lines:
        journal.record("ready", instance="cpu", detail="http://there")
        journal.record("start_failed", reason=Reason.IMAGE_MISSING)
    assert lines == [
        {"log_level": "info", "event": "ready", "instance": "cpu", "detail": "http://there"},
        {"log_level": "warning", "event": "start_failed", "reason": "image_missing"},
    ]


async def test_events_that_are_all_in_memory_are_not_read(
    registry: SqlRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = new_journal(registry, last_id=7)
    journal.record("one")
    journal.record("two")
    monkeypatch.delattr(SqlRegistry, "events_after")
    assert [event.id for event in await taken(journal, 7, 2)] == [8, 9]
    assert [event.id for event in await taken(journal, 8, 1)] == [9]


async def test_a_follower_gets_stored_events_then_live_ones(registry: SqlRegistry) -> None:
    earlier = new_journal(registry)
    earlier.record("one")
    earlier.record("two")
    await earlier.flush()
    journal = new_journal(registry, last_id=2)
    following = asyncio.ensure_future(taken(journal, 1, 3))
    await asyncio.sleep(0)
    journal.record("three")
    await asyncio.sleep(0.01)
    journal.record("four")
    assert [event.kind for event in await following] == ["two", "three", "four"]


async def test_a_follower_of_a_daemon_to_which_nothing_has_happened_yet_gets_what_is_stored(
    registry: SqlRegistry,
) -> None:
    earlier = new_journal(registry)
    earlier.record("one")
    await earlier.flush()
    journal = new_journal(registry, last_id=1)
    assert [event.kind for event in await taken(journal, 0, 1)] == ["one"]
    assert await falls_silent(journal, 1)


async def test_a_follower_waits_when_what_it_asks_for_was_dropped_or_is_of_the_future(
    registry: SqlRegistry,
) -> None:
    journal = new_journal(registry, last_id=7)
    assert await falls_silent(journal, 0)
    assert await falls_silent(journal, 7)
    assert await falls_silent(journal, 10**9)
    following = asyncio.ensure_future(taken(journal, 10**9, 1))
    await asyncio.sleep(0)
    journal.record("next")
    assert [event.id for event in await following] == [8]


async def test_a_slow_follower_misses_nothing_of_what_left_the_memory(
    registry: SqlRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.services.journal._IN_MEMORY", 4)
    monkeypatch.setattr("manager.services.journal._PAGE", 3)
    journal = new_journal(registry)
    journal.record("event")
    follower = journal.follow(0)
    found = [(await anext(follower)).id]
    for _ in range(20):
        journal.record("event")
        await journal.flush()
    async with asyncio.timeout(10):
        found += [(await anext(follower)).id for _ in range(20)]
    assert found == list(range(1, 22))
    await follower.aclose()  # type: ignore[attr-defined]


async def test_many_followers_at_once_all_get_everything_in_order(registry: SqlRegistry) -> None:
    journal = new_journal(registry)
    running = asyncio.ensure_future(journal.run())
    followers = [asyncio.ensure_future(taken(journal, 0, 30)) for _ in range(5)]
    for number in range(30):
        journal.record(f"event {number}")
        if number % 7 == 0:
            await asyncio.sleep(0.001)
    for events in await asyncio.gather(*followers):
        assert all(after.id == before.id + 1 for before, after in pairwise(events))
        assert events[-1].kind == "event 29"
    running.cancel()
    await asyncio.wait({running})
    assert len(await registry.events_after(0, 100)) == 30


async def test_what_was_recorded_is_stored_by_itself_and_the_rest_at_the_end(registry: SqlRegistry) -> None:
    journal = new_journal(registry)
    running = asyncio.ensure_future(journal.run())
    journal.record("one")
    await stored(registry, 1)
    journal.record("two")
    running.cancel()
    await asyncio.wait({running})
    assert [event.kind for event in await registry.events_after(0, 10)] == ["one", "two"]


async def test_events_that_could_not_be_stored_are_shown_and_tried_again(
    registry: SqlRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.services.journal._RETRY_S", 0.01)
    journal = new_journal(registry)
    with closing(sqlite3.connect(tmp_path / "registry.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        running = asyncio.ensure_future(journal.run())
        journal.record("one")
        async with asyncio.timeout(10):
            while journal.trouble is None:  # noqa: ASYNC110  (it is told to no one)
                await asyncio.sleep(0.005)
        assert "locked" in journal.trouble
        journal.record("two")
        assert [event.kind for event in await taken(journal, 0, 2)] == ["one", "two"]
        other.execute("ROLLBACK")
    assert [event.id for event in await stored(registry, 2)] == [1, 2]
    running.cancel()
    await asyncio.wait({running})
    assert journal.trouble is None


async def test_without_events_the_registry_is_looked_at_now_and_then(
    registry: SqlRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    check = registry.check

    async def counted() -> None:
        nonlocal looks
        looks += 1
        await check()

    monkeypatch.setattr(registry, "check", counted)
    monkeypatch.setattr("manager.services.journal._RETRY_S", 3600.0)  # nothing has to be tried again
    journal = new_journal(registry)
    running = asyncio.ensure_future(journal.run())
    for count in range(1, 6):
        journal.record("one")
        await stored(registry, count)
    assert 1 <= looks <= 6, "once after each event at most"
    running.cancel()
    await asyncio.wait({running})


async def test_a_registry_that_was_taken_away_is_found_out_without_any_event(
    registry: SqlRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.services.journal._RETRY_S", 0.01)
    monkeypatch.setattr("manager.services.journal._LOOK_S", 0.01)
    journal = new_journal(registry)
    running = asyncio.ensure_future(journal.run())
    file = tmp_path / "registry.sqlite3"
    aside = file.rename(tmp_path / "aside")
    async with asyncio.timeout(10):
        while journal.trouble is None:  # noqa: ASYNC110  (it is told to no one)
            await asyncio.sleep(0.005)
    assert "registry.sqlite3 is gone" in journal.trouble
    aside.rename(file)
    async with asyncio.timeout(10):
        while journal.trouble is not None:  # noqa: ASYNC110  (it is told to no one)
            await asyncio.sleep(0.005)
    journal.record("one")
    await stored(registry, 1)
    running.cancel()
    await asyncio.wait({running})


async def test_the_last_problems_are_at_hand_also_those_of_earlier_runs(registry: SqlRegistry) -> None:
    earlier = new_journal(registry)
    for number in range(20):
        earlier.record("start_failed", instance=f"cpu{number}", reason=Reason.IMAGE_MISSING)
        earlier.record("ready", instance=f"cpu{number}")
    await earlier.flush()
    journal = new_journal(registry, last_id=await registry.last_event_id())
    await journal.load()
    assert [event.instance for event in journal.problems] == [f"cpu{number}" for number in range(4, 20)]
    journal.record("ready", instance="new")
    journal.record("unhealthy", instance="new", reason=Reason.INSTANCE_UNHEALTHY)
    assert [event.instance for event in journal.problems][-2:] == ["cpu19", "new"]
    assert len(journal.problems) == 16
