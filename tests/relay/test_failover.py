"""Another attempt follows only before the caller has got a byte, in the order of the decision."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest

from manager.adapters.tls import SharedTls
from manager.relay.upstream import UpstreamConnection, UpstreamPools
from tests.support.inside import until
from tests.support.relaying import LAST, LINE, Conversation, Scripted, a_word, relaying
from tests.support.sockets import no_descriptors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from manager.relay.upstream import AnswerHead

JSON = {"Content-Type": "application/json"}
TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


async def dies(talk: Conversation) -> None:
    """The server has read the request, and ends without a byte."""
    talk.crash()


async def fails(talk: Conversation) -> None:
    await talk.whole(500, b'{"error":"model failed to load"}')


async def is_broken(talk: Conversation) -> None:
    await talk.whole(500, b'{"error":"something went wrong"}')


async def is_full(talk: Conversation) -> None:
    await talk.whole(503, b'{"error":"server busy, please try again"}')


async def lacks_the_model(talk: Conversation) -> None:
    await talk.whole(404, b'{"error":"model \'tiny\' not found"}')


async def babbles(talk: Conversation) -> None:
    await talk.send(b"this is no HTTP\r\n\r\n")


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (fails, "model_load_failed"),
        (is_broken, "upstream_error"),
        (is_full, "overloaded"),
        (lacks_the_model, "model_missing"),
    ],
)
async def test_what_fails_before_the_first_byte_is_tried_elsewhere_and_told(
    tmp_path: Path, first: object, reason: str
) -> None:
    async with (
        Scripted().serving() as one,
        Scripted().serving() as other,
        relaying(tmp_path, {"a": one, "b": other}) as front,
    ):
        one.answer = first  # type: ignore[assignment]
        reply = await front.ask(TINY)
        assert (reply.status, reply.body) == (200, LINE + LAST)
        assert reply.headers["x-instance"] == "b"
        assert reply.headers["x-fallback-reason"] == reason
        record = await front.record()
        assert (record.outcome, record.attempts, record.effective_target) == ("ok", 2, "b")
        assert (record.fallback, record.fallback_reason) == (True, reason)
        await until(lambda: front.at_rest)
        assert "fallback" in front.kinds()


@pytest.mark.parametrize("first", [dies, babbles])
async def test_a_request_that_a_server_may_have_begun_is_sent_to_no_other_when_that_server_dies(
    tmp_path: Path, first: object
) -> None:
    """The request may be what killed it, and would take the next server down as well."""
    async with (
        Scripted().serving() as one,
        Scripted().serving() as other,
        relaying(tmp_path, {"a": one, "b": other}) as front,
    ):
        for _ in range(2):  # on a new connection, and on one that was kept
            one.answer = a_word
            assert (await front.ask(TINY)).headers["x-instance"] == "a"
            one.answer = first  # type: ignore[assignment]
            reply = await front.ask(TINY)
            assert (reply.status, reply.headers["x-instance"]) == (502, "a")
            assert (await front.record()).attempts == 1
        assert len(one.seen) == 4
        assert other.seen == []
        await until(lambda: front.at_rest)


async def test_a_server_that_is_gone_is_left_for_another(tmp_path: Path) -> None:
    one = Scripted()
    async with Scripted().serving() as other:
        async with one.serving():
            gateway = relaying(
                tmp_path, {"a": one, "b": other}, config={"lifecycle": {"probe_interval_s": 30}}
            )
            front = await gateway.__aenter__()
        try:
            reply = await front.ask(TINY)
            assert reply.headers["x-instance"] == "b"
            assert reply.headers["x-fallback-reason"] == "upstream_unreachable"
        finally:
            await gateway.__aexit__(None, None, None)


async def test_a_failure_of_the_last_attempt_is_passed_on_as_the_server_told_it(tmp_path: Path) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = fails
        reply = await front.ask(TINY)
        assert (reply.status, reply.json()) == (500, {"error": "model failed to load"})
        assert (await front.record()).outcome == "upstream_error"


async def test_nothing_is_tried_again_after_the_first_byte(tmp_path: Path) -> None:
    async def breaks(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        talk.crash()

    async with (
        Scripted().serving() as one,
        Scripted().serving() as other,
        relaying(tmp_path, {"a": one, "b": other}) as front,
    ):
        one.answer = breaks
        reply = await front.ask(TINY)
        assert reply.whole
        lines = reply.lines()
        assert lines[0]["done"] is False
        assert "a: " in lines[-1]["error"]
        assert other.seen == []
        assert (await front.record()).outcome == "upstream_error"
        await until(lambda: front.at_rest)


async def test_a_document_that_breaks_off_is_not_passed_off_as_whole(tmp_path: Path) -> None:
    async def breaks(talk: Conversation) -> None:
        await talk.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        talk.crash()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = breaks
        reply = await front.ask({**TINY, "stream": False})
        assert not reply.whole
        assert (await front.record()).outcome == "upstream_error"


async def test_a_request_that_meets_a_closed_connection_is_sent_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server closes it at the last moment: the gateway's event loop gets no turn to see that."""

    async def answers(talk: Conversation) -> None:
        kept.append(talk)
        await a_word(talk)

    def closed_just_before(connection: UpstreamConnection, *args: Any, **options: Any) -> None:
        while kept:
            kept.pop().writer.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        send(connection, *args, **options)

    kept: list[Conversation] = []
    send = UpstreamConnection.send
    monkeypatch.setattr(UpstreamConnection, "send", closed_just_before)
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = answers
        assert (await front.ask(TINY)).status == 200
        reply = await front.ask(TINY)
        assert (reply.status, reply.headers.get("x-fallback-reason")) == (200, None)
        assert (await front.record(1)).attempts == 2
        assert len(server.seen) == 2


async def test_a_request_that_its_server_may_have_begun_is_not_sent_to_it_again(tmp_path: Path) -> None:
    async def dies_at_the_second(talk: Conversation) -> None:
        if len(server.seen) == 2:
            talk.crash()
        else:
            await a_word(talk)

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = dies_at_the_second
        assert (await front.ask(TINY)).status == 200
        assert (await front.ask(TINY)).status == 502
        assert len(server.seen) == 2


async def _filled(fill: Callable[[], None]) -> None:
    while True:
        fill()
        await asyncio.sleep(0)


async def test_a_lack_of_descriptors_is_told_and_blames_no_instance(tmp_path: Path) -> None:
    # No probe of the daemon's own comes in between: it would take a descriptor that was freed a moment ago.
    config = {"lifecycle": {"probe_interval_s": 60}}
    async with (
        Scripted().serving() as one,
        Scripted().serving() as other,
        relaying(tmp_path, {"a": one, "b": other}, config=config) as front,
    ):
        clients = front.daemon.fleet.instances()[0]._world.upstream._servers  # type: ignore[attr-defined]
        caller = await front.connect()
        await until(lambda: len(front.server.server_state.connections) == 1)
        with no_descriptors() as fill:
            filling = asyncio.ensure_future(_filled(fill))  # the daemon frees some meanwhile
            try:
                await caller.send(TINY)
                reply = await caller.reply()
            finally:
                filling.cancel()
            # Probes fail for the same reason, which says nothing of the instances either.
            for instance in front.daemon.fleet.instances():
                kept = [client for server in clients.values() for client in server._kept]
                for client in kept:
                    client.close()  # it would need no new descriptor
                for client in kept:
                    while client._transport is not None:  # noqa: ASYNC110  (it takes a turn or two)
                        await asyncio.sleep(0)
                await asyncio.sleep(0)
                fill()
                await instance.probe()
                assert instance.usable_endpoint() is not None
                assert instance.view().health == "healthy"
        caller.leave()
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert not one.seen
        assert not other.seen
        record = await front.record()
        assert (record.attempts, record.fallback, record.outcome) == (1, False, "refused")
        assert (await front.ask(TINY)).status == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 000 X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 99 X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbad name: x\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na: \x01\r\nContent-Length: 0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("path", ["/api/chat", "/api/show"])
async def test_what_is_no_proper_answer_is_not_passed_on(
    tmp_path: Path, raw: bytes, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def odd(talk: Conversation) -> None:
        await talk.send(raw)

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = odd
        reply = await front.ask({**TINY, "stream": False}, path)
        assert reply.status == 502
        assert "no proper HTTP" in reply.json()["error"]
    logged = capsys.readouterr()
    assert "request_failed" not in logged.out + logged.err, "it is no defect of the gateway"


async def test_a_stream_without_its_terminator_is_a_failure(tmp_path: Path) -> None:
    async def forgets(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        await talk.end()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = forgets
        reply = await front.ask(TINY)
        assert "before its end" in reply.lines()[-1]["error"]
        assert (await front.record()).outcome == "upstream_error"


async def test_an_error_that_the_server_tells_in_mid_stream_is_told_once(tmp_path: Path) -> None:
    async def fails_late(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        await talk.chunk(b'{"error":"out of memory"}\n')
        await talk.end()

    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        server.answer = fails_late
        reply = await front.ask(TINY)
        assert [line.get("error") for line in reply.lines()] == [None, "out of memory"]
        assert (await front.record()).outcome == "upstream_error"


async def test_the_first_byte_has_a_deadline_for_each_attempt(tmp_path: Path) -> None:
    async def silent(talk: Conversation) -> None:
        await talk.left()

    async with (
        Scripted(loaded=("tiny",)).serving() as one,
        Scripted().serving() as other,
        relaying(tmp_path, {"a": one, "b": other}, gateway={"first_byte_timeout_s": 0.5}) as front,
    ):
        one.answer = silent
        await until(lambda: front.daemon.fleet.get("a").models)
        reply = await front.ask(TINY)
        assert reply.headers["x-instance"] == "b"
        assert reply.headers["x-fallback-reason"] == "attempt_timeout"


async def test_a_stream_that_stalls_is_cut_with_an_error_line(tmp_path: Path) -> None:
    async def stalls(talk: Conversation) -> None:
        await talk.begin()
        await talk.chunk(LINE)
        await talk.left()

    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"idle_timeout_s": 0.5}) as front,
    ):
        server.answer = stalls
        reply = await front.ask(TINY)
        assert "nothing moved" in reply.lines()[-1]["error"]
        assert (await front.record()).outcome == "timeout"
        await until(lambda: front.at_rest)


async def test_all_attempts_together_have_one_deadline(tmp_path: Path) -> None:
    async def drips(talk: Conversation) -> None:
        await talk.begin()
        while not talk.writer.is_closing():
            await talk.chunk(LINE)
            await asyncio.sleep(0.05)

    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, gateway={"total_timeout_s": 1}) as front,
    ):
        server.answer = drips
        reply = await front.ask(TINY)
        assert "no end within 1 s" in reply.lines()[-1]["error"]
        assert (await front.record()).outcome == "timeout"


async def test_when_nothing_is_left_to_try_the_caller_is_told_why(tmp_path: Path) -> None:
    patient = {"breaker": {"failures": 100}}
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, config=patient) as front:
        server.answer = dies
        reply = await front.ask(TINY)
        assert reply.status == 502
        assert (
            reply.json()["error"].startswith("a: the connection broke") or "closed" in reply.json()["error"]
        )
        reply = await front.ask(TINY, "/v1/chat/completions")
        assert reply.json()["error"]["type"] == "api_error"
        reply = await front.ask(TINY, "/v1/messages")
        assert reply.json()["type"] == "error"
        assert {record.outcome for record in front.records} == {"upstream_error"}


async def test_what_follows_a_failed_attempt_obeys_the_settings_as_they_are_by_then(tmp_path: Path) -> None:
    reached = asyncio.Event()
    go_on = asyncio.Event()

    async def fails_later(talk: Conversation) -> None:
        reached.set()
        await go_on.wait()
        await fails(talk)

    async with (
        Scripted().serving() as one,
        Scripted().serving() as other,
        Scripted().serving() as third,
        relaying(
            tmp_path,
            {"a": one, "b": other, "c": third},
            devices={"a": "cpu", "b": "gpu", "c": "cpu"},
            config={"roles": {"thinking": {"model": "tiny"}}},
        ) as front,
    ):
        one.answer = fails_later
        asking = asyncio.ensure_future(front.ask({**TINY, "model": "thinking"}))
        await reached.wait()
        changed = await front.ask(
            {"roles": {"thinking": {"policy": "cpu_only"}}}, "/api/settings/models", JSON
        )
        assert changed.status == 200
        go_on.set()
        reply = await asking
        assert (reply.status, reply.headers["x-instance"]) == (200, "c")
        assert not other.seen


async def test_a_connection_whose_request_is_still_being_sent_is_not_used_again() -> None:
    async def answers_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")  # and nothing of the body
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        await ended.wait()
        writer.close()

    ended = asyncio.Event()
    server = await asyncio.start_server(answers_at_once, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    pool = UpstreamPools(SharedTls().context).pool(f"http://127.0.0.1:{port}")
    sink = Collected()
    (await pool.connect()).send(sink, b"POST / HTTP/1.1\r\nHost: x\r\n\r\n", (b"x" * 2**24,))
    await sink.complete.wait()
    assert pool.idle() is None
    # Nor is it waited for until the server takes the rest, which it may never do.
    await until(lambda: pool.is_empty)
    ended.set()
    server.close()


class Collected:
    """Takes an answer."""

    def __init__(self) -> None:
        self.complete = asyncio.Event()

    def head_came(self, head: AnswerHead) -> None:
        pass

    def answer_came(self, data: bytes, *, complete: bool) -> None:
        if complete:
            self.complete.set()

    def answer_broke(self, why: str, *, may_have_begun: bool) -> None:
        raise AssertionError(why)
