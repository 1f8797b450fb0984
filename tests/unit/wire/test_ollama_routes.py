"""Which paths are Ollama's, and in whose words their callers expect errors."""

from __future__ import annotations

import pytest

from manager.wire.ollama_routes import methods_of, spoken_at
from manager.wire.routes import Dialect


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
        ("/healthz", None),
        ("/api/runtime/compute/instances", None),
        ("/nope", None),
    ],
)
def test_the_path_decides_the_dialect(path: str, dialect: Dialect | None) -> None:
    assert spoken_at(path) is dialect
