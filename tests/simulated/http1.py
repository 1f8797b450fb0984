"""An HTTP/1.1 server as small as the simulated Ollama needs, framing its answers as Go's net/http does."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from .knobs import Knobs

MAXIMUM_HEAD_BYTES = 1 << 20
"""net/http's DefaultMaxHeaderBytes."""
MAXIMUM_PLAIN_BODY_BYTES = 2048
"""net/http buffers this much: a body that fits gets a Content-Length, a longer one is sent in chunks."""

_REASONS = {
    100: "Continue", 200: "OK", 201: "Created", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found",
    405: "Method Not Allowed", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 501: "Not Implemented",
    503: "Service Unavailable",
}  # fmt: skip


class MidStreamError(Exception):
    """The knob `error_at_byte` wants the stream to end with an error here."""


class _BadRequestError(Exception):
    """The bytes received are not a request; the message is the status line's text."""


class Exchange:
    """One request and the answer to it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.knobs: Knobs | None = None  # set once the answer is to suffer from them
        self.method = ""
        self.path = ""
        self.headers: dict[str, str] = {}
        self.status = 0
        self.keep_alive = True
        self._old_protocol = False
        self._body_left = 0  # bytes; -1 while a chunked body is being received
        self._pending_head = b""
        self._chunked = False
        self._stream_bytes = 0

    @property
    def peer(self) -> str:
        return str((self._writer.get_extra_info("peername") or ("-",))[0])

    async def read_head(self) -> bool:
        """Receive the request line and headers. Returns False when the client has gone instead."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        except asyncio.LimitOverrunError:
            raise _BadRequestError("431 Request Header Fields Too Large") from None
        request_line, *lines = head[:-4].decode("latin-1").split("\r\n")
        parts = request_line.split(" ")
        if len(parts) != 3 or parts[2] not in ("HTTP/1.1", "HTTP/1.0"):
            raise _BadRequestError("400 Bad Request")
        self.method, target, version = parts
        self.path = unquote(target.split("?", 1)[0])
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise _BadRequestError("400 Bad Request")
            self.headers[name.lower()] = value.strip()
        self._old_protocol = version == "HTTP/1.0"
        if not self._old_protocol and "host" not in self.headers:
            raise _BadRequestError("400 Bad Request: missing required Host header")
        connection = self.headers.get("connection", "").lower()
        self.keep_alive = "close" not in connection and (not self._old_protocol or "keep-alive" in connection)
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._body_left = -1
        else:
            length = self.headers.get("content-length", "0")
            if not length.isdigit():
                raise _BadRequestError("400 Bad Request")
            self._body_left = int(length)
        return True

    async def body_pieces(self) -> AsyncIterator[bytes]:
        """The request body as it arrives, whichever way it is framed."""
        if self._body_left and self.headers.get("expect", "").lower() == "100-continue":
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while self._body_left > 0:
            piece = await self._reader.read(min(self._body_left, 1 << 16))
            if not piece:
                raise ConnectionResetError("the client left in the middle of a request body")
            self._body_left -= len(piece)
            yield piece
        while self._body_left < 0:
            size = int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16)
            if size:
                yield await self._reader.readexactly(size)
                await self._reader.readexactly(2)
            else:
                while await self._reader.readuntil(b"\r\n") != b"\r\n":  # trailers
                    pass
                self._body_left = 0

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.body_pieces()])

    async def answer(
        self, status: int, content_type: str = "", body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a whole answer, in chunks if it is longer than what net/http would have buffered."""
        if len(body) > MAXIMUM_PLAIN_BODY_BYTES:
            if self.method == "HEAD":
                self._writer.write(self._head(status, content_type, headers or {}, None))
                return
            self.start_stream(content_type, headers, status)
            await self._send(body)
            await self.end_stream()
            return
        head = self._head(status, content_type, headers or {}, f"Content-Length: {len(body)}")
        self._writer.write(head if self.method == "HEAD" else head + body)
        await self._writer.drain()

    def start_stream(
        self, content_type: str, headers: Mapping[str, str] | None = None, status: int = 200
    ) -> None:
        """Begin a streamed answer. Its headers leave with the first bytes of its body, as gin's do."""
        self._chunked = not self._old_protocol
        if self._old_protocol:
            self.keep_alive = False
        framing = "Transfer-Encoding: chunked" if self._chunked else None
        self._pending_head = self._head(status, content_type, headers or {}, framing)

    async def send_head_only(self, content_type: str) -> None:
        self.start_stream(content_type)
        self._writer.write(self._pending_head)
        await self._writer.drain()

    async def write(self, data: bytes) -> None:
        """Send a piece of a stream. Here strike the knobs that cut it, stall it or kill the server.

        Raises MidStreamError where an error is wanted in place of `data`.
        """
        knobs = self.knobs
        if knobs is not None:
            end = self._stream_bytes + len(data)
            if 0 <= knobs.error_at_byte < end:
                raise MidStreamError
            if 0 <= knobs.stall_at_byte < end:
                await self._send(data[: knobs.stall_at_byte - self._stream_bytes])
                await asyncio.Event().wait()
            if knobs.crash == "stream" and 0 <= knobs.crash_at_byte < end:
                await self._send(data[: knobs.crash_at_byte - self._stream_bytes])
                os._exit(knobs.crash_exit)
        await self._send(data)

    async def end_stream(self, last: bytes = b"") -> None:
        """Send `last`, which no knob touches, and the terminator."""
        await self._send(last)
        if self._chunked:
            self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    async def _send(self, data: bytes) -> None:
        self._stream_bytes += len(data)
        framed = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and data else data
        self._writer.write(self._pending_head + framed)
        self._pending_head = b""
        await self._writer.drain()

    def _head(self, status: int, content_type: str, headers: Mapping[str, str], framing: str | None) -> bytes:
        self.status = status
        lines = [
            f"HTTP/1.1 {status} {_REASONS.get(status, '')}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        if content_type:
            lines.append(f"Content-Type: {content_type}")
        lines.append(time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT", time.gmtime()))
        if framing:
            lines.append(framing)
        if not self.keep_alive:
            lines.append("Connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Connection(asyncio.StreamReaderProtocol):
    """One client. What it asked for is cancelled as soon as it goes, like a request's context in Go."""

    def __init__(self, handler: Callable[[Exchange], Awaitable[None]]) -> None:
        self._reader = asyncio.StreamReader(
            limit=MAXIMUM_HEAD_BYTES
        )  # the base class keeps a weak reference only
        super().__init__(self._reader)
        self._handler = handler
        self._answering = False
        self._serving: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        assert isinstance(transport, asyncio.WriteTransport)
        self._serving = loop.create_task(
            self._serve(asyncio.StreamWriter(transport, self, self._reader, loop))
        )

    def eof_received(self) -> bool:
        super().eof_received()
        if self._answering and self._serving is not None:
            self._serving.cancel()
        return True  # the task closes the transport

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._serving is not None:
            self._serving.cancel()

    async def _serve(self, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._serve_one(Exchange(self._reader, writer)):
                pass
        except _BadRequestError as error:
            writer.write(
                f"HTTP/1.1 {str(error).split(':')[0]}\r\nContent-Type: text/plain; charset=utf-8\r\n"
                f"Connection: close\r\n\r\n{error}".encode()
            )
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, ValueError):
            pass  # the client left, or sent a chunked body that is none
        finally:
            writer.close()

    async def _serve_one(self, exchange: Exchange) -> bool:
        """Returns whether the connection can take another request."""
        if not await exchange.read_head():
            return False
        self._answering = True
        await self._handler(exchange)
        self._answering = False
        async for _ in exchange.body_pieces():  # what the handler left unread
            pass
        return exchange.keep_alive
