"""What a review has found: connections shared by several requests, answers that fail half-way, time."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import uvloop

from manager.adapters.tls import SharedTls
from manager.relay.upstream import UpstreamPools
from tests.support.inside import until
from tests.support.relaying import (
    LAST,
    LINE,
    Caller,
    Conversation,
    Front,
    Scripted,
    a_word,
    floods,
    relaying,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from manager.relay.front import Front as Connection

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
EVENTS = b"GET /api/runtime/compute/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
# Probes go over connections of their own, and are none of these tests' business.
QUIET = {"lifecycle": {"probe_interval_s": 20}}


def only_connection(front: Front) -> Connection:
    (connection,) = front.server.server_state.connections
    return connection  # type: ignore[no-any-return]


async def test_the_rest_of_a_body_in_the_pipe_arrives(tmp_path: Path) -> None:
    """It comes while the answer before it is under way, so that it has to be held meanwhile."""
    go = asyncio.Event()

    async def late(talk: Conversation) -> None:
        await go.wait()
        await a_word(talk)

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=QUIET) as front:
        server.answer = late
        caller = await front.connect()
        request = caller.request(TINY)
        await caller.raw(request + request[:-10])
        await until(lambda: server.seen)
        await caller.raw(request[-10:])
        await until(lambda: only_connection(front)._held)
        go.set()
        async with asyncio.timeout(10):
            assert [(await caller.reply()).status for _ in range(2)] == [200, 200]
        caller.leave()


async def test_a_request_behind_one_that_is_refused_at_once_is_not_taken_for_rest(tmp_path: Path) -> None:
    async def late(talk: Conversation) -> None:
        await asyncio.sleep(1.5)  # longer than a connection may rest
        await a_word(talk)

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=QUIET) as front:
        server.answer = late
        front.server.config.timeout_keep_alive = 1
        caller = await front.connect()
        await caller.raw(caller.request({"model": "nope"}) + caller.request(TINY))
        assert (await caller.reply()).status == 404
        assert (await caller.reply()).body == LINE + LAST
        caller.leave()


async def test_a_request_in_front_of_nonsense_is_answered(tmp_path: Path) -> None:
    async def late(talk: Conversation) -> None:
        await asyncio.sleep(0.1)
        await a_word(talk)

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=QUIET) as front:
        server.answer = late
        caller = await front.connect()
        await caller.raw(caller.request({**TINY, "stream": False}) + b"nonsense\r\n\r\n")
        reply = await caller.reply()
        assert (reply.status, reply.body) == (200, LAST.strip())
        reply = await caller.reply()
        assert (reply.status, reply.headers["connection"]) == (400, "close")
        assert await caller.ended() == b""
        caller.leave()
        assert [record.outcome for record in front.records] == ["ok"]


@pytest.mark.parametrize("size", [b"zz", b"2\r\n{}\r\n0\r\nX-A: " + b"b" * 300_000], ids=["size", "trailers"])
async def test_a_body_that_cannot_be_read_is_refused_in_the_words_of_the_caller(
    tmp_path: Path, size: bytes
) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=QUIET) as front:
        caller = await front.connect()
        with suppress(ConnectionError):  # it is refused before the last byte has been taken
            await caller.raw(b"POST /v1/messages " + CHUNKED + size + b"\r\n")
        reply = await caller.reply()
        assert (reply.status, reply.json()["type"]) == (400, "error")
        assert reply.headers["connection"] == "close"
        caller.leave()
        record = await front.record()
        assert (record.outcome, record.status) == ("client_error", 400)
        assert server.seen == []


async def test_nothing_piles_up_behind_a_stream_of_events(tmp_path: Path) -> None:
    async def fill(caller: Caller) -> None:
        while True:
            await caller.raw(caller.request({**TINY, "x": "y" * 100_000}))

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=QUIET) as front:
        caller = await front.connect()
        await caller.raw(EVENTS)
        await caller.head()
        filling = asyncio.ensure_future(fill(caller))
        connection = only_connection(front)
        await until(lambda: connection.flow.read_paused)
        await asyncio.sleep(0.3)  # as long as nothing moves, nothing can be awaited
        assert not connection.pipeline
        assert len(connection._held) < 2**20
        filling.cancel()
        caller.leave()


async def test_a_stream_of_events_ends_with_its_reader_whatever_is_in_the_pipe(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=QUIET) as front:
        caller = await front.connect()
        await caller.raw(EVENTS)
        await caller.head()
        await caller.send(TINY)
        await until(lambda: only_connection(front)._held)
        caller.leave()
        await until(lambda: not front.server.server_state.tasks, within_s=10)


async def test_answers_that_nobody_takes_do_not_pile_up(tmp_path: Path) -> None:
    answer = b'"' + b"x" * 100_000 + b'"'

    async def answers(talk: Conversation) -> None:
        await talk.whole(200, answer)

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=QUIET) as front:
        server.answer = answers
        caller = await front.connect()
        caller.reader._transport.pause_reading()  # type: ignore[attr-defined]
        request = caller.request({**TINY, "stream": False})
        await caller.raw(request * 200)
        connection = only_connection(front)
        await until(lambda: connection.flow.write_paused)
        await asyncio.sleep(0.5)  # as long as nothing moves, nothing can be awaited
        assert connection.transport.get_write_buffer_size() < 2**20
        assert len(server.seen) < 200
        caller.reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert all([(await caller.reply()).body == answer for _ in range(200)])
        caller.leave()


async def test_an_offer_of_another_protocol_takes_nothing_else_away(tmp_path: Path) -> None:
    offer = {"Connection": "Upgrade, X-Secret, close", "Upgrade": "h2c", "X-Secret": "s"}
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=QUIET) as front:
        caller = await front.connect()
        await caller.send(TINY, headers=offer)
        assert (await caller.reply()).headers["connection"] == "close"
        assert server.seen[0].header("X-Secret") is None
        caller.leave()
        caller = await front.connect()
        await caller.raw(caller.request(TINY, headers=offer).replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert "transfer-encoding" not in (await caller.head())[1]
        caller.leave()


@pytest.mark.parametrize("why", ["its version", "its refusal"])
async def test_only_those_get_a_go_ahead_who_understand_it_and_may_go_ahead(tmp_path: Path, why: str) -> None:
    refused = why == "its refusal"
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=QUIET) as front:
        caller = await front.connect()
        asked = {"Expect": "100-continue", **({"Origin": "http://evil.example"} if refused else {})}
        head, _, body = caller.request(TINY, headers=asked).partition(b"\r\n\r\n")
        await caller.raw((head if refused else head.replace(b"1.1", b"1.0", 1)) + b"\r\n\r\n")
        await until(lambda: front.records if refused else front.relay.exchanges)
        if not refused:
            await caller.raw(body)
        assert (await caller.head())[0] == (403 if refused else 200)
        caller.leave()


@pytest.mark.parametrize(
    "rest",
    [b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"Content-Length: 2\r\n\r\n{}nonsense\r\n\r\n"],
    ids=["half an answer", "more than one"],
)
async def test_what_a_failed_server_sends_on_does_not_touch_the_next_attempt(
    tmp_path: Path, rest: bytes
) -> None:
    left = asyncio.Event()

    async def fails(talk: Conversation) -> None:
        await talk.send(b"HTTP/1.1 500 X\r\n" + rest)

    async def silent(talk: Conversation) -> None:
        await talk.left()
        left.set()

    async with (
        Scripted().serving() as one,
        Scripted().serving() as other,
        relaying(tmp_path, {"a": one, "b": other}, config=QUIET) as front,
    ):
        # With a connection at hand the next attempt begins before the rest has been read.
        assert (await front.ask({**TINY, "model": "tiny@b"})).status == 200
        one.answer, other.answer = fails, silent
        caller = await front.connect()
        await caller.send(TINY)
        await until(lambda: len(other.seen) == 2)
        await asyncio.sleep(0.1)  # as long as nothing happens, nothing can be awaited
        assert front.in_flight("b") == 1
        caller.leave()
        async with asyncio.timeout(10):
            await left.wait()
        await until(lambda: front.at_rest)


async def test_patience_with_one_server_does_not_end_the_attempt_on_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = asyncio.Event()

    async def fails(talk: Conversation) -> None:
        await crash.wait()
        await talk.whole(500, b'{"error":"model failed to load"}')

    async def late(talk: Conversation) -> None:
        await asyncio.sleep(0.5)
        await a_word(talk)

    async def looks(instance: str) -> bool:
        crash.set()
        await asyncio.sleep(0.25)
        return instance == "b"

    async with (
        Scripted().serving() as one,
        Scripted().serving() as other,
        relaying(
            tmp_path, {"a": one, "b": other}, gateway={"first_byte_timeout_s": 0.3}, config=QUIET
        ) as front,
    ):
        one.answer, other.answer = fails, late
        monkeypatch.setattr(front.relay.routing.placement, "still_loads", looks)
        reply = await front.ask(TINY)
        assert (reply.status, reply.headers["x-instance"]) == (200, "b")
        assert [record.attempts for record in front.records] == [2]


@pytest.mark.parametrize("status", [204, 307])
async def test_an_answer_that_is_no_stream_needs_no_end_of_one(tmp_path: Path, status: int) -> None:
    async def answers(talk: Conversation) -> None:
        await talk.send(b"HTTP/1.1 %d X\r\nLocation: /x\r\n" % status)
        await talk.send(b"\r\n" if status == 204 else b"Content-Length: 0\r\n\r\n")

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=QUIET) as front:
        server.answer = answers
        caller = await front.connect()
        for _ in range(2):
            await caller.send(TINY)
            status_, headers = await caller.head()
            assert (status_, headers["location"]) == (status, "/x")
        caller.leave()


async def test_a_sign_of_life_is_not_the_first_word(tmp_path: Path) -> None:
    async def late(talk: Conversation) -> None:
        await asyncio.sleep(1)
        await talk.begin("text/event-stream")
        await talk.chunk(b"data: {}\n\ndata: [DONE]\n\n")
        await talk.end()

    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"keep_alive_s": 0.25}, config=QUIET) as front,
    ):
        server.answer = late
        reply = await front.ask({**TINY, "stream": True}, "/v1/chat/completions")
        assert reply.body.startswith(b": waiting")
        assert (front.records[0].ttfb_ms or 0) > 900


async def test_time_goes_on_for_all_when_one_cannot_be_looked_at(tmp_path: Path) -> None:
    class Broken:
        def check(self, _now: float) -> None:
            raise ZeroDivisionError

    async def silent(talk: Conversation) -> None:
        await talk.left()

    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"first_byte_timeout_s": 0.5}, config=QUIET) as front,
    ):
        server.answer = silent
        broken = Broken()
        front.relay.timers.add(broken)  # type: ignore[arg-type]
        async with asyncio.timeout(10):
            assert (await front.ask(TINY)).status == 504
        front.relay.timers.discard(broken)  # type: ignore[arg-type]


async def test_what_comes_while_the_others_end_is_cut_too(tmp_path: Path) -> None:
    async def stalls(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        await talk.left()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=QUIET) as front:
        server.answer = stalls
        caller = await front.connect()
        await caller.send(TINY)
        await caller.head()
        await front.relay.close()
        body = b""
        while piece := await caller.chunk():
            body += piece
        assert "stopped" in json.loads(body.splitlines()[-1])["error"]
        assert front.at_rest
        caller.leave()


async def test_a_caller_that_takes_nothing_does_not_keep_its_connection(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"idle_timeout_s": 0.5}, config=QUIET) as front,
    ):
        server.answer = floods
        caller = await front.connect()
        caller.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await caller.send(TINY)
        assert (await front.record()).outcome == "timeout"
        await until(lambda: not front.server.server_state.connections, within_s=10)
        caller.leave()


async def test_answers_that_nobody_takes_do_not_keep_the_connection(tmp_path: Path) -> None:
    async def answers(talk: Conversation) -> None:
        await talk.whole(200, b'"' + b"x" * 100_000 + b'"')

    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"idle_timeout_s": 0.5}, config=QUIET) as front,
    ):
        server.answer = answers
        caller = await front.connect()
        caller.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await caller.raw(caller.request({**TINY, "stream": False}) * 200)
        connection = only_connection(front)
        await until(lambda: connection.flow.write_paused)
        # Each of them is whole: no request is under way whose deadline would end it.
        await until(lambda: not front.server.server_state.connections, within_s=20)
        caller.leave()


async def test_the_role_that_is_told_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """Whatever role the answer comes from: the end of a fallback is told of the role that fell back."""
    roles = {"thinking": {"model": "big", "fallbacks": ["control"]}, "control": {"model": "tiny"}}
    broken = {"big"}

    async def answers(talk: Conversation) -> None:
        if talk.seen.json()["model"] in broken:
            await talk.whole(500, b'{"error":"model failed to load"}')
        else:
            await a_word(talk)

    def told(front: Front) -> list[str]:
        events = front.daemon.backend.journal._recent
        return [event.detail.partition(" ")[0] for event in events if event.kind.startswith("fallback")]

    async with (
        Scripted(models=("tiny", "big")).serving() as server,
        relaying(tmp_path, {"a": server}, config={**QUIET, "roles": roles}) as front,
    ):
        server.answer = answers
        assert (await front.ask({**TINY, "model": "thinking"})).headers["x-model"] == "tiny"
        assert (await front.ask({**TINY, "model": "control"})).status == 200
        assert told(front) == ["thinking"]
        broken.clear()
        for _ in range(3):
            assert (await front.ask({**TINY, "model": "thinking"})).headers["x-model"] == "big"
        assert told(front) == ["thinking", "thinking"]
        assert [record.role for record in front.records] == ["thinking", "control", *["thinking"] * 3]


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_connection_that_nobody_waits_for_any_more_is_forgotten(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """Whoever wants it is cancelled at each moment on the way to it."""

    async def at_each_moment() -> None:
        open_ = 0

        async def listens(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal open_
            open_ += 1
            with suppress(ConnectionError):
                await reader.read()
            open_ -= 1
            writer.close()

        server = await asyncio.start_server(listens, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        pool = UpstreamPools(SharedTls().context).pool(f"http://127.0.0.1:{port}")
        for moments in range(10):
            connecting = asyncio.ensure_future(pool.connect())
            for _ in range(moments):
                await asyncio.sleep(0)
            connecting.cancel()
            await asyncio.wait([connecting])
            if not connecting.cancelled():
                connecting.result().abandon()
            for _ in range(100):
                if pool.open_connections == open_ == 0:
                    break
                await asyncio.sleep(0.01)
            left.append(pool.open_connections + open_)
        server.close()

    left: list[int] = []
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(at_each_moment())
    assert left == [0] * 10
