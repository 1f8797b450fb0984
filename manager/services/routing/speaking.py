"""One request in the words of a server that is no Ollama, and its answer, for the relay and for runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import urlsplit

from manager.domain.judgement import ABOUT_THE_REQUEST, Judgement
from manager.domain.target import Protocol as ServerProtocol
from manager.errors import Reason
from manager.wire.credentials import secrets_in
from manager.wire.dialect import error_body
from manager.wire.mask import Mask
from manager.wire.metering import Passing
from manager.wire.statuses import judge
from manager.wire.trace import traceparent
from manager.wire.translate import Traits, Untranslatable, refusal, translation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manager.domain.record import RequestRecord
    from manager.domain.roles import BodyChanges
    from manager.domain.target import Target
    from manager.wire.body import InferenceBody
    from manager.wire.head import Header
    from manager.wire.routes import Route
    from manager.wire.translate.hub import Usage

_VERSION = "/v1"
_REDIRECTS = range(300, 400)
# The key is ours, and so is the bill: neither is the client's business.
_OURS = (401, 402, 403, 407)
_OVERLOADED, _BAD_GATEWAY, _UNAVAILABLE = 529, 502, 503
_ERROR = 400
_PLAIN = b"identity"
_USER_AGENT = b"ollama-manager"
_BYTES_A_TOKEN = 4
_BYTES_AROUND_A_TOKEN = 300


class Speech(Protocol):
    """One request in the words of a server: a `Translation`, or bytes that pass."""

    path: str
    usage: Usage | None
    fault: str | None

    def request(
        self,
        body: InferenceBody,
        model: str,
        changes: BodyChanges,
        *,
        max_tokens: int | None = None,
        wants_usage: bool = False,
    ) -> bytes: ...
    def head(self, status: int) -> tuple[int, bytes]: ...
    def feed(self, data: bytes) -> bytes: ...
    def end(self) -> bytes: ...
    def error(self, status: int, body: bytes) -> str: ...


class SpokenError(NamedTuple):
    """An error of a server: what it says of the server, and the whole of what the client gets."""

    judgement: Judgement
    status: int
    message: str
    content: bytes
    content_type: bytes


class Speaking:
    """One request to one target of another protocol than Ollama's. Knows no connection.

    Args:
        route: where the client sent the request.
        target: its server.
        record: of the request.

    Raises:
        BadBodyError: such a server cannot serve the route.
    """

    def __init__(self, route: Route, target: Target, record: RequestRecord) -> None:
        why = refusal(route, target.protocol)
        if why is not None:
            raise Untranslatable(why)
        traits = _traits(target)
        speech: Speech | None = translation(
            route, target.protocol, request_id=record.request_id, clock=time.time_ns, traits=traits
        )
        # Whole answers come at once where they are translated.
        self.is_translated = speech is not None
        self._speech: Speech = Passing(route, traits) if speech is None else speech
        self._route = route
        self._target = target
        self._record = record
        self._seen_bytes = self._seen_events = 0
        self._mask = Mask(secrets_in(target.headers))
        self.path = server_path(target, self._speech.path)

    def request(self, body: InferenceBody, model: str, changes: BodyChanges, most: int | None) -> bytes:
        """Return the body for the server.

        Args:
            body: of the client.
            model: the name of the model there.
            changes: those of the role and of the model.
            most: the longest answer that may be paid; None where nothing is.

        Raises:
            BadBodyError: the server has no word for a part of it, or it has a wrong type.
        """
        return self._speech.request(body, model, changes, max_tokens=most, wants_usage=self._target.paid)

    def headers(self) -> tuple[Header, ...]:
        """Return the headers of the request, without Host and framing. None of the client's is among them."""
        record = self._record
        lines = [
            (b"Content-Type", b"application/json"),
            (b"Accept", b"text/event-stream, application/json" if record.stream else b"application/json"),
            (b"User-Agent", _USER_AGENT),
        ]
        if not self._target.paid:  # whoever sells answers needs no ids of ours
            trace = traceparent(record.trace_id, record.span_id, sampled=record.sampled)
            lines += [(b"X-Request-Id", record.request_id.encode()), (b"traceparent", trace)]
        return (*lines, *self._target.headers)

    def content_type(self, of_server: bytes) -> bytes:
        """Return the content type of an answer with status 200, for the client."""
        return self._speech.head(200)[1] or of_server

    def came(self, data: bytes, *, complete: bool) -> bytes:
        """Return what the client gets of the next piece of an answer with status 200."""
        self._seen_bytes += len(data)
        self._seen_events += data.count(b"data:")
        written = self._speech.feed(data) if data else b""
        if not complete or self._speech.fault is not None:
            return self._mask.feed(written)
        return self._mask.feed(written + self._speech.end()) + self._mask.end()

    def unreadable(self, headers: Iterable[Header]) -> str | None:
        """Return why the body of an answer cannot be read; None where it can."""
        coding = next((value for name, value in headers if name.lower() == b"content-encoding"), _PLAIN)
        if coding.strip().lower() in (_PLAIN, b""):
            return None
        return f"its answer comes in the coding {coding[:40].decode('latin-1')!r}, which was not asked for"

    @property
    def fault(self) -> str | None:
        """Why the answer is not whole; None where it is, so far."""
        fault = self._speech.fault
        return None if fault is None else self._mask.text(fault)

    def error(self, status: int, body: bytes | None) -> SpokenError:
        """Return what an answer that is no success says, of the server and to the client.

        Args:
            status: of the server.
            body: the error; None where it did not end.
        """
        judgement, status, message = self._judged(status, body)
        content, kind = error_body(self._route.dialect, status, message, self._record.request_id)
        return SpokenError(judgement, status, message, content, kind)

    def _judged(self, status: int, body: bytes | None) -> tuple[Judgement, int, str]:
        name = self._target.instance
        if status in _REDIRECTS:
            message = f"{name} answers with a redirect (status {status}), which is not followed"
            return Judgement(Reason.UPSTREAM_ERROR), _BAD_GATEWAY, message
        told = self._mask.text(self._speech.error(status, body or b""))
        if status in _OURS:
            message = f"{name} refuses the manager's key or account (status {status})"
            return Judgement(Reason.UPSTREAM_ERROR), _BAD_GATEWAY, message
        if status == _OVERLOADED:
            return Judgement(Reason.OVERLOADED), _UNAVAILABLE, f"{name}: {told}"
        if status < _ERROR:
            message = f"{name} answered with status {status} in place of an answer"
            return Judgement(Reason.UPSTREAM_ERROR), _BAD_GATEWAY, message
        judgement = judge(status, told)
        return judgement, status, told if judgement is ABOUT_THE_REQUEST else f"{name}: {told}"

    @property
    def tokens(self) -> tuple[int | None, int | None]:
        """The tokens of the answer as the server says them.

        Of a paid answer that was cut off, the output is estimated by what has come: events, and bytes beyond
        those around a token.
        """
        usage = self._speech.usage
        if usage is not None:
            return usage.input_tokens, usage.output_tokens
        if not (self._target.paid and self._seen_bytes):
            return None, None
        more = self._seen_bytes - _BYTES_AROUND_A_TOKEN * self._seen_events
        return None, self._seen_events + max(0, more) // _BYTES_A_TOKEN


def server_path(target: Target, path: str) -> str:
    """Return the path of a request below the base URL of a target, which has the version of an API in it."""
    return path if target.protocol is ServerProtocol.OLLAMA else path.removeprefix(_VERSION)


def _traits(target: Target) -> Traits:
    """Return what tells a server from others of its protocol.

    OpenAI and Gemini refuse fields that they do not know. OpenAI's own models take no `max_tokens` any more,
    which older servers alone know.
    """
    if not target.paid:
        return Traits()
    host = urlsplit(target.endpoint).hostname or ""
    is_openai = host == "api.openai.com" or host.endswith((".openai.com", ".openai.azure.com"))
    return Traits(max_tokens_field="max_completion_tokens" if is_openai else "max_tokens", extended=False)
