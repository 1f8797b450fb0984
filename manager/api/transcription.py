"""`/v1/audio/transcriptions`: a form with a recording, answered by an instance that transcribes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.api.refusal import RefusedError
from manager.domain.roles import RequestKind
from manager.domain.routing import RequestFacts
from manager.wire.multipart import BadFormError, FormHead, Found, boundary_of, is_named_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from manager.api.backend import Passing
    from manager.api.passage import Passage
    from manager.domain.target import Target
    from manager.services.ports import Question

# The bytes that may come before the name of the model; they are held in memory.
MAX_BEFORE_MODEL_BYTES = 32 * 2**20


class Transcription:
    """Serves the route. Another attempt follows while nothing of the recording was passed on."""

    def __init__(self, passing: Passing) -> None:
        self._passing = passing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passage = self._passing.passage(scope, receive, send, scope["path"], RequestKind.TRANSCRIBE)
        await self._passing.passages.run(passage, self._transcribe)

    async def _transcribe(self, passage: Passage) -> None:
        form = await _Form.read(passage)
        record = passage.record
        model = form.model or record.lane
        if not model:
            raise RefusedError(400, "model is required")
        record.model = model
        facts = RequestFacts(
            model, RequestKind.TRANSCRIBE, passage.instance, record.lane, local_only=record.local_only
        )
        step = passage.attempting.enter(facts)
        await passage.pass_on(self._passing.server, step, form.question)


class _Form:
    """A form whose beginning was read; the rest is still to come."""

    def __init__(
        self, passage: Passage, head: FormHead, rest: AsyncIterator[bytes], length: int | None
    ) -> None:
        self._passage = passage
        self._head = head
        self._rest = rest
        self._length = length

    @classmethod
    async def read(cls, passage: Passage) -> _Form:
        """Read until the model is named, or until it is clear that it is not.

        Raises:
            RefusedError: it is no form, or its model comes too late.
        """
        if is_named_in(passage.scope["query_string"]):
            raise RefusedError(400, "the model belongs in the form, not in the query")
        most = min(MAX_BEFORE_MODEL_BYTES, passage.limits.most_body_bytes)
        rest = passage.pieces(passage.limits.most_upload_bytes)
        content_type = dict(passage.headers).get(b"content-type", b"").decode("latin-1")
        try:
            head = FormHead(boundary_of(content_type))
            while head.found is Found.NOT_YET and (piece := await anext(rest, b"")):
                passage.hold(len(piece))
                head.feed(piece)
                if head.found is Found.NOT_YET and head.size > most:
                    message = f"the field `model` must come before the file, or within {most} bytes"
                    raise RefusedError(413, message)
        except BadFormError as error:
            raise RefusedError(400, str(error)) from None
        if head.found is Found.NOT_YET:
            raise RefusedError(400, "the form has no end")
        return cls(passage, head, rest, passage.body_length)

    @property
    def model(self) -> str:
        return self._head.model

    def question(self, target: Target) -> Question:
        """Return the form as the server is to get it."""
        passage = self._passage
        head = self._head.with_model(passage.attempting.work.model)
        if passage.is_body_read:
            return passage.question(target, head)
        length = None if self._length is None else self._length + len(head) - self._head.size
        return passage.question(target, self._whole(head), length)

    async def _whole(self, head: bytes) -> AsyncIterator[bytes]:
        yield head
        self._passage.attempting.spend()
        async for piece in self._rest:
            yield piece
