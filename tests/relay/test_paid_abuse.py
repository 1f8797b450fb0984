"""Clients that want more than they pay for, and providers that misbehave, through the whole gateway."""

from __future__ import annotations

import asyncio
import json
import zlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.runs import interrupted
from tests.relay.test_budgets import budget, settled, spent
from tests.relay.test_cloud import (
    ANTHROPIC,
    CHAT,
    JSON,
    KEY,
    OPENAI,
    TINY,
    WHOLE,
    broken,
    ended,
    fails,
    fronted,
    get,
)
from tests.support.inside import until
from tests.support.provider import Provider, chunk, event, openai_answer, openai_events, refuses

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.support.relaying import Conversation

COMPLETIONS = "/v1/completions"
SAYS = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROVIDER_KEY", KEY)


def says(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, *parts]}]}


@pytest.mark.parametrize(
    ("protocol", "path", "more", "named"),
    [
        ("openai", OPENAI, {"n": 8}, "n"),
        ("openai", OPENAI, {"N": 8}, "n"),
        ("openai", OPENAI, {"n": 8.0}, "n"),
        ("openai", OPENAI, {"max_completion_tokens": 1e6}, "max_completion_tokens"),
        ("openai", OPENAI, {"max_completion_tokens": "1000000"}, "max_completion_tokens"),
        ("openai", OPENAI, {"max_completion_tokens": 2**70}, "max_completion_tokens"),
        ("openai", OPENAI, {"search_parameters": {"mode": "on"}}, "search_parameters"),
        ("openai", OPENAI, {"plugins": [{"id": "web"}]}, "plugins"),
        ("openai", OPENAI, {"models": ["dearer"]}, "models"),
        ("openai", OPENAI, {"tools": [{"type": "web_search"}]}, "tools[0]"),
        ("openai", OPENAI, says({"type": "file", "file": {"file_id": "f"}}), "file"),
        ("openai", OPENAI, says({"type": "video_url", "video_url": {"url": "v"}}), "video_url"),
        ("openai", COMPLETIONS, {"prompt": ["a", "b", "c"]}, "prompt"),
        ("openai", COMPLETIONS, {"prompt": [[1, 2], [3]]}, "prompt"),
        ("openai", COMPLETIONS, {"prompt": "a", "best_of": 5}, "best_of"),
        ("anthropic", ANTHROPIC, {"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0]"),
        ("anthropic", ANTHROPIC, {"max_tokens": 1e6}, "max_tokens"),
        ("anthropic", ANTHROPIC, {"speed": "fast"}, "speed"),
        (
            "anthropic",
            ANTHROPIC,
            says({"type": "document", "source": {"type": "base64", "data": "JVBERi0"}}),
            "document",
        ),
        (
            "anthropic",
            ANTHROPIC,
            says(
                {
                    "type": "tool_result",
                    "tool_use_id": "t",
                    "content": [{"type": "document", "source": {"type": "url", "url": "x"}}],
                }
            ),
            "document",
        ),
    ],
)
async def test_what_costs_more_than_the_tokens_of_one_answer_is_refused_and_not_sent(
    tmp_path: Path, protocol: str, path: str, more: dict[str, Any], named: str
) -> None:
    provider = Provider()
    # Nothing local has the role: the client is told of the paid server.
    body: dict[str, Any] = {"model": "emergency", "max_tokens": 64, "messages": SAYS}
    if path == COMPLETIONS:
        del body["messages"]
    if "max_completion_tokens" in more:
        del body["max_tokens"]
    async with fronted(tmp_path, provider, broken(), protocol=protocol, budgets=[budget(1)]) as front:
        reply = await front.ask({**body, "stream": False, **more}, path)
        assert provider.seen == []
        assert reply.status == 400, reply.body
        assert named in reply.body.decode()
        assert await settled(front) == 0


@pytest.mark.parametrize(
    "sets",
    [
        {"max_completion_tokens": 1_000_000},
        {"max_tokens": 1_000_000},
        {"max_completion_tokens": 1_000_000, "max_tokens": 1_000_000},
    ],
)
async def test_a_role_cannot_raise_the_limit_that_is_paid_for(tmp_path: Path, sets: dict[str, Any]) -> None:
    provider = Provider()
    role = {"body": {"overrides": sets}}
    async with fronted(tmp_path, provider, broken(), role=role, budgets=[budget(1)]) as front:
        await front.ask(WHOLE, OPENAI)
        asked = provider.seen[0].json()
        limits = {asked.get(name) for name in ("max_tokens", "max_completion_tokens")} - {None}
        assert limits == {64}


async def test_a_role_cannot_multiply_a_paid_answer(tmp_path: Path) -> None:
    provider = Provider()
    async with fronted(
        tmp_path, provider, broken(), role={"body": {"overrides": {"n": 9}}}, budgets=[budget(1)]
    ) as front:
        assert (await front.ask(WHOLE, OPENAI)).status == 500, "that of the local server"
        assert provider.seen == []
        assert await settled(front) == 0


async def test_a_field_that_is_given_twice_is_sent_once(tmp_path: Path) -> None:
    """One reader takes the first of them, another the last."""
    provider = Provider()
    raw = b'{"model":"pays","n":7,"messages":[{"role":"user","content":"x"}],"n":1,"stream":false}'
    async with fronted(tmp_path, provider, broken()) as front:
        caller = await front.connect()
        await caller.raw(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (front.port, len(raw), raw)
        )
        assert (await caller.reply()).status == 200
        caller.leave()
        assert provider.seen[0].body.count(b'"n"') == 1


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (OPENAI, says({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}})),
        (OPENAI, says({"type": "image_url", "image_url": {"url": "HTTPS://example.com/a.png"}})),
        (CHAT, {"messages": [{"role": "user", "content": "hi", "images": [PIXEL]}]}),
    ],
)
async def test_each_image_is_reserved_for_however_small_its_text_is(
    tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider, broken(), budgets=[budget(0.04)]) as front:
        assert (await front.ask({"model": "pays", "stream": False, **body}, path)).status == 402
        assert provider.seen == []


async def test_an_address_in_a_text_costs_no_more_than_its_letters(tmp_path: Path) -> None:
    links = " ".join(f"https://example.com/{number}" for number in range(50))
    body = {"model": "pays", "stream": False, "messages": [{"role": "user", "content": links}]}
    async with fronted(tmp_path, Provider(), broken(), budgets=[budget(0.04)]) as front:
        assert (await front.ask(body, OPENAI)).status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_without_any_answer_costs_all_that_was_reserved(tmp_path: Path, stream: bool) -> None:
    """The provider may have made the whole answer."""
    provider = Provider()
    asked = asyncio.Event()

    async def never(talk: Conversation) -> None:
        asked.set()
        await talk.left()

    provider.answer = never
    async with fronted(tmp_path, provider, broken(), budgets=[budget(1)]) as front:
        caller = await front.connect()
        await caller.send({**TINY, "stream": stream})
        await asked.wait()
        reserved = (await spent(front))[1]
        assert reserved > 0
        caller.leave()
        await until(lambda: front.at_rest)
        assert await settled(front) == pytest.approx(reserved)


async def test_a_provider_that_cannot_be_connected_to_costs_nothing(tmp_path: Path) -> None:
    cloud = {"url": "http://127.0.0.1:9/v1"}
    async with fronted(tmp_path, Provider(), broken(), cloud=cloud, budgets=[budget(1)]) as front:
        assert (await front.ask({**WHOLE, "model": "emergency"})).status == 502
        assert await settled(front) == 0


# --- providers ------------------------------------------------------------------------------------


async def test_a_provider_that_repeats_the_key_does_not_show_it_to_clients(tmp_path: Path) -> None:
    async def in_stream(talk: Conversation) -> None:
        await talk.begin("text/event-stream")
        said = event({"error": {"message": f"bad {KEY}"}})
        await talk.chunk(chunk({"content": "a"}))
        await talk.chunk(said[:-12])
        await asyncio.sleep(0.05)
        await talk.chunk(said[-12:])
        await talk.end()

    async def in_text(talk: Conversation) -> None:
        await talk.whole(200, json.dumps(openai_answer(f"it is {KEY}!")).encode())

    provider = Provider()
    answers = [
        *(refuses(status, f"Bearer {KEY} is odd") for status in (400, 404, 429, 500)),
        in_stream,
        in_text,
    ]
    async with fronted(tmp_path, provider, broken()) as front:
        for answer in answers:
            provider.answer = answer
            for path in (CHAT, OPENAI):
                stream = answer is in_stream
                reply = await front.ask({**WHOLE, "stream": stream, "max_tokens": 5}, path)
                assert KEY.encode() not in reply.body, (answer, path)
        await until(lambda: front.at_rest)
        await front.daemon.backend.history.flush()
        shown = json.dumps(await get(front, "/api/runtime/compute/requests"))
        for one in (await get(front, "/api/runtime/compute/requests"))["requests"]:
            shown += json.dumps(await get(front, f"/api/runtime/compute/requests/{one['request_id']}"))
        shown += json.dumps([one.detail for one in front.daemon.backend.journal._recent])
        assert KEY not in shown


@pytest.mark.parametrize("path", [CHAT, OPENAI])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_in_a_coding_that_was_not_asked_for_is_none(
    tmp_path: Path, path: str, stream: bool
) -> None:
    packed = zlib.compress(json.dumps(openai_answer()).encode(), wbits=31)

    async def gzipped(talk: Conversation) -> None:
        await talk.whole(200, packed, "Content-Encoding: gzip\r\n")

    provider = Provider()
    provider.answer = gzipped
    async with fronted(tmp_path, provider, broken(), budgets=[budget(1)]) as front:
        reply = await front.ask({**WHOLE, "model": "emergency", "stream": stream}, path)
        assert reply.status == 502, reply.body
        assert b"gzip" in reply.body
        assert (await front.record()).outcome == "upstream_error"
        assert await settled(front) > 0, "the provider has worked"


async def test_an_endless_event_of_a_paid_stream_is_not_kept(tmp_path: Path) -> None:
    sent = 0

    async def floods(talk: Conversation) -> None:
        nonlocal sent
        await talk.begin("text/event-stream")
        await talk.chunk(b'data: {"usage": "')
        for _ in range(256):
            await talk.chunk(b"x" * 65536)
            sent += 65536
        talk.crash()

    provider = Provider()
    provider.answer = floods
    async with fronted(tmp_path, provider, broken()) as front:
        caller = await front.connect()
        await caller.send({**TINY, "stream": True}, OPENAI)
        reply = await caller.reply()
        assert sent > 2**21
        assert len(reply.body) > 2**20, "it passes, as all that is no event with tokens"
        caller.leave()


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {"prompt_tokens": -5, "completion_tokens": -7},
        {"prompt_tokens": 10**30, "completion_tokens": 10**30},
        {"prompt_tokens": 10**15, "completion_tokens": 2**53},
        {"prompt_tokens": "11", "completion_tokens": "3"},
        {"prompt_tokens": 11.5, "completion_tokens": 3.5},
        {"prompt_tokens": {"a": 1}, "completion_tokens": [3]},
        [],
        "many",
    ],
)
@pytest.mark.parametrize("path", [CHAT, OPENAI])
@pytest.mark.parametrize("stream", [False, True])
async def test_wrong_usage_costs_something_and_at_most_what_was_reserved(
    tmp_path: Path, usage: Any, path: str, stream: bool
) -> None:
    async def miscounts(talk: Conversation) -> None:
        if stream:
            await talk.begin("text/event-stream")
            for one in [*openai_events(usage=False)[:-1], chunk(None, usage=usage), event("[DONE]")]:
                await talk.chunk(one)
            await talk.end()
        else:
            await talk.whole(200, json.dumps({**openai_answer(), "usage": usage}).encode())

    provider = Provider()
    provider.answer = miscounts
    most = 0.0006
    async with fronted(tmp_path, provider, broken(), budgets=[budget(most)]) as front:
        reply = await front.ask({**WHOLE, "stream": stream}, path)
        assert reply.status == 200
        assert 0 < await settled(front) <= most
        record = await front.record()
        for count in (record.input_tokens, record.output_tokens):
            assert count is None or 0 <= count <= 10**9
        assert (await front.ask(TINY, "/api/version")).status != 500


@pytest.mark.parametrize("where", [b"head", b"body"])
async def test_headers_of_a_provider_do_not_reach_clients(tmp_path: Path, where: bytes) -> None:
    async def smuggles(talk: Conversation) -> None:
        body = json.dumps(openai_answer()).encode()
        evil = b"Set-Cookie: a=b\r\nX-Instance: other\r\nX-Cost-USD: 0\r\nX-Request-Id: mine\r\n"
        status = b"200 OK" if where == b"head" else b"400 Bad"
        await talk.send(
            b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 %b\r\n%b"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (status, evil, len(body), body)
        )

    provider = Provider()
    provider.answer = smuggles
    async with fronted(tmp_path, provider, broken()) as front:
        for path in (CHAT, OPENAI):
            reply = await front.ask(WHOLE, path)
            assert "set-cookie" not in reply.headers
            assert reply.headers["x-instance"] == "paid"
            assert reply.headers.get("x-request-id") != "mine"
            assert reply.headers.get("x-cost-usd") != "0"


async def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    other = Provider()
    provider = Provider()
    async with other.serving():
        provider.answer = refuses(307, "go", f"Location: {other.url}/v1/chat/completions\r\n")
        async with fronted(tmp_path, provider, broken(), budgets=[budget(1)]) as front:
            reply = await front.ask(WHOLE)
            assert reply.status == 502
            assert "location" not in reply.headers
            assert other.seen == []
            assert await settled(front) == 0


@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("path", [CHAT, "/api/generate", OPENAI, COMPLETIONS, "/v1/responses", ANTHROPIC])
async def test_a_stream_that_is_cut_never_ends_as_if_it_were_whole(
    tmp_path: Path, path: str, at: int
) -> None:
    async def is_cut(talk: Conversation) -> None:
        await talk.begin("text/event-stream")
        events = openai_events(usage=True)
        for one in events[:at]:
            await talk.chunk(one)
        await talk.end()

    provider = Provider()
    provider.answer = is_cut
    body: dict[str, Any] = {"model": "pays", "stream": True, "max_tokens": 5, "messages": SAYS}
    if path in ("/api/generate", COMPLETIONS):
        body["prompt"] = "hi"
        del body["messages"]
    if path == "/v1/responses":
        body = {"model": "pays", "stream": True, "input": "hi"}
    if path in (CHAT, "/api/generate"):
        del body["max_tokens"]
    async with fronted(tmp_path, provider, broken(), budgets=[budget(1)]) as front:
        reply = await front.ask(body, path)
        record = await front.record()
        assert record.outcome in ("upstream_error", "cut"), reply.body
        assert b"[DONE]" not in reply.body
        assert b"message_stop" not in reply.body
        assert b'"done":true' not in reply.body
        assert b"response.completed" not in reply.body
        assert await settled(front) > 0


async def test_an_idempotent_run_that_is_paid_is_not_repeated_after_a_crash(tmp_path: Path) -> None:
    provider = Provider()
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def waits(talk: Conversation) -> None:
        asked.set()
        await go_on.wait()
        await talk.whole(200, json.dumps(openai_answer()).encode())

    provider.answer = waits
    async with fronted(tmp_path, provider, broken(fails)) as front:
        run = {"path": CHAT, "body": WHOLE, "idempotent": True}
        reply = await front.ask(run, "/api/v1/runs", JSON)
        assert reply.status == 202, reply.body
        await asked.wait()
        stored = await front.daemon.backend.runs.find(reply.json()["id"])
        assert interrupted(stored, datetime.now(UTC)).status == "interrupted"
        go_on.set()
        assert (await ended(front, reply.json()["id"]))["status"] == "succeeded"
    assert len(provider.seen) == 1


async def test_a_run_reads_no_answer_in_a_coding_that_was_not_asked_for(tmp_path: Path) -> None:
    async def gzipped(talk: Conversation) -> None:
        await talk.whole(200, zlib.compress(b"{}", wbits=31), "Content-Encoding: gzip\r\n")

    provider = Provider()
    provider.answer = gzipped
    async with fronted(tmp_path, provider, broken(), budgets=[budget(1)]) as front:
        run = {"path": CHAT, "body": {**WHOLE, "model": "emergency"}}
        reply = await front.ask(run, "/api/v1/runs", JSON)
        shown = await ended(front, reply.json()["id"])
        assert (shown["status"], shown["error"]["code"]) == ("failed", "invalid_output")
        assert "gzip" in shown["error"]["message"]
        assert len(provider.seen) == 1
        assert await settled(front) > 0


async def test_a_slow_provider_is_not_asked_twice(tmp_path: Path) -> None:
    async def sleeps(talk: Conversation) -> None:
        await talk.left()

    provider = Provider()
    provider.answer = sleeps
    async with fronted(
        tmp_path, provider, broken(), budgets=[budget(1)], gateway={"first_byte_timeout_s": 1}
    ) as front:
        reply = await front.ask({**WHOLE, "model": "emergency"})
        assert reply.status == 504, reply.body
        assert len(provider.seen) == 1
        assert await settled(front) > 0
