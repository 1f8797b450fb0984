"""The routes that have a model do something, and the dialect of each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

from manager.domain.roles import RequestKind

if TYPE_CHECKING:
    from collections.abc import Mapping


class Dialect(StrEnum):
    """Whose API a caller speaks: it decides the form of errors and of streams."""

    NATIVE = "native"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Route:
    """`streams` is whether an answer comes as a stream where the caller does not say."""

    path: str
    kind: RequestKind
    dialect: Dialect
    streams: bool = False
    can_stream: bool = True


_MESSAGES = "/v1/messages"

_ROUTES = (
    Route("/api/generate", RequestKind.GENERATE, Dialect.NATIVE, streams=True),
    Route("/api/chat", RequestKind.GENERATE, Dialect.NATIVE, streams=True),
    Route("/api/embed", RequestKind.EMBED, Dialect.NATIVE, can_stream=False),
    Route("/api/embeddings", RequestKind.EMBED, Dialect.NATIVE, can_stream=False),
    Route("/v1/chat/completions", RequestKind.GENERATE, Dialect.OPENAI),
    Route("/v1/completions", RequestKind.GENERATE, Dialect.OPENAI),
    Route("/v1/responses", RequestKind.GENERATE, Dialect.OPENAI),
    Route("/v1/embeddings", RequestKind.EMBED, Dialect.OPENAI, can_stream=False),
    Route(_MESSAGES, RequestKind.GENERATE, Dialect.ANTHROPIC),
)

INFERENCE: Mapping[bytes, Route] = MappingProxyType({route.path.encode(): route for route in _ROUTES})


def dialect_of(path: str) -> Dialect:
    """Return the dialect in which a client of `path` expects its errors."""
    if path == _MESSAGES or path.startswith(f"{_MESSAGES}/"):
        return Dialect.ANTHROPIC
    return Dialect.OPENAI if path.startswith("/v1/") else Dialect.NATIVE
