"""A roll-back finds the version that was active before, whatever happened to it since."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from manager.domain.embeddings import BackfillStatus
from manager.services.embeddings.backfilling import NewBackfill
from manager.services.embeddings.switching import NewCollection
from manager.services.embeddings.writing import NewItem
from tests.unit.services.embeddings.rig import ASKING, MODEL, Rig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    await rig.open()
    await rig.switching.create(NewCollection("docs", MODEL, "", None, truncate=False, keep_text=True))
    await rig.writing.put("docs", [NewItem(str(at), f"t {at}", None, b"{}") for at in range(8)], ASKING)
    yield rig
    await rig.close()


async def backfilled(rig: Rig, prefix: str, *, auto_cutover: bool = False) -> None:
    await rig.backfilling.begin("docs", NewBackfill(prefix=prefix, auto_cutover=auto_cutover), MODEL, ASKING)
    async with asyncio.timeout(30):
        while (await rig.backfilling.state("docs")).backfill.is_open:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def active(rig: Rig) -> str:
    version = rig.shelf.get("docs").active
    assert version is not None
    return version.recipe.prefix


async def test_a_former_version_that_was_filled_again_can_be_rolled_back_to(rig: Rig) -> None:
    await backfilled(rig, "second ", auto_cutover=True)
    await rig.writing.put("docs", [NewItem("new", "written later", None, b"{}")], ASKING)
    await backfilled(rig, "")
    await rig.switching.roll_back("docs")
    assert active(rig) == ""


async def test_a_backfill_of_an_older_version_that_was_cancelled_changes_no_roll_back(rig: Rig) -> None:
    await backfilled(rig, "second ", auto_cutover=True)
    await backfilled(rig, "third ", auto_cutover=True)
    await rig.writing.put("docs", [NewItem("new", "written later", None, b"{}")], ASKING)
    await rig.backfilling.begin("docs", NewBackfill(prefix="", rate=0.1), MODEL, ASKING)
    await rig.backfilling.cancel("docs")
    await rig.switching.roll_back("docs", 0.5)
    assert active(rig) == "second "
    await rig.switching.roll_back("docs", 0.5)
    assert active(rig) == "third "


@pytest.mark.parametrize("is_paused", [False, True])
async def test_a_version_that_was_rolled_back_from_is_not_filled_any_more(rig: Rig, is_paused: bool) -> None:
    await rig.backfilling.begin("docs", NewBackfill(prefix="second ", rate=4.0), MODEL, ASKING)
    building = rig.shelf.get("docs").building
    assert building is not None
    async with asyncio.timeout(30):
        while (await rig.store.counts(building.key)).rows == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    if is_paused:
        await rig.backfilling.pause("docs")
    await rig.switching.cut_over("docs", building.id, 0.1)
    await rig.switching.roll_back("docs")
    before = await rig.store.counts(building.key)
    state = await rig.backfilling.state("docs")
    assert state.backfill.status is BackfillStatus.CANCELLED
    assert "archived" in (state.backfill.error or "")
    assert rig.journal.events[-2:] == ["backfill_cancelled", "collection_rolled_back"]
    await asyncio.sleep(1.5)
    assert await rig.store.counts(building.key) == before
    await rig.switching.remove_version("docs", building.id)


async def test_a_roll_back_that_a_crash_cuts_off_ends_the_backfill_after_the_start(rig: Rig) -> None:
    await rig.backfilling.begin("docs", NewBackfill(prefix="second ", rate=4.0), MODEL, ASKING)
    building = rig.shelf.get("docs").building
    assert building is not None
    async with asyncio.timeout(30):
        while (await rig.store.counts(building.key)).rows == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await rig.switching.cut_over("docs", building.id, 0.1)
    running = rig.shelf.get("docs").backfill
    assert running is not None
    await rig.switching.roll_back("docs")
    await rig.store.save_backfill(running)
    await rig.close(well=False)
    await rig.open()
    async with asyncio.timeout(30):
        while (await rig.backfilling.state("docs")).backfill.is_open:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert (await rig.backfilling.state("docs")).backfill.status is BackfillStatus.CANCELLED
