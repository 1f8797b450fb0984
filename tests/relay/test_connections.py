"""Connections that nobody needs any more are closed, on both sides."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from typing import TYPE_CHECKING

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from manager.relay.deadlines import Deadlines
from manager.relay.exchange import Exchange
from tests.support.inside import until
from tests.support.relaying import Scripted, relaying

if TYPE_CHECKING:
    from pathlib import Path

TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
BODY = json.dumps({**TINY, "stream": False}).encode()
CHAT = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
EVENTS = b"GET /api/runtime/compute/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
UNFINISHED = b"\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
SHORT = Deadlines(head_s=0.3, body_s=0.3, tick_s=0.05)


async def test_what_a_burst_of_requests_has_opened_is_closed_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.relay.upstream.pool._MOST_IDLE_S", 0.3)
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        replies = await asyncio.gather(*(front.ask(TINY) for _ in range(20)))
        assert {reply.status for reply in replies} == {200}
        await until(lambda: front.relay.upstream_connections == 0)
        assert (await front.ask(TINY)).status == 200


async def test_pools_of_addresses_that_are_gone_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.relay.upstream.pool._MOST_IDLE_S", 0.1)
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        await front.ask(TINY)
        await until(lambda: front.relay.upstream_connections == 0)
        front.relay.pools.pool("http://127.0.0.1:9")
        assert list(front.relay.pools._pools) == ["http://127.0.0.1:9"]


# Control requests, inference requests, and what comes behind the answer to one of them.
WAITING = {
    "nothing": (b"", b""),
    "half a head": (b"", b"POST /api/chat HTTP/1.1\r\nHost: local"),
    "half a head behind a control answer": (HEALTH, b"G"),
    "half a head behind an inference answer": (CHAT, b"G"),
    "the body of a control request": (b"", b"POST /api/runtime/compute/pull HTTP/1.1" + UNFINISHED),
    "the body of a management request": (b"", b"POST /api/show HTTP/1.1" + UNFINISHED),
    "the rest of a management body": (CHAT, b"DELETE /api/delete HTTP/1.1" + UNFINISHED + b'{"mod'),
    "the body of a transcription": (HEALTH, b"POST /v1/audio/transcriptions HTTP/1.1" + UNFINISHED),
    "another request": (CHAT, b""),
    "another control request": (HEALTH, b""),
}


@pytest.mark.parametrize(("first", "then"), WAITING.values(), ids=WAITING.keys())
async def test_a_client_that_keeps_a_connection_waiting_loses_it(
    tmp_path: Path, first: bytes, then: bytes
) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}, deadlines=SHORT) as front:
        front.server.config.timeout_keep_alive = 0.2
        waiting = await front.connect()
        if first:
            await waiting.raw(first)
            assert (await waiting.reply()).status == 200
        await waiting.raw(then)
        await waiting.ended()
        await until(lambda: not front.server.server_state.connections)
        await until(lambda: not front.server.server_state.tasks)
        assert (await front.ask(TINY)).status == 200
        waiting.leave()


async def test_a_quiet_reader_of_events_keeps_its_connection(tmp_path: Path) -> None:
    async with (
        Scripted().serving() as server,
        relaying(tmp_path, {"a": server}, deadlines=SHORT, gateway={"idle_timeout_s": 0.2}) as front,
    ):
        front.server.config.timeout_keep_alive = 0.2
        reader, other = [await front.connect() for _ in range(2)]
        await reader.raw(EVENTS)
        assert (await reader.head())[0] == 200
        await other.raw(b"G")
        await other.ended()  # whoever keeps the daemon waiting for as long loses its connection
        await asyncio.sleep(0.5)
        assert len(front.server.server_state.connections) == 1
        reader.leave()
        other.leave()


@pytest.mark.parametrize("loaded", [b"", b"Connection: close\r\n"], ids=["kept", "to be closed"])
async def test_an_answer_of_a_management_route_that_is_not_read_does_not_keep_its_connection(
    tmp_path: Path, loaded: bytes
) -> None:
    models = tuple(f"model-{number}-{'x' * 200}" for number in range(5_000))
    ask = b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\n" + loaded + b"\r\n"
    async with (
        Scripted(models).serving() as server,
        relaying(tmp_path, {"a": server}, deadlines=SHORT, gateway={"idle_timeout_s": 0.5}) as front,
    ):
        caller = await front.connect()
        caller.reader._transport.pause_reading()  # type: ignore[attr-defined]
        caller.writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        (connection,) = await until(lambda: front.server.server_state.connections)
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await caller.raw(ask * 10)
        await until(lambda: connection.flow.write_paused)
        await until(lambda: not front.server.server_state.connections, within_s=10)
        assert not front.server.server_state.tasks
        caller.leave()


async def test_requests_of_all_kinds_in_a_pipe_come_into_being_one_at_a_time(tmp_path: Path) -> None:
    number = 300
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        unknown = CHAT.replace(b"tiny", b"nope")
        caller = await front.connect()
        earlier = live_requests()
        sending = asyncio.ensure_future(caller.raw((HEALTH + CHAT + unknown + unknown + HEALTH) * number))
        most = 0
        for count in range(number):
            statuses = [(await caller.reply()).status for _ in range(5)]
            assert statuses == [200, 200, 404, 404, 200]
            if count % 30 == 0:
                most = max(most, sum(one not in earlier for one in live_requests()))
        await sending
        assert most <= 3
        assert len(server.seen) == number
        caller.leave()


def live_requests() -> list[object]:
    """Requests of client connections that exist, whether they are answered yet or not."""
    return [found for found in gc.get_objects() if type(found) in (RequestResponseCycle, Exchange)]


async def test_a_reader_of_events_does_not_hold_up_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with Scripted().serving() as server, relaying(tmp_path, {"a": server}) as front:
        reader = await front.connect()
        await reader.raw(EVENTS)
        assert (await reader.head())[0] == 200
        front.server.config.timeout_graceful_shutdown = 30  # so long the server would wait for it
        front.server.stop()
        async with asyncio.timeout(5):
            await reader.ended()
        await until(lambda: not front.server.server_state.tasks, within_s=5)
        assert [
            record for record in caplog.records if record.name == "uvicorn.error" and record.exc_info
        ] == []
        reader.leave()
