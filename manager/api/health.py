"""`/healthz`, `/readyz` and `/metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Response

from manager.api.compute import NoQuery
from manager.api.schemas import ErrorBody, HealthBody, ReadinessBody

if TYPE_CHECKING:
    from manager.api.backend import Backend

_METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"


def health_router(backend: Backend) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz", response_model=HealthBody, responses={403: {"model": ErrorBody}})
    async def healthz() -> HealthBody:
        """Alive: the event loop turns."""
        return HealthBody(status="ok")

    @router.get(
        "/readyz",
        response_model=ReadinessBody,
        responses={503: {"model": ReadinessBody}, 401: {"model": ErrorBody}, 403: {"model": ErrorBody}},
    )
    async def readyz() -> Response:
        """Usable: engine listed, cards asked for once, registry writable; 503 says what is missing."""
        reasons = backend.fleet.why_not_ready()
        body = ReadinessBody(status="not_ready" if reasons else "ready", reasons=list(reasons))
        return Response(
            body.model_dump_json(), status_code=503 if reasons else 200, media_type="application/json"
        )

    @router.get(
        "/metrics",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {}}},
            401: {"model": ErrorBody},
            403: {"model": ErrorBody},
            422: {"model": ErrorBody},
        },
    )
    async def metrics(_query: Annotated[NoQuery, Query()]) -> Response:
        """Prometheus text format."""
        return Response(backend.render_metrics(), media_type=_METRICS_TYPE)

    return router
