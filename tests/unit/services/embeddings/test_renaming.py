"""A build that has another name now: its versions stay, and texts are embedded under the new one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from manager.domain.embeddings import BackfillStatus
from manager.services.embeddings.backfilling import NewBackfill
from manager.services.embeddings.switching import NewCollection
from manager.services.embeddings.writing import NewItem
from tests.support.embedding_server import digest_of
from tests.unit.services.embeddings.rig import ASKING, MODEL, Rig

if TYPE_CHECKING:
    from pathlib import Path

NEW = "renamed"


async def ended(rig: Rig) -> BackfillStatus:
    async with asyncio.timeout(30):
        while (state := await rig.backfilling.state("docs")).backfill.is_open:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    return state.backfill.status


@pytest.mark.parametrize("is_active", [True, False])
async def test_a_backfill_with_the_new_name_embeds_nothing_anew(tmp_path: Path, is_active: bool) -> None:
    rig = Rig(tmp_path)
    await rig.open()
    await rig.switching.create(NewCollection("docs", MODEL, "", None, truncate=False, keep_text=True))
    await rig.writing.put("docs", [NewItem("a", "x", None, b"{}")], ASKING)
    first = rig.shelf.get("docs").active
    assert first is not None
    if not is_active:
        rig.embeds.builds[MODEL] = digest_of("second")
        await rig.backfilling.begin("docs", NewBackfill(auto_cutover=True), MODEL, ASKING)
        assert await ended(rig) is BackfillStatus.SUCCEEDED
    rig.embeds.builds = {NEW: digest_of("first")}
    rig.embeds.texts.clear()
    await rig.backfilling.begin("docs", NewBackfill(auto_cutover=True), NEW, ASKING)
    assert await ended(rig) is BackfillStatus.SUCCEEDED
    assert len(rig.embeds.texts) == 1  # the one that shows the build
    await rig.close()
    await rig.open()
    shelved = rig.shelf.get("docs")
    assert shelved.active is not None
    assert (shelved.active.id, shelved.active.key) == (first.id, first.key)
    assert shelved.active.recipe.model == shelved.collection.model == NEW
    await rig.writing.put("docs", [NewItem("b", "y", None, b"{}")], ASKING)
    await rig.close()
