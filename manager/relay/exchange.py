"""One inference request on its way: read, decided, sent on, and answered exactly once."""

from __future__ import annotations

import asyncio
from enum import Enum, auto
from functools import lru_cache
from random import getrandbits
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

import structlog

from manager.domain.models import model_key
from manager.domain.routing import RequestFacts
from manager.errors import ManagerError, OutOfDescriptorsError, Reason
from manager.relay.upstream import AnswerHead
from manager.services.gateway import Attempts, reason_of
from manager.services.traffic import RequestRecord
from manager.wire.body import BadBodyError, body_for, read_body
from manager.wire.caller import printable
from manager.wire.dialect import error_body, error_in_stream, message_of
from manager.wire.head import STATUS_LINES
from manager.wire.routes import Dialect
from manager.wire.statuses import (
    BAD_REQUEST,
    REFUSED,
    UNAVAILABLE,
    failure_of,
    outcome_of,
    outcome_without_answer,
    told_as,
)
from manager.wire.trace import is_sampled, traceparent
from manager.wire.usage import TAIL_BYTES, is_ended, token_counts

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from manager.domain.routing import Attempt
    from manager.relay.caller import Caller
    from manager.relay.front import Front
    from manager.relay.relay import Relay
    from manager.relay.upstream import UpstreamConnection, UpstreamPool
    from manager.services.leases import Lease
    from manager.services.traffic import Outcome
    from manager.wire.body import InferenceBody
    from manager.wire.routes import Route

_log = structlog.get_logger("relay")

_UPLOAD_STALL_S = 60.0
# How much longer a load that makes progress may take, each time that it is looked at.
_GRACE_S = 10.0
_EVENT_STREAM = b"text/event-stream"
_NO_BUFFERING = b"Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n"
_WITHOUT_BODY = (204, 304)


class _State(Enum):
    READING = auto()
    PREPARING = auto()
    CONNECTING = auto()
    WAITING = auto()
    STREAMING = auto()
    DONE = auto()


class _End(NamedTuple):
    """How an answer ended. One that is not whole says so in a `message` of that status."""

    outcome: Outcome
    status: int = 0
    message: str = ""

    @property
    def whole(self) -> bool:
        return not self.message


# Nearly all answers end so.
_ENDED_WELL = _End("ok")


class _NobodyListens:
    """Stands where uvicorn keeps the event that wakes its ASGI application."""

    def set(self) -> None:
        pass


class Exchange:
    """One request and its answer. All of it happens in callbacks on the event loop; only waits are tasks.

    The first bytes to the caller settle everything: until then another attempt may follow, afterwards not.
    Every way out leads through `_finish`, which gives the lease back.
    """

    # What uvicorn's protocol looks at in a cycle.
    message_event = _NobodyListens()
    disconnected = False
    response_complete = False

    # What most requests never need a value of their own for.
    received = False
    is_left = False
    _state = _State.READING
    _size = 0
    _refusal: tuple[int, str, dict[str, str]] | None = None
    _record: RequestRecord | None = None
    _attempts: Attempts | None = None
    _attempt: Attempt | None = None
    _body: InferenceBody | None = None
    _fallback_reason: Reason | None = None
    _trouble: tuple[Reason, str, float | None] | None = None
    _lease: Lease | None = None
    _start_ms: float | None = None
    _task: asyncio.Task[None] | None = None
    _connection: UpstreamConnection | None = None
    _retried = False
    _recovered = False
    _loading: tuple[str, str] | None = None
    _first_byte_at = 0.0
    _asking = False
    _next_comment_at: float | None = None
    _heard = ""
    _started = False
    _swallow = False
    _status = 0
    _head = b""
    _active = False

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
        self._chunks = chunks
        self.keep_alive = keep_alive
        self.expects_continue = expects_continue
        self._began_at = self._last_active = monotonic()
        self._parts: list[bytes] = []
        self._tail = bytearray()

    # --- what the caller's side calls ---

    def refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        """Answer with this error when the turn comes, whatever the body says."""
        self._refusal = (status, message, headers or {})

    def refuse_now(self, status: int, message: str) -> None:
        """As `refuse`, and without waiting for the rest of the body."""
        if self._refusal is None:
            self._parts.clear()
            self.refuse(status, message)
            self._answer_refusal()

    def body_came(self, body: bytes) -> None:
        self._active = True
        self._size += len(body)
        most = self._relay.limits.most_body_bytes
        if self._size > most:
            self.refuse_now(413, f"the request body is too large: at most {most} bytes are taken")
        elif self._refusal is None:
            self._parts.append(body)

    def request_ended(self) -> None:
        self.received = True
        if self._front is not None and self._record is not None and self._state is _State.READING:
            self._begin()

    def turn_came(self) -> None:
        """Requests before this one on its connection have been answered."""
        self._relay.begun(self)
        self._record = self._new_record()
        self._active = True  # what it has waited for others is not its own delay
        if self._refusal is not None:
            self._answer_refusal()
        elif self.received:
            self._begin()

    def caller_left(self) -> None:
        """The connection is gone: whatever is done for it ends, unless somebody else waits for it too."""
        self._front = None
        if self._state is _State.DONE:
            return
        if self._state is _State.WAITING and self._loading is not None:
            self.is_left = True
            if self._relay.others_wait(self, *self._loading):
                return  # to cancel this request could cancel the load that they wait for
        self._finish("client_gone")

    def pause(self) -> None:
        """The caller takes no more for now."""
        if self._connection is not None and self._state is _State.STREAMING:
            self._connection.pause()

    def resume(self) -> None:
        self._active = True
        if self._connection is not None:
            self._connection.resume()

    # --- what the relay calls ---

    @property
    def model_at_work(self) -> tuple[str, bool] | None:
        """The model that a server has been asked for, and whether it is being loaded; None before that."""
        if self._attempt is None or self._connection is None:
            return None
        return self._attempt.model, self._loading is not None

    def cut(self, why: str) -> None:
        """End it now, and say so as far as the dialect allows."""
        self._fail(503, f"cut off: {why}", "cut")

    def give_up(self) -> None:
        """The caller has left, and by now so have all who waited for the same."""
        if self._state is not _State.DONE:
            self._finish("client_gone")

    def check(self, now: float) -> None:
        """Look at the deadlines; called a few times a second."""
        if self._active:
            self._active = False
            self._last_active = now
        if now - self._began_at >= self._relay.limits.total_timeout_s:
            limit_s = self._relay.limits.total_timeout_s
            self._fail(504, f"no end within {limit_s:g} s", "timeout")
        elif self._state is _State.STREAMING:
            if now - self._last_active > self._relay.limits.idle_timeout_s:
                if self._front is not None and self._front.flow.write_paused:
                    # It is the caller that takes nothing: a line behind all the others would keep it here.
                    self.keep_alive = False
                    self._front.abort()
                    self._finish("timeout")
                    return
                limit_s = self._relay.limits.idle_timeout_s
                self._fail(504, f"nothing moved for {limit_s:g} s", "timeout")
        elif self._state is _State.READING:
            if now - self._last_active > _UPLOAD_STALL_S:
                self.keep_alive = False
                self._fail(408, "the request body did not arrive", "client_error")
        else:
            if self._state is _State.WAITING:
                self._check_waiting(now)
            self._comment(now)

    def _check_waiting(self, now: float) -> None:
        attempt = self._attempt
        assert attempt is not None  # noqa: S101  (it was sent)
        if now >= self._first_byte_at and not self._asking:
            self._asking = True
            self._task = self._relay.spawn(self._guarded(self._ask_for_patience()))
        elif not self._started and self._relay.gateway.is_silent(attempt.instance) and self._more():
            self._relay.gateway.failed(attempt.instance, Reason.INSTANCE_UNHEALTHY)
            why = f"{attempt.instance} has stopped answering"
            self._attempt_failed(Reason.INSTANCE_UNHEALTHY, why, None)

    # --- what the server's side calls ---

    def head_came(self, head: AnswerHead) -> None:
        self._stop_waiting_for_load()
        if self._state is _State.DONE:
            return
        if self._front is None:
            self._finish("client_gone")
            return
        self._status = head.status
        reason = failure_of(head.status) if head.status >= BAD_REQUEST else None
        if reason is not None and self._attempt is not None:
            self._relay.gateway.failed(self._attempt.instance, reason, self._attempt.model)
            if not self._started and self._more():
                self._drop_connection()
                why = f"{self._attempt.instance} answered with status {head.status}"
                self._attempt_failed(reason, why, None)
                return
        if self._task is not None:
            self._cancel_task()
        self._state = _State.STREAMING
        self._active = True
        if not self._started:
            self._start_answer(head)
        else:
            # The caller has been given a head already, so that only a stream of events can follow it.
            record = self._record
            assert record is not None  # noqa: S101  (its turn has come)
            record.ttfb_ms = (monotonic() - self._began_at) * 1000  # signs of life do not count
            self._swallow = head.status != 200 or not head.content_type.startswith(_EVENT_STREAM)  # noqa: PLR2004

    def answer_came(self, data: bytes, *, complete: bool) -> None:
        self._active = True
        if complete:
            self._connection = None
        if self._state is not _State.STREAMING:
            return
        if data:
            data = self._framed(data)
        end = self._end_of_answer() if complete else None
        if end is not None and self._chunks and end.whole:
            data += b"0\r\n\r\n"
        if self._head:
            data = self._head + data
            self._head = b""
            if self._body is not None:
                self._body.forget()  # nothing is sent a second time from here on
        if data and self._front is not None:
            self._front.write(data)
        if end is not None:
            self._end(end)

    def _framed(self, data: bytes) -> bytes:
        """What the caller is to get for a piece of the answer, whose end is kept for a look at it."""
        tail = self._tail
        tail += data
        if len(tail) > 4 * TAIL_BYTES:
            del tail[:-TAIL_BYTES]
        if self._swallow:
            return b""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunks else data

    def _end_of_answer(self) -> _End:
        """What has become of an answer whose last byte has come."""
        if self._swallow:
            message = message_of(bytes(self._tail)) or f"the server answered with status {self._status}"
            return _End("upstream_error", self._status, message)
        outcome: Outcome = outcome_of(self._status)
        if self._status == 200 and self._body is not None and self._body.stream:  # noqa: PLR2004
            tail = bytes(self._tail)
            if not is_ended(self._route, tail):
                if message_of(_last_line(tail)) is None:
                    message = "the server ended the stream before its end"
                    return _End("upstream_error", 502, message)
                outcome = "upstream_error"  # it said so itself, in its last line
        return _ENDED_WELL if outcome == "ok" else _End(outcome)

    def _end(self, end: _End) -> None:
        if end.whole:
            self._finish(end.outcome)
        else:
            self._fail(end.status, end.message, end.outcome)

    def answer_broke(self, why: str, *, may_have_begun: bool) -> None:
        self._connection = None
        self._stop_waiting_for_load()
        if self._state is _State.DONE:
            return
        if self._front is None:
            self._finish("client_gone")
            return
        assert self._attempt is not None  # noqa: S101  (it was sent)
        if self._head:
            # It broke right behind its head, of which the caller has seen nothing yet.
            self._head = b""
            self._started = False
            self._state = _State.WAITING
        if self._state is _State.WAITING and not may_have_begun and not self._retried:
            # For example, the server closed an idle connection: send the request again, on a new one.
            self._retried = True
            self._cancel_task()
            self._connect()
            return
        name = self._attempt.instance
        reason = Reason.UPSTREAM_UNREACHABLE if self._state is _State.WAITING else Reason.UPSTREAM_ERROR
        self._relay.gateway.failed(name, reason)
        if self._state is _State.WAITING:
            self._attempt_failed(reason, f"{name}: {why}", None)
        else:
            self._fail(502, f"{name}: {why} before the answer ended", "upstream_error")

    # --- from the request to a server ---

    def _begin(self) -> None:
        try:
            self._decide()
        except BadBodyError as error:
            self._fail(400, str(error), "client_error")
        except Exception as error:  # noqa: BLE001  (a defect: this request gets an answer, the others go on)
            self._defect(error)

    async def _guarded(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001  (as in `_begin`)
            self._defect(error)

    def _defect(self, error: Exception) -> None:
        _log.error("request_failed", path=self._route.path, exc_info=error)
        self._fail(500, "the manager failed; its log says more", "refused")

    def _decide(self) -> None:
        raw = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        record = self._record
        assert record is not None  # noqa: S101  (its turn has come)
        self._body = body = read_body(raw, self._route)
        model = body.model or record.lane
        if not model:
            raise BadBodyError("model is required")
        record.stream = body.stream
        record.model = model
        facts = RequestFacts(
            model=model,
            kind=self._route.kind,
            instance=self._caller.instance,
            lane=record.lane,
        )
        self._attempts = Attempts(self._relay.gateway, facts)
        decision = self._attempts.decision
        record.role = decision.role
        record.policy = decision.policy
        record.requested_target = decision.requested_target
        if decision.refused is not None:
            refused = decision.refused
            record.fallback_reason = refused.reason
            self._fail(REFUSED[refused.what], refused.message, "refused")
            return
        self._try_next()

    def _try_next(self) -> None:
        attempt = self._attempts.next() if self._attempts is not None else None
        if attempt is None:
            self._give_up_trying()
            return
        record, gateway = self._record, self._relay.gateway
        assert record is not None  # noqa: S101  (its turn has come)
        self._attempt = attempt
        self._heard = ""
        self._retried = False
        record.attempts += 1
        record.effective_target = attempt.instance
        record.endpoint = None
        record.model = attempt.model
        if self._fallback_reason is None:
            self._fallback_reason = attempt.fallback
        record.fallback = self._fallback_reason is not None
        record.fallback_reason = self._fallback_reason
        lease = gateway.try_lease(attempt)
        if lease is not None:
            self._leased(lease)
        else:
            self._state = _State.PREPARING
            self._task = self._relay.spawn(self._guarded(self._prepare(attempt)))

    async def _prepare(self, attempt: Attempt) -> None:
        assert self._attempts is not None  # noqa: S101  (it is one of them)
        try:
            prepared = await self._relay.gateway.prepare(
                attempt,
                patient=not self._more(),
                failed_on=self._attempts.failed_on,
                tell=self._hear,
            )
        except ManagerError as error:
            self._task = None
            reason = reason_of(error)
            self._relay.gateway.failed(attempt.instance, reason)
            self._attempt_failed(reason, error.message, error.retry_after_s)
            return
        self._task = None
        if prepared.start_ms is not None:
            self._start_ms = (self._start_ms or 0.0) + prepared.start_ms
        self._leased(prepared.lease)

    def _leased(self, lease: Lease) -> None:
        self._lease = lease
        if self._record is not None:
            self._record.endpoint = lease.endpoint
        connection = self._relay.pool(lease.endpoint).idle()
        if connection is not None:
            self._send(connection)
        else:
            self._connect()

    def _connect(self) -> None:
        assert self._lease is not None  # noqa: S101  (a lease comes first)
        self._state = _State.CONNECTING
        self._task = self._relay.spawn(self._guarded(self._open(self._relay.pool(self._lease.endpoint))))

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
            headers = {"Retry-After": f"{error.retry_after_s:g}"}
            self._fail(told_as(error.reason), error.message, "refused", headers)
        except OSError as error:
            self._task = None
            self._unreachable(Reason.UPSTREAM_UNREACHABLE, f"cannot be reached ({error.strerror or error})")
        else:
            self._task = None
            self._send(connection)

    def _unreachable(self, reason: Reason, why: str) -> None:
        attempt = self._attempt
        assert attempt is not None  # noqa: S101  (connections belong to an attempt)
        if not self._recovered and not self._more():
            # Its container may have ended a moment ago: then it is started again, as if it had been known.
            self._recovered = True
            self._give_lease_back()
            self._state = _State.PREPARING
            self._task = self._relay.spawn(self._guarded(self._recover(attempt, reason, why)))
        else:
            self._relay.gateway.failed(attempt.instance, reason)
            self._attempt_failed(reason, f"{attempt.instance} {why}", None)

    async def _recover(self, attempt: Attempt, reason: Reason, why: str) -> None:
        if await self._relay.gateway.has_gone(attempt.instance):
            await self._prepare(attempt)
        else:
            self._task = None
            self._unreachable(reason, why)

    def _send(self, connection: UpstreamConnection) -> None:
        attempt, body, lease, record = self._attempt, self._body, self._lease, self._record
        assert attempt is not None  # noqa: S101  (all of these come before a connection)
        assert body is not None  # noqa: S101
        assert lease is not None  # noqa: S101
        assert record is not None  # noqa: S101
        now = monotonic()
        record.queue_ms = max(0.0, (now - self._began_at) * 1000 - (self._start_ms or 0.0))
        record.start_ms = self._start_ms
        changes = self._relay.gateway.changes_for(attempt)
        raw = body_for(body, self._route, attempt.model, changes)
        address = self._relay.pool(lease.endpoint).address
        head = b"%bX-Request-Id: %b\r\ntraceparent: %b\r\nContent-Length: %d\r\n\r\n" % (
            self._caller.head_for(address, self._target),
            record.request_id.encode(),
            traceparent(record.trace_id, record.span_id, sampled=record.sampled),
            len(raw),
        )
        self._state = _State.WAITING
        self._asking = False
        self._first_byte_at = now + self._relay.limits.first_byte_timeout_s
        if attempt.because != "loaded":
            self._loading = (attempt.instance, model_key(attempt.model))
            self._relay.waits_for_load(self, *self._loading)
        self._connection = connection
        connection.send(self, head, raw)

    async def _ask_for_patience(self) -> None:
        """The time for the first byte is over: go on waiting as long as the server loads the model."""
        attempt = self._attempt
        assert attempt is not None  # noqa: S101  (it waits for an answer)
        patient = attempt.because != "loaded" and await self._relay.gateway.still_loads(attempt.instance)
        if self._state is not _State.WAITING:
            return
        self._task = None
        if patient:
            limit_s = self._relay.limits.first_byte_timeout_s
            self._first_byte_at = monotonic() + min(limit_s, _GRACE_S)
            self._asking = False
            return
        reason = Reason.ATTEMPT_TIMEOUT
        self._relay.gateway.failed(attempt.instance, reason, attempt.model)
        limit_s = self._relay.limits.first_byte_timeout_s
        self._attempt_failed(reason, f"{attempt.instance} did not answer within {limit_s:g} s", None)

    # --- when an attempt fails ---

    def _attempt_failed(self, reason: Reason, message: str, retry_after_s: float | None) -> None:
        """This attempt brings no answer: try the next, unless the caller has been told something already."""
        self._cancel_task()
        self._stop_waiting_for_load()
        self._drop_connection()
        self._give_lease_back()
        if self._front is None:
            self._finish("client_gone")
            return
        if self._trouble is None or self._trouble[0] is Reason.MODEL_MISSING:
            self._trouble = (reason, message, retry_after_s)
        if self._fallback_reason is None:
            self._fallback_reason = reason
        if self._started:
            self._give_up_trying()
        else:
            self._try_next()

    def _give_up_trying(self) -> None:
        assert self._trouble is not None  # noqa: S101  (a decision without attempts was refused)
        reason, message, retry_after_s = self._trouble
        record = self._record
        assert record is not None  # noqa: S101  (its turn has come)
        record.fallback_reason = reason
        record.fallback = False
        status = told_as(reason)
        headers = {}
        if status == UNAVAILABLE:
            headers["Retry-After"] = str(max(1, round(retry_after_s or 1)))
        self._fail(status, message, outcome_without_answer(status), headers)

    def _more(self) -> bool:
        """Whether another attempt could follow."""
        return self._attempts is not None and self._attempts.more

    def _hear(self, words: str) -> None:
        """What is done for this request meanwhile."""
        self._heard = words

    # --- the answer ---

    def _start_answer(self, head: AnswerHead) -> None:
        body, record = self._body, self._record
        assert record is not None  # noqa: S101  (its turn has come)
        self._started = True
        record.status = head.status
        record.ttfb_ms = (monotonic() - self._began_at) * 1000
        lines, framing = head.lines, b""
        if body is not None and body.stream:
            lines = [line for line in lines if line[:14].lower() != b"cache-control:"]
            lines.append(_NO_BUFFERING)
        if head.status in _WITHOUT_BODY:
            self._chunks = False
        elif head.length is not None:
            framing = b"Content-Length: %d\r\n" % head.length
            self._chunks = False
        elif self._chunks:
            framing = b"Transfer-Encoding: chunked\r\n"
        else:
            self.keep_alive = False  # such an answer ends with its connection
        # It is written with what follows.
        self._head = b"%b%b%b%b%b" % (
            STATUS_LINES.get(head.status) or STATUS_LINES[502],
            b"".join(lines),
            self._stamp(),
            framing,
            b"\r\n" if self.keep_alive else b"Connection: close\r\n\r\n",
        )

    def _stamp(self) -> bytes:
        """The headers that say where an answer comes from, and why from there."""
        record = self._record
        assert record is not None  # noqa: S101  (its turn has come)
        stamp = b"%bX-Request-Id: %b\r\n" % (self._caller.for_page, record.request_id.encode())
        if self._attempt is not None:
            where = _where(self._attempt.instance, self._attempt.model)
            stamp = b"%b%bX-Queue-Ms: %d\r\n" % (stamp, where, record.queue_ms)
        if record.fallback and record.fallback_reason is not None:
            stamp += b"X-Fallback-Reason: %b\r\n" % record.fallback_reason.value.encode()
        if record.start_ms is not None:
            stamp += b"X-Start-Ms: %d\r\n" % record.start_ms
        return stamp

    def _comment(self, now: float) -> None:
        """Let a caller who waits for a stream of events know that somebody is there."""
        every_s = self._relay.limits.keep_alive_s
        body, front = self._body, self._front
        if every_s <= 0 or front is None or body is None or not body.stream or not self._chunks:
            return
        if self._route.dialect is Dialect.NATIVE or self._attempt is None:
            return
        if self._next_comment_at is None:
            self._next_comment_at = self._began_at + every_s
        if now < self._next_comment_at:
            return
        self._next_comment_at = now + every_s
        if not self._started:
            kind = b"Content-Type: %b\r\n" % _EVENT_STREAM
            self._start_answer(AnswerHead(200, [kind], None, _EVENT_STREAM))
        heard = f" ({printable(self._heard)})" if self._heard else ""
        comment = f": waiting for {self._attempt.instance}{heard}\n\n".encode()
        head, self._head = self._head, b""
        front.write(b"%b%x\r\n%b\r\n" % (head, len(comment), comment))

    def _answer_refusal(self) -> None:
        if self._refusal is None or self._record is None or self._state is _State.DONE:
            return
        status, message, headers = self._refusal
        if not self.received:
            self.keep_alive = False  # what is left of its body would be taken for the next request
        self._fail(status, message, "client_error", headers)

    def _fail(
        self, status: int, message: str, outcome: Outcome, headers: dict[str, str] | None = None
    ) -> None:
        """Tell the caller, in its dialect, as far as it can still be told."""
        front, body, record = self._front, self._body, self._record
        self._cancel_task()
        self._drop_connection()
        if front is None or record is None:
            self._finish("client_gone")
            return
        if not self._started:
            if not self.received:
                self.keep_alive = False
            record.status = status
            self._started = True
            content, kind = error_body(self._route.dialect, status, message, record.request_id)
            more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
            if not self.keep_alive:
                more += "Connection: close\r\n"
            head = f"Content-Type: {kind.decode()}\r\nContent-Length: {len(content)}\r\n{more}"
            front.write(b"".join((STATUS_LINES[status], self._stamp(), head.encode(), b"\r\n", content)))
        elif body is not None and body.stream and record.status == 200:  # noqa: PLR2004
            line = error_in_stream(self._route.dialect, status, message)
            if self._tail and not self._swallow and not self._tail.endswith(b"\n"):
                line = (b"\n" if self._route.dialect is Dialect.NATIVE else b"\n\n") + line
            if self._chunks:
                front.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(line), line))
            else:
                self.keep_alive = False
                front.write(line)
        else:
            # There is no way to say in the middle of a document that the rest is missing, but to break off.
            self.keep_alive = False
            front.abort()
        self._finish(outcome)

    def _finish(self, outcome: Outcome) -> None:
        if self._state is _State.DONE:
            return
        self._state = _State.DONE
        self._cancel_task()
        self._stop_waiting_for_load()
        self._drop_connection()
        self._give_lease_back()
        self._relay.ended(self)
        self.response_complete = True
        record = self._record
        if record is not None:
            record.outcome = outcome
            record.duration_ms = (monotonic() - self._began_at) * 1000
            if self._tail:
                record.input_tokens, record.output_tokens = token_counts(self._route.dialect, self._tail)
            self._relay.gateway.ended(record)
        front, self._front = self._front, None
        if front is not None:
            front.exchange_ended(self)

    # --- helpers ---

    def _new_record(self) -> RequestRecord:
        caller = self._caller
        number = self._relay.next_number()
        trace = caller.trace
        trace_id = trace[0] if trace else f"{getrandbits(128):032x}"
        return RequestRecord.begun(
            ts=self._relay.wall_clock(),
            request_id=f"{self._relay.id_prefix}{number:08x}",
            trace_id=trace_id,
            span_id=f"{self._relay.span_prefix}{number:08x}",
            parent_span_id=trace[1] if trace else None,
            project_id=caller.project,
            path=self._route.path,
            sampled=is_sampled(trace[2]) if trace else self._relay.samples(trace_id),
            lane=caller.lane,
            intent=caller.intent,
        )

    def _cancel_task(self) -> None:
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()

    def _give_lease_back(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def _stop_waiting_for_load(self) -> None:
        loading, self._loading = self._loading, None
        if loading is not None:
            self._relay.waits_no_more(self, *loading)


@lru_cache(maxsize=1024)
def _where(instance: str, model: str) -> bytes:
    return f"X-Instance: {instance}\r\nX-Model: {printable(model)}\r\n".encode()


def _last_line(tail: bytes) -> bytes:
    line = tail.rstrip(b"\r\n").rpartition(b"\n")[2]
    return line.removeprefix(b"data:").strip()
