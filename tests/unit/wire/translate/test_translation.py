"""What can be translated, and what is the same for all dialects."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from manager.domain.roles import RequestKind
from manager.domain.target import Protocol
from manager.wire.body import read_body
from manager.wire.routes import INFERENCE
from manager.wire.translate import idle_answer, refusal, speaks, translation
from manager.wire.translate.errors import MOST_MESSAGE_LENGTH, message_in
from manager.wire.translate.media import media_type_of
from manager.wire.translate.native_answer import stamp
from manager.wire.unload import unloaded
from tests.contract.compare import Answer, differences, load_recordings
from tests.support.native_clients import BEGIN_NS, asked, translating

RECORDED = {one["name"]: one for one in load_recordings()}
HI = {"messages": [{"role": "user", "content": "hi"}]}
PASSED = {
    Protocol.OPENAI: {"/v1/chat/completions", "/v1/completions", "/v1/embeddings"},
    Protocol.ANTHROPIC: {"/v1/messages"},
}


@pytest.mark.parametrize("path", [path.decode() for path in INFERENCE])
@pytest.mark.parametrize("protocol", Protocol)
def test_every_route_passes_is_translated_or_is_refused(path: str, protocol: Protocol) -> None:
    route = INFERENCE[path.encode()]
    passes = protocol is Protocol.OLLAMA or path in PASSED[protocol]
    assert speaks(route, protocol) is passes
    found = None
    if passes or refusal(route, protocol) is None:
        found = translation(route, protocol, request_id="r", clock=lambda: 0)
        assert (found is None) is passes
    else:
        # Anthropic has no embeddings: all else goes everywhere.
        assert (route.kind, protocol) == (RequestKind.EMBED, Protocol.ANTHROPIC)
        assert refusal(route, protocol) == (
            "servers of the protocol anthropic have no call for requests of the kind embed"
        )


@pytest.mark.parametrize(
    ("path", "stream", "kind"),
    [
        ("/api/chat", True, b"application/x-ndjson"),
        ("/api/chat", False, b"application/json; charset=utf-8"),
        ("/v1/messages", True, b"text/event-stream"),
        ("/v1/messages", False, b"application/json"),
        ("/v1/responses", True, b"text/event-stream"),
    ],
)
def test_the_head_of_an_answer(path: str, stream: bool, kind: bytes) -> None:
    document: dict[str, Any] = {"input": "hi"} if path == "/v1/responses" else {**HI, "max_tokens": 9}
    if path == "/api/chat":
        document = HI
    through, _ = asked(path, {**document, "stream": stream})
    assert through.head(200) == (200, kind)
    assert through.head(500)[1].startswith(b"application/json")


def test_an_error_is_said_in_words() -> None:
    through = translating("/api/chat")
    assert through.error(500, b'{"error":{"message":"no memory"}}') == "no memory"
    assert through.error(502, b"<html>") == "the server answered with status 502"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": "a"}, "a"),
        ({"error": {"message": "a", "type": "b"}}, "a"),
        ({"type": "error", "error": {"type": "b", "message": "a"}}, "a"),
        ([{"error": {"code": 400, "message": "a"}}], "a"),
        ({"object": "error", "message": "a"}, "a"),
        ({"detail": "a"}, "a"),
        ({"error": {}, "detail": "a"}, "a"),
        ({"detail": [{"msg": "a"}]}, None),
        ({"error": ""}, None),
        ({}, None),
        ([], None),
        ([1], None),
        ("a", None),
    ],
)
def test_the_message_of_an_error(body: Any, message: str | None) -> None:
    assert message_in(json.dumps(body).encode()) == message


def test_a_message_is_bounded() -> None:
    body = json.dumps({"error": "x" * (MOST_MESSAGE_LENGTH + 1)}).encode()
    assert message_in(body) == "x" * MOST_MESSAGE_LENGTH
    assert message_in(b"no JSON") is None


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ("iVBORw0KGgoAAAANSUhEUg==", "image/png"),
        ("/9j/4AAQSkZJRg==", "image/jpeg"),
        ("R0lGODdhAQABAIAA", "image/gif"),
        ("R0lGODlhAQABAIAA", "image/gif"),
        ("UklGRiQAAABXRUJQ", "image/webp"),
        ("UklGRiQAAABXQVZF", None),
        ("Qk0aAAAAAAAAABoA", "image/bmp"),
        ("", None),
        ("abc", None),
        ("iVBORw0KGgo!", None),
        ("é", None),
    ],
)
def test_the_type_of_an_image_is_in_its_first_bytes(data: str, kind: str | None) -> None:
    assert media_type_of(data) == kind


# --- requests with nothing to compute -------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["generate-load", "chat-load", "generate-unload", "chat-unload", "embed-empty"]
)
def test_a_load_is_answered_as_recorded(name: str) -> None:
    recording = RECORDED[name]
    route = INFERENCE[recording["request"]["path"].encode()]
    body = read_body(json.dumps(recording["request"]["body"]).encode(), route)
    answer = idle_answer(body, route, body.model, BEGIN_NS)
    assert answer is not None
    headers = {"Content-Type": recording["headers"]["Content-Type"], "Content-Length": str(len(answer))}
    assert differences(recording, Answer(200, headers, answer)) == []


def test_an_unload_is_answered_as_where_no_instance_runs() -> None:
    route = INFERENCE[b"/api/generate"]
    body = read_body(b'{"model":"m","keep_alive":0}', route)
    at = datetime.fromtimestamp(BEGIN_NS // 10**9, UTC)
    assert idle_answer(body, route, "m", BEGIN_NS) == unloaded(route, "m", at)
    assert stamp(BEGIN_NS) == "2026-11-21T08:32:31Z"


def test_an_older_embedding_of_nothing_is_empty() -> None:
    route = INFERENCE[b"/api/embeddings"]
    assert idle_answer(read_body(b'{"model":"m"}', route), route, "m", 0) == b'{"embedding":[]}'


@pytest.mark.parametrize(
    ("path", "document"),
    [
        ("/api/chat", HI),
        ("/api/generate", {"prompt": " "}),
        ("/api/embed", {"input": [""]}),
        ("/api/embeddings", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": []}),
    ],
)
def test_all_other_requests_are_no_loads(path: str, document: dict[str, Any]) -> None:
    route = INFERENCE[path.encode()]
    body = read_body(json.dumps({"model": "m", **document}).encode(), route)
    assert idle_answer(body, route, "m", 0) is None
