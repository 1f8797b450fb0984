"""Accepts connections with TLS. Each counts from its first moment on, and its handshake has a deadline.

The event loop's own listener begins the handshake at once and shows a connection only after it. Here the
first byte is looked at before that: plain HTTP gets an answer that says what is wrong.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from manager.descriptors import lacks_descriptors

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from manager.relay.connections import ConnectionLimit
    from manager.relay.front import Front

_log = structlog.get_logger("tls")

# From the connection to the end of the handshake.
HANDSHAKE_S = 10.0
# The peer has so long to close its side. `Front` ends it sooner, once everything has arrived.
_SHUTDOWN_S = 300.0
# Connections that are accepted in one turn of the event loop.
_ACCEPTED_A_TURN = 32
# Pause of the listener where no descriptor is left.
_PAUSE_S = 0.2
# ContentType of RFC 8446 section 5.1.
_HANDSHAKE = b"\x16"
_MOST_PLAIN_BYTES = 64 * 1024
_PLAIN_BODY = b'{"error":"this port speaks TLS; use https://"}'
_PLAIN = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"Connection: close\r\n\r\n%b" % (len(_PLAIN_BODY), _PLAIN_BODY)
)
# As without TLS; the event loop's own limit behind TLS is eight times as high.
_MOST_UNWRITTEN_BYTES = 64 * 1024


class TlsListener:
    """A listener on the event loop. `close` accepts nothing more; handshakes under way go on.

    Args:
        listener: bound, and not blocking; stays the caller's to close.
        make: makes the protocol of each connection.
        context: returns the context of the next handshake.
        places: count the connections.
        handshake_s: the deadline of a handshake.
    """

    def __init__(
        self,
        listener: socket.socket,
        make: Callable[[], Front],
        context: Callable[[], ssl.SSLContext],
        places: ConnectionLimit,
        *,
        handshake_s: float = HANDSHAKE_S,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = listener
        self.sockets = (listener,)
        self.make = make
        self.context = context
        self.places = places
        self.handshake_s = handshake_s
        self.handshakes: set[_Handshake] = set()
        self._pause: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        listener, self._listener = self._listener, None
        if self._pause is not None:
            self._pause.cancel()
        if listener is not None:
            self._loop.remove_reader(listener.fileno())

    async def wait_closed(self) -> None:
        """Return at once: the caller closes the socket. uvicorn calls this."""

    def end_handshakes(self) -> None:
        for handshake in tuple(self.handshakes):
            handshake.drop()

    def _listen(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_A_TURN):
            if self._listener is None:
                return
            try:
                peer, _ = self._listener.accept()
            except OSError as error:
                if lacks_descriptors(error):  # the listener stays readable: look again in a while
                    self._loop.remove_reader(self._listener.fileno())
                    self._pause = self._loop.call_later(_PAUSE_S, self._listen)
                return
            _Handshake(self, peer).begin()


class _Handshake:
    """A connection until its handshake has ended; a `Connection` for the limit."""

    def __init__(self, owner: TlsListener, peer: socket.socket) -> None:
        self._owner = owner
        self._peer: socket.socket | None = peer
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._reads = False

    def begin(self) -> None:
        assert self._peer is not None  # noqa: S101  (nothing has ended yet)
        self._peer.setblocking(False)
        self._owner.handshakes.add(self)
        self._owner.places.opened(self)
        if self._peer is not None:  # the limit has not dropped it at once
            with suppress(OSError):
                self._peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._timer = self._loop.call_later(self._owner.handshake_s, self.drop)
            self._reads = True
            self._loop.add_reader(self._peer.fileno(), self._readable)

    # --- what the limit of connections calls ---

    def quiet_since(self) -> float:
        return self._since

    def drop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:
            self._end()

    # --- helpers ---

    def _readable(self) -> None:
        peer = self._peer
        assert peer is not None  # noqa: S101  (no reader without it)
        try:
            first = peer.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            first = b""
        self._stop_reading(peer)
        if first == _HANDSHAKE:
            if self._timer is not None:
                self._timer.cancel()  # the handshake has a deadline of its own
            self._task = self._loop.create_task(self._shake(peer))
        else:
            if first:
                _refuse_plain(peer)
            self._end()

    async def _shake(self, peer: socket.socket) -> None:
        owner = self._owner
        protocol = owner.make()
        protocol.handshake = self
        left_s = max(0.01, self._since + owner.handshake_s - self._loop.time())
        try:
            transport, _ = await self._loop.connect_accepted_socket(
                lambda: protocol,
                peer,
                ssl=owner.context(),
                ssl_handshake_timeout=left_s,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
            transport.set_write_buffer_limits(_MOST_UNWRITTEN_BYTES)
            self._peer = None  # the transport's from now on
        except OSError as error:
            _log.debug("handshake_failed", problem=str(error))
        finally:
            self._end()

    def _stop_reading(self, peer: socket.socket) -> None:
        if self._reads:
            self._reads = False
            self._loop.remove_reader(peer.fileno())

    def _end(self) -> None:
        peer, self._peer = self._peer, None
        if self._timer is not None:
            self._timer.cancel()
        self._owner.handshakes.discard(self)
        self._owner.places.closed(self)
        if peer is not None:
            self._stop_reading(peer)
            peer.close()


def _refuse_plain(peer: socket.socket) -> None:
    """Answer a client that speaks plain HTTP. Its request is read: unread bytes would reset the answer."""
    with suppress(OSError):
        peer.recv(_MOST_PLAIN_BYTES)
        peer.send(_PLAIN)
        peer.shutdown(socket.SHUT_WR)
