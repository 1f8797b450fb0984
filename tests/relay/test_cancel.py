"""A caller that leaves takes its request with it, and nothing that others wait for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.support.inside import until
from tests.support.relaying import LAST, LINE, Conversation, Scripted, relaying

if TYPE_CHECKING:
    from pathlib import Path

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


async def test_a_caller_that_leaves_before_the_head_cancels_the_server(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def silent(talk: Conversation) -> None:
        await talk.left()
        left.set()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = silent
        caller = await front.connect()
        await caller.send(TINY)
        await until(lambda: front.in_flight("a") == 1)
        await until(lambda: server.seen)
        caller.leave()
        async with asyncio.timeout(10):
            await left.wait()
        await until(lambda: front.at_rest)
        assert (await front.record()).outcome == "client_gone"


async def test_a_caller_that_leaves_in_a_stall_in_mid_stream_cancels_the_server(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def stalls(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        await talk.left()
        left.set()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = stalls
        caller = await front.connect()
        await caller.send(TINY)
        await caller.head()
        assert await caller.chunk() == LINE
        caller.leave()
        async with asyncio.timeout(10):
            await left.wait()
        await until(lambda: front.at_rest)
        record = await front.record()
        assert (record.outcome, record.status) == ("client_gone", 200)


async def test_a_caller_that_leaves_while_its_body_comes_leaves_nothing_behind(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        await caller.raw(caller.request(TINY)[:-5])
        await until(lambda: front.relay.exchanges)
        caller.leave()
        await until(lambda: front.at_rest)
        assert server.seen == []


async def test_a_caller_with_a_second_request_in_the_pipe_is_noticed_when_it_leaves(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def silent(talk: Conversation) -> None:
        await talk.left()
        left.set()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = silent
        caller = await front.connect()
        await caller.raw(caller.request(TINY) * 2 + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await until(lambda: server.seen)
        await caller.raw(caller.request(TINY))
        caller.leave()
        async with asyncio.timeout(10):
            await left.wait()
        await until(lambda: front.at_rest)
        assert len(server.seen) == 1


@pytest.mark.parametrize("first_leaves", [True, False])
async def test_a_load_goes_on_when_one_of_those_who_wait_for_it_leaves(
    tmp_path: Path, *, first_leaves: bool
) -> None:
    """A server may give up a load when the request that caused it is cancelled."""
    loaded = asyncio.Event()
    gone: list[int] = []

    async def loads(talk: Conversation) -> None:
        number = len(server.seen)
        waits = asyncio.ensure_future(talk.left())
        load = asyncio.ensure_future(loaded.wait())
        await asyncio.wait({waits, load}, return_when=asyncio.FIRST_COMPLETED)
        if waits.done():
            gone.append(number)
            load.cancel()
            return
        waits.cancel()
        await asyncio.wait({waits})
        await talk.begin()
        await talk.chunk(LAST)
        await talk.end()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = loads
        callers = []
        for number in range(2):
            callers.append(await front.connect())
            await callers[number].send(TINY)
            await until(lambda number=number: len(server.seen) == number + 1)  # type: ignore[misc]
        leaver, stayer = callers if first_leaves else reversed(callers)
        leaver.leave()
        await until(lambda: any(getattr(exchange, "is_left", False) for exchange in front.relay.exchanges))
        assert gone == []
        assert front.in_flight("a") == 2
        loaded.set()
        reply = await stayer.reply()
        assert reply.body == LAST
        await until(lambda: front.at_rest)
        assert sorted(record.outcome for record in front.records) == ["client_gone", "ok"]
        stayer.leave()


async def test_a_load_is_given_up_when_all_who_wait_for_it_have_left(tmp_path: Path) -> None:
    gone: list[str] = []

    async def loads(talk: Conversation) -> None:
        await talk.left()
        gone.append(talk.seen.target)

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = loads
        callers = [await front.connect() for _ in range(3)]
        for caller in callers:
            await caller.send(TINY)
        await until(lambda: len(server.seen) == 3)
        for caller in callers:
            caller.leave()
        await until(lambda: len(gone) == 3)
        await until(lambda: front.at_rest)
        assert [record.outcome for record in front.records] == ["client_gone"] * 3
