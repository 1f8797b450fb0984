from __future__ import annotations

import pytest

from manager.domain.roles import RequestKind
from manager.wire.routes import INFERENCE, Dialect, Route, dialect_of


def test_a_route_is_found_by_the_bytes_of_its_path_and_by_nothing_else() -> None:
    assert all(path == route.path.encode() for path, route in INFERENCE.items())
    for path in (b"/api/chat/", b"/API/chat", b"//api/chat", b"/api/tags", b"/v1/models", b"/", b""):
        assert path not in INFERENCE


def test_only_the_native_routes_stream_unasked_and_embeddings_never_do() -> None:
    assert {route.path for route in INFERENCE.values() if route.streams} == {"/api/chat", "/api/generate"}
    for route in INFERENCE.values():
        assert route.can_stream is (route.kind is RequestKind.GENERATE)


@pytest.mark.parametrize("route", INFERENCE.values(), ids=lambda route: route.path)
def test_errors_are_told_in_the_dialect_of_the_route(route: Route) -> None:
    assert dialect_of(route.path) is route.dialect


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/models", Dialect.OPENAI),
        ("/v1/nothing", Dialect.OPENAI),
        ("/v1/messages/count_tokens", Dialect.ANTHROPIC),
        ("/v1/messages/batches/x/results", Dialect.ANTHROPIC),
        ("/v1/messagesx", Dialect.OPENAI),
        ("/v1", Dialect.NATIVE),
        ("/api/tags", Dialect.NATIVE),
        ("/", Dialect.NATIVE),
    ],
)
def test_elsewhere_the_dialect_goes_by_the_beginning_of_the_path(path: str, dialect: Dialect) -> None:
    assert dialect_of(path) is dialect
