"""`/api/runtime/compute/requests`: the requests that ended last and those that are open; and `/explain`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import orjson
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.moments import MomentText, moment
from manager.api.routing import (
    DecisionBody,
    PassedOverBody,
    RefusedBody,
    RequestDescription,
    described,
)
from manager.api.schemas import Time  # noqa: TC001
from manager.domain.explanation import decision_sentence, passed_over_words, request_sentence
from manager.domain.history import Filters
from manager.domain.record import Outcome, with_defaults
from manager.domain.roles import RequestKind  # noqa: TC001
from manager.domain.routing import Because  # noqa: TC001
from manager.errors import Reason, RequestEndedError, UnknownRequestError
from manager.services.open_requests import MOST_LISTED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.api.backend import Backend


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FailedAttemptBody(_Shape):
    target: str
    reason: Reason


class RequestBody(_Shape):
    """One request, under the names of the log. `outcome` is null while it is open."""

    open: bool
    ts: Time
    request_id: str
    trace_id: str
    span_id: str
    parent_span_id: str | None
    project_id: str
    path: str
    sampled: bool
    kind: RequestKind | None
    lane: str | None
    intent: str | None
    local_only: bool
    role: str | None
    model: str | None
    requested_target: str | None
    effective_target: str | None
    provider: str
    endpoint: str | None
    policy: str | None
    fallback: bool
    fallback_reason: Reason | None
    fallback_from: str | None
    attempts: int
    failed_attempts: list[FailedAttemptBody]
    status: int
    outcome: Outcome | None
    stream: bool
    queue_ms: float
    start_ms: float | None
    load_ms: float | None
    ttfb_ms: float | None
    duration_ms: float
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float
    shadow_target: str | None
    shadow_refused: Reason | None
    disagreement: str | None
    key: str | None
    requested_model: str | None
    task_type: str | None
    tier: str | None
    task_confidence: float | None
    task_reasoning: str | None
    routing_ms: float | None


class RequestsBody(_Shape):
    """Requests, newest first: the open ones, then those that ended. `cursor` is for `after`.

    With `after` or `before` the open ones are left out. `older` is for `before`; it is null on the last page,
    and where open ones fill the answer.
    """

    requests: list[RequestBody]
    count: int
    cursor: int
    older: int | None


class AskedBody(_Shape):
    """The wishes of the request, as routing saw them."""

    model: str
    kind: RequestKind
    instance: str | None
    lane: str | None


class MadeAttemptBody(_Shape):
    """One attempt. `outcome` is `failed` with a reason, or that of the request; null while it is open."""

    instance: str
    model: str
    role: str | None
    because: Because
    fallback: Reason | None
    outcome: Outcome | Literal["failed"] | None
    reason: Reason | None
    message: str


class CandidateBody(PassedOverBody):
    """A candidate that was passed over; `words` say why."""

    words: str


class RequestDecisionBody(_Shape):
    """Every attempt in order, and every candidate passed over; `more_…` count those that are not named."""

    asked: AskedBody | None
    attempts: list[MadeAttemptBody]
    more_attempts: int
    passed_over: list[CandidateBody]
    more_passed_over: int
    refused: RefusedBody | None
    message: str


class ExplainedRequestBody(RequestBody):
    """One request with its decision; `summary` says it in a sentence."""

    decision: RequestDecisionBody
    summary: str


class ExplanationBody(DecisionBody):
    """A decision without a request; `summary` says it in a sentence."""

    summary: str


class CancelledBody(_Shape):
    request_id: str
    cancelled: bool


_Name = Annotated[str, Field(min_length=1, max_length=1024)]


class RequestsQuery(BaseModel):
    """`since` is a time, or a span before now. `after` is the `cursor` of an answer, `before` its `older`."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(default=100, ge=1, le=MOST_LISTED)
    since: MomentText | None = None
    project: _Name | None = None
    role: _Name | None = None
    model: _Name | None = None
    instance: _Name | None = None
    outcome: Outcome | None = None
    key: _Name | None = None
    after: int | None = Field(default=None, ge=0, lt=2**63)
    before: int | None = Field(default=None, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _has_one_direction(self) -> Self:
        if self.after is not None and self.before is not None:
            raise ValueError("`after` and `before` exclude each other")
        return self


def requests_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/runtime/compute", tags=["requests"])
    open_requests = backend.passing.passages.open_requests

    @router.get("/requests", response_model=RequestsBody, responses=refusals(503))
    async def list_requests(query: Annotated[RequestsQuery, Query()]) -> Response:
        """The last requests, newest first: the open ones, then those that ended."""
        filters = filters_of(query)
        # With a cursor the answer is a part of what is stored: open ones would take the place of some of it.
        is_first = query.after is None and query.before is None
        opened = await open_requests.listed(filters) if is_first else []
        await backend.history.flush()
        # The place of the next page is that of the last one listed.
        count = max(1, query.limit - len(opened))
        page = await backend.history.store.last(filters, count, after=query.after, before=query.before)
        ended = {id_ for id_, _ in page.items}
        opened = [one for one in opened if one["request_id"] not in ended]
        listed = [*opened, *(ended_json(values) for _, values in page.items)][: query.limit]
        older = page.older if len(opened) < query.limit else None
        return _json({"requests": listed, "count": len(listed), "cursor": page.cursor, "older": older})

    @router.get("/requests/{request_id}", response_model=ExplainedRequestBody, responses=refusals(404, 503))
    async def show_request(request_id: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """One request with its decision: every attempt, and every candidate passed over."""
        return _json(await explained(backend, request_id))

    @router.delete("/requests/{request_id}", response_model=CancelledBody, responses=refusals(404, 409, 503))
    async def cancel_request(request_id: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """Cancel an open request: its client gets an error, and what it holds is given back."""
        if not await open_requests.cancel(request_id):
            await backend.history.flush()
            if await backend.history.store.get(request_id) is None:
                raise _unknown(request_id)
            raise RequestEndedError(f"the request {request_id} has ended already")
        return _json({"request_id": request_id, "cancelled": True})

    @router.get("/explain", response_model=ExplanationBody, responses=refusals(404))
    async def explain(query: Annotated[RequestDescription, Query()]) -> Response:
        """Explain the route of a request, without making it. Starts nothing."""
        return _json(explanation(backend, query))

    return router


def filters_of(query: RequestsQuery) -> Filters:
    """Return the requests that a query wants."""
    return Filters(
        since=None if query.since is None else moment(query.since),
        project=query.project,
        role=query.role,
        model=query.model,
        instance=query.instance,
        outcome=query.outcome,
        key=query.key,
    )


async def explained(backend: Backend, request_id: str) -> dict[str, Any]:
    """Return the values of an `ExplainedRequestBody`.

    Raises:
        UnknownRequestError: the request is neither open nor stored.
    """
    found = await backend.passing.passages.open_requests.shown(request_id)
    if found is None:
        await backend.history.flush()
        stored = await backend.history.store.get(request_id)
        if stored is None:
            raise _unknown(request_id)
        record, decision = ended_json(stored[0]), stored[1]
        found = {**record, "decision": decision, "summary": request_sentence(record, decision)}
    for one in found["decision"]["passed_over"]:
        one["words"] = passed_over_words(one)
    return found


def explanation(backend: Backend, query: RequestDescription) -> dict[str, Any]:
    """Return the values of an `ExplanationBody`. Starts nothing.

    Raises:
        UnknownKeyError: no key of that name is in force.
    """
    decision = described(backend, query)
    return {**decision, "summary": decision_sentence(decision, query.model)}


def ended_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a `RequestBody` out of those that are stored."""
    return {"open": False, **with_defaults(values)}


def _unknown(request_id: str) -> UnknownRequestError:
    return UnknownRequestError(f"there is no request {request_id!r}: it is neither open nor in the history")


def _json(document: dict[str, Any]) -> Response:
    return Response(orjson.dumps(document, option=orjson.OPT_UTC_Z), media_type="application/json")
