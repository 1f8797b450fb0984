"""Executes one run: sends its request as any other, and writes the answer into a file."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

import structlog

from manager.domain.keys import Scope
from manager.domain.routing import RequestFacts
from manager.domain.runs import RunError, RunResult, body_file, is_of, result_file
from manager.domain.target import Protocol
from manager.errors import (
    InvalidRequestError,
    ManagerError,
    NotAnsweredError,
    Reason,
    RegistryUnwritableError,
    RunFilesError,
    UnavailableError,
)
from manager.services.requests import Origin
from manager.services.routing.asking import (
    UnansweredError,
    WholeAnswer,
    answered,
    native_question,
    spoken_question,
)
from manager.services.routing.attempting import Attempting, Trouble
from manager.services.routing.placement import reason_of
from manager.services.routing.speaking import Speaking
from manager.services.steps import in_steps
from manager.wire.body import reading
from manager.wire.dialect import error_body, message_of
from manager.wire.errors import BadBodyError
from manager.wire.routes import INFERENCE
from manager.wire.statuses import (
    BAD_REQUEST,
    INTERNAL_ERROR,
    UNAVAILABLE,
    judge,
    outcome_of,
    outcome_of_trouble,
    outcome_without_answer,
    status_of,
)
from manager.wire.usage import TAIL_BYTES, error_in, fault_of, load_ms, token_counts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from manager.domain.keys import Grant
    from manager.domain.record import Outcome, RequestRecord
    from manager.domain.runs import Run
    from manager.domain.target import Target
    from manager.services.bodies import BodyBudget
    from manager.services.ports import FileWriter, ModelServer, Question, RunFiles, ServerAnswer
    from manager.services.requests import Requests
    from manager.services.routing.attempting import Routing
    from manager.wire.body import InferenceBody
    from manager.wire.head import Header
    from manager.wire.routes import Route

_log = structlog.get_logger("runs")

_OK = 200
_FORBIDDEN = 403
_BAD_GATEWAY = 502
_TIMEOUT = 504
# Pieces of an answer are gathered up to this size before they are written.
_WRITE_BYTES = 64 * 1024
_LONGEST_MESSAGE = 1000
_LONGEST_TYPE = 256
_UNKNOWN_TYPE = "application/octet-stream"
# What a run waits for: the state of the instances, which changes.
PASSING = frozenset(
    {
        Reason.INSTANCE_STOPPED,
        Reason.INSTANCE_UNAVAILABLE,
        Reason.INSTANCE_UNHEALTHY,
        Reason.GPU_MISSING,
        Reason.START_FAILED,
        Reason.START_TIMEOUT,
        Reason.VRAM_INSUFFICIENT,
        Reason.UPSTREAM_UNREACHABLE,
        Reason.BREAKER_OPEN,
        Reason.QUEUE_FULL,
        Reason.OVERLOADED,
        Reason.ENGINE_UNAVAILABLE,
        Reason.IMAGE_MISSING,
        Reason.NAME_CONFLICT,
        Reason.PORT_TAKEN,
        Reason.CONTAINER_EXITED,
        Reason.CANCELLED,  # an operator's stop has ended the start that the run waited for
    }
)
# Refusals whose reason says less.
_CODES = frozenset({"forbidden", "local_only", "rate_limited"})
_PASSING_REFUSALS = (None, "unavailable", "queue_full", "overloaded")


class Done(NamedTuple):
    """The end of an execution; with an `error` the run has failed. The result is in its file."""

    result: RunResult | None
    error: RunError | None
    instance: str | None
    request_id: str


class PostponedError(Exception):
    """No server was asked, because none could be: a later try may succeed."""

    def __init__(self, error: RunError) -> None:
        super().__init__(error.message)
        self.error = error


class _FailedError(Exception):
    """The run has no answer of a server; the result is an error in the words of its dialect."""

    def __init__(self, status: int, code: str, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.outcome = outcome


def _no_key(_name: str) -> Grant | None:
    """Return None: there are no keys."""
    return None


@dataclass(frozen=True, slots=True)
class Execution:
    """The parts that all executions share.

    Attributes:
        routing: as for any request.
        server: sends requests.
        requests: begins records.
        files: has the bodies, and takes the results.
        stored: counts the bytes of all files of runs.
        grant_of: returns a key that is in force, by its name.
    """

    routing: Routing
    server: ModelServer
    requests: Requests
    files: RunFiles
    stored: BodyBudget
    grant_of: Callable[[str], Grant | None] = _no_key

    async def execute(
        self,
        run: Run,
        *,
        most_result_bytes: int,
        begun: Callable[[Attempting], None],
        sent: Callable[[Target, str], Awaitable[None]],
        is_cancelled: Callable[[], bool],
    ) -> Done:
        """Send the request of a run and store the answer; cancelling it ends the server's work at once.

        Args:
            run: a queued one.
            most_result_bytes: how large its answer may be.
            begun: called with the life of the request.
            sent: called with the target and the id of the request before it is sent for the first time, and
                before it is sent to a paid server.
            is_cancelled: whether the operator has ended the run, should this be cancelled.

        Raises:
            PostponedError: nothing can serve it now.
            RunFilesError: the result could not be stored.
            RegistryUnwritableError: of `sent`; nothing was sent.
        """
        work = _Work(self, run, most_result_bytes, sent)
        begun(work.attempting)
        outcome: Outcome = "cut"
        try:
            return await work.do()
        except asyncio.CancelledError:
            if work.done is not None:
                return work.done  # it came too late
            if is_cancelled():
                work.attempting.cancelled()
            raise
        except RegistryUnwritableError:
            outcome = "refused"
            raise
        except Exception as error:  # noqa: BLE001  (sorted out there; a defect is logged, the others go on)
            failure = _failure_of(error, run)
            outcome = failure.outcome
            work.note(failure)
            if _is_passing(error):
                raise PostponedError(_error_of(failure)) from None
            return await work.fail(failure)
        finally:
            work.count()
            work.attempting.close(outcome)


class _Work:
    """One execution."""

    def __init__(
        self, parts: Execution, run: Run, most_bytes: int, sent: Callable[[Target, str], Awaitable[None]]
    ) -> None:
        self._parts = parts
        self._run = run
        self._most_bytes = most_bytes
        self._sent = sent
        self._is_sent = False
        self.done: Done | None = None
        self._route: Route = INFERENCE[run.path.encode()]
        self._began_at = monotonic()
        self.record: RequestRecord = parts.requests.record(run.path, self._route.kind, run_origin(run))
        self.attempting = Attempting(parts.routing, self.record, self._began_at)
        self.attempting.is_run = True
        self._speaking: Speaking | None = None

    def count(self) -> None:
        """Note the tokens of a translated answer, whole or not."""
        if self._speaking is not None:
            self.record.input_tokens, self.record.output_tokens = self._speaking.tokens

    async def do(self) -> Done:
        """Have the request answered.

        Raises:
            _FailedError, UnansweredError, BadBodyError, ManagerError: there is no whole answer.
        """
        run, record, attempting = self._run, self.record, self.attempting
        if run.caller.key is not None:
            attempting.grant = self._grant(run.caller.key)
        raw = await self._parts.files.read(body_file(run.id), run.body_bytes)
        body = await in_steps(reading([raw], self._route, len(raw)))
        record.stream = body.stream
        record.model = body.model or run.lane
        facts = RequestFacts(
            record.model or "",
            self._route.kind,
            run.caller.instance,
            run.lane,
            local_only=run.caller.local_only,
        )

        async def question(target: Target) -> Question:
            return await self._question(target, body)

        step = attempting.enter(facts, body)
        spoken = lambda: self._speaking  # noqa: E731
        async with answered(attempting, self._parts.server, step, question, spoken) as answer:
            attempting.delivered()
            body.forget()
            record.status = answer.status
            record.ttfb_ms = (monotonic() - self._began_at) * 1000
            return await self._store(answer, is_stream=record.stream)

    def _grant(self, name: str) -> Grant:
        """Return the key of the run as it is now.

        Raises:
            _FailedError: it is not in force any more, or another one has its name.
        """
        grant = self._parts.grant_of(name)
        if grant is None or not is_of(self._run, grant) or not grant.may(Scope.CLIENT):
            raise _FailedError(_FORBIDDEN, "forbidden", forbidden_key(name).message, "refused")
        return grant

    def note(self, failure: _FailedError) -> None:
        """Note in the record why there is no answer."""
        record = self.record
        self.attempting.message = failure.message
        record.status = failure.status
        if failure.outcome == "refused":
            record.fallback = False  # nothing answered

    async def fail(self, failure: _FailedError) -> Done:
        """Store an error as the result, in the words of the dialect."""
        record = self.record
        content, kind = error_body(self._route.dialect, failure.status, failure.message, record.request_id)
        error = _error_of(failure)
        if not self._parts.stored.take(len(content)):
            return self._done(None, error)
        await self._parts.files.save(result_file(self._run.id), content)
        return self._done(RunResult(failure.status, kind.decode(), len(content)), error)

    async def _question(self, target: Target, body: InferenceBody) -> Question:
        attempting = self.attempting
        self._speaking = None
        if target.protocol is not Protocol.OLLAMA:
            speaking = self._speaking = Speaking(self._route, target, self.record)
            question = await spoken_question(attempting, target, speaking, body)
        else:
            question = await native_question(attempting, target, self._route, body, attempting.changes)
        await self._note_sent(target)
        return question

    async def _note_sent(self, target: Target) -> None:
        # A paid request is noted also where a local server was asked before: it is never sent twice.
        if target.paid or not self._is_sent:
            await self._sent(target, self.record.request_id)
            self._is_sent = True

    async def _store(self, answer: ServerAnswer | WholeAnswer, *, is_stream: bool) -> Done:
        """Write the answer into its file. The server's slot is given back before the file is on disk.

        Raises:
            _FailedError: it broke off, has no end, or is too large.
        """
        async with self._parts.files.writing(result_file(self._run.id)) as file:
            storing = _Storing(file, self._parts.stored, self._most_bytes)
            try:
                await self._read(answer, storing)
                error = self._error_in(answer.status, storing.tail, is_stream=is_stream)
                self._end(storing.tail, error)
                await storing.commit()
                result = RunResult(answer.status, self._type_of(answer), storing.size)
                done = self.done = self._done(result, error)
            finally:
                storing.close()
        return done

    def _type_of(self, answer: ServerAnswer | WholeAnswer) -> str:
        kind = _content_type(answer.headers)
        if self._speaking is None or isinstance(answer, WholeAnswer):
            return kind
        return self._speaking.content_type(kind.encode("latin-1")).decode("latin-1")

    def _done(self, result: RunResult | None, error: RunError | None) -> Done:
        return Done(result, error, self.record.effective_target, self.record.request_id)

    async def _read(self, answer: ServerAnswer | WholeAnswer, storing: _Storing) -> None:
        if isinstance(answer, WholeAnswer):
            await storing.add(answer.content)
            return
        attempting = self.attempting
        is_probe = self.record.stream and answer.status == _OK and attempting.is_probe
        try:
            async with asyncio.timeout(max(0.0, attempting.total_deadline - monotonic())):
                while piece := await answer.piece():
                    if is_probe:
                        is_probe = False
                        if error_in(piece) is None:
                            attempting.begun()
                    await storing.add(self._said(piece))
                await storing.add(self._said(b"", complete=True))
        except TimeoutError:
            attempting.broke_off(Reason.ATTEMPT_TIMEOUT)
            trouble = attempting.look(attempting.total_deadline)
            message = trouble.message if isinstance(trouble, Trouble) else "no end in time"
            raise _FailedError(_TIMEOUT, Reason.ATTEMPT_TIMEOUT, message, "timeout") from None
        except RunFilesError:
            raise
        except UnavailableError as error:
            raise self._broken(error) from None

    def _said(self, piece: bytes, *, complete: bool = False) -> bytes:
        """Return what has come in the words of the client.

        Raises:
            _FailedError: a translated answer is not whole.
        """
        speaking = self._speaking
        if speaking is None:
            return piece
        said = speaking.came(piece, complete=complete)
        if speaking.fault is not None:
            self.attempting.broke_off(Reason.INVALID_OUTPUT)
            message = f"{self.attempting.work.instance}: {speaking.fault}"
            raise _FailedError(_BAD_GATEWAY, Reason.INVALID_OUTPUT, message, "upstream_error")
        return said

    def _end(self, tail: bytes, error: RunError | None) -> None:
        """End the request: its answer is whole."""
        record = self.record
        if self._speaking is None:
            record.input_tokens, record.output_tokens = token_counts(self._route.dialect, tail)
            record.load_ms = load_ms(self._route.dialect, tail)
        self.count()
        outcome = outcome_of(record.status)
        self.attempting.close("upstream_error" if error is not None and outcome == "ok" else outcome)

    def _error_in(self, status: int, tail: bytes, *, is_stream: bool) -> RunError | None:
        if status >= BAD_REQUEST:
            message = message_of(tail) or f"the server answered with status {status}"
            return RunError(Reason.UPSTREAM_ERROR, message[:_LONGEST_MESSAGE])
        if status == _OK and is_stream and (fault := fault_of(self._route, tail)) is not None:
            told = error_in(tail)
            reason = Reason.UPSTREAM_ERROR if told is None else judge(INTERNAL_ERROR, told).reason
            if reason is not None:
                self.attempting.broke_off(reason)
            return RunError(Reason.UPSTREAM_ERROR, fault[:_LONGEST_MESSAGE])
        return None

    def _broken(self, error: UnavailableError) -> _FailedError:
        """The server has begun to answer, and did not come to the end."""
        attempting = self.attempting
        cut = attempting.cut
        attempting.broke_off(error.reason)
        attempting.failed(error.reason, error.message, sent=True)
        if cut is not None:
            return _FailedError(UNAVAILABLE, Reason.CANCELLED, f"cut off: {cut}", "cut")
        status = status_of(error.reason)
        return _FailedError(status, error.reason, error.message, outcome_without_answer(status))


def run_origin(run: Run) -> Origin:
    """Return the client of a run."""
    caller = run.caller
    return Origin(
        caller.instance,
        run.lane,
        caller.project,
        caller.intent,
        caller.local_only,
        caller.trace,
        None,
        caller.key,
    )


def forbidden_key(name: str) -> NotAnsweredError:
    """Return the error for a run whose key is not in force any more."""
    message = f"the key {name!r} that submitted this run is revoked or expired (forbidden)"
    return NotAnsweredError(message, reason=Reason.POLICY, refused="forbidden")


def execution_error(error: ManagerError) -> RunError:
    """Return an error as a run keeps it."""
    return RunError(error.code, error.message[:_LONGEST_MESSAGE])


class _Storing:
    """Writes an answer in pieces of a useful size, and keeps the end of it."""

    def __init__(self, file: FileWriter, stored: BodyBudget, most_bytes: int) -> None:
        self._file = file
        self._stored = stored
        self._most_bytes = most_bytes
        self._held = bytearray()
        self._is_committed = False
        self.size = 0
        self._tail = bytearray()

    @property
    def tail(self) -> bytes:
        return bytes(self._tail)

    async def add(self, piece: bytes) -> None:
        if self.size + len(piece) > self._most_bytes:
            message = f"the answer has more than {self._most_bytes} bytes, which is runs.max_result"
            raise _FailedError(_BAD_GATEWAY, "result_too_large", message, "refused")
        if not self._stored.take(len(piece)):
            message = "the files of all runs together reach runs.max_stored"
            raise _FailedError(UNAVAILABLE, "queue_full", message, "refused")
        self.size += len(piece)
        self._tail += piece
        if len(self._tail) > 4 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]
        self._held += piece
        if len(self._held) >= _WRITE_BYTES:
            await self._flush()

    async def commit(self) -> None:
        await self._flush()
        await self._file.commit()
        self._is_committed = True

    def close(self) -> None:
        """Give the bytes of a file back that is not kept."""
        if not self._is_committed:
            self._stored.give_back(self.size)
            self.size = 0

    async def _flush(self) -> None:
        held, self._held = self._held, bytearray()
        if held:
            await self._file.write(bytes(held))


def _is_passing(error: Exception) -> bool:
    """Return whether no server was asked, for a reason that may be gone some time later."""
    if not isinstance(error, UnansweredError) or error.begun:
        return False
    trouble = error.trouble
    if trouble.refused == "rate_limited":
        return True
    return trouble.reason in PASSING and trouble.refused in _PASSING_REFUSALS


def _error_of(failure: _FailedError) -> RunError:
    return RunError(failure.code, failure.message[:_LONGEST_MESSAGE])


def _failure_of(error: Exception, run: Run) -> _FailedError:
    """Return the error as the client gets it."""
    if isinstance(error, _FailedError):
        return error
    if isinstance(error, UnansweredError):
        trouble = error.trouble
        status = status_of(trouble.reason, trouble.refused)
        outcome = outcome_of_trouble(status, trouble.reason, trouble.refused)
        code = trouble.refused if trouble.refused in _CODES else trouble.reason
        return _FailedError(status, code or trouble.reason, trouble.message, outcome)
    if isinstance(error, BadBodyError | InvalidRequestError):
        return _FailedError(BAD_REQUEST, "invalid_request", str(error), "client_error")
    if isinstance(error, ManagerError):
        status = status_of(reason_of(error))
        return _FailedError(status, error.code, error.message, outcome_without_answer(status))
    _log.error("run_failed", run=run.id, path=run.path, exc_info=error)
    return _FailedError(INTERNAL_ERROR, "internal_error", "the manager failed; its log says more", "refused")


def _content_type(headers: Iterable[Header]) -> str:
    for name, value in headers:
        if name.lower() == b"content-type":
            text = value.decode("latin-1")
            return text if len(text) <= _LONGEST_TYPE and text.isprintable() else _UNKNOWN_TYPE
    return _UNKNOWN_TYPE
