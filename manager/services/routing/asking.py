"""Asks one server after the other, as `Attempting` says, for requests that are no exchange of the relay."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from manager.domain.judgement import GOOD
from manager.domain.target import Protocol
from manager.errors import AskFailedError, OutOfDescriptorsError, Reason, UnavailableError
from manager.services.ports import Question
from manager.services.routing.attempting import Trouble, Wait, first_target
from manager.services.steps import in_steps
from manager.wire.dialect import message_of
from manager.wire.errors import BadBodyError
from manager.wire.offload import asks_for_cpu
from manager.wire.rewriting import rewriting
from manager.wire.statuses import BAD_REQUEST, judge, retry_after_s
from manager.wire.trace import traceparent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from manager.domain.roles import BodyChanges
    from manager.domain.target import Target
    from manager.services.ports import ModelServer, ServerAnswer
    from manager.services.routing.attempting import Attempting, Step
    from manager.services.routing.speaking import Speaking
    from manager.wire.body import InferenceBody
    from manager.wire.head import Header
    from manager.wire.routes import Route

# An answer with an error is held up to this size, to be read before another attempt is made.
_MAX_HELD_BYTES = 64 * 1024
_OK = 200
# The deadlines of a run whose server has not answered are looked at so often.
_LOOK_EVERY_S = 0.25


class WholeAnswer(NamedTuple):
    """The answer of a server, read to its end or to the bound of what is held."""

    status: int
    headers: Sequence[Header]
    content: bytes


class UnansweredError(Exception):
    """No server has answered. `begun` is whether one may have begun with the request."""

    def __init__(self, trouble: Trouble, *, begun: bool) -> None:
        super().__init__(trouble.message)
        self.trouble = trouble
        self.begun = begun


class UnfitTargetError(Exception):
    """The server of a target must not answer the request; another one may."""


@asynccontextmanager
async def answered(
    attempting: Attempting,
    server: ModelServer,
    step: Step,
    question: Callable[[Target], Awaitable[Question]],
    speaking: Callable[[], Speaking | None] = lambda: None,
    *,
    is_upload: bool = False,
) -> AsyncIterator[ServerAnswer | WholeAnswer]:
    """Ask one target after the other until one answers. On leaving, the connection to it ends.

    Args:
        attempting: the request.
        server: sends it.
        step: the first step of it.
        question: makes the request for a target, right before it is sent. It may raise UnfitTargetError.
        speaking: returns how the latest request was said to a server that is no Ollama; None where it is one.
        is_upload: the request takes any time to be sent. It ends when nothing moves any more, and its
            deadlines are not looked at.

    Raises:
        UnansweredError: none has answered.
    """
    begun = False
    while True:
        found = await first_target(attempting, step)
        if isinstance(found, Trouble):
            if isinstance(found.answer, WholeAnswer):
                yield found.answer
                return
            raise UnansweredError(found, begun=begun)
        asked = await _made(attempting, found, question)
        if not isinstance(asked, Question):
            step = asked
            continue
        async with AsyncExitStack() as stack:
            attempting.sent()
            try:
                answer = await _ask(attempting, server, asked, stack, is_upload=is_upload)
            except AskFailedError as error:
                begun = begun or error.begun
                step = attempting.failed(error.reason, error.message, sent=error.begun)
                continue
            except OutOfDescriptorsError as error:
                step = attempting.failed(
                    error.reason, error.message, sent=False, ours=True, retry_after_s=error.retry_after_s
                )
                continue
            except _LateError as late:
                begun = True
                step = late.step
                continue
            begun = True
            judged, following = await _judge(attempting, answer, speaking())
            if following is None:
                try:
                    yield judged
                except UnavailableError as error:  # the answer breaks off
                    attempting.broke_off(error.reason)
                    raise
                return
            step = following


async def native_question(
    attempting: Attempting, target: Target, route: Route, body: InferenceBody, changes: BodyChanges
) -> Question:
    """Return a request for an Ollama; raw ones are sent as they came.

    Raises:
        BadBodyError: as `rewriting`.
    """
    record = attempting.record
    if attempting.is_raw:
        pieces = [body.raw]
    else:
        pieces = await in_steps(rewriting(body, route, attempting.work.model, changes))
    if asks_for_cpu(body.fields, route, changes):
        attempting.expect_on_cpu()
    headers: list[Header] = [
        (b"content-type", b"application/json"),
        (b"x-request-id", record.request_id.encode()),
        (b"traceparent", traceparent(record.trace_id, record.span_id, sampled=record.sampled)),
        *target.headers,
    ]
    return Question(target.instance, target.endpoint, "POST", route.path, headers, b"".join(pieces))


async def spoken_question(
    attempting: Attempting, target: Target, speaking: Speaking, body: InferenceBody
) -> Question:
    """Return a request in the words of a server that is no Ollama.

    Raises:
        BadBodyError: it cannot be said there.
    """
    model, changes, most = attempting.work.model, attempting.changes, attempting.most_tokens
    content = await asyncio.to_thread(speaking.request, body, model, changes, most)
    return Question(target.instance, target.endpoint, "POST", speaking.path, speaking.headers(), content)


@asynccontextmanager
async def until_deadline(attempting: Attempting) -> AsyncIterator[None]:
    """Read an answer within the total deadline; one that breaks off or comes too late is the server's fault.

    Raises:
        UnavailableError: it comes too late.
    """
    left_s = max(0.0, attempting.total_deadline - monotonic())
    try:
        async with asyncio.timeout(left_s):
            yield
    except TimeoutError:
        attempting.broke_off(Reason.ATTEMPT_TIMEOUT)
        message = f"{attempting.record.effective_target} did not end its answer in time"
        raise UnavailableError(message, reason=Reason.ATTEMPT_TIMEOUT) from None
    except UnavailableError as error:
        attempting.broke_off(error.reason)
        raise


async def read_whole(attempting: Attempting, answer: ServerAnswer | WholeAnswer, most_bytes: int) -> bytes:
    """Return the body of an answer.

    Raises:
        UnavailableError: it breaks off, comes too late, or is too large.
    """
    if isinstance(answer, WholeAnswer):
        return answer.content
    content = bytearray()
    async with until_deadline(attempting):
        while len(content) <= most_bytes and (piece := await answer.piece()):
            content += piece
    if len(content) > most_bytes:
        raise too_large(attempting)
    return bytes(content)


def too_large(attempting: Attempting) -> UnavailableError:
    message = f"{attempting.record.effective_target}: the answer is too large"
    return UnavailableError(message, reason=Reason.INVALID_OUTPUT)


async def _made(
    attempting: Attempting, target: Target, question: Callable[[Target], Awaitable[Question]]
) -> Question | Step:
    """Return the request for a target; the next step where its API has no word for a part of it."""
    try:
        return await question(target)
    except UnfitTargetError as error:
        return attempting.unsayable(str(error))
    except BadBodyError as error:
        if target.protocol is Protocol.OLLAMA:
            raise
        return attempting.unsayable(str(error))


class _LateError(Exception):
    """A deadline has passed, and the attempt was abandoned."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step


async def _ask(
    attempting: Attempting, server: ModelServer, asked: Question, stack: AsyncExitStack, *, is_upload: bool
) -> ServerAnswer:
    """Wait for the head of the answer. Deadlines are looked at meanwhile, except those of an upload."""
    if is_upload:
        return await stack.enter_async_context(server.ask(asked))
    asking = asyncio.ensure_future(stack.enter_async_context(server.ask(asked)))
    looking = asyncio.ensure_future(_late(attempting))
    try:
        await asyncio.wait({asking, looking}, return_when=asyncio.FIRST_COMPLETED)
        if not looking.done():
            return asking.result()
        raise _LateError(looking.result())
    finally:
        for task in (asking, looking):
            task.cancel()
        await asyncio.wait({asking, looking})
        if not asking.cancelled():
            asking.exception()  # of a server that was abandoned
        del asking  # its error refers to this frame, and the question holds the whole body


async def _late(attempting: Attempting) -> Step:
    """Wait until a deadline has passed; return the step that follows."""
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        step = attempting.look(monotonic())
        if isinstance(step, Wait):
            step = await attempting.wait()
        if step is not None:
            return step


async def _judge_spoken(
    attempting: Attempting, answer: ServerAnswer, speaking: Speaking
) -> tuple[ServerAnswer | WholeAnswer, Step | None]:
    """As `_judge`, of a server that is no Ollama: the client gets its errors in the client's dialect."""
    if answer.status == _OK:
        unreadable = speaking.unreadable(answer.headers)
        if unreadable is not None:
            message = f"{attempting.work.instance}: {unreadable}"
            return answer, attempting.failed(Reason.INVALID_OUTPUT, message, sent=True)
        attempting.answered(GOOD)
        return answer, None
    content: bytearray | None = bytearray()
    try:
        while content is not None and (piece := await answer.piece()):
            content += piece
            if len(content) > _MAX_HELD_BYTES:
                content = None
    except UnavailableError:
        content = None
    error = speaking.error(answer.status, None if content is None else bytes(content))
    headers = [(b"Content-Type", error.content_type)]
    whole = WholeAnswer(error.status, headers, error.content)
    wait_s = retry_after_s(b"%b: %b" % header for header in answer.headers)
    return whole, attempting.answered(error.judgement, error.message, whole, retry_after_s=wait_s)


async def _judge(
    attempting: Attempting, answer: ServerAnswer, speaking: Speaking | None
) -> tuple[ServerAnswer | WholeAnswer, Step | None]:
    """Return an answer for the client, or the step that follows an answer with an error."""
    if speaking is not None:
        return await _judge_spoken(attempting, answer, speaking)
    judgement, wait_s = GOOD, None
    if answer.status >= BAD_REQUEST:
        judgement = judge(answer.status)
        wait_s = retry_after_s(b"%b: %b" % header for header in answer.headers)
    if not attempting.might_follow(judgement):
        attempting.answered(judgement, retry_after_s=wait_s)
        return answer, None
    message = f"{attempting.work.instance} answered with status {answer.status}"
    content = bytearray()
    try:
        while len(content) <= _MAX_HELD_BYTES and (piece := await answer.piece()):
            content += piece
    except UnavailableError:
        following = attempting.answered(judgement, message, retry_after_s=wait_s)
        if following is None:
            raise
        return answer, following
    if len(content) > _MAX_HELD_BYTES:
        # A part must not be taken for the whole: the next attempt follows without this answer.
        following = attempting.answered(judgement, message, retry_after_s=wait_s)
        if following is None:
            raise UnavailableError(f"{message}, at great length", reason=Reason.UPSTREAM_ERROR)
        return answer, following
    whole = WholeAnswer(answer.status, answer.headers, bytes(content))
    message = message_of(whole.content) or message
    judgement = judge(answer.status, message)
    return whole, attempting.answered(judgement, message, whole, retry_after_s=wait_s)
