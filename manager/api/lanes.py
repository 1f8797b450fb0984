"""`/api/runtime/compute/lanes`: the requests of each lane, and the slots of each instance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.errors import Reason  # noqa: TC001  (pydantic reads annotations at run time)

if TYPE_CHECKING:
    from manager.api.backend import Backend
    from manager.domain.roles import Role


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WarmBody(_Shape):
    """An instance where the role's model is to stay in memory (`keep_warm`).

    `reason` and `detail` say why it could not be loaded; null and empty while there is no trouble.
    """

    instance: str
    is_kept: bool
    reason: Reason | None
    detail: str


class LaneBody(_Shape):
    """One lane: a role, or `*` for requests without one. `concurrency` null is no limit."""

    name: str
    in_flight: int
    queued: int
    oldest_wait_s: float | None
    concurrency: int | None
    reserved: int
    keep_warm: list[WarmBody]


class SlotsBody(_Shape):
    """The slots of one instance; `slots` null is no limit. `reserved_free` are reserved and not in use.

    `queued` are the waiting requests that may use it; each counts for every instance that it may use.
    """

    id: str
    slots: int | None
    in_use: int
    reserved_free: int
    queued: int


class LanesBody(_Shape):
    lanes: list[LaneBody]
    instances: list[SlotsBody]


def lanes_values(backend: Backend) -> dict[str, list[dict[str, Any]]]:
    """Return the values of a `LanesBody`."""
    backend.router.snapshot()  # settings that were changed a moment ago count
    slots, roles = backend.passing.routing.slots, backend.model_settings.routing.roles

    def warm(role: Role | None) -> list[dict[str, object]]:
        return [] if role is None else [one._asdict() for one in backend.keeper.warm(role)]

    return {
        "lanes": [{**one._asdict(), "keep_warm": warm(roles.get(one.name))} for one in slots.lanes()],
        "instances": [one._asdict() for one in slots.instances()],
    }


def lanes_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/runtime/compute/lanes", tags=["routing"])

    @router.get("", response_model=LanesBody, responses=refusals())
    async def show_lanes(_query: Annotated[NoQuery, Query()]) -> Response:
        """The requests in flight and in the queue of each lane, and the slots of each instance."""
        return JSONResponse(lanes_values(backend))

    return router
