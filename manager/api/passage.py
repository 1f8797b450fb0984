"""A request that is served on ASGI and answered by an instance, whatever the size of either."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from manager.api.answers import answer_error
from manager.api.refusal import CallerGoneError, RefusedError, refusal_of
from manager.domain.target import Protocol
from manager.errors import ManagerError, UnavailableError
from manager.services.open_requests import OpenRequests
from manager.services.ports import Question
from manager.services.routing.asking import UnansweredError, WholeAnswer, answered
from manager.services.routing.attempting import RUNS_PATH, Attempting, Trouble, first_target
from manager.services.routing.placement import reason_of
from manager.services.routing.speaking import server_path
from manager.wire.caller import printable
from manager.wire.dialect import error_in_stream
from manager.wire.head import NOT_RETURNED, without_named
from manager.wire.ollama_routes import spoken_at
from manager.wire.routes import Dialect
from manager.wire.statuses import (
    BAD_REQUEST,
    LATER,
    NO_RETRY,
    TOO_MANY_REQUESTS,
    UNAVAILABLE,
    outcome_of,
    outcome_of_trouble,
    status_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from starlette.types import Message, Receive, Scope, Send

    from manager.domain.record import Outcome
    from manager.domain.target import Target
    from manager.services.bodies import BodyBudget
    from manager.services.ports import ModelServer, ServerAnswer
    from manager.services.requests import Begun
    from manager.services.routing.attempting import Routing, Step
    from manager.services.routing.placement import Prepared
    from manager.wire.head import Header

_UPLOAD_STALL_S = 60.0
# How long a request that is cut has to tell its client.
_GOODBYE_S = 1.0
NDJSON = b"application/x-ndjson"
_EVENT_STREAM = b"text/event-stream"
# For the proxies on the way: what comes is to be passed on as it comes.
_NO_BUFFERING = ((b"Cache-Control", b"no-cache"), (b"X-Accel-Buffering", b"no"))
_NEWLINE = b"\n"


@dataclass(frozen=True, slots=True)
class PassageLimits:
    """Bytes and seconds. `most_upload_bytes` None is no bound; a caller may take nothing for `stall_s`."""

    most_body_bytes: int
    most_upload_bytes: int | None
    stall_s: float


class Passages:
    """All requests that are under way, so that they can be let come to their end.

    Attributes:
        open_requests: these, and those of the relay.
    """

    def __init__(self) -> None:
        self._open: set[Passage] = set()
        self.open_requests = OpenRequests()
        self.open_requests.add(lambda: self._open)
        self._none_open = asyncio.Event()

    async def run(self, passage: Passage, work: Callable[[Passage], Awaitable[None]]) -> None:
        """As `Passage.run`."""
        self._open.add(passage)
        try:
            await passage.run(work)
        finally:
            self._open.discard(passage)
            if not self._open:
                self._none_open.set()

    async def drain(self, timeout_s: float, *, cut: asyncio.Event) -> None:
        """Let what is under way come to its end, for so long or until `cut` is set; then cut it."""
        if not self._open:
            return
        self._none_open.clear()
        waits = [asyncio.ensure_future(event.wait()) for event in (self._none_open, cut)]
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        for passage in self._open:
            passage.cut.set()
        if self._open:
            with suppress(TimeoutError):
                async with asyncio.timeout(_GOODBYE_S):  # for the last line of each
                    await self._none_open.wait()


class Passage:
    """One request. Its work is cancelled as soon as the caller leaves.

    Args:
        scope, receive, send: of ASGI.
        begun: its record, and what the server is to see of it.
        routing: what all requests share.
        bodies: the bound for all bodies together.
        limits: what it may take.
        by_model: whether a model answers: its first byte is recorded, and the total deadline holds.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        begun: Begun,
        routing: Routing,
        bodies: BodyBudget,
        limits: PassageLimits,
        by_model: bool = False,
    ) -> None:
        self.scope = scope
        self._by_model = by_model
        self.record = begun.record
        self.instance = begun.instance
        self.headers = begun.headers
        self._fault = begun.fault
        self.limits = limits
        self.dialect = spoken_at(scope["path"]) or Dialect.NATIVE
        self.cut = asyncio.Event()
        self._cut_by = "the manager is being stopped"
        self._is_cancelled = False
        self._receive = receive
        self._send = send
        self._began_at = monotonic()
        self.attempting = Attempting(routing, begun.record, self._began_at)
        self._where: tuple[str, str] | None = None
        self._bodies = bodies
        self._held_bytes = 0
        self._body_ended = asyncio.Event()
        self._refused: RefusedError | None = None
        self._gone = False
        self._takes_nothing = False
        self._streams_lines = False
        self._at_line_end = True
        self._started = False

    def cancel(self, why: str) -> None:
        """End it because the operator wants that."""
        if not self.cut.is_set():
            self.attempting.cancelled()
            self._is_cancelled = True
            self._cut_by = why
            self.cut.set()

    # --- its one end ---

    async def run(self, work: Callable[[Passage], Awaitable[None]]) -> None:
        """Do `work` while the client is there, tell it of whatever goes wrong, and end the record."""
        outcome: Outcome = "cut"
        try:
            outcome = await self._while_there(work)
        except CallerGoneError:
            outcome = "client_gone"
        except Exception as error:  # noqa: BLE001  (sorted out there; a defect is logged, the others go on)
            outcome = await self._sort_out(error)
        finally:
            self._bodies.give_back(self._held_bytes)
            self._held_bytes = 0
            self._refused = None  # its traceback leads back to here, and holds the body
            self.attempting.close(outcome)

    # --- what the caller sends ---

    async def body(self) -> bytes:
        """The whole body, which is bounded.

        Raises:
            RefusedError: it is too large, or does not come.
            CallerGoneError: the caller has left instead.
        """
        return b"".join(await self.parts())

    async def parts(self) -> list[bytes]:
        """The whole body in the pieces that came. Raises as `body`."""
        parts = []
        async for piece in self.pieces(self.limits.most_body_bytes):
            self.hold(len(piece))
            parts.append(piece)
        return parts

    def hold(self, count: int) -> None:
        """Count bytes of the body that stay in memory until the end.

        Raises:
            RefusedError: the bodies of all requests together have reached their bound.
        """
        if not self._bodies.take(count):
            message = "the bodies of all requests together reach gateway.max_buffered; try again later"
            raise self._refuse(UNAVAILABLE, message)
        self._held_bytes += count

    async def pieces(self, most_bytes: int | None) -> AsyncIterator[bytes]:
        """The body as it comes. Raises as `body`."""
        seen, more = 0, True
        while more:
            message = await self._next_message()
            piece = message.get("body", b"")
            seen += len(piece)
            if most_bytes is not None and seen > most_bytes:
                raise self._refuse(
                    413, f"the request body is too large: at most {most_bytes} bytes are taken"
                )
            more = message.get("more_body", False)
            if not more:
                self._body_ended.set()
            if piece:
                yield piece

    async def uploaded(self) -> AsyncIterator[bytes]:
        """The body as it comes, passed on to a server: it cannot be sent a second time."""
        self.attempting.spend()
        async for piece in self.pieces(self.limits.most_upload_bytes):
            yield piece

    @property
    def is_body_read(self) -> bool:
        """Whether all of the body has come and been taken."""
        return self._body_ended.is_set()

    @property
    def body_length(self) -> int | None:
        """The declared length of the body; None where only its end tells."""
        for name, value in self.scope["headers"]:
            if name == b"content-length":
                return int(value)
        return None

    @property
    def target_path(self) -> str:
        """Path and query, as they came."""
        path: bytes = self.scope["raw_path"]
        query: bytes = self.scope["query_string"]
        return (path + b"?" + query if query else path).decode("latin-1")

    # --- what it is answered ---

    async def target(self, step: Step) -> Target:
        """Follow steps to a target.

        Raises:
            RefusedError: there is none.
        """
        found = await first_target(self.attempting, step)
        if isinstance(found, Trouble):
            raise _refused(found)
        return found

    def answered_by(self, prepared: Prepared, model: str) -> None:
        """The answer comes from work that several clients wait for, under its own lease."""
        record, target = self.record, prepared.lease.target
        record.effective_target = target.instance
        record.endpoint = target.endpoint
        record.attempts += 1
        record.start_ms = prepared.start_ms
        record.queue_ms = max(0.0, (monotonic() - self._began_at) * 1000 - (prepared.start_ms or 0.0))
        self._where = (target.instance, model)

    def question(
        self, target: Target, body: bytes | AsyncIterator[bytes], length: int | None = None
    ) -> Question:
        """Return this request, as the server is to get it; `length` is that of a body in pieces.

        Raises:
            RefusedError: the API of the server has no such call.
        """
        headers = [*self.headers, *target.headers] if target.headers else self.headers
        path = self.target_path
        if target.protocol is not Protocol.OLLAMA and self.record.kind is None:
            call = path.partition("?")[0]
            message = f"{target.instance} speaks the API of {target.protocol}, which has no call for {call}"
            raise RefusedError(400, message)
        path = server_path(target, path)
        method = self.scope["method"]
        return Question(target.instance, target.endpoint, method, path, headers, body, length)

    @asynccontextmanager
    async def answered(
        self, server: ModelServer, step: Step, question: Callable[[Target], Question]
    ) -> AsyncIterator[ServerAnswer | WholeAnswer]:
        """Ask one target after the other, as `Attempting` says, until one answers.

        Args:
            server: sends requests.
            step: the first one.
            question: makes the request for a target.

        Raises:
            RefusedError: none has answered.
        """

        async def make(target: Target) -> Question:
            return question(target)

        try:
            async with answered(self.attempting, server, step, make, is_upload=True) as answer:
                try:
                    yield answer
                except UnavailableError as error:  # the answer breaks off
                    self.attempting.broke_off(error.reason)
                    raise
        except UnansweredError as error:
            raise _refused(error.trouble) from None

    async def pass_on(
        self,
        server: ModelServer,
        step: Step,
        question: Callable[[Target], Question],
        *,
        before: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> None:
        """Pass the answer of a server on as it comes; `before` is given each piece before the client is.

        The other arguments are those of `answered`.
        """
        async with self.answered(server, step, question) as answer:
            await self.pass_answer(answer, before=before)

    async def pass_answer(
        self,
        answer: ServerAnswer | WholeAnswer,
        *,
        before: Callable[[bytes], Awaitable[None]] | None = None,
    ) -> None:
        """The second half of `pass_on`."""
        self.attempting.delivered()
        if isinstance(answer, WholeAnswer):
            await self.start(answer.status, answer.headers, len(answer.content))
            await self.send(answer.content)
        else:
            await self.start(answer.status, answer.headers, answer.length)
            while piece := await answer.piece():
                if before is not None:
                    await before(piece)
                await self.send(piece)
        await self.end()

    async def pass_whole(
        self,
        server: ModelServer,
        step: Step,
        question: Callable[[Target], Question],
        *,
        then: Callable[[], Awaitable[None]],
    ) -> None:
        """As `pass_on` for a short answer: `then` is done before the client gets any of one that is good."""
        async with self.answered(server, step, question) as answer:
            content = answer.content if isinstance(answer, WholeAnswer) else await self._whole(answer)
            if answer.status < BAD_REQUEST:
                await then()
            self.attempting.delivered()
            await self.start(answer.status, answer.headers, len(content))
            await self.send(content)
        await self.end()

    async def start(self, status: int, headers: Iterable[Header], length: int | None) -> None:
        """Begin the answer; `headers` are those of a server, as they came."""
        self.record.status = status
        if self._by_model:
            self.record.ttfb_ms = (monotonic() - self._began_at) * 1000
        lines = _returned(headers)
        kind = next((value for name, value in lines if name.lower() == b"content-type"), b"")
        self._streams_lines = length is None and kind.startswith(NDJSON)
        if self._streams_lines or kind.startswith(_EVENT_STREAM):
            self.record.stream = True
            lines = [(name, value) for name, value in lines if name.lower() != b"cache-control"]
            lines += _NO_BUFFERING
        lines += self._stamp()
        if length is not None:
            lines.append((b"Content-Length", b"%d" % length))
        self._started = True
        await self._say({"type": "http.response.start", "status": status, "headers": lines})

    async def send(self, piece: bytes) -> None:
        if piece:
            self._at_line_end = piece.endswith(_NEWLINE)
            await self._say({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        await self._say({"type": "http.response.body", "body": b"", "more_body": False})

    # --- helpers ---

    async def _sort_out(self, error: Exception) -> Outcome:
        if self._gone:
            return "client_gone"
        failure = self._refused or refusal_of(error, self.scope["path"])
        retry_after_s = failure.retry_after_s
        if isinstance(error, ManagerError) and self._refused is None:
            self.record.fallback_reason = reason_of(error)
            self.record.fallback = False  # nothing answered
            retry_after_s = error.retry_after_s
        with suppress(RefusedError):  # the client does not read: not even this reaches it
            await self._fail(failure, retry_after_s)
        return failure.outcome

    async def _while_there(self, work: Callable[[Passage], Awaitable[None]]) -> Outcome:
        if self._fault is not None:
            raise RefusedError(BAD_REQUEST, self._fault)
        working = asyncio.ensure_future(work(self))
        leaving = asyncio.ensure_future(self._left())
        cutting = asyncio.ensure_future(self.cut.wait())
        try:
            left_s = self.attempting.total_deadline - monotonic() if self._by_model else None
            await asyncio.wait(
                {working, leaving, cutting}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
            )
            if working.done():
                working.result()
            elif leaving.done():
                raise CallerGoneError
            elif not cutting.done():
                limit_s = self.attempting.total_deadline - self._began_at
                raise RefusedError(504, f"no end within {limit_s:g} s", "timeout")
            else:
                headers = NO_RETRY if self._is_cancelled else LATER
                raise RefusedError(UNAVAILABLE, f"cut off: {self._cut_by}", "cut", headers=headers)
        finally:
            for task in (working, leaving, cutting):
                task.cancel()
            await asyncio.wait({working, leaving, cutting})
            # An error of the work refers to this frame. If the frame referred to the error, the cycle would
            # keep the whole body until a full garbage collection.
            del working
        return outcome_of(self.record.status)

    async def _left(self) -> None:
        await self._body_ended.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _next_message(self) -> Message:
        try:
            async with asyncio.timeout(_UPLOAD_STALL_S):
                message = await self._receive()
        except TimeoutError:
            raise self._refuse(408, "the request body did not arrive") from None
        if message["type"] == "http.disconnect":
            self._gone = True  # remembered for the same reason as a refusal
            raise CallerGoneError
        return message

    def _refuse(self, status: int, message: str) -> RefusedError:
        """Remembered, because whoever sends the body on would make another error of it."""
        self._refused = RefusedError(status, message)
        return self._refused

    async def _whole(self, answer: ServerAnswer) -> bytes:
        content = bytearray()
        while piece := await answer.piece():
            content += piece
            if len(content) > self.limits.most_body_bytes:
                raise RefusedError(502, "the server's answer has no end", "upstream_error")
        return bytes(content)

    async def _say(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self.limits.stall_s):
                await self._send(message)
        except TimeoutError:
            self._takes_nothing = True
            limit = f"{self.limits.stall_s:g} s"
            raise RefusedError(504, f"the caller has taken nothing for {limit}", "timeout") from None

    def _stamp(self) -> list[Header]:
        """The headers that say where an answer comes from, as the relay's say it."""
        record = self.record
        lines = [(b"X-Request-Id", record.request_id.encode())]
        attempt, where = self.attempting.attempt, self._where
        if attempt is not None:
            where = attempt.instance, attempt.model
        if where is not None:
            instance, model = where
            lines.append((b"X-Instance", instance.encode()))
            if model:
                lines.append((b"X-Model", printable(model).encode()))
        lines.append((b"X-Provider", record.provider.encode()))
        lines.append((b"X-Queue-Ms", b"%.0f" % record.queue_ms))
        if record.fallback and record.fallback_reason is not None:
            lines.append((b"X-Fallback-Reason", record.fallback_reason.value.encode()))
        if record.start_ms is not None:
            lines.append((b"X-Start-Ms", b"%.0f" % record.start_ms))
        return lines

    async def _fail(self, failure: RefusedError, retry_after_s: float | None) -> None:
        """Tell the caller, as far as it can still be told."""
        self.attempting.message = failure.message
        if not self._started:
            self.record.status = failure.status
            headers = {name.decode(): value.decode() for name, value in self._stamp()}
            if failure.headers is not None:
                headers |= failure.headers
            elif failure.status in (UNAVAILABLE, TOO_MANY_REQUESTS):
                headers["Retry-After"] = str(max(1, round(retry_after_s or 1)))
            if not self._body_ended.is_set():
                headers["Connection"] = "close"  # what is left of the body is not waited for
            await answer_error(self._say, self.dialect, failure.status, failure.message, headers)
        elif self._streams_lines and not self._takes_nothing:
            line = error_in_stream(self.dialect, failure.status, failure.message)
            await self.send(line if self._at_line_end else _NEWLINE + line)
            await self.end()
        # Otherwise the answer is left without its end, which is how a caller sees that it is not whole.


def _returned(headers: Iterable[Header]) -> list[Header]:
    lines, named = [], b""
    for name, value in headers:
        low = name.lower()
        if low == b"connection":
            named += value + b","
        elif low not in NOT_RETURNED and low != b"date":  # uvicorn says one
            lines.append(b"%b: %b" % (name, value))
    kept = without_named(lines, named) if named else lines
    return [(name, value) for name, _, value in (line.partition(b": ") for line in kept)]


def _refused(trouble: Trouble) -> RefusedError:
    status = status_of(trouble.reason, trouble.refused)
    outcome = outcome_of_trouble(status, trouble.reason, trouble.refused)
    headers = {"Location": RUNS_PATH} if trouble.refused == "async_only" else None
    return RefusedError(
        status, trouble.message, outcome, retry_after_s=trouble.retry_after_s, headers=headers
    )
