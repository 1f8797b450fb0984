"""Answers queries from the table of one version, and checks each hit against the store."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import orjson

from manager.domain.embeddings import VersionState, dimensions_of
from manager.domain.metadata_filter import matches
from manager.errors import (
    CollectionConflictError,
    InvalidRequestError,
    UnknownCollectionError,
    VectorsDamagedError,
    VectorsUnavailableError,
)
from manager.services.embeddings.embedder import RefusedTextError
from manager.services.embeddings.writing import embed_for, refuse_stale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from manager.domain.embeddings import Version
    from manager.domain.metadata_filter import Condition
    from manager.services.embeddings.embedder import Embedder
    from manager.services.embeddings.ports import Found, Hit
    from manager.services.embeddings.shelf import Shelf
    from manager.services.embeddings.tending import Tending
    from manager.services.routing.whole import Asking

# A search asks for some more rows than are wanted: those of items that were changed or removed are skipped.
_SPARE = 16
_GROWTH = 4
_MOST_SEARCHED = 16_384


@dataclass(frozen=True, slots=True)
class Query:
    """A query: a text, or a vector of length 1. `version` None is the active one."""

    text: str | None
    vector: bytes | None
    count: int
    version: str | None = None
    conditions: tuple[Condition, ...] = ()


class Match(NamedTuple):
    """An item that was found, with its cosine similarity."""

    item: Found
    score: float


class Answer(NamedTuple):
    """The items, best first, all of one version; None where the collection has none yet.

    `coverage` is the share of the collection's items that the version has vectors of.
    """

    version: Version | None
    coverage: float
    matches: tuple[Match, ...]


class Querying:
    """Answers queries. Lives on the event loop. An answer has items of one version only."""

    def __init__(self, shelf: Shelf, embedder: Embedder, tending: Tending) -> None:
        self._shelf = shelf
        self._embedder = embedder
        self._tending = tending

    async def query(self, name: str, query: Query, asking: Asking) -> Answer:
        """Return the items whose vectors are nearest.

        Raises:
            UnknownCollectionError: there is no such collection or version.
            InvalidRequestError: the text or the vector does not fit.
            CollectionConflictError: the text cannot be embedded as the version's were.
            NotEmbeddedError, UnavailableError: no answer now; `vectors_lost` calls for a backfill.
        """
        await self._shelf.ready()
        shelved = self._shelf.get(name)
        version = shelved.active if query.version is None else shelved.version(query.version)
        if version is None:
            return Answer(None, 1.0, ())
        vector = query.vector
        if vector is None:
            vector = await self._embed(name, version, query.text or "", asking)
        elif dimensions_of(vector) != version.recipe.dimensions:
            message = (
                f"{dimensions_of(vector)} dimensions; version {version.id} has {version.recipe.dimensions}"
            )
            raise _wrong("vector", message)
        try:
            answer = await self._answer(version, vector, query)
        except VectorsDamagedError:
            await self._tending.mend(version)
            answer = await self._answer(version, vector, query)
        is_there = version.key in shelved.versions and version.key not in shelved.leaving
        if self._shelf.get(name) is not shelved or not is_there:
            # It was removed while it was searched: what was found may be a part.
            message = f"version {version.id} of {name!r} was removed meanwhile"
            raise UnknownCollectionError("unknown_version", message)
        return answer

    async def _embed(self, name: str, version: Version, text: str, asking: Asking) -> bytes:
        if version.state is not VersionState.ARCHIVED and version.stale_since is not None:
            refuse_stale(await self._tending.look_at_build(version), name)
        if version.recipe.digest is None:
            message = (
                f"no server has said which build of {version.recipe.model} made the vectors of version "
                f"{version.id} (unknown_build): give a vector instead of a text"
            )
            raise CollectionConflictError("unknown_build", message)
        try:
            embedded = await embed_for(version, [text], asking, self._embedder, self._tending)
        except RefusedTextError as error:
            raise _wrong("text", error.message) from None
        return embedded.vectors[0]

    async def _answer(self, version: Version, vector: bytes, query: Query) -> Answer:
        async with self._shelf.tables.using(version.key):
            found = await self._matches(version.key, vector, query)
            counts = await self._shelf.store.counts(version.key)
        if not found and not query.conditions and counts.rows:
            # The table has lost its rows. This is noticed by a look at it.
            raise VectorsDamagedError(f"the table of version {version.id} has no rows", table=version.key)
        if counts.items and not counts.rows and version.state is not VersionState.BUILDING:
            error = VectorsUnavailableError(
                f"version {version.id} has lost the vectors of its {counts.items} items (vectors_lost); "
                "a backfill makes them anew from the texts that are kept"
            )
            error.code = "vectors_lost"
            raise error
        return Answer(version, counts.coverage, tuple(found))

    async def _matches(self, table: int, vector: bytes, query: Query) -> list[Match]:
        vectors, count = self._shelf.vectors, query.count
        wanted = count + _SPARE if not query.conditions else _GROWTH * count + _SPARE
        while wanted <= _MOST_SEARCHED:
            hits = await vectors.search(table, vector, wanted)
            found = await self._checked(table, hits, query)
            if len(found) >= count or len(hits) < wanted:
                return found[:count]
            if query.conditions:
                break  # few items match: it is cheaper to find those first
            wanted *= _GROWTH
        if query.conditions:
            is_wanted = partial(matches, query.conditions)
            among = await self._shelf.store.matching(table, is_wanted)
        else:
            among = await self._shelf.store.marked(table)
        if not among:
            return []
        hits = await vectors.search(table, vector, count + _SPARE, among)
        return (await self._checked(table, hits, query))[:count]

    async def _checked(self, table: int, hits: Sequence[Hit], query: Query) -> list[Match]:
        """Return the hits whose items are there now, once each, and match the conditions."""
        known: Mapping[int, Found] = await self._shelf.store.found(table, [hit.number for hit in hits])
        if not query.conditions:
            return _wanted(known, hits, ())
        # The metadata of thousands of items take a while: the event loop goes on meanwhile.
        return await asyncio.to_thread(_wanted, known, hits, query.conditions)


def _wanted(
    known: Mapping[int, Found], hits: Sequence[Hit], conditions: tuple[Condition, ...]
) -> list[Match]:
    best: dict[int, Match] = {}
    for hit in hits:
        item = known.get(hit.number)
        if item is None or hit.number in best:
            continue
        if conditions and not matches(conditions, orjson.loads(item.metadata)):
            continue
        best[hit.number] = Match(item, hit.score)
    return list(best.values())


def _wrong(field: str, message: str) -> InvalidRequestError:
    place = f"body.{field}"
    return InvalidRequestError(
        f"{place}: {message}", details={"fields": [{"field": place, "message": message}]}
    )
