"""`/healthz`, `/readyz` and `/metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Response

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals, text
from manager.api.schemas import HealthBody, ReadinessBody

if TYPE_CHECKING:
    from manager.api.backend import Backend

_METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"


def health_router(backend: Backend) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz", response_model=HealthBody, responses=_guarded(403, 413))
    async def healthz() -> HealthBody:
        """Alive: the event loop turns."""
        return HealthBody(status="ok")

    @router.get(
        "/readyz",
        response_model=ReadinessBody,
        responses={**_guarded(401, 403, 413), 503: {"model": ReadinessBody}},
    )
    async def readyz() -> Response:
        """Usable: engine listed, cards asked for once, registry writable; 503 says what is missing.

        The engine does not count where no instance has a container.
        """
        reasons = backend.first_look.why_not_ready()
        body = ReadinessBody(
            status="not_ready" if reasons else "ready",
            reasons=list(reasons),
            # Not a reason: requests go on, and a load balancer would take all gateways out at once.
            shared_database=None if backend.following is None else backend.following.trouble,
            **backend.rollout.partial,
        )
        return Response(
            body.model_dump_json(exclude_none=True),
            status_code=503 if reasons else 200,
            media_type="application/json",
        )

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: text("text/plain"), **refusals()},
    )
    async def metrics(_query: Annotated[NoQuery, Query()]) -> Response:
        """Prometheus text format."""
        await backend.ledger.look()
        return Response(backend.render_metrics(), media_type=_METRICS_TYPE)

    return router


def _guarded(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These routes take whatever query a probe sends along, so that they are never 422."""
    return {status: answer for status, answer in refusals().items() if status in statuses}
