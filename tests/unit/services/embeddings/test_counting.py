"""The counts that metrics show, over the real store."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from manager.domain.embeddings import Counts, unit_vector
from manager.errors import RegistryUnwritableError
from manager.services.embeddings import counting
from manager.services.embeddings.backfilling import NewBackfill
from manager.services.embeddings.counting import Counting
from manager.services.embeddings.shelf import Shelf
from manager.services.embeddings.switching import NewCollection
from manager.services.embeddings.writing import NewItem
from tests.support.embedding_server import digest_of, vector_of
from tests.support.inside import until
from tests.unit.services.embeddings.rig import ASKING, MODEL, Rig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    found = Rig(tmp_path)
    await found.open()
    yield found
    await found.close()


async def collection(rig: Rig, name: str, *texts: str) -> None:
    await rig.switching.create(NewCollection(name, MODEL, "", None, truncate=False, keep_text=True))
    if texts:
        items = [NewItem(f"i{at}", text, None, b"{}") for at, text in enumerate(texts)]
        await rig.writing.put(name, items, ASKING)


async def ended(rig: Rig, name: str) -> None:
    await until(lambda: rig.shelf.get(name).backfill, lambda found: found is not None and not found.is_open)


async def test_what_is_counted_is_what_is_stored_the_oldest_collection_first(rig: Rig) -> None:
    counts = Counting(rig.shelf)
    await counts.read()
    assert [*counts.last] == []
    await collection(rig, "zebra", "a", "b", "c")
    await collection(rig, "ant")
    await counts.read()
    zebra, ant = counts.last
    assert (zebra.name, zebra.items, zebra.is_filled, zebra.has_failed) == ("zebra", 3, False, False)
    (version,) = zebra.versions
    assert (version.counts, version.is_active, version.is_stale) == (Counts(3, 3), True, False)
    assert (ant.name, ant.items, ant.versions) == ("ant", 0, ())
    await rig.switching.remove("zebra")
    await rig.switching.remove("ant")
    await counts.read()
    assert [*counts.last] == []


async def test_versions_and_backfills_are_told_as_they_are(rig: Rig) -> None:
    counts = Counting(rig.shelf)
    await collection(rig, "docs", "a", "b", "c")
    first = rig.shelf.get("docs").active
    assert first is not None
    rig.embeds.builds[MODEL] = digest_of("second")
    await rig.tending.look_at_build(first)
    await counts.read()
    assert [(one.is_active, one.is_stale) for one in counts.last[0].versions] == [(True, True)]
    may_embed = asyncio.Event()

    async def hold(texts: Sequence[str]) -> None:
        if "a" in texts:  # not the text that shows the build
            await may_embed.wait()

    rig.embeds.before = hold
    await rig.backfilling.begin("docs", NewBackfill(), MODEL, ASKING)
    await counts.read()
    assert counts.last[0].is_filled
    assert [one.counts for one in counts.last[0].versions] == [Counts(3, 3), Counts(3, 0)]
    may_embed.set()
    await ended(rig, "docs")
    building = rig.shelf.get("docs").building
    assert building is not None
    await rig.switching.cut_over("docs", building.id)
    await counts.read()
    (docs,) = counts.last
    assert not docs.is_filled
    assert [(one.is_active, one.is_stale) for one in docs.versions] == [(False, False), (True, False)]
    assert docs.versions[1].counts == Counts(3, 3)


async def test_items_in_quarantine_and_a_backfill_that_fails_are_counted(rig: Rig) -> None:
    counts = Counting(rig.shelf)
    await collection(rig, "docs", "a", "b")
    vector = unit_vector(vector_of(digest_of("first"), "c"))
    await rig.writing.put("docs", [NewItem("c", None, vector, b"{}")], ASKING)
    rig.embeds.builds[MODEL] = digest_of("second")
    await rig.backfilling.begin("docs", NewBackfill(), MODEL, ASKING)
    await ended(rig, "docs")
    await counts.read()
    assert counts.last[0].versions[1].counts == Counts(3, 2, 1)
    assert not counts.last[0].has_failed

    async def replace_again(texts: Sequence[str]) -> None:
        if "a" in texts:
            rig.embeds.builds[MODEL] = digest_of("fourth")

    rig.embeds.builds[MODEL] = digest_of("third")
    rig.embeds.before = replace_again
    await rig.backfilling.begin("docs", NewBackfill(), MODEL, ASKING)
    await ended(rig, "docs")
    await counts.read()
    assert counts.last[0].has_failed


async def test_the_last_counts_stay_while_the_store_does_not_answer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_EVERY_S", 0.01)
    await collection(rig, "docs", "a")
    failed = asyncio.Event()
    broken = False

    class Store:
        async def item_counts(self) -> object:
            if broken:
                failed.set()
                raise RegistryUnwritableError("the disk is full")
            return await rig.store.item_counts()

        async def all_counts(self) -> object:
            return await rig.store.all_counts()

    shelf = Shelf(Store(), rig.tables)  # type: ignore[arg-type]
    shelf.add(rig.shelf.get("docs"))
    shelf.checked()
    counts = Counting(shelf)
    task = asyncio.ensure_future(counts.run())
    async with asyncio.timeout(60):
        await until(lambda: counts.last)
        broken = True
        await failed.wait()
        failed.clear()
        await failed.wait()
    assert counts.last[0].items == 1
    assert not task.done()
    task.cancel()
