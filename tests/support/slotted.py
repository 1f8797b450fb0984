"""Servers whose answers take a known time, and clients that leave when they are told to, over bare sockets.

`python -m tests.support.slotted SERVICE_S PORT…` serves until its input ends, then prints what it had.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, cast

import httptools
import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable

_ENTRY = '"size":1,"digest":"0","size_vram":0,"details":{},"expires_at":"2318-01-01T00:00:00Z"'
_TAGS = f'{{"models":[{{"name":"tiny:latest","model":"tiny:latest",{_ENTRY}}}]}}'
_WORD = b'{"model":"tiny","message":{"role":"assistant","content":"word"},"done":false}\n'
_LAST = (
    b'{"model":"tiny","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop",'
    b'"prompt_eval_count":12,"eval_count":34}\n'
)
_EMBEDDED = b'{"model":"tiny","embeddings":[[0.1,0.2]],"prompt_eval_count":3}'
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
# The state of a socket whose other end is open: the first byte of struct tcp_info (linux/tcp.h).
_ESTABLISHED = 1


def _document(content: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


_STATUS = {
    b"/api/version": _document(b'{"version":"0.24.0"}'),
    b"/api/tags": _document(_TAGS.encode()),
    b"/api/ps": _document(_TAGS.encode()),
}


@dataclass(eq=False, slots=True)
class _Crowd:
    """More requests than `allowed`: those that are still at work, and how many of the others were held."""

    allowed: int
    at_work: set[_Serving]
    held: int = 0


class Slotted:
    """A server that can die and come back on the same port.

    `over` has each moment with more requests than `allowed`, without those that the client had given up. The
    kernel knows that a connection was closed before the event loop reads its end, so that no time limit is
    needed: an answer to a connection that is closed by then answers a request that was given up.

    Args:
        service_s: returns how long the next answer takes.
    """

    def __init__(self, port: int, service_s: Callable[[], float], allowed: int | None = None) -> None:
        self.port = port
        self.service_s = service_s
        self.allowed = allowed
        self.at_work: set[_Serving] = set()
        self.most = 0
        self.answered = 0
        self.over: list[int] = []
        self.connections: set[_Serving] = set()
        self._crowds: list[_Crowd] = []
        self._server: asyncio.Server | None = None

    async def up(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Serving(self), "127.0.0.1", self.port, backlog=2048, reuse_address=True
        )

    def down(self) -> None:
        """Stop listening and cut every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()

    def cut(self) -> None:
        """Cut every connection."""
        for one in [*self.connections]:
            one.transport.abort()

    def begins(self, one: _Serving) -> None:
        self.at_work.add(one)
        self.most = max(self.most, len(self.at_work))
        if self.allowed is not None and len(self.at_work) > self.allowed:
            self._crowds.append(_Crowd(self.allowed, {*self.at_work}))

    def ends(self, one: _Serving) -> None:
        """Take the end of a request, which is answered now or whose connection is lost."""
        self.at_work.discard(one)
        for crowd in [crowd for crowd in self._crowds if one in crowd.at_work]:
            crowd.at_work.discard(one)
            crowd.held += one.has_peer()
            if not crowd.at_work:
                self._crowds.remove(crowd)
                if crowd.held > crowd.allowed:
                    self.over.append(crowd.held)


class _Serving(asyncio.Protocol):
    """One connection."""

    transport: asyncio.Transport

    def __init__(self, server: Slotted) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._url = self._body = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._server.ends(self)
        if self._timer is not None:
            self._timer.cancel()

    def has_peer(self) -> bool:
        """Return whether the other end of the connection is open, as far as the kernel knows."""
        if self not in self._server.connections:
            return False
        info = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return bool(info[0] == _ESTABLISHED)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url, self._body = url, b""

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        status = _STATUS.get(self._url)
        if status is not None:
            self.transport.write(status)
            return
        self._server.begins(self)
        takes_s = self._server.service_s()
        loop = asyncio.get_running_loop()
        if b'"stream":true' in self._body:
            self._timer = loop.call_later(takes_s / 2, self._word, takes_s / 2)
        else:
            whole = _document(_EMBEDDED if self._url == b"/api/embed" else _LAST)
            self._timer = loop.call_later(takes_s, self._end, whole)

    def _word(self, left_s: float) -> None:
        self.transport.write(_STREAM + b"%x\r\n%b\r\n" % (len(_WORD), _WORD))
        last = b"%x\r\n%b\r\n0\r\n\r\n" % (len(_LAST), _LAST)
        self._timer = asyncio.get_running_loop().call_later(left_s, self._end, last)

    def _end(self, data: bytes) -> None:
        self._server.ends(self)
        self._server.answered += 1
        self.transport.write(data)


class SlottedCaller(asyncio.Protocol):
    """A client with one connection and one request at a time.

    `status` is 0 until the head of the answer has come; `has_body` is whether some of the body has.
    """

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.status = 0
        self.has_body = False
        self.is_whole = False
        self.queue_ms: int | None = None
        self.sent_at = self.first_at = self.ended_at = 0.0
        self.is_open = False
        self._changed: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)

    async def connect(self, port: int) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, "127.0.0.1", port)

    def send(self, data: bytes) -> None:
        self.status, self.queue_ms = 0, None
        self.has_body = self.is_whole = False
        self.sent_at, self.first_at = monotonic(), 0.0
        self.transport.write(data)

    async def reply(self) -> bool:
        """Wait for the end of the answer; return whether it was whole."""
        while self.is_open and not self.is_whole:
            await self._change()
        return self.is_whole

    async def first_byte(self) -> None:
        """Wait for the first byte of the body, or the end."""
        while self.is_open and not self.has_body and not self.is_whole:
            await self._change()

    def leave(self, *, rudely: bool = False) -> None:
        """Close the connection; rudely, with a reset."""
        if rudely and not self.transport.is_closing():
            raw = self.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def left(self) -> None:
        while self.is_open:
            await self._change()

    async def _change(self) -> None:
        self._changed = asyncio.get_running_loop().create_future()
        await self._changed

    def _has_changed(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._has_changed()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-queue-ms":
            self.queue_ms = int(value)

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if not self.has_body:
            self.has_body = True
            self.first_at = monotonic()
            self._has_changed()

    def on_message_complete(self) -> None:
        self.ended_at = monotonic()
        self.is_whole = True
        if not self._parser.should_keep_alive():
            self.transport.close()
        self._has_changed()


def request_of(port: int, path: str, body: object) -> bytes:
    raw = json.dumps(body, separators=(",", ":")).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


async def _serve(service_s: float, ports: list[int]) -> None:
    servers = [Slotted(port, lambda: service_s) for port in ports]
    for server in servers:
        await server.up()
    print("ready", flush=True)
    with suppress(EOFError):
        await asyncio.to_thread(sys.stdin.read)
    print(json.dumps({str(one.port): {"most": one.most, "answered": one.answered} for one in servers}))
    for server in servers:
        server.down()


if __name__ == "__main__":
    uvloop.run(_serve(float(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
