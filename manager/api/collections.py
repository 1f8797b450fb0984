"""`/api/v1/collections`: collections, the versions of their embeddings, and backfills."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import orjson
from fastapi import APIRouter, Query, Request, Response

from manager.api.collection_items import EMBEDS, PATH, json_answer, needs_extra, raw_answer
from manager.api.collection_schemas import (
    MOST_AT_ONCE,
    BackfillBody,
    BackfillRequest,
    CollectionBody,
    CollectionRequest,
    CollectionsBody,
    CutoverRequest,
    RemovedBody,
    RollbackRequest,
    VersionBody,
    backfill_body,
    collection_body,
    version_bodies,
)
from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.submitted import asking_of, invalid
from manager.domain.models import split_pin
from manager.errors import InvalidRequestError
from manager.services.embeddings.backfilling import BACKFILL_PATH, NewBackfill
from manager.services.embeddings.switching import NewCollection

if TYPE_CHECKING:
    from manager.api.backend import Backend
    from manager.services.embeddings.backfilling import BackfillState

_ROLE = "embedding"


def collections_router(backend: Backend) -> APIRouter:
    parts = backend.collections

    router = APIRouter(prefix=PATH, tags=["collections"], dependencies=needs_extra(backend))

    @router.post("", status_code=201, response_model=CollectionBody, responses=refusals(409, 501, 503))
    async def create_collection(wanted: CollectionRequest, _query: Annotated[NoQuery, Query()]) -> Response:
        """Make a collection. Its first item makes its first version."""
        new = NewCollection(
            name=wanted.name,
            model=_model_meant(backend, wanted.model),
            prefix=wanted.prefix,
            asked=wanted.dimensions,
            truncate=wanted.truncate,
            keep_text=wanted.keep_text,
        )
        return json_answer(collection_body(await parts.switching.create(new)), 201)

    @router.get("", response_model=CollectionsBody, responses=refusals(501, 503))
    async def list_collections(_query: Annotated[NoQuery, Query()]) -> Response:
        """All collections by name."""
        found = [collection_body(one) for one in await parts.switching.overviews()]
        return json_answer(CollectionsBody(collections=found, count=len(found)))

    @router.get("/{name}", response_model=CollectionBody, responses=refusals(404, 501, 503))
    async def show_collection(name: str, _query: Annotated[NoQuery, Query()]) -> Response:
        return json_answer(collection_body(await parts.switching.overview(name)))

    @router.delete("/{name}", response_model=RemovedBody, responses=refusals(404, 501, 503))
    async def remove_collection(name: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """Remove a collection with all of its items and versions."""
        await parts.switching.remove(name)
        return json_answer(RemovedBody(removed=name))

    @router.get("/{name}/versions", response_model=list[VersionBody], responses=refusals(404, 501, 503))
    async def list_versions(name: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """All versions, the active one first, then the newest."""
        bodies = version_bodies(await parts.switching.overview(name))
        return raw_answer(orjson.dumps([one.model_dump(mode="json") for one in bodies]))

    @router.delete(
        "/{name}/versions/{version}", response_model=RemovedBody, responses=refusals(404, 409, 501, 503)
    )
    async def remove_version(name: str, version: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """Remove a version that is not active and not being built, with all of its vectors."""
        await parts.switching.remove_version(name, version)
        return json_answer(RemovedBody(removed=version))

    @router.post("/{name}/cutover", response_model=CollectionBody, responses=refusals(404, 409, 501, 503))
    async def cut_over(name: str, wanted: CutoverRequest, _query: Annotated[NoQuery, Query()]) -> Response:
        """Make a version the active one. Below the threshold this is a 409 that says what is missing."""
        return json_answer(
            collection_body(await parts.switching.cut_over(name, wanted.version, wanted.threshold))
        )

    @router.post("/{name}/rollback", response_model=CollectionBody, responses=refusals(404, 409, 501, 503))
    async def roll_back(
        name: str, _query: Annotated[NoQuery, Query()], wanted: RollbackRequest | None = None
    ) -> Response:
        """Make the version active again that was active before."""
        threshold = None if wanted is None else wanted.threshold
        return json_answer(collection_body(await parts.switching.roll_back(name, threshold)))

    _add_backfill(router, backend)
    return router


def _add_backfill(router: APIRouter, backend: Backend) -> None:
    parts = backend.collections

    async def shown(name: str, state: BackfillState, status: int = 200) -> Response:
        failures = await parts.backfilling.failures(name, MOST_AT_ONCE)
        return json_answer(backfill_body(state, failures), status)

    @router.post(
        "/{name}/backfill", status_code=202, response_model=BackfillBody, responses=refusals(*EMBEDS)
    )
    async def begin_backfill(
        name: str,
        request: Request,
        _query: Annotated[NoQuery, Query()],
        wanted: BackfillRequest | None = None,
    ) -> Response:
        """Begin to fill the version that follows from the model as it is now, in the background."""
        wanted = wanted or BackfillRequest()
        await parts.shelf.ready()
        model = parts.shelf.get(name).collection.model
        if wanted.model is not None:
            model = _model_meant(backend, wanted.model)
        new = NewBackfill(**wanted.model_dump())
        asking = asking_of(backend, request, BACKFILL_PATH)
        return await shown(name, await parts.backfilling.begin(name, new, model, asking), 202)

    @router.get("/{name}/backfill", response_model=BackfillBody, responses=refusals(404, 501, 503))
    async def show_backfill(name: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """How far the latest backfill is, and which items it could not embed."""
        return await shown(name, await parts.backfilling.state(name))

    @router.post(
        "/{name}/backfill/pause", response_model=BackfillBody, responses=refusals(404, 409, 501, 503)
    )
    async def pause_backfill(name: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """Let no further batch begin; also across restarts."""
        return await shown(name, await parts.backfilling.pause(name))

    @router.post(
        "/{name}/backfill/resume", response_model=BackfillBody, responses=refusals(404, 409, 501, 503)
    )
    async def resume_backfill(name: str, _query: Annotated[NoQuery, Query()]) -> Response:
        return await shown(name, await parts.backfilling.resume(name))

    @router.post(
        "/{name}/backfill/cancel", response_model=BackfillBody, responses=refusals(404, 409, 501, 503)
    )
    async def cancel_backfill(name: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """End a backfill. Its version is archived and keeps its vectors."""
        return await shown(name, await parts.backfilling.cancel(name))


def _model_meant(backend: Backend, given: str | None) -> str:
    """Return the model that a client means; without one, that of the role `embedding`.

    Instances need not have it: they may be stopped, and vectors may come from elsewhere.

    Raises:
        InvalidRequestError: it is no possible name, a role without a model, or names an instance.
    """
    name = _ROLE if given is None else given.strip()
    if split_pin(name)[1] is not None:
        message = f"{name!r} names an instance; expected a model or a role, without @INSTANCE"
        raise invalid("body.model", message)
    try:
        return backend.loading.model_meant(name)
    except InvalidRequestError as error:
        message = error.message.removeprefix("model: ")
        if backend.model_settings.routing.role(name) is not None:
            message += (
                f"; name a model here, or set one for the role (roles.{name}.model, "
                f"`ollama-manager roles set {name} model=MODEL`)"
            )
        raise invalid("body.model", message) from None
