"""One request through a translation, and answers of servers for it."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from manager.domain.roles import BodyChanges
from manager.wire.body import read_body
from manager.wire.routes import INFERENCE
from manager.wire.translate import translation
from manager.wire.translate.codec import DEFAULT_TRAITS
from manager.wire.translate.hub import AnswerFacts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manager.domain.target import Protocol
    from manager.wire.translate import Traits, Translation
    from manager.wire.translate.codec import ClientCodec
    from manager.wire.translate.hub import AnswerEvent

CREATED_S = 1_700_000_000


def clock() -> int:
    return CREATED_S * 10**9


def sent(
    path: str,
    protocol: Protocol,
    request: dict[str, Any],
    *,
    model: str = "theirs",
    traits: Traits = DEFAULT_TRAITS,
    max_tokens: int | None = None,
) -> tuple[Translation, dict[str, Any]]:
    """The translation of a request, and what the server gets."""
    route = INFERENCE[path.encode()]
    body = read_body(json.dumps({"model": "ours", **request}).encode(), route)
    translated = translation(route, protocol, request_id="r1", clock=clock, traits=traits)
    assert translated is not None
    document = translated.request(body, model, BodyChanges(), max_tokens=max_tokens)
    return translated, json.loads(document)


def answered(translated: Translation, answer: bytes, cuts: Iterable[int] = ()) -> bytes:
    """What the client gets of an answer that comes in pieces, cut at these places."""
    places = [0, *sorted(cuts), len(answer)]
    pieces = [answer[begin:end] for begin, end in pairwise(places)]
    return b"".join(translated.feed(piece) for piece in pieces) + translated.end()


def written(client: ClientCodec[Any, AnswerEvent], events: Iterable[AnswerEvent], *, stream: bool) -> bytes:
    """What a client gets of these events."""
    client.begin(AnswerFacts("r1", "m", CREATED_S, stream, wants_usage=True), clock)
    return b"".join(client.write(event) for event in events)


def events_in(stream: bytes) -> list[tuple[str, dict[str, Any]]]:
    """The names and documents of server-sent events, `[DONE]` as an empty one."""
    assert stream.endswith(b"\n\n")
    found = []
    for event in stream.decode().split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in event.split("\n"))
        data = lines["data"]
        found.append((lines.get("event", ""), {} if data == "[DONE]" else json.loads(data)))
    return found


def stream_of(*events: dict[str, Any]) -> bytes:
    """The bytes of an Anthropic server's stream."""
    return b"".join(
        b"event: %b\ndata: %b\n\n" % (event["type"].encode(), json.dumps(event).encode()) for event in events
    )
