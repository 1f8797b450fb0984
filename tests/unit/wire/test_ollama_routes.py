"""The paths of Ollama, and the dialect in which their clients expect errors."""

from __future__ import annotations

import re

import pytest

from manager.wire.ollama_routes import methods_of, spoken_at
from manager.wire.routes import Dialect

# server/routes.go, GenerateRoutes, of ollama/ollama at fb30760996871fa9460115c753afd2c60d4ab0f7 (2026-08-21,
# after 0.33). A new release is compared by hand: what it adds is written here first.
OLLAMA = {
    "/": {"HEAD", "GET"},
    "/api/version": {"HEAD", "GET"},
    "/api/status": {"GET"},
    "/api/pull": {"POST"},
    "/api/push": {"POST"},
    "/api/tags": {"HEAD", "GET"},
    "/api/show": {"POST"},
    "/api/delete": {"DELETE"},
    "/api/me": {"POST"},
    "/api/signout": {"POST"},
    "/api/user/keys/:encodedKey": {"DELETE"},
    "/api/create": {"POST"},
    "/api/blobs/:digest": {"POST", "HEAD"},
    "/api/copy": {"POST"},
    "/api/experimental/web_search": {"POST"},
    "/api/experimental/web_fetch": {"POST"},
    "/api/experimental/model-recommendations": {"GET"},
    "/api/ps": {"GET"},
    "/api/generate": {"POST"},
    "/api/chat": {"POST"},
    "/api/embed": {"POST"},
    "/api/embeddings": {"POST"},
    "/v1/chat/completions": {"POST"},
    "/v1/completions": {"POST"},
    "/v1/embeddings": {"POST"},
    "/v1/models": {"GET"},
    "/v1/models/:model": {"GET"},
    "/v1/responses": {"POST"},
    "/v1/audio/transcriptions": {"POST"},
    "/v1/messages": {"POST"},
}


@pytest.mark.parametrize("path", OLLAMA)
def test_every_route_of_a_current_ollama_exists_with_its_methods(path: str) -> None:
    assert set(methods_of(re.sub(r":\w+", "x", path)) or ()) == OLLAMA[path]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/", ("GET", "HEAD")),
        ("/api/chat", ("POST",)),
        ("/api/delete", ("DELETE",)),
        ("/api/blobs/sha256:00", ("POST", "HEAD")),
        ("/v1/models/me/tiny:1", ("GET",)),
        ("/v1/messages", ("POST",)),
        ("/v1/audio/transcriptions", ("POST",)),
    ],
)
def test_a_path_of_ollamas_has_its_methods(path: str, methods: tuple[str, ...]) -> None:
    assert methods_of(path) == methods


@pytest.mark.parametrize(
    "path",
    [
        "/api/nope",
        "/api/blobs/",
        "/api/blobs/..",
        "/api/blobs/../pull",
        "/api/user/keys",
        "/api/user/keys/",
        "/api/user/keys/../x",
        "/api/user/keys/a/b",
        "/api/user/keys/a%2Fb",
        "/api/blobs/sha256:00/x",
        "/v1/models/",
        "/api/tags/",
        "/API/tags",
        "",
        "/api/runtime/compute",
    ],
)
def test_another_path_has_none(path: str) -> None:
    assert methods_of(path) is None


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/", Dialect.NATIVE),
        ("/api/pull", Dialect.NATIVE),
        ("/api/blobs/x", Dialect.NATIVE),
        ("/v1/models", Dialect.OPENAI),
        ("/v1/nope", Dialect.OPENAI),
        ("/v1/messages", Dialect.ANTHROPIC),
        ("/v1/messages/count_tokens", Dialect.ANTHROPIC),
        ("/api/me", Dialect.NATIVE),
        ("/api/user/keys/AAAA", Dialect.NATIVE),
        ("/healthz", None),
        ("/api/runtime/compute/instances", None),
        ("/v1/cluster/hosts", None),
        ("/v1/cluster", Dialect.OPENAI),
        ("/nope", None),
    ],
)
def test_the_path_decides_the_dialect(path: str, dialect: Dialect | None) -> None:
    assert spoken_at(path) is dialect
