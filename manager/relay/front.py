"""The client side of connections: uvicorn's protocol, which keeps inference requests for the relay."""

from __future__ import annotations

import fcntl
import re
import socket
import termios
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from manager.relay.caller import KnownHead, read_caller
from manager.relay.connections import ConnectionLimit, Place
from manager.relay.deadlines import Deadlines, Phase, Stopwatch
from manager.relay.exchange import Exchange
from manager.relay.timers import Timers
from manager.wire.head import STATUS_LINES
from manager.wire.keys import without_path_key
from manager.wire.ollama_routes import spoken_at
from manager.wire.paths import read_target
from manager.wire.routes import INFERENCE

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from manager.relay.caller import Caller
    from manager.relay.connections import Connection
    from manager.relay.relay import Relay
    from manager.wire.head import Header
    from manager.wire.routes import Route

_MOST_HEAD_BYTES = 64 * 1024
# A header costs a few hundred bytes however short it is. As for answers (`wire.answer.MOST_HEAD_LINES`).
_MOST_HEAD_LINES = 256
# Reading pauses once a client has sent this much behind a request that is not answered yet.
_MOST_HELD_BYTES = 64 * 1024
# Every head ends with this, and every body in chunks: the parser takes no other line ends.
_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)\r\n", re.IGNORECASE)
# Digits of a Content-Length, the longest that is looked at.
_MOST_DIGITS = 15
_READ_HERE = frozenset({b"content-length", b"expect"})
_OFFER = frozenset({b"upgrade", b"http2-settings"})
_TOO_LONG = "the head or the trailers are too long"
_VERSIONS = ("1.1", "1.0")
_HEALTH = frozenset({b"/healthz", b"/readyz", b"/metrics"})
_FULL_BODY = b'{"error":"the server has too many connections; try later"}'
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(_FULL_BODY), _FULL_BODY)
)
_LEAVING_BODY = b'{"error":"the manager is being replaced; send the request again"}'
_LEAVING = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(_LEAVING_BODY), _LEAVING_BODY)
)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# struct tcp_info of linux/tcp.h: the state is its first byte, tcpi_bytes_acked the eight bytes from 120 on.
_TCP_INFO_BYTES = 128
_TCP_ACKED_AT = 120
_TCP_ESTABLISHED = 1
_PROBES = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))


class _NoPlaceError(httptools.HttpParserError):
    """The connection has a spare place, which is not for this request. Raised to end the parsing."""


class _Trailers(list[tuple[bytes, bytes]]):
    """Takes the place of a request's headers once its head is complete, and keeps nothing."""

    def append(self, trailer: tuple[bytes, bytes]) -> None:
        pass


_TRAILERS = _Trailers()


class _Flow(FlowControl):
    """uvicorn's own, but an application that asks for more does not overfill what is held."""

    is_full = False

    def resume_reading(self) -> None:
        if not self.is_full:
            super().resume_reading()


class Front(HttpToolsProtocol):
    """One connection of a client. Its requests come in any mixture, one after the other.

    An `Exchange` takes the place of uvicorn's cycle for the requests of the relay, so that keep-alive and
    pipelining are the same for both. Written against uvicorn 0.54.

    At most one request exists at a time: parsing stops at the end of a request until its answer has been
    written and the client reads. What comes meanwhile is held, up to `_MOST_HELD_BYTES` and one piece. The
    rest stays in the kernel.
    """

    flow: _Flow

    def __init__(
        self,
        relay: Relay,
        timers: Timers[Front],
        deadlines: Deadlines,
        places: ConnectionLimit,
        **uvicorn: Any,
    ) -> None:
        super().__init__(**uvicorn)
        self.headers = _TRAILERS  # until a head begins
        self._relay = relay
        self._places = places
        self._timers = timers
        self._deadlines = deadlines
        self._stopwatch = Stopwatch(self.loop.time())
        # Whether the next byte belongs to a head: the request before it has been received.
        self._in_head = True
        # Bytes since the last piece of a body: of a head, or of what frames a body in chunks.
        self._head_bytes = 0
        # Bytes that are left of a body whose length is declared.
        self._body_left = 0
        # The last bytes parsed, which may be the beginning of `_END`.
        self._tail = b""
        self._held = bytearray()
        self._running: Exchange | None = None
        self._parsing_held = False
        self._unreadable = False
        self._offered = False
        self._length = b""
        # Of the last request. A new connection begins with what another one has read: a program that connects
        # for each request sends the same head again. Not with a key in it: comparing it byte by byte with
        # what another client sends would let that one measure how much of a guess is right.
        is_shared = not relay.access.wants_key
        self._caller = relay.latest_caller if is_shared else None
        # The head of two requests that differ in nothing but their length.
        self._known = relay.latest_head if is_shared else None
        self._is_alike = False
        self._requests = 0
        self._body_bytes = 0
        self._ending = False
        self._probes = False
        # Stands for this connection in the limit until the TLS handshake has ended.
        self.handshake: Connection | None = None
        self._is_tls = False
        self._is_parting = False

    # --- what the transport calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self.flow = _Flow(self.transport)
        self._timers.add(self)
        self._is_tls = self.scheme == "https"
        if self.handshake is not None:
            self._places.closed(self.handshake)
            self.handshake = None
        self._places.opened(self)
        if self._held:
            self.loop.call_soon(self._parse_held)

    def begin_with(self, held: bytes) -> None:
        """Take what another process has read of the connection; before `connection_made`."""
        self._held += held

    @property
    def rests(self) -> bool:
        """Whether no request is under way."""
        cycle = self.cycle
        return self._running is None and (cycle is None or cycle.response_complete)

    @property
    def streams(self) -> bool:
        """Whether an answer of the control API has begun and not ended; some of these have no end."""
        cycle = self.cycle
        if cycle is None or isinstance(cycle, Exchange):
            return False
        return bool(cycle.response_started and not cycle.response_complete)

    def data_received(self, data: bytes) -> None:
        parsed = 0 if self._held else self._parse(data)
        if parsed < len(data):
            self._hold(data[parsed:])
            if parsed and not self._is_busy():
                self.loop.call_soon(self._parse_held)

    def eof_received(self) -> None:
        # The transport closes after this. Unsent bytes of an answer that cannot end would delay that.
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timers.discard(self)
        self._places.closed(self)
        self._held.clear()
        running, self._running = self._running, None
        super().connection_lost(exc)
        if running is not None:
            running.caller_left()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._running is not None:
            self._running.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._running is not None:
            self._running.resume()
        if self._held:
            self.loop.call_soon(self._parse_held)

    def shutdown(self) -> None:
        """End after the current answer. The second call ends a stream of the control API at once.

        The first call comes before the requests under way are drained, the second one after it. What still
        streams then has no end of its own, as `/events`.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self.transport.close()
            return
        cycle.keep_alive = False
        if self._ending and self._running is None:
            if cycle.response_started:
                self.transport.abort()
            elif not self._in_head:
                self._refuse(503, "the manager is being stopped")  # the rest of its body never came
        self._ending = True

    @property
    def is_tls(self) -> bool:
        return self._is_tls

    def part(self, *, waits: bool) -> bool:
        """End after the current answer, which says so, because the connection cannot be given away.

        A client sends a request again that it sent on a connection that was closed between two requests.

        Args:
            waits: leave a client that has sent nothing yet the time for its first request.

        Returns:
            Whether nothing is under way any more.
        """
        self._is_parting = True
        self._known = None
        cycle = self.cycle
        if self.transport.is_closing():
            return True
        if cycle is not None and not cycle.response_complete:
            cycle.keep_alive = False
            return False
        if self._head_bytes or self._held or not self._in_head or (waits and not self._requests):
            return False
        self.transport.close()
        return True

    def leave(self, take: Callable[[int, bytes], bool]) -> bool:
        """Give the connection away between two requests; whether it was given.

        Nothing is given while a request or its answer is under way, nor with a part of a head, which the
        parser has.

        Args:
            take: takes the descriptor of the socket and the bytes of the next request; whether it did. This
                process closes its own descriptor afterwards, and the connection lives on.

        No other process can go on with a connection with TLS: it is closed. A request that came too late is
        refused, so that its client can send it again.
        """
        if self._is_tls:
            return self._close_between()
        cycle = self.cycle
        peer = self.transport.get_extra_info("socket")
        if (
            self._running is not None
            or (cycle is not None and not cycle.response_complete)
            or not self._in_head
            or self._head_bytes
            or self._unreadable
            or peer is None
            or self.transport.is_closing()
            or self.transport.get_write_buffer_size()
        ):
            return False
        if not take(peer.fileno(), bytes(self._held)):
            return False
        self._held.clear()
        self.transport.abort()
        return True

    def _close_between(self) -> bool:
        """Close a connection with TLS between two requests; whether it is closed."""
        if not self.rests or not self._in_head:
            return False
        if not self.transport.is_closing():
            if self._held or self._head_bytes:
                self.transport.write(_LEAVING)
            self.transport.close()
        return True

    # --- what the timer calls ---

    def check(self, now: float) -> None:
        """Close the connection if its phase has lasted too long."""
        phase = self._phase()
        transferred = 0
        if phase is Phase.BODY:
            transferred = self._body_bytes
        elif phase is Phase.UNREAD:
            transferred = self._bytes_taken()
        age_s = self._stopwatch.age_s(phase, self._requests, transferred, now)
        limit_s = self._limit_s(phase)
        if limit_s is not None and age_s >= limit_s:
            self._too_late(phase)
        elif self._is_tls and self.transport.is_closing() and not self._is_unsent():
            self.transport.abort()  # the client has everything; it does not close its side of TLS
        elif self.flow.read_paused and _tcp_info(self.transport)[0] != _TCP_ESTABLISHED:
            self.eof_received()  # which nothing else reports while reading is paused
        elif phase is Phase.ANSWERING and not self._probes and age_s >= self._deadlines.probe_after_s:
            self._probes = True
            _probe_peer(self.transport)

    # --- what the parser calls ---

    def on_message_begin(self) -> None:
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._length = b""
        self._is_alike = False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in _READ_HERE:
            if name == b"content-length":
                # The parser checks it and frames by it. Without it the heads of a connection are alike.
                self._length = value
                return
            if value.lower() == b"100-continue":
                self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._offered = self.parser.should_upgrade()
        if self._offered:
            return  # it is read again without the offer
        if self._head_bytes > _MOST_HEAD_BYTES or len(self.headers) > _MOST_HEAD_LINES:
            raise httptools.HttpParserError(_TOO_LONG)
        self._head_bytes = 0
        self._body_left = int(self._length) if self._length else 0
        path = self.url
        if b"?" in path:
            path = path.partition(b"?")[0]
        route = INFERENCE.get(path)
        if route is None:
            path = self._normal_path()
            route = INFERENCE.get(path)
        if self._places.extra:
            self._check_place(path)
        parser = self.parser
        version = parser.get_http_version()
        if version not in _VERSIONS:
            raise httptools.HttpParserError("the server speaks HTTP/1.1 and HTTP/1.0")
        if route is None or parser.get_method() != b"POST":
            self._on_other_headers_complete()
            return
        headers, self.headers = self.headers, _TRAILERS
        modern = version != "1.0"
        caller = self._caller_for(route, headers, modern=modern)
        exchange = Exchange(
            self._relay,
            self,
            route,
            caller,
            target=self.url,
            keep_alive=modern and not self._is_parting and parser.should_keep_alive(),
            chunks=modern,
            expects_continue=modern and self.expect_100_continue,
        )
        if not (modern and caller.ambiguity is None and caller.refusal is None):
            self._refuse_head(exchange, caller, modern=modern)
        self.cycle = exchange  # type: ignore[assignment]
        self._in_head = False
        self._start(exchange)

    def _caller_for(self, route: Route, headers: list[Header], *, modern: bool) -> Caller:
        caller = self._caller
        if (
            modern
            and caller is not None
            and caller.headers == headers
            and caller.route is route
            and caller.version == self._relay.access.version
        ):
            self._is_alike = True
            return caller
        caller = self._caller = read_caller(self._relay, route, headers, modern=modern)
        if modern:
            self._relay.latest_caller = caller
        return caller

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        cycle = self.cycle
        if not isinstance(cycle, Exchange):
            self._body_bytes += len(body)
            super().on_body(body)
        else:
            cycle.body_came(body)

    def on_message_complete(self) -> None:
        if self._offered:
            return
        if self._head_bytes:
            if self._head_bytes > _MOST_HEAD_BYTES:
                raise httptools.HttpParserError(_TOO_LONG)
            self._head_bytes = 0
        self._in_head = True
        self._requests += 1
        cycle = self.cycle
        if not isinstance(cycle, Exchange):
            super().on_message_complete()
        else:
            cycle.request_ended()

    # --- what the limit of connections calls ---

    def quiet_since(self) -> float | None:
        """Return since when the client has sent and taken nothing; None while it waits for an answer."""
        waits_for_body = self._running is not None and not self._running.received
        return None if self._phase() is Phase.ANSWERING and not waits_for_body else self._stopwatch.since

    def drop(self) -> None:
        self.transport.abort()

    # --- what exchanges call ---

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def abort(self) -> None:
        """End the connection at once: the client must not take what came for the whole."""
        self.transport.abort()

    def exchange_ended(self, exchange: Exchange) -> None:
        """The answer has been written, or given up."""
        self._running = None
        if not exchange.keep_alive and not self.transport.is_closing():
            self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        """An answer has ended, of whichever kind: the next request may begin, or the connection rests."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if not self._in_head and self.expect_100_continue:
            self.transport.close()  # whether the body still follows is up to the client
            return
        if self.flow.read_paused:
            self.flow.resume_reading()
        if self._held and not self._parsing_held:
            # Not at once: requests that end as soon as they begin would pile up on the stack.
            self.loop.call_soon(self._parse_held)

    # --- parsing, up to the end of one request ---

    def _is_busy(self) -> bool:
        """Whether the next head waits: for the answer before it, a client that reads, or another daemon."""
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete
        leaving = self._relay.is_leaving and not self._head_bytes
        return self._in_head and (answering or self.flow.write_paused or leaving)

    def _hold(self, data: bytes) -> None:
        # Reading goes on up to the limit, so that a client that leaves is noticed.
        self._held += data
        if len(self._held) > _MOST_HELD_BYTES:
            self.flow.is_full = True
            self.flow.pause_reading()

    def _parse_held(self) -> None:
        if not self._held or self.transport.is_closing() or self._is_busy():
            return
        self.flow.is_full = False
        self.flow.resume_reading()  # before the application gets a body, at which it may pause again
        self._parsing_held = True
        del self._held[: self._parse(self._held)]
        self._parsing_held = False
        self._hold(b"")
        if self._held and not self._is_busy():
            self.loop.call_soon(self._parse_held)

    def _parse(self, data: bytes | bytearray) -> int:
        """Parse up to the end of one request at most; return how many bytes that was.

        A request may be answered within this call. The next one waits for the next turn of the event loop, so
        that a pipe full of requests holds up nobody else.

        The parser is fed up to where one message may end: after its declared length or with `_END`. An `_END`
        within a body in chunks is harmless, parsing goes on from there.
        """
        at, size, requests = 0, len(data), self._requests
        while at < size:
            if self._body_left:
                beyond = size - at - self._body_left
                stop = size if beyond <= 0 else size - beyond
                self._body_left = 0 if beyond >= 0 else -beyond
                self._feed(data, at, stop)
            elif self._requests != requests or self._is_busy():
                break
            elif self._known is None or not (stop := self._begin_alike(data, at, self._known)):
                end = -1 if self._tail else data.find(_END, at)
                stop = end + len(_END) if end >= 0 else self._end_with_tail(data, at)
                is_whole = end >= 0 and self._in_head and not self._head_bytes
                self._head_bytes += stop - at
                self._known = None
                self._feed(data, at, stop)
                if self._is_alike:
                    self._is_alike = False
                    if is_whole:
                        self._know_head(bytes(data[at:stop]))
            at = stop
            if at < size and (self._unreadable or self.transport.is_closing()):
                return size
        return at

    def _feed(self, data: bytes | bytearray, at: int, stop: int) -> None:
        try:
            self.parser.feed_data(data[at:stop] if stop - at < len(data) else data)
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _NoPlaceError):
                self._refuse_for_lack_of_places()
            else:
                self._refuse_unreadable(_plainly(error))
        except httptools.HttpParserUpgrade:
            self._feed_without_offer()
        else:
            if self._head_bytes > _MOST_HEAD_BYTES or len(self.headers) > _MOST_HEAD_LINES:
                self._refuse_unreadable(_TOO_LONG)

    def _know_head(self, head: bytes) -> None:
        """Keep a head that was parsed twice: the next one like it is not parsed again."""
        exchange, caller = self._running, self._caller
        if exchange is None or caller is None or not exchange.keep_alive or exchange.expects_continue:
            return
        length = _LENGTH.search(head)
        if length is not None and caller.ambiguity is None and caller.refusal is None:
            self._known = self._relay.latest_head = KnownHead(
                head[: length.start(1)], head[length.end(1) :], caller, self.url
            )

    def _begin_alike(self, data: bytes | bytearray, at: int, known: KnownHead) -> int:
        """Begin and end a request whose head is a known one but for its length, and whose body is here whole.

        Clients send such heads on a kept connection, and on the next one. To parse one again, header by
        header, takes a tenth of the time of a request.

        Returns:
            Where the request ends; 0 where it is not like that, and the parser has to read it.
        """
        digits_at = at + len(known.before)
        digits_end = data.find(b"\r", digits_at, digits_at + _MOST_DIGITS)
        if (
            digits_end < 0
            or self._head_bytes
            or not self._in_head
            or self._places.extra
            or known.caller.version != self._relay.access.version
            or not data.startswith(known.before, at)
            or not data.startswith(known.after, digits_end)
        ):
            return 0
        digits = data[digits_at:digits_end]
        body_at = digits_end + len(known.after)
        stop = body_at + int(digits) if digits.isdigit() else 0
        if not body_at <= stop <= len(data):
            return 0
        self.url = known.target
        self.expect_100_continue = False
        exchange = Exchange(
            self._relay,
            self,
            known.caller.route,
            known.caller,
            target=known.target,
            keep_alive=True,
            chunks=True,
            expects_continue=False,
        )
        self.cycle = exchange  # type: ignore[assignment]
        self._running = exchange
        self._in_head = False
        exchange.turn_came()
        if stop > body_at:
            exchange.body_came(bytes(data[body_at:stop]))
        self._in_head = True
        self._requests += 1
        exchange.request_ended()
        return stop

    def _end_with_tail(self, data: bytes | bytearray, at: int) -> int:
        """Return where the next `_END` ends, which may have begun before the data, or else its end."""
        tail = self._tail
        found = (tail + data[at:]).find(_END)
        if found >= 0:
            self._tail = b""
            return at + found + len(_END) - len(tail)
        self._tail = (tail + data[max(at, len(data) - len(_END) + 1) :])[1 - len(_END) :]
        return len(data)

    def _feed_without_offer(self) -> None:
        """Read a head again that offers another protocol, without the offer: HTTP/1.1 goes on.

        Some clients offer HTTP/2 with every request. The parser would take what follows such a head for the
        other protocol, where it is the body.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse_unreadable("this is no proxy")
            return
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (method, self.url, version)]
        lines += [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name not in _OFFER]
        if self._length:
            lines.append(b"content-length: %b\r\n" % self._length)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        try:
            self.parser.feed_data(b"".join(lines) + b"\r\n")
        except httptools.HttpParserError as error:
            self._refuse_unreadable(_plainly(error))

    def _refuse_head(self, exchange: Exchange, caller: Caller, *, modern: bool) -> None:
        problem = _problem(caller, modern=modern)
        if caller.refusal is not None:
            address = self.client[0] if self.client else ""
            self._relay.refusals.refused(caller.refusal.reason, address, caller.route.path)
        if problem is not None:
            exchange.refuse(*problem)

    def _check_place(self, path: bytes) -> None:
        place = self._places.place_of(self)
        if place is not Place.ANY and not self._may_take(place, path):
            self._places.refused()
            raise _NoPlaceError

    def _may_take(self, place: Place, path: bytes) -> bool:
        """Whether a request may have a spare place. Without a key, the whole control API is privileged."""
        if path in _HEALTH or place is Place.HEALTH:
            return path in _HEALTH
        access, text = self._relay.access, path.decode("ascii", "replace")
        if access.wants_key:
            return access.check(self.parser.get_method().decode(), text, self.headers).refusal is None
        return spoken_at(text) is None

    def _refuse_for_lack_of_places(self) -> None:
        self._unreadable = True
        self.transport.write(_FULL)
        self.transport.close()

    def _refuse_unreadable(self, why: str) -> None:
        """Answer that nothing from here on can be parsed, as far as an answer is still possible."""
        self._unreadable = True
        message = f"Invalid HTTP request received: {why}"
        if self._running is not None:
            self._running.keep_alive = False
            self._running.refuse_now(400, message)
        else:
            self._refuse(400, message)

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error and close, unless the current request of the control API has its answer."""
        if not self._in_head:
            if self.cycle.response_complete:
                self.transport.close()
                return
            self._disconnect()
            if self.cycle.response_started:
                self.transport.abort()
                return
        content = message.encode()
        head = f"Content-Type: text/plain\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        self.transport.write(STATUS_LINES[status] + head.encode() + content)
        self.transport.close()

    def _disconnect(self) -> None:
        """Tell the application that serves the current request that its client has left."""
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    # --- deadlines ---

    def _phase(self) -> Phase:
        cycle, closing = self.cycle, self.transport.is_closing()
        answering = cycle is not None and not cycle.response_complete
        if self._running is not None and not closing:
            return Phase.ANSWERING  # the exchange looks after its client itself
        if closing or self.transport.get_write_buffer_size():
            return Phase.UNREAD
        if answering:
            if self._in_head or self.flow.read_paused or cycle.waiting_for_100_continue:
                return Phase.ANSWERING
            return Phase.BODY
        if not self._in_head:
            return Phase.SURPLUS
        return Phase.HEAD if cycle is None or self._head_bytes else Phase.IDLE

    def _limit_s(self, phase: Phase) -> float | None:
        match phase:
            case Phase.HEAD:
                return self._deadlines.head_s
            case Phase.BODY | Phase.SURPLUS:
                return self._deadlines.body_s
            case Phase.UNREAD:
                return self._relay.limits.idle_timeout_s
            case Phase.IDLE:
                return self.timeout_keep_alive
            case Phase.ANSWERING:
                return None

    def _bytes_taken(self) -> int:
        """Return a number that grows or shrinks as the client takes what was written."""
        return _tcp_info(self.transport)[1] or self.transport.get_write_buffer_size()

    def _is_unsent(self) -> bool:
        """Return whether something that was written has not reached the client."""
        if self.transport.get_write_buffer_size():
            return True
        peer = self.transport.get_extra_info("socket")
        try:
            return any(fcntl.ioctl(peer.fileno(), termios.TIOCOUTQ, bytes(4)))
        except (OSError, ValueError, AttributeError):
            return False  # it is being closed

    def _too_late(self, phase: Phase) -> None:
        if phase is Phase.BODY:
            self._refuse(408, "the request body did not arrive")
        elif phase is Phase.UNREAD:
            self.transport.abort()
        else:
            self.transport.close()

    # --- helpers ---

    def _normal_path(self) -> bytes:
        """Bring the request target into its normal form, without a key in it; return its path."""
        target = read_target(self.url)
        if target is None:
            raise httptools.HttpParserError("the request target names no path of this server")
        path, keys = without_path_key(target.path)
        self.headers += keys
        self.url = replace(target, path=path).raw
        if target.authority is not None:
            needs_host = self.parser.get_http_version() != "1.0"
            self.headers = self._relay.access.addressed(self.headers, target.authority, needs_host=needs_host)
        return path

    def _on_other_headers_complete(self) -> None:
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers[:] = headers
        if self._length:
            self.headers.append((b"content-length", self._length))
        super().on_headers_complete()
        if self._is_parting:
            self.cycle.keep_alive = False
        self._in_head = False
        self.headers = _TRAILERS

    def _start(self, exchange: Exchange) -> None:
        self._running = exchange
        if self._body_left > self._relay.limits.most_body_bytes:
            exchange.refuse_size()
        exchange.turn_came()
        if exchange.expects_continue and not exchange.received and self._running is exchange:
            self.transport.write(_CONTINUE)


def _problem(caller: Caller, *, modern: bool) -> tuple[int, str, dict[str, str]] | None:
    """Status, message and headers of the refusal that a head deserves; None when it is served."""
    if caller.ambiguity is not None:
        return 400, caller.ambiguity, {}
    if not modern and any(name == b"transfer-encoding" for name, _ in caller.headers):
        return 400, "transfer-encoding needs HTTP/1.1", {}
    refusal = caller.refusal
    return None if refusal is None else (refusal.status, refusal.message, refusal.headers)


def _plainly(error: httptools.HttpParserError) -> str:
    """The message of the parser, or of the callback that ended it."""
    return str(error.__context__ or error).encode("ascii", "replace").decode()


def _tcp_info(transport: asyncio.Transport) -> tuple[int, int]:
    """Return the state of a TCP connection, and how many bytes its peer has acknowledged."""
    peer = transport.get_extra_info("socket")
    if peer is None:
        return _TCP_ESTABLISHED, 0
    try:
        info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:  # it is being closed
        return _TCP_ESTABLISHED, 0
    return info[0], int.from_bytes(info[_TCP_ACKED_AT:], "little")


def _probe_peer(transport: asyncio.Transport) -> None:
    """Let TCP find out within minutes when a quiet peer is gone without a word."""
    peer = transport.get_extra_info("socket")
    if peer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES:
            peer.setsockopt(socket.IPPROTO_TCP, option, value)


def listening_with(
    relay: Relay, connections: ConnectionLimit | None = None, deadlines: Deadlines | None = None
) -> Any:
    """Return what uvicorn's `http` setting takes: it makes the protocol of each connection.

    Args:
        relay: serves the inference requests.
        connections: their limit; None: as many as there are descriptors for.
        deadlines: of the phases of a connection.
    """
    limits = deadlines or Deadlines()
    places = ConnectionLimit() if connections is None else connections
    timers: Timers[Front] = Timers(relay.loop, limits.tick_s)

    def make(**uvicorn: Any) -> asyncio.Protocol:
        return Front(relay, timers, limits, places, **uvicorn)

    return make
