"""Every message is framed strictly on both sides, whatever pieces it comes in; nothing that is ours leaks."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack, suppress
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.inside import until
from tests.support.relaying import CHAT, LAST, LINE, Conversation, Front, Scripted, a_word, relaying

if TYPE_CHECKING:
    from pathlib import Path

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
HEAD = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\n"
BODY = json.dumps(TINY).encode()
SIZED = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


SMUGGLED = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"

REFUSED = {
    "two lengths that differ": HEAD + SIZED + b"Content-Length: 3\r\n\r\n" + BODY,
    "two lengths alike": HEAD + SIZED + SIZED + b"\r\n" + BODY,
    "a list of lengths": HEAD + b"Content-Length: 3, 3\r\n\r\nabc",
    "a signed length": HEAD + b"Content-Length: +3\r\n\r\nabc",
    "a length without end": HEAD + b"Content-Length: 99999999999999999999999\r\n\r\nabc",
    "a length and chunks": HEAD + SIZED + CHUNKED + b"\r\n" + chunked(BODY),
    "chunks and a length": HEAD + CHUNKED + SIZED + b"\r\n" + chunked(BODY),
    "another coding": HEAD + b"Transfer-Encoding: identity\r\n\r\n" + BODY,
    "a coding around the chunks": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunked(BODY),
    "a coding that looks like chunks": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + chunked(BODY),
    "two codings": HEAD + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n" + chunked(BODY),
    "chunks twice": HEAD + CHUNKED + CHUNKED + b"\r\n" + chunked(BODY),
    "a space before the colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n" + chunked(BODY),
    "a folded line": HEAD + b"X-A: b\r\n c\r\n" + SIZED + b"\r\n" + BODY,
    "a bare line feed": HEAD.replace(b"\r\n", b"\n") + SIZED + b"\r\n" + BODY,
    "a bare carriage return": HEAD + b"X-A: b\rc\r\n" + SIZED + b"\r\n" + BODY,
    "a zero byte": HEAD + b"X-A: b\x00c\r\n" + SIZED + b"\r\n" + BODY,
    "a control character in a name": HEAD + b"X\x01: b\r\n" + SIZED + b"\r\n" + BODY,
    "a chunk size of letters": HEAD + CHUNKED + b"\r\nzz\r\nabc\r\n0\r\n\r\n",
    "a chunk size with a prefix": HEAD + CHUNKED + b"\r\n0x3\r\nabc\r\n0\r\n\r\n",
    "a chunk longer than it says": HEAD + CHUNKED + b"\r\n3\r\nabcX\r\n0\r\n\r\n",
    "a chunk size without end": HEAD + CHUNKED + b"\r\nfffffffffffffffff\r\nabc",
    "a chunk with a bare line feed": HEAD + CHUNKED + b"\r\n3\nabc\n0\n\n",
    "chunks in HTTP/1.0": HEAD.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + chunked(BODY),
    "two hosts": HEAD + b"Host: localhost\r\n" + SIZED + b"\r\n" + BODY,
    "no host": HEAD.replace(b"Host: localhost\r\n", b"") + SIZED + b"\r\n" + BODY,
    "a version that is not spoken": HEAD.replace(b"1.1", b"2.0") + SIZED + b"\r\n" + BODY,
    "a version before the first": HEAD.replace(b"1.1", b"0.9") + SIZED + b"\r\n" + BODY,
    "a head of 258 lines": HEAD + b"A: b\r\n" * 256 + SIZED + b"\r\n" + BODY,
    "a head of 258 lines and no end": HEAD + b"A: b\r\n" * 258,
    "a head without end": HEAD + b"X-A: " + b"b" * 100_000,
    "a head of many lines": HEAD
    + b"".join(b"X-%d: b\r\n" % n for n in range(20_000))
    + SIZED
    + b"\r\n"
    + BODY,
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED.keys())
async def test_a_request_that_two_could_read_differently_is_refused(tmp_path: Path, raw: bytes) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        with suppress(ConnectionError):  # it is refused before the last byte has been taken
            await caller.raw(raw)
        status, _ = await caller.head()
        assert status in (400, 403)
        caller.leave()
        await until(lambda: front.at_rest)
        assert server.seen == []


async def test_trailers_are_not_taken_for_headers(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        await caller.raw(
            HEAD + CHUNKED + b"\r\n%x\r\n%b\r\n0\r\nX-Instance: other\r\nX-A: b\r\n\r\n" % (len(BODY), BODY)
        )
        assert (await caller.reply()).status == 200
        assert server.seen[0].header("X-A") is None
        caller.leave()


async def test_what_follows_an_answer_is_not_taken_for_the_next(tmp_path: Path) -> None:
    async def says_more(talk: Conversation) -> None:
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
        await talk.send(answer + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = says_more
        first = await front.ask({**TINY, "stream": False})
        assert b"forged" not in first.body
        server.answer = a_word
        assert (await front.ask({**TINY, "stream": False})).body == LAST.strip()


TWICE = {
    "two lengths": b"Content-Length: 2\r\nContent-Length: 3\r\n",
    "a length and chunks": b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
    "a folded line": b"X-A: b\r\n c\r\nContent-Length: 2\r\n",
}


@pytest.mark.parametrize("lines", TWICE.values(), ids=TWICE.keys())
async def test_an_answer_that_two_could_read_differently_is_no_answer(tmp_path: Path, lines: bytes) -> None:
    async def says_both(talk: Conversation) -> None:
        await talk.send(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\n{}")

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = says_both
        reply = await front.ask({**TINY, "stream": False})
        assert reply.status == 502
        server.answer = a_word
        assert (await front.ask({**TINY, "stream": False})).status == 200


async def test_one_connection_carries_requests_of_both_kinds_one_after_the_other(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        for _ in range(3):
            await caller.send(TINY)
            assert (await caller.reply()).body == LINE + LAST
            await caller.raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await caller.reply()).status == 200
        caller.leave()


async def test_requests_in_a_pipe_are_answered_in_their_order(tmp_path: Path) -> None:
    health = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def slowly(talk: Conversation) -> None:
        await asyncio.sleep(0.02)
        await a_word(talk)

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = slowly
        caller = await front.connect()
        chat, plain = caller.request(TINY), caller.request({**TINY, "stream": False})
        unknown = caller.request({"model": "nope"})
        await caller.raw(chat + health + plain + unknown + unknown + health + health + chat)
        await caller.raw(chat + health)
        replies = [await caller.reply() for _ in range(10)]
        assert [reply.status for reply in replies] == [200, 200, 200, 404, 404, 200, 200, 200, 200, 200]
        for number in (0, 7, 8):
            assert replies[number].body == LINE + LAST
        assert replies[2].body == LAST.strip()
        caller.leave()


async def test_a_thousand_refused_requests_in_a_pipe_are_all_answered(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        sending = asyncio.ensure_future(caller.raw(caller.request({"model": "nope"}) * 1000))
        statuses = [(await caller.reply()).status for _ in range(1000)]
        await sending
        assert set(statuses) == {404}
        caller.leave()


async def test_each_of_many_requests_in_a_pipe_waits_for_its_turn_of_the_event_loop(tmp_path: Path) -> None:
    """Requests that are refused at once are answered within the call that parses them."""
    many, turns, is_over = 300, 0, False

    async def count() -> None:
        nonlocal turns
        while not is_over:
            turns += 1
            await asyncio.sleep(0)

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        await caller.raw(caller.request({"model": "nope"}))
        assert (await caller.reply()).status == 404
        await caller.raw(caller.request({"model": "nope"}) * many)
        counting = asyncio.ensure_future(count())
        assert {(await caller.reply()).status for _ in range(many)} == {404}
        is_over = True
        await counting
        assert turns >= many
        caller.leave()


async def test_nothing_is_done_of_what_follows_a_refusal_that_ends_the_connection(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        request = caller.request(TINY)
        await caller.raw(request.replace(b"127.0.0.1", b"evil.example") + request * 3)
        assert (await caller.reply()).status == 403
        assert await caller.ended() == b""
        await until(lambda: front.at_rest)
        assert server.seen == []
        assert [record.status for record in front.records] == [403]
        caller.leave()


async def test_a_body_of_megabytes_in_a_pipe_arrives_whole(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def late(talk: Conversation) -> None:
        await go.wait()
        await a_word(talk)

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = late
        caller = await front.connect()
        large = {**TINY, "x": "y" * 3_000_000}
        sending = asyncio.ensure_future(caller.raw(caller.request(TINY) + caller.request(large)))
        (connection,) = front.server.server_state.connections
        await until(lambda: connection.flow.read_paused)
        go.set()
        assert [(await caller.reply()).status for _ in range(2)] == [200, 200]
        assert server.seen[1].json() == large
        await sending
        caller.leave()


async def test_http_1_0_gets_a_body_that_ends_with_the_connection(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        await caller.raw(HEAD.replace(b"1.1", b"1.0") + SIZED + b"\r\n" + BODY)
        status, headers = await caller.head()
        assert (status, headers["connection"]) == (200, "close")
        assert "transfer-encoding" not in headers
        assert await caller.ended() == LINE + LAST
        caller.leave()


async def test_a_caller_that_waits_for_a_go_ahead_gets_it(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        await caller.raw(HEAD + SIZED + b"Expect: 100-continue\r\n\r\n")
        assert (await caller.head())[0] == 100
        await caller.raw(BODY)
        assert (await caller.reply()).status == 200
        assert server.seen[0].header("Expect") is None
        caller.leave()


async def test_an_offer_to_speak_http_2_is_ignored(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        caller = await front.connect()
        offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
        await caller.raw(HEAD + offer + SIZED + b"\r\n" + BODY)
        reply = await caller.reply()
        assert (reply.status, reply.body) == (200, LINE + LAST)
        assert {name.lower() for name, _ in server.seen[0].headers}.isdisjoint({"upgrade", "http2-settings"})
        await caller.send(TINY)
        assert (await caller.reply()).status == 200
        caller.leave()


async def test_what_is_between_caller_and_gateway_stays_there(tmp_path: Path) -> None:
    theirs = {
        "Connection": "keep-alive, X-Secret, content-length",
        "X-Secret": "s",
        "Authorization": "Bearer the-key-of-all",
        "X-API-Key": "the-key-of-all",
        "Cookie": "c=1",
        "X-Instance": "a",
        "X-Lane": "thinking",
        "X-Project-ID": "p",
        "X-Forwarded-For": "1.2.3.4",
        "Accept-Encoding": "gzip",
        "Origin": "http://localhost",
        "TE": "trailers",
        "traceparent": f"00-{'a' * 32}-{'b' * 16}-01",
        "X-Custom": "goes on",
    }

    async def answers(talk: Conversation) -> None:
        extra = (
            "Connection: X-Internal\r\nX-Internal: i\r\nX-Instance: forged\r\nKeep-Alive: 5\r\nX-Other: o\r\n"
            'Set-Cookie: c=1\r\nStrict-Transport-Security: max-age=9\r\nAlt-Svc: h3=":1"\r\n'
            "Access-Control-Allow-Credentials: true\r\nClear-Site-Data: *\r\n"
            "X-Provider: openai\r\nX-Cost-USD: 5\r\nX-Budget-Soft: global/month\r\n"
        )
        await talk.whole(200, LAST.strip(), extra)

    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, key="the-key-of-all") as front,
    ):
        server.answer = answers
        reply = await front.ask({**TINY, "stream": False}, headers=theirs)
        assert reply.status == 200
        seen = {name.lower(): value for name, value in server.seen[0].headers}
        assert set(seen) == {"host", "x-custom", "x-request-id", "traceparent", "content-length"}
        assert seen["host"] == f"127.0.0.1:{server.port}"
        version, trace, span, flags = seen["traceparent"].split("-")
        assert (version, trace, flags) == ("00", "a" * 32, "01")
        assert span != "b" * 16
        assert seen["x-request-id"] == reply.headers["x-request-id"]
        assert (reply.headers["x-instance"], reply.headers["x-provider"]) == ("a", "local")
        assert {"x-cost-usd", "x-budget-soft"}.isdisjoint(reply.headers)
        assert reply.headers["x-other"] == "o"
        for name in ("set-cookie", "strict-transport-security", "alt-svc", "clear-site-data"):
            assert name not in reply.headers
        assert "access-control-allow-credentials" not in reply.headers
        assert {"x-internal", "keep-alive"}.isdisjoint(reply.headers)
        record = await front.record()
        assert (record.project_id, record.trace_id, record.parent_span_id) == ("p", "a" * 32, "b" * 16)


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
async def test_a_key_is_asked_for_in_the_words_of_the_caller(tmp_path: Path, path: str) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, key="right") as front:
        reply = await front.ask(TINY, path, {"Authorization": "Bearer wrong"})
        assert reply.status == 401
        error = reply.json()["error"]
        assert "the key is wrong" in (error if isinstance(error, str) else error["message"])
        assert (await front.ask(TINY, path, {"X-API-Key": "right"})).status == 200
        reply = await front.ask(TINY, path, {"X-API-Key": "right", "Origin": "http://evil.example"})
        assert reply.status == 403
        assert len(server.seen) == 1


NATIVE = (
    '{"message":{"content":"grün \N{PILE OF POO} \\r\\n data: [DONE]"},"done":false}\r\n'.encode() * 3 + LAST
)
# With comments, empty lines of both kinds, and `data:` with and without a space behind it.
EVENTS = (
    ": a comment\r\n\r\n"
    'data: {"choices":[{"delta":{"content":"grün \N{PILE OF POO} \\n data: [DONE]"}}]}\n\n'
    'event: message\r\ndata:{"choices":[{"delta":{"content":"x"}}]}\r\n\r\n'
    'data: {"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":34}}\n\n'
    "data: [DONE]\n\n"
).encode()
STREAMS = {CHAT: NATIVE, "/v1/chat/completions": EVENTS}


@pytest.mark.parametrize("path", STREAMS)
def test_a_stream_arrives_whole_in_whatever_pieces_it_comes(tmp_path: Path, path: str) -> None:
    """The pieces are cut both as chunks and as writes, which need not be the same."""
    server = Scripted()
    stream = STREAMS[path]
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        runner.run(stack.enter_async_context(server.serving()))
        front = runner.run(stack.enter_async_context(relaying(tmp_path, {"a": server})))
        cuts = st.lists(st.integers(1, len(stream) - 1), max_size=12, unique=True)

        @given(cuts=cuts, data=st.data())
        @settings(max_examples=100, deadline=None)
        def holds(cuts: list[int], data: st.DataObject) -> None:
            wire = answer_of(path, cut(stream, cuts))
            edges = st.lists(st.integers(1, len(wire) - 1), max_size=12, unique=True)
            runner.run(arrives(front, server, path, cut(wire, data.draw(edges))))

        try:
            holds()
        finally:
            runner.run(stack.aclose())


def answer_of(path: str, pieces: list[bytes]) -> bytes:
    """The whole answer, with a chunk for each piece of its body."""
    kind = b"application/x-ndjson" if path == CHAT else b"text/event-stream"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % kind
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(at), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


async def arrives(front: Front, server: Scripted, path: str, pieces: list[bytes]) -> None:
    async def answers(talk: Conversation) -> None:
        for piece in pieces:
            await talk.send(piece)
            await asyncio.sleep(0)

    server.answer = answers
    before = len(front.records)
    reply = await front.ask({**TINY, "stream": True}, path)
    assert (reply.whole, reply.body) == (True, STREAMS[path])
    record = await front.record(before)
    assert (record.outcome, record.input_tokens, record.output_tokens) == ("ok", 12, 34)


@pytest.mark.parametrize("path", STREAMS)
async def test_a_stream_cut_at_every_byte_arrives_whole(tmp_path: Path, path: str) -> None:
    """Requests and answers alike, a byte a write."""
    stream = STREAMS[path]
    wire = answer_of(path, [stream[:90], stream[90:]])

    async def drips(talk: Conversation) -> None:
        for at in range(len(wire)):
            await talk.send(wire[at : at + 1])
            await asyncio.sleep(0)

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = drips
        caller = await front.connect()
        request = caller.request({**TINY, "stream": True}, path)
        for at in range(len(request)):
            await caller.raw(request[at : at + 1])
            await asyncio.sleep(0)
        reply = await caller.reply()
        assert (reply.whole, reply.body) == (True, stream)
        caller.leave()
