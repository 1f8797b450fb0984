"""The control API as one FastAPI application."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from manager import __version__
from manager.api.compute import compute_router
from manager.api.errors import add_error_handlers
from manager.api.gate import Gate
from manager.api.health import health_router

if TYPE_CHECKING:
    from collections.abc import Collection

    from manager.api.backend import Backend


def control_api(backend: Backend, *, allowed_hosts: Collection[str], key: str | None) -> FastAPI:
    app = FastAPI(
        title="Ollama Endpoint Manager",
        version=__version__,
        description="Starts, stops and watches Ollama instances.",
        redirect_slashes=False,
    )
    app.include_router(compute_router(backend))
    app.include_router(health_router(backend))
    add_error_handlers(app)
    app.add_middleware(Gate, allowed_hosts=allowed_hosts, key=key)
    return app
