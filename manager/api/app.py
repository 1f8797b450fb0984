"""The control API as one FastAPI application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi_offline import FastAPIOffline

from manager import __version__
from manager.api.benchmarks import benchmarks_router
from manager.api.breakers import breakers_router
from manager.api.budgets import budgets_router
from manager.api.cluster import cluster_router
from manager.api.cluster_routes import cluster_routes_router
from manager.api.collection_items import collection_items_router
from manager.api.collection_items import most_body_bytes as most_collection_bytes
from manager.api.collections import collections_router
from manager.api.compute import compute_router
from manager.api.errors import add_error_handlers
from manager.api.gate import Gate
from manager.api.gpu_history import gpu_history_router
from manager.api.granted import OpenByKey
from manager.api.health import health_router
from manager.api.keys import keys_router
from manager.api.lanes import lanes_router
from manager.api.lifts import lifts_router
from manager.api.live import live_router
from manager.api.llm import MOST_BODY_BYTES as MOST_LLM_BYTES
from manager.api.llm import PATH as LLM
from manager.api.llm import llm_router
from manager.api.loading import loading_router
from manager.api.model_settings import model_settings_router
from manager.api.models import models_router
from manager.api.ollama import OllamaApi
from manager.api.requests import requests_router
from manager.api.routing import routing_router
from manager.api.runs import PATH as RUNS
from manager.api.runs import most_body_bytes, runs_router
from manager.api.schedules import schedules_router
from manager.api.service import service_router
from manager.api.sign_in import sign_in_router
from manager.api.usage import usage_router
from manager.wire.scopes import WITHOUT_KEY

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI

    from manager.api.backend import Backend
    from manager.api.doors import Doors
    from manager.services.live import Live
    from manager.wire.access import Access

_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x_api_key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def control_api(backend: Backend, *, access: Access, live: Live, pages: APIRouter, doors: Doors) -> FastAPI:
    # Its pages load nothing from elsewhere: /docs is there without a network too.
    app = FastAPIOffline(
        title="Ollama Endpoint Manager",
        version=__version__,
        description="Starts, stops and watches Ollama instances.",
        redirect_slashes=False,
        redoc_url=None,
    )
    _describe_key(app, access)
    open_requests = OpenByKey()

    def most_bytes(path: str) -> int | None:
        if path.startswith(f"{LLM}/"):
            return MOST_LLM_BYTES
        return most_body_bytes(backend) if path == RUNS else most_collection_bytes(backend, path)

    routers = (
        compute_router(backend),
        gpu_history_router(backend),
        loading_router(backend),
        models_router(backend),
        lifts_router(backend),
        service_router(backend),
        breakers_router(backend),
        routing_router(backend),
        requests_router(backend),
        lanes_router(backend),
        cluster_router(backend),
        cluster_routes_router(backend),
        schedules_router(backend),
        live_router(live),
        model_settings_router(backend),
        runs_router(backend),
        collections_router(backend),
        collection_items_router(backend),
        llm_router(backend),
        benchmarks_router(backend),
        keys_router(backend, open_requests.cut),
        sign_in_router(backend.keyring, doors, backend.refusals.refused),
        budgets_router(backend),
        usage_router(backend),
        health_router(backend),
        pages,
    )
    for router in routers:
        # `include_router` would build every route once more, at the first request and on the event loop.
        app.router.routes.extend(router.routes)
    add_error_handlers(app, [route for router in routers for route in router.routes])
    app.add_middleware(OllamaApi, backend=backend, routes=app.routes)
    app.add_middleware(
        Gate,
        access=access,
        refused=backend.refusals.refused,
        used=backend.keyring.used,
        open_requests=open_requests,
        doors=doors,
        most_bytes=most_bytes,
    )
    return app


def _describe_key(app: FastAPI, access: Access) -> None:
    """Have the description say whether a key is needed: the gate asks for it before any route is found."""
    without_key = app.openapi

    def openapi() -> dict[str, Any]:
        document = without_key()
        if not access.wants_key:
            return document
        paths = {
            path: methods if path not in WITHOUT_KEY else _each(methods, security=[])
            for path, methods in document["paths"].items()
        }
        return {
            **document,
            "components": {**document["components"], "securitySchemes": _SECURITY_SCHEMES},
            "security": [{name: []} for name in _SECURITY_SCHEMES],
            "paths": paths,
        }

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation says


def _each(methods: dict[str, Any], **more: object) -> dict[str, Any]:
    return {method: {**described, **more} for method, described in methods.items()}
