"""Collections and versions while they are made and removed: each call sees one that is there, or none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from manager.services.embeddings.switching import NewCollection
from manager.services.embeddings.writing import NewItem
from tests.unit.services.embeddings.rig import ASKING, MODEL, Rig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
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
