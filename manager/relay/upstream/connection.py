"""One connection to a server, with one request at a time."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from typing import TYPE_CHECKING, NamedTuple, Protocol

from manager.relay.upstream.liveness import allow_a_full_window, watch_host
from manager.wire.answer import AnswerReader, BadAnswerError
from manager.wire.head import NOT_RETURNED, without_named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manager.relay.upstream.address import Address
    from manager.wire.body import Buffer
    from manager.wire.head import Header

_SMALL_BYTES = 64 * 1024
_NO_CONTENT = 204


class AnswerHead(NamedTuple):
    """The head of an answer.

    `lines` are those for the client, without framing; the list is never changed. `length` is that of the body
    in bytes, None where only its end tells. An answer to HEAD, or a 304, has the declared length and no body.
    """

    status: int
    lines: list[bytes]
    length: int | None
    content_type: bytes


class ResponseSink(Protocol):
    """Takes the answer to one request. Each call is made on the event loop; none may block."""

    def head_came(self, head: AnswerHead) -> None: ...

    def answer_came(self, data: bytes, *, complete: bool) -> None:
        """A part of the body, perhaps empty; the first call follows the head at once."""

    def answer_broke(self, why: str, *, may_have_begun: bool) -> None:
        """The connection ended before the answer did.

        Args:
            why: what happened, for people.
            may_have_begun: whether the server may have begun with the request. Only a request that the server
                cannot have begun may be repeated or failed over: one that kills its server would otherwise
                kill the next one too. Verified on Linux loopback, with asyncio and with uvloop:

                - The server closed the connection before the request arrived: end of file, and the peer's
                  kernel never acknowledges the request (TIOCOUTQ counts its bytes). Cannot have begun.
                - The server read the request, worked and died (SIGKILL): end of file, and every byte is
                  acknowledged. May have begun.
                - The server closed the connection with unread data: connection reset. A request that fitted
                  the peer's buffers is acknowledged all the same, read or not. Cannot have begun where the
                  connection was kept: that is a server that closes idle connections. On a new connection it
                  may have begun: a proxy between may reset connections whose server died.
                - The server closed the connection with part of the request still on this side: cannot have
                  begun, since inference needs the whole request.
        """


class Owner(Protocol):
    """The pool, as a connection sees it."""

    address: Address

    def kept(self, connection: UpstreamConnection) -> None: ...
    def lost(self, connection: UpstreamConnection) -> None: ...


class UpstreamConnection(asyncio.Protocol):
    """One connection. A pool owns it while it is idle, the sink of a request otherwise."""

    def __init__(self, pool: Owner) -> None:
        self._pool = pool
        self.address = pool.address
        self._sink: ResponseSink | None = None
        self._transport: asyncio.Transport | None = None
        self._reader = AnswerReader()
        self._has_head = False
        self._last_headers: list[Header] | None = None
        self._last_lines: list[bytes] = []
        self._last_type = b""
        self._is_last = False
        self._unsent_at_end = False
        self._paused = False
        self._requests = 0
        self._is_upload = False
        self._writable: asyncio.Future[None] | None = None
        self.idle_since = 0.0

    # --- what the client of the connection calls ---

    def send(
        self,
        sink: ResponseSink,
        head: bytes,
        pieces: Sequence[Buffer],
        *,
        is_head: bool = False,
        is_last: bool = False,
    ) -> None:
        """Send one request; its answer goes to `sink`.

        Args:
            sink: takes the answer.
            head: the whole head.
            pieces: the whole body, or its beginning where `write` sends the rest.
            is_head: the method is HEAD.
            is_last: the connection is closed after the answer.
        """
        assert self._transport is not None  # noqa: S101  (the pool hands out connected ones only)
        self._sink = sink
        self._is_last = is_last
        self._requests += 1
        self._reader.begin(is_head=is_head)
        self._has_head = False
        # Copying a small body costs less than a second write.
        if len(pieces) == 1 and len(pieces[0]) <= _SMALL_BYTES:
            self._transport.write(b"".join((head, pieces[0])))
        else:
            self._transport.write(head)
            for piece in pieces:
                self._transport.write(piece)

    def write(self, data: bytes) -> None:
        """Send more of the body. What is written after the end of the answer is dropped."""
        if self._sink is not None and self._transport is not None:
            if not self._is_upload:
                self._is_upload = True
                allow_a_full_window(self._transport)
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the server takes more; returns at once when the request has ended."""
        if self._writable is not None and self._sink is not None:
            await self._writable

    def pause(self) -> None:
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    def abandon(self) -> None:
        """End the connection, and with it the server's work for this request."""
        self._sink = None
        self._wake_writer()
        if self._transport is not None:
            self._transport.abort()

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    # --- what the transport calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's transport is one
        watch_host(transport)

    def data_received(self, data: bytes) -> None:
        sink, reader = self._sink, self._reader
        if sink is None:
            # No request is open: these bytes must not be taken for the answer to the next one.
            self.abandon()
            return
        try:
            reader.feed(data)
        except BadAnswerError as error:
            if reader.status and not self._has_head:
                sink.head_came(self._answer_head())  # the head was proper, and its status counts
                if self._sink is not sink:
                    return
            self.abandon()
            sink.answer_broke(str(error), may_have_begun=True)
            return
        if not self._has_head:
            if not reader.status:
                return
            self._has_head = True
            sink.head_came(self._answer_head())
            if self._sink is not sink:
                return  # the sink abandoned the connection at the head
        complete = reader.is_complete
        if complete:
            self._become_free()
        sink.answer_came(reader.take(), complete=complete)

    def eof_received(self) -> bool:
        self._unsent_at_end = self._is_unsent()
        self._ended(None)
        if self._transport is not None:
            self._transport.abort()  # a close would wait until the server takes the rest of the request
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._unsent_at_end = self._unsent_at_end or self._is_unsent()
        self._pool.lost(self)
        self._ended(exc)
        self._transport = None

    def pause_writing(self) -> None:
        self._writable = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        self._wake_writer()

    # --- helpers ---

    def _answer_head(self) -> AnswerHead:
        reader = self._reader
        if reader.headers is not self._last_headers:
            self._read_lines(reader.headers)
        length = None if reader.status == _NO_CONTENT else reader.length
        return AnswerHead(reader.status, self._last_lines, length, self._last_type)

    def _read_lines(self, headers: list[Header]) -> None:
        lines: list[bytes] = []
        named = content_type = b""
        for name, value in headers:
            low = name.lower()
            if low == b"connection":
                named += value + b","
            elif low not in NOT_RETURNED:
                if low == b"content-type":
                    content_type = value
                lines.append(b"%b: %b\r\n" % (name, value))
        if named:
            lines = without_named(lines, named)
        self._last_headers, self._last_lines, self._last_type = headers, lines, content_type

    def _become_free(self) -> None:
        self._sink = None
        self._wake_writer()
        if self._transport is None:
            return
        if self._transport.get_write_buffer_size():
            # The server answered before it had the whole request, and may never take the rest.
            self._transport.abort()
        elif self._reader.keeps and not self._is_last and self.usable:
            self.resume()
            self._pool.kept(self)
        else:
            self._transport.close()

    def _ended(self, exc: Exception | None) -> None:
        """The connection is over: so is the request on it, if there is one."""
        sink, self._sink = self._sink, None
        self._wake_writer()
        if sink is None:
            return
        if exc is None:
            try:
                self._reader.end()
            except BadAnswerError as error:
                sink.answer_broke(str(error), may_have_begun=self._may_have_begun(exc))
            else:
                sink.answer_came(b"", complete=True)
        else:
            why = getattr(exc, "strerror", None) or str(exc)
            sink.answer_broke(f"the connection broke ({why})", may_have_begun=self._may_have_begun(exc))

    def _may_have_begun(self, exc: Exception | None) -> bool:
        if self._reader.is_touched:
            return True
        if self._unsent_at_end:
            return False
        was_kept = self._requests > 1
        return not (was_kept and isinstance(exc, (ConnectionResetError, BrokenPipeError)))

    def _is_unsent(self) -> bool:
        """Whether the peer's kernel never acknowledged some of the request."""
        if self._transport is None or self._sink is None:
            return False
        try:
            raw = fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        except (OSError, ValueError, AttributeError):
            return False  # unknown; uvloop has no socket any more once TLS has failed
        unacknowledged: int = struct.unpack("i", raw)[0]
        return unacknowledged > 0

    def _wake_writer(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)
