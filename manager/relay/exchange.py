"""One inference request: its framing and its deadlines, between a client and the servers that are tried."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from enum import Enum, auto
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import structlog

from manager.domain.judgement import GOOD
from manager.domain.models import model_key
from manager.domain.routing import RequestFacts
from manager.domain.target import Protocol as ServerProtocol
from manager.domain.target import Target
from manager.errors import OutOfDescriptorsError, Reason
from manager.relay.answer import EVENT_STREAM, AnswerWriter, ClientSide, stamp
from manager.relay.translated import NO_CHANGES, Translated, early_provider, payment_lines
from manager.relay.upstream import AnswerHead
from manager.services.routing.attempting import RUNS_PATH, Attempting, Trouble, Wait
from manager.services.steps import in_steps
from manager.wire.body import SMALL_BYTES, InferenceBody, read_body, reading
from manager.wire.dialect import message_of
from manager.wire.encoding import CONTENT_ENCODING
from manager.wire.errors import BadBodyError, BodyTooLargeError, NoRoomError
from manager.wire.offload import asks_for_cpu
from manager.wire.rewriting import body_for, rewriting
from manager.wire.statuses import (
    BAD_REQUEST,
    INTERNAL_ERROR,
    LATER,
    NO_RETRY,
    TOO_MANY_REQUESTS,
    UNAVAILABLE,
    judge,
    outcome_of,
    outcome_of_trouble,
    retry_after_s,
    status_of,
)
from manager.wire.trace import traceparent
from manager.wire.unload import unloaded, unloads
from manager.wire.usage import TAIL_BYTES, error_in, is_ended, load_ms, token_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from manager.domain.record import Outcome, RequestRecord
    from manager.domain.roles import BodyChanges
    from manager.relay.caller import Caller
    from manager.relay.relay import Relay
    from manager.relay.upstream import UpstreamConnection, UpstreamPool
    from manager.services.routing.attempting import Step
    from manager.wire.body import Buffer
    from manager.wire.routes import Route

_log = structlog.get_logger("relay")

_UPLOAD_STALL_S = 60.0
# An answer with an error is held up to this size and this long, to be read before another attempt is made.
_MAX_HELD_BYTES = 64 * 1024
_MAX_HOLDING_S = 5.0
_OK = 200
_OLLAMA = ServerProtocol.OLLAMA
_NO_ROOM = "the bodies of all requests together reach gateway.max_buffered; try again later"


class _State(Enum):
    READING = auto()
    PREPARING = auto()
    CONNECTING = auto()
    WAITING = auto()
    HOLDING = auto()
    STREAMING = auto()
    DONE = auto()


class _End(NamedTuple):
    """The end of an answer. One that is not whole has a `message`, for an error of that status.

    `fault` is why the server is to blame; None where it is not.
    """

    outcome: Outcome
    status: int = 0
    message: str = ""
    fault: Reason | None = None


class _Held(NamedTuple):
    """The whole answer of a server that failed."""

    head: AnswerHead
    body: bytes


_ENDED_WELL = _End("ok")


def _whole(content: bytes) -> _Held:
    """Return a native answer of our own."""
    kind = b"application/json; charset=utf-8"
    return _Held(AnswerHead(_OK, [b"Content-Type: %b\r\n" % kind], len(content), kind), content)


class Front(ClientSide, Protocol):
    """The connection of a client, as an exchange uses it. `relay.front` has the class that implements it."""

    flow: Any  # uvicorn's FlowControl

    def exchange_ended(self, exchange: Exchange) -> None:
        """The answer was written, or given up."""


class _NoWaiter:
    """Stands where uvicorn keeps the event that wakes its ASGI application."""

    def set(self) -> None:
        pass


class Exchange:
    """One request and its answer. All of it happens in callbacks on the event loop; only waits are tasks.

    What follows a failure is decided by `Attempting`. Every way out leads through `_finish`, which closes it.
    """

    # What uvicorn's protocol looks at in a cycle.
    message_event = _NoWaiter()
    disconnected = False
    response_complete = False

    # Most requests keep these values.
    received = False
    is_left = False
    _state = _State.READING
    _size = 0
    _refusal: tuple[int, str, Mapping[str, str]] | None = None
    _record: RequestRecord | None = None
    _attempting: Attempting | None = None
    _body: InferenceBody | None = None
    _as_came: tuple[bytes, ...] | None = None  # the body, where it may pass to the raw server
    _task: asyncio.Task[None] | None = None
    _connection: UpstreamConnection | None = None
    _load: tuple[str, str] | None = None
    _next_comment_at: float | None = None
    _swallow = False
    _is_probe = False
    _unloads = False
    _still_loaded = ""
    _translated: Translated | None = None  # where the server is no Ollama
    _status = 0
    _held_head: AnswerHead | None = None
    _held_since = 0.0
    _is_active = False
    _left: Outcome = "client_gone"

    def __init__(
        self,
        relay: Relay,
        front: Front,
        route: Route,
        caller: Caller,
        *,
        target: bytes,
        keep_alive: bool,
        chunks: bool,
        expects_continue: bool,
    ) -> None:
        self._relay = relay
        self._front: Front | None = front
        self._route = route
        self._caller = caller
        self._target = target
        self._answer = AnswerWriter(route.dialect, chunks=chunks, keep_alive=keep_alive)
        self.expects_continue = expects_continue
        self._began_at = self._last_active = monotonic()
        self._parts: list[bytes] = []
        self._tail = bytearray()

    @property
    def keep_alive(self) -> bool:
        """Whether the client's connection may serve another request afterwards."""
        return self._answer.keep_alive

    @keep_alive.setter
    def keep_alive(self, value: bool) -> None:
        self._answer.keep_alive = value

    # --- what the client's side calls ---

    def refuse(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Answer with this error when the turn comes, whatever the body says."""
        self._refusal = (status, message, headers or {})

    def refuse_now(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """As `refuse`, and without waiting for the rest of the body."""
        if self._refusal is None:
            self._drop_body()
            self.refuse(status, message, headers)
            self._answer_refusal()

    def refuse_size(self) -> None:
        """The body is too large, by its declared length or by what has come of it."""
        most = self._relay.limits.most_body_bytes
        self.refuse_now(413, f"the request body is too large: at most {most} bytes are accepted")

    def body_came(self, body: bytes) -> None:
        self._is_active = True
        if self._refusal is not None or self._state is _State.DONE:
            return
        if self._size + len(body) > self._relay.limits.most_body_bytes:
            self.refuse_size()
        elif not self._take_bytes(len(body)):
            self.refuse_now(UNAVAILABLE, _NO_ROOM, LATER)
        else:
            self._parts.append(body)

    def request_ended(self) -> None:
        self.received = True
        if self._front is not None and self._record is not None and self._state is _State.READING:
            self._begin()

    def turn_came(self) -> None:
        """All earlier requests of the connection have been answered."""
        self._relay.begun(self)
        record = self._record = self._relay.requests.record(
            self._route.path, self._route.kind, self._caller.origin
        )
        self._attempting = Attempting(self._relay.routing, record, self._began_at)
        if self._caller.grant is not None:
            self._attempting.grant = self._caller.grant
        self._is_active = True  # the time it waited for others is not its own delay
        if self._refusal is not None:
            self._answer_refusal()
        elif self.received:
            self._begin()

    def caller_left(self) -> None:
        """The connection is gone: end what is done for it, unless another request waits for it too."""
        self._front = None
        if self._state is _State.DONE:
            return
        if self._state is _State.WAITING and self._load is not None:
            self.is_left = True
            if self._relay.loads.others_wait(self, self._load):
                # To cancel this request could cancel the load that they wait for. It needs no slot any more.
                self._give_slot_back()
                return
        self._finish(self._left)

    def _give_slot_back(self) -> None:
        if self._attempting is not None:
            self._attempting.give_slot_back()

    def pause(self) -> None:
        """The client does not read."""
        if self._connection is not None and self._state is _State.STREAMING:
            self._connection.pause()

    def resume(self) -> None:
        self._is_active = True
        if self._connection is not None:
            self._connection.resume()

    # --- what the relay calls ---

    def cut(self, why: str) -> None:
        """End it now, and say so as far as the dialect allows."""
        self._fail(UNAVAILABLE, f"cut off: {why}", "cut", LATER)

    def give_up(self) -> None:
        """The client has left, and so have all that waited for the same load."""
        if self._state is not _State.DONE:
            self._finish(self._left)

    @property
    def attempting(self) -> Attempting | None:
        """Its life; None before its turn."""
        return self._attempting

    def cancel(self, why: str) -> None:
        """End it because the operator wants that. A load that other requests wait for goes on without it."""
        attempting, front, load = self._attempting, self._front, self._load
        if front is None or attempting is None:
            return  # the client has left: it ends with the load
        attempting.cancelled()
        why = f"cut off: {why}"
        if self._state is _State.WAITING and load is not None and self._relay.loads.others_wait(self, load):
            self._left = "cut"
            self.is_left = self.response_complete = True
            self._tell(front, UNAVAILABLE, why, NO_RETRY)
            self._give_slot_back()
            self._let_go()
        else:
            self._fail(UNAVAILABLE, why, "cut", NO_RETRY)

    def check(self, now: float) -> None:
        """Look at the deadlines; called a few times a second."""
        if self._is_active:
            self._is_active = False
            self._last_active = now
        attempting, state = self._attempting, self._state
        assert attempting is not None  # noqa: S101  (its turn has come)
        # A server that is being heard has deadlines of its own, below.
        is_looked_at = self._task is None and state is not _State.HOLDING
        step = attempting.look(now) if is_looked_at or now >= attempting.total_deadline else None
        if step is not None:
            self._follow(step)
        elif state is _State.STREAMING:
            if now - self._last_active > self._relay.limits.idle_timeout_s:
                self._stalled()
        elif state is _State.READING:
            if now - self._last_active > _UPLOAD_STALL_S:
                self.keep_alive = False
                self._fail(408, "the request body did not arrive", "client_error")
        elif state is _State.HOLDING:
            if now - self._held_since > _MAX_HOLDING_S:
                self._drop_connection()
                self._judge_held(None)
        else:
            self._comment(now)

    def _stalled(self) -> None:
        limit_s = self._relay.limits.idle_timeout_s
        if self._front is not None and self._front.flow.write_paused:
            # The client is not reading: an error behind all that it has not read would not reach it.
            self.keep_alive = False
            self._front.abort()
            self._finish("timeout")
        else:
            assert self._attempting is not None  # noqa: S101  (its answer has begun)
            self._attempting.broke_off(Reason.ATTEMPT_TIMEOUT)
            self._fail(504, f"nothing moved for {limit_s:g} s", "timeout")

    # --- what the server's side calls ---

    def head_came(self, head: AnswerHead) -> None:
        if self._load is not None:
            self._end_load()
        if self._state is _State.DONE:
            return
        if self._front is None:
            self._finish(self._left)
            return
        if self._task is not None:
            self._cancel_task()
        self._is_active = True
        attempting = self._attempting
        assert attempting is not None  # noqa: S101  (it has asked)
        if self._translated is not None:
            self._translated_head(head, self._translated)
            return
        judgement = judge(head.status) if head.status >= BAD_REQUEST else GOOD
        # Only the words of an internal error say whether it is about the request or the server.
        if attempting.might_follow(judgement) or head.status == INTERNAL_ERROR:
            self._state = _State.HOLDING
            self._held_head = head
            self._held_since = monotonic()
            return
        wait_s = retry_after_s(head.lines) if head.status >= BAD_REQUEST else None
        attempting.answered(judgement, retry_after_s=wait_s)
        if self._still_loaded and head.status == _OK:
            self._fail_to_unload()
        else:
            self._deliver(head)

    def _deliver(self, head: AnswerHead) -> None:
        """Give the client this answer, as it comes."""
        record, attempting = self._record, self._attempting
        assert record is not None  # noqa: S101  (its turn has come)
        assert attempting is not None  # noqa: S101
        self._state = _State.STREAMING
        self._status = head.status
        record.ttfb_ms = (monotonic() - self._began_at) * 1000  # comments do not count
        self._is_probe = record.stream and head.status == _OK and attempting.is_probe
        if not self._answer.is_begun:
            record.status = head.status
            body = self._body
            self._answer.begin(head, self._stamp(), stream=body is not None and body.stream)
        else:
            # The client has a head already, so that only a stream of events can follow it.
            self._swallow = head.status != _OK or not head.content_type.startswith(EVENT_STREAM)

    def answer_came(self, data: bytes, *, complete: bool) -> None:
        self._is_active = True
        if complete:
            self._connection = None
        if self._state is _State.HOLDING:
            self._hold(data, complete=complete)
            return
        if self._state is not _State.STREAMING:
            return
        if self._translated is None:
            self._write(data, complete=complete)
        elif complete and self._translated.is_long(data):
            self._spawn(partial(self._translate_end, data, self._translated))
        else:
            self._write_translated(self._translated.came(data, complete=complete), complete=complete)

    async def _translate_end(self, data: bytes, translated: Translated) -> None:
        """Read a long answer in a thread."""
        content = await asyncio.to_thread(translated.came, data, complete=True)
        self._task = None
        self._write_translated(content, complete=True)

    def _write_translated(self, content: bytes, *, complete: bool) -> None:
        written = self._translation_of(content, complete=complete)
        if written is not None:
            self._write(written, complete=complete)

    def _write(self, data: bytes, *, complete: bool) -> None:
        """Give the client the next piece of its answer."""
        if data:
            tail = self._tail
            tail += data
            if len(tail) > 4 * TAIL_BYTES:
                del tail[:-TAIL_BYTES]
            if self._is_probe and not complete:  # the end of a whole answer decides
                self._probed(data)
            if self._swallow:
                data = b""
        end = self._end_of_answer() if complete else None
        wrote = self._answer.write(self._front, data, last=end is not None and not end.message)
        if wrote and self._size:
            assert self._attempting is not None  # noqa: S101  (it has asked)
            self._attempting.delivered()
            self._forget_body()  # nothing is sent a second time from here on
        if end is not None:
            self._end_with(end)

    def _probed(self, data: bytes) -> None:
        """Take in the beginning of the stream of a request that tries a half-open breaker."""
        self._is_probe = False
        if self._attempting is not None and not self._swallow and error_in(data) is None:
            self._attempting.begun()

    def _end_with(self, end: _End) -> None:
        if end.fault is not None:
            assert self._attempting is not None  # noqa: S101  (it has asked)
            self._attempting.broke_off(end.fault)
        if end.message:
            self._fail(end.status, end.message, end.outcome)
        else:
            self._finish(end.outcome)

    def _hold(self, data: bytes, *, complete: bool) -> None:
        """Read the answer of a server that failed, before another attempt is made."""
        self._tail += data
        if len(self._tail) > _MAX_HELD_BYTES:
            if self._translated is not None:
                self._drop_connection()
                self._judge_held(None)
                return
            head = self._held_head
            assert head is not None  # noqa: S101  (it is being held)
            kept, self._tail = bytes(self._tail), bytearray()
            assert self._attempting is not None  # noqa: S101
            self._attempting.spend()  # an answer of this size is the client's
            self._attempting.answered(judge(head.status), retry_after_s=retry_after_s(head.lines))
            self._deliver(head)
            self.answer_came(kept, complete=complete)
        elif complete:
            self._judge_held(bytes(self._tail))

    def _judge_held(self, body: bytes | None) -> None:
        """Decide what follows the answer of a server that failed; `body` is None where it did not end."""
        head, attempting = self._held_head, self._attempting
        assert head is not None  # noqa: S101  (it is being held)
        assert attempting is not None  # noqa: S101
        self._held_head = None
        self._tail.clear()
        if self._translated is not None:
            self._judge_translated(head, body, self._translated)
            return
        message = f"{attempting.work.instance} answered with status {head.status}"
        held = None
        if body is not None:
            held = _Held(head, body)
            message = message_of(body) or message
        step = attempting.answered(
            judge(head.status, message), message, held, retry_after_s=retry_after_s(head.lines)
        )
        if step is not None:
            self._follow(step)
        elif held is not None:
            self._deliver_held(held)
        else:
            self._fail(502, message, "upstream_error")

    # --- a server that is no Ollama ---

    def _translate(self, target: Target) -> None:
        """Say the request in the words of the target, then send it there."""
        body, record, attempting = self._body, self._record, self._attempting
        assert body is not None  # noqa: S101  (all of these come before a target)
        assert record is not None  # noqa: S101
        assert attempting is not None  # noqa: S101
        self._state = _State.CONNECTING
        content = Translated.nothing_to_do(body, self._route, attempting.work.model)
        if content is not None:
            attempting.answered(GOOD)
            self._deliver_held(_whole(content))
            return
        translated = self._translated = Translated(self._route, target, record, body, attempting)
        if not body.is_small:
            self._spawn(partial(self._translate_large, translated, target))
            return
        message = translated.say()
        if message is None:
            self._connect(target)
        else:
            self._follow(attempting.unsayable(message))

    async def _translate_large(self, translated: Translated, target: Target) -> None:
        message = await asyncio.to_thread(translated.say)
        self._task = None
        if message is None:
            self._connect(target)
        elif self._attempting is not None:
            self._follow(self._attempting.unsayable(message))

    def _translated_head(self, head: AnswerHead, translated: Translated) -> None:
        attempting, body = self._attempting, self._body
        assert attempting is not None  # noqa: S101  (it has asked)
        if head.status != _OK:
            self._state = _State.HOLDING
            self._held_head = head
            self._held_since = monotonic()
            return
        unreadable = translated.unreadable(head)
        if unreadable is not None:
            self._drop_connection()
            message = f"{attempting.work.instance}: {unreadable}"
            self._follow(attempting.failed(Reason.INVALID_OUTPUT, message, sent=True))
            return
        attempting.answered(GOOD)
        if translated.is_whole:  # its head follows when its length is known
            assert self._record is not None  # noqa: S101  (its turn has come)
            self._state = _State.STREAMING
            self._status = _OK
            self._record.ttfb_ms = (monotonic() - self._began_at) * 1000
        else:
            self._deliver(translated.head_for_client(head, stream=body is not None and body.stream))

    def _translation_of(self, data: bytes, *, complete: bool) -> bytes | None:
        """Return what the client gets of translated bytes; None where nothing is written now."""
        attempting, translated = self._attempting, self._translated
        assert attempting is not None  # noqa: S101  (it has asked)
        assert translated is not None  # noqa: S101  (its server is no Ollama)
        fault = translated.fault
        if fault is None:
            if translated.is_whole and not self._answer.is_begun:
                if not complete:
                    return None
                assert self._record is not None  # noqa: S101  (its turn has come)
                self._record.status = _OK
                self._answer.begin(translated.whole_head(len(data)), self._stamp(), stream=False)
            return data
        self._drop_connection()
        message = f"{attempting.work.instance}: {fault}"
        if self._record is not None:  # what a part of an answer costs is paid
            self._record.input_tokens, self._record.output_tokens = translated.tokens
        if data:
            self._tail += data
            if self._answer.write(self._front, data):
                attempting.delivered()
        if attempting.is_delivered or not (self._answer.retract() or not self._answer.is_begun):
            attempting.broke_off(Reason.UPSTREAM_ERROR)
            self._fail(502, message, "upstream_error")
        else:
            self._follow(attempting.failed(Reason.INVALID_OUTPUT, message, sent=True))
        return None

    def _judge_translated(self, head: AnswerHead, body: bytes | None, translated: Translated) -> None:
        attempting = self._attempting
        assert attempting is not None  # noqa: S101  (it has asked)
        error = translated.error(head, body)
        held = _Held(error.head, error.content)
        wait_s = retry_after_s(head.lines)
        step = attempting.answered(error.judgement, error.message, held, retry_after_s=wait_s)
        if step is not None:
            self._follow(step)
        else:
            self._translated = None  # what is written now is said already
            self._deliver_held(held)

    def _deliver_held(self, held: _Held) -> None:
        self._deliver(held.head)
        self.answer_came(held.body, complete=True)

    def _end_of_answer(self) -> _End:
        """Return how an answer whose last byte has come has ended."""
        end = self._end_by_content()
        cut = self._attempting.cut if self._attempting is not None else None
        if end.outcome != "upstream_error" or cut is None:
            return end
        return _End("cut", UNAVAILABLE, f"cut off: {cut}")

    def _end_by_content(self) -> _End:
        if self._swallow:
            message = message_of(bytes(self._tail)) or f"the server answered with status {self._status}"
            return _End("upstream_error", self._status, message)
        if self._status == _OK and self._body is not None and self._body.stream:
            tail = bytes(self._tail)
            if not is_ended(self._route, tail):
                error = error_in(tail)
                if error is None:
                    message = "the server ended the stream before its end"
                    return _End("upstream_error", 502, message, Reason.UPSTREAM_ERROR)
                # The server said so itself, in its last line.
                return _End("upstream_error", fault=judge(INTERNAL_ERROR, error).reason)
        return _ENDED_WELL if self._status == _OK else _End(outcome_of(self._status))

    def answer_broke(self, why: str, *, may_have_begun: bool) -> None:
        """See `relay.upstream.ResponseSink`."""
        self._connection = None
        self._end_load()
        if self._state is _State.DONE:
            return
        if self._front is None:
            self._finish(self._left)
            return
        attempting = self._attempting
        assert attempting is not None  # noqa: S101  (it has asked)
        name = attempting.work.instance
        if self._state is _State.HOLDING:
            self._judge_held(None)
        elif self._state is _State.WAITING:
            self._cancel_task()
            reason = Reason.UPSTREAM_UNREACHABLE
            message = f"{name}: {why}"
            self._follow(attempting.failed(reason, message, sent=may_have_begun, stale=not may_have_begun))
        elif attempting.cut is not None:
            self.cut(attempting.cut)
        else:
            message = f"{name}: {why} before the answer ended"
            attempting.delivered()  # the client has the head, or an error in its place: nothing else follows
            attempting.failed(Reason.UPSTREAM_ERROR, message, sent=True)
            self._fail(502, message, "upstream_error")

    # --- from the request to a server ---

    def _begin(self) -> None:
        if self._relay.routing.rollout.raw is not None:
            self._as_came = tuple(self._parts)
        try:
            if self._size <= SMALL_BYTES and self._caller.encoding is None:
                parts = self._parts
                raw = parts[0] if len(parts) == 1 else b"".join(parts)
                parts.clear()
                self._decide(read_body(raw, self._route))
            else:
                self._state = _State.PREPARING
                self._spawn(self._read_in_steps)
        except Exception as error:  # noqa: BLE001  (see `_end_for`)
            self._end_for(error)

    async def _read_in_steps(self) -> None:
        most, encoding, encoded_bytes = self._relay.limits.most_body_bytes, self._caller.encoding, self._size
        steps = reading(self._parts, self._route, most, encoding, self._take_bytes)
        try:
            # A body that may pass to the raw server is held as it came, too.
            has_room = self._as_came is None or encoding is not None or self._take_bytes(encoded_bytes)
            body = await in_steps(steps) if has_room else None
        except NoRoomError:
            body = None
        if body is None:
            self._fail(UNAVAILABLE, _NO_ROOM, "refused", LATER)
            return
        if encoding is not None and self._as_came is None:
            self._size -= encoded_bytes
            self._relay.bodies.give_back(encoded_bytes)
        self._task = None
        self._decide(body)

    def _take_bytes(self, count: int) -> bool:
        """Count bytes of the body that are held; False where all bodies together have reached their bound."""
        if not self._relay.bodies.take(count):
            return False
        self._size += count
        return True

    def _decide(self, body: InferenceBody) -> None:
        record, attempting = self._record, self._attempting
        assert record is not None  # noqa: S101  (its turn has come)
        assert attempting is not None  # noqa: S101
        self._body = body
        model = body.model or record.lane
        if not model:
            if self._may_pass_unread():
                self._pass_unread(body)
            else:
                self._fail(400, "model is required", "client_error")
            return
        record.stream = body.stream
        record.model = model
        facts = RequestFacts(
            model=model,
            kind=self._route.kind,
            instance=self._caller.origin.instance,
            lane=record.lane,
            local_only=record.local_only,
        )
        if "keep_alive" in body.fields and unloads(body, self._route):
            self._unloads = True
            self._state = _State.PREPARING
            self._spawn(partial(self._unload, facts))
        else:
            self._follow(attempting.enter(facts, body))

    def _pass_unread(self, body: InferenceBody) -> None:
        """Pass a request that names no model to the raw server, which judges it."""
        attempting = self._attempting
        assert attempting is not None  # noqa: S101  (its turn has come)
        self._body = body
        self._follow(attempting.enter(RequestFacts("", self._route.kind, local_only=True)))

    async def _unload(self, facts: RequestFacts) -> None:
        """Unload the model from every instance that runs; start none for it."""
        attempting = self._attempting
        assert attempting is not None  # noqa: S101  (its turn has come)
        step: Step | None = attempting.enter_running(facts)
        while isinstance(step, Wait):
            step = await attempting.wait()
        others = attempting.others
        if others:
            # Before the first instance answers, so that its failure leaves the model loaded nowhere else.
            found = await asyncio.gather(*(self._relay.unload(one.instance, one.model) for one in others))
            self._still_loaded = "; ".join(filter(None, found))
        self._task = None
        if step is not None:
            self._follow(step)

    def _follow(self, step: Step) -> None:
        """Do what `Attempting` says. A defect ends the request: no callback that comes here could."""
        try:
            self._take(step)
        except Exception as error:  # noqa: BLE001  (see `_end_for`)
            self._end_for(error)

    def _take(self, step: Step) -> None:
        attempting = self._attempting
        assert attempting is not None  # noqa: S101  (it gave the step)
        if not attempting.is_waiting:
            # The server that was asked, if one was, is out of it.
            if self._task is not None:
                self._cancel_task()
            if self._load is not None:
                self._end_load()
            if self._connection is not None:
                self._drop_connection()
            self._translated = None
            if self._front is None:
                self._finish(self._left)  # the load that others wait for was this server's
                return
        if isinstance(step, Target):
            if step.protocol is _OLLAMA:
                self._connect(step)
            else:
                self._translate(step)
        elif isinstance(step, Wait):
            if not attempting.is_waiting:
                self._state = _State.PREPARING
            self._spawn(self._wait)
        else:
            self._report(step)

    def _connect(self, target: Target) -> None:
        attempting = self._attempting
        assert attempting is not None  # noqa: S101  (it gave the target)
        pool = self._relay.pools.pool(target.endpoint)
        # A restart of the server has closed all kept connections. A request that cannot be repeated is not
        # risked on a kept one.
        connection = None if attempting.has_repeated or not target.repeatable else pool.idle()
        if connection is not None:
            self._send(connection)
        else:
            self._state = _State.CONNECTING
            self._spawn(partial(self._open, pool))

    async def _wait(self) -> None:
        assert self._attempting is not None  # noqa: S101  (it has asked to wait)
        step = await self._attempting.wait()
        self._task = None
        if step is not None:
            self._follow(step)

    async def _open(self, pool: UpstreamPool) -> None:
        timeout_s = self._relay.limits.connect_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                connection = await pool.connect()
        except TimeoutError:
            self._task = None
            self._unreachable(Reason.ATTEMPT_TIMEOUT, f"could not be connected to within {timeout_s:g} s")
        except OutOfDescriptorsError as error:
            self._task = None
            assert self._attempting is not None  # noqa: S101  (connections belong to an attempt)
            self._follow(
                self._attempting.failed(
                    error.reason, error.message, sent=False, ours=True, retry_after_s=error.retry_after_s
                )
            )
        except OSError as error:
            self._task = None
            self._unreachable(Reason.UPSTREAM_UNREACHABLE, f"cannot be reached ({error.strerror or error})")
        else:
            self._task = None
            self._send(connection)

    def _unreachable(self, reason: Reason, why: str) -> None:
        attempting = self._attempting
        assert attempting is not None  # noqa: S101  (connections belong to an attempt)
        self._follow(attempting.failed(reason, f"{attempting.work.instance} {why}", sent=False))

    def _send(self, connection: UpstreamConnection) -> None:
        self._connection = connection
        body, attempting = self._body, self._attempting
        assert body is not None  # noqa: S101  (all of these come before a connection)
        assert attempting is not None  # noqa: S101
        if self._translated is not None:
            self._put(connection, (self._translated.content,), NO_CHANGES)
        elif attempting.is_raw:
            # The stage may have changed while the body was read.
            self._put(connection, (body.raw,) if self._as_came is None else self._as_came, NO_CHANGES)
        elif body.is_small:
            attempt, changes = attempting.attempt, attempting.changes
            assert attempt is not None  # noqa: S101
            self._put(connection, (body_for(body, self._route, attempt.model, changes),), changes)
        else:
            self._state = _State.CONNECTING
            self._connection = connection
            self._spawn(partial(self._rewrite_and_put, connection, body, attempting))

    async def _rewrite_and_put(
        self, connection: UpstreamConnection, body: InferenceBody, attempting: Attempting
    ) -> None:
        changes = attempting.changes
        pieces = await in_steps(rewriting(body, self._route, attempting.work.model, changes))
        self._task = None
        if connection.usable:
            self._put(connection, pieces, changes)
        else:
            self._connection = None
            self._follow(attempting.failed(Reason.UPSTREAM_UNREACHABLE, "closed", sent=False, stale=True))

    def _put(self, connection: UpstreamConnection, pieces: Sequence[Buffer], changes: BodyChanges) -> None:
        record, attempting = self._record, self._attempting
        assert record is not None  # noqa: S101  (its turn has come)
        assert attempting is not None  # noqa: S101
        target = attempting.target
        assert target is not None  # noqa: S101  (a connection leads to it)
        if self._translated is not None:
            self._state = _State.WAITING
            attempting.sent()
            self._connection = connection
            connection.send(self, self._translated.head_for(connection.address), pieces)
            return
        added = target.headers
        if self._as_came is not None and attempting.is_raw and self._caller.encoding is not None:
            added = (*added, (CONTENT_ENCODING, self._caller.encoding.encode()))
        head = b"%bX-Request-Id: %b\r\ntraceparent: %b\r\nContent-Length: %d\r\n\r\n" % (
            self._caller.head_for(connection.address, self._target, added),
            record.request_id.encode(),
            traceparent(record.trace_id, record.span_id, sampled=record.sampled),
            len(pieces[0]) if len(pieces) == 1 else sum(map(len, pieces)),
        )
        self._state = _State.WAITING
        attempting.sent()
        fields = self._body.fields if self._body is not None else {}
        if ("options" in fields or not changes.empty) and asks_for_cpu(fields, self._route, changes):
            attempting.expect_on_cpu()
        if attempting.may_load:
            work = attempting.work
            load = self._load = (work.instance, model_key(work.model))
            self._relay.loads.add(self, load)
        self._connection = connection
        connection.send(self, head, pieces)

    # --- the end ---

    def _report(self, trouble: Trouble) -> None:
        """No attempt is left: tell the client."""
        if self._unloads and trouble.reason is Reason.INSTANCE_STOPPED:
            if self._still_loaded:
                self._fail_to_unload()
            else:
                self._deliver_held(self._unloaded())
            return
        if isinstance(trouble.answer, _Held) and not self._answer.is_begun:
            self._deliver_held(trouble.answer)
            return
        status = status_of(trouble.reason, trouble.refused)
        headers = {}
        if status in (UNAVAILABLE, TOO_MANY_REQUESTS):
            headers["Retry-After"] = str(max(1, round(trouble.retry_after_s or 1)))
        elif trouble.refused == "async_only":
            headers["Location"] = RUNS_PATH
        outcome = outcome_of_trouble(status, trouble.reason, trouble.refused)
        self._fail(status, trouble.message, outcome, headers)

    def _fail_to_unload(self) -> None:
        self._fail(502, f"the model may still be loaded: {self._still_loaded}", "upstream_error")

    def _unloaded(self) -> _Held:
        """Return the answer to an unload where no instance runs."""
        assert self._record is not None  # noqa: S101  (its turn has come)
        return _whole(unloaded(self._route, self._record.model or "", datetime.now(UTC)))

    def _comment(self, now: float) -> None:
        """Tell a client who waits for a stream of events that its request is alive."""
        every_s = self._relay.limits.keep_alive_s
        body, front, attempting = self._body, self._front, self._attempting
        if every_s <= 0 or front is None or body is None or not body.stream:
            return
        if attempting is None:
            return
        if self._next_comment_at is None:
            self._next_comment_at = self._began_at + every_s
        if now < self._next_comment_at:
            return
        waits_for = attempting.waits_for
        if waits_for is None:
            return
        self._next_comment_at = now + every_s
        record = self._record
        assert record is not None  # noqa: S101
        queues = attempting.is_queued
        if queues:
            attempting.count_wait()
        if self._answer.comment(front, self._stamp(is_early=True), f"waiting for {waits_for}"):
            record.status = _OK
            if not queues:  # no server was chosen yet: any of them can answer behind the comment
                attempting.delivered()

    def _answer_refusal(self) -> None:
        if self._refusal is None or self._record is None or self._state is _State.DONE:
            return
        status, message, headers = self._refusal
        self._fail(status, message, "refused" if status == UNAVAILABLE else "client_error", headers)

    def _fail(
        self, status: int, message: str, outcome: Outcome, headers: Mapping[str, str] | None = None
    ) -> None:
        """Tell the client, in its dialect, as far as it can still be told."""
        front = self._front
        self._cancel_task()
        self._drop_connection()
        if front is None or self._record is None:
            self._finish(self._left)
            return
        if not self.received:
            self.keep_alive = False  # the rest of its body would be taken for the next request
        self._tell(front, status, message, headers)
        self._finish(outcome)

    def _tell(
        self, front: Front, status: int, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        record, attempting = self._record, self._attempting
        assert record is not None  # noqa: S101  (its turn has come)
        assert attempting is not None  # noqa: S101
        attempting.message = message
        told = self._answer.fail(
            front,
            status,
            message,
            stamp=self._stamp(),
            headers=headers,
            request_id=record.request_id,
            tail=b"" if self._swallow else self._tail,
        )
        if told:
            record.status = status

    def _finish(self, outcome: Outcome) -> None:
        if self._state is _State.DONE:
            return
        self._state = _State.DONE
        if self._task is not None:
            self._cancel_task()
        if self._load is not None:
            self._end_load()
        if self._connection is not None:
            self._drop_connection()
        if self._size or self._parts:
            self._forget_body()  # the connection keeps its last exchange
        self._relay.ended(self)
        self.response_complete = True
        record, attempting = self._record, self._attempting
        if record is not None and attempting is not None:
            if self._translated is not None:
                record.input_tokens, record.output_tokens = self._translated.tokens
            elif self._tail:
                record.input_tokens, record.output_tokens = token_counts(self._route.dialect, self._tail)
                record.load_ms = load_ms(self._route.dialect, self._tail)
            try:
                attempting.close(outcome)
            finally:
                self._let_go()
        else:
            self._let_go()

    def _let_go(self) -> None:
        front, self._front = self._front, None
        if front is not None:
            front.exchange_ended(self)

    # --- helpers ---

    def _end_for(self, error: Exception) -> None:
        """End this request for an error in the body, or for a defect; the others go on."""
        try:
            if isinstance(error, BodyTooLargeError):
                self._fail(413, str(error), "client_error")
            elif isinstance(error, BadBodyError):
                if self._body is None and self._may_pass_unread():
                    self._pass_unread(InferenceBody(b"", {}, "", stream=False, exact=False))
                    return
                self._fail(400, str(error), "client_error")
            else:
                _log.error("request_failed", path=self._route.path, exc_info=error)
                self._fail(500, "the manager failed; its log says more", "refused")
        except Exception:
            self._finish("refused")  # the client cannot even be told
            raise
        self._finish("refused")

    def _may_pass_unread(self) -> bool:
        """Return whether a body that names no model, or cannot be read, goes to the raw server."""
        record = self._record
        if self._as_came is None or record is None:
            return False
        grant = self._caller.grant
        if grant is not None and grant.permit is not None:
            return False  # the raw server might read a model in it that the key does not permit
        return not self._relay.routing.rollout.stages.manages(None, record.lane)

    def _spawn(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        self._task = self._relay.spawn(self._guarded(work))

    async def _guarded(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        try:
            await work()
        except Exception as error:  # noqa: BLE001  (see `_end_for`)
            self._end_for(error)

    def _stamp(self, *, is_early: bool = False) -> bytes:
        """Return the headers that tell where an answer comes from; `is_early` is before a server is asked."""
        record, attempting = self._record, self._attempting
        assert record is not None  # noqa: S101  (its turn has come)
        attempt = attempting.attempt if attempting is not None else None
        where = None if attempt is None else (attempt.instance, attempt.model)
        if is_early:
            return stamp(record, self._caller.for_page, where, early_provider(attempt))
        lines = stamp(record, self._caller.for_page, where)
        payment = None if attempting is None else attempting.payment
        return lines if payment is None else lines + payment_lines(payment, self._translated)

    def _cancel_task(self) -> None:
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()

    def _forget_body(self) -> None:
        body = self._body
        if body is not None:
            body.forget()
        self._drop_body()

    def _drop_body(self) -> None:
        self._parts.clear()
        if self._as_came is not None:
            self._as_came = ()
        size, self._size = self._size, 0
        if size:
            self._relay.bodies.give_back(size)

    def _end_load(self) -> None:
        load, self._load = self._load, None
        if load is not None:
            self._relay.loads.remove(self, load)
