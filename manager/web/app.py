"""The control API and the page of the operator as one application."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.api.app import control_api
from manager.api.live import live_channel
from manager.web.doors import PageDoors
from manager.web.rendering import Renderer
from manager.web.router import pages_router

if TYPE_CHECKING:
    from fastapi import FastAPI

    from manager.api.backend import Backend
    from manager.wire.access import Access


def application(backend: Backend, *, access: Access) -> FastAPI:
    """Return everything that a daemon serves beside the relay. API and page share one live channel."""
    live, renderer = live_channel(backend), Renderer()
    pages = pages_router(backend, live, renderer, access)
    return control_api(backend, access=access, live=live, pages=pages, doors=PageDoors(renderer))
