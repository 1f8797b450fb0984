"""Servers over bare sockets, descriptors that run out, and a certificate that is trusted."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Self

import uvloop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path
    from types import TracebackType

    from manager.relay.upstream import AnswerHead

LOOPS = (asyncio.new_event_loop, uvloop.new_event_loop)
_DESCRIPTORS = 400


def on(loop: Callable[[], asyncio.AbstractEventLoop], work: Coroutine[None, None, None]) -> None:
    """Run `work` on a loop of that kind."""

    async def limited() -> None:
        async with asyncio.timeout(30):
            await work

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(limited())


class Listener:
    """Listens, and accepts when the test says so. Leaving its context closes what it accepted."""

    def __init__(self) -> None:
        self._accepted: list[socket.socket] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in (self._socket, *self._accepted):
            connection.close()

    def accept(self) -> socket.socket:
        self._socket.settimeout(10)
        connection, _ = self._socket.accept()
        connection.settimeout(10)
        self._accepted.append(connection)
        return connection


class Collected:
    """Takes an answer: a `ResponseSink`."""

    def __init__(self) -> None:
        self.head: AnswerHead | None = None
        self.body = b""
        self.why = ""
        self.may_have_begun: bool | None = None
        self.ended = asyncio.Event()

    def head_came(self, head: AnswerHead) -> None:
        self.head = head

    def answer_came(self, data: bytes, *, complete: bool) -> None:
        self.body += data
        if complete:
            self.ended.set()

    def answer_broke(self, why: str, *, may_have_begun: bool) -> None:
        assert not self.ended.is_set(), "a request has one end"
        self.why, self.may_have_begun = why, may_have_begun
        self.ended.set()


class Killed:
    """A server process: it answers so many requests, reads one more, and waits to be killed."""

    SOURCE = """
import socket, sys
listener = socket.socket(fileno=int(sys.argv[1]))
connection, _ = listener.accept()
for number in range(int(sys.argv[2]) + 1):
    data = b""
    while not data.endswith(b"end"):
        data += connection.recv(65536)
    if number < int(sys.argv[2]):
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
print("works", flush=True)
sys.stdin.read()
"""

    def __init__(self, listener: Listener, answers: int) -> None:
        descriptor = listener._socket.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SOURCE, str(descriptor), str(answers)],
            pass_fds=[descriptor],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    async def at_work(self) -> None:
        assert self._process.stdout is not None
        assert await asyncio.to_thread(self._process.stdout.readline) == b"works\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def no_descriptors() -> Iterator[Callable[[], None]]:
    """Use up the descriptors of this process; what is yielded uses up those that were freed meanwhile."""

    def fill() -> None:
        with suppress(OSError):
            while True:
                taken.append(os.dup(source))

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    source = os.open(os.devnull, os.O_RDONLY)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, limits[1]))
        fill()
        yield fill
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in (source, *taken):
            os.close(descriptor)


def certificate(directory: Path) -> tuple[Path, Path]:
    """Make a certificate for localhost that signs itself, and its key."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key
