"""Whole requests that the daemon makes itself, for a client of its own API: they take the gateway's own path.

Role, policy, lane, limits of keys, failover, budgets and history are those of any request.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from manager.domain.routing import RequestFacts
from manager.domain.target import Protocol
from manager.errors import (
    InvalidRequestError,
    ManagerError,
    NotAnsweredError,
    Reason,
    RegistryUnwritableError,
    UnavailableError,
)
from manager.services.routing.asking import (
    UnansweredError,
    WholeAnswer,
    answered,
    native_question,
    read_whole,
    spoken_question,
    too_large,
    until_deadline,
)
from manager.services.routing.attempting import Attempting
from manager.services.routing.own import OwnRequests
from manager.services.routing.placement import reason_of
from manager.services.routing.speaking import Speaking
from manager.services.steps import in_steps
from manager.wire.body import reading
from manager.wire.dialect import message_of
from manager.wire.errors import BadBodyError
from manager.wire.statuses import (
    BAD_REQUEST,
    INTERNAL_ERROR,
    judge,
    outcome_of,
    outcome_of_trouble,
    status_of,
)
from manager.wire.usage import TAIL_BYTES, error_in, fault_of, load_ms, token_counts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping

    from manager.domain.auto import Choice
    from manager.domain.keys import Grant
    from manager.domain.record import Outcome, RequestRecord
    from manager.domain.target import Target
    from manager.services.open_requests import OpenRequest
    from manager.services.ports import ModelServer, Question, ServerAnswer
    from manager.services.requests import Origin, Requests
    from manager.services.routing.attempting import Routing
    from manager.wire.body import InferenceBody
    from manager.wire.routes import Route

# The message of a cancellation, where the client is the reason.
CLIENT_LEFT = "the client has left"
MOST_ANSWER_BYTES = 16 * 2**20
_SMALL_BYTES = 16 * 1024
_OK = 200
_LONGEST_MESSAGE = 1000


@dataclass(frozen=True, slots=True)
class Asking:
    """The client of a request. `path` is as it is logged. A background request takes free slots only.

    One of a run waits behind the requests of its lane, as long as it takes.
    """

    origin: Origin
    grant: Grant | None
    path: str
    is_background: bool = False
    is_run: bool = False


class Whole(NamedTuple):
    """A good answer. `began_s` to `first_s` and `ended_s` are monotonic times.

    `content` is the body; of a stream that is all of its lines, and `first_s` the time of its first piece.
    """

    content: bytes
    record: RequestRecord
    began_s: float
    first_s: float
    ended_s: float

    @property
    def latency_ms(self) -> float:
        return (self.ended_s - self.began_s) * 1000

    @property
    def message(self) -> str | None:
        """The text of an answer of `/api/chat` that is no stream; None where it has none."""
        try:
            text = orjson.loads(self.content)["message"]["content"]
        except (ValueError, LookupError, TypeError):
            return None
        return text if isinstance(text, str) else None


class WholeRequests:
    """Makes requests, and returns their whole answers. Lives on the event loop.

    Args:
        routing: as for any request.
        server: sends requests.
        requests: begins records.
    """

    def __init__(self, routing: Routing, server: ModelServer, requests: Requests) -> None:
        self._routing = routing
        self._server = server
        self._requests = requests
        self._own = OwnRequests()

    def open(self) -> Iterable[OpenRequest]:
        """Return the requests that are under way."""
        return self._own.open()

    async def ask(
        self,
        route: Route,
        fields: Mapping[str, Any],
        asking: Asking,
        choice: Choice | None = None,
        *,
        sent: Callable[[Target, str], Awaitable[None]] | None = None,
        is_brief: bool = False,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Whole:
        """Have a request answered. Cancelling this ends it.

        Args:
            route: of the dialect that the request is written in.
            fields: of its body, with the model. A stream is read to its end, which its dialect has to mark.
            asking: its client.
            choice: how the model was chosen; None where the client has named it.
            sent: called with the target and the id of the request, right before it is sent there.
            is_brief: the few tokens of the answer are for the answer: an Ollama is told not to think, unless
                the configuration says otherwise. Others may not know the word.
            is_cancelled: whether the operator has ended it, should this be cancelled.

        Raises:
            NotAnsweredError: no server has answered, or its answer is no success.
            InvalidRequestError: a server refuses what is in the request.
            RegistryUnwritableError: of `sent`; nothing was sent.
        """
        request = _Request(self._routing, self._server, self._requests, route, asking, sent)
        request.is_brief = is_brief

        def cancelled(error: asyncio.CancelledError) -> None:
            if CLIENT_LEFT in error.args:
                request.outcome_of_cancel = "client_gone"
            if is_cancelled():
                request.attempting.cancelled()

        work = request.do(fields, choice)
        return await self._own.do(request.attempting, work, cancelled=cancelled)


class _Request:
    """One request."""

    def __init__(  # noqa: PLR0917  (the parts of `WholeRequests`, and the arguments of `ask`)
        self,
        routing: Routing,
        server: ModelServer,
        requests: Requests,
        route: Route,
        asking: Asking,
        sent: Callable[[Target, str], Awaitable[None]] | None,
    ) -> None:
        self._server = server
        self._route = route
        self._asking = asking
        self._began_at = monotonic()
        self._speaking: Speaking | None = None
        self._first_at: float | None = None  # of the first piece of a stream
        self.record = requests.record(asking.path, route.kind, asking.origin)
        self.attempting = Attempting(routing, self.record, self._began_at)
        self.attempting.grant = asking.grant
        self.attempting.is_background = asking.is_background
        self.attempting.is_run = asking.is_run or asking.is_background
        self._sent = sent
        self.is_brief = False
        self.outcome_of_cancel: Outcome = "cut"

    async def do(self, fields: Mapping[str, Any], choice: Choice | None) -> Whole:
        outcome: Outcome = "cut"
        try:
            return await self._do(fields, choice)
        except asyncio.CancelledError:
            outcome = self.outcome_of_cancel
            raise
        except UnansweredError as error:
            trouble = error.trouble
            status = status_of(trouble.reason, trouble.refused)
            outcome = outcome_of_trouble(status, trouble.reason, trouble.refused)
            self._note(status, trouble.message)
            raise NotAnsweredError(
                trouble.message,
                reason=trouble.reason,
                refused=trouble.refused,
                retry_after_s=trouble.retry_after_s,
            ) from None
        except RegistryUnwritableError as error:  # of `sent`
            outcome = "refused"
            self._note(status_of(error.reason), error.message)
            raise
        except (BadBodyError, InvalidRequestError) as error:
            outcome = "client_error"
            self._note(BAD_REQUEST, str(error))
            raise InvalidRequestError(str(error)[:_LONGEST_MESSAGE]) from None
        except ManagerError as error:
            outcome = "upstream_error" if isinstance(error, UnavailableError) else "refused"
            self._note(status_of(reason_of(error)), error.message)
            if isinstance(error, UnavailableError) and not isinstance(error, NotAnsweredError):
                raise NotAnsweredError(
                    error.message, reason=error.reason, refused=None, retry_after_s=error.retry_after_s
                ) from None
            raise
        finally:
            if self._speaking is not None:
                self.record.input_tokens, self.record.output_tokens = self._speaking.tokens
            self.attempting.close(outcome)

    async def _do(self, fields: Mapping[str, Any], choice: Choice | None) -> Whole:
        record, attempting, route = self.record, self.attempting, self._route
        raw = orjson.dumps(fields) if _is_small(fields) else await asyncio.to_thread(orjson.dumps, fields)
        body = await in_steps(reading([raw], route, len(raw)))
        record.model = body.model
        record.stream = body.stream
        if choice is not None:
            attempting.note_choice(choice)
        origin = self._asking.origin
        facts = RequestFacts(
            body.model, route.kind, origin.instance, origin.lane, local_only=origin.local_only
        )
        decided_from = perf_counter()
        step = attempting.enter(facts, body)
        if choice is not None:
            record.routing_ms = round((perf_counter() - decided_from) * 1000, 3)

        async def question(target: Target) -> Question:
            return await self._question(target, body)

        spoken = lambda: self._speaking  # noqa: E731
        async with answered(attempting, self._server, step, question, spoken) as answer:
            attempting.delivered()
            record.status = status = answer.status
            first = monotonic()
            record.ttfb_ms = (first - self._began_at) * 1000
            content = await self._read(answer)
            if self._first_at is not None:
                first = self._first_at
                record.ttfb_ms = (first - self._began_at) * 1000
        if status != _OK:
            message = message_of(content) or f"the server answered with status {status}"
            reason = judge(status, message).reason
            if reason is None:
                raise InvalidRequestError(message[:_LONGEST_MESSAGE])
            raise UnavailableError(message[:_LONGEST_MESSAGE], reason=reason)
        if self._speaking is None:
            record.input_tokens, record.output_tokens = token_counts(route.dialect, content)
            record.load_ms = load_ms(route.dialect, content)
        else:
            record.input_tokens, record.output_tokens = self._speaking.tokens
        attempting.close(outcome_of(status))
        return Whole(content, record, self._began_at, first, monotonic())

    async def _question(self, target: Target, body: InferenceBody) -> Question:
        attempting = self.attempting
        self._speaking = None
        if target.protocol is not Protocol.OLLAMA:
            speaking = self._speaking = Speaking(self._route, target, self.record)
            question = await spoken_question(attempting, target, speaking, body)
        else:
            changes = attempting.changes
            if self.is_brief and changes.think is None:
                changes = replace(changes, think=False)
            question = await native_question(attempting, target, self._route, body, changes)
        if self._sent is not None:
            await self._sent(target, self.record.request_id)
        return question

    async def _read(self, answer: ServerAnswer | WholeAnswer) -> bytes:
        if isinstance(answer, WholeAnswer):
            return answer.content
        if self.record.stream and answer.status == _OK:
            async with until_deadline(self.attempting):
                return await self._streamed(answer)
        return self._said(await read_whole(self.attempting, answer, MOST_ANSWER_BYTES), complete=True)

    async def _streamed(self, answer: ServerAnswer) -> bytes:
        """Return all lines of a stream in the words of the client, and note when the first piece came.

        Raises:
            UnavailableError: it breaks off, ends before its end, or is too large.
        """
        attempting, content = self.attempting, bytearray()
        is_probe, taken = attempting.is_probe, 0
        while piece := await answer.piece():
            if is_probe:
                is_probe = False
                if error_in(piece) is None:
                    attempting.begun()
            said = self._said(piece)
            if said and self._first_at is None:
                self._first_at = monotonic()
            content += said
            taken += len(piece)
            if max(taken, len(content)) > MOST_ANSWER_BYTES:
                raise too_large(attempting)
        content += self._said(b"", complete=True)
        tail = bytes(content[-TAIL_BYTES:])
        fault = fault_of(self._route, tail)
        if fault is not None:
            told = error_in(tail)
            reason = Reason.UPSTREAM_ERROR if told is None else judge(INTERNAL_ERROR, told).reason
            message = f"{self.record.effective_target}: {fault}"[:_LONGEST_MESSAGE]
            raise UnavailableError(message, reason=reason or Reason.UPSTREAM_ERROR)
        return bytes(content)

    def _said(self, piece: bytes, *, complete: bool = False) -> bytes:
        """Return what has come in the words of the client.

        Raises:
            UnavailableError: a translated answer is not whole.
        """
        speaking = self._speaking
        if speaking is None:
            return piece
        said = speaking.came(piece, complete=complete)
        if speaking.fault is not None:
            self.attempting.broke_off(Reason.INVALID_OUTPUT)
            message = f"{self.record.effective_target}: {speaking.fault}"
            raise UnavailableError(message[:_LONGEST_MESSAGE], reason=Reason.INVALID_OUTPUT)
        return said

    def _note(self, status: int, message: str) -> None:
        self.attempting.message = message
        self.record.status = status


def _is_small(fields: Mapping[str, Any]) -> bool:
    return sum(len(one) for one in fields.values() if isinstance(one, str)) < _SMALL_BYTES
