"""Collections: what embedded what, the move to another model, and a query to try."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from manager.domain.embeddings import MOST_HITS
from manager.errors import UnknownCollectionError
from manager.services.embeddings.shelf import HOW_TO_INSTALL
from manager.web.collections_view import Progress, collection_values, version_values
from manager.web.page import Page

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import Request

    from manager.api.backend import Backend
    from manager.services.embeddings.switching import Overview
    from manager.web.viewer import Viewer

# Collections that are listed; the search finds the others.
MOST_LISTED = 100
MOST_FAILURES = 100
_LONGEST = 100
# After a crash all tables are compared with the store first. The page does not wait for that.
_READY_S = 0.5


async def _context(backend: Backend, viewer: Viewer, request: Request) -> Mapping[str, Any]:
    if not backend.collections.shelf.is_installed:
        return {"view": "missing", "how": HOW_TO_INSTALL}
    name = request.query_params.get("name", "").strip()[:_LONGEST]
    try:
        async with asyncio.timeout(_READY_S):
            await backend.collections.shelf.ready()
    except TimeoutError:
        return {"view": "comparing"}
    if name:
        return {"view": "one", "name": name, **await _one(backend, viewer, name)}
    search = request.query_params.get("search", "").strip()[:_LONGEST]
    found = await backend.collections.switching.overviews()
    shown = [one for one in found if search.casefold() in _searched(one)]
    return {
        "view": "list",
        "collections": [collection_values(one, _progress(backend, one)) for one in shown[:MOST_LISTED]],
        "more": max(0, len(shown) - MOST_LISTED),
        "count": len(found),
        "search": search,
    }


async def _one(backend: Backend, viewer: Viewer, name: str) -> dict[str, Any]:
    collections = backend.collections
    try:
        overview = await collections.switching.overview(name)
        has_backfill = overview.shelved.backfill is not None
        failures = await collections.backfilling.failures(name, MOST_FAILURES) if has_backfill else ()
    except UnknownCollectionError as error:  # it was removed, maybe just now
        return {"one": None, "why": error.message}
    return {
        "one": collection_values(overview, _progress(backend, overview)),
        "versions": version_values(overview),
        "failures": failures,
        "most_hits": MOST_HITS,
        "models": sorted(_model_names(backend)) if viewer.may("operator") else [],
    }


def _searched(overview: Overview) -> str:
    collection = overview.shelved.collection
    return f"{collection.name} {collection.model}".casefold()


def _progress(backend: Backend, overview: Overview) -> Progress:
    return Progress(*backend.collections.backfilling.last(overview.shelved))


def _model_names(backend: Backend) -> list[str]:
    names = [model.entry.get("name") for model in backend.overviews.models().values()]
    return [name for name in names if isinstance(name, str)]


COLLECTIONS = Page("collections", "/ui/collections", context=_context)
