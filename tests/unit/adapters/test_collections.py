# ruff: noqa: ASYNC110, ASYNC240  (a test's loop has nothing else to do meanwhile)
from __future__ import annotations

import asyncio
import sqlite3
import stat
import threading
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from manager.adapters.collections import open_collections, removal
from manager.adapters.collections import store as store_module
from manager.domain.embeddings import BackfillStatus, Counts, Failure, VersionState
from manager.errors import RegistryUnwritableError
from manager.services.embeddings.ports import Lacking
from tests.support.collecting import (
    ALL,
    NOW,
    Model,
    a_backfill,
    a_collection,
    a_version,
    an_item,
    filled,
    numbers_of,
    opened,
    rows_of,
    seen,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from manager.adapters.collections import SqlCollections

LATER = NOW + timedelta(seconds=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "embeddings.sqlite3"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqlCollections]:
    async with opened(path) as store:
        yield store


# --- the file ---


async def test_without_a_file_there_is_nothing_and_nothing_is_made(path: Path) -> None:
    async with opened(path) as store:
        assert await seen(store) == Model().seen()
        assert await store.counts(1) == Counts(0, 0)
        assert await store.item(1, "a") is None
        assert await store.page(1, None, 1) == ()
        assert await store.found(1, [1]) == {}
        assert await store.matching(1, lambda _: True) == await store.marked(1) == frozenset()
        assert await store.missing(1, 0, 1) == ()
        assert await store.failures(1, 1) == ()
        assert await store.rubbish(1, 1) == ()
        assert await store.lacking(1, 1) == Lacking((), ())
        assert await store.was_closed()
        version = replace(a_version(1), key=1)
        with pytest.raises(ValueError, match="there is no collection"):
            await store.add_version(version)
        await store.save_versions(version)
        await store.save_backfill(a_backfill(1, 1))
        await store.begin_backfill(a_backfill(1, 1), version)
        assert await store.switch(version, None, a_collection(), lambda _: True) == Counts(0, 0)
        assert not await store.put(1, [an_item(1, "a")], {}, 1)
        assert not await store.delete(1, "a")
        assert await store.mark(1, [1], NOW) == await store.unmark(1, None) == 0
        assert await store.failed(1, 1, "why", at_once=True) is None
        await store.add_rubbish(1, [1])
        await store.swept(1, [1])
        await store.remove(1)
        await store.remove_version(1)
    assert not any(path.parent.iterdir())


async def test_the_first_collection_makes_the_file(path: Path) -> None:
    async with opened(path) as store:
        assert await store.create(a_collection()) == 1
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("PRAGMA application_id").fetchone() == (0x4F4D4543,)
            assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert {one.name for one in path.parent.iterdir()} == {
            path.name,
            f"{path.name}-wal",
            f"{path.name}-shm",
        }
    assert [*path.parent.iterdir()] == [path]


async def test_a_commit_is_on_the_disk(store: SqlCollections) -> None:
    def look() -> tuple[int, int]:
        connection = store._writer.open()
        return tuple(
            connection.execute(f"PRAGMA {one}").fetchone()[0] for one in ("synchronous", "foreign_keys")
        )

    await store.create(a_collection())
    assert await store._writer.call(look) == (2, 1)


async def test_a_directory_that_is_missing_is_made_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "some" / "state" / "embeddings.sqlite3"
    async with opened(path) as store:
        assert not path.parent.exists()
        await store.create(a_collection())
    assert path.exists()


async def test_numbers_from_before_the_file_are_not_given_twice(path: Path) -> None:
    async with opened(path) as store:
        assert [await store.allocate(5), await store.allocate(1)] == [1, 6]
        await store.create(a_collection())
        assert await store.allocate(1000) == 7
    async with opened(path) as store:
        assert await store.allocate(1) == 1007


async def test_a_file_that_was_put_there_meanwhile_is_not_replaced(path: Path) -> None:
    async with opened(path) as store:
        path.write_bytes(b"of somebody else")
        with pytest.raises(RegistryUnwritableError, match="was put there meanwhile"):
            await store.create(a_collection())
    assert path.read_bytes() == b"of somebody else"


async def test_a_closed_store_refuses_calls(path: Path) -> None:
    store = await open_collections(path)
    await store.close()
    await store.close()
    for call in (store.collections(), store.create(a_collection()), store.allocate(1), store.remove(1)):
        with pytest.raises(RegistryUnwritableError, match="the file of collections is closed"):
            await call
    assert not path.exists()


# --- whether it was closed ---


async def test_a_store_that_is_closed_says_so(path: Path) -> None:
    async with opened(path) as store:
        await store.create(a_collection())
        assert await store.was_closed()
    async with opened(path) as store:
        assert await store.was_closed()


async def test_a_store_that_was_written_and_not_closed_says_so(path: Path) -> None:
    async with opened(path) as store:
        await store.create(a_collection())
    store = await open_collections(path)
    await store.delete(1, "a")
    assert await store.was_closed()  # the last one
    await store.abandon()
    store = await open_collections(path)
    assert not await store.was_closed()
    await store.abandon()
    async with opened(path) as store:
        assert not await store.was_closed()
        await store.delete(1, "a")
        assert not await store.was_closed()
    async with opened(path) as store:
        assert await store.was_closed()


async def test_a_store_that_was_only_read_counts_as_closed(path: Path) -> None:
    async with opened(path) as store:
        await store.create(a_collection())
    store = await open_collections(path)
    assert len(await store.collections()) == 1
    await store.abandon()
    async with opened(path) as store:
        assert await store.was_closed()


async def test_the_file_is_noted_as_open_before_the_first_change(path: Path) -> None:
    async with opened(path) as store:
        await store.create(a_collection())
    store = await open_collections(path)
    told: list[str] = []
    await store._writer.call(lambda: store._writer.open().set_trace_callback(told.append))
    await store.create(a_collection("other"))
    await store.create(a_collection("third"))
    await store.abandon()
    said = [one.split()[0] for one in told]
    assert said[:6] == ["BEGIN", "UPDATE", "COMMIT", "BEGIN", "INSERT", "COMMIT"]
    assert told[1] == "UPDATE meta SET is_closed = 0"
    assert said[6:] == ["BEGIN", "INSERT", "COMMIT"]


# --- collections, versions and backfills ---


async def test_collections_and_versions_come_back_as_they_were_stored(path: Path) -> None:
    zone = timezone(timedelta(hours=2))
    one = replace(
        a_collection("one"), model="bge:q4", prefix="é: ", asked=512, truncate=True, keep_text=False
    )
    other = replace(a_collection("other"), created_at=NOW.astimezone(zone))
    async with opened(path) as store:
        keys = [await store.create(one), await store.create(other)]
        recipe = replace(a_version(1).recipe, asked=512, prefix="p", truncate=True, digest=None)
        full = replace(
            a_version(keys[0]),
            recipe=recipe,
            activated_at=NOW,
            archived_at=LATER,
            stale_since=LATER + timedelta(microseconds=1),
            policy="gpu_only",
        )
        bare = a_version(keys[1], state=VersionState.BUILDING)
        versions = [await store.add_version(full), await store.add_version(bare)]
        assert keys == [1, 2]
        assert versions == [versions[0], versions[0] + 1]
        ended = replace(
            a_backfill(keys[1], versions[1]),
            status=BackfillStatus.FAILED,
            rate=1.5,
            auto_cutover=False,
            ended_at=LATER,
            error="why \ud800",
        )
        await store.save_backfill(a_backfill(keys[1], 2))
        await store.save_backfill(ended)
        await store.save_backfill(a_backfill(keys[0], versions[0]))
    async with opened(path) as store:
        assert await store.collections() == (replace(one, key=1), replace(other, key=2))
        assert await store.versions() == (
            replace(full, key=versions[0]),
            replace(bare, key=versions[1]),
        )
        assert await store.backfills() == (
            a_backfill(1, versions[0]),
            replace(ended, error="why \\ud800"),
        )


async def test_names_are_unique(store: SqlCollections) -> None:
    await store.create(a_collection())
    with pytest.raises(ValueError, match="there is a collection docs already"):
        await store.create(a_collection())
    assert await store.create(a_collection("other")) == 2


async def test_keys_are_never_used_again(path: Path) -> None:
    async with opened(path) as store:
        collection, first = await filled(store)
        assert collection == 1
        await store.remove(1)
        assert await filled(store) == (2, first + 1)
        await store.remove_version(first + 1)
    async with opened(path) as store:
        assert await store.add_version(a_version(2)) == first + 2
        await store.remove(2)
        assert await filled(store) == (3, first + 3)


async def test_the_keys_of_a_new_file_are_none_of_an_earlier_one(tmp_path: Path) -> None:
    """Tables of vectors may be left of a file that was lost."""
    async with opened(tmp_path / "embeddings.sqlite3", first_version=1000) as store:
        assert (await filled(store))[1] == 1000


async def test_a_version_needs_a_collection_and_one_is_active(store: SqlCollections) -> None:
    collection, version = await filled(store)
    for wrong in (a_version(7), a_version(collection, "d2")):
        with pytest.raises(ValueError, match="cannot be stored"):
            await store.add_version(wrong)
    assert [one.key for one in await store.versions()] == [version]
    # a backfill goes with its version
    await store.save_backfill(a_backfill(collection, version))
    await store.remove_version(version)
    await store.save_backfill(a_backfill(collection, version))
    await store.save_versions(replace(a_version(collection), key=version))
    assert await store.backfills() == ()
    assert await store.versions() == ()
    assert await store.item_counts() == {collection: 3}


async def test_versions_are_stored_together_in_any_order(store: SqlCollections) -> None:
    collection, first = await filled(store)
    second = await store.add_version(a_version(collection, "d2", VersionState.BUILDING))
    old, new = await store.versions()
    old, new = old.moved(VersionState.ARCHIVED, LATER), new.moved(VersionState.ACTIVE, LATER)
    await store.save_versions(new, old)
    assert await store.versions() == (old, new)
    twice = replace(old, state=VersionState.ACTIVE)
    with pytest.raises(ValueError, match="cannot be stored"):
        await store.save_versions(replace(new, policy="changed"), twice)
    assert await store.versions() == (old, new)
    assert [old.key, new.key] == [first, second]


async def test_a_backfill_begins_without_the_failures_of_the_last_one(store: SqlCollections) -> None:
    collection, first = await filled(store)
    second = await store.add_version(a_version(collection, "d2", VersionState.ARCHIVED))
    number = (await numbers_of(store, collection))["i1"]
    await store.failed(second, number, "why", at_once=True)
    await store.unmark(first, [number])
    await store.failed(first, number, "why", at_once=True)
    changed = (await store.versions())[1].moved(VersionState.BUILDING, LATER)
    await store.begin_backfill(a_backfill(collection, second), changed)
    assert await store.backfills() == (a_backfill(collection, second),)
    assert (await store.versions())[1] == changed
    assert await store.all_counts() == {first: Counts(3, 2, 1), second: Counts(3, 0, 0)}
    assert await store.failures(second, 9) == ()


@pytest.mark.parametrize("is_allowed", [True, False])
async def test_a_switch_happens_where_the_counts_allow_it(store: SqlCollections, is_allowed: bool) -> None:
    collection, _ = await filled(store)
    await store.add_version(a_version(collection, "d2", VersionState.BUILDING))
    (known,), (old, new) = before = await store.collections(), await store.versions()
    await store.mark(new.key, [1, 2], NOW)
    old, new = old.moved(VersionState.ARCHIVED, LATER), new.moved(VersionState.ACTIVE, LATER)
    changed = replace(known, model="other")
    told: list[Counts] = []

    def allowed(counts: Counts) -> bool:
        told.append(counts)
        return is_allowed

    answer = await store.switch(new, old, changed, allowed)
    assert told == [Counts(3, 2)]
    assert answer == (None if is_allowed else Counts(3, 2))
    after = await store.collections(), await store.versions()
    assert after == (((changed,), (old, new)) if is_allowed else before)
    assert await store.switch(replace(new, key=9), None, changed, allowed) == Counts(0, 0)


async def test_a_switch_sees_its_counts_in_its_transaction(store: SqlCollections, path: Path) -> None:
    await filled(store)
    (known,) = await store.versions()

    def allowed(_: Counts) -> bool:
        with closing(sqlite3.connect(path, timeout=0)) as other, pytest.raises(sqlite3.OperationalError):
            other.execute("BEGIN IMMEDIATE")
        raise ZeroDivisionError

    changed = replace(known, policy="changed")
    with pytest.raises(ZeroDivisionError):
        await store.switch(changed, None, (await store.collections())[0], allowed)
    assert await store.versions() == (known,)
    assert await store.allocate(1)


# --- items ---


async def test_items_come_back_as_they_were_stored(store: SqlCollections) -> None:
    collection, version = await filled(store, 0)
    items = [
        an_item(1, "a"),
        an_item(2, "ü\0/…", b'{"a": [1, null]}')._replace(text=None),
        an_item(3, "")._replace(text=""),
        an_item(2**40, "x" * 512)._replace(text="\0" * 1000),
    ]
    assert await store.put(collection, items, {version: [1, 2**40]}, version)
    assert [await store.item(collection, one.id) for one in items] == [
        (items[0], {version: items[0].created_at}),
        (items[1], {}),
        (items[2], {}),
        (items[3], {version: items[3].created_at}),
    ]
    assert await store.page(collection, None, 9) == (items[2], items[0], items[3], items[1])
    assert await store.page(collection, "a", 1) == (items[3],)
    assert await store.page(collection, "ü\0/…", 9) == ()
    assert await store.page(collection, None, 0) == await store.page(collection, None, -1) == ()
    assert await store.item(collection, "ü") is None
    assert await store.item_counts() == {collection: 4}


async def test_an_item_and_its_vectors_are_of_one_moment(store: SqlCollections, path: Path) -> None:
    collection, version = await filled(store)
    told: list[str] = []

    def removes(statement: str) -> None:
        told.append(statement)
        if "FROM vectors" in statement:
            with closing(sqlite3.connect(path)) as other:
                other.execute("DELETE FROM vectors")
                other.commit()

    await store._reader.call(lambda: store._reader.open().set_trace_callback(removes))
    found = await store.item(collection, "i0")
    assert found is not None
    assert found[1] == {version: found[0].created_at}
    assert len(told) == 4
    await store._reader.call(lambda: store._reader.open().set_trace_callback(None))
    assert await store.item(collection, "i0") == (found[0], {})


async def test_an_item_that_is_stored_again_leaves_rubbish_in_each_table(store: SqlCollections) -> None:
    collection, first = await filled(store, 250)
    second = await store.add_version(a_version(collection, "d2", VersionState.BUILDING))
    assert await store.mark(second, [5, 7], LATER) == 2
    await store.failed(second, 6, "why", at_once=True)
    await store.failed(second, 8, "why", at_once=True)
    items = [an_item(300 + place, f"i{place}", b"{}") for place in range(3, 7)]  # 4, 5, 6, 7 before
    marks = {first: [303, 304, 305], second: [306], 99: [303]}
    assert await store.put(collection, items, marks, first)
    assert await store.rubbish(first, ALL) == (4, 5, 6, 7)
    assert await store.rubbish(first, 2) == (4, 5)
    assert await store.rubbish(second, ALL) == (5, 7)
    assert await store.all_counts() == {first: Counts(250, 249), second: Counts(250, 1, 1)}
    assert await store.item(collection, "i6") == (items[3], {second: items[3].created_at})
    assert await store.found(first, [4, 5, 303, 306, 99999]) == {303: (303, "i3", b"{}", items[0].created_at)}
    await store.swept(first, [4, 6, 99])
    assert await store.rubbish(first, ALL) == (5, 7)
    assert await store.rubbish(second, ALL) == (5, 7)


async def test_nothing_is_stored_where_the_version_is_not_active_any_more(store: SqlCollections) -> None:
    collection, version = await filled(store)
    other, others = await filled(store, name="other")
    building = await store.add_version(a_version(collection, "d2", VersionState.BUILDING))
    before = await seen(store)
    for where, active in ((collection, building), (collection, others), (collection, 99), (99, version)):
        assert not await store.put(where, [an_item(100, "i0")], {version: [100]}, active)
    assert await seen(store) == before
    # a version of another collection gets no marks
    assert await store.put(other, [an_item(100, "i0")], {version: [100], others: [100]}, others)
    assert await store.counts(version) == Counts(3, 3)
    await store.remove(collection)
    assert not await store.put(collection, [an_item(101, "i0")], {}, version)


@pytest.mark.parametrize(
    ("items", "marks", "problem"),
    [
        ([an_item(10, "a"), an_item(11, "a")], [], "each id once"),
        ([an_item(10, "a"), an_item(10, "b")], [], "cannot be stored"),
        ([an_item(10, "a"), an_item(2, "b")], [], "cannot be stored"),
        ([an_item(10, "i0")], [10, 11], "1 numbers are of no item"),
        ([an_item(10, "i0"), an_item(11, "b")._replace(created_at=datetime(2026, 1, 1))], [], "no time zone"),  # noqa: DTZ001
    ],
)
async def test_a_put_that_is_wrong_stores_nothing(
    store: SqlCollections, items: Any, marks: list[int], problem: str
) -> None:
    collection, version = await filled(store)
    before = await seen(store)
    with pytest.raises(ValueError, match=problem):
        await store.put(collection, items, {version: marks}, version)
    assert await seen(store) == before


async def test_an_item_is_deleted_with_its_vectors(store: SqlCollections) -> None:
    collection, version = await filled(store)
    assert await store.delete(collection, "i1")
    assert not await store.delete(collection, "i1")
    assert not await store.delete(99, "i0")
    assert await store.counts(version) == Counts(2, 2)
    assert await store.rubbish(version, 9) == (2,)
    assert await store.item(collection, "i1") is None


async def test_metadata_that_match(store: SqlCollections) -> None:
    collection, version = await filled(store, 0)
    texts = [b'{"a":1}', b'{"a":2}', b"no JSON", b'{"a":1}', b'{"a":1}']
    items = [an_item(place + 1, f"i{place}", text) for place, text in enumerate(texts)]
    assert await store.put(collection, items, {version: [1, 2, 3, 4]}, version)
    assert await store.matching(version, lambda values: values["a"] == 1) == {1, 4}
    assert await store.matching(99, lambda _: True) == frozenset()
    with pytest.raises(KeyError):
        await store.matching(version, lambda values: bool(values["b"]))


async def test_a_long_look_holds_up_neither_writes_nor_reads(
    store: SqlCollections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_LOOK", 10)
    collection, version = await filled(store, 100)
    has_begun, may_end = threading.Event(), threading.Event()

    def is_wanted(_: object) -> bool:
        has_begun.set()
        return may_end.wait(30)

    looking = asyncio.create_task(store.matching(version, is_wanted))
    while not has_begun.is_set():
        await asyncio.sleep(0)
    reading = asyncio.create_task(store.counts(version))
    assert await store.delete(collection, "i99")
    assert not reading.done()
    may_end.set()
    assert await reading == Counts(99, 99)
    assert not looking.done()
    assert await looking == {*range(1, 100)}


# --- failures and marks ---


async def test_an_item_goes_into_quarantine_after_three_failures(store: SqlCollections) -> None:
    collection, _ = await filled(store)
    version = await store.add_version(a_version(collection, "d2", VersionState.BUILDING))
    for attempts in (1, 2, 3, 4):
        failure = await store.failed(version, 2, f"why {attempts}", at_once=False)
        assert failure == Failure("i1", attempts, f"why {attempts}", quarantined=attempts >= 3)
        assert await store.counts(version) == Counts(3, 0, int(attempts >= 3))
        assert len(await store.missing(version, 0, 9)) == (3 if attempts < 3 else 2)
    assert await store.failed(version, 1, "bad \ud800", at_once=True) == Failure("i0", 1, "bad \\ud800", True)
    assert await store.failed(version, 1, "again", at_once=False) == Failure("i0", 2, "again", True)
    assert await store.failed(version, 99, "why", at_once=True) is None
    assert await store.failed(99, 1, "why", at_once=True) is None
    assert await store.lacking(version, 9) == Lacking(("i2",), ("i0", "i1"))
    assert await store.lacking(version, 1) == Lacking(("i2",), ("i0",))
    assert [one.id for one in await store.failures(version, 1)] == ["i0"]
    # a vector ends the quarantine, and an item that has one cannot fail
    assert await store.mark(version, [1, 2], NOW) == 2
    assert await store.counts(version) == Counts(3, 2, 0)
    assert await store.failures(version, 9) == ()
    assert await store.failed(version, 1, "why", at_once=True) is None
    assert await store.counts(version) == Counts(3, 2, 0)


async def test_items_of_another_collection_do_not_count(store: SqlCollections) -> None:
    _, version = await filled(store)
    other, others = await filled(store, name="other")
    await store.unmark(version, None)
    mine = (await numbers_of(store, other))["i0"]
    assert await store.failed(version, mine, "why", at_once=True) is None
    assert await store.mark(version, [mine, 1, 1, 777], LATER) == 1
    assert await store.rubbish(version, 9) == (mine, 777)
    assert await store.all_counts() == {version: Counts(3, 1), others: Counts(3, 3)}
    assert await store.mark(99, [1], NOW) == 0
    assert (await store.found(version, [1]))[1].embedded_at == LATER
    assert await store.mark(version, [1], NOW) == 1
    assert (await store.found(version, [1]))[1].embedded_at == NOW


async def test_missing_items_come_by_number(store: SqlCollections) -> None:
    collection, _ = await filled(store, 10)
    version = await store.add_version(a_version(collection, "d2", VersionState.BUILDING))
    await store.mark(version, [2, 9], NOW)
    numbers: list[int] = []
    while some := await store.missing(version, numbers[-1] if numbers else 0, 3):
        assert len(some) <= 3
        numbers += [one.number for one in some]
    assert numbers == [1, 3, 4, 5, 6, 7, 8, 10]
    assert (await store.missing(version, 9, 9))[0] == (await store.item(collection, "i9"))[0]  # type: ignore[index]
    assert await store.missing(version, 0, -1) == await store.missing(99, 0, 9) == ()


async def test_vectors_are_unmarked(store: SqlCollections) -> None:
    _, version = await filled(store, 5)
    await store.add_rubbish(version, [3, 50])
    assert await store.rubbish(version, 9) == (50,)  # the row of an item is none
    assert await store.unmark(version, [2, 4, 99]) == 2
    assert await store.marked(version) == {1, 3, 5}
    assert await store.rubbish(version, 9) == (2, 4, 50)
    assert [one.number for one in await store.missing(version, 0, 9)] == [2, 4]
    assert await store.mark(version, [2], NOW) == 1
    assert await store.rubbish(version, 9) == (4, 50)
    # the table is gone: so is its rubbish
    assert await store.unmark(version, None) == 4
    assert await store.rubbish(version, 9) == ()
    assert await store.counts(version) == Counts(5, 0)
    assert (
        await store.unmark(version, None) == await store.unmark(99, None) == await store.unmark(99, [1]) == 0
    )
    assert await store.mark(version, [1], NOW) == 1
    assert await store.unmark(version, [1]) == 1
    assert await store.rubbish(version, 9) == (1,)
    await store.add_rubbish(99, [1])
    assert await store.rubbish(99, 9) == ()


async def test_rubbish_of_a_table_that_is_gone_is_not_even_written(store: SqlCollections) -> None:
    _, version = await filled(store, 300)
    changes = await store._writer.call(lambda: store._writer.open().total_changes)
    assert await store.unmark(version, None) == 300
    changes -= await store._writer.call(lambda: store._writer.open().total_changes)
    assert -changes < 650  # each vector, and the number of them


async def test_many_marks_are_read_some_at_a_time(
    store: SqlCollections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_LOOK", 7)
    _, version = await filled(store, 50)
    assert await store.marked(version) == {*range(1, 51)}
    assert await store.matching(version, lambda _: True) == {*range(1, 51)}


# --- long removals ---

ROWS = ("items", "vectors", "failures", "rubbish", "removed", "backfills", "versions", "collections")


async def test_a_removal_leaves_nothing(store: SqlCollections, path: Path) -> None:
    collection, version = await filled(store)
    building = await store.add_version(a_version(collection, "d2", VersionState.BUILDING))
    await store.failed(building, 1, "why", at_once=True)
    await store.delete(collection, "i1")
    await store.save_backfill(a_backfill(collection, building))
    assert {table: rows_of(path, table) for table in ROWS[:4]} == dict.fromkeys(ROWS[:4], 2) | {
        "failures": 1,
        "rubbish": 1,
    }
    await store.remove_version(building)
    assert rows_of(path, "failures") == rows_of(path, "backfills") == 0
    await store.remove_version(building)
    await store.remove_version(99)
    assert await store.all_counts() == {version: Counts(2, 2)}
    await store.remove(collection)
    await store.remove(collection)
    assert {table: rows_of(path, table) for table in ROWS} == dict.fromkeys(ROWS, 0)


@pytest.mark.parametrize("removes_version", [True, False])
async def test_other_calls_go_on_during_a_long_removal(
    store: SqlCollections, path: Path, monkeypatch: pytest.MonkeyPatch, removes_version: bool
) -> None:
    monkeypatch.setattr(removal, "SLICE", 5)
    collection, version = await filled(store, 200)
    other, others = await filled(store, name="other")
    removed = store.remove_version(version) if removes_version else store.remove(collection)
    removing = asyncio.create_task(removed)
    while version in await store.all_counts():
        await asyncio.sleep(0)
    # nobody sees what is left
    assert rows_of(path, "vectors") > 3
    assert await store.found(version, [*range(200)]) == {}
    assert await store.marked(version) == await store.matching(version, lambda _: True) == frozenset()
    assert await store.mark(version, [1], NOW) == 0
    assert await store.rubbish(version, 9) == ()
    assert await store.missing(version, 0, 9) == ()
    if removes_version:
        assert await store.item_counts() == {collection: 200, other: 3}
        assert await store.item(collection, "i0") == (an_item(1, "i0"), {})
        assert await store.delete(collection, "i199")
        assert await store.add_version(a_version(collection)) > others
    else:
        assert await store.item_counts() == {other: 3}
        assert await store.page(collection, None, 9) == ()
        assert await store.item(collection, "i199") is None
        assert not await store.delete(collection, "i199")
        assert await store.create(a_collection()) > other
    calls = 0
    while not removing.done():
        assert await store.mark(others, [201], NOW) == 1
        calls += 1
    assert calls > 10
    await removing
    assert rows_of(path, "vectors") == 3
    assert rows_of(path, "removed") == rows_of(path, "rubbish") == 0
    assert rows_of(path, "items") == (202 if removes_version else 3)


async def test_a_removal_that_is_cancelled_goes_on(
    store: SqlCollections, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "SLICE", 5)
    collection, _ = await filled(store, 100)
    removing = asyncio.create_task(store.remove(collection))
    await asyncio.sleep(0)
    removing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await removing
    async with asyncio.timeout(30):
        while rows_of(path, "removed") or rows_of(path, "items"):
            await store.allocate(1)
    assert await store.all_counts() == {}


async def test_the_next_opening_finishes_a_removal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "SLICE", 5)
    store = await open_collections(path)
    collection, _ = await filled(store, 100)
    other, others = await filled(store, 10, "other")
    removing = [
        asyncio.create_task(store.remove(collection)),
        asyncio.create_task(store.remove_version(others)),
    ]
    while await store.all_counts():
        await asyncio.sleep(0)
    with capture_logs() as logs:
        await store.close()
        assert not store._removals
    await asyncio.gather(*removing)  # it has happened, for all who look
    assert logs == []
    assert rows_of(path, "items") > 10
    async with opened(path, stores=False) as unchanged:
        assert await unchanged.item_counts() == {other: 10}
    left = rows_of(path, "items")
    async with opened(path) as store:
        assert await store.was_closed()
        assert rows_of(path, "items") in range(left - 20, left + 1)
        async with asyncio.timeout(30):
            while rows_of(path, "removed"):
                await store.allocate(1)
        assert await store.item_counts() == {other: 10}
    assert (rows_of(path, "items"), rows_of(path, "vectors")) == (10, 0)


async def test_rows_that_cannot_be_removed_now_are_removed_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> bool:
        raise sqlite3.OperationalError("disk I/O error")

    async with opened(path) as store:
        collection, _ = await filled(store)
        with monkeypatch.context() as patched:
            patched.setattr(removal, "remove_rows", fails)
            with capture_logs() as logs:
                await store.remove(collection)
        assert [one["event"] for one in logs] == ["rows_left"]
        assert await store.collections() == ()
        assert rows_of(path, "items") == 3
    async with opened(path) as store:
        async with asyncio.timeout(30):
            while rows_of(path, "removed"):
                await store.allocate(1)
    assert rows_of(path, "items") == 0


# --- cancelled calls, order and speed ---


async def test_a_call_that_is_cancelled_happens_completely_or_not_at_all(store: SqlCollections) -> None:
    collection, version = await filled(store, 0)
    puts = []
    for batch in range(30):
        items = [an_item(batch * 20 + place + 1, f"{batch}-{place}") for place in range(20)]
        marks = {version: [item.number for item in items]}
        puts.append(asyncio.create_task(store.put(collection, items, marks, version)))
    while not puts[3].done():
        await asyncio.sleep(0)
    for put in puts[::2]:
        put.cancel()
    done = await asyncio.gather(*puts, return_exceptions=True)
    stored = {int(name.partition("-")[0]) for name in await numbers_of(store, collection)}
    assert {place for place, one in enumerate(done) if one is True} <= stored
    assert set(range(1, 30, 2)) <= stored
    assert len(stored) < 30
    assert await store.counts(version) == Counts(20 * len(stored), 20 * len(stored))


async def test_writes_happen_in_the_order_of_the_calls(store: SqlCollections) -> None:
    collection, version = await filled(store, 0)
    puts = [store.put(collection, [an_item(number, "a")], {}, version) for number in range(1, 30)]
    assert all(await asyncio.gather(*puts))
    assert await numbers_of(store, collection) == {"a": 29}


async def test_no_call_reads_all_items(store: SqlCollections) -> None:
    collection, first = await filled(store)
    second = await store.add_version(a_version(collection, "d2", VersionState.BUILDING))
    told: list[str] = []
    connections = (store._reader, store._writer)
    for one in connections:
        await one.call(lambda one=one: one.open().set_trace_callback(told.append))  # type: ignore[misc]
    await store.put(collection, [an_item(50, "i0"), an_item(51, "i9")], {second: [50]}, first)
    await store.failed(second, 2, "why", at_once=True)
    await store.mark(second, [2, 3, 99], NOW)
    await store.unmark(second, [2])
    await store.unmark(second, None)
    await store.add_rubbish(second, [77])
    await store.swept(second, [77])
    await store.begin_backfill(a_backfill(collection, second))
    await store.delete(collection, "i0")
    await seen(store)
    await store.page(collection, "i1", 5)
    await store.counts(second)
    await store.remove_version(second)
    await store.remove(collection)
    statements = {one for one in told if one.split()[0] in ("SELECT", "INSERT", "UPDATE", "DELETE")}
    assert len(statements) > 60

    def explain() -> list[tuple[str, str]]:
        connection = store._writer.open()
        connection.set_trace_callback(None)
        return [
            (statement, row[3])
            for statement in statements
            for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")
        ]

    plans = await store._writer.call(explain)
    large = ("items", "vectors", "failures", "rubbish")
    assert not [one for one in plans if one[1].startswith(tuple(f"SCAN {table}" for table in large))]
    assert not [one for one in plans if "TEMP B-TREE" in one[1] and "removed" not in one[0]]
    # an index is no use where it leaves a search through all items of a collection
    looks = [one for one in plans if "SEARCH items" in one[1] and "(collection=?)" in one[1]]
    assert all("LIMIT" in statement for statement, _ in looks)
