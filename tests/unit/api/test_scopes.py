"""Every route of the relay and of the application has a scope, and the scopes are as documented."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest
from starlette.routing import Mount, Route

from manager.domain.keys import INCLUDED, Scope
from manager.web.app import application
from manager.wire import ollama_routes
from manager.wire.access import Access
from manager.wire.routes import INFERENCE
from manager.wire.scopes import FILES_WITHOUT_KEY, TABLE, WITHOUT_KEY, methods_at, scopes_of
from tests.support.keys import grant, keys

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of later parts of the contract.
ANNOUNCED = ("/api/v1/usage", "/api/v1/budgets")


def concrete(path: str) -> str:
    return re.sub(r"\{[^}]+\}", "x", path)


def routes() -> Iterator[tuple[str, str]]:
    """Every method and path that is served, with `x` for each variable."""
    app = application(Mock(), access=Access(allowed_hosts=()))  # only asked for its routes
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), concrete(path)
    for route in app.routes:
        if isinstance(route, Mount):
            yield from (("GET", f"{route.path}/x"), ("HEAD", f"{route.path}/x"))
        elif isinstance(route, Route):
            for method in route.methods or ():
                yield method, concrete(route.path)
    for path in ("/sign-in", "/sign-out"):  # left out of the description
        yield "POST", path
    for path, methods in ollama_routes._METHODS.items():
        yield from ((method, path) for method in methods)
    for path in (f"{ollama_routes.BLOB_PREFIX}x", f"{ollama_routes.MODEL_PREFIX}x/y", "/api/user/keys/x"):
        yield from ((method, path) for method in ollama_routes.methods_of(path) or ())
    yield from (("POST", path.decode()) for path in INFERENCE)


ROUTES = sorted(
    {(method, path) for method, path in routes() if path not in WITHOUT_KEY and FILES_WITHOUT_KEY not in path}
)


def test_all_routes_are_looked_at() -> None:
    assert len(ROUTES) > 80
    for route in (("GET", "/docs"), ("POST", "/api/chat"), ("DELETE", "/api/v1/keys/x"), ("GET", "/metrics")):
        assert route in ROUTES


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("scope", Scope)
def test_every_route_is_open_to_the_keys_of_its_scopes_and_to_no_other(
    method: str, path: str, scope: Scope
) -> None:
    needed = scopes_of(method, path)
    assert needed is not None, f"{method} {path} has no scope in manager/wire/scopes.py"
    access = Access(allowed_hosts=["localhost"], keys=keys("secret", of=grant("k", scope)))
    here = (b"host", b"localhost")
    refusal, _ = access.check(method, path, [here, (b"x-api-key", b"secret")])
    opens = not needed or any(one in INCLUDED[scope] for one in needed)
    assert (refusal is None) is opens
    assert refusal is None or (refusal.status, refusal.code) == (403, "forbidden")
    refusal, _ = access.check(method, path, [here])
    assert refusal is not None
    assert refusal.status == 401


def test_no_route_of_the_table_is_one_that_nobody_serves() -> None:
    served = set(ROUTES)
    for methods, path, _ in TABLE:
        for method in methods.split():
            asked = concrete(path.replace("{model*}", "x/y"))
            assert (method, asked) in served or path in ANNOUNCED, (method, path)


@pytest.mark.parametrize(
    ("method", "path", "scopes"),
    [
        ("GET", "/", ()),
        ("GET", "/api/version", ()),
        ("POST", "/api/chat", ("client",)),
        ("POST", "/v1/messages", ("client",)),
        ("GET", "/api/tags", ("client", "read")),
        ("GET", "/v1/models", ("client", "read")),
        ("GET", "/metrics", ("read",)),
        ("GET", "/docs", ("read",)),
        ("GET", "/api/runtime/compute/requests", ("read",)),
        ("GET", "/api/runtime/compute/events", ("read",)),
        ("POST", "/api/runtime/compute/instances/gpu0/stop", ("operator",)),
        ("POST", "/api/runtime/compute/instances/gpu0/drain", ("operator",)),
        ("POST", "/api/settings/models", ("operator",)),
        ("POST", "/api/pull", ("operator",)),
        ("DELETE", "/api/delete", ("operator",)),
        ("POST", "/api/v1/keys", ("admin",)),
        ("GET", "/api/v1/keys", ("admin",)),
    ],
)
def test_the_scopes_are_those_of_the_contract(method: str, path: str, scopes: tuple[str, ...]) -> None:
    assert scopes_of(method, path) == scopes


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/nope"), ("PUT", "/api/chat"), ("GET", "/api/v1/runs/a/b"), ("GET", "/docs/")],
)
def test_what_is_not_there_has_no_scope(method: str, path: str) -> None:
    assert scopes_of(method, path) is None
    assert methods_at("/nope") == ()
