"""The listener with TLS: handshakes count as connections, and give their places back."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from manager.relay.connections import ConnectionLimit
from manager.relay.tls_listener import TlsListener
from tests.support.inside import until
from tests.support.sockets import LOOPS, certificate, on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

both_loops = pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])


class Echo(asyncio.Protocol):
    """Says its first bytes again; counts as `Front` does."""

    def __init__(self, places: ConnectionLimit) -> None:
        self.places = places
        self.handshake: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.places.closed(self.handshake)
        self.places.opened(self)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.places.closed(self)

    def quiet_since(self) -> None:
        return None

    def drop(self) -> None:
        self.transport.abort()


class Rig:
    def __init__(self, home: Path, **options: Any) -> None:
        served, key = certificate(home)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(served, key)
        self.trusting = ssl.create_default_context(cafile=served)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        loop = asyncio.get_running_loop()
        self.places = ConnectionLimit(2, now=lambda: loop.time() + 60)  # everybody has been quiet for long
        make: Any = lambda: Echo(self.places)  # noqa: E731
        self.listener = TlsListener(self.socket, make, lambda: context, self.places, **options)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("localhost", self.port, ssl=self.trusting)

    async def silent(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)


@asynccontextmanager
async def listening(home: Path, **options: Any) -> AsyncIterator[Rig]:
    rig = Rig(home, **options)
    try:
        yield rig
    finally:
        rig.listener.close()
        rig.listener.end_handshakes()
        await until(lambda: not rig.listener.handshakes)
        rig.socket.close()


async def ended(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(10):
        with suppress(ConnectionError):
            return await reader.read(-1)
    return b""


@both_loops
def test_a_handshake_holds_a_place_and_leaves_it_to_a_new_connection(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    async def work() -> None:
        async with listening(tmp_path) as rig:
            silent = await rig.silent()
            await until(lambda: len(rig.places) == 1)
            clock, first_at = asyncio.get_running_loop().time, asyncio.get_running_loop().time()
            await until(lambda: clock() > first_at)  # uvloop's clock counts milliseconds
            half = await rig.silent()
            half[1].write(b"\x16\x03\x01\x02\x00")
            await until(lambda: len(rig.places) == 2)
            reader, writer = await rig.connect()  # takes the place of the longest quiet one
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            assert await ended(silent[0]) == b""
            assert len(rig.places) <= 2
            for one in (silent, half):
                one[1].close()
            writer.close()
            await until(lambda: not len(rig.places))

    on(loop, work())


@both_loops
def test_slow_handshakes_end_in_time(loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path) -> None:
    async def work() -> None:
        async with listening(tmp_path, handshake_s=0.2) as rig:
            silent, half = await rig.silent(), await rig.silent()
            half[1].write(b"\x16\x03\x01\x02\x00")
            for one in (silent, half):
                assert await ended(one[0]) == b""
                one[1].close()
            await until(lambda: not (len(rig.places) or rig.listener.handshakes))
            reader, writer = await rig.connect()
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            await asyncio.sleep(0.3)  # the deadline was that of the handshake alone
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()

    on(loop, work())


@both_loops
def test_handshakes_that_fail_and_plain_http_leave_nothing(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    async def work() -> None:
        async with listening(tmp_path) as rig:
            for sent, answer in (
                (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 Bad Request"),
                (b"\x16\x03\x01\x00\x05hello", b""),
                (b"", b""),
            ):
                reader, writer = await rig.silent()
                writer.write(sent)
                if not sent:
                    writer.write_eof()
                assert (await ended(reader)).startswith(answer)
                writer.close()
            with pytest.raises(ssl.SSLError):
                await asyncio.open_connection("localhost", rig.port, ssl=ssl.create_default_context())
            await until(lambda: not (len(rig.places) or rig.listener.handshakes))

    on(loop, work())


@both_loops
def test_a_closed_listener_ends_the_handshakes_that_it_is_told_to_end(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    async def work() -> None:
        async with listening(tmp_path) as rig:
            silent, half = await rig.silent(), await rig.silent()
            half[1].write(b"\x16\x03\x01\x02\x00")
            await until(lambda: len(rig.listener.handshakes) == 2)
            rig.listener.close()
            rig.listener.close()
            late = await rig.silent()  # waits for another process that has the socket
            rig.listener.end_handshakes()
            for one in (silent, half):
                assert await ended(one[0]) == b""
                one[1].close()
            await until(lambda: not (len(rig.places) or rig.listener.handshakes))
            late[1].close()

    on(loop, work())
