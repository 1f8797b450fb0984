"""Connections to servers: what comes back, what may be sent again, and what is kept for how long."""

from __future__ import annotations

import asyncio
import select
import socket
from typing import TYPE_CHECKING

import pytest

from manager.adapters.tls import SharedTls
from manager.errors import OutOfDescriptorsError, Reason
from manager.relay.upstream import UpstreamPools
from tests.support.inside import until
from tests.support.sockets import LOOPS, Collected, Killed, Listener, no_descriptors, on

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.relay.upstream import UpstreamConnection, UpstreamPool

    Loop = Callable[[], asyncio.AbstractEventLoop]

BIG = 2**24
OK = b"HTTP/1.1 200 OK\r\n"
EMPTY = OK + b"Content-Length: 0\r\n\r\n"
both_loops = pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])
kept_or_new = pytest.mark.parametrize("kept", [True, False], ids=["kept", "new"])


def pools() -> UpstreamPools:
    return UpstreamPools(SharedTls().context)


def request(size: int = 0) -> tuple[bytes, tuple[bytes]]:
    """A request with a body of so many bytes and `end`."""
    return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (size + 3), (b"x" * size + b"end",)


async def answered(connection: UpstreamConnection, peer: socket.socket, raw: bytes = EMPTY) -> Collected:
    """One request on the connection, with that answer."""
    sink = Collected()
    connection.send(sink, *request())
    while not peer.recv(65536).endswith(b"end"):
        pass
    peer.sendall(raw)
    await sink.ended.wait()
    return sink


async def connected(
    pool: UpstreamPool, listener: Listener, *, kept: bool
) -> tuple[UpstreamConnection, socket.socket]:
    """A connection, after one request if it is a kept one."""
    connection = await pool.connect()
    peer = listener.accept()
    if kept:
        await answered(connection, peer)
        assert pool.idle() is connection
    return connection, peer


# --- what may be sent again ---


@both_loops
@kept_or_new
@pytest.mark.parametrize("size", [0, BIG])
def test_a_server_that_closed_before_the_request_arrived_cannot_have_begun(
    loop: Loop, kept: bool, size: int
) -> None:
    async def work() -> None:
        with Listener() as listener:
            connection, peer = await connected(pools().pool(listener.url), listener, kept=kept)
            sink = Collected()
            peer.close()  # the event loop has had no turn to see it
            connection.send(sink, *request(size))
            await sink.ended.wait()
            assert sink.may_have_begun is False
            assert "closed the connection" in sink.why or "Broken pipe" in sink.why

    on(loop, work())


@both_loops
@kept_or_new
@pytest.mark.parametrize("size", [0, 2**20])
def test_a_server_that_dies_at_work_may_have_begun(loop: Loop, kept: bool, size: int) -> None:
    async def work() -> None:
        with Listener() as listener:
            killed = Killed(listener, answers=1 if kept else 0)
            connection = await pools().pool(listener.url).connect()
            if kept:
                first = Collected()
                connection.send(first, *request())
                await first.ended.wait()
            sink = Collected()
            connection.send(sink, *request(size))
            await killed.at_work()
            killed.kill()
            await sink.ended.wait()
            assert sink.may_have_begun is True
            assert sink.why == "the server closed the connection"

    on(loop, work())


@both_loops
@kept_or_new
def test_a_server_that_closes_with_the_request_unread_cannot_have_begun_on_a_kept_connection(
    loop: Loop, kept: bool
) -> None:
    async def work() -> None:
        with Listener() as listener:
            connection, peer = await connected(pools().pool(listener.url), listener, kept=kept)
            sink = Collected()
            connection.send(sink, *request())
            await asyncio.to_thread(select.select, [peer], [], [])
            peer.close()
            await sink.ended.wait()
            assert sink.may_have_begun is not kept
            assert "reset" in sink.why

    on(loop, work())


@both_loops
@kept_or_new
def test_a_server_that_closes_before_it_had_the_whole_request_cannot_have_begun(
    loop: Loop, kept: bool
) -> None:
    async def work() -> None:
        with Listener() as listener:
            connection, peer = await connected(pools().pool(listener.url), listener, kept=kept)
            sink = Collected()
            connection.send(sink, *request(BIG))
            await asyncio.to_thread(peer.recv, 1000)
            peer.close()
            await sink.ended.wait()
            assert sink.may_have_begun is False

    on(loop, work())


@both_loops
@pytest.mark.parametrize(
    "began", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", OK + b"Content-Length: 9\r\n\r\nab"]
)
def test_a_server_that_sent_a_byte_may_have_begun(loop: Loop, began: bytes) -> None:
    async def work() -> None:
        with Listener() as listener:
            connection, peer = await connected(pools().pool(listener.url), listener, kept=True)
            sink = Collected()
            connection.send(sink, *request())
            peer.sendall(began)
            peer.close()  # with the request unread
            await sink.ended.wait()
            assert sink.may_have_begun is True

    on(loop, work())


@both_loops
def test_a_connection_to_which_the_server_takes_nothing_more_is_not_waited_for(loop: Loop) -> None:
    """The server says no more, reads no more, and leaves its side open."""

    async def work() -> None:
        with Listener() as listener:
            pool = pools().pool(listener.url)
            connection, peer = await connected(pool, listener, kept=False)
            sink = Collected()
            connection.send(sink, *request(BIG))
            peer.shutdown(socket.SHUT_WR)
            await sink.ended.wait()
            assert sink.may_have_begun is False
            await until(lambda: pool.is_empty)

    on(loop, work())


@both_loops
@pytest.mark.parametrize("end", ["the server closes", "the request is abandoned"])
def test_waiting_until_the_server_takes_more_ends_with_the_request(loop: Loop, end: str) -> None:
    async def work() -> None:
        with Listener() as listener:
            connection, peer = await connected(pools().pool(listener.url), listener, kept=False)
            connection.send(Collected(), *request(BIG))
            draining = asyncio.ensure_future(connection.drain())
            await asyncio.sleep(0)
            assert not draining.done()
            if end == "the server closes":
                peer.close()
            else:
                connection.abandon()
            await draining
            await connection.drain()
            connection.write(b"more")  # belongs to no request, and goes nowhere

    on(loop, work())


# --- what comes back ---


@both_loops
@pytest.mark.parametrize(
    ("raw", "body", "length", "kept"),
    [
        (OK + b"Content-Length: 2\r\n\r\nhi", b"hi", 2, True),
        (OK + b"Content-Length: 2\r\n\r\nhi and more", b"hi", 2, False),
        (OK + b"Content-Length: 2\r\nConnection: close\r\n\r\nhi", b"hi", 2, False),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nT: x\r\n\r\n", b"hi", None, True),
        (b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + OK + b"Content-Length: 2\r\n\r\nhi", b"hi", 2, True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi", 2, False),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n", b"", None, True),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n", b"", 2, True),
        (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi", b"hi", 2, True),
    ],
)
def test_an_answer_ends_where_it_says_and_frees_its_connection(
    loop: Loop, raw: bytes, body: bytes, length: int | None, kept: bool
) -> None:
    async def work() -> None:
        with Listener() as listener:
            pool = pools().pool(listener.url)
            connection, peer = await connected(pool, listener, kept=False)
            sink = await answered(connection, peer, raw)
            assert (sink.body, sink.may_have_begun) == (body, None)
            assert sink.head is not None
            assert sink.head.length == length
            assert b"Link" not in b"".join(sink.head.lines)
            assert pool.idle() is (connection if kept else None)
            if not kept:
                await until(lambda: pool.is_empty)

    on(loop, work())


@both_loops
def test_a_body_without_framing_ends_with_its_connection(loop: Loop) -> None:
    async def work() -> None:
        with Listener() as listener:
            connection, peer = await connected(pools().pool(listener.url), listener, kept=False)
            sink = Collected()
            connection.send(sink, *request())
            peer.recv(65536)
            peer.sendall(OK + b"\r\nanything")
            peer.close()
            await sink.ended.wait()
            assert (sink.body, sink.why) == (b"anything", "")

    on(loop, work())


@both_loops
@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\nabc",
        b"HTTP/1.1 000 X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 99 X\r\nContent-Length: 0\r\n\r\n",
        OK + b": x\r\nContent-Length: 0\r\n\r\n",
        OK + b"a: \x01\r\nContent-Length: 0\r\n\r\n",
        OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        OK + b"Content-Length: 9\r\n\r\nshort",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n",
    ],
)
def test_what_is_no_whole_answer_is_broken_and_ends_its_connection(loop: Loop, raw: bytes) -> None:
    async def work() -> None:
        with Listener() as listener:
            pool = pools().pool(listener.url)
            connection, peer = await connected(pool, listener, kept=False)
            sink = Collected()
            connection.send(sink, *request())
            peer.recv(65536)
            peer.sendall(raw)
            peer.close()
            await sink.ended.wait()
            assert sink.may_have_begun is True
            await until(lambda: pool.is_empty)

    on(loop, work())


@both_loops
def test_trailers_without_an_end_are_cut_off(loop: Loop) -> None:
    async def work() -> None:
        with Listener() as listener:
            connection, peer = await connected(pools().pool(listener.url), listener, kept=False)
            sink = Collected()
            connection.send(sink, *request())

            def flood() -> int:
                peer.recv(65536)
                peer.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\nT: ")
                sent = 0
                try:
                    while sent < 2**28:
                        sent += peer.send(b"x" * 65536)
                except ConnectionError:
                    pass
                return sent

            flooding = asyncio.ensure_future(asyncio.to_thread(flood))
            await sink.ended.wait()
            assert "a head of more than" in sink.why
            assert await flooding < 2**25

    on(loop, work())


# --- what is kept ---


async def test_a_connection_that_has_been_idle_for_long_is_not_used_again() -> None:
    with Listener() as listener:
        pool = pools().pool(listener.url)
        connection, peer = await connected(pool, listener, kept=False)
        await answered(connection, peer)
        # The timer that closes it is late.
        connection.idle_since -= 2
        assert pool.idle() is None
        await until(lambda: pool.is_empty)


async def test_idle_connections_are_closed_when_their_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manager.relay.upstream.pool._MOST_IDLE_S", 0.05)
    with Listener() as listener:
        pool = pools().pool(listener.url)
        await connected(pool, listener, kept=False)
        connection, other = await connected(pool, listener, kept=False)
        await answered(connection, other)
        await until(lambda: pool.open_connections == 1)  # the one whose request is open stays


async def test_pools_are_bounded_and_the_oldest_one_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manager.relay.upstream.pool._MOST_POOLS", 2)
    with Listener() as listener:
        all_of_them = pools()
        first = all_of_them.pool(listener.url)
        idle, idle_peer = await connected(first, listener, kept=False)
        await answered(idle, idle_peer)
        busy, busy_peer = await connected(first, listener, kept=False)
        other, _ = await connected(all_of_them.pool(f"{listener.url}/2"), listener, kept=False)
        third = all_of_them.pool(f"{listener.url}/3")
        assert len(all_of_them._pools) == 2
        await until(lambda: first.open_connections == 1)
        await answered(busy, busy_peer)  # a request that was open is answered, then nothing is kept
        assert first.idle() is None
        await until(lambda: first.is_empty)
        assert third.is_empty
        other.abandon()


async def test_pools_without_connections_are_forgotten() -> None:
    all_of_them = pools()
    for number in range(10):
        all_of_them.pool(f"http://127.0.0.1:{number + 1}")
    assert list(all_of_them._pools) == ["http://127.0.0.1:10"]


# --- when descriptors run out ---


@both_loops
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_lack_of_descriptors_is_not_the_servers_fault(loop: Loop, name: str) -> None:
    async def work() -> None:
        with Listener() as listener:
            pool = pools().pool(f"http://{name}:{listener.port}")
            with no_descriptors(), pytest.raises(OutOfDescriptorsError) as caught:
                await pool.connect()
            assert (caught.value.reason, caught.value.retry_after_s) == (Reason.OVERLOADED, 1)
            (await pool.connect()).abandon()

    on(loop, work())


@both_loops
def test_idle_connections_make_way_when_descriptors_run_out(loop: Loop) -> None:
    async def work() -> None:
        with Listener() as listener, Listener() as other:
            all_of_them = pools()
            idle = all_of_them.pool(listener.url)
            pairs = [await connected(idle, listener, kept=False) for _ in range(12)]
            for connection, peer in pairs:
                await answered(connection, peer)
            with no_descriptors():
                connection = await all_of_them.pool(other.url).connect()
            assert connection.usable
            left = list(idle.idle_connections)
            assert left == [connection for connection, _ in pairs[-4:]], "the oldest go first"
            connection.abandon()
            all_of_them.close()

    on(loop, work())


async def test_a_server_that_refuses_is_still_unreachable() -> None:
    with Listener() as listener:
        pass
    with pytest.raises(ConnectionRefusedError):
        await pools().pool(listener.url).connect()
    with pytest.raises(socket.gaierror):
        await pools().pool("http://nobody.invalid:1").connect()
