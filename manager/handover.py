"""Replaces a running daemon without losing a request: it hands over its listener, then its connections.

Both daemons are on one machine and belong to one user, or the new one to root. They talk over the socket that
claims the manager id (`adapters.owner.ManagerIdLock`):

1. The new daemon asks, and names its state directory.
2. The old one waits until no instance starts or stops, no model is pulled and no async run executes. After
   the drain time it refuses, unless only runs execute: those are interrupted. It stops accepting, stores its
   state and gives up its claims. It answers with its listener; connections that come meanwhile wait in there.
   With it goes a stream over which both share slots and open requests (`manager.remaining`).
3. The new one takes the claims, reads the state and serves.
4. The old one ends the answers under way, with the instances that run. Each connection of a client moves
   between two requests, with what the client has already sent of the next one. None is closed, but those
   with TLS: their keys are this process's, so each is closed between two requests, before step 2, and its
   client connects again. What ends there goes into the history of the new one.

If the new daemon ends before it serves, the old one serves again.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from manager.adapters.owner import is_same_user
from manager.descriptors import lacks_descriptors
from manager.errors import ManagerError
from manager.serving import is_bound_to

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator
    from pathlib import Path

    from manager.relay.relay import Relay
    from manager.remaining import Remaining
    from manager.serving import Server

_log = structlog.get_logger("handover")

_MOST_MESSAGE = 4096
# What is tried again: a full buffer, and too many descriptors on their way.
_FULL = (errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)
# A process that connects and does not ask is hung up on.
_ASKS_WITHIN_S = 2.0
# A new daemon that does not serve within this time has failed.
_SERVES_WITHIN_S = 60.0
_MOST_ASKING = 16
_LOOK_EVERY_S = 0.05
# How long a new daemon waits for the claims, once the old one has said that it lets go.
CLAIMS_WITHIN_S = 5.0
_SERVING = b"S"
_CONNECTION = b"C"
_REQUESTS = b"R"
_ASKS = b"replace"


# --- the old daemon -----------------------------------------------------------------------------------------


class PausableRuns(Protocol):
    """Async runs; see `manager.services.runs.runs.Runs`."""

    @property
    def is_executing(self) -> bool: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Successor:
    """The daemon that asked to replace this one. Lives on the event loop.

    `is_serving` is whether it has said that it serves; `has_ended` whether it is gone.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(channel.fileno(), self._read)
        self._decided = asyncio.Event()
        self.is_serving = False
        self.has_ended = False

    async def decided(self) -> None:
        """Return once it serves or has ended; one that does neither in time is hung up on."""
        try:
            async with asyncio.timeout(_SERVES_WITHIN_S):
                await self._decided.wait()
        except TimeoutError:
            self._end()

    def refuse(self, why: str) -> None:
        """Tell it that it cannot replace this daemon."""
        self._send(json.dumps({"refused": why}).encode())
        self.close()

    def hand_over(self, listener: socket.socket, line: socket.socket) -> None:
        """Give it the listener: this daemon has given up its claims.

        Args:
            listener: of this daemon.
            line: the new daemon's end of the stream of `manager.remaining`.
        """
        self._send(json.dumps({"released": os.getpid()}).encode(), listener.fileno(), line.fileno())

    def take(self, peer: int, held: bytes) -> bool:
        """Give it a client's connection; whether it could be sent.

        Args:
            peer: the descriptor, which stays the caller's to close.
            held: what the client has sent of its next request.
        """
        if not self.is_serving or self.has_ended:
            return False
        if not held:
            return self._send(_CONNECTION, peer)
        # It may be more than a message takes.
        file = os.memfd_create("held", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(file), "wb") as stream:
                stream.write(held)
            return self._send(_CONNECTION, peer, file)
        finally:
            os.close(file)

    def take_requests(self, encoded: bytes) -> bool:
        """Give it requests that have ended, for its history; whether they could be sent."""
        file = os.memfd_create("requests", os.MFD_CLOEXEC)
        try:
            with os.fdopen(os.dup(file), "wb") as stream:
                stream.write(encoded)
            return self.is_serving and self._send(_REQUESTS, file)
        finally:
            os.close(file)

    def close(self) -> None:
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()

    def _end(self) -> None:
        self.has_ended = True
        self._decided.set()
        self.close()

    def _send(self, message: bytes, *descriptors: int) -> bool:
        if self.has_ended or self._channel.fileno() < 0:
            return False
        try:
            socket.send_fds(self._channel, [message], list(descriptors))
        except OSError as error:
            if error.errno not in _FULL:
                self._end()
            return False
        return True

    def _read(self) -> None:
        try:
            message = self._channel.recv(len(_SERVING))
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if message == _SERVING:
            self.is_serving = True
            self._decided.set()
        else:
            self._end()


class Succession:
    """Waits for a daemon that asks to replace this one. Lives on the event loop; `close` ends the waiting.

    Args:
        claim: the listening socket of the manager id, None where there is none: nobody can ask then.
        state_dir: of this daemon; another one cannot be taken over.
        ask: called with each daemon that asks; it hands over or refuses.
    """

    def __init__(
        self, claim: socket.socket | None, state_dir: Path, ask: Callable[[Successor], object]
    ) -> None:
        self._claim = claim
        self._state_dir = state_dir
        self._ask = ask
        self._loop = asyncio.get_running_loop()
        self._asking: dict[socket.socket, asyncio.TimerHandle] = {}
        self._pause: asyncio.TimerHandle | None = None
        if claim is not None:
            claim.setblocking(False)
            self._listen()

    def close(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            self._loop.remove_reader(claim.fileno())
        if self._pause is not None:
            self._pause.cancel()
        for channel in tuple(self._asking):
            self._hang_up(channel)

    def _accept(self) -> None:
        assert self._claim is not None  # noqa: S101  (no reader without it)
        try:
            channel, _ = self._claim.accept()
        except OSError as error:
            if lacks_descriptors(error):
                # It stays readable: look again in a while.
                self._loop.remove_reader(self._claim.fileno())
                self._pause = self._loop.call_later(_ASKS_WITHIN_S, self._listen)
            return
        if len(self._asking) >= _MOST_ASKING or not is_same_user(channel):
            channel.close()
            return
        channel.setblocking(False)
        self._asking[channel] = self._loop.call_later(_ASKS_WITHIN_S, self._hang_up, channel)
        self._loop.add_reader(channel.fileno(), self._read, channel)

    def _listen(self) -> None:
        if self._claim is not None:
            self._loop.add_reader(self._claim.fileno(), self._accept)

    def _read(self, channel: socket.socket) -> None:
        message, descriptors = _received(channel)
        if message is None:
            return
        identities = [_identity_of(descriptor) for descriptor in descriptors]
        for descriptor in descriptors:
            os.close(descriptor)
        if message != _ASKS:  # it only looked whether the id is held
            self._hang_up(channel)
            return
        self._forget(channel)
        successor = Successor(channel)
        if identities != [_identity_of(self._state_dir)]:
            successor.refuse(
                f"the daemon that serves this manager_id has another state directory: {self._state_dir}"
            )
            return
        self._ask(successor)

    def _forget(self, channel: socket.socket) -> None:
        self._asking.pop(channel).cancel()
        self._loop.remove_reader(channel.fileno())

    def _hang_up(self, channel: socket.socket) -> None:
        self._forget(channel)
        channel.close()


class Heir:
    """Takes connections of a replaced daemon: the successor, or a server of this process if that fails."""

    def __init__(self, successor: Successor) -> None:
        self._successor = successor
        self._server: Server | None = None
        self._inherit: Callable[[bytes], None] | None = None
        self._adopting: set[asyncio.Task[None]] = set()

    @property
    def has_ended(self) -> bool:
        """Whether nobody takes connections any more."""
        return self._successor.has_ended and self._successor.is_serving

    async def decided(self) -> None:
        """See `Successor.decided`."""
        await self._successor.decided()

    def stand_in(self, server: Server, inherit: Callable[[bytes], None]) -> None:
        """Take connections to a server of this process: the successor has ended before it served.

        Args:
            server: gets the connections.
            inherit: gets requests that have ended.
        """
        self._server, self._inherit = server, inherit

    def take(self, peer: int, held: bytes) -> bool:
        """See `Successor.take`."""
        if self._server is None:
            return self._successor.take(peer, held)
        adopting = self._server.adopt(socket.socket(fileno=os.dup(peer)), held)
        _keep(self._adopting, asyncio.ensure_future(adopting))
        return True

    def take_requests(self, encoded: bytes) -> bool:
        """See `Successor.take_requests`."""
        if self._inherit is None:
            return self._successor.take_requests(encoded)
        self._inherit(encoded)
        return True


def _keep(tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    tasks.add(task)
    task.add_done_callback(tasks.discard)


class Giving:
    """Gives everything to a daemon that asks for it, at most once at a time.

    Args:
        server: of this daemon.
        relay: of this daemon; begins no request once it gives.
        listener: of this daemon.
        remaining: the open requests, which this daemon ends.
        running: its background loops; cancelled here.
        is_busy: whether something goes on that only this daemon can end, such as a start.
        runs: the async runs; none begins once it gives, and those that execute are waited for.
        freeze: called before the loops are cancelled: nothing is begun that needs them.
        let_go: stores the state and gives up the claims, once the loops have ended.
        patience_s: how long it waits while `is_busy`.
        failed: called with the listener and the heir when the other daemon has ended before it served.
    """

    def __init__(
        self,
        server: Server,
        relay: Relay,
        listener: socket.socket,
        remaining: Remaining,
        running: asyncio.Future[None],
        *,
        is_busy: Callable[[], bool],
        runs: PausableRuns,
        freeze: Callable[[], None],
        let_go: Callable[[], Awaitable[None]],
        patience_s: float,
        failed: Callable[[socket.socket, Heir], None],
    ) -> None:
        self._server = server
        self._relay = relay
        self._listener = listener
        self._remaining = remaining
        self._running = running
        self._is_busy = is_busy
        self._runs = runs
        self._freeze = freeze
        self._let_go = let_go
        self._patience_s = patience_s
        self._failed = failed
        self._task: asyncio.Task[None] | None = None
        self._successor: Successor | None = None
        self._heir: Heir | None = None

    def begin(self, successor: Successor) -> None:
        """Hand over to this daemon soon, or refuse."""
        if self._server.should_exit or (self._task is not None and not self._task.done()):
            successor.refuse("it ends, or is being replaced already")
        else:
            self._successor = successor
            self._task = asyncio.ensure_future(self._give(successor))

    async def end(self, hand_over: Callable[[Callable[[bytes], bool]], Awaitable[None]]) -> None:
        """End. Where another daemon has taken over, `hand_over` gives it the last requests of this one."""
        if self._heir is not None:
            await hand_over(self._heir.take_requests)
        if self._task is not None:
            self._task.cancel()
        self._remaining.close()
        if self._successor is not None:
            self._successor.close()

    async def _give(self, successor: Successor) -> None:
        try:
            self._runs.pause()
            if await self._is_quiet(successor):
                await self._hand_over(successor)
            else:
                self._runs.resume()
        except Exception as error:  # noqa: BLE001  (nobody awaits it)
            _log.error("handover_failed", exc_info=error)
            self._server.stop()
            successor.refuse("the running daemon failed; its log says more")

    async def _hand_over(self, successor: Successor) -> None:
        await self._server.part()
        _log.info("replaced", hint="open requests end here, the new daemon takes all others")
        self._relay.is_leaving = True
        self._freeze()
        kept = self._listener.dup()
        self._server.stop_accepting()
        self._running.cancel()
        try:
            await asyncio.wait({self._running})
            await self._let_go()
            with self._remaining.begin() as line:
                successor.hand_over(kept, line)
            heir = self._heir = Heir(successor)
            self._server.leave_to(heir)
            await successor.decided()
            if successor.is_serving:
                await self._remaining.confirmed()
            elif not self._server.is_stopped:
                self._failed(kept.dup(), heir)
        finally:
            kept.close()

    async def _is_quiet(self, successor: Successor) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_s
        await asyncio.sleep(0)  # one that has left at once is noticed
        if self._runs.is_executing:
            _log.info("replacement_waits", for_s=self._patience_s, hint="async runs end first")
        while (is_busy := self._is_busy()) or self._runs.is_executing:
            is_late = loop.time() >= deadline
            if is_late and not is_busy:
                break  # the runs are interrupted
            if self._server.should_exit or is_late:
                successor.refuse("an instance starts or stops, or a model is pulled; try again after that")
                return False
            await asyncio.sleep(_LOOK_EVERY_S)
            if successor.has_ended:
                return False
        if self._server.should_exit:
            successor.refuse("it ends")
        return not self._server.should_exit and not successor.has_ended


def _identity_of(directory: Path | int) -> tuple[int, int]:
    """Device and inode, which are the same whatever path leads there; zeros where there is none yet."""
    try:
        status = os.stat(directory)  # noqa: PTH116  (also of a descriptor)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def _received(channel: socket.socket) -> tuple[bytes | None, list[int]]:
    """Return a message and its descriptors: None where none is here yet, empty at the end."""
    try:
        return _received_now(channel)
    except BlockingIOError:
        return None, []
    except OSError:
        return b"", []


def _received_now(channel: socket.socket) -> tuple[bytes, list[int]]:
    message, descriptors, _, _ = socket.recv_fds(channel, _MOST_MESSAGE, 2)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # Python 3.11 passes no flags to recvmsg(2)
    return message, descriptors


# --- the new daemon -----------------------------------------------------------------------------------------


class Predecessor:
    """The daemon that this one replaces: it has given up its claims and waits for `serves`.

    Attributes:
        line: the end of the stream of `manager.remaining`; None where it is of a version without that.
        has_ended: whether it has ended its last request.
    """

    def __init__(
        self, channel: socket.socket, listener: socket.socket, line: socket.socket | None, pid: int
    ) -> None:
        self._channel = channel
        self._listener = listener
        self._adopting: set[asyncio.Task[None]] = set()
        self.line = line
        self.pid = pid
        self.has_ended = False

    def usable_listener(self, host: str, port: int) -> socket.socket | None:
        """Return its listener; None, and the listener is closed, where this daemon has another address."""
        if is_bound_to(self._listener, host, port):
            return self._listener
        self._listener.close()
        return None

    def serves(
        self,
        adopt: Callable[[socket.socket, bytes], Coroutine[Any, Any, None]],
        inherit: Callable[[bytes], None],
    ) -> None:
        """Say that this daemon serves.

        Args:
            adopt: takes each connection that the old daemon gives away, and what the client has already sent.
            inherit: takes requests that ended there, for the history.
        """
        channel, loop = self._channel, asyncio.get_running_loop()
        channel.setblocking(False)

        def read() -> None:
            while True:
                message, descriptors = _received(channel)
                if message is None:
                    return
                if not message:
                    loop.remove_reader(channel.fileno())
                    channel.close()
                    self.has_ended = True
                    return
                if message == _REQUESTS:
                    for file in descriptors:
                        inherit(_content(file))
                elif descriptors:
                    peer, held = socket.socket(fileno=descriptors[0]), b""
                    for file in descriptors[1:]:
                        held = _content(file)
                    _keep(self._adopting, loop.create_task(adopt(peer, held)))

        loop.add_reader(channel.fileno(), read)
        with suppress(OSError):  # the old daemon has ended: it had no more to give
            channel.send(_SERVING)


def _content(descriptor: int) -> bytes:
    """Return what a file in memory holds, and close it."""
    with os.fdopen(descriptor, "rb") as stream:
        stream.seek(0)
        return stream.read()


def replace_daemon(channel: socket.socket, state_dir: Path, *, within_s: float) -> Predecessor | None:
    """Ask the daemon at the other end to give up its claims; waits until it has.

    An open descriptor of the state directory goes along: only a process that may open it can ask.

    Returns:
        None where it ended without an answer: its claims are free, unless it knows no replacement.

    Raises:
        ManagerError: it refused, or did not answer in time. It goes on serving.
    """
    channel.settimeout(within_s)
    try:
        with _opened(state_dir) as descriptors:
            socket.send_fds(channel, [_ASKS], descriptors)
        message, descriptors = _received_now(channel)
    except (BrokenPipeError, ConnectionResetError):
        message, descriptors = b"", []
    except TimeoutError:
        channel.close()
        raise ManagerError(f"the running daemon did not give way within {within_s:g} s; it goes on") from None
    except OSError as error:
        channel.close()
        raise ManagerError(f"the running daemon cannot be replaced: {error.strerror or error}") from error
    if not message:
        channel.close()
        return None
    answer: Any = json.loads(message)
    if "released" not in answer or not descriptors:
        channel.close()
        why = answer.get("refused", "no listener came")
        raise ManagerError(f"the running daemon was not replaced: {why}")
    listener, *lines = (socket.socket(fileno=one) for one in descriptors)
    return Predecessor(channel, listener, lines[0] if lines else None, answer["released"])


@contextmanager
def _opened(directory: Path) -> Iterator[list[int]]:
    """A descriptor of the directory, none where there is none yet."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield []
        return
    try:
        yield [descriptor]
    finally:
        os.close(descriptor)
