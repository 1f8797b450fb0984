"""Fills a version with the vectors of all items, in the background, across restarts."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

import structlog

from manager.domain.embeddings import (
    MOST_VERSIONS,
    Backfill,
    BackfillStatus,
    Recipe,
    Version,
    VersionState,
)
from manager.domain.models import model_key
from manager.errors import (
    CollectionConflictError,
    InvalidRequestError,
    ManagerError,
    Reason,
    UnknownCollectionError,
    VectorsDamagedError,
)
from manager.services.embeddings.embedder import BATCH, RefusedTextError, Wanted
from manager.services.embeddings.ports import VectorRow
from manager.services.embeddings.switching import archived_meanwhile
from manager.services.embeddings.writing import embed_for, facts_of
from manager.services.finishing import finish
from manager.services.requests import Origin
from manager.services.routing.whole import Asking

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from manager.domain.embeddings import Counts, Failure
    from manager.services.embeddings.embedder import Embedder
    from manager.services.embeddings.ports import StoredItem
    from manager.services.embeddings.shelf import Shelf, Shelved
    from manager.services.embeddings.switching import Switching
    from manager.services.embeddings.tending import Tending
    from manager.services.journal import Journal

_log = structlog.get_logger("collections")

BACKFILL_PATH = "/api/v1/collections/{name}/backfill"
# A text that shows which build a model has, and the dimension of its vectors.
_PROBE = "What does this model make of a text?"
_NO_TEXT = "its text is not kept, so it cannot be embedded anew"
# Items of one batch: the files of a table are flushed once for all of them.
_BATCH = 4 * BATCH
# The pause after a batch that could not be embedded: it grows while nothing changes.
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.1, 10.0
# The speed is that of the last batches.
_MEASURED = 20


@dataclass(frozen=True, slots=True)
class NewBackfill:
    """A backfill as a client asks for it. None is as the collection has it."""

    model: str | None = None
    prefix: str | None = None
    dimensions: int | None = None
    truncate: bool | None = None
    threshold: float = 1.0
    rate: float | None = None
    auto_cutover: bool = False


class BackfillState(NamedTuple):
    """A backfill with its progress.

    Attributes:
        backfill: as it is stored.
        version: the one that it fills; None where it was removed.
        counts: of that version.
        items_per_s: over the last batches; None where that is unknown.
        eta_s: seconds to the end at that speed; None where that is unknown.
        waits_for: why it does not get on just now; None where it does.
    """

    backfill: Backfill
    version: Version | None
    counts: Counts | None
    items_per_s: float | None
    eta_s: float | None
    waits_for: str | None


@dataclass(slots=True)
class _Progress:
    """The progress of a backfill in this process. `tried` is the number of texts of the last batch."""

    after: int = 0
    tried: int = 0
    has_advanced: bool = False
    pause_s: float = 0.0
    waits_for: str | None = None
    batches: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_MEASURED))

    @property
    def items_per_s(self) -> float | None:
        if len(self.batches) < 2:  # noqa: PLR2004  (a speed takes two points)
            return None
        passed_s = self.batches[-1][0] - self.batches[0][0]
        done = sum(count for _, count in self.batches) - self.batches[0][1]
        return done / passed_s if passed_s > 0 else None


class Backfilling:
    """Owns the backfills of all collections. Lives on the event loop; `run` does the work.

    A batch is embedded, added to the table, and then marked in the store. A process that ends in between
    leaves rows that nobody sees, and the batch is done once more.
    """

    def __init__(
        self,
        shelf: Shelf,
        embedder: Embedder,
        switching: Switching,
        tending: Tending,
        journal: Journal,
        *,
        utcnow: Callable[[], datetime],
    ) -> None:
        self._shelf = shelf
        self._embedder = embedder
        self._switching = switching
        self._tending = tending
        self._journal = journal
        self._utcnow = utcnow
        self._progress: dict[int, _Progress] = {}
        self._working: set[int] = set()
        self._news = asyncio.Event()

    async def begin(self, name: str, new: NewBackfill, model: str, asking: Asking) -> BackfillState:
        """Begin to fill the version that follows from the model as it is now.

        The model embeds one text first: that shows its build and the dimension.

        Args:
            name: of the collection.
            new: what is asked for.
            model: the model meant by it.
            asking: the client.

        Raises:
            UnknownCollectionError: there is no such collection.
            CollectionConflictError: `backfill_open`, `nothing_to_do` or `too_many_versions`.
            InvalidRequestError: the model refuses the text.
            NotEmbeddedError: no server has answered.
        """
        await self._shelf.ready()
        shelved = self._shelf.get(name)
        _refuse_open(shelved)
        _refuse_empty(shelved)
        collection = shelved.collection
        prefix = collection.prefix if new.prefix is None else new.prefix
        asked = collection.asked if new.dimensions is None else new.dimensions
        truncate = collection.truncate if new.truncate is None else new.truncate
        try:
            embedded = await self._embedder.embed(
                Wanted(model, None, asked, prefix, truncate, asked), [_PROBE], asking
            )
        except RefusedTextError as error:
            raise InvalidRequestError(f"body.model: {model} embeds no text: {error.message}") from None
        recipe = Recipe(model, embedded.digest, embedded.dimensions, prefix, truncate, asked)
        return await finish(self._begin(shelved, recipe, new, embedded.policy, asking.origin.project))

    async def state(self, name: str) -> BackfillState:
        """Return the latest backfill of a collection.

        Raises:
            UnknownCollectionError: there is no such collection, or it had none.
        """
        await self._shelf.ready()
        return await self._state(_backfilled(self._shelf.get(name)))

    def last(self, shelved: Shelved) -> tuple[float | None, str | None]:
        """Return the speed of a backfill, and what it waits for."""
        progress = self._progress.get(shelved.collection.key)
        return (None, None) if progress is None else (progress.items_per_s, progress.waits_for)

    async def failures(self, name: str, limit: int) -> tuple[Failure, ...]:
        """Return the items that the latest backfill could not embed, those in quarantine first."""
        backfill = _backfilled(self._shelf.get(name)).backfill
        assert backfill is not None  # noqa: S101  (`_backfilled` has refused)
        return await self._shelf.store.failures(backfill.version, limit)

    async def pause(self, name: str) -> BackfillState:
        """Let no further batch begin. Pausing twice is no error."""
        return await self._move(name, BackfillStatus.PAUSED)

    async def resume(self, name: str) -> BackfillState:
        """Go on with a paused backfill. Resuming twice is no error."""
        return await self._move(name, BackfillStatus.RUNNING)

    async def cancel(self, name: str) -> BackfillState:
        """End a backfill. Its version keeps its vectors and is archived. Cancelling twice is no error."""
        return await self._move(name, BackfillStatus.CANCELLED)

    async def run(self) -> None:
        """Do the work of all backfills, until cancelled."""
        if not self._shelf.is_installed:
            await asyncio.Event().wait()
        await self._shelf.ready()
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._news.clear()
                for shelved in self._shelf.all():
                    backfill, key = shelved.backfill, shelved.collection.key
                    is_due = backfill is not None and backfill.status is BackfillStatus.RUNNING
                    if is_due and key not in self._working:
                        self._working.add(key)
                        tasks.create_task(self._work(shelved), name=f"backfill of {shelved.collection.name}")
                await self._news.wait()

    # --- helpers, in call order ---

    async def _begin(
        self, shelved: Shelved, recipe: Recipe, new: NewBackfill, policy: str | None, project: str
    ) -> BackfillState:
        name, store = shelved.collection.name, self._shelf.store
        async with shelved.changing:
            _refuse_open(shelved)
            if shelved.is_removed:
                raise UnknownCollectionError("unknown_collection", f"the collection {name!r} was removed")
            now = self._utcnow()
            known = next((one for one in shelved.versions.values() if one.id == recipe.id), None)
            if known is None:
                if len(shelved.versions) >= MOST_VERSIONS:
                    message = (
                        f"{name!r} has {MOST_VERSIONS} versions, which is the limit; remove an archived one"
                    )
                    raise CollectionConflictError("too_many_versions", message)
                version = Version(
                    0, shelved.collection.key, recipe, VersionState.BUILDING, now, policy=policy
                )
                version = replace(version, key=await store.add_version(version))
            elif known.state is VersionState.ACTIVE:
                counts = await store.counts(known.key)
                is_renamed = model_key(known.recipe.model) != model_key(recipe.model)
                if counts.rows >= counts.items and not is_renamed:
                    message = (
                        f"version {known.id} is active and has vectors of all {counts.items} items: "
                        "the model has not changed (nothing_to_do)"
                    )
                    raise CollectionConflictError("nothing_to_do", message)
                version = replace(known, recipe=recipe, stale_since=None)
                if is_renamed:
                    await self._rename(shelved, version)
            else:
                building = VersionState.BUILDING
                version = known if known.state is building else known.moved(building, now)
                # The same build may have another name now.
                version = replace(version, recipe=recipe, stale_since=None)
            other = shelved.building
            others = [] if other is None or other.key == version.key else [other]
            changed = [version, *(one.moved(VersionState.ARCHIVED, now) for one in others)]
            backfill = Backfill(
                shelved.collection.key,
                version.key,
                BackfillStatus.RUNNING,
                new.threshold,
                new.rate,
                new.auto_cutover,
                project,
                now,
            )
            await store.begin_backfill(backfill, *changed)
            shelved.take(*changed)
            shelved.backfill = backfill
        self._progress[shelved.collection.key] = _Progress()
        self._news.set()
        self._journal.record("backfill_started", detail=f"{name}: version {version.id} of {recipe.model}")
        return await self._state(shelved)

    async def _rename(self, shelved: Shelved, active: Version) -> None:
        """Have texts embedded by the model under another name from now on: the build is the same."""
        recipe = active.recipe
        collection = replace(shelved.collection, model=recipe.model, asked=recipe.asked)
        await self._shelf.store.switch(active, None, collection, lambda _: True)
        shelved.collection = collection
        shelved.take(active)

    async def _state(self, shelved: Shelved) -> BackfillState:
        backfill = shelved.backfill
        assert backfill is not None  # noqa: S101  (the caller has looked)
        version = shelved.versions.get(backfill.version)
        counts = None if version is None else await self._shelf.store.counts(version.key)
        speed, waits_for = self.last(shelved) if backfill.status is BackfillStatus.RUNNING else (None, None)
        eta_s = None
        if counts is not None and speed:
            eta_s = max(0, counts.missing) / speed
        return BackfillState(backfill, version, counts, speed, eta_s, waits_for)

    async def _move(self, name: str, status: BackfillStatus) -> BackfillState:
        await self._shelf.ready()
        shelved = _backfilled(self._shelf.get(name))
        await finish(self._moved(shelved, status))
        self._news.set()
        return await self._state(shelved)

    async def _moved(self, shelved: Shelved, status: BackfillStatus, error: str | None = None) -> None:
        """Store another status, if it is another one; a version that is built no longer is archived."""
        async with shelved.changing:
            backfill = shelved.backfill
            if backfill is None or backfill.status is status or shelved.is_removed:
                return
            try:
                moved = backfill.moved(status, self._utcnow(), error)
            except ValueError as refused:
                raise CollectionConflictError("backfill_ended", str(refused)) from None
            version = shelved.versions.get(backfill.version)
            if (
                status in (BackfillStatus.CANCELLED, BackfillStatus.FAILED)
                and version is not None
                and version.state is VersionState.BUILDING
            ):
                archived = version.moved(VersionState.ARCHIVED, self._utcnow())
                await self._shelf.store.save_versions(archived)
                shelved.take(archived)
            await self._shelf.store.save_backfill(moved)
            shelved.backfill = moved
        name = shelved.collection.name
        failed = status is BackfillStatus.FAILED
        self._journal.record(
            _EVENTS[status],
            reason=Reason.MODEL_MISSING if failed else None,
            detail=f"{name}: {error}" if error else name,
        )

    async def _work(self, shelved: Shelved) -> None:
        """Do batch after batch until the backfill runs no longer."""
        key = shelved.collection.key
        try:
            while not shelved.is_removed:
                backfill = shelved.backfill
                if backfill is None or backfill.status is not BackfillStatus.RUNNING:
                    return
                # Another one may have begun during the last batch of a cancelled one.
                progress = self._progress.setdefault(key, _Progress())
                began = monotonic()
                try:
                    done = await self._batch(shelved, backfill, progress)
                except CollectionConflictError as error:
                    with suppress(CollectionConflictError):  # it was paused or cancelled just now
                        await self._moved(shelved, BackfillStatus.FAILED, error.message)
                    return
                except ManagerError as error:
                    progress.waits_for = error.message
                    progress.pause_s = min(max(2 * progress.pause_s, _FIRST_PAUSE_S), _MOST_PAUSE_S)
                    _log.info("backfill_waits", collection=shelved.collection.name, error=error.message)
                    await self._rest(progress.pause_s, shelved)
                    continue
                if done is None:
                    return
                if done:
                    progress.waits_for, progress.pause_s = None, 0.0
                    progress.batches.append((monotonic(), done))
                if backfill.rate is not None:
                    # Texts that are refused cost the server as much as the others.
                    await self._rest(began + progress.tried / backfill.rate - monotonic(), shelved)
        finally:
            self._working.discard(key)
            self._news.set()  # it may have been resumed meanwhile

    async def _rest(self, pause_s: float, shelved: Shelved) -> None:
        """Wait; end early where the status changes."""
        deadline = monotonic() + pause_s
        while (left_s := deadline - monotonic()) > 0:
            backfill = shelved.backfill
            if shelved.is_removed or backfill is None or backfill.status is not BackfillStatus.RUNNING:
                return
            await asyncio.sleep(min(left_s, 0.25))

    async def _batch(self, shelved: Shelved, backfill: Backfill, progress: _Progress) -> int | None:
        """Embed some items; return how many were done, None once the backfill has ended."""
        version = shelved.versions.get(backfill.version)
        if version is None:
            raise CollectionConflictError("version_removed", "its version was removed")
        if version.state is VersionState.ARCHIVED:
            # The process has ended between the cut-over or roll-back and the end of this backfill.
            await finish(self._moved(shelved, BackfillStatus.CANCELLED, archived_meanwhile(version)))
            return None
        if version.stale_since is not None:
            message = f"the build of {version.recipe.model} was replaced (version_stale)"
            raise CollectionConflictError("version_stale", message)
        size = _BATCH if backfill.rate is None else max(1, min(_BATCH, int(backfill.rate)))
        items = await self._shelf.store.missing(version.key, progress.after, size)
        texts = [item for item in items if item.text is not None]
        progress.tried = len(texts)
        if not items:
            if progress.after == 0:
                await self._finish(shelved, backfill, version)
                return None
            if not progress.has_advanced:
                # A whole round has failed: let what is wrong pass.
                progress.pause_s = min(max(2 * progress.pause_s, _FIRST_PAUSE_S), _MOST_PAUSE_S)
                await self._rest(progress.pause_s, shelved)
            progress.after, progress.has_advanced = 0, False
            return 0
        done = 0
        for item in items:
            if item.text is None:
                await self._fail(version, item, _NO_TEXT, at_once=True)
        if texts:
            done = await self._embed(shelved, backfill, version, texts)
        progress.after = items[-1].number
        progress.has_advanced = progress.has_advanced or done > 0
        return done

    async def _embed(
        self, shelved: Shelved, backfill: Backfill, version: Version, items: Sequence[StoredItem]
    ) -> int:
        """Embed items and store their vectors; those that are refused are counted as failed."""
        project = backfill.project
        origin = Origin(None, None, project, None, local_only=True, trace=None, fault=None)
        asking = Asking(origin, None, BACKFILL_PATH, is_background=True)
        left, done = list(items), 0
        while left:
            try:
                embedded = await embed_for(
                    version, [item.text or "" for item in left], asking, self._embedder, self._tending
                )
            except RefusedTextError as error:
                refused = left.pop(error.at)
                await self._fail(version, refused, error.message, at_once=False)
                continue
            done = await finish(self._store(shelved, version, left, embedded.vectors))
            break
        return done

    async def _store(
        self, shelved: Shelved, version: Version, items: Sequence[StoredItem], made: Sequence[bytes]
    ) -> int:
        at = self._utcnow()
        rows = [VectorRow(item.number, item.id, vector) for item, vector in zip(items, made, strict=True)]
        async with self._shelf.tables.using(version.key):
            if shelved.is_removed or version.key not in shelved.versions:
                return 0
            try:
                await self._shelf.vectors.add(version.key, facts_of(version), rows, at)
            except VectorsDamagedError:
                self._tending.suspect(version)
                raise
            self._tending.written(version)
            await self._shelf.store.mark(version.key, [item.number for item in items], at)
        return len(items)

    async def _fail(self, version: Version, item: StoredItem, message: str, *, at_once: bool) -> None:
        failure = await self._shelf.store.failed(version.key, item.number, message[:1000], at_once=at_once)
        if failure is not None and failure.quarantined:
            _log.info("item_quarantined", version=version.id, item=item.id, error=message[:1000])

    async def _finish(self, shelved: Shelved, backfill: Backfill, version: Version) -> None:
        """End a backfill that has nothing left to do."""
        error = None
        if backfill.auto_cutover and version.state is VersionState.BUILDING:
            try:
                await self._switching.cut_over(shelved.collection.name, version.id)
            except (CollectionConflictError, UnknownCollectionError) as refused:
                error = f"it did not cut over: {refused.message}"
        with suppress(CollectionConflictError):  # it was cancelled just now
            await finish(self._moved(shelved, BackfillStatus.SUCCEEDED, error))


_EVENTS = {
    BackfillStatus.RUNNING: "backfill_resumed",
    BackfillStatus.PAUSED: "backfill_paused",
    BackfillStatus.SUCCEEDED: "backfill_succeeded",
    BackfillStatus.CANCELLED: "backfill_cancelled",
    BackfillStatus.FAILED: "backfill_failed",
}


def _backfilled(shelved: Shelved) -> Shelved:
    if shelved.backfill is None:
        message = f"the collection {shelved.collection.name!r} had no backfill"
        raise UnknownCollectionError("unknown_backfill", message)
    return shelved


def _refuse_empty(shelved: Shelved) -> None:
    if shelved.active is None:
        message = (
            f"{shelved.collection.name!r} has no items yet (nothing_to_do): the first ones make a version"
        )
        raise CollectionConflictError("nothing_to_do", message)


def _refuse_open(shelved: Shelved) -> None:
    backfill = shelved.backfill
    if backfill is not None and backfill.is_open:
        message = f"a backfill of {shelved.collection.name!r} is {backfill.status.value}; cancel it first"
        raise CollectionConflictError("backfill_open", message)
