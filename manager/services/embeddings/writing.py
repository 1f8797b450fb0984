"""Writes items: embeds them, adds their vectors to the tables, then makes them visible in one transaction."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import structlog

from manager.domain.embeddings import Recipe, Version, VersionState, dimensions_of
from manager.errors import (
    CollectionConflictError,
    InvalidRequestError,
    ManagerError,
    RegistryUnwritableError,
    UnknownCollectionError,
    VectorsDamagedError,
)
from manager.services.embeddings.embedder import RefusedTextError, Wanted
from manager.services.embeddings.ports import StoredItem, TableFacts, VectorRow
from manager.services.finishing import finish

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from datetime import datetime

    from manager.services.embeddings.embedder import Embedded, Embedder
    from manager.services.embeddings.shelf import Shelf, Shelved
    from manager.services.embeddings.tending import Tending
    from manager.services.routing.whole import Asking

_log = structlog.get_logger("collections")

# The versions of a collection that change while it is written are looked at anew so often.
_TRIES = 3


class NewItem(NamedTuple):
    """An item as a client sends it: a text, or a vector of length 1. `metadata` is JSON."""

    id: str
    text: str | None
    vector: bytes | None
    metadata: bytes


class Written(NamedTuple):
    """Items that were written. `versions` have vectors of all of them: the active one unless it is stale."""

    items: int
    at: datetime
    versions: tuple[Version, ...]


class ItemVectors(NamedTuple):
    """An item, and when its vector was written by version; the active one first."""

    item: StoredItem
    versions: tuple[tuple[Version, datetime], ...]


class Writing:
    """Writes, reads and removes single items. Lives on the event loop.

    All items of a call become visible together, in every version that gets them, or none does.
    """

    def __init__(
        self,
        shelf: Shelf,
        embedder: Embedder,
        tending: Tending,
        *,
        digests_of: Callable[[str], Mapping[str, tuple[str, ...]]],
        utcnow: Callable[[], datetime],
    ) -> None:
        self._shelf = shelf
        self._embedder = embedder
        self._tending = tending
        self._digests_of = digests_of
        self._utcnow = utcnow

    async def put(self, name: str, items: Sequence[NewItem], asking: Asking) -> Written:
        """Write items in place of those with the same ids; each id comes once.

        Raises:
            UnknownCollectionError: there is no such collection.
            InvalidRequestError: an item cannot be embedded, or its vector does not fit.
            CollectionConflictError: the active version is stale, or the versions keep changing.
            NotEmbeddedError, UnavailableError: nothing was written; it is worth another try.
        """
        await self._shelf.ready()
        for _ in range(_TRIES):
            shelved = self._shelf.get(name)
            was_stale = shelved.active is not None and shelved.active.stale_since is not None
            try:
                made, active = await self._made(shelved, items, asking)
            except CollectionConflictError as error:
                if error.code != "version_stale" or was_stale or shelved.building is None:
                    raise
                continue  # a backfill was begun: the items may go into its version alone
            if active is None:
                continue
            written = await finish(self._write(shelved, items, made, active))
            if written is not None:
                return written
        message = f"the versions of {name!r} keep changing; try again"
        raise CollectionConflictError("versions_changed", message)

    async def item(self, name: str, item_id: str) -> ItemVectors:
        """Return an item.

        Raises:
            UnknownCollectionError: there is no such collection, or no such item.
        """
        await self._shelf.ready()
        shelved = self._shelf.get(name)
        found = await self._shelf.store.item(shelved.collection.key, item_id)
        if found is None:
            raise _no_item(name, item_id)
        item, marks = found
        having = [shelved.versions[key] for key in marks if key in shelved.versions]
        having.sort(key=lambda one: (one.state is not VersionState.ACTIVE, one.key))
        return ItemVectors(item, tuple((one, marks[one.key]) for one in having))

    async def vector(self, version: Version, number: int) -> bytes | None:
        """Return the vector of an item in a version; None where it is gone."""
        async with self._shelf.tables.using(version.key):
            return await self._shelf.vectors.get(version.key, number)

    async def page(self, name: str, after: str | None, limit: int) -> tuple[StoredItem, ...]:
        """Return items in the order of their ids.

        Raises:
            UnknownCollectionError: there is no such collection.
        """
        await self._shelf.ready()
        return await self._shelf.store.page(self._shelf.get(name).collection.key, after, limit)

    async def delete(self, name: str, item_id: str) -> None:
        """Remove an item from all versions.

        Raises:
            UnknownCollectionError: there is no such collection, or no such item.
        """
        await self._shelf.ready()
        shelved = self._shelf.get(name)
        if not await self._shelf.store.delete(shelved.collection.key, item_id):
            raise _no_item(name, item_id)

    # --- helpers, in call order ---

    async def _made(
        self, shelved: Shelved, items: Sequence[NewItem], asking: Asking
    ) -> tuple[dict[Version, list[bytes]], Version | None]:
        """Return the vectors for each version that gets the items, and the active version.

        The version is None where another one was made meanwhile. While a backfill replaces a stale version,
        items go into the new one only: they are found once it has cut over.
        """
        name = shelved.collection.name
        active, building = shelved.active, shelved.building
        if active is not None and active.stale_since is not None:
            active = await self._tending.look_at_build(active)
        can_build = building is not None and building.stale_since is None
        if active is None:
            vectors, active = await self._first(shelved, items, asking)
            return ({} if active is None else {active: vectors}), active
        if active.stale_since is not None and building is not None and can_build:
            if any(item.vector is not None for item in items):
                refuse_stale(active, name)
            return {building: await self._vectors(building, items, asking)}, active
        refuse_stale(active, name)
        made = {active: await self._vectors(active, items, asking)}
        if building is not None and can_build:
            made |= await self._also(building, items, asking)
        return made, active

    async def _first(
        self, shelved: Shelved, items: Sequence[NewItem], asking: Asking
    ) -> tuple[list[bytes], Version | None]:
        """Embed the first items, and make the version that follows from them; None where another was made."""
        collection = shelved.collection
        texts = [item for item in items if item.vector is None]
        given = [item for item in items if item.vector is not None]
        policy = None
        digest: str | None
        made: Iterator[bytes] = iter(())
        if texts:
            wanted = Wanted(
                collection.model, None, None, collection.prefix, collection.truncate, collection.asked
            )
            said = [item.text or "" for item in texts]
            embedded = await _naming(self._embedder.embed(wanted, said, asking), texts, items)
            digest, dimensions, policy = embedded.digest, embedded.dimensions, embedded.policy
            made = iter(embedded.vectors)
        else:
            # The model was named for vectors from elsewhere; its build is known where there is just one.
            digests = self._digests_of(collection.model)
            digest = next(iter(digests)) if len(digests) == 1 else None
            dimensions = dimensions_of(given[0].vector or b"")
        if collection.asked is not None and dimensions != collection.asked:
            at = 0 if not texts else items.index(texts[0])
            raise _wrong(items, at, f"{dimensions} dimensions; the collection asks for {collection.asked}")
        vectors = [item.vector if item.vector is not None else next(made) for item in items]
        recipe = Recipe(
            collection.model, digest, dimensions, collection.prefix, collection.truncate, collection.asked
        )
        _refuse_other_lengths(items, vectors, recipe)
        async with shelved.changing:
            if shelved.active is not None or shelved.is_removed:
                return vectors, None
            now = self._utcnow()
            # The collection may have been stored, and have got its key, only meanwhile.
            key = shelved.collection.key
            version = Version(0, key, recipe, VersionState.ACTIVE, now, activated_at=now, policy=policy)
            return vectors, await finish(self._add(shelved, version))

    async def _add(self, shelved: Shelved, version: Version) -> Version:
        stored = replace(version, key=await self._shelf.store.add_version(version))
        shelved.take(stored)
        return stored

    async def _vectors(self, version: Version, items: Sequence[NewItem], asking: Asking) -> list[bytes]:
        """Return the vectors of all items in a version."""
        texts = [item for item in items if item.vector is None]
        made: Iterator[bytes] = iter(())
        if texts:
            if version.recipe.digest is None:
                message = (
                    f"version {version.id} has vectors from outside only, and no server has said which build "
                    f"of {version.recipe.model} made them (unknown_build): give a vector, or begin a backfill"
                )
                raise CollectionConflictError("unknown_build", message)
            said = [item.text or "" for item in texts]
            made_now = embed_for(version, said, asking, self._embedder, self._tending)
            embedded = await _naming(made_now, texts, items)
            made = iter(embedded.vectors)
        vectors = [item.vector if item.vector is not None else next(made) for item in items]
        _refuse_other_lengths(items, vectors, version.recipe)
        return vectors

    async def _also(
        self, building: Version, items: Sequence[NewItem], asking: Asking
    ) -> dict[Version, list[bytes]]:
        """Return the vectors of a version that is being built; nothing where that fails.

        The backfill embeds the items then, and says what is wrong with them.
        """
        if any(item.vector is not None for item in items):
            return {}
        try:
            return {building: await self._vectors(building, items, asking)}
        except ManagerError as error:
            _log.info("write_left_to_backfill", version=building.id, error=error.message)
            return {}

    async def _write(
        self,
        shelved: Shelved,
        items: Sequence[NewItem],
        made: Mapping[Version, list[bytes]],
        active: Version,
    ) -> Written | None:
        """Add the vectors, then store the items. None where the versions have changed meanwhile."""
        store, at = self._shelf.store, self._utcnow()
        try:
            first = await store.allocate(len(items))
        except RegistryUnwritableError as error:
            raise again(error) from None
        numbers = range(first, first + len(items))
        keeps = shelved.collection.keep_text
        stored = [
            StoredItem(number, item.id, item.text if keeps else None, item.metadata, at)
            for number, item in zip(numbers, items, strict=True)
        ]
        async with self._shelf.tables.using(*(one.key for one in made)):
            if shelved.is_removed or any(one.key not in shelved.versions for one in made):
                return None
            marks: dict[int, Sequence[int]] = {}
            for version, vectors in made.items():
                rows = [
                    VectorRow(number, item.id, vector)
                    for number, item, vector in zip(numbers, items, vectors, strict=True)
                ]
                try:
                    await self._shelf.vectors.add(version.key, facts_of(version), rows, at)
                except VectorsDamagedError:
                    self._tending.suspect(version)
                    raise
                marks[version.key] = numbers
            self._tending.written(*made)
            try:
                is_stored = await store.put(shelved.collection.key, stored, marks, active.key)
                if not is_stored:
                    for key in marks:
                        await store.add_rubbish(key, numbers)
            except RegistryUnwritableError as error:
                raise again(error) from None
        return Written(len(items), at, tuple(made)) if is_stored else None


def wanted_of(version: Version) -> Wanted:
    """Return how texts are embedded for a version."""
    recipe = version.recipe
    return Wanted(
        recipe.model, recipe.digest, recipe.dimensions, recipe.prefix, recipe.truncate, recipe.asked
    )


async def embed_for(
    version: Version, texts: Sequence[str], asking: Asking, embedder: Embedder, tending: Tending
) -> Embedded:
    """Embed texts as the vectors of a version were; another build is noted where it is found.

    Raises:
        RefusedTextError, CollectionConflictError, NotEmbeddedError: as `Embedder.embed`.
    """
    try:
        return await embedder.embed(wanted_of(version), texts, asking)
    except CollectionConflictError as error:
        if error.code == "version_stale":
            await tending.look_at_build(version)
        raise


def facts_of(version: Version) -> TableFacts:
    return TableFacts(version.recipe.model, version.recipe.dimensions, version.id)


def refuse_stale(version: Version, name: str) -> None:
    """Refuse to embed for a version whose build of the model was replaced.

    Raises:
        CollectionConflictError: it is stale.
    """
    if version.stale_since is not None:
        message = (
            f"version {version.id} of {name!r} is stale: no instance has the build of {version.recipe.model} "
            "that made its vectors (version_stale); begin a backfill, or pull the former build"
        )
        raise CollectionConflictError("version_stale", message)


def again(error: RegistryUnwritableError) -> RegistryUnwritableError:
    """Return the error for a client, who may try again: nothing was written."""
    error.retry_after_s = 1
    return error


async def _naming(
    embedding: Awaitable[Embedded], texts: Sequence[NewItem], items: Sequence[NewItem]
) -> Embedded:
    """Wait for the vectors of texts; a text that is refused is named by its place among the items."""
    try:
        return await embedding
    except RefusedTextError as error:
        raise _wrong(items, items.index(texts[error.at]), error.message, field="text") from None


def _refuse_other_lengths(items: Sequence[NewItem], vectors: Sequence[bytes], recipe: Recipe) -> None:
    for at, vector in enumerate(vectors):
        found = dimensions_of(vector)
        if found != recipe.dimensions:
            raise _wrong(
                items,
                at,
                f"{found} dimensions; expected {recipe.dimensions}, as the version has",
                field="vector",
            )


def _wrong(items: Sequence[NewItem], at: int, message: str, *, field: str = "vector") -> InvalidRequestError:
    place = f"body.items.{at}.{field}"
    fields = [{"field": place, "message": message}]
    return InvalidRequestError(
        f"{place} (id {items[at].id!r}): {message}", details={"fields": fields, "id": items[at].id}
    )


def _no_item(name: str, item_id: str) -> UnknownCollectionError:
    return UnknownCollectionError("unknown_item", f"the collection {name!r} has no item {item_id[:64]!r}")
