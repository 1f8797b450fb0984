"""`/api/runtime/compute/instances/{id}/lift`: the deny rules of an instance, lifted for a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import orjson
from fastapi import APIRouter, Query
from starlette.responses import Response

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.schemas import ChangeBody, LiftRequest, instance_json

if TYPE_CHECKING:
    from manager.api.backend import Backend


def lifts_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/runtime/compute/instances/{instance_id}/lift", tags=["service"])
    lifts = backend.lifts

    def changed(instance_id: str, *, done: bool) -> Response:
        body = {"instance": instance_json(backend.overviews.of(instance_id)), "changed": done}
        return Response(orjson.dumps(body), media_type="application/json")

    @router.post("", response_model=ChangeBody, responses=refusals(404, 503))
    async def lift_deny_rules(
        instance_id: str, request: LiftRequest, _query: Annotated[NoQuery, Query()]
    ) -> Response:
        """Lift the deny rules of an instance until a time, after which they are in force again.

        Kept across restarts of the daemon.
        """
        done = await lifts.lift(instance_id, until=request.until, reason=request.reason)
        return changed(instance_id, done=done)

    @router.delete("", response_model=ChangeBody, responses=refusals(404, 503))
    async def end_lift(instance_id: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """Put the deny rules of an instance in force again. Models that are in memory stay there."""
        return changed(instance_id, done=await lifts.end(instance_id))

    return router
