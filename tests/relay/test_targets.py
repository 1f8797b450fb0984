"""Every spelling of a path is served as the route that it names, and an upstream sees the normal form."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support.inside import until
from tests.support.relaying import Scripted, relaying
from tests.support.storing import Store, ask

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.relaying import Conversation, Front

BODY = json.dumps({"model": "tiny", "messages": [], "stream": False}).encode()
INFERENCE = [
    ("/api/chat/", "/api/chat"),
    ("//api//chat", "/api/chat"),
    ("/api/%63hat", "/api/chat"),
    ("/api/./chat?x=%61", "/api/chat?x=%61"),
    ("/x/../v1/chat/completions/", "/v1/chat/completions"),
    ("http://127.0.0.1:1/api/chat", "/api/chat"),
    ("http://localhost/v1//chat/completions?x=1", "/v1/chat/completions?x=1"),
]
OTHERS = [
    "/api/tags/",
    "//api/tags",
    "/api/%74ags",
    "http://localhost:11434/api/tags",
    "/v1/models/",
    "/api/runtime/compute//instances/",
    "/api/runtime/compute/x/../instances",
    "http://localhost/readyz/",
]


async def status(front: Front, head: str, body: bytes = b"") -> int:
    client = await front.connect()
    lines = [head, *([f"Content-Length: {len(body)}"] if body else []), "", ""]
    await client.raw("\r\n".join(lines).encode() + body)
    found, _ = await client.head()
    client.leave()
    return found


@pytest.mark.parametrize(("spelled", "target"), INFERENCE)
async def test_an_inference_route_is_served_in_every_spelling(
    tmp_path: Path, spelled: str, target: str
) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        assert await status(front, f"POST {spelled} HTTP/1.1\r\nHost: localhost", BODY) == 200
        assert [seen.target for seen in server.seen] == [target]


async def test_other_routes_are_served_in_every_spelling(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        for spelled in OTHERS:
            assert await status(front, f"GET {spelled} HTTP/1.1\r\nHost: localhost") in (200, 503), spelled


async def test_an_escaped_slash_is_no_separator(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        for spelled in ("/api%2Fchat", "/api/blobs/..%2fchat", "/x%2f..%2fapi/chat", "/v1/models%2ftiny"):
            assert await status(front, f"POST {spelled} HTTP/1.1\r\nHost: localhost", BODY) == 404, spelled
        assert server.seen == []


async def test_an_escaped_slash_is_part_of_the_name_of_a_model(tmp_path: Path) -> None:
    name = "hf.co/me/tiny:latest"
    async with Scripted(("hf.co/me/tiny",)).serving() as server, relaying(tmp_path, {"a": server}) as front:
        for spelled in (name, name.replace("/", "%2F"), name.replace("/", "%2f").replace(":", "%3A")):
            assert await status(front, f"GET /v1/models/{spelled} HTTP/1.1\r\nHost: localhost") == 200


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("POST http://evil.example/api/chat HTTP/1.1\r\nHost: localhost", 403),
        ("POST http://localhost/api/chat HTTP/1.1\r\nHost: evil.example", 403),
        ("POST http://localhost/api/chat HTTP/1.1", 400),
        ("POST http://a@localhost/api/chat HTTP/1.1\r\nHost: localhost", 400),
        ("POST ftp://localhost/api/chat HTTP/1.1\r\nHost: localhost", 400),
        ("POST /api/chat HTTP/1.1", 400),
        ("POST /api/chat HTTP/1.1\r\nHost: localhost\r\nHost: localhost", 400),
        ("POST /api/chat HTTP/1.1\r\nHost: 0.0.0.0:11435", 200),
        ("POST /api/chat HTTP/1.1\r\nHost: host.docker.internal", 200),
        ("POST /api/chat HTTP/1.0", 200),
        ("POST http://localhost/api/chat HTTP/1.0", 200),
        ("POST http://evil.example/api/chat HTTP/1.0", 403),
        ("POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: a/b\r\nContent-Type: a/b", 200),
        ("POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: a/b\r\nContent-Type: c/d", 200),
        ("POST /api/chat HTTP/1.1\r\nHost: localhost\r\nAuthorization: a\r\nAuthorization: a", 200),
        ("POST /api/chat HTTP/1.1\r\nHost: localhost\r\nOrigin: app://obsidian.md", 200),
    ],
)
async def test_the_host_counts_on_the_relay_as_everywhere(tmp_path: Path, head: str, expected: int) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        assert await status(front, head, BODY) == expected
        assert [seen.header("content-type") for seen in server.seen if "Content-Type" in head] in (
            [],
            ["a/b"],
        )


# --- routes of a current Ollama that need an instance ---------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/me"),
        ("POST", "/api/signout"),
        ("DELETE", "/api/user/keys/AAAAB3Nz-_="),
        ("POST", "/api/experimental/web_search"),
        ("POST", "/api/experimental/web_fetch"),
    ],
)
async def test_requests_about_an_account_are_answered_by_an_instance(
    tmp_path: Path, method: str, path: str
) -> None:
    one, two = Store(), Store()
    async with one.serving(), two.serving(), relaying(tmp_path, {"one": one, "two": two}) as front:

        async def unknown(talk: Conversation) -> None:
            await talk.whole(401, b'{"error":"unauthorized","signin_url":"https://ollama.com/connect"}')

        one.on[path] = two.on[path] = unknown
        reply = await ask(front, method, path, b"")
        assert (reply.status, reply.json()["signin_url"]) == (401, "https://ollama.com/connect")
        assert (reply.headers["x-instance"], len(one.seen), len(two.seen)) == ("one", 1, 0)
        assert (await ask(front, method, path, b"", {"X-Instance": "two"})).headers["x-instance"] == "two"
        assert (one.seen[0].method, one.seen[0].target) == (method, path)
        assert "AAAA" not in (await front.record()).path
        await until(lambda: front.at_rest)


async def test_what_no_instance_is_needed_for_starts_and_asks_none(tmp_path: Path) -> None:
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        reply = await ask(front, "GET", "/api/status", b"")
        assert reply.json() == {"cloud": {"disabled": False, "source": "none"}}
        reply = await ask(front, "GET", "/api/experimental/model-recommendations", b"")
        assert reply.json() == {"recommendations": []}
        assert server.seen == []


async def test_errors_below_messages_have_the_form_of_anthropic(tmp_path: Path) -> None:
    async with Store().serving() as server, relaying(tmp_path, {"a": server}) as front:
        for path in ("/v1/messages/count_tokens", "/v1/messages/batches", "/v1//messages/count_tokens/"):
            reply = await ask(front, "POST", path, {"model": "tiny"})
            assert (reply.status, reply.json()["type"]) == (404, "error")
            assert reply.json()["error"]["type"] == "not_found_error"
