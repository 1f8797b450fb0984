"""Requests that pass through whole, each on a connection of its own from the relay's pools."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from manager.errors import AskFailedError, InvalidRequestError, Reason, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from manager.relay.upstream import AnswerHead, UpstreamConnection, UpstreamPools
    from manager.relay.upstream.address import Address
    from manager.services.ports import Question
    from manager.wire.head import Header

_PIECE_BYTES = 256 * 1024
_WITHOUT_CONTENT = ("GET", "HEAD")
_NO_TARGET = re.compile(rb"[\x00-\x20\x7f]")
_NO_NAME = re.compile(rb"[^!#$%&'*+\-.^_`|~0-9A-Za-z]")
_NO_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class PooledModelServer:
    """Implements `services.ports.ModelServer`.

    A request is never sent twice, so it gets a new connection: a kept one may be closed by the server just as
    it is used.

    Args:
        pools: make the connections, and close those still open at the end.
        connect_timeout_s: the deadline of a connection.
        patience_s: how long nothing may move, in either direction: a server may have to read or write a whole
            model before it answers. There is no limit for the whole.
    """

    def __init__(self, pools: UpstreamPools, *, connect_timeout_s: float, patience_s: float) -> None:
        self._pools = pools
        self._connect_timeout_s = connect_timeout_s
        self._patience_s = patience_s

    @asynccontextmanager
    async def ask(self, question: Question) -> AsyncGenerator[_Call]:
        """As `services.ports.ModelServer.ask`.

        Raises:
            AskFailedError: no answer; the reason says why.
            OutOfDescriptorsError: the process lacks descriptors; no instance is at fault.
            InvalidRequestError: the request cannot be framed, or its body has another length than declared.
        """
        pool = self._pools.pool(question.endpoint)
        head = _head(question, pool.address)
        connection = await self._connect(question)
        call = _Call(connection, question.instance, self._patience_s)
        try:
            call.send(question, head)
            await call.head()
            yield call
        finally:
            await call.close()

    async def _connect(self, question: Question) -> UpstreamConnection:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                return await self._pools.pool(question.endpoint).connect()
        except TimeoutError as error:
            why = f"could not be connected to within {self._connect_timeout_s:g} s"
            raise _not_asked(question.instance, why, Reason.ATTEMPT_TIMEOUT) from error
        except OSError as error:
            why = f"cannot be reached ({error.strerror or error})"
            raise _not_asked(question.instance, why, Reason.UPSTREAM_UNREACHABLE) from error


class _Call:
    """One request and its answer: a `ResponseSink` for the connection, a `ServerAnswer` for the client.

    At most one piece of the answer is held, what one read brought: the connection is not read meanwhile.
    """

    def __init__(self, connection: UpstreamConnection, instance: str, patience_s: float) -> None:
        self._connection = connection
        self._instance = instance
        self._patience_s = patience_s
        self._sending: asyncio.Task[None] | None = None
        self._head: AnswerHead | None = None
        self._pieces: list[bytes] = []
        self._complete = False
        self._broken: Exception | None = None
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._moved_at = 0.0

    # --- services.ports.ServerAnswer ---

    @property
    def status(self) -> int:
        return self._known_head.status

    @property
    def headers(self) -> Sequence[Header]:
        lines = (line.partition(b": ") for line in self._known_head.lines)
        return [(name, value.removesuffix(b"\r\n")) for name, _, value in lines]

    @property
    def length(self) -> int | None:
        return self._known_head.length

    async def piece(self) -> bytes:
        while not self._pieces:
            if self._complete:
                return b""
            if self._broken is not None:
                raise self._broken
            self._connection.resume()
            await self._wait(f"sent nothing for {self._patience_s:g} s")
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data

    # --- what the server's side calls ---

    def head_came(self, head: AnswerHead) -> None:
        self._head = head
        self._news.set()

    def answer_came(self, data: bytes, *, complete: bool) -> None:
        self._complete = complete
        if data:
            self._pieces.append(data)
            if not complete:
                self._connection.pause()
        self._news.set()

    def answer_broke(self, why: str, *, may_have_begun: bool) -> None:
        if self._head is not None:
            text = f"{self._instance} broke off before its answer ended ({why})"
            self._fail(UnavailableError(text, reason=Reason.UPSTREAM_ERROR))
        else:
            text = f"{self._instance} cannot be reached ({why})"
            self._fail(AskFailedError(text, reason=Reason.UPSTREAM_UNREACHABLE, begun=may_have_begun))

    # --- what `ask` calls ---

    def send(self, question: Question, head: bytes) -> None:
        """Begin to send the request; a long body follows in a task."""
        body, is_head = question.body, question.method == "HEAD"
        if isinstance(body, bytes) and len(body) <= _PIECE_BYTES:
            self._connection.send(self, head, (body,), is_head=is_head, is_last=True)
            return
        self._connection.send(self, head, (), is_head=is_head, is_last=True)
        pieces = _cut(body) if isinstance(body, bytes) else body
        length = len(body) if isinstance(body, bytes) else question.length
        self._sending = asyncio.ensure_future(self._send_pieces(pieces, length))

    async def head(self) -> None:
        """Wait for the head of the answer."""
        while self._head is None:
            if self._broken is not None:
                raise self._broken
            await self._wait(f"did not answer within {self._patience_s:g} s")

    async def close(self) -> None:
        """End the connection, and the sending."""
        self._connection.abandon()
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait([self._sending])
            self._sending = None
        self._broken = None  # its traceback leads back to here, and holds the body

    # --- helpers ---

    @property
    def _known_head(self) -> AnswerHead:
        assert self._head is not None  # noqa: S101  (`ask` yields after the head)
        return self._head

    async def _wait(self, why: str) -> None:
        """Wait for news of the answer; the time begins anew with each piece of the request that moves."""
        self._news.clear()
        self._moved_at = self._loop.time()
        while not self._news.is_set():
            deadline = self._moved_at + self._patience_s
            try:
                async with asyncio.timeout_at(deadline):
                    await self._news.wait()
            except TimeoutError as error:
                if self._moved_at + self._patience_s <= deadline:
                    text = f"{self._instance} {why}"
                    if self._head is None:
                        raise AskFailedError(text, reason=Reason.ATTEMPT_TIMEOUT, begun=True) from error
                    raise UnavailableError(text, reason=Reason.ATTEMPT_TIMEOUT) from error

    def _fail(self, error: UnavailableError) -> None:
        if self._broken is None:
            self._broken = error
        self._news.set()

    async def _send_pieces(self, pieces: AsyncIterator[bytes], length: int | None) -> None:
        """Send the body as it comes and as the server takes it."""
        try:
            await self._send_body(pieces, length)
        except Exception as error:  # noqa: BLE001  (of the body's source: raised where the answer is read)
            if not self._complete:
                self._broken = error
                self._connection.abandon()
                self._news.set()

    async def _send_body(self, pieces: AsyncIterator[bytes], length: int | None) -> None:
        sent = 0
        async for piece in pieces:
            for start in range(0, len(piece), _PIECE_BYTES):
                part = piece[start : start + _PIECE_BYTES]
                sent += len(part)
                if length is not None and sent > length:
                    raise InvalidRequestError(f"the request body is longer than the declared {length} bytes")
                if self._complete or self._broken is not None:
                    return  # the server answered without reading all of it
                self._connection.write(part if length is not None else b"%x\r\n%b\r\n" % (len(part), part))
                await self._connection.drain()
                self._moved_at = self._loop.time()
        if length is None:
            self._connection.write(b"0\r\n\r\n")
        elif sent < length:
            raise InvalidRequestError(f"the request body ended after {sent} of {length} bytes")


def _head(question: Question, address: Address) -> bytes:
    """The head of the request.

    Raises:
        InvalidRequestError: it would not be one head, or not the one that was meant.
    """
    target = question.target.encode("latin-1")
    if _NO_TARGET.search(target):
        raise InvalidRequestError("the target of the request has spaces or control characters")
    for name, value in question.headers:
        if not name or _NO_NAME.search(name) or _NO_VALUE.search(value):
            raise InvalidRequestError("a header of the request has a bad name or control characters")
    head = b"%b %b%b HTTP/1.1\r\nHost: %b\r\n%bConnection: close\r\n" % (
        question.method.encode("ascii"),
        address.prefix,
        target,
        address.host,
        b"".join(b"%b: %b\r\n" % header for header in question.headers),
    )
    if isinstance(question.body, bytes):
        if question.body or question.method not in _WITHOUT_CONTENT:
            head += b"Content-Length: %d\r\n" % len(question.body)
    elif question.length is None:
        head += b"Transfer-Encoding: chunked\r\n"
    else:
        head += b"Content-Length: %d\r\n" % question.length
    return head + b"\r\n"


async def _cut(body: bytes) -> AsyncIterator[bytes]:
    """A long body in pieces: sent at once it would hold up the event loop."""
    for start in range(0, len(body), _PIECE_BYTES):
        yield body[start : start + _PIECE_BYTES]


def _not_asked(instance: str, why: str, reason: Reason) -> AskFailedError:
    return AskFailedError(f"{instance} {why}", reason=reason, begun=False)
