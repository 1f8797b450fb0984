"""Answers of HTTP/1 servers: framed by llhttp, bounded, and refused where two readers could differ."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import httptools

if TYPE_CHECKING:
    from manager.wire.head import Header

# Of everything in an answer that is not its body: heads, chunk framing without data, trailers.
MOST_HEAD_BYTES = 64 * 1024
MOST_HEAD_LINES = 256
MOST_INFORMATIONAL = 16
_CONTINUE = 100
_SWITCHING_PROTOCOLS = 101
_OK = 200
_FIRST_FINAL_STATUS = 200
_LAST_STATUS = 599
_VERSIONS = ("1.1", "1.0")
_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: ([0-9]+)\r\n", re.IGNORECASE)
_MOST_DIGITS = 12
# Longer heads are parsed each time.
_MOST_KNOWN_BYTES = 1024


class BadAnswerError(Exception):
    """The answer cannot be passed on: it is no proper HTTP/1, is out of bounds, or ended too soon."""


@dataclass(frozen=True, slots=True)
class _KnownHead:
    """A head that was parsed: what stands before and after the digits of its length, and what it says."""

    before: bytes
    after: bytes
    headers: list[Header]


class AnswerReader:
    """Reads the answers of one connection, one after the other. `begin` comes before each.

    Informational responses (1xx) are skipped; trailers are counted and dropped. llhttp refuses control
    characters and empty names in heads, folded lines, bad chunks, a repeated Content-Length, and one beside a
    Transfer-Encoding. This class refuses statuses outside 200 to 599, a switch of protocols, a coding other
    than chunked, and everything out of bounds.

    A server repeats its head within a second but for the length of the body. Such an answer is not parsed
    again where it arrives whole.

    Attributes:
        status: of the final head, 0 before that head is complete.
        headers: of the final head, as sent, without Content-Length. The same list where it is the same head.
        length: what Content-Length declares, None without one.
        is_complete: whether the last byte of the answer has arrived.
        is_touched: whether any byte has arrived since `begin`.
        keeps: whether the connection can carry another request, once the answer is complete.
    """

    __slots__ = (
        "_fault",
        "_has_progress",
        "_informational",
        "_is_chunked",
        "_is_head",
        "_known",
        "_lines",
        "_overhead_bytes",
        "_parser",
        "_pieces",
        "_silent_bytes",
        "headers",
        "is_complete",
        "is_touched",
        "keeps",
        "length",
        "status",
    )

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._known: _KnownHead | None = None
        self.begin()

    def begin(self, *, is_head: bool = False) -> None:
        """Expect the next answer; after HEAD it has no body, and the connection is not used again."""
        self.status = 0
        self.headers: list[Header] = []
        self.length: int | None = None
        self.is_complete = False
        self.is_touched = False
        self.keeps = False
        self._is_head = is_head
        self._is_chunked = False
        self._informational = 0
        self._lines = 0
        self._overhead_bytes = 0
        self._silent_bytes = 0
        self._has_progress = False
        self._fault = ""

    def feed(self, data: bytes) -> None:
        """Take in what has arrived. Bytes beyond the answer are dropped, and the connection is not kept.

        Raises:
            BadAnswerError: the answer cannot be passed on; the reader is of no more use.
        """
        if self.is_complete:
            self.keeps = False
            return
        is_first = not self.is_touched
        self.is_touched = True
        if is_first and self._known is not None and self._is_alike(data, self._known):
            return
        self._has_progress = False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.is_complete:
                raise BadAnswerError(f"the answer is no proper HTTP ({self._fault or error})") from error
            self.keeps = False
        if self._has_progress:
            self._silent_bytes = 0
            if is_first and self.keeps and self.length is not None:
                self._know(data)
            return
        self._silent_bytes += len(data)
        if self._silent_bytes > MOST_HEAD_BYTES:
            raise BadAnswerError(f"the answer has a head of more than {MOST_HEAD_BYTES} bytes")

    def _know(self, data: bytes) -> None:
        """Keep the head of an answer that arrived whole."""
        head = data[: data.find(_END, 0, _MOST_KNOWN_BYTES) + len(_END)]
        length = _LENGTH.search(head)
        is_plain = self.status == _OK and not self._is_head and not self._informational
        if length is not None and is_plain and self.length == len(data) - len(head):
            self._known = _KnownHead(head[: length.start(1)], head[length.end(1) :], self.headers)

    def _is_alike(self, data: bytes, known: _KnownHead) -> bool:
        """Read an answer that is here whole and repeats a known head but for its length, if it is that."""
        digits_at = len(known.before)
        digits_end = data.find(b"\r", digits_at, digits_at + _MOST_DIGITS)
        if (
            self._is_head
            or digits_end < 0
            or not data.startswith(known.before)
            or not data.startswith(known.after, digits_end)
        ):
            return False
        digits = data[digits_at:digits_end]
        body_at = digits_end + len(known.after)
        if not digits.isdigit() or int(digits) != len(data) - body_at:
            return False
        self.status = _OK
        self.headers = known.headers
        self.length = len(data) - body_at
        self.is_complete = self.keeps = True
        if self.length:
            self._pieces.append(data[body_at:])
        return True

    def take(self) -> bytes:
        """Return the bytes of the body that have arrived since the last call."""
        pieces = self._pieces
        if not pieces:
            return b""
        self._pieces = []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def end(self) -> None:
        """The server has closed the connection in good order.

        Raises:
            BadAnswerError: the answer is not complete without more bytes.
        """
        if self.is_complete:
            return
        if not self.status or self._is_chunked or self.length is not None:
            raise BadAnswerError("the server closed the connection")
        self.is_complete = True

    # --- what the parser calls ---

    def on_message_begin(self) -> None:
        if self.is_complete:
            self._refuse("more than one answer")
        self.headers = []
        self.length = None
        self._is_chunked = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._lines += 1
        self._overhead_bytes += len(name) + len(value) + 4
        if self._lines > MOST_HEAD_LINES:
            self._refuse(f"a head of more than {MOST_HEAD_LINES} lines")
        if self._overhead_bytes > MOST_HEAD_BYTES:
            self._refuse(f"a head of more than {MOST_HEAD_BYTES} bytes")
        if self.status:
            return  # a trailer
        low = name.lower()
        if low == b"content-length":
            self.length = int(value)
            return
        if low == b"transfer-encoding":
            if self._is_chunked or value.strip().lower() != b"chunked":
                self._refuse("the only transfer-encoding that is understood is chunked")
            self._is_chunked = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._parser.get_http_version() not in _VERSIONS:
            self._refuse("not HTTP/1.1")
        if status == _SWITCHING_PROTOCOLS:
            self._refuse("a switch of protocols")
        if _CONTINUE <= status < _FIRST_FINAL_STATUS:
            self._informational += 1
            if self._informational > MOST_INFORMATIONAL:
                self._refuse(f"more than {MOST_INFORMATIONAL} informational responses")
            return
        if not _FIRST_FINAL_STATUS <= status <= _LAST_STATUS:
            self._refuse(f"status {status:03}")
        self.status = status
        self._has_progress = True
        self.is_complete = self._is_head

    def on_body(self, body: bytes) -> None:
        if not self.is_complete:  # otherwise it answers HEAD
            self._has_progress = True
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        if self.status and not self.is_complete:
            self.is_complete = True
            self._has_progress = True
            self.keeps = self._parser.should_keep_alive()  # valid within this callback only (httptools 0.9)

    def _refuse(self, fault: str) -> NoReturn:
        self._fault = fault
        raise ValueError(fault)
