"""Makes and removes collections, cuts over from one version to the next, and rolls back."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from manager.domain.embeddings import (
    MOST_COLLECTIONS,
    BackfillStatus,
    Collection,
    VersionState,
)
from manager.errors import CollectionConflictError, ManagerError, NotInstalledError
from manager.services.embeddings.shelf import HOW_TO_INSTALL, Shelved
from manager.services.finishing import finish

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import datetime

    from manager.domain.embeddings import Counts, Version
    from manager.services.embeddings.shelf import Shelf
    from manager.services.journal import Journal

# A refusal names at most so many items of each kind.
MOST_LISTED = 100


@dataclass(frozen=True, slots=True)
class NewCollection:
    """A collection as a client asks for it; see `Collection`."""

    name: str
    model: str
    prefix: str
    asked: int | None
    truncate: bool
    keep_text: bool


class Overview(NamedTuple):
    """A collection with the number of its items, and the counts of its versions by key."""

    shelved: Shelved
    items: int
    counts: Mapping[int, Counts]


def archived_meanwhile(version: Version) -> str:
    """Return why the backfill of a version ends that was active, and is not any more."""
    return f"version {version.id} was archived: nothing is written into it any more"


class Switching:
    """Owns which collections there are, and which version of each is active. Lives on the event loop."""

    def __init__(
        self,
        shelf: Shelf,
        journal: Journal,
        *,
        digests_of: Callable[[str], Mapping[str, tuple[str, ...]]],
        refresh: Callable[[], Awaitable[None]],
        utcnow: Callable[[], datetime],
    ) -> None:
        self._shelf = shelf
        self._journal = journal
        self._digests_of = digests_of
        self._refresh = refresh
        self._utcnow = utcnow

    async def create(self, new: NewCollection) -> Overview:
        """Make a collection.

        Raises:
            CollectionConflictError: the name is taken, or there are too many.
            NotInstalledError, RegistryUnwritableError: it cannot be made.
        """
        if not self._shelf.is_installed:
            raise NotInstalledError(HOW_TO_INSTALL)
        return await finish(self._create(new))

    async def remove(self, name: str) -> None:
        """Remove a collection with all of its items and versions.

        Raises:
            UnknownCollectionError: there is none.
        """
        await self._shelf.ready()
        shelved = self._shelf.get(name)
        await finish(self._remove(shelved))

    async def overview(self, name: str) -> Overview:
        """Return one collection.

        Raises:
            UnknownCollectionError: there is none.
        """
        await self._shelf.ready()
        return await self._overview(self._shelf.get(name))

    async def overviews(self) -> list[Overview]:
        """Return all collections, by name."""
        await self._shelf.ready()
        counts = await self._shelf.store.all_counts()
        items = await self._shelf.store.item_counts()
        return [Overview(one, items.get(one.collection.key, 0), counts) for one in self._shelf.all()]

    async def cut_over(self, name: str, version_id: str, threshold: float | None = None) -> Overview:
        """Make a version the active one; the one that was becomes archived. Queries see one or the other.

        Args:
            name: of the collection.
            version_id: the version.
            threshold: the share of the items without those in quarantine that must have a vector; None is
                that of the backfill of the version, else 1.0.

        Raises:
            UnknownCollectionError: there is no such collection or version.
            CollectionConflictError: `below_threshold`, with what is missing; `version_stale`;
                `version_active`.
        """
        await self._shelf.ready()
        shelved = self._shelf.get(name)
        await self._know_builds(shelved.version(version_id))
        return await finish(self._switch(shelved, version_id, threshold, event="collection_cut_over"))

    async def roll_back(self, name: str, threshold: float | None = None) -> Overview:
        """Make the version active again that was active before.

        Raises:
            UnknownCollectionError: there is no such collection.
            CollectionConflictError: as `cut_over`, and `nothing_to_roll_back`.
        """
        await self._shelf.ready()
        shelved = self._shelf.get(name)
        previous = shelved.previous
        if previous is None:
            message = f"no version of {name!r} was active before this one"
            raise CollectionConflictError("nothing_to_roll_back", message)
        await self._know_builds(previous)
        return await finish(self._switch(shelved, previous.id, threshold, event="collection_rolled_back"))

    async def remove_version(self, name: str, version_id: str) -> None:
        """Remove a version that is not active and not being built, with all of its vectors.

        Raises:
            UnknownCollectionError: there is no such collection or version.
            CollectionConflictError: it is in use.
        """
        await self._shelf.ready()
        shelved = self._shelf.get(name)
        await finish(self._remove_version(shelved, version_id))

    # --- helpers, in call order ---

    async def _create(self, new: NewCollection) -> Overview:
        if self._shelf.has(new.name):
            raise CollectionConflictError("collection_exists", f"there is a collection {new.name!r} already")
        if len(self._shelf.all()) >= MOST_COLLECTIONS:
            message = f"there are {MOST_COLLECTIONS} collections, which is the limit; remove one"
            raise CollectionConflictError("too_many_collections", message)
        collection = Collection(
            0, new.name, new.model, new.prefix, new.asked, new.truncate, new.keep_text, self._utcnow()
        )
        shelved = Shelved(collection)
        async with shelved.changing:
            self._shelf.add(shelved)  # the name is taken from here on
            try:
                key = await self._shelf.store.create(collection)
            except BaseException:
                self._shelf.discard(shelved)
                raise
            self._shelf.discard(shelved)
            shelved.collection, shelved.is_removed = replace(collection, key=key), False
            self._shelf.add(shelved)
        self._journal.record("collection_created", detail=new.name)
        return Overview(shelved, 0, {})

    async def _remove(self, shelved: Shelved) -> None:
        async with shelved.changing:
            if shelved.is_removed:
                return
            # Its rows go in many transactions, and are not seen after the first one: nor is the collection.
            shelved.is_leaving = True
            try:
                await self._shelf.store.remove(shelved.collection.key)
            except BaseException:
                shelved.is_leaving = False
                raise
            self._shelf.discard(shelved)
        self._journal.record("collection_removed", detail=shelved.collection.name)

    async def _overview(self, shelved: Shelved) -> Overview:
        counts = {key: await self._shelf.store.counts(key) for key in list(shelved.versions)}
        items = (await self._shelf.store.item_counts()).get(shelved.collection.key, 0)
        return Overview(shelved, items, counts)

    async def _switch(
        self, shelved: Shelved, version_id: str, threshold: float | None, *, event: str
    ) -> Overview:
        name = shelved.collection.name
        async with shelved.changing:
            wanted, replaced, now = shelved.version(version_id), shelved.active, self._utcnow()
            if wanted.state is VersionState.ACTIVE:
                raise CollectionConflictError("version_active", f"version {version_id} is the active one")
            self._refuse_gone(wanted)
            share = self._threshold(shelved, wanted, threshold)
            recipe = wanted.recipe
            new = replace(wanted.moved(VersionState.ACTIVE, now), stale_since=None)
            old = None if replaced is None else replaced.moved(VersionState.ARCHIVED, now)
            collection = replace(
                shelved.collection,
                model=recipe.model,
                prefix=recipe.prefix,
                asked=recipe.asked,
                truncate=recipe.truncate,
            )
            counts = await self._shelf.store.switch(new, old, collection, lambda found: found.reaches(share))
            if counts is not None:
                raise await self._below(wanted, counts, share)
            shelved.collection = collection
            shelved.take(new, *(() if old is None else (old,)))
            if old is not None:
                await self._end_backfill(shelved, old, now)
        before = "none" if replaced is None else replaced.id
        self._journal.record(event, detail=f"{name}: from {before} to {wanted.id}")
        return await self._overview(shelved)

    async def _end_backfill(self, shelved: Shelved, archived: Version, now: datetime) -> None:
        """End the backfill of a version that is archived now: nothing is written into it any more."""
        backfill = shelved.backfill
        if backfill is None or backfill.version != archived.key or not backfill.is_open:
            return
        ended = backfill.moved(BackfillStatus.CANCELLED, now, archived_meanwhile(archived))
        # The next batch ends the backfill where this cannot be stored, or the process ends before it.
        with suppress(ManagerError):
            await self._shelf.store.save_backfill(ended)
            shelved.backfill = ended
            name = shelved.collection.name
            self._journal.record("backfill_cancelled", detail=f"{name}: {ended.error}")

    async def _know_builds(self, version: Version) -> None:
        """Read the lists of all instances where the known ones lack the build: it may be newer than they."""
        if self._is_gone(version):
            with suppress(ManagerError):
                await self._refresh()

    def _is_gone(self, version: Version) -> bool:
        recipe, digests = version.recipe, self._digests_of(version.recipe.model)
        return recipe.digest is not None and bool(digests) and recipe.digest not in digests

    def _refuse_gone(self, version: Version) -> None:
        """Refuse a version that no text can be embedded for any more."""
        recipe = version.recipe
        if self._is_gone(version):
            message = (
                f"no instance has the build of {recipe.model} that made version {version.id} "
                "(version_stale): pull it first, or begin a backfill"
            )
            raise CollectionConflictError("version_stale", message)

    def _threshold(self, shelved: Shelved, wanted: Version, threshold: float | None) -> float:
        if threshold is not None:
            return threshold
        backfill = shelved.backfill
        return backfill.threshold if backfill is not None and backfill.version == wanted.key else 1.0

    async def _below(self, wanted: Version, counts: Counts, threshold: float) -> CollectionConflictError:
        lacking = await self._shelf.store.lacking(wanted.key, MOST_LISTED)
        message = (
            f"version {wanted.id} has vectors of {counts.rows} of {counts.items} items; {counts.missing} are "
            f"missing and {counts.quarantined} in quarantine (below_threshold: {threshold:g})"
        )
        details = {
            "version": wanted.id,
            "threshold": threshold,
            "coverage": counts.coverage,
            "items": counts.items,
            "rows": counts.rows,
            "missing": counts.missing,
            "missing_ids": list(lacking.missing),
            "quarantined": counts.quarantined,
            "quarantined_ids": list(lacking.quarantined),
        }
        return CollectionConflictError("below_threshold", message, details)

    async def _remove_version(self, shelved: Shelved, version_id: str) -> None:
        async with shelved.changing:
            version, backfill = shelved.version(version_id), shelved.backfill
            if version.state is VersionState.ACTIVE:
                message = f"version {version_id} is the active one; cut over to another one first"
                raise CollectionConflictError("version_active", message)
            if backfill is not None and backfill.version == version.key and backfill.is_open:
                message = f"a backfill of version {version_id} is {backfill.status.value}; cancel it first"
                raise CollectionConflictError("backfill_open", message)
            shelved.leaving.add(version.key)
            try:
                await self._shelf.store.remove_version(version.key)
                del shelved.versions[version.key]
            finally:
                shelved.leaving.discard(version.key)
            if backfill is not None and backfill.version == version.key:
                shelved.backfill = None
        self._journal.record("version_removed", detail=f"{shelved.collection.name}: {version_id}")
