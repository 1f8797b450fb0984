"""Runs translations for native clients: a request to a server of another dialect, and the answer back."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

from manager.domain.roles import BodyChanges
from manager.domain.target import Protocol
from manager.wire.body import SMALL_BYTES, read_body, reading
from manager.wire.routes import INFERENCE
from manager.wire.steps import run
from manager.wire.translate import DEFAULT_TRAITS, Traits, Translation, translation

if TYPE_CHECKING:
    from collections.abc import Iterable

UNCHANGED = BodyChanges()
BEGIN_NS = 1_795_249_951_000_000_000
MS = 1_000_000


def translating(
    path: str, protocol: Protocol = Protocol.OPENAI, traits: Traits = DEFAULT_TRAITS
) -> Translation:
    """Return a translation whose clock goes on by a millisecond each time it is read."""
    times = itertools.count(BEGIN_NS, MS)
    found = translation(
        INFERENCE[path.encode()], protocol, request_id="r1", clock=lambda: next(times), traits=traits
    )
    assert found is not None
    return found


def sent(
    path: str, document: dict[str, Any], changes: BodyChanges = UNCHANGED, **more: Any
) -> dict[str, Any]:
    """Return what the server gets for a request to its model `served`."""
    return asked(path, document, changes, **more)[1]


def asked(
    path: str,
    document: dict[str, Any] | bytes,
    changes: BodyChanges = UNCHANGED,
    *,
    protocol: Protocol = Protocol.OPENAI,
    traits: Traits = DEFAULT_TRAITS,
    max_tokens: int | None = None,
    wants_usage: bool = False,
) -> tuple[Translation, dict[str, Any]]:
    """Return the translation of a request, and what the server gets."""
    through = translating(path, protocol, traits)
    route = INFERENCE[path.encode()]
    raw = document if isinstance(document, bytes) else json.dumps({"model": "role", **document}).encode()
    body = read_body(raw, route) if len(raw) <= SMALL_BYTES else run(reading([raw], route, 0))
    written = through.request(body, "served", changes, max_tokens=max_tokens, wants_usage=wants_usage)
    return through, json.loads(written)


def answered(through: Translation, pieces: Iterable[bytes]) -> bytes:
    """Return what the client gets for an answer that comes in pieces."""
    return b"".join([through.feed(piece) for piece in pieces]) + through.end()


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    """Return a chunk of an OpenAI stream."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "x",
        "choices": choices,
        **more,
    }


def stream_of(*chunks: dict[str, Any] | str, end: bytes = b"data: [DONE]\n\n") -> bytes:
    """Return chunks as server-sent events."""
    written = (one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in chunks)
    return b"".join(f"data: {one}\n\n".encode() for one in written) + end
