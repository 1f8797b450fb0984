"""What `/v1/models` says of a model while requests use it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tests.support.inside import until
from tests.support.relaying import LAST, LINE, Conversation, Front, Scripted, relaying
from tests.support.storing import ask

if TYPE_CHECKING:
    from pathlib import Path

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


async def told(front: Front) -> dict[str, Any]:
    reply = await ask(front, "GET", "/v1/models/tiny")
    assert reply.status == 200
    body: dict[str, Any] = reply.json()
    return body


async def test_a_model_is_loading_in_use_and_ready_in_turn(tmp_path: Path) -> None:
    loads, streams = asyncio.Event(), asyncio.Event()

    async def goes_slowly(talk: Conversation) -> None:
        await loads.wait()
        server.loaded = ("tiny",)
        await talk.begin()
        await talk.chunk(LINE)
        await streams.wait()
        await talk.chunk(LAST)
        await talk.end()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = goes_slowly
        before = await told(front)
        assert (before["status"], before["loaded"], before["latency_ms"]) == ("not_loaded", False, None)
        asking = asyncio.ensure_future(front.ask(TINY))
        await until(lambda: server.seen)
        assert (await told(front))["status"] == "loading"
        loads.set()
        await until(lambda: front.relay.exchanges and not front.relay.loads._waiting)
        assert (await told(front))["status"] == "in_use"
        streams.set()
        assert (await asking).status == 200
        after = await told(front)
        assert (after["status"], after["loaded"], after["offload"]) == ("ready", True, 0.0)
        assert after["latency_ms"] is None, "the load is no time to the first token"
        assert (await front.ask(TINY)).status == 200
        assert (await told(front))["latency_ms"] > 0


async def test_a_model_whose_server_fails_is_in_error_until_it_answers(tmp_path: Path) -> None:
    async def fails(talk: Conversation) -> None:
        await talk.whole(500, b'{"error":"model failed to load"}')

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        good, server.answer = server.answer, fails
        assert (await front.ask(TINY)).status == 500
        assert (await told(front))["status"] == "error"
        server.answer = good
        assert (await front.ask(TINY)).status == 200
        assert (await told(front))["status"] == "not_loaded"
