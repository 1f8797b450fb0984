"""`/api/runtime/compute/instances/{id}/breaker`: the operator's hand on a breaker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import orjson
from fastapi import APIRouter, Query
from starlette.responses import Response

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.schemas import NOTHING, EmptyRequest, InstanceBody, instance_json

if TYPE_CHECKING:
    from manager.api.backend import Backend


def breakers_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/runtime/compute/instances", tags=["compute"])

    @router.post("/{instance_id}/breaker/reset", response_model=InstanceBody, responses=refusals(404))
    async def reset_breaker(
        instance_id: str, _query: Annotated[NoQuery, Query()], _order: EmptyRequest = NOTHING
    ) -> Response:
        """Close the breaker of an instance: requests go there again. A closed one stays closed."""
        instance = backend.fleet.get(instance_id)
        backend.passing.routing.breakers.reset(instance.id)
        body = instance_json(backend.overviews.of(instance.id))
        return Response(orjson.dumps(body), media_type="application/json")

    return router
