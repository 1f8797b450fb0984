"""Writes one answer to a client: whole, or in a way that shows that it is not whole."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from manager.domain.record import LOCAL
from manager.domain.rollout import RAW
from manager.relay.upstream import AnswerHead
from manager.wire.caller import printable
from manager.wire.dialect import error_body, error_in_stream
from manager.wire.head import STATUS_LINES
from manager.wire.routes import Dialect

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.record import RequestRecord

_LOCAL = b"X-Provider: local\r\n"
EVENT_STREAM = b"text/event-stream"
_NO_BUFFERING = b"Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n"
_WITHOUT_BODY = (204, 304)
_OK = 200


class ClientSide(Protocol):
    """The connection of the client that an answer goes to."""

    def write(self, data: bytes) -> None: ...
    def abort(self) -> None:
        """End the connection at once: the client must not take a part for the whole."""


class AnswerWriter:
    """One answer. Its head is written together with the first bytes of its body.

    Args:
        dialect: the form of errors.
        chunks: whether the client understands a body in chunks (HTTP/1.1).
        keep_alive: whether the connection may serve another request afterwards.
    """

    # Most answers keep these values.
    is_begun = False
    _head = b""
    _chunked = False
    _has_length = False
    _is_stream = False

    def __init__(self, dialect: Dialect, *, chunks: bool, keep_alive: bool) -> None:
        self._dialect = dialect
        self._chunks = chunks
        self.keep_alive = keep_alive

    @property
    def is_unseen(self) -> bool:
        """Whether the client has got no byte."""
        return not self.is_begun or bool(self._head)

    def begin(self, head: AnswerHead, stamp: bytes, *, stream: bool) -> None:
        """Begin an answer.

        Args:
            head: the head of a server's answer.
            stamp: lines that are added.
            stream: whether the client asked for a stream.
        """
        self.is_begun = True
        status = head.status
        lines, framing = head.lines, b""
        if stream:
            self._is_stream = status == _OK
            lines = [line for line in lines if line[:14].lower() != b"cache-control:"]
            lines.append(_NO_BUFFERING)
        if status in _WITHOUT_BODY:
            pass
        elif head.length is not None:
            framing = b"Content-Length: %d\r\n" % head.length
            self._has_length = True
        elif self._chunks:
            framing = b"Transfer-Encoding: chunked\r\n"
            self._chunked = True
        else:
            self.keep_alive = False  # such an answer ends with its connection
        self._head = b"%b%b%b%b%b" % (
            STATUS_LINES.get(status) or STATUS_LINES[502],
            b"".join(lines),
            stamp,
            framing,
            b"\r\n" if self.keep_alive else b"Connection: close\r\n\r\n",
        )

    def retract(self) -> bool:
        """Take back a head that the client has not seen; whether that was possible."""
        if not self.is_unseen:
            return False
        self.is_begun = self._chunked = self._has_length = self._is_stream = False
        self._head = b""
        return True

    def write(self, client: ClientSide | None, data: bytes, *, last: bool = False) -> bool:
        """Write a piece of the body; whether the client was given anything."""
        if data and self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        if last and self._chunked:
            data += b"0\r\n\r\n"
        if self._head:
            data = self._head + data
            self._head = b""
        if not data or client is None:
            return False
        client.write(data)
        return True

    def comment(self, client: ClientSide, stamp: bytes, text: str) -> bool:
        """Tell a client who waits for events that its request is alive; False where no comment is possible.

        A single line end follows the comment: some clients take each empty line for the end of an event.
        """
        if not self._chunks or self._dialect is Dialect.NATIVE:
            return False
        if not self.is_begun:
            kind = b"Content-Type: %b\r\n" % EVENT_STREAM
            self.begin(AnswerHead(_OK, [kind], None, EVENT_STREAM), stamp, stream=True)
        self.write(client, f": {printable(text)}\n".encode())
        return True

    def fail(
        self,
        client: ClientSide,
        status: int,
        message: str,
        *,
        stamp: bytes = b"",
        headers: Mapping[str, str] | None = None,
        request_id: str = "",
        tail: bytes | bytearray = b"",
    ) -> bool:
        """Tell the client of an error, as far as it can still be told.

        A client that has seen nothing gets an error in its dialect. A stream without a declared length gets a
        last line or event. Every other answer is broken off, which is how a client sees that it is not whole.

        Args:
            client: where to.
            status: of an answer that was not begun.
            message: for the client.
            stamp: lines that are added to a whole answer.
            headers: further headers of a whole answer.
            request_id: for dialects that name it.
            tail: the last bytes of the stream so far; a line or an event that is not complete is ended first.

        Returns:
            Whether `status` is what the client got.
        """
        if self.is_unseen:
            self.retract()
            self.is_begun = True
            content, kind = error_body(self._dialect, status, message, request_id)
            more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
            if not self.keep_alive:
                more += "Connection: close\r\n"
            head = f"Content-Type: {kind.decode()}\r\nContent-Length: {len(content)}\r\n{more}\r\n"
            client.write(b"".join((STATUS_LINES[status], stamp, head.encode(), content)))
            return True
        if self._is_stream and not self._has_length:
            line = self._missing_end(tail) + error_in_stream(self._dialect, status, message)
            if not self._chunked:
                self.keep_alive = False
            self.write(client, line, last=True)
        else:
            self.keep_alive = False
            client.abort()
        return False

    def _missing_end(self, tail: bytes | bytearray) -> bytes:
        """Return what ends the last line of a stream, or its last event."""
        ends = b"\n" if self._dialect is Dialect.NATIVE else b"\n\n"
        last = bytes(tail[-2 * len(ends) :]).replace(b"\r", b"")
        if not last or last.endswith(ends):
            return b""
        return b"\n" if last.endswith(b"\n") else ends


def stamp(
    record: RequestRecord,
    for_page: bytes,
    attempt: tuple[str, str] | None,
    provider: bytes | None = None,
) -> bytes:
    """Return the headers that tell where an answer comes from, and why from there.

    Args:
        record: of the request.
        for_page: lines that let a page in a browser read the answer.
        attempt: instance and model; None where no instance was asked.
        provider: the line with the provider, where it is not that of the record.
    """
    where = b"" if attempt is None else _where(*attempt)
    if provider is None:
        name = record.provider
        provider = _LOCAL if name is LOCAL else b"X-Provider: %b\r\n" % name.encode()
    lines = b"%bX-Request-Id: %b\r\n%b%bX-Queue-Ms: %d\r\n" % (
        for_page,
        record.request_id.encode(),
        where,
        provider,
        record.queue_ms,
    )
    if record.fallback and record.fallback_reason is not None:
        lines += b"X-Fallback-Reason: %b\r\n" % record.fallback_reason.value.encode()
    if record.tier is not None and record.effective_target != RAW:
        lines += f"X-Task-Type: {record.task_type}\r\nX-Tier: {record.tier}\r\n".encode()
    if record.start_ms is not None:
        lines += b"X-Start-Ms: %d\r\n" % record.start_ms
    return lines


@lru_cache(maxsize=1024)
def _where(instance: str, model: str) -> bytes:
    if not model:
        return f"X-Instance: {instance}\r\n".encode()
    return f"X-Instance: {instance}\r\nX-Model: {printable(model)}\r\n".encode()
