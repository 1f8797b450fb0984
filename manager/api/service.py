"""`/api/runtime/compute/instances/{id}`: out of service and back, restarts, upgrades and roll-backs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import orjson
from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict

from manager.api.errors import refusals
from manager.api.schemas import (
    NOTHING,
    ChangeBody,
    DrainRequest,
    EmptyRequest,
    UpgradeRequest,
    instance_json,
)

if TYPE_CHECKING:
    from manager.api.backend import Backend

_FULL_DRAIN = DrainRequest()


class NoQuery(BaseModel):
    """A route without parameters: a mistyped one must not pass unnoticed."""

    model_config = ConfigDict(extra="forbid")


class WaitQuery(BaseModel):
    """`wait`: answer when it is done, else at once."""

    model_config = ConfigDict(extra="forbid")
    wait: bool = True


def service_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/runtime/compute/instances/{instance_id}", tags=["service"])
    service, upgrades = backend.service, backend.upgrades

    def changed(instance_id: str, done: bool, query: WaitQuery | None = None) -> Response:
        body = {"instance": instance_json(backend.overviews.of(instance_id)), "changed": done}
        status = 200 if query is None or query.wait else 202
        return Response(orjson.dumps(body), status_code=status, media_type="application/json")

    @router.post(
        "/drain",
        response_model=ChangeBody,
        responses={202: {"model": ChangeBody}, **refusals(404, 409, 503)},
    )
    async def drain_instance(
        instance_id: str, query: Annotated[WaitQuery, Query()], order: DrainRequest = _FULL_DRAIN
    ) -> Response:
        """Take an instance out of service: no new request goes there, and nothing starts it.

        Open requests go on, however long they take; then its container is stopped, unless `stop` is false.
        The order is kept across restarts of the daemon until a resume, or until `until`. With `wait` the
        answer comes when the open requests have ended and the container is stopped.
        """
        done = await service.drain(instance_id, reason=order.reason, until=order.until, stops=order.stop)
        if query.wait:
            await backend.fleet.get(instance_id).out()
        return changed(instance_id, done, query)

    @router.post("/resume", response_model=ChangeBody, responses=refusals(404, 503))
    async def resume_instance(
        instance_id: str, _query: Annotated[NoQuery, Query()], _order: EmptyRequest = NOTHING
    ) -> Response:
        """Put an instance back in service. A pinned one that ran starts again, the others on demand."""
        return changed(instance_id, await service.resume(instance_id))

    @router.post(
        "/restart",
        response_model=ChangeBody,
        responses={202: {"model": ChangeBody}, **refusals(404, 409, 503, 504)},
    )
    async def restart_instance(
        instance_id: str, query: Annotated[WaitQuery, Query()], _order: EmptyRequest = NOTHING
    ) -> Response:
        """Replace the container of an instance by a new one; one that does not run is started.

        Open requests end first, however long they take. New ones go to other instances; those that only this
        one can serve wait for it.
        """
        backend.fleet.managed(instance_id)
        await backend.first_look.engine_asked()
        await upgrades.restart(instance_id, wait=query.wait)
        return changed(instance_id, done=True, query=query)

    @router.post(
        "/upgrade",
        response_model=ChangeBody,
        responses={202: {"model": ChangeBody}, **refusals(404, 409, 503, 504)},
    )
    async def upgrade_instance(
        instance_id: str, order: UpgradeRequest, query: Annotated[WaitQuery, Query()]
    ) -> Response:
        """Have an instance use another image, which is allowed and present; as a restart where it runs."""
        backend.fleet.managed(instance_id)
        await backend.first_look.engine_asked()
        return changed(instance_id, await upgrades.upgrade(instance_id, order.image, wait=query.wait), query)

    @router.post(
        "/rollback",
        response_model=ChangeBody,
        responses={202: {"model": ChangeBody}, **refusals(404, 409, 503, 504)},
    )
    async def roll_instance_back(
        instance_id: str, query: Annotated[WaitQuery, Query()], _order: EmptyRequest = NOTHING
    ) -> Response:
        """Return to the image before the last upgrade; as a restart, unless the instance is stopped."""
        backend.fleet.managed(instance_id)
        await backend.first_look.engine_asked()
        await upgrades.rollback(instance_id, wait=query.wait)
        return changed(instance_id, done=True, query=query)

    return router
