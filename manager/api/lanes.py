"""`/api/runtime/compute/lanes`: the requests of each lane, and the slots of each instance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals

if TYPE_CHECKING:
    from manager.api.backend import Backend


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LaneBody(_Shape):
    """One lane: a role, or `*` for requests without one. `concurrency` null is no limit."""

    name: str
    in_flight: int
    queued: int
    oldest_wait_s: float | None
    concurrency: int | None
    reserved: int


class SlotsBody(_Shape):
    """The slots of one instance; `slots` null is no limit. `reserved_free` are reserved and not in use."""

    id: str
    slots: int | None
    in_use: int
    reserved_free: int


class LanesBody(_Shape):
    lanes: list[LaneBody]
    instances: list[SlotsBody]


def lanes_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/runtime/compute/lanes", tags=["routing"])

    @router.get("", response_model=LanesBody, responses=refusals())
    async def show_lanes(_query: Annotated[NoQuery, Query()]) -> Response:
        """The requests in flight and in the queue of each lane, and the slots of each instance."""
        backend.router.snapshot()  # settings that were changed a moment ago count
        slots = backend.passing.routing.slots
        return JSONResponse(
            {
                "lanes": [one._asdict() for one in slots.lanes()],
                "instances": [one._asdict() for one in slots.instances()],
            }
        )

    return router
