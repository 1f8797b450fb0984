"""What is bounded: bodies, buffers, waits; and what is not: the length of a stream that flows."""

from __future__ import annotations

import asyncio
import gc
import json
from pathlib import Path

import pytest

from tests.support.inside import until
from tests.support.relaying import LAST, LINE, Caller, Conversation, Front, Scripted, floods, relaying

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


async def test_a_body_over_the_limit_is_refused_before_it_has_all_come(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"max_body": "64k"}) as front,
    ):
        caller = await front.connect()
        head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n\r\n"
        await caller.raw(head + b" " * 70_000)
        status, headers = await caller.head()
        assert (status, headers["connection"]) == (413, "close")
        caller.leave()
        assert server.seen == []
        assert (await front.record()).outcome == "client_error"


@pytest.mark.parametrize("expects", ["", "Expect: 100-continue\r\n"], ids=["sent", "announced"])
async def test_a_body_whose_declared_length_is_over_the_limit_is_refused_at_once(
    tmp_path: Path, expects: str
) -> None:
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"max_body": "64k"}) as front,
    ):
        caller = await front.connect()
        lines = f"Host: localhost\r\n{expects}Content-Length: 65537\r\n\r\n"
        await caller.raw(f"POST /api/chat HTTP/1.1\r\n{lines}".encode())
        status, headers = await caller.head()
        assert (status, headers["connection"]) == (413, "close")
        caller.leave()
        assert (await front.record()).outcome == "client_error"


async def test_a_body_of_megabytes_arrives_as_it_was_sent(tmp_path: Path) -> None:
    image = "QUJD" * 500_000
    body = json.dumps({**TINY, "stream": False, "images": [image], "z": 2**70}).encode()
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        assert (await front.ask(body)).status == 200
        assert server.seen[0].body == body


async def test_a_slow_reader_slows_the_server_and_fills_no_memory(tmp_path: Path) -> None:
    sent = 0
    line = b'{"message":{"content":"' + b"x" * 60_000 + b'"},"done":false}\n'

    async def floods(talk: Conversation) -> None:
        nonlocal sent
        await talk.begin()
        for _ in range(800):
            await talk.chunk(line)
            sent += len(line)
        await talk.chunk(LAST)
        await talk.end()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = floods
        caller = await front.connect()
        caller.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await caller.send(TINY)
        await until(lambda: sent > 1_000_000)
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.3)  # as long as nothing moves, nothing can be awaited
        assert sent < 20_000_000
        caller.reader._transport.resume_reading()  # type: ignore[attr-defined]
        reply = await caller.reply()
        assert (reply.whole, len(reply.body)) == (True, 800 * len(line) + len(LAST))
        caller.leave()


async def test_a_reader_that_takes_nothing_does_not_hold_its_lease_for_ever(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"idle_timeout_s": 1}) as front,
    ):
        server.answer = floods
        caller = await front.connect()
        caller.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await caller.send(TINY)
        await until(lambda: front.in_flight("a") == 1)
        await until(lambda: front.at_rest, within_s=20)
        assert (await front.record()).outcome == "timeout"
        caller.leave()


async def test_a_stream_may_last_longer_than_any_wait_as_long_as_it_flows(tmp_path: Path) -> None:
    async def drips(talk: Conversation) -> None:
        await talk.begin()
        for _ in range(20):
            await talk.chunk(LINE)
            await asyncio.sleep(0.1)
        await talk.chunk(LAST)
        await talk.end()

    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"idle_timeout_s": 1, "first_byte_timeout_s": 1}) as front,
    ):
        server.answer = drips
        reply = await front.ask(TINY)
        assert len(reply.lines()) == 21


async def test_a_caller_of_events_that_waits_hears_that_somebody_is_there(tmp_path: Path) -> None:
    go = asyncio.Event()
    event = b'data: {"choices":[{"delta":{"content":"word"}}]}\n\ndata: [DONE]\n\n'

    async def late(talk: Conversation) -> None:
        await go.wait()
        await talk.begin("text/event-stream")
        await talk.chunk(event)
        await talk.end()

    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"keep_alive_s": 0.5}) as front,
    ):
        server.answer = late
        caller = await front.connect()
        await caller.send({**TINY, "stream": True}, "/v1/chat/completions")
        status, headers = await caller.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        assert headers["x-instance"] == "a"
        # An empty line would end an event, and with it the stream of some clients.
        assert await caller.chunk() == b": waiting for a\n"
        assert await caller.chunk() == b": waiting for a\n"
        go.set()
        body = b""
        while piece := await caller.chunk():
            body += piece
        assert body.replace(b": waiting for a\n", b"") == event
        caller.leave()


async def test_after_such_a_sign_of_life_an_error_is_an_event(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def fails_late(talk: Conversation) -> None:
        await go.wait()
        await talk.whole(500, b'{"error":{"message":"no memory left","type":"api_error"}}')

    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"keep_alive_s": 0.5}) as front,
    ):
        server.answer = fails_late
        caller = await front.connect()
        await caller.send({**TINY, "stream": True}, "/v1/chat/completions")
        await caller.head()
        await caller.chunk()
        go.set()
        body = b""
        while piece := await caller.chunk():
            body += piece
        assert json.loads(body.rpartition(b"data: ")[2])["error"]["message"] == "no memory left"
        assert (await front.record()).outcome == "upstream_error"
        caller.leave()


async def test_nobody_else_hears_anything_before_the_answer(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def late(talk: Conversation) -> None:
        await go.wait()
        await talk.whole(500, b'{"error":"no"}')

    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"keep_alive_s": 0.3}) as front,
    ):
        server.answer = late
        native = asyncio.ensure_future(front.ask(TINY))
        whole = asyncio.ensure_future(front.ask({**TINY, "stream": False}, "/v1/chat/completions"))
        await until(lambda: len(server.seen) == 2)
        await asyncio.sleep(0.8)  # longer than the pause between two signs of life
        go.set()
        assert {(await native).status, (await whole).status} == {500}


async def test_five_hundred_streams_of_which_a_fifth_leaves_leave_nothing_behind(tmp_path: Path) -> None:
    """U-4 and the leases: whatever callers do, everything comes back."""
    lines = 20

    async def drips(talk: Conversation) -> None:
        await talk.begin()
        for _ in range(lines):
            await talk.chunk(LINE)
            await asyncio.sleep(0.05)
        await talk.chunk(LAST)
        await talk.end()

    async def one(front: Front, number: int) -> bool:
        caller: Caller = await front.connect()
        await caller.send(TINY)
        if number % 5 == 0:
            if number % 10 == 0:
                await caller.head()
                await caller.chunk()
            caller.leave()
            return False
        reply = await caller.reply()
        caller.leave()
        return reply.whole and len(reply.lines()) == lines + 1

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    def sockets() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    # All of this is one process: a probe may well wait its turn for longer than usual.
    patient = {"lifecycle": {"probe_interval_s": 20}}
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=patient) as front:
        server.answer = drips
        await one(front, 1)
        left: list[int] = []
        for _ in range(3):
            found = await asyncio.gather(*(one(front, number) for number in range(500)))
            assert sum(found) == 400
            await until(lambda: front.at_rest)
            await until(lambda: not front.server.server_state.connections)
            assert len(front.records) == 501 - (len(left) > 0)
            assert {record.outcome for record in front.records} == {"ok", "client_gone"}
            front.records.clear()
            server.seen.clear()
            left.append(objects())
        assert left[2] - left[1] < 500, "less than one object a stream"
        assert not front.relay.loads._waiting
        # What is still open are connections kept for the next requests, each counted.
        await until(lambda: front.relay.upstream_connections <= 400)
        await until(lambda: len(front.server.server_state.connections) == 0)
        await until(lambda: sockets() < 2 * front.relay.upstream_connections + 60)


async def test_what_is_under_way_at_the_end_is_let_come_to_its_end(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def late(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        await go.wait()
        await talk.chunk(LAST)
        await talk.end()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = late
        caller = await front.connect()
        await caller.send(TINY)
        await caller.head()
        front.server.stop()
        await until(lambda: not front.server.servers[0].is_serving())
        go.set()
        body = b""
        while piece := await caller.chunk():
            body += piece
        assert body == LINE + LAST
        assert await caller.ended() == b""
        caller.leave()


async def test_what_does_not_end_in_time_is_cut_with_an_error_line(tmp_path: Path) -> None:
    async def stalls(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        await talk.left()

    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"drain_timeout_s": 0.3}) as front,
    ):
        server.answer = stalls
        caller = await front.connect()
        await caller.send(TINY)
        await caller.head()
        front.server.stop()
        body = b""
        while piece := await caller.chunk():
            body += piece
        assert "being stopped" in json.loads(body.splitlines()[-1])["error"]
        assert await caller.ended() == b""
        caller.leave()
        assert (await front.record()).outcome == "cut"


@pytest.mark.parametrize(
    "head",
    [
        "POST /api/chat HTTP/1.1\r\nContent-Length: 100",
        "POST /api/chat HTTP/1.1\r\nTransfer-Encoding: chunked",
        "POST /api/chat HTTP/1.1\r\nContent-Length: 100\r\nExpect: 100-continue",
        "POST /api/show HTTP/1.1\r\nContent-Length: 100",
        "POST /api/settings/models HTTP/1.1\r\nContent-Length: 100",
        "POST /api/blobs/sha256:00 HTTP/1.1\r\nContent-Length: 100",
    ],
)
async def test_a_body_that_never_comes_holds_up_the_end_no_longer_than_the_drain_may_last(
    tmp_path: Path, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"drain_timeout_s": 0.3}) as front,
    ):
        caller = await front.connect()
        await caller.raw(f"{head}\r\nHost: localhost\r\n\r\n".encode())
        await until(lambda: front.server.server_state.connections)
        await until(lambda: front.relay.exchanges or front.server.server_state.tasks)
        front.server.config.timeout_graceful_shutdown = 30
        front.server.stop()
        async with asyncio.timeout(5):
            status, _ = await caller.head()
            if status == 100:
                status, _ = await caller.head()
            assert b"being stopped" in await caller.ended()
        assert status == 503
        await until(lambda: not front.server.server_state.tasks, within_s=5)
        assert [record for record in caplog.records if record.exc_info] == []
        caller.leave()
