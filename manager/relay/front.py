"""The callers' side: uvicorn's own protocol, which keeps the inference requests for the relay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from manager.relay.caller import read_caller
from manager.relay.exchange import Exchange
from manager.wire.paths import read_target
from manager.wire.routes import INFERENCE

if TYPE_CHECKING:
    import asyncio

    from manager.relay.caller import Caller
    from manager.relay.relay import Relay
    from manager.wire.routes import Route

_MOST_HEAD_BYTES = 64 * 1024
# What callers send on while an answer is under way is held up to here; beyond it they have to wait.
_MOST_HELD_BYTES = 64 * 1024
_OFFER = frozenset({b"upgrade", b"http2-settings"})
# How long the head of the first request may take; between requests uvicorn's own limit holds.
_FIRST_HEAD_S = 60.0
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Front(HttpToolsProtocol):
    """One connection of a caller. Its requests come in any mixture, one after the other.

    An `Exchange` takes the place of uvicorn's cycle for the requests of the relay, so that keep-alive and
    pipelining are the same for both. Written against uvicorn 0.54.
    """

    def __init__(self, relay: Relay, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._relay = relay
        self._in_head = True
        # What has come since the last piece of a body: a head, or what frames a body in chunks.
        self._head_bytes = 0
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._running: Exchange | None = None
        self._asgi: Any = None
        self._next_waits = False
        self._feeding = False
        self._offered = False
        self._speechless: asyncio.TimerHandle | None = None
        self._length = b""
        self._caller: Caller | None = None
        self._resting_since = 0.0
        self._rest: asyncio.TimerHandle | None = None

    # --- what the transport calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._speechless = self.loop.call_later(_FIRST_HEAD_S, self._no_head_came)

    def data_received(self, data: bytes) -> None:
        if self._held or self._must_wait():
            # Reading goes on, so that a caller who leaves is noticed; parsing waits for its turn.
            self._held.append(data)
            self._held_bytes += len(data)
            if self._held_bytes > _MOST_HELD_BYTES:
                self.flow.pause_reading()
            return
        self._feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        running, self._running = self._running, None
        asgi, self._asgi = self._asgi, None
        self._held.clear()
        self.pipeline.clear()
        if self._rest is not None:
            self._rest.cancel()
        if self._speechless is not None:
            self._speechless.cancel()
        super().connection_lost(exc)
        if asgi is not None and not asgi.response_complete:
            # uvicorn tells only the request that came last, which may be one behind this in the pipe.
            asgi.disconnected = True
            asgi.message_event.set()
        if running is not None:
            running.caller_left()
        elif isinstance(self.cycle, Exchange):
            self.cycle.caller_left()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._running is not None:
            self._running.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._running is not None:
            self._running.resume()
        if self._next_waits:
            self._next_waits = False
            self._start_next()
        if self._held:
            self.loop.call_soon(self._feed_held)

    def shutdown(self) -> None:
        if self._running is not None:
            self._running.keep_alive = False
        super().shutdown()

    # --- what the parser calls ---

    def on_message_begin(self) -> None:
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._length = b""

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length":
            # The parser has checked it, and frames by it; without it the heads of a connection are alike.
            self._length = value
            return
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._offered = self.parser.should_upgrade()
        if self._offered:
            return  # it is read again without the offer
        if self._head_bytes > _MOST_HEAD_BYTES:
            self._refuse_long_head()
        self._head_bytes = 0
        path = self.url
        if b"?" in path:
            path = path.partition(b"?")[0]
        route = INFERENCE.get(path)
        if route is None:
            route = self._route_of_normal_path()
        parser = self.parser
        if route is None or parser.get_method() != b"POST":
            self._on_other_headers_complete()
            return
        # Trailers come as headers too: they must not be taken for what the head said.
        headers, self.headers = self.headers, []
        modern = parser.get_http_version() != "1.0"
        caller = self._caller
        if caller is None or caller.headers != headers:
            caller = self._caller = read_caller(self._relay, route.path, headers, modern=modern)
        exchange = Exchange(
            self._relay,
            self,
            route,
            caller,
            target=self.url,
            keep_alive=modern and parser.should_keep_alive(),
            chunks=modern,
            expects_continue=modern and self.expect_100_continue,
        )
        problem = _problem(caller, modern=modern)
        if problem is not None:
            exchange.refuse(*problem)
        before, self.cycle = self.cycle, exchange  # type: ignore[assignment]
        if before is None or before.response_complete:
            self._start(exchange)
        else:
            self.pipeline.appendleft((exchange, self.app))  # type: ignore[arg-type]

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        if self._offered:
            return
        if isinstance(self.cycle, Exchange):
            self.cycle.body_came(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head = True
        if self._offered:
            return
        if isinstance(self.cycle, Exchange):
            self.cycle.request_ended()
        else:
            super().on_message_complete()

    # --- what exchanges call ---

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def abort(self) -> None:
        """End the connection at once: the caller must not take what came for the whole."""
        self.transport.abort()

    def exchange_ended(self, exchange: Exchange) -> None:
        """The answer has been written, or given up."""
        self._running = None
        if not exchange.keep_alive and not self.transport.is_closing():
            self.transport.close()
        self.on_response_complete()
        if self._running is None and self._held and not self._feeding:
            # Not at once: requests that end as soon as they begin would pile up on the stack.
            self.loop.call_soon(self._feed_held)

    def on_response_complete(self) -> None:
        """An answer has ended, of whichever kind: the next request may begin, or the connection rests."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_next()
            if not self._next_waits:
                return
        # One timer that looks when the rest began costs less than one that is set and cancelled each time.
        self._resting_since = self.loop.time()
        if self._rest is None:
            self._rest = self.loop.call_later(self.timeout_keep_alive, self._rest_over)

    # --- helpers ---

    def _must_wait(self) -> bool:
        """Whether what comes now is not to be read yet: it would pile up here, whatever it is."""
        running, latest = self._running, self.cycle
        if running is not None and running.received:
            return True
        if isinstance(latest, Exchange) and latest.received and not latest.response_complete:
            return True  # it waits for its turn
        if self.pipeline and getattr(self.pipeline[-1][0], "received", False):
            return True  # the next waits, and perhaps a part of one behind it
        return self._in_head and self.flow.write_paused  # the caller has not taken the answers so far

    def _feed(self, data: bytes) -> None:
        self._resting_since = 0.0
        self._head_bytes += len(data)
        self._feeding = True
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._refuse_unreadable(_plainly(error))
        except httptools.HttpParserUpgrade as offer:
            self._feeding = False
            self._feed_without_offer(data[offer.args[0] :])
            return
        self._feeding = False
        if self._head_bytes > _MOST_HEAD_BYTES and not self.transport.is_closing():
            self._refuse_unreadable("the head is too long" if self._in_head else "the trailers are too long")
        elif self._held and self._running is None:
            self.loop.call_soon(self._feed_held)

    def _refuse_unreadable(self, why: str) -> None:
        """Nothing that follows can be understood; what was understood before is still answered."""
        message = f"Invalid HTTP request received: {why}"
        latest = self.cycle
        if not isinstance(latest, Exchange) or latest.response_complete:
            self.send_400_response(message)
        elif latest.received:
            latest.keep_alive = False
        else:
            latest.refuse_now(400, message)

    def _refuse_long_head(self) -> None:
        """The head came together with much else: what counts is its own length."""
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > _MOST_HEAD_BYTES:
            raise httptools.HttpParserError("the head is too long")

    def _feed_without_offer(self, rest: bytes) -> None:
        """Read a request again that offers another protocol, without the offer: HTTP/1.1 goes on.

        Some clients offer HTTP/2 with every request. The parser takes what follows such a head for the other
        protocol already, where it is the body.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("Invalid HTTP request received: this is no proxy")
            return
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b\r\n" % (method, self.url, version)]
        lines += [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name not in _OFFER]
        if self._length:
            lines.append(b"content-length: %b\r\n" % self._length)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._in_head = True
        self._feed(b"".join(lines) + b"\r\n" + rest)

    def _no_head_came(self) -> None:
        """Who connects and never asks for anything holds a socket for nothing."""
        if self.cycle is None and not self.transport.is_closing():
            self.transport.abort()

    def _rest_over(self) -> None:
        self._rest = None
        if self.transport.is_closing() or not self._resting_since:
            return  # a request has begun: its end sets the timer again
        rest_s = self.loop.time() - self._resting_since
        if self.transport.get_write_buffer_size():
            # The answer has not been taken yet; who never takes it holds the connection only so long.
            left_s = self._relay.limits.idle_timeout_s - rest_s
            end = self.transport.abort
        else:
            left_s = self.timeout_keep_alive - rest_s
            end = self.transport.close
        if left_s <= 0:
            end()
        else:
            self._rest = self.loop.call_later(min(left_s, self.timeout_keep_alive), self._rest_over)

    def _feed_held(self) -> None:
        if not self._held or self.transport.is_closing() or self._must_wait():
            return
        data = b"".join(self._held)
        self._held.clear()
        self._held_bytes = 0
        self.flow.resume_reading()
        self._feed(data)

    def _route_of_normal_path(self) -> Route | None:
        """Bring the request target into its normal form; return the inference route that it then names."""
        target = read_target(self.url)
        if target is None:
            raise httptools.HttpParserError("the request target names no path of this server")
        self.url = target.raw
        if target.authority is not None:
            needs_host = self.parser.get_http_version() != "1.0"
            self.headers = self._relay.access.addressed(self.headers, target.authority, needs_host=needs_host)
        return INFERENCE.get(target.path)

    def _on_other_headers_complete(self) -> None:
        url, headers, expect = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect
        self.headers[:] = headers
        if self._length:
            self.headers.append((b"content-length", self._length))
        super().on_headers_complete()
        if self._running is not None:
            self.flow.resume_reading()  # or nobody would notice that the caller leaves

    def _start_next(self) -> None:
        if self.flow.write_paused:
            self._next_waits = True  # or answers that nobody takes would pile up
        elif self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._resting_since = 0.0
        if isinstance(cycle, Exchange):
            self.loop.call_soon(self._start, cycle)
        else:
            self._asgi = cycle
            super()._start_asgi_task(cycle, app)

    def _start(self, exchange: Exchange) -> None:
        if self.transport.is_closing():
            return
        self._resting_since = 0.0
        self._running = exchange
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
    """What the parser says, or what was said to it from a callback."""
    return str(error.__context__ or error).encode("ascii", "replace").decode()


def listening_with(relay: Relay) -> Any:
    """What uvicorn's `http` setting takes: makes the protocol of each connection."""

    def make(**uvicorn: Any) -> asyncio.Protocol:
        return Front(relay, **uvicorn)

    return make
