"""Short requests over HTTP/1.1 on kept connections, with whole answers: for probes and for the engine.

Why it is hand-written, with measurements: docs/decisions/0012-short-requests.md.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import os
import ssl
import sys
import termios
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from manager.wire.answer import AnswerReader, BadAnswerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from manager.wire.head import Header

_UNIX = "unix://"
_DEFAULT_PORTS = {"http": 80, "https": 443, "tcp": 2375}


class Answer(NamedTuple):
    """One answer. `http_bytes` counts request and answer together, heads included."""

    status: int
    body: bytes
    http_bytes: int
    headers: Sequence[Header] = ()


class AnswerTooLongError(ConnectionError):
    """The body of an answer is longer than what the caller takes."""


class HttpClient:
    """One server. Concurrent requests each take a connection of their own.

    Args:
        url: `unix:///SOCKET`, or `http://`, `https://` or `tcp://` with host, port and perhaps a path, which
            precedes that of each request.
        most_bytes: an answer with a longer body is refused.
        tls: returns the TLS context for `https://`.
        most_kept: connections beyond these are closed after their answer.

    Attributes:
        is_unacknowledged: the last request that its caller gave up was never acknowledged, not even by the
            kernel of the server's host: the host cannot be reached. Otherwise its server is slow.

    Raises:
        ValueError: the URL is invalid.
    """

    def __init__(
        self,
        url: str,
        *,
        most_bytes: int,
        tls: Callable[[], Awaitable[ssl.SSLContext]],
        most_kept: int = 2,
    ) -> None:
        parts = urlsplit(url)
        self._socket = url.removeprefix(_UNIX) if url.startswith(_UNIX) else None
        self._name = parts.hostname or ""
        self._is_address = _is_address(self._name)
        self._port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 80)
        self._tls = tls if parts.scheme == "https" else None
        self._prefix = "" if self._socket else parts.path.rstrip("/")
        self._head = f" HTTP/1.1\r\nHost: {parts.netloc or 'localhost'}\r\nUser-Agent: ollama-manager\r\n"
        self._most_bytes = most_bytes
        self._most_kept = most_kept
        self._kept: list[_Connection] = []
        self.is_unacknowledged = False

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        most_bytes: int | None = None,
        headers: Sequence[Header] = (),
    ) -> Answer:
        """Return the whole answer, whatever its status; redirects are not followed. Sets no deadline.

        Args:
            method: GET, or another one, which is never sent twice.
            path: with the query, if there is one.
            body: a JSON document.
            most_bytes: the bound of the answer's body, where it differs from that of the client.
            headers: more of them, without control characters.

        Raises:
            AnswerTooLongError: the body of the answer is longer than that.
            OSError: there is no answer, or it is no proper HTTP.
            ValueError: the path is invalid.
        """
        head = f"{method} {self._prefix}{path}{self._head}"
        if body is not None:
            head += "Content-Type: application/json\r\n"
        if method != "GET":
            head += f"Content-Length: {len(body or b'')}\r\n"
        more = b"".join(b"%b: %b\r\n" % header for header in headers)
        request = b"%b%b\r\n%b" % (head.encode("ascii"), more, body or b"")
        bound = self._most_bytes if most_bytes is None else most_bytes
        # Until a connection says otherwise: making one may take too long. A name may be what takes long.
        self.is_unacknowledged = self._is_address
        while self._kept:
            connection = self._kept.pop()
            if connection.usable:
                try:
                    return await self._asked(connection, request, bound)
                except OSError:
                    # The server may have closed it while it was idle.
                    if connection.touched or method != "GET":
                        raise
        return await self._asked(await self._connect(), request, bound)

    def close(self) -> None:
        """Close the kept connections; the next request makes another one."""
        while self._kept:
            self._kept.pop().close()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()

        if self._socket is not None:
            _, connection = await loop.create_unix_connection(_Connection, self._socket)
        else:
            tls = await self._tls() if self._tls is not None else None
            _, connection = await loop.create_connection(_Connection, self._name, self._port, ssl=tls)
        return connection

    async def _asked(self, connection: _Connection, request: bytes, most_bytes: int) -> Answer:
        try:
            answer = await connection.ask(request, most_bytes)
        except BaseException:
            self.is_unacknowledged = connection.is_unacknowledged
            connection.close()
            raise
        self.is_unacknowledged = False
        if connection.usable and len(self._kept) < self._most_kept:
            self._kept.append(connection)
        else:
            connection.close()
        return answer


class _Connection(asyncio.Protocol):
    """One request at a time. Bytes that arrive without a request end it."""

    def __init__(self) -> None:
        self._most_bytes = 0
        self._transport: asyncio.Transport | None = None
        self._reader = AnswerReader()
        self._answer: asyncio.Future[Answer] | None = None
        self._body = bytearray()
        self._http_bytes = 0

    @property
    def usable(self) -> bool:
        return self._reader.keeps and self._transport is not None and not self._transport.is_closing()

    @property
    def touched(self) -> bool:
        """Whether any byte of the last answer arrived."""
        return self._reader.is_touched

    @property
    def is_unacknowledged(self) -> bool:
        """Whether the peer's kernel has not acknowledged all that was sent."""
        if self._transport is None:
            return False
        try:
            number = self._transport.get_extra_info("socket").fileno()
            raw = fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4))
        except (OSError, ValueError, AttributeError):
            return False  # unknown
        return int.from_bytes(raw, sys.byteorder, signed=True) > 0

    async def ask(self, request: bytes, most_bytes: int) -> Answer:
        if self._transport is None:
            raise ConnectionError("the connection is closed")
        self._most_bytes = most_bytes
        self._answer = asyncio.get_running_loop().create_future()
        self._body.clear()
        self._http_bytes = len(request)
        self._reader.begin()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # --- what the event loop calls ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's transport is one

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self.close()
            return
        self._http_bytes += len(data)
        try:
            self._reader.feed(data)
        except BadAnswerError as error:
            self._fail(str(error))
            return
        self._body += self._reader.take()
        if len(self._body) > self._most_bytes:
            self._fail(f"more than {self._most_bytes} bytes", AnswerTooLongError)
        elif self._reader.is_complete:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is None:
            return
        if exc is not None:
            self._fail(getattr(exc, "strerror", None) or str(exc))
            return
        try:
            self._reader.end()
        except BadAnswerError as error:
            self._fail(str(error))
        else:
            self._end()

    # --- helpers ---

    def _end(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_result(
                Answer(self._reader.status, bytes(self._body), self._http_bytes, self._reader.headers)
            )

    def _fail(self, why: str, kind: type[ConnectionError] = ConnectionError) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(kind(why))
        self.close()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def plainly(error: BaseException) -> str:
    """Return the system's message, without Python's additions."""
    number = error.errno if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
    if number is not None and number > 0:
        return os.strerror(number)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
