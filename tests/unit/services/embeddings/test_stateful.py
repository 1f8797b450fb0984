"""Collections under any order of writes, changes of the model, backfills, cut-overs and ends of the process.

No query returns vectors of two versions, coverage is exact, and nothing that was acknowledged is lost.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from manager.domain.embeddings import BackfillStatus, VersionState, unit_vector
from manager.errors import ManagerError, UnknownCollectionError, VectorsUnavailableError
from manager.services.embeddings.backfilling import NewBackfill
from manager.services.embeddings.querying import Query
from manager.services.embeddings.switching import NewCollection
from manager.services.embeddings.writing import NewItem
from tests.support.embedding_server import digest_of, vector_of
from tests.unit.services.embeddings.rig import ASKING, MODEL, Builds, CrashError, Rig

if TYPE_CHECKING:
    from collections.abc import Coroutine

NAME = "docs"
IDS = st.sampled_from([f"item {number}" for number in range(6)])
BUILDS = ("first", "second", "third")


class Collections(RuleBasedStateMachine):
    """`items` is what was acknowledged; `doubtful` are values that a crash may have stored or not."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory()
        self.rig = Rig(Path(self.directory.name), Builds())
        self.items: dict[str, str] = {}
        self.doubtful: dict[str, set[str | None]] = {}
        self.count = 0

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 20))

    def teardown(self) -> None:
        self.do(self.rig.close())
        self.loop.close()
        self.directory.cleanup()

    @initialize()
    def begin(self) -> None:
        self.do(self.rig.open())
        self.do(self.rig.switching.create(NewCollection(NAME, MODEL, "", None, False, True)))

    # --- what clients do ---

    @rule(ids=st.lists(IDS, min_size=1, max_size=4, unique=True))
    def put(self, ids: list[str]) -> None:
        self.count += 1
        texts = {one: f"{one}: text {self.count}" for one in ids}
        items = [NewItem(one, text, None, b"{}") for one, text in texts.items()]
        if self.tried(self.rig.writing.put(NAME, items, ASKING)):
            self.items |= texts
            for one in ids:
                self.doubtful.pop(one, None)
        elif self.rig.crashed:
            for one, text in texts.items():
                self.doubtful.setdefault(one, {self.items.get(one)}).add(text)
            self.restart()

    @rule(one=IDS)
    def delete(self, one: str) -> None:
        was_there = one in self.items
        if self.tried(self.rig.writing.delete(NAME, one)):
            assert was_there or one in self.doubtful
            self.items.pop(one, None)
            self.doubtful.pop(one, None)
        elif self.rig.crashed:
            self.doubtful.setdefault(one, {self.items.get(one)}).add(None)
            self.restart()

    @rule(build=st.sampled_from(BUILDS))
    def pull(self, build: str) -> None:
        self.rig.embeds.builds[MODEL] = digest_of(build)
        self.tried(self.rig.tending._look_at_builds())
        self.restart_if_crashed()

    @rule(auto=st.booleans())
    def backfill(self, auto: bool) -> None:
        self.tried(self.rig.backfilling.begin(NAME, NewBackfill(auto_cutover=auto), MODEL, ASKING))
        self.restart_if_crashed()

    @rule(what=st.sampled_from(["pause", "resume", "cancel"]))
    def steer(self, what: str) -> None:
        self.tried(getattr(self.rig.backfilling, what)(NAME))
        self.restart_if_crashed()

    @rule()
    def let_backfill_end(self) -> None:
        async def ended() -> None:
            while self.is_backfilling() and not self.rig.crashed:  # noqa: ASYNC110  (nothing tells of it)
                await asyncio.sleep(0.001)

        self.do(ended())
        self.restart_if_crashed()

    @rule(number=st.integers(0, 3))
    def cut_over(self, number: int) -> None:
        versions = list(self.rig.shelf.get(NAME).versions.values())
        if versions:
            wanted = versions[number % len(versions)]
            counts = self.do(self.rig.store.counts(wanted.key))
            if self.tried(self.rig.switching.cut_over(NAME, wanted.id)):
                assert counts.rows == counts.items
            self.restart_if_crashed()

    @rule()
    def roll_back(self) -> None:
        self.tried(self.rig.switching.roll_back(NAME))
        self.restart_if_crashed()

    @rule(number=st.integers(0, 3))
    def remove_version(self, number: int) -> None:
        versions = list(self.rig.shelf.get(NAME).versions.values())
        if versions:
            self.tried(self.rig.switching.remove_version(NAME, versions[number % len(versions)].id))
            self.restart_if_crashed()

    @rule()
    def tend(self) -> None:
        self.tried(self.rig.tending.tend())
        self.restart_if_crashed()

    # --- what happens to the daemon ---

    @rule(steps=st.integers(0, 25))
    def crash_soon(self, steps: int) -> None:
        self.rig.steps_left = steps

    @rule()
    def restart(self) -> None:
        self.do(self.rig.close(well=not self.rig.crashed))
        self.do(self.rig.open())
        self.settle()

    @rule(number=st.integers(0, 3))
    def lose_a_table(self, number: int) -> None:
        versions = list(self.rig.shelf.get(NAME).versions.values())
        if not versions:
            return
        version = versions[number % len(versions)]
        self.do(self.rig.tables.drop(version.key))
        self.tried(self.rig.tending.mend(version))
        self.restart_if_crashed()

    # --- helpers ---

    def tried(self, work: Coroutine[Any, Any, Any]) -> bool:
        """Do it; False where it was refused, or the process has ended in it."""
        try:
            self.do(work)
        except (ManagerError, CrashError):
            return False
        return not self.rig.crashed

    def restart_if_crashed(self) -> None:
        if self.rig.crashed:
            self.restart()

    def settle(self) -> None:
        """Find out which of the doubtful values was stored."""
        for one, possible in self.doubtful.items():
            try:
                text = self.do(self.rig.writing.item(NAME, one)).item.text
            except UnknownCollectionError:
                text = None
            assert text in possible
            if text is None:
                self.items.pop(one, None)
            else:
                self.items[one] = text
        self.doubtful.clear()

    # --- what always holds ---

    @invariant()
    def holds(self) -> None:
        if not hasattr(self.rig, "shelf") or self.rig.crashed:
            return
        left, self.rig.steps_left = self.rig.steps_left, None
        try:
            self.do(self._holds())
        finally:
            self.rig.steps_left = left

    async def _holds(self) -> None:
        shelved = self.rig.shelf.get(NAME)
        stored = {item.id: item.text for item in await self.rig.writing.page(NAME, None, 100)}
        assert stored == self.items
        assert sum(one.state is VersionState.ACTIVE for one in shelved.versions.values()) <= 1
        filled = shelved.backfill.version if self.is_backfilling() and shelved.backfill else None
        for version in list(shelved.versions.values()):
            counts = await self.rig.store.counts(version.key)
            assert counts.items == len(self.items)
            found: dict[str, str] = {}
            for one, text in self.items.items():
                vector = unit_vector(vector_of(str(version.recipe.digest), text))
                try:
                    answer = await self.rig.querying.query(NAME, Query(None, vector, 1, version.id), ASKING)
                except VectorsUnavailableError:
                    assert counts.rows == 0 or version.key == filled
                    continue
                assert answer.version is not None
                assert answer.version.id == version.id
                found |= {
                    hit.item.id: text for hit in answer.matches if hit.score > 0.999 and hit.item.id == one
                }
                assert all(hit.item.id in self.items for hit in answer.matches)
            if version.key == filled:
                continue  # rows come while this looks
            after = await self.rig.store.counts(version.key)
            assert len(found) == after.rows
            assert (after.coverage == 1.0) is (len(found) == len(self.items))

    def is_backfilling(self) -> bool:
        backfill = self.rig.shelf.get(NAME).backfill
        return backfill is not None and backfill.status is BackfillStatus.RUNNING


Collections.TestCase.settings = settings(
    max_examples=int(os.environ.get("COLLECTION_EXAMPLES", "10")), stateful_step_count=25, deadline=None
)
test_collections = Collections.TestCase
