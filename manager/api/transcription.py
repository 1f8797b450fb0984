"""`/v1/audio/transcriptions`: a form with a recording passes through to an instance that transcribes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.api.passage import Passage
from manager.api.refusal import RefusedError
from manager.domain.roles import RequestKind
from manager.domain.routing import RequestFacts
from manager.errors import ManagerError, Reason
from manager.services.gateway import Attempts, reason_of
from manager.wire.multipart import BadFormError, FormHead, Found, boundary_of, is_named_in
from manager.wire.statuses import REFUSED, failure_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from manager.api.backend import Passing
    from manager.domain.routing import Attempt
    from manager.services.gateway import Prepared
    from manager.services.ports import Question

# What may come before the name of the model; it is held in memory meanwhile.
MOST_BEFORE_MODEL_BYTES = 32 * 2**20


class Transcription:
    """Serves the route. Another instance is tried as long as nothing of the recording has been passed on."""

    def __init__(self, passing: Passing) -> None:
        self._passing = passing
        self._gateway = passing.gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = self._passing.requests.begin(scope["path"], scope["headers"])
        limits = self._passing.limits
        passage = Passage(scope, receive, send, begun=begun, limits=limits, by_model=True)
        await self._passing.passages.run(passage, self._transcribe, self._gateway)

    async def _transcribe(self, passage: Passage) -> None:
        form = await _Form.read(passage)
        model = form.model or passage.record.lane
        if not model:
            raise RefusedError(400, "model is required")
        attempts = self._attempts(passage, model)
        trouble: ManagerError | None = None
        while (attempt := attempts.next()) is not None:
            try:
                if await self._try(passage, form, attempt, attempts):
                    return
            except ManagerError as error:
                if form.passed_on:
                    raise
                reason = reason_of(error)
                self._gateway.failed(attempt.instance, reason)
                passage.record.fallback_reason = passage.record.fallback_reason or reason
                if trouble is None or reason_of(trouble) is Reason.MODEL_MISSING:
                    trouble = error
        assert trouble is not None  # noqa: S101  (a decision without attempts was refused)
        raise trouble

    def _attempts(self, passage: Passage, model: str) -> Attempts:
        record = passage.record
        record.model = model
        facts = RequestFacts(model, RequestKind.TRANSCRIBE, passage.instance, record.lane)
        attempts = Attempts(self._gateway, facts)
        decision = attempts.decision
        record.role = decision.role
        record.policy = decision.policy.value
        record.requested_target = decision.requested_target
        refused = decision.refused
        if refused is not None:
            record.fallback_reason = refused.reason
            raise RefusedError(REFUSED[refused.what], refused.message, "refused")
        return attempts

    async def _try(self, passage: Passage, form: _Form, attempt: Attempt, attempts: Attempts) -> bool:
        """Have one instance answer; whether that is the answer.

        Raises:
            ManagerError: there was none.
        """
        record = passage.record
        record.model, record.role = attempt.model, attempt.role or record.role
        record.fallback_reason = record.fallback_reason or attempt.fallback
        record.fallback = record.fallback_reason is not None
        prepared = await self._gateway.prepare(
            attempt, patient=not attempts.more, failed_on=attempts.failed_on
        )
        with prepared.lease:
            passage.sent_to(prepared, attempt.model)
            async with self._passing.server.ask(form.question(passage, prepared, attempt.model)) as answer:
                reason = failure_of(answer.status)
                if reason is not None:
                    self._gateway.failed(attempt.instance, reason)
                    if attempts.more and not form.passed_on:
                        record.fallback_reason = record.fallback_reason or reason
                        return False
                await passage.pass_answer(answer)
        return True


class _Form:
    """A form of which the beginning has been read, and the rest is still to come."""

    def __init__(self, head: FormHead, rest: AsyncIterator[bytes], length: int | None) -> None:
        self._head = head
        self._rest = rest
        self._length = length
        self.passed_on = False

    @classmethod
    async def read(cls, passage: Passage) -> _Form:
        """Read until the model is named, or it is clear that it is not.

        Raises:
            RefusedError: it is no form, or its model comes too late.
        """
        if is_named_in(passage.scope["query_string"]):
            raise RefusedError(400, "the model belongs in the form, not in the query")
        most = min(MOST_BEFORE_MODEL_BYTES, passage.limits.most_body_bytes)
        rest = passage.pieces(passage.limits.most_upload_bytes)
        content_type = dict(passage.headers).get(b"content-type", b"").decode("latin-1")
        try:
            head = FormHead(boundary_of(content_type))
            while head.found is Found.NOT_YET and (piece := await anext(rest, b"")):
                head.feed(piece)
                if head.found is Found.NOT_YET and head.size > most:
                    message = f"the field `model` must come before the file, or within {most} bytes"
                    raise RefusedError(413, message)
        except BadFormError as error:
            raise RefusedError(400, str(error)) from None
        if head.found is Found.NOT_YET:
            raise RefusedError(400, "the form has no end")
        return cls(head, rest, passage.body_length)

    @property
    def model(self) -> str:
        return self._head.model

    def question(self, passage: Passage, prepared: Prepared, model: str) -> Question:
        """The form as the server is to get it."""
        head = self._head.with_model(model)
        if passage.is_body_read and not self.passed_on:
            return passage.question(prepared, head)
        length = None if self._length is None else self._length + len(head) - self._head.size
        return passage.question(prepared, self._whole(head), length)

    async def _whole(self, head: bytes) -> AsyncIterator[bytes]:
        yield head
        self.passed_on = True
        async for piece in self._rest:
            yield piece
