"""Tables are tended while others write them: rubbish is removed, small files are merged."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from manager.errors import VectorsUnavailableError
from manager.services.embeddings.backfilling import NewBackfill
from manager.services.embeddings.switching import NewCollection
from manager.services.embeddings.tending import MOST_WRITES
from manager.services.embeddings.writing import NewItem
from tests.unit.services.embeddings.rig import ASKING, MODEL, Rig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


async def with_a_collection(home: Path) -> Rig:
    rig = Rig(home)
    await rig.open()
    await rig.switching.create(NewCollection("docs", MODEL, "", asked=None, truncate=False, keep_text=True))
    return rig


async def test_a_sweep_does_not_remove_what_a_backfill_adds_meanwhile(tmp_path: Path) -> None:
    rig = await with_a_collection(tmp_path)
    try:
        await rig.writing.put("docs", [NewItem("a", "alpha", None, b"{}")], ASKING)
        version = rig.shelf.get("docs").active
        assert version is not None
        # The mark of the item is lost, and its row is rubbish.
        (number,) = await rig.store.marked(version.key)
        await rig.store.unmark(version.key, [number])
        assert await rig.store.rubbish(version.key, 10) == (number,)
        held, reached = asyncio.Event(), asyncio.Event()
        remove = rig.tables.remove

        async def slow(table: int, numbers: Sequence[int]) -> None:
            reached.set()
            await held.wait()
            await remove(table, numbers)

        rig.tables.remove = slow  # type: ignore[method-assign]
        sweeping = asyncio.ensure_future(rig.tending.tend())
        await reached.wait()
        await rig.backfilling.begin("docs", NewBackfill(), MODEL, ASKING)
        held.set()
        await sweeping

        async def ended() -> Any:
            while (backfill := rig.shelf.get("docs").backfill) is None or backfill.is_open:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            return backfill

        async with asyncio.timeout(20):
            await ended()
        assert await rig.tables.numbers(version.key) == await rig.store.marked(version.key) == {number}
    finally:
        await rig.close()


async def test_many_small_writes_have_their_files_merged_before_the_next_round(tmp_path: Path) -> None:
    rig = await with_a_collection(tmp_path)
    try:
        merged = asyncio.Event()
        tend = rig.tables.tend

        async def noted(table: int) -> None:
            await tend(table)
            merged.set()

        rig.tables.tend = noted  # type: ignore[method-assign]
        for number in range(MOST_WRITES - 1):
            await rig.writing.put("docs", [NewItem(str(number), f"text {number}", None, b"{}")], ASKING)
        assert not merged.is_set()
        await rig.writing.put("docs", [NewItem("last", "the last text", None, b"{}")], ASKING)
        async with asyncio.timeout(20):  # a round begins every 30 s
            await merged.wait()
    finally:
        await rig.close()


async def test_what_the_last_process_has_written_is_tended(tmp_path: Path) -> None:
    rig = await with_a_collection(tmp_path)
    await rig.writing.put("docs", [NewItem("a", "alpha", None, b"{}")], ASKING)
    await rig.close(well=False)
    await rig.open()
    try:
        version = rig.shelf.get("docs").active
        assert version is not None
        tended: list[int] = []

        async def noted(table: int) -> None:
            tended.append(table)

        rig.tables.tend = noted  # type: ignore[method-assign]
        await rig.tending.tend()
        assert tended == [version.key]
        await rig.tending.tend()
        assert tended == [version.key]
    finally:
        await rig.close()


async def test_a_write_under_way_is_whole_before_the_store_is_closed(tmp_path: Path) -> None:
    rig = await with_a_collection(tmp_path)
    try:
        await rig.writing.put("docs", [NewItem("a", "alpha", None, b"{}")], ASKING)
        held, reached = asyncio.Event(), asyncio.Event()
        put = rig.store.put

        async def slow(*args: Any) -> bool:
            reached.set()
            await held.wait()
            return await put(*args)

        rig.store.put = slow  # type: ignore[method-assign, assignment]
        writing = asyncio.ensure_future(rig.writing.put("docs", [NewItem("b", "beta", None, b"{}")], ASKING))
        await reached.wait()  # its vector is in the table, and no mark names it
        closing = asyncio.ensure_future(rig.shelf.tables.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        with pytest.raises(VectorsUnavailableError) as caught:
            await rig.writing.put("docs", [NewItem("c", "gamma", None, b"{}")], ASKING)
        assert caught.value.retry_after_s == 1
        held.set()
        async with asyncio.timeout(20):
            await closing
            assert (await writing).items == 1
    finally:
        await rig.close()
    again = Rig(tmp_path)
    await again.open()
    try:
        version = again.shelf.get("docs").active
        assert version is not None
        assert await again.tables.numbers(version.key) == await again.store.marked(version.key)
        assert len(await again.store.marked(version.key)) == 2
    finally:
        await again.close()
