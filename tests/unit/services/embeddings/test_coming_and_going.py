"""Collections and versions while they are made and removed: each call sees one that is there, or none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.embeddings import unit_vector
from manager.errors import RegistryUnwritableError, UnknownCollectionError
from manager.services.embeddings.backfilling import NewBackfill
from manager.services.embeddings.querying import Query
from manager.services.embeddings.switching import NewCollection
from manager.services.embeddings.writing import NewItem
from tests.unit.services.embeddings.rig import ASKING, MODEL, Rig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

DOCS = NewCollection("docs", MODEL, "", asked=None, truncate=False, keep_text=True)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    await rig.open()
    yield rig
    await rig.close()


async def test_items_that_come_while_their_collection_is_stored_are_written(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, may_go_on = asyncio.Event(), asyncio.Event()
    create = rig.store.create

    async def slow(collection: Any) -> int:
        reached.set()
        await may_go_on.wait()
        return await create(collection)

    monkeypatch.setattr(rig.store, "create", slow)
    creating = asyncio.ensure_future(rig.switching.create(DOCS))
    await reached.wait()
    writing = asyncio.ensure_future(rig.writing.put("docs", [NewItem("a", "x", None, b"{}")], ASKING))
    while not rig.embeds.texts:  # noqa: ASYNC110
        await asyncio.sleep(0)
    may_go_on.set()
    await creating
    assert (await writing).items == 1
    assert (await rig.switching.overview("docs")).items == 1


@pytest.fixture
async def filled(rig: Rig) -> Rig:
    """`docs` with an item, an active version, and one that a backfill has filled."""
    await rig.switching.create(DOCS)
    await rig.writing.put("docs", [NewItem("a", "x", None, b"{}")], ASKING)
    await rig.backfilling.begin("docs", NewBackfill(prefix="other "), MODEL, ASKING)
    async with asyncio.timeout(30):
        while (await rig.backfilling.state("docs")).backfill.is_open:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    return rig


class Held:
    """Holds a removal once its first transaction has happened: nobody sees the rows that are left."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.may_go_on = asyncio.Event(), asyncio.Event()
        remove_rows = rig.store._remove_rows

        async def slow(left: Any) -> None:
            self.reached.set()
            await self.may_go_on.wait()
            await remove_rows(left)

        monkeypatch.setattr(rig.store, "_remove_rows", slow)


@pytest.fixture
def held(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(rig, monkeypatch)
    yield held
    held.may_go_on.set()


async def test_a_collection_whose_rows_go_is_not_there(
    filled: Rig, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    vector = unit_vector([1.0] * 16)
    searched, may_search = asyncio.Event(), asyncio.Event()
    search = filled.tables.search

    async def slow(*args: Any) -> Any:
        searched.set()
        await may_search.wait()
        return await search(*args)

    monkeypatch.setattr(filled.tables, "search", slow)
    asking = asyncio.ensure_future(filled.querying.query("docs", Query(None, vector, 1), ASKING))
    await searched.wait()
    removing = asyncio.ensure_future(filled.switching.remove("docs"))
    await held.reached.wait()
    may_search.set()
    # None of them says that it is there and empty.
    for call in (
        asking,
        filled.querying.query("docs", Query(None, vector, 1), ASKING),
        filled.switching.overview("docs"),
        filled.writing.page("docs", None, 1),
        filled.writing.put("docs", [NewItem("a", "x", None, b"{}")], ASKING),
    ):
        with pytest.raises(UnknownCollectionError):
            await call
    assert await filled.switching.overviews() == []
    held.may_go_on.set()
    await removing
    await filled.switching.create(DOCS)


async def test_a_version_whose_rows_go_is_not_there(filled: Rig, held: Held) -> None:
    vector = unit_vector([1.0] * 16)
    other = filled.shelf.get("docs").building
    assert other is not None
    removing = asyncio.ensure_future(filled.switching.remove_version("docs", other.id))
    await held.reached.wait()
    with pytest.raises(UnknownCollectionError):
        await filled.querying.query("docs", Query(None, vector, 1, other.id), ASKING)
    held.may_go_on.set()
    await removing


async def test_a_removal_that_fails_leaves_what_was_there(
    filled: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(_: int) -> None:
        raise RegistryUnwritableError("the disk is full")

    other = filled.shelf.get("docs").building
    assert other is not None
    monkeypatch.setattr(filled.store, "remove", full)
    monkeypatch.setattr(filled.store, "remove_version", full)
    with pytest.raises(RegistryUnwritableError):
        await filled.switching.remove("docs")
    with pytest.raises(RegistryUnwritableError):
        await filled.switching.remove_version("docs", other.id)
    assert filled.shelf.get("docs").version(other.id) is other
    assert (await filled.switching.overview("docs")).items == 1


async def test_a_backfill_of_a_collection_that_is_removed_has_not_succeeded(rig: Rig, held: Held) -> None:
    await rig.switching.create(DOCS)
    items = [NewItem(str(at), f"text {at}", None, b"{}") for at in range(3)]
    await rig.writing.put("docs", items, ASKING)
    await rig.backfilling.begin("docs", NewBackfill(prefix="other ", rate=1.0), MODEL, ASKING)
    removing = asyncio.ensure_future(rig.switching.remove("docs"))
    await held.reached.wait()
    await asyncio.sleep(1.5)  # the next batch finds no items
    held.may_go_on.set()
    await removing
    async with asyncio.timeout(30):
        while rig.backfilling._working:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert "backfill_succeeded" not in rig.journal.events
