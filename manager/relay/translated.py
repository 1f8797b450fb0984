"""One request to a server that is no Ollama, and its answer, as an exchange sends and writes them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, NamedTuple

from manager.domain.money import in_usd
from manager.domain.roles import BodyChanges
from manager.relay.upstream import AnswerHead
from manager.services.routing.speaking import Speaking
from manager.wire.body import SMALL_BYTES
from manager.wire.caller import printable
from manager.wire.errors import BadBodyError
from manager.wire.translate import idle_answer

if TYPE_CHECKING:
    from manager.domain.judgement import Judgement
    from manager.domain.record import RequestRecord
    from manager.domain.routing import Attempt
    from manager.domain.target import Target
    from manager.relay.upstream import Address
    from manager.services.accounts.payment import Payment
    from manager.services.routing.attempting import Attempting
    from manager.wire.body import InferenceBody
    from manager.wire.routes import Route

NO_CHANGES: Final = BodyChanges()
_OK = 200
_JSON = b"application/json"
# A whole answer of a paid server that needs no translation.
MOST_WHOLE_BYTES: Final = 64 * 2**20


class TranslatedError(NamedTuple):
    """An answer with an error: what it says of the server, and what the client gets."""

    judgement: Judgement
    message: str
    head: AnswerHead
    content: bytes


class Translated:
    """One request to one target. `content` is the body for it, once `say` has returned None.

    Args:
        route: where the client sent it.
        target: its server.
        record: of the request.
        body: of the client.
        attempting: the life of the request.
    """

    content = b""
    _speaking: Speaking | None = None
    _too_long: str | None = None

    def __init__(
        self,
        route: Route,
        target: Target,
        record: RequestRecord,
        body: InferenceBody,
        attempting: Attempting,
    ) -> None:
        self._route = route
        self._target = target
        self._record = record
        self._body = body
        self._model = attempting.work.model
        self._changes = attempting.changes
        self._most = attempting.most_tokens
        self._streams = body.stream
        self._kept = bytearray()
        self._came_bytes = 0

    @staticmethod
    def nothing_to_do(body: InferenceBody, route: Route, model: str) -> bytes | None:
        """Return the answer to a request that only loads or unloads a model; None for any other."""
        return idle_answer(body, route, model, time.time_ns())

    def say(self) -> str | None:
        """Make the body for the server; return why that cannot be done, None where it was. Runs anywhere."""
        try:
            speaking = self._speaking = Speaking(self._route, self._target, self._record)
            self.content = speaking.request(self._body, self._model, self._changes, self._most)
        except BadBodyError as error:
            return str(error)
        return None

    def head_for(self, address: Address) -> bytes:
        """Return the head of the request. Nothing of the client's head is in it."""
        speaking = self._said
        lines = b"".join(b"%b: %b\r\n" % header for header in speaking.headers())
        return b"POST %b%b HTTP/1.1\r\nHost: %b\r\n%bContent-Length: %d\r\n\r\n" % (
            address.prefix,
            speaking.path.encode(),
            address.host,
            lines,
            len(self.content),
        )

    @property
    def is_whole(self) -> bool:
        """Return whether the answer is written once all of it has come."""
        return (self._said.is_translated or self._target.paid) and not self._streams

    def unreadable(self, head: AnswerHead) -> str | None:
        """Return why an answer with status 200 cannot be read; None where it can."""
        pairs = (line.partition(b":") for line in head.lines)
        return self._said.unreadable((name, value.strip()) for name, _, value in pairs)

    def head_for_client(self, head: AnswerHead, *, stream: bool) -> AnswerHead:
        """Return the head of an answer with status 200 whose bytes follow as they come."""
        kind = self._said.content_type(head.content_type)
        length = None if stream else head.length
        return AnswerHead(_OK, [b"Content-Type: %b\r\n" % kind], length, kind)

    def whole_head(self, length: int) -> AnswerHead:
        """Return the head of a whole answer with status 200."""
        kind = self._said.content_type(_JSON)
        return AnswerHead(_OK, [b"Content-Type: %b\r\n" % kind], length, kind)

    def came(self, data: bytes, *, complete: bool) -> bytes:
        """Return what the client gets of the next piece of an answer with status 200.

        A whole answer of a paid server is kept until its cost is known.
        """
        self._came_bytes += len(data)
        data = self._said.came(data, complete=complete)
        if self._said.is_translated or not self.is_whole:
            return data
        self._kept += data
        if len(self._kept) > MOST_WHOLE_BYTES:
            self._too_long = f"its answer is longer than {MOST_WHOLE_BYTES} bytes"
        if not complete:
            return b""
        kept, self._kept = bytes(self._kept), bytearray()
        return kept

    def is_long(self, data: bytes) -> bool:
        """Return whether an answer that ends with `data` is too long to be read on the event loop."""
        return self.is_whole and self._came_bytes + len(data) > SMALL_BYTES

    @property
    def fault(self) -> str | None:
        """Why the answer is not whole; None where it is, so far."""
        return self._said.fault or self._too_long

    @property
    def tokens(self) -> tuple[int | None, int | None]:
        """Input and output tokens of the answer."""
        return (None, None) if self._speaking is None else self._speaking.tokens

    def error(self, head: AnswerHead, body: bytes | None) -> TranslatedError:
        """Return what an answer that is no success says; `body` is None where it did not end."""
        found = self._said.error(head.status, body)
        kind = found.content_type
        lines = [line for line in head.lines if line[:12].lower() == b"retry-after:"]
        lines.append(b"Content-Type: %b\r\n" % kind)
        answer = AnswerHead(found.status, lines, len(found.content), kind)
        return TranslatedError(found.judgement, found.message, answer, found.content)

    @property
    def _said(self) -> Speaking:
        assert self._speaking is not None  # noqa: S101  (it was said before it is sent)
        return self._speaking


def payment_lines(payment: Payment, translated: Translated | None) -> bytes:
    """Return the headers of a paid answer: soft limits that are reached, and the cost where it is known."""
    lines = b""
    if payment.soft:
        lines += b"X-Budget-Soft: %b\r\n" % printable(payment.soft).encode()
    if translated is not None and translated.is_whole:
        cost_usd = in_usd(payment.cost(*translated.tokens))
        lines += b"X-Cost-USD: %b\r\n" % f"{cost_usd:.6f}".encode()
    return lines


def early_provider(attempt: Attempt | None) -> bytes:
    """Return the header with the provider before a server is asked; empty while any of them may answer."""
    if attempt is None:
        return b""
    name = attempt.instance if attempt.because == "paid" else "local"
    return f"X-Provider: {name}\r\n".encode()
