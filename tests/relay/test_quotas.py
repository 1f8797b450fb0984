"""Quotas of keys over real sockets: refused at once in each dialect, and given back on every way out."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.inside import until
from tests.support.limited import Limited
from tests.support.relaying import LAST, LINE, Conversation, Scripted, relaying

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from tests.support.relaying import Caller, Front

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
CHAT, OPENAI, ANTHROPIC = "/api/chat", "/v1/chat/completions", "/v1/messages"
FULL = "the key 'ci' is at its concurrency of 2 (rate_limited)"
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ntiny\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
)
UPLOAD = {"Content-Type": "multipart/form-data; boundary=b"}


async def silent(talk: Conversation) -> None:
    await talk.left()


async def stalls(talk: Conversation) -> None:
    await talk.begin()
    await talk.chunk(LINE)
    await talk.left()


async def crashes(talk: Conversation) -> None:
    talk.crash()


async def breaks_off(talk: Conversation) -> None:
    await talk.begin()
    await talk.chunk(LINE)
    talk.crash()


async def refuses(talk: Conversation) -> None:
    await talk.whole(400, b'{"error":"no"}')


# --- requests in flight ---------------------------------------------------------------------------


async def test_a_request_too_many_is_refused_at_once_in_each_dialect(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = silent
        limited = Limited(front)
        ci = await limited.make("ci", concurrency=2)
        callers = [await front.connect() for _ in range(2)]
        for caller in callers:
            await caller.send(TINY, headers=ci)
        await until(lambda: len(server.seen) == 2)

        for path in (CHAT, OPENAI, ANTHROPIC):
            reply = await front.ask({**TINY, "max_tokens": 1, "stream": True}, path, ci)
            assert (reply.status, reply.headers["retry-after"]) == (429, "1")
            document = reply.json()
            if path == CHAT:
                assert document == {"error": FULL}
            elif path == OPENAI:
                assert document["error"]["message"] == FULL
                assert document["error"]["code"] == "rate_limit_exceeded"
                assert document["error"]["type"] == "rate_limit_error"
            else:
                assert document["error"] == {"type": "rate_limit_error", "message": FULL}
        reply = await front.ask(FORM, "/v1/audio/transcriptions", {**ci, **UPLOAD})
        assert (reply.status, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")

        # Another key has its own.
        server.answer = refuses
        other = await limited.make("other", concurrency=1)
        assert (await front.ask(TINY, headers=other)).status == 400
        assert len(server.seen) == 3
        assert [(one.outcome, one.key) for one in front.records][:4] == [("refused", "ci")] * 4
        for caller in callers:
            caller.leave()
        await until(lambda: limited.in_flight("ci") == 0)


async def test_transcriptions_and_runs_count_with_the_requests_of_a_key(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = silent
        limited = Limited(front)
        ci = await limited.make("ci", concurrency=2)
        upload = await front.connect()
        await upload.send(FORM, "/v1/audio/transcriptions", {**ci, **UPLOAD})
        await until(lambda: server.seen)
        submitted = {"path": CHAT, "body": TINY}
        reply = await front.ask(submitted, "/api/v1/runs", {**ci, "Content-Type": "application/json"})
        assert reply.status == 202, reply.body
        run = reply.json()["id"]
        await until(lambda: len(server.seen) == 2)
        assert limited.in_flight("ci") == 2
        assert (await front.ask(TINY, headers=ci)).json() == {"error": FULL}
        assert (await limited.call("DELETE", f"/api/v1/runs/{run}", ci)).status == 200
        assert limited.in_flight("ci") == 1
        upload.leave()
        await until(lambda: limited.in_flight("ci") == 0)


async def test_a_run_waits_while_its_key_has_too_many_requests(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = silent
        limited = Limited(front)
        ci = await limited.make("ci", concurrency=1)
        caller = await front.connect()
        await caller.send(TINY, headers=ci)
        await until(lambda: server.seen)
        submitted = {"path": CHAT, "body": {**TINY, "stream": False}}
        reply = await front.ask(submitted, "/api/v1/runs", {**ci, "Content-Type": "application/json"})
        path = f"/api/v1/runs/{reply.json()['id']}"

        async def shown() -> dict[str, Any]:
            body: dict[str, Any] = (await limited.call("GET", path, ci)).json()
            return body

        async with asyncio.timeout(20):
            while (await shown())["error"] is None:
                pass
        run = await shown()
        assert (run["status"], run["error"]["code"]) == ("queued", "rate_limited")

        async def answers(talk: Conversation) -> None:
            await talk.whole(200, LAST.strip())

        server.answer = answers
        caller.leave()
        async with asyncio.timeout(20):
            while (await shown())["status"] != "succeeded":
                pass
        assert limited.in_flight("ci") == 0


async def leaves(_limited: Limited, caller: Caller) -> None:
    caller.leave()


async def waits(_limited: Limited, caller: Caller) -> None:
    await caller.ended()


async def is_cancelled(limited: Limited, _caller: Caller) -> None:
    path = "/api/runtime/compute/requests"
    (one,) = (await limited.call("GET", path)).json()["requests"]
    assert (await limited.call("DELETE", f"{path}/{one['request_id']}")).status == 200


async def key_is_cut(limited: Limited, _caller: Caller) -> None:
    reply = await limited.call("DELETE", "/api/v1/keys/ci?cut=true")
    assert reply.json()["cut"] == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("answer", "ends"),
    [
        (silent, leaves),
        (stalls, leaves),
        (silent, is_cancelled),
        (stalls, is_cancelled),
        (stalls, key_is_cut),
        (crashes, None),
        (breaks_off, None),
        (refuses, None),
    ],
)
async def test_every_way_out_gives_the_place_back(
    tmp_path: Path,
    stream: bool,
    answer: Callable[[Conversation], Awaitable[None]],
    ends: Callable[[Limited, Caller], Awaitable[None]] | None,
) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = answer
        limited = Limited(front)
        ci = await limited.make("ci", concurrency=1)
        caller = await front.connect()
        await caller.send({**TINY, "stream": stream}, headers=ci)
        if ends is not None:
            await until(lambda: server.seen)
            assert limited.in_flight("ci") == 1
            await ends(limited, caller)
        await until(lambda: front.records)
        assert limited.in_flight("ci") == 0
        caller.leave()
        await until(lambda: front.at_rest)


@pytest.mark.parametrize("body", [b"{", b'{"model":"nope","messages":[]}', b'{"messages":[]}'])
async def test_a_request_that_fails_here_holds_nothing(tmp_path: Path, body: bytes) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        limited = Limited(front)
        ci = await limited.make("ci", concurrency=1)
        for _ in range(3):
            assert (await front.ask(body, headers=ci)).status in (400, 404)
        await until(lambda: front.at_rest)
        assert limited.in_flight("ci") == 0


# --- requests a minute, tokens a day --------------------------------------------------------------


async def test_a_key_may_begin_so_many_requests_a_minute(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = refuses
        limited = Limited(front)
        ci = await limited.make("ci", rpm=3)
        replies = await asyncio.gather(*(front.ask(TINY, headers=ci) for _ in range(10)))
        assert sorted(reply.status for reply in replies) == [400] * 3 + [429] * 7
        assert len(server.seen) == 3
        for reply in replies:
            if reply.status == 429:
                assert 50 <= int(reply.headers["retry-after"]) <= 61
                assert "is at its rpm of 3 (rate_limited)" in reply.json()["error"]


async def test_tokens_of_a_day_are_counted_and_survive_a_restart(tmp_path: Path) -> None:
    async def answers(talk: Conversation) -> None:
        await talk.whole(200, LAST.strip())

    spent = "the key 'ci' has used 92 tokens today (UTC); its tokens_per_day are 50 (rate_limited)"

    async def ask(front: Front, key: dict[str, str]) -> tuple[int, str]:
        reply = await front.ask({**TINY, "stream": False}, headers=key)
        return reply.status, json.loads(reply.body).get("error", "")

    async with Scripted().serving() as server:
        server.answer = answers
        async with relaying(tmp_path, {"a": server}) as front:
            ci = await Limited(front).make("ci", tokens_per_day=50)
            assert await ask(front, ci) == (200, "")  # 12 tokens in, 34 out
            assert await ask(front, ci) == (200, "")
            assert await ask(front, ci) == (429, spent)
        async with relaying(tmp_path, {"a": server}) as front:
            Limited(front)
            assert await ask(front, ci) == (429, spent)
        assert len(server.seen) == 2


async def test_the_monthly_limit_of_a_key_reaches_the_ledger(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        limited = Limited(front)
        await limited.make("ci", micro_usd_per_month=5_000_000)
        await limited.make("loose")
        assert front.daemon.backend.ledger._key_limits() == {"ci": 5_000_000}
