"""What a client does with its connection costs bounded memory and bounded time, whatever it does.

Real sockets and uvicorn's own cycles. Time is an argument: no deadline is waited for.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import socket
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from manager.relay.deadlines import Deadlines
from manager.relay.front import _TCP_ESTABLISHED, _tcp_info, listening_with
from manager.relay.relay import Limits
from manager.services.refusals import Refusals
from manager.services.requests import Requests
from manager.wire.access import Access
from manager.wire.caller import HeaderNames
from tests.support.inside import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from manager.relay.front import Front

OK = b"GET /ok HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = b"POST /body HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
EVENTS = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"
LARGE = b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n"
LARGE_BYTES = 32 * 2**20
MANY = 6_000
HEAD_S, BODY_S, UNREAD_S, IDLE_S, PROBE_S = 60.0, 60.0, 300.0, 5.0, 30.0


class App:
    """An ASGI application that does what the path says."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.running = 0
        self.most_running = 0
        self.disconnected = 0
        self.cycles: list[int] = []
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._answer(scope, receive, send)
        finally:
            self.running -= 1

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        match scope["path"]:
            case "/body":
                await whole(send, b"%d" % len(await body(receive, self)))
            case "/slow":  # takes the body only when it is told to
                await self.go.wait()
                await whole(send, b"%d" % len(await body(receive, self)))
            case "/early":  # answers without a look at the body
                await whole(send, b"early")
            case "/started":  # has begun to answer when it reads the body
                await start(send)
                await body(receive, self)
            case "/events":
                await start(send)
                await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
                while (await receive())["type"] != "http.disconnect":
                    pass
                self.disconnected += 1
            case "/large":
                await start(send)
                for _ in range(LARGE_BYTES // 2**16):
                    await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            case _:
                if len(self.scopes) % 500 == 0:
                    self.cycles.append(live_cycles(send.__self__.transport))
                await whole(send, b"ok")


async def start(send: Any, *headers: tuple[bytes, bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(headers)})


async def whole(send: Any, content: bytes) -> None:
    await start(send, (b"content-length", b"%d" % len(content)))
    await send({"type": "http.response.body", "body": content})


async def body(receive: Any, app: App) -> bytes:
    content: bytes = b""
    while True:
        message: dict[str, Any] = await receive()
        if message["type"] == "http.disconnect":
            app.disconnected += 1
            return content
        content += message["body"]
        if not message["more_body"]:
            return content


def live_cycles(transport: asyncio.Transport) -> int:
    """Return how many requests of a connection exist. Those of earlier tests may not have been freed yet."""
    return sum(
        type(found) is RequestResponseCycle and found.transport is transport for found in gc.get_objects()
    )


class Client:
    """A bare socket that reads only when a test says so."""

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        self._came = b""

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.peer, data)

    async def _more(self) -> bytes:
        async with asyncio.timeout(20):
            try:
                return await asyncio.get_running_loop().sock_recv(self.peer, 2**20)
            except ConnectionError:
                return b""

    async def _read_on(self) -> None:
        more = await self._more()
        assert more, f"closed behind {self._came!r}"
        self._came += more

    async def head(self) -> tuple[int, dict[bytes, bytes]]:
        while b"\r\n\r\n" not in self._came:
            await self._read_on()
        text, _, self._came = self._came.partition(b"\r\n\r\n")
        first, *lines = text.split(b"\r\n")
        pairs = (line.partition(b": ") for line in lines)
        return int(first.split(b" ")[1]), {name.lower(): value for name, _, value in pairs}

    async def reply(self) -> tuple[int, bytes]:
        status, headers = await self.head()
        length = int(headers[b"content-length"])
        while len(self._came) < length:
            await self._read_on()
        content, self._came = self._came[:length], self._came[length:]
        return status, content

    async def rest(self) -> bytes:
        """Return what comes until the connection ends."""
        while more := await self._more():
            self._came += more
        return self._came

    def leave(self) -> None:
        self.peer.close()


class Listening:
    def __init__(self, app: App, port: int, state: ServerState) -> None:
        self.app = app
        self.port = port
        self.state = state
        self.clients: list[Client] = []

    async def connect(self) -> Client:
        peer = socket.socket()
        peer.setblocking(False)
        await asyncio.get_running_loop().sock_connect(peer, ("127.0.0.1", self.port))
        self.clients.append(Client(peer))
        return self.clients[-1]

    async def meet(self) -> tuple[Client, Front]:
        """Return both ends of a new connection."""
        before = set(self.state.connections)
        client = await self.connect()
        (connection,) = await until(lambda: set(self.state.connections) - before)
        return client, connection  # type: ignore[return-value]

    async def closed(self) -> None:
        await until(lambda: not self.state.connections and not self.state.tasks, within_s=5)


@asynccontextmanager
async def listening() -> AsyncIterator[Listening]:
    loop = asyncio.get_running_loop()
    app, state = App(), ServerState()
    relay: Any = SimpleNamespace(
        limits=Limits(idle_timeout_s=UNREAD_S),
        access=Access(allowed_hosts=["localhost"]),
        requests=Requests(HeaderNames(), default_project="default"),
        refusals=Refusals(now=lambda: 0.0),
        loop=loop,
        latest_caller=None,
        latest_head=None,
        is_leaving=False,
    )
    never = 3600.0
    make = listening_with(relay, deadlines=Deadlines(HEAD_S, BODY_S, PROBE_S, tick_s=never))
    config = uvicorn.Config(
        app,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=int(IDLE_S),
    )
    config.load()
    server = await loop.create_server(
        lambda: make(config=config, server_state=state, app_state={}, _loop=loop), "127.0.0.1", 0
    )
    here = Listening(app, server.sockets[0].getsockname()[1], state)
    try:
        yield here
    finally:
        server.close()
        for client in here.clients:
            client.leave()
        app.go.set()
        for connection in tuple(state.connections):
            connection.transport.abort()
        await here.closed()


def narrow(client: Client, connection: Front, size: int = 4096) -> None:
    """Let the kernel take little of what the client does not read."""
    client.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    peer = connection.transport.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)


def late(connection: Front, limit_s: float, *, begun_at: float = 0.0) -> None:
    """Look at a connection just before a deadline, at which it is still open, and just behind it."""
    connection.check(begun_at)
    connection.check(begun_at + limit_s - 0.1)
    assert not connection.transport.is_closing()
    connection.check(begun_at + limit_s + 0.1)
    assert connection.transport.is_closing()


def for_days(connection: Front) -> None:
    for hours in range(100):
        connection.check(hours * 3600.0)
        assert not connection.transport.is_closing()


# --- memory ---


async def test_pipelined_requests_come_into_being_one_at_a_time() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        sending = asyncio.ensure_future(client.send(OK * MANY))
        for _ in range(MANY):
            assert await client.reply() == (200, b"ok")
            assert len(connection._held) <= 2**16 + 2**18
        await sending
        assert len(here.app.scopes) == MANY
        assert here.app.most_running == 1
        assert max(here.app.cycles) <= 2


async def test_nothing_comes_into_being_behind_an_answer_under_way() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(EVENTS)
        await client.head()
        sending = asyncio.ensure_future(client.send(OK * 30 * MANY))
        await until(lambda: connection.flow.read_paused)
        assert live_cycles(connection.transport) == 1
        assert len(connection._held) <= 2**16 + 2**18
        for_days(connection)
        sending.cancel()


async def test_an_application_that_asks_for_more_does_not_overfill_what_is_held() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(EVENTS)
        await client.head()
        sending = asyncio.ensure_future(client.send(OK * 30 * MANY))
        await until(lambda: connection.flow.read_paused)
        connection.flow.resume_reading()
        assert connection.flow.read_paused
        sending.cancel()


async def test_answers_of_a_client_that_does_not_read_do_not_pile_up() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(LARGE + OK * 1000)
        await until(lambda: connection.flow.write_paused)
        assert connection.transport.get_write_buffer_size() < 2**18
        assert len(here.app.scopes) == 1


async def test_answers_that_are_not_read_hold_up_the_next_request() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        narrow(client, connection)
        sending = asyncio.ensure_future(client.send(OK * 30 * MANY))
        await until(lambda: connection.flow.write_paused)
        asked = len(here.app.scopes)
        await asyncio.sleep(0)
        assert len(here.app.scopes) == asked < 30 * MANY
        while len(here.app.scopes) < asked + 100:
            assert await client.reply() == (200, b"ok")
        sending.cancel()


async def test_a_body_is_not_read_faster_than_the_application_takes_it() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        size = 20 * 2**20
        head = b"POST /slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % size
        sending = asyncio.ensure_future(client.send(head + b"x" * size + OK))
        await until(lambda: connection.flow.read_paused)
        assert len(connection.cycle.body) <= 2**16 + 2**18
        for_days(connection)  # it is not the client that takes its time
        here.app.go.set()
        assert await client.reply() == (200, b"%d" % size)
        assert await client.reply() == (200, b"ok")
        await sending


@pytest.mark.parametrize("how", ["close", "half-close", "reset"])
async def test_a_client_that_leaves_while_reading_is_paused_is_noticed(how: str) -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(EVENTS)
        await client.head()
        await client.send(OK * 4000)
        await until(lambda: connection.flow.read_paused)
        connection.check(0.0)
        assert not connection.transport.is_closing()
        if how == "reset":
            client.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if how == "half-close":
            client.peer.shutdown(socket.SHUT_WR)
        else:
            client.peer.close()
        await until(lambda: peer_has_left(connection))
        connection.check(1.0)
        await here.closed()
        assert here.app.disconnected == 1


def peer_has_left(connection: Front) -> bool:
    """Whether the kernel has heard of it: on a loopback that takes no time, but for its own threads."""
    return _tcp_info(connection.transport)[0] != _TCP_ESTABLISHED


# --- deadlines ---


BEFORE_A_HEAD = {
    "nothing": b"",
    "half a head": b"GET /ok HTTP/1.1\r\nHost: lo",
    "empty lines": b"\r\n\r\n\r\n",
    "all but the last byte": OK[:-1],
}


@pytest.mark.parametrize("sent", BEFORE_A_HEAD.values(), ids=BEFORE_A_HEAD.keys())
async def test_the_first_head_has_a_deadline(sent: bytes) -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(sent)
        await until(lambda: connection._head_bytes == len(sent))
        late(connection, HEAD_S)
        assert await client.rest() == b""


LATER = {name: sent for name, sent in BEFORE_A_HEAD.items() if sent} | {"a byte": b"G", "a line end": b"\n"}


@pytest.mark.parametrize("first", [OK, HEAD + b"Content-Length: 2\r\n\r\nhi", HEAD + CHUNKED + b"0\r\n\r\n"])
@pytest.mark.parametrize("sent", LATER.values(), ids=LATER.keys())
async def test_what_comes_behind_an_answer_has_a_deadline(first: bytes, sent: bytes) -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(first)
        await client.reply()
        connection.check(0.0)
        await client.send(sent)
        await until(lambda: connection._head_bytes == len(sent))
        late(connection, HEAD_S, begun_at=4.0)
        await client.rest()


async def test_a_head_that_drips_has_one_deadline_as_a_whole() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        for second in range(61):
            await client.send(b"GET /ok HTTP/1.1\r\nX-A: "[second : second + 1] or b"b")
            await until(lambda now=second: connection._head_bytes == now + 1)  # type: ignore[misc]
            connection.check(float(second))
        assert connection.transport.is_closing()


async def test_a_connection_rests_as_long_as_uvicorn_says() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(OK)
        await client.reply()
        late(connection, IDLE_S)
        assert await client.rest() == b""


async def test_each_request_begins_the_rest_anew() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        for number in range(30):
            await client.send(OK)
            await client.reply()
            connection.check(number * (IDLE_S - 0.1))
        late(connection, IDLE_S, begun_at=29 * (IDLE_S - 0.1))


UNFINISHED = {
    "none of it": HEAD + b"Content-Length: 9\r\n\r\n",
    "a part": HEAD + b"Content-Length: 9\r\n\r\nabc",
    "no chunk": HEAD + CHUNKED,
    "half a chunk": HEAD + CHUNKED + b"5\r\nab",
    "no last chunk": HEAD + CHUNKED + b"2\r\nab\r\n",
    "half of the trailers": HEAD + CHUNKED + b"2\r\nab\r\n0\r\nX-A: b\r\n",
    "after the go-ahead": HEAD + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n",
}


@pytest.mark.parametrize("sent", UNFINISHED.values(), ids=UNFINISHED.keys())
async def test_a_body_that_does_not_come_has_a_deadline(sent: bytes) -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(sent)
        await until(lambda: here.app.running)
        if b"Expect" in sent:
            assert (await client.head())[0] == 100
        late(connection, BODY_S)
        status, headers = await client.head()
        assert (status, headers[b"connection"]) == (408, b"close")
        await client.rest()
        await here.closed()
        assert here.app.disconnected == 1


async def test_a_body_that_drips_counts_as_none() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(HEAD + b"Content-Length: 1000000\r\n\r\n")
        await until(lambda: here.app.running)
        for second in range(0, 70, 10):
            await client.send(b"x")
            await until(lambda now=second: connection._body_bytes == now // 10 + 1)  # type: ignore[misc]
            connection.check(float(second))
        assert connection.transport.is_closing()


async def test_a_body_that_is_slow_is_taken() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(HEAD + b"Content-Length: 102400\r\n\r\n")
        await until(lambda: here.app.running)
        for number in range(1, 101):
            await client.send(b"x" * 1024)
            await until(lambda now=number: connection._body_bytes == now * 1024)  # type: ignore[misc]
            connection.check(number * (BODY_S - 1))
        assert await client.reply() == (200, b"102400")


async def test_half_an_answer_is_cut_when_the_body_does_not_come() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(b"POST /started HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        assert (await client.head())[0] == 200
        late(connection, BODY_S)
        assert await client.rest() == b""


async def test_the_rest_of_a_body_that_nobody_needs_has_a_deadline() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(b"POST /early HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert await client.reply() == (200, b"early")
        connection.check(0.0)
        for second in range(10, 60, 10):
            await client.send(b"x" * 2000)
            connection.check(float(second))
            assert not connection.transport.is_closing()
        connection.check(BODY_S + 0.1)
        assert connection.transport.is_closing()


async def test_the_rest_of_a_body_that_nobody_needs_is_not_taken_for_a_request() -> None:
    async with listening() as here:
        client, _ = await here.meet()
        rest = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
        await client.send(
            b"POST /early HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(rest)
        )
        assert await client.reply() == (200, b"early")
        await client.send(rest + OK)
        assert await client.reply() == (200, b"ok")
        assert [scope["path"] for scope in here.app.scopes] == ["/early", "/ok"]


async def test_an_answer_instead_of_a_go_ahead_ends_the_connection() -> None:
    """The client may send the body now, or leave it out: what comes next cannot be told."""
    async with listening() as here:
        client, _ = await here.meet()
        await client.send(
            b"POST /early HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"
        )
        assert await client.reply() == (200, b"early")
        assert await client.rest() == b""


CLOSING = {
    "kept": LARGE,
    "to be closed": LARGE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
    "of HTTP/1.0": LARGE.replace(b"1.1", b"1.0"),
    "with more behind it": LARGE + OK * 10_000,
}


@pytest.mark.parametrize("sent", CLOSING.values(), ids=CLOSING.keys())
async def test_an_answer_that_is_not_read_has_a_deadline(sent: bytes) -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(sent)
        await until(lambda: connection.flow.write_paused)
        late(connection, UNREAD_S)
        await here.closed()


@pytest.mark.parametrize("how", ["asks for the end", "half-closes", "asks for nothing more"])
async def test_a_last_answer_that_is_not_read_does_not_keep_the_socket(how: str) -> None:
    """All of it has been written, and nothing is under way any more: only the buffer is left."""
    async with listening() as here:
        client, connection = await here.meet()
        narrow(client, connection)
        close = b"Connection: close\r\n" if how == "asks for the end" else b""
        sending = asyncio.ensure_future(client.send(OK * 100 * MANY))
        await until(lambda: connection.flow.write_paused)
        sending.cancel()
        connection._held[:] = b"GET /ok HTTP/1.1\r\nHost: localhost\r\n" + close + b"\r\n"
        if how == "half-closes":
            client.peer.shutdown(socket.SHUT_WR)
        connection.flow.resume_writing()
        connection._parse_held()
        await until(lambda: not here.state.tasks)
        assert connection.transport.get_write_buffer_size()
        connection.check(0.0)
        connection.check(UNREAD_S - 0.1)
        assert here.state.connections
        connection.check(UNREAD_S + 0.1)
        await here.closed()


async def test_a_slow_reader_gets_its_answer() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        # A kernel that took all of the rest would let the connection rest while the client still reads.
        narrow(client, connection, 2**18)
        await client.send(LARGE)
        await until(lambda: connection.flow.write_paused)
        now, came = 0.0, 0
        while came < LARGE_BYTES:
            connection.check(now)
            assert not connection.transport.is_closing()
            part = 0
            while part < 2**22 and came + part < LARGE_BYTES:
                part += len(await client._more())
            came += part
            now += UNREAD_S - 1


async def test_a_quiet_stream_lives_on_and_its_peer_is_probed() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(EVENTS)
        await client.head()
        peer = connection.transport.get_extra_info("socket")
        connection.check(0.0)
        connection.check(PROBE_S - 0.1)
        assert not peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for_days(connection)
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        assert here.app.disconnected == 0


async def test_an_application_that_has_not_asked_for_the_body_yet_is_waited_for() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(
            b"POST /slow HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        )
        await until(lambda: here.app.running)
        for_days(connection)
        here.app.go.set()
        assert (await client.head())[0] == 100
        await client.send(b"hi")
        assert await client.reply() == (200, b"2")


# --- framing ---


async def test_trailers_are_no_headers() -> None:
    async with listening() as here:
        client, _ = await here.meet()
        trailers = b"X-API-Key: k\r\nHost: evil\r\nExpect: 100-continue\r\nAuthorization: Bearer k\r\n"
        await client.send(HEAD + CHUNKED + b"2\r\nab\r\n0\r\n" + trailers + b"\r\n" + OK)
        assert await client.reply() == (200, b"2")
        assert await client.reply() == (200, b"ok")
        assert here.app.scopes[0]["headers"] == [(b"host", b"localhost"), (b"transfer-encoding", b"chunked")]
        assert here.app.scopes[1]["headers"] == [(b"host", b"localhost")]


@pytest.mark.parametrize("lines", [1, 1000])
async def test_trailers_are_bounded(lines: int) -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(HEAD + CHUNKED + b"2\r\nab\r\n0\r\n")
        await until(lambda: connection._body_bytes == 2)
        line = b"X-A: " + b"b" * (70_000 // lines) + b"\r\n"
        with suppress(ConnectionError):
            await client.send(line * lines + b"\r\n")
        assert (await client.head())[0] == 400


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("size", [40_000, 70_000])
async def test_a_head_is_bounded_however_it_comes(size: int, pieces: int) -> None:
    async with listening() as here:
        client, _ = await here.meet()
        raw = b"GET /ok HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"b" * size + b"\r\n\r\n"
        step = -(-len(raw) // pieces)
        with suppress(ConnectionError):
            for at in range(0, len(raw), step):
                await client.send(raw[at : at + step])
                await asyncio.sleep(0)
        assert (await client.head())[0] == (200 if size == 40_000 else 400)


BROKEN = {
    "a method": b"nonsense\r\n\r\n",
    "a target": b"GET /\xff\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a tunnel": b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "an authority without a port": b"GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n",
    "a chunk": HEAD + CHUNKED + b"zz\r\n",
    "a length within an offer": HEAD
    + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("before", [b"", OK], ids=["first", "later"])
async def test_what_cannot_be_read_is_refused_and_ends_the_connection(before: bytes, raw: bytes) -> None:
    async with listening() as here:
        client, _ = await here.meet()
        await client.send(before + raw + OK)
        if before:
            assert await client.reply() == (200, b"ok")
        status, headers = await client.head()
        assert (status, headers[b"connection"]) == (400, b"close")
        assert b"HTTP/1.1" not in await client.rest()


async def test_half_an_answer_is_cut_when_the_body_cannot_be_read() -> None:
    async with listening() as here:
        client, _ = await here.meet()
        await client.send(b"POST /started HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED)
        assert (await client.head())[0] == 200
        await client.send(b"zz\r\n")
        assert await client.rest() == b""


async def test_a_body_that_nobody_needs_and_nobody_can_read_ends_the_connection() -> None:
    async with listening() as here:
        client, _ = await here.meet()
        await client.send(b"POST /early HTTP/1.1\r\nHost: localhost\r\n" + CHUNKED)
        assert await client.reply() == (200, b"early")
        await client.send(b"zz\r\n")
        assert await client.rest() == b""


async def test_an_offer_of_another_protocol_keeps_the_body_of_a_control_request() -> None:
    async with listening() as here:
        client, _ = await here.meet()
        offer = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
        await client.send((HEAD + offer + b"Content-Length: 2\r\n\r\nhi" + OK) * 2)
        for _ in range(2):
            assert await client.reply() == (200, b"2")
            assert await client.reply() == (200, b"ok")


async def test_a_client_may_ask_for_the_end_of_its_connection() -> None:
    async with listening() as here:
        client, _ = await here.meet()
        await client.send(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + OK)
        assert (await client.rest()).count(b"HTTP/1.1 200") == 1


REQUESTS = {
    b"ok": [OK, b"\r\n" + OK],
    b"2": [
        HEAD + b"Content-Length: 2\r\n\r\nhi",
        HEAD + CHUNKED + b"2\r\nhi\r\n0\r\n\r\n",
        HEAD + CHUNKED + b"1;x=y\r\nh\r\n1\r\ni\r\n000\r\nX-A: b\r\n\r\n",
    ],
    b"4": [HEAD + b"Content-Length: 4\r\n\r\n\r\n\r\n", HEAD + CHUNKED + b"4\r\n\r\n\r\n\r\n0\r\n\r\n"],
    b"8": [
        HEAD + b"Content-Length: 8\r\n\r\nab\r\n\r\ncd",
        HEAD + CHUNKED + b"8\r\nab\r\n\r\ncd\r\n0\r\nX-A:\r\n\r\n",
    ],
}
EACH = [(raw, content) for content, raws in REQUESTS.items() for raw in raws]


@pytest.mark.parametrize("missing", [1, 2, 3])
@pytest.mark.parametrize("first", [OK, HEAD + CHUNKED + b"2\r\nhi\r\n0\r\n\r\n"], ids=["head", "chunks"])
async def test_the_end_of_a_message_may_come_in_two_pieces(first: bytes, missing: int) -> None:
    async with listening() as here:
        client, connection = await here.meet()
        for _ in range(2):
            await client.send(first[:-missing])
            await until(lambda: connection._tail == first[-missing - 3 : -missing])
            await client.send(first[-missing:] + OK + OK)
            assert [(await client.reply())[0] for _ in range(3)] == [200] * 3


def test_any_mixture_in_any_pieces_is_answered_in_order_and_one_at_a_time() -> None:
    with asyncio.Runner() as runner:

        @given(
            mixture=st.lists(st.sampled_from(EACH), min_size=1, max_size=8),
            cuts=st.lists(st.integers(1, 600), max_size=12),
        )
        @settings(max_examples=150, deadline=None)
        def holds(mixture: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
            runner.run(answered(mixture, cuts))

        holds()


async def answered(mixture: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    async with listening() as here:
        client, _ = await here.meet()
        raw = b"".join(request for request, _ in mixture)
        edges = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
        for begin, end in itertools.pairwise(edges):
            await client.send(raw[begin:end])
            for _ in range(3):
                await asyncio.sleep(0)
        for _, content in mixture:
            assert await client.reply() == (200, content)
        assert here.app.most_running == 1


# --- the replacement of the daemon ---


class Heir:
    """Takes connections as the next daemon does, and answers on them itself."""

    def __init__(self, *, takes: bool = True) -> None:
        self._takes = takes
        self.peers: list[socket.socket] = []
        self.held: list[bytes] = []

    def take(self, peer: int, held: bytes) -> bool:
        if self._takes:
            self.peers.append(socket.socket(fileno=os.dup(peer)))
            self.held.append(held)
        return self._takes


@pytest.mark.parametrize("sent", [b"", OK], ids=["new", "idle"])
async def test_a_connection_between_two_requests_is_given_away_and_lives_on(sent: bytes) -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(sent)
        if sent:
            await client.reply()
        heir = Heir()
        assert not connection.leave(Heir(takes=False).take)
        await until(lambda: connection.leave(heir.take))
        await here.closed()
        (peer,) = heir.peers
        with peer:
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
            assert await client.reply() == (200, b"hi")
            await client.send(OK)
            assert peer.recv(1000) == OK


async def test_a_connection_stays_while_a_request_or_its_answer_is_under_way() -> None:
    async with listening() as here:
        heir = Heir()
        client, connection = await here.meet()
        await client.send(OK[:-2])  # a part of a head, which the parser has
        await until(lambda: connection._head_bytes)
        assert not connection.leave(heir.take)
        await client.send(OK[-2:])
        await client.reply()
        await client.send(HEAD.replace(b"/body", b"/slow") + b"Content-Length: 5\r\n\r\nhel")
        await until(lambda: here.app.running)
        assert not connection.leave(heir.take)
        await client.send(b"lo")
        await until(lambda: not connection._body_left)
        assert not connection.leave(heir.take)
        here.app.go.set()
        assert await client.reply() == (200, b"5")
        await until(lambda: connection.leave(heir.take))
        assert not connection.leave(heir.take)
        for peer in heir.peers:
            peer.close()


async def test_an_answer_that_is_not_read_keeps_its_connection() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        narrow(client, connection)
        await client.send(LARGE)
        await until(lambda: connection.flow.write_paused)
        assert not connection.leave(Heir().take)


async def test_the_next_request_goes_along() -> None:
    async with listening() as here:
        heir = Heir()
        client, connection = await here.meet()
        await client.send(HEAD.replace(b"/body", b"/slow") + b"Content-Length: 0\r\n\r\n" + OK + OK[:9])
        await until(lambda: connection._held)
        moved = []
        end = connection.on_response_complete

        def ended() -> None:
            # Just before the next request is parsed.
            connection.loop.call_soon(lambda: moved.append(connection.leave(heir.take)))
            end()

        connection.on_response_complete = ended  # type: ignore[method-assign]
        here.app.go.set()
        assert await client.reply() == (200, b"0")
        await until(lambda: any(moved))
        (peer,), (held,) = heir.peers, heir.held
        assert held in (
            OK + OK[:9],
            OK[:9],
        )  # an answer that is not written yet keeps it for one more request
        peer.close()


# --- the end of the daemon ---


@pytest.mark.parametrize(
    "sent", [b"", OK, OK + OK[:-5], OK[:-5]], ids=["new", "idle", "half", "half a first"]
)
async def test_a_connection_without_a_request_ends_at_once(sent: bytes) -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(sent)
        if sent.startswith(OK):
            await client.reply()
        connection.shutdown()
        assert await client.rest() == b""


async def test_a_request_under_way_gets_its_answer_and_no_other_follows() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(b"POST /slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nhi" + OK)
        await until(lambda: here.app.running)
        connection.shutdown()
        connection.shutdown()
        here.app.go.set()
        status, headers = await client.head()
        assert (status, headers[b"connection"]) == (200, b"close")
        assert await client.rest() == b"2"


async def test_a_request_whose_body_never_came_is_refused_after_the_others() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(b"POST /body HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\nh")
        await until(lambda: here.app.running)
        connection.shutdown()
        assert not connection.transport.is_closing()
        connection.shutdown()
        assert (await client.head())[0] == 503
        assert await client.rest() == b"the manager is being stopped"
        await until(lambda: not here.app.running)
        assert here.app.disconnected == 1


async def test_an_answer_that_is_not_read_does_not_hold_up_the_end() -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(LARGE)
        await until(lambda: connection.flow.write_paused)
        connection.shutdown()
        connection.shutdown()
        await here.closed()


async def test_a_stream_without_an_end_ends_after_the_others(caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as here:
        client, connection = await here.meet()
        await client.send(EVENTS)
        await client.head()
        connection.shutdown()
        await asyncio.sleep(0)
        assert here.app.disconnected == 0
        connection.shutdown()
        await client.rest()
        await here.closed()
        assert here.app.disconnected == 1
        assert not caplog.records
