"""Collections where something is missing: the extra, room for a body."""

from __future__ import annotations

from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from manager.api.collection_items import collection_items_router, most_body_bytes
from manager.api.collections import collections_router
from manager.api.errors import add_error_handlers
from manager.services.bodies import BodyBudget
from manager.services.embeddings.shelf import Shelf

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PATH = "/api/v1/collections"


class Known(Shelf):
    """Has every collection."""

    def get(self, name: str) -> Any:
        return name


def app_over(shelf: Shelf, bodies: BodyBudget | None = None) -> FastAPI:
    backend: Any = SimpleNamespace(
        collections=SimpleNamespace(shelf=shelf), passing=SimpleNamespace(bodies=bodies)
    )
    app = FastAPI()
    routers = (collections_router(backend), collection_items_router(backend))
    for router in routers:
        app.router.routes.extend(router.routes)
    add_error_handlers(app, [route for router in routers for route in router.routes])
    return app


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        yield client


async def test_without_the_extra_every_route_says_how_to_install_it() -> None:
    store: Any = None
    app = app_over(Shelf(store, None))
    routes = [route for route in app.routes if isinstance(route, APIRoute) and route.path.startswith(PATH)]
    assert len(routes) == 18
    async with client_of(app) as client:
        for route in routes:
            method = next(iter(route.methods or ()))
            path = route.path.format(name="docs", item_id="a", version="v")
            for body in (b"{}", b'{"name": "docs", "version": "v"}'):
                answer = await client.request(
                    method, path, content=body, headers={"Content-Type": "application/json"}
                )
                error = answer.json()["error"]
                assert (answer.status_code, error["code"]) == (501, "not_installed"), (method, path)
                assert "pip install" in error["message"]


@pytest.mark.parametrize(("method", "path"), [("PUT", "items"), ("POST", "query")])
async def test_a_body_without_room_is_refused_and_holds_nothing(method: str, path: str) -> None:
    store: Any = None
    vectors: Any = object()
    bodies = BodyBudget(100)
    async with client_of(app_over(Known(store, vectors), bodies)) as client:
        for size, status in ((101, 503), (100, 422), (100, 422)):
            answer = await client.request(
                method,
                f"{PATH}/docs/{path}",
                content=b"x" * size,
                headers={"Content-Type": "application/json"},
            )
            assert answer.status_code == status, answer.text
            assert bodies.held_bytes == 0
            assert answer.headers.get("Retry-After") == ("1" if status == 503 else None)


@pytest.mark.parametrize(
    ("path", "most"),
    [
        (PATH, None),
        (f"{PATH}/docs", None),
        (f"{PATH}/items", None),
        (f"{PATH}/docs/items", 2**30),
        (f"{PATH}/docs/items/items", None),
        (f"{PATH}/docs/query", 4 * 2**20),
        (f"{PATH}/docs/backfill", None),
        ("/api/v1/runs", None),
    ],
)
def test_only_items_and_queries_may_be_large(path: str, most: int | None) -> None:
    backend: Any = SimpleNamespace(passing=SimpleNamespace(limits=SimpleNamespace(most_body_bytes=2**30)))
    assert most_body_bytes(backend, path) == most
