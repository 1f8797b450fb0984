"""A build that was pulled just now: the lists of instances do not have it until they are read anew."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from manager.domain.embeddings import BackfillStatus
from manager.services.embeddings.backfilling import NewBackfill
from manager.services.embeddings.switching import NewCollection
from manager.services.embeddings.writing import NewItem
from tests.support.embedding_server import digest_of
from tests.unit.services.embeddings.rig import ASKING, MODEL, Builds, Rig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path


class Listed(Builds):
    """Knows of each model the build that it had when the lists were last read."""

    def __init__(self) -> None:
        super().__init__()
        self.known = dict(self.builds)
        self.reads = 0

    def digests_of(self, model: str) -> Mapping[str, tuple[str, ...]]:
        return {self.known[model]: ("one",)} if model in self.known else {}

    async def refresh(self) -> None:
        self.reads += 1
        self.known = dict(self.builds)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    """A collection with one item, and a backfill for a build that no list has yet."""
    rig = Rig(tmp_path, Listed())
    await rig.open()
    await rig.switching.create(NewCollection("docs", MODEL, "", None, truncate=False, keep_text=True))
    await rig.writing.put("docs", [NewItem("a", "x", None, b"{}")], ASKING)
    rig.embeds.builds[MODEL] = digest_of("second")
    yield rig
    await rig.close()


async def backfilled(rig: Rig, *, auto_cutover: bool = False) -> str:
    """Backfill, and return the version."""
    began = await rig.backfilling.begin("docs", NewBackfill(auto_cutover=auto_cutover), MODEL, ASKING)
    assert began.version is not None
    async with asyncio.timeout(30):
        while (await rig.backfilling.state("docs")).backfill.status is BackfillStatus.RUNNING:  # noqa: ASYNC110
            await asyncio.sleep(0)
    state = await rig.backfilling.state("docs")
    assert (state.backfill.status, state.backfill.error) == (BackfillStatus.SUCCEEDED, None)
    return began.version.id


async def test_a_backfill_cuts_over_to_it_by_itself(rig: Rig) -> None:
    version = await backfilled(rig, auto_cutover=True)
    active = rig.tending._shelf.get("docs").active
    assert active is not None
    assert active.id == version


async def test_a_cutover_to_it_is_not_refused(rig: Rig) -> None:
    version = await backfilled(rig)
    await rig.switching.cut_over("docs", version)


async def test_the_version_that_is_made_of_it_is_not_called_stale(rig: Rig) -> None:
    version = await backfilled(rig)
    await rig.tending._look_at_builds()  # reads the lists for the new one
    await rig.tending._look_at_builds()
    states = {one.id: one.shown_state for one in rig.tending._shelf.get("docs").versions.values()}
    assert states[version] == "building"
    assert sorted(states.values()) == ["building", "stale"], "the former one is"


async def test_lists_are_not_read_anew_for_a_version_that_is_known_to_be_stale(rig: Rig) -> None:
    embeds = rig.embeds
    assert isinstance(embeds, Listed)
    await embeds.refresh()
    await rig.tending._look_at_builds()
    active = rig.tending._shelf.get("docs").active
    assert active is not None
    assert (active.shown_state, embeds.reads) == ("stale", 2)
    await rig.tending._look_at_builds()
    assert embeds.reads == 2
