"""Has texts embedded by the gateway: as any request, with role, policy, lane, failover and history.

The build of the model is known for each answer. A server is asked for its list of models after it has
answered: if the digest is the one of an earlier list, it was that one all the time. (A model that changes and
changes back between the two looks is not noticed.)
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from manager.domain.embeddings import MOST_DIMENSIONS, dimensions_of, unit_vector
from manager.domain.routing import RequestFacts
from manager.domain.target import Protocol
from manager.errors import (
    CollectionConflictError,
    ManagerError,
    NotEmbeddedError,
    Reason,
    UnavailableError,
)
from manager.services.routing.asking import (
    UnansweredError,
    UnfitTargetError,
    answered,
    native_question,
    read_whole,
)
from manager.services.routing.attempting import Attempting
from manager.services.routing.own import OwnRequests
from manager.services.routing.placement import reason_of
from manager.services.steps import in_steps
from manager.wire.body import reading
from manager.wire.dialect import message_of
from manager.wire.routes import INFERENCE
from manager.wire.statuses import (
    BAD_REQUEST,
    INTERNAL_ERROR,
    judge,
    outcome_of,
    outcome_of_trouble,
    status_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from manager.domain.record import Outcome
    from manager.domain.target import Target
    from manager.services.embeddings.digests import Digests
    from manager.services.open_requests import OpenRequest
    from manager.services.ports import ModelServer, Question
    from manager.services.requests import Requests
    from manager.services.routing.attempting import Routing
    from manager.services.routing.whole import Asking
    from manager.wire.body import InferenceBody

# Texts of one request to a server.
BATCH = 32
_ROUTE = INFERENCE[b"/api/embed"]
_OK = 200
_MOST_ANSWER_BYTES = 128 * 2**20
# As for any request: a larger number is no number of tokens.
_MOST_TOKENS = 999_999_999
_SMALL_BYTES = 16 * 1024
# A model that changes between a request and the look that follows is asked anew so often.
_TRIES = 3
_CANCELLED = 503
_OF_THE_TEXTS = frozenset({400, 413, 422})


@dataclass(frozen=True, slots=True)
class Wanted:
    """How texts are to be embedded; see `Recipe`. None is not known yet: any build, any dimension."""

    model: str
    digest: str | None
    dimensions: int | None
    prefix: str
    truncate: bool
    asked: int | None


class Embedded(NamedTuple):
    """The vectors of texts, in their order, and what made them."""

    vectors: list[bytes]
    digest: str
    instance: str
    policy: str | None

    @property
    def dimensions(self) -> int:
        return dimensions_of(self.vectors[0])


class RefusedTextError(ManagerError):
    """The server refuses the texts themselves; `at` is the place of the first one that it refuses alone."""

    code = "text_refused"

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


class _RefusedError(Exception):
    """The server refuses a request for what is in it."""


class _ChangedError(Exception):
    """The model may have changed meanwhile."""


class Embedder:
    """Embeds texts. Lives on the event loop.

    Args:
        routing: as for any request.
        server: sends requests.
        requests: begins records.
        digests: the builds of models.
    """

    def __init__(self, routing: Routing, server: ModelServer, requests: Requests, digests: Digests) -> None:
        self._routing = routing
        self._server = server
        self._requests = requests
        self._digests = digests
        self._own = OwnRequests()

    def open(self) -> Iterable[OpenRequest]:
        """Return the requests that are under way."""
        return self._own.open()

    async def embed(self, wanted: Wanted, texts: Sequence[str], asking: Asking) -> Embedded:
        """Embed texts, one at least, in batches. All vectors are of one build and have one dimension.

        Raises:
            RefusedTextError: a server refuses a text, such as one that is too long for the model.
            CollectionConflictError: the model is another build now (`version_stale`), or its vectors have
                another dimension (`dimension_changed`).
            NotEmbeddedError: no server has answered.
        """
        vectors: list[bytes] = []
        last: Embedded | None = None
        for start in range(0, len(texts), BATCH):
            last = await self._batch(wanted, texts[start : start + BATCH], start, asking)
            wanted = replace(wanted, digest=last.digest, dimensions=last.dimensions)
            vectors += last.vectors
        assert last is not None  # noqa: S101  (there is a text)
        return last._replace(vectors=vectors)

    async def _batch(self, wanted: Wanted, texts: Sequence[str], at: int, asking: Asking) -> Embedded:
        """Embed a batch. A refused one is halved until the first text is found that is refused alone."""
        try:
            return await self._current(wanted, texts, asking)
        except _RefusedError as error:
            if len(texts) == 1:
                raise RefusedTextError(str(error), at) from None
        half = len(texts) // 2
        first = await self._batch(wanted, texts[:half], at, asking)
        second = await self._batch(wanted, texts[half:], at + half, asking)
        if (first.digest, first.dimensions) != (second.digest, second.dimensions):
            return await self._batch(wanted, texts, at, asking)
        return second._replace(vectors=[*first.vectors, *second.vectors])

    async def _current(self, wanted: Wanted, texts: Sequence[str], asking: Asking) -> Embedded:
        """Embed texts with a build that is known for sure."""
        for _ in range(_TRIES):
            try:
                return await self._once(wanted, texts, asking)
            except _ChangedError:
                continue
        message = f"the model {wanted.model} keeps changing; try again when it does not"
        raise NotEmbeddedError(message, reason=Reason.MODEL_MISSING, refused="unavailable")

    async def _once(self, wanted: Wanted, texts: Sequence[str], asking: Asking) -> Embedded:
        request = _Request(self, wanted, texts, asking)
        return await self._own.do(request.attempting, request.do(), error=NotEmbeddedError)

    # --- what a request needs ---

    @property
    def parts(self) -> tuple[Routing, ModelServer, Requests, Digests]:
        return self._routing, self._server, self._requests, self._digests


class _Request:
    """One request to `/api/embed`."""

    def __init__(self, embedder: Embedder, wanted: Wanted, texts: Sequence[str], asking: Asking) -> None:
        self._routing, self._server, requests, self._digests = embedder.parts
        self._wanted = wanted
        self._texts = texts
        self._asking = asking
        self._began_at = monotonic()
        self._before: str | None = None
        self._target: Target | None = None
        self._model = wanted.model
        self._stale: list[str] = []  # instances with another build
        self.record = requests.record(asking.path, _ROUTE.kind, asking.origin)
        self.attempting = Attempting(self._routing, self.record, self._began_at)
        self.attempting.grant = asking.grant
        self.attempting.is_background = self.attempting.is_run = asking.is_background

    async def do(self) -> Embedded:
        outcome: Outcome = "cut"
        try:
            return await self._do()
        except asyncio.CancelledError:
            raise
        except UnansweredError as error:
            trouble = error.trouble
            status = status_of(trouble.reason, trouble.refused)
            outcome = outcome_of_trouble(status, trouble.reason, trouble.refused)
            self._note(status, trouble.message)
            if trouble.refused == "unsayable" and self._stale:
                raise self._stale_error() from None
            raise NotEmbeddedError(
                trouble.message,
                reason=trouble.reason,
                refused=trouble.refused,
                retry_after_s=trouble.retry_after_s,
            ) from None
        except _RefusedError as error:
            outcome = "client_error"
            self._note(BAD_REQUEST, str(error))
            raise
        except ManagerError as error:
            outcome = "upstream_error" if isinstance(error, UnavailableError) else "refused"
            self._note(status_of(reason_of(error)), error.message)
            if isinstance(error, UnavailableError) and not isinstance(error, NotEmbeddedError):
                raise NotEmbeddedError(
                    error.message, reason=error.reason, refused=None, retry_after_s=error.retry_after_s
                ) from None
            raise
        except _ChangedError:
            outcome = "upstream_error"
            self._note(_CANCELLED, "the model changed while it was asked")
            raise
        finally:
            self.attempting.close(outcome)

    async def _do(self) -> Embedded:
        wanted, record, attempting = self._wanted, self.record, self.attempting
        raw = await self._body()
        body = await in_steps(reading([raw], _ROUTE, len(raw)))
        record.model = wanted.model
        origin = self._asking.origin
        facts = RequestFacts(
            wanted.model, _ROUTE.kind, origin.instance, origin.lane, local_only=origin.local_only
        )
        step = attempting.enter(facts, body)

        async def question(target: Target) -> Question:
            return await self._question(target, body)

        async with answered(attempting, self._server, step, question) as answer:
            attempting.delivered()
            record.status = answer.status
            record.ttfb_ms = (monotonic() - self._began_at) * 1000
            content = await read_whole(attempting, answer, _MOST_ANSWER_BYTES)
            status = answer.status
        if status != _OK:
            message = message_of(content) or f"the server answered with status {status}"
            judgement = judge(status, message)
            # Any other one is about the server or the way to it, and says nothing of the texts.
            if judgement.reason is None and (status in _OF_THE_TEXTS or status >= INTERNAL_ERROR):
                raise _RefusedError(message[:1000])
            raise UnavailableError(message[:1000], reason=judgement.reason or Reason.UPSTREAM_ERROR)
        vectors, tokens = await self._vectors(content)
        record.input_tokens = tokens
        digest = await self._digest_after()
        self.attempting.close(outcome_of(status))
        return Embedded(vectors, digest, record.effective_target or "", record.policy)

    async def _body(self) -> bytes:
        wanted = self._wanted
        fields: dict[str, Any] = {
            "model": wanted.model,
            "input": [wanted.prefix + text for text in self._texts],
            "truncate": wanted.truncate,
        }
        if wanted.asked is not None:
            fields["dimensions"] = wanted.asked
        if sum(map(len, self._texts)) > _SMALL_BYTES:
            return await asyncio.to_thread(orjson.dumps, fields)
        return orjson.dumps(fields)

    async def _question(self, target: Target, body: InferenceBody) -> Question:
        """Return the request for a server that has the wanted build.

        Raises:
            UnfitTargetError: this one has not.
        """
        attempting, wanted = self.attempting, self._wanted
        if target.protocol is not Protocol.OLLAMA:
            message = (
                f"{target.instance} does not say which build of a model it has: no collection can use it"
            )
            raise UnfitTargetError(message)
        changes = attempting.changes
        if changes.overrides.get("truncate", wanted.truncate) is not wanted.truncate:
            message = (
                f"the settings of the role override `truncate`, which is {wanted.truncate} in the collection"
            )
            raise UnfitTargetError(message)
        self._target, self._model = target, attempting.work.model
        self._before = await self._digest(target)
        if wanted.digest is not None and self._before not in (None, wanted.digest):
            self._stale.append(target.instance)
            message = f"{target.instance} has another build of {self._model}"
            raise UnfitTargetError(message)
        return await native_question(attempting, target, _ROUTE, body, changes)

    async def _digest(self, target: Target) -> str | None:
        """Return the build that a server has; a list that does not fit is read anew."""
        try:
            known = await self._digests.at(target, self._model)
            if known is None or known != (self._wanted.digest or known):
                known = await self._digests.now(target, self._model)
        except UnavailableError:
            return None  # the request itself will show what is wrong
        return known

    async def _digest_after(self) -> str:
        """Return the build that has answered.

        Raises:
            _ChangedError: it is not known for sure, or not the wanted one.
        """
        assert self._target is not None  # noqa: S101  (it has answered)
        after = await self._digests.now(self._target, self._model)
        if after is None or after != self._before or after != (self._wanted.digest or after):
            raise _ChangedError  # the next try goes to a server that has the wanted one
        return after

    def _stale_error(self) -> CollectionConflictError:
        instances = ", ".join(dict.fromkeys(self._stale)) or "the server"
        message = (
            f"{instances} has another build of {self._wanted.model} than the vectors of this version "
            "(version_stale): begin a backfill, or pull the former build"
        )
        return CollectionConflictError("version_stale", message)

    async def _vectors(self, content: bytes) -> tuple[list[bytes], int | None]:
        """Return the vectors in an answer, and the tokens that it counts.

        Raises:
            UnavailableError: it is no useful answer.
            CollectionConflictError: the vectors have another dimension than the version.
        """
        try:
            if len(content) > _SMALL_BYTES:
                vectors, tokens = await asyncio.to_thread(_parsed, content)
            else:
                vectors, tokens = _parsed(content)
        except (ValueError, LookupError, TypeError) as error:
            message = f"{self.record.effective_target}: no useful vectors ({error})"
            raise UnavailableError(message[:1000], reason=Reason.INVALID_OUTPUT) from None
        lengths = {len(one) for one in vectors}
        if len(vectors) != len(self._texts) or len(lengths) != 1:
            message = (
                f"{self.record.effective_target} returned {len(vectors)} vectors of {len(lengths)} lengths "
                f"for {len(self._texts)} texts"
            )
            raise UnavailableError(message, reason=Reason.INVALID_OUTPUT)
        found, wanted = dimensions_of(vectors[0]), self._wanted.dimensions
        if found > MOST_DIMENSIONS:
            message = (
                f"{self.record.effective_target} returned vectors of {found} dimensions; "
                f"at most {MOST_DIMENSIONS} are possible"
            )
            raise UnavailableError(message, reason=Reason.INVALID_OUTPUT)
        if wanted is not None and found != wanted:
            message = (
                f"{self._wanted.model} makes vectors of {found} dimensions now, and this version has "
                f"{wanted} (dimension_changed): look at the settings of the role, or begin a backfill"
            )
            raise CollectionConflictError("dimension_changed", message)
        return vectors, tokens

    def _note(self, status: int, message: str) -> None:
        self.attempting.message = message
        self.record.status = status


def _parsed(content: bytes) -> tuple[list[bytes], int | None]:
    answer = orjson.loads(content)
    if not isinstance(answer, dict):
        raise TypeError("expected an object")
    tokens = answer.get("prompt_eval_count")
    is_count = type(tokens) is int and 0 <= tokens <= _MOST_TOKENS
    return [unit_vector(one) for one in answer["embeddings"]], tokens if is_count else None
