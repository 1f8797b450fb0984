"""Connections to the servers: pooled, one request at a time on each, framed by llhttp."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import httptools

from manager.wire.head import NOT_RETURNED, without_named

_MOST_HEAD_BYTES = 64 * 1024
_MOST_IDLE = 1024
_OLDEST_IDLE_S = 60.0
_SMALL_BYTES = 64 * 1024
_FIRST_FINAL_STATUS = 200
_WITHOUT_BODY = (204, 304)


class OwnLimitError(OSError):
    pass


class AnswerHead(NamedTuple):
    """The head of an answer.

    `lines` are those that the caller is to see, without what frames the message; `length` is that of the body
    in bytes, None when only its end tells.
    """

    status: int
    lines: list[bytes]
    length: int | None
    content_type: bytes


class ResponseSink(Protocol):
    """Who takes an answer. Each call is made on the event loop; none may block."""

    def head_came(self, head: AnswerHead) -> None: ...

    def answer_came(self, data: bytes, *, complete: bool) -> None:
        """What came of the body, perhaps nothing; the first call follows the head at once."""

    def answer_broke(self, why: str, *, begun: bool) -> None:
        """The connection ended before the answer did.

        `untouched`: it had been kept from an earlier request and not a byte came back, as when the server had
        just closed it.
        """


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is. `prefix` goes before every path, `host` is what the Host header says."""

    name: str
    port: int
    tls: bool
    prefix: bytes
    host: bytes

    @classmethod
    def of(cls, endpoint: str) -> Address:
        parts = urlsplit(endpoint)
        tls = parts.scheme == "https"
        return cls(
            name=parts.hostname or "",
            port=parts.port or (443 if tls else 80),
            tls=tls,
            prefix=parts.path.rstrip("/").encode(),
            host=parts.netloc.encode(),
        )


class UpstreamConnection(asyncio.Protocol):
    """One connection. It belongs to a pool while idle, and to the sink of a request otherwise."""

    def __init__(self, pool: UpstreamPool) -> None:
        self._pool = pool
        self._sink: ResponseSink | None = None
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._lines: list[bytes] = []
        self._named = b""
        self._content_type = b""
        self._status = 0
        self._head_bytes = 0
        self._in_head = True
        self._framed = False
        self._length: int | None = None
        self._complete = False
        self._keeps = False
        self._touched = False
        self._kept = False
        self._paused = False
        self._requests = 0
        self.idle_since = 0.0

    # --- what the one who asks calls ---

    def send(self, sink: ResponseSink, head: bytes, pieces) -> None:
        """Send one request; the answer goes to `sink`."""
        assert self._transport is not None  # noqa: S101  (set before anybody gets to see it)
        self._sink = sink
        self._requests += 1
        self._kept = self._requests > 1
        self._touched = False
        body = b"".join(pieces)
        # To copy what is small costs less than a second write.
        if len(body) <= _SMALL_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._transport.write(body)

    def pause(self) -> None:
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    def abandon(self) -> None:
        """End the connection, and with it what the server does for this request."""
        self._sink = None
        if self._transport is not None:
            self._transport.abort()

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    # --- what the transport calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        sink = self._sink
        if sink is None:
            # Nobody asked: whatever this is, it must not be taken for the answer to the next request.
            self.abandon()
            return
        self._touched = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._sink is not sink:
                return  # it was abandoned at its head: whoever asked may be asking elsewhere by now
            self.abandon()
            if self._complete:
                # The answer is whole; what follows it is nobody's.
                sink.answer_came(b"".join(self._pieces), complete=True)
            else:
                sink.answer_broke(f"the answer is no proper HTTP ({error})", begun=True)
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_HEAD_BYTES:
                self.abandon()
                sink.answer_broke("the head of the answer has no end", begun=True)
            return
        if self._sink is not sink:
            return  # it was abandoned at its head
        pieces, self._pieces = self._pieces, []
        complete = self._complete
        if complete:
            self._become_free()
        sink.answer_came(pieces[0] if len(pieces) == 1 else b"".join(pieces), complete=complete)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.lost(self)
        sink, self._sink = self._sink, None
        self._transport = None
        if sink is None:
            return
        if not self._in_head and not self._framed and exc is None:
            sink.answer_came(b"", complete=True)  # such an answer ends with its connection
        else:
            why = "the server closed the connection" if exc is None else f"the connection broke ({exc})"
            sink.answer_broke(why, begun=self._touched or not self._kept or exc is None)

    # --- what the parser calls ---

    def on_message_begin(self) -> None:
        if self._complete:
            # A second answer to one request; the parser goes on, whoever reads it must not.
            raise ValueError("more than one answer")
        self._lines = []
        self._named = b""
        self._content_type = b""
        self._framed = False
        self._length = None

    def on_header(self, name: bytes, value: bytes) -> None:
        low = name.lower()
        if low == b"content-length":
            self._framed = True
            self._length = int(value)
        elif low == b"transfer-encoding":
            self._framed = True
        elif low == b"connection":
            self._named += value + b","
        elif low not in NOT_RETURNED:
            if low == b"content-type":
                self._content_type = value
            self._lines.append(b"%b: %b\r\n" % (name, value))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if self._status < _FIRST_FINAL_STATUS:
            return
        if self._status in _WITHOUT_BODY:
            self._framed = True
            self._length = 0
        self._in_head = False
        if self._sink is not None:
            lines = without_named(self._lines, self._named) if self._named else self._lines
            self._sink.head_came(AnswerHead(self._status, lines, self._length, self._content_type))

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        if self._status >= _FIRST_FINAL_STATUS:
            self._complete = True
            self._keeps = self._parser.should_keep_alive()  # the parser forgets it with the message

    # --- helpers ---

    def _become_free(self) -> None:
        self._sink = None
        self._complete = False
        self._in_head = True
        self._head_bytes = 0
        self._status = 0
        if self._transport is None:
            return
        if self._transport.get_write_buffer_size():
            # It answered before it had the whole request: whether it ever takes the rest is not waited for.
            self._transport.abort()
        elif self._keeps and self.usable:
            self.resume()
            self._pool.kept(self)
        else:
            self._transport.close()


class UpstreamPool:
    """The connections to one server. The newest idle one is used first, so that the others can grow old."""

    def __init__(self, address: Address, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self._loop = loop
        self._idle: deque[UpstreamConnection] = deque()
        self._all: set[UpstreamConnection] = set()
        self._ssl = ssl.create_default_context() if address.tls else None
        self._connecting = 0
        self._ageing: asyncio.TimerHandle | None = None

    def idle(self) -> UpstreamConnection | None:
        """A connection that is open and free, without waiting."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def connect(self) -> UpstreamConnection:
        """A new connection.

        Raises:
            OSError: there is none to be had.
        """
        self._connecting += 1
        try:
            _, connection = await self._loop.create_connection(
                lambda: UpstreamConnection(self), self.address.name, self.address.port, ssl=self._ssl
            )
        finally:
            self._connecting -= 1
        if not connection.usable:
            raise ConnectionResetError("the server closed the connection at once")
        # Not before: when whoever wants it is cancelled meanwhile, uvloop closes it and tells it nothing.
        self._all.add(connection)
        return connection

    @property
    def open_connections(self) -> int:
        return len(self._all)

    @property
    def is_empty(self) -> bool:
        """Whether there is no connection, and none on its way."""
        return not self._all and not self._connecting

    def close(self) -> None:
        if self._ageing is not None:
            self._ageing.cancel()
        for connection in tuple(self._all):
            connection.abandon()

    def close_idle(self) -> int:
        """Close the idle connections; return how many."""
        idle = tuple(self._idle)
        self._idle.clear()
        for connection in idle:
            connection.abandon()
        return len(idle)

    # --- what connections call ---

    def kept(self, connection: UpstreamConnection) -> None:
        if len(self._idle) >= _MOST_IDLE:
            connection.abandon()
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._ageing is None:
            self._ageing = self._loop.call_later(_OLDEST_IDLE_S, self._close_old)

    def _close_old(self) -> None:
        """Let go of what a burst of requests has left; the oldest are in front."""
        self._ageing = None
        now = self._loop.time()
        while self._idle and now - self._idle[0].idle_since >= _OLDEST_IDLE_S:
            self._idle.popleft().abandon()
        if self._idle:
            left_s = self._idle[0].idle_since + _OLDEST_IDLE_S - now
            self._ageing = self._loop.call_later(left_s, self._close_old)

    def lost(self, connection: UpstreamConnection) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
