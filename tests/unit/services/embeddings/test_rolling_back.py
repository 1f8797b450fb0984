"""A roll-back finds the version that was active before, whatever happened to it since."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

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
