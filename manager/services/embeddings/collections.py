"""The parts of collections, made and closed together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manager.services.embeddings.backfilling import Backfilling
from manager.services.embeddings.counting import Counting
from manager.services.embeddings.digests import Digests
from manager.services.embeddings.embedder import Embedder
from manager.services.embeddings.querying import Querying
from manager.services.embeddings.shelf import Shelf
from manager.services.embeddings.switching import Switching
from manager.services.embeddings.tending import Tending
from manager.services.embeddings.writing import Writing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import datetime

    from manager.services.embeddings.ports import CollectionStore, Vectors
    from manager.services.journal import Journal
    from manager.services.ports import ModelServer
    from manager.services.requests import Requests
    from manager.services.routing.attempting import Routing


@dataclass(frozen=True, slots=True)
class Collections:
    """Everything that collections are made of. `shelf` has what is stored; the others change it."""

    shelf: Shelf
    embedder: Embedder
    tending: Tending
    switching: Switching
    writing: Writing
    querying: Querying
    backfilling: Backfilling
    counting: Counting


async def opened(
    store: CollectionStore,
    vectors: Vectors | None,
    *,
    routing: Routing,
    server: ModelServer,
    requests: Requests,
    journal: Journal,
    digests_of: Callable[[str], Mapping[str, tuple[str, ...]]],
    refresh: Callable[[], Awaitable[None]],
    utcnow: Callable[[], datetime],
) -> Collections:
    """Return the collections that are stored. `tending.run` has to run before they answer.

    Args:
        store: their metadata.
        vectors: their tables; None where the extra is not installed.
        routing: as for any request.
        server: sends requests.
        requests: begins records.
        journal: takes events.
        digests_of: model -> the builds of it that instances have.
        refresh: reads the lists of all instances that run.
        utcnow: the wall clock.
    """
    shelf = Shelf(store, vectors)
    await shelf.load()
    embedder = Embedder(routing, server, requests, Digests(server))
    tending = Tending(shelf, journal, digests_of=digests_of, refresh=refresh, utcnow=utcnow)
    switching = Switching(shelf, journal, digests_of=digests_of, refresh=refresh, utcnow=utcnow)
    return Collections(
        shelf,
        embedder,
        tending,
        switching,
        Writing(shelf, embedder, tending, digests_of=digests_of, utcnow=utcnow),
        Querying(shelf, embedder, tending),
        Backfilling(shelf, embedder, switching, tending, journal, utcnow=utcnow),
        Counting(shelf),
    )
