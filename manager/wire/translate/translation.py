"""One request to a server of another dialect, and the way of its answer back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from manager.domain.target import Protocol
from manager.wire.body import BadBodyError, dumped
from manager.wire.json_values import NO_JSON
from manager.wire.routes import Dialect
from manager.wire.translate.codec import DEFAULT_TRAITS, UnsayableError
from manager.wire.translate.errors import message_in
from manager.wire.translate.hub import AnswerFacts, CallBegan, Conversation, Ended, Failed
from manager.wire.translate.table import CLIENTS, SERVERS
from manager.wire.translate.vectors import VectorsCame
from manager.wire.values import changed_values

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manager.domain.roles import BodyChanges
    from manager.wire.body import InferenceBody
    from manager.wire.routes import Route
    from manager.wire.translate.codec import ClientCodec, Clock, ServerCodec, Traits
    from manager.wire.translate.hub import AnswerEvent, Usage

_OK = 200
_NS = 10**9
_JSON = b"application/json"
_STREAMS = {Dialect.NATIVE: b"application/x-ndjson", Dialect.OPENAI: b"text/event-stream"}
_NATIVE_JSON = b"application/json; charset=utf-8"

# Routes whose bytes pass as they are, beside all of them at an Ollama.
_SPEAKS = {
    Protocol.OPENAI: frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings"}),
    Protocol.ANTHROPIC: frozenset({"/v1/messages"}),
}


class Translation:
    """The way of one request to a server of another dialect, and of its answer back.

    One object an attempt. All of it is pure: a body larger than `body.SMALL_BYTES` may be translated in a
    thread. The answer of a stream comes in pieces, a whole one with `end`. Once `fault` is set there are no
    more bytes: the caller reports it in the words of the client (`dialect.error_in_stream` where bytes
    were sent, `dialect.error_body` with 502 where not).

    Attributes:
        path: of the server, below its base URL.
        usage: the tokens of the answer, as soon as the server says them; None until then.
        fault: why the answer is not whole; None where it is.
    """

    def __init__(
        self,
        client: ClientCodec[Any, Any],
        server: ServerCodec[Any, Any],
        route: Route,
        *,
        request_id: str,
        clock: Clock,
    ) -> None:
        self.path = server.path
        self.usage: Usage | None = None
        self.fault: str | None = None
        self._client = client
        self._server = server
        self._route = route
        self._request_id = request_id
        self._clock = clock
        self._streams = False
        self._is_over = False

    def request(
        self,
        body: InferenceBody,
        model: str,
        changes: BodyChanges,
        *,
        max_tokens: int | None = None,
        wants_usage: bool = False,
    ) -> bytes:
        """Return the body for the server.

        Args:
            body: the request of the client.
            model: the name of the model at the server.
            changes: those of the role and of the model, in the words of the client's dialect.
            max_tokens: the longest answer that may be paid; a smaller limit of the client's counts.
            wants_usage: whether the server is to say how many tokens a stream had. The client gets them
                only where it has asked for them.

        Raises:
            Untranslatable: the server has no word for a part of the request.
            BadBodyError: a field has the wrong type.
        """
        self._streams = body.stream
        try:
            fields = changed_values(body, self._route, model, changes)
            asked = replace(self._client.read(fields, stream=body.stream), model=model)
            facts = AnswerFacts(self._request_id, model, self._clock() // _NS, body.stream)
            if isinstance(asked, Conversation):
                facts = replace(facts, wants_usage=asked.wants_usage, completes=asked.completes)
                most = [limit for limit in (asked.max_tokens, max_tokens) if limit is not None]
                asked = replace(
                    asked, max_tokens=min(most, default=None), wants_usage=asked.wants_usage or wants_usage
                )
            self._client.begin(facts, self._clock)
            return dumped(self._server.document(asked))
        except RecursionError:
            raise BadBodyError(NO_JSON) from None

    def head(self, status: int) -> tuple[int, bytes]:
        """Return the status and the content type for the client."""
        if self._streams and status == _OK:
            return status, _STREAMS.get(self._route.dialect, b"text/event-stream")
        return status, _NATIVE_JSON if self._route.dialect is Dialect.NATIVE else _JSON

    def feed(self, data: bytes) -> bytes:
        """Return what the client gets of the next piece of an answer with status 200."""
        return b"" if self._is_over else self._written(self._server.feed(data))

    def end(self) -> bytes:
        """Return the last bytes for the client, once the server's last byte has come; sets `fault`."""
        return b"" if self._is_over else self._written(self._server.end())

    def error(self, status: int, body: bytes) -> str:
        """Return the message of an answer with an error."""
        return message_in(body) or f"the server answered with status {status}"

    def _written(self, events: Iterable[AnswerEvent | VectorsCame]) -> bytes:
        pieces: list[bytes] = []
        for event in events:
            if isinstance(event, Failed):
                self._fail(event.message)
                break
            if isinstance(event, Ended | VectorsCame):
                self._is_over, self.usage = True, event.usage
            try:
                pieces.append(self._client.write(self._with_id(event)))
            except UnsayableError as error:
                self._fail(str(error))
            except RecursionError:
                self._fail("the server sent an answer that nests too deep")
            if self._is_over:
                break
        return b"".join(pieces)

    def _with_id(self, event: AnswerEvent | VectorsCame) -> AnswerEvent | VectorsCame:
        """Return the event; the call of a tool gets an id where the server gives none."""
        if isinstance(event, CallBegan) and not event.id:
            return event._replace(id=f"call_{self._request_id}_{event.number}")
        return event

    def _fail(self, fault: str) -> None:
        self._is_over, self.fault = True, fault


def translation(
    route: Route,
    protocol: Protocol,
    *,
    request_id: str,
    clock: Clock,
    traits: Traits = DEFAULT_TRAITS,
) -> Translation | None:
    """Return the translation of one request; None where the server speaks the client's dialect.

    Args:
        route: where the client sent it; `refusal` has found nothing against it.
        protocol: of the server.
        request_id: what the ids in the answer are made of.
        clock: returns the Unix time in nanoseconds, for the times in the answer.
        traits: what tells this server from others of its protocol.
    """
    if speaks(route, protocol):
        return None
    client, server = CLIENTS[route.path], SERVERS[protocol, route.kind]
    return Translation(client(), server(traits), route, request_id=request_id, clock=clock)


def refusal(route: Route, protocol: Protocol) -> str | None:
    """Return why a server of this protocol cannot serve the route; None where it can."""
    if speaks(route, protocol) or (protocol, route.kind) in SERVERS:
        return None
    return f"servers of the protocol {protocol} have no call for requests of the kind {route.kind}"


def speaks(route: Route, protocol: Protocol) -> bool:
    """Return whether the bytes of the route pass as they are."""
    return protocol is Protocol.OLLAMA or route.path in _SPEAKS[protocol]
