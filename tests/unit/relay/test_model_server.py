"""Requests that pass through whole: framing, back-pressure in both directions, deadlines, and one end."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from manager.adapters.tls import SharedTls
from manager.errors import InvalidRequestError, OutOfDescriptorsError, Reason, UnavailableError
from manager.relay.model_server import PooledModelServer
from manager.relay.upstream import UpstreamPools
from manager.services.ports import Question
from tests.support.inside import until
from tests.support.sockets import LOOPS, Listener, no_descriptors, on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from manager.services.ports import ServerAnswer

    Loop = Callable[[], asyncio.AbstractEventLoop]
    Talk = Callable[["Server"], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\n"
# More than the system's buffers of a connection hold together.
MUCH = 2**25
HI = OK + b"Content-Length: 2\r\n\r\nhi"
both_loops = pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])


class Server:
    """The server's side of one connection, while `talk` goes on."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.head = b""

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def rest(self) -> bytes:
        """Everything until the client ends the connection, which it may do by a reset."""
        found = bytearray()
        with suppress(ConnectionError):
            while piece := await self.reader.read(65536):
                found += piece
        return bytes(found)

    async def chunked(self) -> bytes:
        body = bytearray()
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            body += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readuntil(b"\r\n")
        return bytes(body)


class Serving:
    def __init__(self, url: str, pools: UpstreamPools) -> None:
        self.url = url
        self.pools = pools
        self.seen: list[Server] = []

    def asks(
        self,
        body: bytes | AsyncIterator[bytes] = b"",
        *,
        length: int | None = None,
        method: str = "POST",
        patience_s: float = 20,
    ) -> Asking:
        server = PooledModelServer(self.pools, connect_timeout_s=5, patience_s=patience_s)
        question = Question("a", self.url, method, "/api/x?y=1", ((b"X-Own", b"1"),), body, length)
        return server.ask(question)


if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    Asking = AbstractAsyncContextManager[ServerAnswer]


@asynccontextmanager
async def serving(talk: Talk) -> AsyncIterator[Serving]:
    """A server that talks so, over bare streams; nothing of a request is left behind."""
    ended: list[asyncio.Task[None]] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        ended.append(task)
        server = Server(reader, writer)
        found.seen.append(server)
        try:
            server.head = await reader.readuntil(b"\r\n\r\n")
            await talk(server)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(connected, "127.0.0.1", 0, limit=2**20)
    port = listener.sockets[0].getsockname()[1]
    found = Serving(f"http://127.0.0.1:{port}", UpstreamPools(SharedTls().context))
    try:
        yield found
        await until(lambda: found.pools.open_connections == 0)
        await until(lambda: all(task.done() for task in ended))
    finally:
        listener.close()


async def whole(answer: ServerAnswer) -> bytes:
    found = bytearray()
    while piece := await answer.piece():
        found += piece
    return bytes(found)


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


# --- the request ---


@both_loops
@pytest.mark.parametrize("size", [0, 5, 256 * 1024, 3_000_001])
def test_a_body_of_bytes_has_its_length(loop: Loop, size: int) -> None:
    async def talk(server: Server) -> None:
        bodies.append(await server.reader.readexactly(size))
        await server.send(HI)
        assert await server.rest() == b""

    async def work() -> None:
        async with serving(talk) as found:
            async with found.asks(b"x" * size) as answer:
                assert (answer.status, answer.length, await whole(answer)) == (200, 2, b"hi")
            port = found.url.rpartition(":")[2]
            assert found.seen[0].head.decode() == (
                f"POST /api/x?y=1 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nX-Own: 1\r\n"
                f"Connection: close\r\nContent-Length: {size}\r\n\r\n"
            )

    bodies: list[bytes] = []
    on(loop, work())
    assert bodies == [b"x" * size]


@both_loops
def test_a_body_of_unknown_length_is_sent_in_chunks(loop: Loop) -> None:
    async def talk(server: Server) -> None:
        assert b"Transfer-Encoding: chunked\r\n" in server.head
        assert b"Content-Length" not in server.head
        bodies.append(await server.chunked())
        await server.send(HI)

    async def work() -> None:
        async with serving(talk) as found:
            parts = (b"one", b"", b"x" * 600_000, b"two")
            async with found.asks(pieces(*parts)) as answer:
                assert await whole(answer) == b"hi"
            assert bodies == [b"".join(parts)]

    bodies: list[bytes] = []
    on(loop, work())


@both_loops
def test_a_body_in_pieces_has_the_length_that_is_declared(loop: Loop) -> None:
    async def talk(server: Server) -> None:
        assert b"Content-Length: 6\r\n" in server.head
        assert await server.reader.readexactly(6) == b"onetwo"
        await server.send(HI)

    async def work() -> None:
        async with serving(talk) as found, found.asks(pieces(b"one", b"two"), length=6) as answer:
            assert await whole(answer) == b"hi"

    on(loop, work())


@pytest.mark.parametrize(("length", "arrives"), [(5, b"one"), (7, b"onetwo")])
async def test_a_body_of_another_length_than_declared_is_never_whole(length: int, arrives: bytes) -> None:
    async def talk(server: Server) -> None:
        rests.append(await server.rest())

    rests: list[bytes] = []
    async with serving(talk) as found:
        with pytest.raises(InvalidRequestError, match="request body"):
            async with found.asks(pieces(b"one", b"two"), length=length):
                pass
    assert arrives.startswith(rests[0])


@pytest.mark.parametrize(
    ("target", "header"),
    [
        ("/a b", (b"x", b"y")),
        ("/a\r\nX: y", (b"x", b"y")),
        ("/", (b"", b"y")),
        ("/", (b"x y", b"y")),
        ("/", (b"x:", b"y")),
        ("/", (b"x", b"y\r\nz: a")),
        ("/", (b"x", b"\x00")),
    ],
)
async def test_a_head_that_would_be_read_as_another_is_not_sent(
    target: str, header: tuple[bytes, bytes]
) -> None:
    async def talk(server: Server) -> None:
        raise AssertionError(server.head)

    async with serving(talk) as found:
        server = PooledModelServer(found.pools, connect_timeout_s=5, patience_s=5)
        with pytest.raises(InvalidRequestError):
            async with server.ask(Question("a", found.url, "POST", target, (header,))):
                pass
        assert not found.seen


@both_loops
def test_a_server_that_does_not_read_holds_up_the_source(loop: Loop) -> None:
    go = asyncio.Event()
    given = 0

    async def talk(server: Server) -> None:
        await go.wait()
        assert len(await server.chunked()) == MUCH
        await server.send(HI)

    async def source() -> AsyncIterator[bytes]:
        nonlocal given
        while given < MUCH:
            given += 2**18
            yield bytes(2**18)

    async def work() -> None:
        async with serving(talk) as found:
            asking = asyncio.ensure_future(ask(found))
            seen = -1
            while seen != given:  # until the source gets no turn any more
                seen = given
                for _ in range(200):
                    await asyncio.sleep(0)
            assert 0 < given < MUCH / 2
            go.set()
            assert await asking == b"hi"

    async def ask(found: Serving) -> bytes:
        async with found.asks(source()) as answer:
            return await whole(answer)

    on(loop, work())


# --- the answer ---


@both_loops
def test_an_answer_that_nobody_takes_holds_up_the_server(loop: Loop) -> None:
    sent = 0

    async def talk(server: Server) -> None:
        nonlocal sent
        await server.send(OK + b"\r\n")
        while sent < MUCH:
            sent += 2**18
            await server.send(bytes(2**18))

    async def work() -> None:
        async with serving(talk) as found, found.asks() as answer:
            seen = -1
            while seen != sent:
                seen = sent
                for _ in range(200):
                    await asyncio.sleep(0)
            assert 0 < sent < MUCH / 2
            assert len(first := await answer.piece()) <= 2**18
            assert len(first) + len(await whole(answer)) == MUCH

    on(loop, work())


@both_loops
@pytest.mark.parametrize("state", ["no head", "in the body"])
def test_leaving_ends_the_connection(loop: Loop, state: str) -> None:
    reached = asyncio.Event()

    async def talk(server: Server) -> None:
        if state == "in the body":
            await server.send(OK + b"Content-Length: 9\r\n\r\nab")
        reached.set()
        await server.rest()

    async def ask(found: Serving) -> None:
        async with found.asks(pieces_for_ever()) as answer:
            await whole(answer)

    async def pieces_for_ever() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    async def work() -> None:
        async with serving(talk) as found:
            asking = asyncio.ensure_future(ask(found))
            await reached.wait()
            asking.cancel()
            await asyncio.wait([asking])
            assert asking.cancelled()

    on(loop, work())


@both_loops
@pytest.mark.parametrize("keep", [b"", b"Connection: keep-alive\r\n"])
def test_a_connection_is_used_once_whatever_the_server_says(loop: Loop, keep: bytes) -> None:
    async def talk(server: Server) -> None:
        await server.send(OK + keep + b"Content-Length: 2\r\n\r\nhi")
        await server.rest()

    async def work() -> None:
        async with serving(talk) as found:
            for number in (1, 2):
                async with found.asks(b"x") as answer:
                    assert await whole(answer) == b"hi"
                    assert found.pools.pool(found.url).idle() is None
                assert len(found.seen) == number

    on(loop, work())


@both_loops
@pytest.mark.parametrize("closes", [True, False])
def test_a_server_may_answer_before_it_has_the_whole_request(loop: Loop, closes: bool) -> None:
    async def talk(server: Server) -> None:
        await server.reader.readexactly(1000)
        await server.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        if not closes:
            await left.wait()

    async def work() -> None:
        async with serving(talk) as found:
            async with found.asks(bytes(2**25)) as answer:
                assert (answer.status, await whole(answer)) == (413, b"no")
            left.set()

    left = asyncio.Event()
    on(loop, work())


async def test_the_source_is_not_read_on_for_a_server_that_has_answered() -> None:
    given = 0
    go = asyncio.Event()

    async def talk(server: Server) -> None:
        await server.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await server.rest()

    given = 0

    async def source() -> AsyncIterator[bytes]:
        nonlocal given
        while True:
            given += 1
            yield b"x"
            await go.wait()

    async with serving(talk) as found, found.asks(source()) as answer:
        assert await whole(answer) == b"no"
        go.set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert given == 2


@both_loops
def test_a_server_may_answer_while_it_reads(loop: Loop) -> None:
    async def talk(server: Server) -> None:
        await server.send(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        while piece := await server.reader.readuntil(b"\r\n"):
            if piece == b"0\r\n":
                break
            data = await server.reader.readexactly(int(piece, 16) + 2)
            await server.send(piece + data)
        await server.send(b"0\r\n\r\n")

    async def source() -> AsyncIterator[bytes]:
        while (piece := await echoed.get()) is not None:
            yield piece

    async def work() -> None:
        echoed.put_nowait(b"1")
        async with serving(talk) as found, found.asks(source()) as answer:
            assert await answer.piece() == b"1"
            echoed.put_nowait(b"2")
            assert await answer.piece() == b"2"
            echoed.put_nowait(None)
            assert await answer.piece() == b""
            assert await answer.piece() == b""

    echoed: asyncio.Queue[bytes | None] = asyncio.Queue()
    on(loop, work())


class SourceError(Exception):
    pass


@both_loops
@pytest.mark.parametrize("head", [b"", OK + b"Content-Length: 9\r\n\r\n"], ids=["before", "after"])
def test_a_failing_source_ends_the_request_with_its_error(loop: Loop, head: bytes) -> None:
    async def talk(server: Server) -> None:
        if head:
            await server.send(head)
        rest = await server.rest()
        assert not rest.endswith(b"0\r\n\r\n"), "the body must not look whole"
        gone.set()

    async def source() -> AsyncIterator[bytes]:
        yield b"x"
        await go.wait()
        raise SourceError

    async def ask(found: Serving) -> None:
        async with found.asks(source()) as answer:
            go.set()
            await gone.wait()  # at once, not when the client of the answer looks
            await whole(answer)

    async def work() -> None:
        async with serving(talk) as found:
            if not head:
                go.set()
            with pytest.raises(SourceError):
                await ask(found)

    go, gone = asyncio.Event(), asyncio.Event()
    on(loop, work())


@both_loops
@pytest.mark.parametrize(
    ("raw", "method", "length", "body"),
    [
        (OK + b"Content-Length: 5\r\n\r\n", "HEAD", 5, b""),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", "HEAD", None, b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "DELETE", None, b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", "GET", 7, b""),
        (b"HTTP/1.0 200 OK\r\n\r\nanything", "GET", None, b"anything"),
        (b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + HI, "POST", 2, b"hi"),
        (OK + b"Content-Length: 2\r\n\r\nhi and more", "POST", 2, b"hi"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nT: x\r\n\r\n", "POST", None, b"hi"),
    ],
)
def test_an_answer_ends_where_it_says(
    loop: Loop, raw: bytes, method: str, length: int | None, body: bytes
) -> None:
    async def talk(server: Server) -> None:
        await server.send(raw)

    async def work() -> None:
        async with serving(talk) as found, found.asks(method=method) as answer:
            assert (answer.length, await whole(answer)) == (length, body)
            assert {name.lower() for name, _ in answer.headers} <= {b"content-type"}
            framed = b"Content-Length: 0\r\n" in found.seen[0].head
            assert framed is (method in ("POST", "DELETE"))

    on(loop, work())


async def test_the_headers_of_an_answer_are_passed_on_without_those_of_the_connection() -> None:
    async def talk(server: Server) -> None:
        await server.send(
            OK + b"Content-Type:  a/b\r\nX-Two: 1\r\nX-Two: 2: 3\r\nX-Hop: 4\r\n"
            b"Connection: X-Hop, close\r\nContent-Length: 0\r\n\r\n"
        )

    async with serving(talk) as found, found.asks() as answer:
        assert answer.headers == [(b"Content-Type", b"a/b"), (b"X-Two", b"1"), (b"X-Two", b"2: 3")]


@both_loops
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 000 X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 99 X\r\nContent-Length: 0\r\n\r\n",
        OK + b"bad name: x\r\nContent-Length: 0\r\n\r\n",
        OK + b"a: \x01\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 102 Processing\r\n\r\n" * 20 + HI,
    ],
)
def test_no_proper_answer_is_unreachable_and_asked_for_once(loop: Loop, raw: bytes) -> None:
    async def talk(server: Server) -> None:
        await server.send(raw)

    async def work() -> None:
        async with serving(talk) as found:
            with pytest.raises(UnavailableError, match=r"^a cannot be reached \(") as caught:
                async with found.asks(b"x"):
                    pass
            assert caught.value.reason is Reason.UPSTREAM_UNREACHABLE
            assert len(found.seen) == 1

    on(loop, work())


@both_loops
@pytest.mark.parametrize(
    "raw",
    [
        OK + b"Content-Length: 9\r\n\r\nshort",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nshort\r\nnonsense\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nshort\r\n0\r\n" + b"T: x\r\n" * 1000 + b"\r\n",
    ],
)
def test_an_answer_that_breaks_off_is_an_error_of_the_server(loop: Loop, raw: bytes) -> None:
    async def talk(server: Server) -> None:
        await server.send(raw[: raw.index(b"short") + 2])
        await go.wait()
        await server.send(raw[raw.index(b"short") + 2 :])

    async def work() -> None:
        async with serving(talk) as found, found.asks() as answer:
            assert await answer.piece() == b"sh"
            go.set()
            with pytest.raises(UnavailableError, match="broke off") as caught:
                await whole(answer)
            assert caught.value.reason is Reason.UPSTREAM_ERROR

    go = asyncio.Event()
    on(loop, work())


# --- deadlines ---


async def test_a_server_that_never_answers_is_given_up() -> None:
    async def talk(server: Server) -> None:
        await server.rest()

    async with serving(talk) as found:
        with pytest.raises(UnavailableError, match=r"^a did not answer within 0\.05 s") as caught:
            async with found.asks(b"x", patience_s=0.05):
                pass
        assert caught.value.reason is Reason.ATTEMPT_TIMEOUT


async def test_a_server_that_stops_in_its_answer_is_given_up() -> None:
    async def talk(server: Server) -> None:
        await server.send(OK + b"Content-Length: 9\r\n\r\nab")
        await server.rest()

    async with serving(talk) as found, found.asks(patience_s=0.05) as answer:
        assert await answer.piece() == b"ab"
        with pytest.raises(UnavailableError, match=r"^a sent nothing for 0\.05 s") as caught:
            await answer.piece()
        assert caught.value.reason is Reason.ATTEMPT_TIMEOUT


async def test_a_server_that_takes_nothing_is_given_up() -> None:
    async def talk(server: Server) -> None:
        server.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport can
        await left.wait()

    left = asyncio.Event()
    async with serving(talk) as found:
        with pytest.raises(UnavailableError, match="did not answer within") as caught:
            async with found.asks(bytes(2**26), patience_s=0.2):
                pass
        assert caught.value.reason is Reason.ATTEMPT_TIMEOUT
        left.set()


async def test_the_time_begins_anew_with_each_piece_of_the_request() -> None:
    async def talk(server: Server) -> None:
        await server.chunked()
        await server.send(HI)

    async def source() -> AsyncIterator[bytes]:
        for _ in range(12):
            await asyncio.sleep(0.05)  # time is what this is about
            yield b"x"

    async with serving(talk) as found, found.asks(source(), patience_s=0.3) as answer:
        assert await whole(answer) == b"hi"


async def test_a_connection_that_does_not_come_about_is_given_up() -> None:
    with Listener() as listener:  # it accepts and never says hello
        pools = UpstreamPools(SharedTls().context)
        url = listener.url.replace("http", "https")
        server = PooledModelServer(pools, connect_timeout_s=0.1, patience_s=5)
        with pytest.raises(UnavailableError, match=r"^a could not be connected to within 0\.1 s") as caught:
            async with server.ask(Question("a", url, "GET", "/")):
                pass
        assert caught.value.reason is Reason.ATTEMPT_TIMEOUT


async def test_nobody_there_is_unreachable_and_a_lack_of_descriptors_is_not() -> None:
    with Listener() as listener:
        pass
    server = PooledModelServer(UpstreamPools(SharedTls().context), connect_timeout_s=5, patience_s=5)
    with pytest.raises(UnavailableError, match=r"^a cannot be reached \(") as caught:
        async with server.ask(Question("a", listener.url, "GET", "/")):
            pass
    assert caught.value.reason is Reason.UPSTREAM_UNREACHABLE
    with no_descriptors(), pytest.raises(OutOfDescriptorsError):
        async with server.ask(Question("a", listener.url, "GET", "/")):
            pass
