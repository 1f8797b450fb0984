"""Short questions over HTTP/1.1 on connections that are kept, framed by llhttp (httptools).

Servers are probed and the engine is asked for as long as the daemon runs. A client library with everything
cost three times as much for each question, and the Docker SDK with a thread for each call ten times.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from typing import NamedTuple
from urllib.parse import urlsplit

import httptools

_UNIX = "unix://"
_DEFAULT_PORTS = {"http": 80, "https": 443, "tcp": 2375}
_MOST_HEAD_BYTES = 64 * 1024


class Answer(NamedTuple):
    """One answer. `http_bytes` is what request and answer had together, heads included."""

    status: int
    body: bytes
    http_bytes: int


class HttpClient:
    """One server. For any number of questions at a time, each on a connection of its own.

    Args:
        url: `unix:///SOCKET`, or `http://`, `https://` or `tcp://` with host, port and perhaps a path, which
            goes before that of each question.
        most_bytes: an answer with a longer body is none.
        most_kept: connections beyond these are closed after their answer.
        tls: whom to trust behind `https://`; the system's authorities by default.

    Raises:
        ValueError: the URL is none.
    """

    def __init__(
        self, url: str, *, most_bytes: int, most_kept: int = 2, tls: ssl.SSLContext | None = None
    ) -> None:
        parts = urlsplit(url)
        self._socket = url.removeprefix(_UNIX) if url.startswith(_UNIX) else None
        self._name = parts.hostname or ""
        self._port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 80)
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._prefix = "" if self._socket else parts.path.rstrip("/")
        self._head = f" HTTP/1.1\r\nHost: {parts.netloc or 'localhost'}\r\nUser-Agent: ollama-manager\r\n"
        self._most_bytes = most_bytes
        self._most_kept = most_kept
        self._kept: list[_Connection] = []

    async def ask(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """The whole answer, whatever it is; redirects are not followed. Sets no deadline.

        Args:
            method: GET, or another one, which is never sent twice.
            path: with the query, if there is one.
            body: a JSON document.

        Raises:
            OSError: there is no answer, or it is not HTTP.
            ValueError: the path is none.
        """
        head = f"{method} {self._prefix}{path}{self._head}"
        if body is not None:
            head += "Content-Type: application/json\r\n"
        if method != "GET":
            head += f"Content-Length: {len(body or b'')}\r\n"
        request = f"{head}\r\n".encode("ascii") + (body or b"")
        while self._kept:
            connection = self._kept.pop()
            if connection.usable:
                try:
                    return await self._asked(connection, request)
                except OSError:
                    # The server may have closed it while it was idle. Whatever came back is an answer.
                    if connection.touched or method != "GET":
                        raise
        return await self._asked(await self._connect(), request)

    def close(self) -> None:
        """Drop the connections that are kept; the next question makes another one."""
        while self._kept:
            self._kept.pop().close()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()

        def make() -> _Connection:
            return _Connection(self._most_bytes)

        if self._socket is not None:
            _, connection = await loop.create_unix_connection(make, self._socket)
        else:
            _, connection = await loop.create_connection(make, self._name, self._port, ssl=self._tls)
        return connection

    async def _asked(self, connection: _Connection, request: bytes) -> Answer:
        try:
            answer = await connection.ask(request)
        except BaseException:
            connection.close()
            raise
        if connection.usable and len(self._kept) < self._most_kept:
            self._kept.append(connection)
        else:
            connection.close()
        return answer


class _Connection(asyncio.Protocol):
    """One question at a time. What comes without a question ends it."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[Answer] | None = None
        self._body = bytearray()
        self._came_bytes = 0
        self._asked_bytes = 0
        self._in_head = True
        self._framed = False
        self._keeps = True

    @property
    def usable(self) -> bool:
        return self._keeps and self._transport is not None and not self._transport.is_closing()

    @property
    def touched(self) -> bool:
        """Whether anything came back on the last question."""
        return self._came_bytes > 0

    async def ask(self, request: bytes) -> Answer:
        if self._transport is None:
            raise ConnectionError("the connection is closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._body.clear()
        self._came_bytes = 0
        self._asked_bytes = len(request)
        self._in_head = True
        self._framed = False
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
        self._came_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")
            return
        if len(self._body) > self._most_bytes:
            self._fail(f"more than {self._most_bytes} bytes")
        elif self._in_head and self._came_bytes > _MOST_HEAD_BYTES:
            self._fail(f"a head of more than {_MOST_HEAD_BYTES} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is None:
            return
        if not self._in_head and not self._framed and exc is None:
            self._end()  # such a body ends with its connection
        else:
            self._fail(getattr(exc, "strerror", None) or "the server closed the connection")

    # --- what the parser calls ---

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._framed = True
        elif name == b"connection" and value.lower() == b"close":
            self._keeps = False

    def on_headers_complete(self) -> None:
        self._in_head = False

    def on_body(self, piece: bytes) -> None:
        if len(self._body) <= self._most_bytes:
            self._body += piece

    def on_message_complete(self) -> None:
        # The parser's word on it (httptools 0.9) holds within this callback only.
        self._keeps = self._keeps and self._parser.should_keep_alive()
        self._end()

    def _end(self) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            status = self._parser.get_status_code()
            answer.set_result(Answer(status, bytes(self._body), self._asked_bytes + self._came_bytes))

    def _fail(self, why: str) -> None:
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(ConnectionError(why))
        self.close()


def plainly(error: BaseException) -> str:
    """What the system said, without what the language puts around it."""
    number = error.errno if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
    if number is not None and number > 0:
        return os.strerror(number)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
