"""The serving process: its listener, its signals, the drain, and the tuning of the interpreter."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from typing import TYPE_CHECKING, NamedTuple, Protocol

import structlog
import uvicorn

from manager.errors import ManagerError
from manager.relay.tls_listener import TlsListener

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from typing import Any

    from manager.relay.connections import ConnectionLimit

_log = structlog.get_logger("daemon")

_BACKLOG = 2048
# SD_LISTEN_FDS_START of sd_listen_fds(3).
_FIRST_LISTEN_FD = 3
# Event streams never end by themselves; every other answer of the control API is shorter than this.
_ASGI_SHUTDOWN_S = 2
# Descriptors beside the client connections and one upstream connection for each. The interpreter, the
# registry, the log and the engine take about 30; an instance takes its lock, its probes and its log.
_OWN_DESCRIPTORS = 64
_DESCRIPTORS_AN_INSTANCE = 4
_FEWEST_CONNECTIONS = 8
# Of all client connections so many are spare, but at least a quarter of the fewest.
_SPARE_SHARE = 32
_LEAST_SPARE = 4
# A limit of "infinity", or that of some container runtimes, is no measure of what one process can serve.
_MOST_DESCRIPTORS = 2**20
_RESERVE = 8
# A replaced daemon looks so often which connections are between two requests.
_MOVE_EVERY_S = 0.01
# A replaced daemon waits so long for the first requests of new connections with TLS.
_PARTS_WITHIN_S = 2.0
_WATCH_EVERY_S = 1.0
_LOG_EVERY_S = 10.0


class Takes(Protocol):
    """The daemon that replaces this one; see `manager.handover.Successor`."""

    @property
    def has_ended(self) -> bool: ...

    async def decided(self) -> None:
        """Return once it serves or has ended."""

    def take(self, peer: int, held: bytes) -> bool: ...


class Secure(NamedTuple):
    """TLS of the listener: the context of the next handshake, and what counts the connections."""

    context: Callable[[], ssl.SSLContext]
    places: ConnectionLimit


class Drain(Protocol):
    """Wait until open requests have ended, `timeout_s` has passed or `cut` is set; then cut the rest."""

    async def __call__(self, timeout_s: float, *, cut: asyncio.Event) -> None: ...


class Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process before our own clean-up.

    The first `stop` drains open streams; the second one cuts them. `leave_to` drains them too, and gives the
    connections to another daemon meanwhile.

    Attributes:
        heir: the daemon that replaces this one, None while none does.
        accepts: set once it has begun to accept connections.
        is_stopped: whether `stop` was called.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        drains: Sequence[Drain],
        drain_timeout_s: float,
        *,
        secure: Secure | None = None,
    ) -> None:
        super().__init__(config)
        self._secure = secure
        self._drains = drains
        self._drain_timeout_s = drain_timeout_s
        self._cut = asyncio.Event()
        self.heir: Takes | None = None
        self.accepts = asyncio.Event()
        self.is_stopped = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        if self.is_stopped:
            self._cut.set()
        else:
            _log.info("ending", drains_s=self._drain_timeout_s, hint="a second signal cuts open requests")
        self.is_stopped = self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._secure is None:
            await super().startup(sockets)
        else:
            await super().startup([])
            for listener in sockets or []:
                secure = TlsListener(listener, self._protocol, self._secure.context, self._secure.places)
                self.servers.append(secure)  # type: ignore[arg-type]  # closed like the others
        self.accepts.set()

    async def adopt(self, peer: socket.socket, held: bytes) -> None:
        """Serve a client's connection that another daemon has given away, with the bytes that it had read."""
        loop = asyncio.get_running_loop()
        protocol = self._protocol()
        protocol.begin_with(held)
        try:
            await loop.connect_accepted_socket(lambda: protocol, peer)
        except OSError:
            peer.close()  # the client has left meanwhile

    def _protocol(self) -> Any:
        make: Any = self.config.http_protocol_class
        loop = asyncio.get_running_loop()
        return make(config=self.config, server_state=self.server_state, app_state={}, _loop=loop)

    async def part(self) -> None:
        """Close the connections with TLS between two requests; accept nothing from now on.

        Nobody else can go on with them. Those whose answer is under way end after it. Handshakes and first
        requests have `_PARTS_WITHIN_S`, while requests can still begin here.
        """
        if self._secure is None:
            return
        self.stop_accepting()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _PARTS_WITHIN_S
        while True:
            waits = loop.time() < deadline
            new = [one for one in tuple(self.server_state.connections) if self._is_new(one, waits=waits)]
            if not waits or not (new or any(server.handshakes for server in self._tls_listeners())):
                return
            await asyncio.sleep(_MOVE_EVERY_S)

    def _tls_listeners(self) -> list[TlsListener]:
        servers: Sequence[Any] = self.servers
        return [server for server in servers if isinstance(server, TlsListener)]

    @staticmethod
    def _is_new(connection: Any, *, waits: bool) -> bool:
        """Have a connection with TLS part; whether its first request is still to come."""
        return bool(connection.is_tls and not connection.part(waits=waits) and connection.rests)

    def stop_accepting(self) -> None:
        """Accept nothing from now on. Connections wait in the listener, if somebody else has it too."""
        for server in self.servers:
            server.close()

    def leave_to(self, heir: Takes) -> None:
        """End, and give each connection to the daemon that takes over, between two of its requests."""
        self.heir = heir
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.stop_accepting()
        for listener in sockets or []:
            listener.close()
        left_s = self._drain_timeout_s if self.heir is None else await self._give_connections(self.heir)
        for secure in self._tls_listeners():
            secure.end_handshakes()
        for connection in tuple(self.server_state.connections):
            connection.shutdown()
        await asyncio.gather(*(drain(left_s, cut=self._cut) for drain in self._drains))
        await super().shutdown(sockets)

    async def _give_connections(self, heir: Takes) -> float:
        """Give each connection away when its answer has ended. Return the seconds that are left of the drain.

        Answers of the control API without an end, such as `/events`, are not waited for.
        """
        loop = asyncio.get_running_loop()
        deciding = asyncio.ensure_future(heir.decided())
        cutting = asyncio.ensure_future(self._cut.wait())
        await asyncio.wait({deciding, cutting}, return_when=asyncio.FIRST_COMPLETED)
        for waiting in (deciding, cutting):
            waiting.cancel()
        deadline = loop.time() + self._drain_timeout_s
        while not self._cut.is_set() and loop.time() < deadline:
            left = [one for one in tuple(self.server_state.connections) if not self._is_given(one, heir)]
            if not left:
                break
            await asyncio.sleep(_MOVE_EVERY_S)
        return max(0.0, deadline - loop.time())

    def _is_given(self, connection: Any, heir: Takes) -> bool:
        """Whether a connection was given away, or is not to be waited for."""
        given: bool = connection.leave(heir.take)
        return given or connection.streams or (connection.rests and (heir.has_ended or self.is_stopped))


def server_config(app: Any, http: Any) -> uvicorn.Config:
    """The settings of uvicorn.

    Args:
        app: the ASGI application of the control API.
        http: makes the protocol of each client connection.
    """
    return uvicorn.Config(
        app,
        http=http,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_ASGI_SHUTDOWN_S,
    )


async def serve_until_stopped(
    server: Server,
    listener: socket.socket,
    running: asyncio.Future[None],
    *,
    before_end: Callable[[], Awaitable[object]] | None = None,
    on_hangup: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, or until the background loops end.

    Args:
        server: started here.
        listener: already bound.
        running: the background loops of the daemon; cancelled once the server has stopped, or before
            `Server.leave_to` is called.
        on_hangup: called at SIGHUP, which never ends the process.
        before_end: awaited after a signal, after the last request and before the loops are cancelled.

    Raises:
        BaseExceptionGroup: a background loop failed.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        await asyncio.wait({running, serving}, return_when=asyncio.FIRST_COMPLETED)
        if running.done() and not running.cancelled():
            _log.critical("a background loop ended; the daemon stops")
        if not running.cancelled():
            server.stop()
        await serving
        if running.cancelled():
            pass  # another daemon has taken over
        elif running.done():
            running.result()
        elif before_end is not None:
            await before_end()
    finally:
        running.cancel()
        await asyncio.wait({running})


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one; return the limit that holds.

    The usual soft limit of 1,024 only protects programs that call select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    _log.info("descriptor_limit_raised", soft=soft, raised_to=wanted)
    return wanted


class ConnectionBudget(NamedTuple):
    """Limits of client connections: `most` of any kind, and `spare` for privileged requests."""

    most: int
    spare: int


def connection_budget(descriptors: int, instances: int) -> ConnectionBudget:
    """Share out the descriptors: each client connection may need an upstream connection."""
    own = _OWN_DESCRIPTORS + _DESCRIPTORS_AN_INSTANCE * instances
    total = max((descriptors - own) // 2, _FEWEST_CONNECTIONS)
    spare = max(total // _SPARE_SHARE, _LEAST_SPARE)
    return ConnectionBudget(total - spare, spare)


class DescriptorWatch:
    """Notices that no descriptor is left, and holds some in reserve for that case.

    Nothing else reports it: at EMFILE and ENFILE libuv accepts and closes the new connection (seen with
    uvloop 0.23; `uv__emfile_trick` in libuv's src/unix/stream.c). The watch opens a file every second. If
    that fails it logs, closes the reserve, so that a few connections can be accepted, and calls `release`.

    Args:
        release: closes what is idle; returns how many descriptors that frees.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, release: Callable[[], int]) -> None:
        self._loop = loop
        self._release = release
        self._reserve: list[int] = []
        self._logged_at: float | None = None
        self._look()

    def stop(self) -> None:
        self._timer.cancel()
        self._close_reserve()

    def _look(self) -> None:
        self._timer = self._loop.call_later(_WATCH_EVERY_S, self._look)
        try:
            while len(self._reserve) <= _RESERVE:
                self._reserve.append(os.open(os.devnull, os.O_RDONLY))
            os.close(self._reserve.pop())
        except OSError as error:
            self._close_reserve()
            self._report(error, self._release())

    def _close_reserve(self) -> None:
        while self._reserve:
            os.close(self._reserve.pop())

    def _report(self, error: OSError, released: int) -> None:
        now = self._loop.time()
        if self._logged_at is None or now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            _log.error(
                "descriptors_exhausted",
                problem=error.strerror,
                limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
                released=released,
                hint="new connections are closed at once; raise the limit of open files (ulimit -n)",
            )


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket.

    Raises:
        ManagerError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        message = f"cannot listen on {url_of(host, port)}: {os.strerror(error.errno or 0)}"
        raise ManagerError(message) from error
    with listener:
        yield listener


def inherited_listener(host: str, port: int) -> socket.socket | None:
    """Return the listener that systemd has opened for this process (sd_listen_fds(3)), None without one.

    Raises:
        ManagerError: systemd has passed something else than one listener on this address.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit() or int(count) == 0:
        return None
    wanted = f"one listening TCP socket on server.host and server.port, {url_of(host, port)}"
    if count != "1":
        raise ManagerError(f"systemd passes {count} sockets; expected {wanted}")
    try:
        listener = socket.socket(fileno=_FIRST_LISTEN_FD)
        listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ManagerError(f"descriptor 3 is not {wanted}: {error.strerror or error}") from error
    if not listens or not is_bound_to(listener, host, port):
        raise ManagerError(f"systemd passes a socket on {listener.getsockname()}; expected {wanted}")
    listener.set_inheritable(False)
    listener.setblocking(False)
    return listener


def is_bound_to(listener: socket.socket, host: str, port: int) -> bool:
    """Whether a listening TCP socket has this address."""
    if listener.family not in (socket.AF_INET, socket.AF_INET6) or listener.type != socket.SOCK_STREAM:
        return False
    try:
        found = socket.getaddrinfo(host, port, listener.family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return listener.getsockname()[:2] in {address[:2] for *_, address in found}


def url_of(host: str, port: int, *, tls: bool = False) -> str:
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def tune_interpreter() -> None:
    """Keep pauses of the interpreter short once the daemon is built.

    A full garbage collection over all objects built so far took 80 ms; they are frozen. Requests leave no
    cycles behind, so collections are rare. The short switch interval returns the interpreter to the
    event loop ten times sooner while a thread talks to the engine.
    """
    gc.unfreeze()  # of a daemon that was not replaced after all
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 20, 50)
    sys.setswitchinterval(0.0005)
