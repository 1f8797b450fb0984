"""A batch fails right after its backfill was paused or cancelled: the others go on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from manager.domain.embeddings import BackfillStatus
from manager.services.embeddings.backfilling import NewBackfill
from manager.services.embeddings.embedder import RefusedTextError
from manager.services.embeddings.switching import NewCollection
from manager.services.embeddings.writing import NewItem
from tests.support.embedding_server import digest_of
from tests.support.inside import until
from tests.unit.services.embeddings.rig import ASKING, MODEL, Rig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@pytest.mark.parametrize("status", [BackfillStatus.PAUSED, BackfillStatus.CANCELLED])
async def test_a_batch_that_fails_after_the_backfill_was_stopped_ends_no_other(
    tmp_path: Path, status: BackfillStatus
) -> None:
    rig = Rig(tmp_path)
    await rig.open()
    for name in ("one", "two"):
        await rig.switching.create(NewCollection(name, MODEL, "", None, truncate=False, keep_text=True))
        await rig.writing.put(name, [NewItem("a", f"item of {name}", None, b"{}")], ASKING)
    rig.embeds.builds[MODEL] = digest_of("second")
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def replace(texts: Sequence[str]) -> None:
        if "item of one" in texts:
            asked.set()
            await may_answer.wait()
            rig.embeds.builds[MODEL] = digest_of("third")  # the batch fails: its build is not there any more

    rig.embeds.before = replace
    await rig.backfilling.begin("one", NewBackfill(), MODEL, ASKING)
    await asked.wait()
    move = rig.backfilling.pause if status is BackfillStatus.PAUSED else rig.backfilling.cancel
    await move("one")
    may_answer.set()
    await until(lambda: not rig.backfilling._working)
    assert (await rig.backfilling.state("one")).backfill.status is status
    await rig.backfilling.begin("two", NewBackfill(), MODEL, ASKING)
    await until(lambda: rig.shelf.get("two").backfill, lambda found: found is not None and not found.is_open)
    assert (await rig.backfilling.state("two")).backfill.status is BackfillStatus.SUCCEEDED
    await rig.close()


async def test_the_speed_of_a_backfill_is_known_that_begins_during_the_last_batch_of_another(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path)
    await rig.open()
    await rig.switching.create(NewCollection("docs", MODEL, "", None, truncate=False, keep_text=True))
    items = [NewItem(str(at), f"text {at}", None, b"{}") for at in range(40)]
    await rig.writing.put("docs", items, ASKING)
    asked, may_answer = asyncio.Event(), asyncio.Event()

    async def hold(texts: Sequence[str]) -> None:
        if len(texts) > 1:
            asked.set()
            await may_answer.wait()

    rig.embeds.before = hold
    await rig.backfilling.begin("docs", NewBackfill(prefix="one "), MODEL, ASKING)
    await asked.wait()
    await rig.backfilling.cancel("docs")
    await rig.backfilling.begin("docs", NewBackfill(prefix="two ", rate=5.0), MODEL, ASKING)
    may_answer.set()
    await until(lambda: rig.backfilling.last(rig.shelf.get("docs"))[0])
    await rig.close()


async def test_texts_that_are_refused_count_in_the_rate(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.open()
    await rig.switching.create(NewCollection("docs", MODEL, "", None, truncate=False, keep_text=True))
    items = [NewItem(str(at), f"text {at}", None, b"{}") for at in range(10)]
    await rig.writing.put("docs", items, ASKING)
    refused = 0

    async def refuse(texts: Sequence[str]) -> None:
        nonlocal refused
        if texts[0].startswith("text"):
            refused += len(texts)
            raise RefusedTextError("too long", 0)

    rig.embeds.before = refuse
    await rig.backfilling.begin("docs", NewBackfill(prefix="other ", rate=2.0), MODEL, ASKING)
    await until(lambda: refused)
    await asyncio.sleep(0.6)
    assert refused <= 3  # a batch of two texts: the second one is asked for once more without the first
    await rig.close()
