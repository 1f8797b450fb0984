"""Replaces a running daemon without losing a request: it hands over its listener, then its connections.

Both daemons are on one machine and belong to one user, or the new one to root. They talk over the socket that
claims the manager id (`adapters.owner.ManagerIdLock`):

1. The new daemon asks, and names its state directory.
2. The old one waits until no instance starts or stops and no model is pulled. It stops accepting, stores its
   state and gives up its claims. It answers with its listener; connections that come meanwhile wait in there.
3. The new one takes the claims, reads the state and serves.
4. The old one ends the answers under way, with the instances that run. Each connection of a client moves
   between two requests, with what the client has already sent of the next one. None is closed.

If the new daemon ends before it serves, the old one serves again.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog

from manager.adapters.owner import is_same_user
from manager.errors import ManagerError
from manager.serving import is_bound_to

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from pathlib import Path

    from manager.serving import Server

_log = structlog.get_logger("handover")

# More than a connection moves with (`relay.front.MOST_MOVED_BYTES`), and less than a socket's send buffer.
_MOST_MESSAGE = 128 * 1024
_MOST_ASKING = 16
_LOOK_EVERY_S = 0.05
# How long a new daemon waits for the claims, once the old one has said that it lets go.
CLAIMS_WITHIN_S = 5.0
_SERVING = b"S"
_CONNECTION = b"C"


# --- the old daemon -----------------------------------------------------------------------------------------


class Successor:
    """The daemon that asked to replace this one. Lives on the event loop.

    `is_serving` is whether it has said that it serves; `has_ended` whether it is gone.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(channel.fileno(), self._read)
        self.is_serving = False
        self.has_ended = False

    def refuse(self, why: str) -> None:
        """Tell it that it cannot replace this daemon."""
        self._send(json.dumps({"refused": why}).encode())
        self.close()

    def hand_over(self, listener: socket.socket) -> None:
        """Give it the listener: this daemon has given up its claims."""
        self._send(json.dumps({"released": os.getpid()}).encode(), listener.fileno())

    def take(self, peer: int, held: bytes) -> bool:
        """Give it a client's connection; whether it could be sent.

        Args:
            peer: the descriptor, which stays the caller's to close.
            held: what the client has sent of its next request.
        """
        return self.is_serving and self._send(_CONNECTION + held, peer)

    def close(self) -> None:
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()

    def _send(self, message: bytes, *descriptors: int) -> bool:
        if self.has_ended or self._channel.fileno() < 0:
            return False
        try:
            socket.send_fds(self._channel, [message], list(descriptors))
        except OSError as error:
            # With a full buffer, or too many descriptors on their way, it is tried again.
            self.has_ended = error.errno not in (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS)
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
        elif not message:
            self.has_ended = True
            self._loop.remove_reader(self._channel.fileno())


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
        self._asking: set[socket.socket] = set()
        if claim is not None:
            claim.setblocking(False)
            self._loop.add_reader(claim.fileno(), self._accept)

    def close(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            self._loop.remove_reader(claim.fileno())
        for channel in tuple(self._asking):
            self._forget(channel)
            channel.close()

    def _accept(self) -> None:
        assert self._claim is not None  # noqa: S101  (no reader without it)
        try:
            channel, _ = self._claim.accept()
        except OSError:
            return  # it has left already, or no descriptor is left
        if len(self._asking) >= _MOST_ASKING or not is_same_user(channel):
            channel.close()
            return
        channel.setblocking(False)
        self._asking.add(channel)
        self._loop.add_reader(channel.fileno(), self._read, channel)

    def _read(self, channel: socket.socket) -> None:
        try:
            message = channel.recv(_MOST_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        self._forget(channel)
        wanted = _wanted_directory(message)
        if wanted is None:  # it only looked whether the id is held
            channel.close()
            return
        successor = Successor(channel)
        if wanted != _identity_of(self._state_dir):
            successor.refuse(
                f"the daemon that serves this manager_id has another state directory: {self._state_dir}"
            )
            return
        self._ask(successor)

    def _forget(self, channel: socket.socket) -> None:
        if channel in self._asking:
            self._asking.discard(channel)
            self._loop.remove_reader(channel.fileno())


class Giving:
    """Gives everything to a daemon that asks for it, at most once at a time.

    Args:
        server: of this daemon.
        listener: of this daemon.
        running: its background loops; cancelled here.
        is_busy: whether something goes on that only this daemon can end, such as a start.
        let_go: stores the state and gives up the claims, once the loops have ended.
        patience_s: how long it waits while `is_busy`.
    """

    def __init__(
        self,
        server: Server,
        listener: socket.socket,
        running: asyncio.Future[None],
        *,
        is_busy: Callable[[], bool],
        let_go: Callable[[], Awaitable[None]],
        patience_s: float,
    ) -> None:
        self._server = server
        self._listener = listener
        self._running = running
        self._is_busy = is_busy
        self._let_go = let_go
        self._patience_s = patience_s
        self._task: asyncio.Task[None] | None = None
        self._successor: Successor | None = None
        self._kept: socket.socket | None = None

    def begin(self, successor: Successor) -> None:
        """Hand over to this daemon soon, or refuse."""
        if self._server.should_exit or (self._task is not None and not self._task.done()):
            successor.refuse("it ends, or is being replaced already")
        else:
            self._task = asyncio.ensure_future(self._give(successor))

    def listener_if_failed(self) -> socket.socket | None:
        """Return the listener once the server has ended, if the other daemon ended before it served."""
        successor, kept = self._successor, self._kept
        if successor is None or kept is None:
            return None
        failed = successor.has_ended and not successor.is_serving
        successor.close()
        if failed:
            return kept
        kept.close()
        return None

    async def _give(self, successor: Successor) -> None:
        if not await self._is_quiet(successor):
            return
        _log.info("replaced", hint="open requests end here, the new daemon takes all others")
        self._successor = successor
        self._kept = self._listener.dup()
        self._server.stop_accepting()
        self._running.cancel()
        try:
            await asyncio.wait({self._running})
            await self._let_go()
            successor.hand_over(self._kept)
        finally:
            self._server.leave_to(successor)

    async def _is_quiet(self, successor: Successor) -> bool:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_s
        while self._is_busy():
            if successor.has_ended:
                successor.close()
                return False
            if self._server.should_exit or loop.time() >= deadline:
                successor.refuse(
                    "an instance starts or stops, or a model is pulled; try again when that has ended"
                )
                return False
            await asyncio.sleep(_LOOK_EVERY_S)
        return True


def _identity_of(state_dir: Path) -> list[int]:
    """Device and inode, which are the same whatever path leads there; zeros where there is none yet."""
    try:
        status = state_dir.stat()
    except OSError:
        return [0, 0]
    return [status.st_dev, status.st_ino]


def _wanted_directory(message: bytes) -> list[int] | None:
    with suppress(ValueError, TypeError, LookupError):
        wanted: list[int] = json.loads(message)["replace"]
        return wanted
    return None


# --- the new daemon -----------------------------------------------------------------------------------------


class Predecessor:
    """The daemon that this one replaces: it has given up its claims and waits for `serves`."""

    def __init__(self, channel: socket.socket, listener: socket.socket, pid: int) -> None:
        self._channel = channel
        self._listener = listener
        self._adopting: set[asyncio.Task[None]] = set()
        self.pid = pid

    def usable_listener(self, host: str, port: int) -> socket.socket | None:
        """Return its listener; None, and the listener is closed, where this daemon has another address."""
        if is_bound_to(self._listener, host, port):
            return self._listener
        self._listener.close()
        return None

    def serves(self, adopt: Callable[[socket.socket, bytes], Coroutine[Any, Any, None]]) -> None:
        """Say that this daemon serves.

        Args:
            adopt: takes each connection that the old daemon gives away, and what the client has already sent.
        """
        channel, loop = self._channel, asyncio.get_running_loop()
        channel.setblocking(False)

        def read() -> None:
            while True:
                try:
                    message, descriptors, _, _ = socket.recv_fds(channel, _MOST_MESSAGE, 1)
                except BlockingIOError:
                    return
                except OSError:
                    message, descriptors = b"", []
                if not message:
                    loop.remove_reader(channel.fileno())
                    channel.close()
                    return
                for descriptor in descriptors:
                    peer = socket.socket(fileno=descriptor)
                    task = loop.create_task(adopt(peer, message[len(_CONNECTION) :]))
                    self._adopting.add(task)
                    task.add_done_callback(self._adopting.discard)

        loop.add_reader(channel.fileno(), read)
        with suppress(OSError):  # the old daemon has ended: it had no more to give
            channel.send(_SERVING)


def replace_daemon(channel: socket.socket, state_dir: Path, *, within_s: float) -> Predecessor | None:
    """Ask the daemon at the other end to give up its claims; waits until it has.

    Returns:
        None where it ended without an answer: its claims are free, unless it knows no replacement.

    Raises:
        ManagerError: it refused, or did not answer in time. It goes on serving.
    """
    channel.settimeout(within_s)
    try:
        channel.send(json.dumps({"replace": _identity_of(state_dir)}).encode())
        message, descriptors, _, _ = socket.recv_fds(channel, _MOST_MESSAGE, 1)
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
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    return Predecessor(channel, socket.socket(fileno=descriptors[0]), answer["released"])
