"""`/api/v1/runs`: requests that are executed some time later, and whose answers are fetched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from starlette.responses import StreamingResponse

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.granted import grant_of, permit_of
from manager.api.schemas import Time  # noqa: TC001  (pydantic reads annotations at run time)
from manager.api.submitted import HeldBody, invalid, invalid_fields, origin_of, refuse_other_types
from manager.domain.keys import Scope
from manager.domain.routing import RequestFacts
from manager.domain.runs import RunCaller, RunStatus
from manager.services.runs.runs import NewRun
from manager.services.steps import in_steps
from manager.settings.problems import described
from manager.wire.body import reading
from manager.wire.errors import BadBodyError
from manager.wire.routes import INFERENCE
from manager.wire.runs import submission
from manager.wire.unload import unloads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from manager.api.backend import Backend
    from manager.domain.keys import Grant, Permit
    from manager.domain.runs import Run
    from manager.services.requests import Origin

PATH = "/api/v1/runs"
# Bytes of a submission beside the body of the request, at most.
_AROUND_BODY = 64 * 1024
_Path = Literal[
    "/api/generate",
    "/api/chat",
    "/api/embed",
    "/api/embeddings",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/messages",
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunRequest(_Body):
    """A request for one of the inference routes; `body` is what would be sent there."""

    path: _Path
    body: dict[str, Any]
    lane: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    idempotent: StrictBool = False
    expires_s: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | None = None


class SubmittedBody(_Body):
    id: str
    status: RunStatus


class RunErrorBody(_Body):
    code: str
    message: str


class RunResultBody(_Body):
    """The answer: `GET …/result` has its body."""

    status: int
    content_type: str
    size_bytes: int


class RunBody(_Body):
    """One run.

    `executions` counts how many times its request was sent by the daemon or an earlier one. `key` is the name
    of the key that submitted it, whose limits hold when it is executed.
    """

    id: str
    status: RunStatus
    path: str
    model: str
    lane: str | None
    project_id: str
    key: str | None
    idempotent: bool
    executions: int
    instance: str | None
    request_id: str | None
    body_bytes: int
    expires_s: float
    created_at: Time
    started_at: Time | None
    ended_at: Time | None
    expires_at: Time | None
    error: RunErrorBody | None
    result: RunResultBody | None


class RunsBody(_Body):
    runs: list[RunBody]
    count: int


class RunsQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    status: RunStatus | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


_DESCRIBED = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": RunRequest.model_json_schema()}},
    }
}
_ANY_ANSWER = {
    "description": "The answer as the server gave it, with its status and its content type.",
    "content": {"*/*": {"schema": {}}},
}


def most_body_bytes(backend: Backend) -> int:
    """Return how large a submission may be."""
    return backend.runs.limits.max_body + _AROUND_BODY


def runs_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix=PATH, tags=["runs"])

    @router.post(
        "",
        status_code=202,
        response_model=SubmittedBody,
        responses=refusals(429, 503),
        openapi_extra=_DESCRIBED,
    )
    async def submit_run(request: Request, _query: Annotated[NoQuery, Query()]) -> Response:
        """Store a request, to be executed when its lane has a slot for it; `Location` is where to look."""
        held = HeldBody(backend.passing.bodies)
        try:
            run = await backend.runs.submit(await _new_run(backend, request, await held.read(request)))
        finally:
            held.give_back()
        body = SubmittedBody(id=run.id, status=run.status)
        headers = {"Location": f"{PATH}/{run.id}"}
        return Response(
            body.model_dump_json(), status_code=202, media_type="application/json", headers=headers
        )

    @router.get("", response_model=RunsBody, responses=refusals(503))
    async def list_runs(request: Request, query: Annotated[RunsQuery, Query()]) -> Response:
        """The newest runs first; with a key that is no operator's, those of the key."""
        runs = await backend.runs.newest(query.status, query.limit, owner_of(request))
        found = [run_body(run) for run in runs]
        return _json(RunsBody(runs=found, count=len(found)))

    @router.get("/{run_id}", response_model=RunBody, responses=refusals(404, 503))
    async def show_run(request: Request, run_id: str, _query: Annotated[NoQuery, Query()]) -> Response:
        return _json(run_body(await backend.runs.find(run_id, owner_of(request))))

    @router.get(
        "/{run_id}/result",
        response_class=Response,  # says nothing of the type: it is that of the answer
        responses={200: _ANY_ANSWER, "default": _ANY_ANSWER, **refusals(404, 409, 503)},
    )
    async def show_result(request: Request, run_id: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """The answer as it came; `X-Run-Id` tells it from an error of this route."""
        run, pieces = await backend.runs.result(run_id, owner_of(request))
        first = await anext(pieces, b"")  # what fails at once is an error of this route
        result = run.result
        assert result is not None  # noqa: S101  (`result` has refused a run without one)

        async def stream() -> AsyncIterator[bytes]:
            yield first
            async for piece in pieces:
                yield piece

        headers = {
            "Content-Type": result.content_type,
            "Content-Length": str(result.size_bytes),
            "X-Run-Id": run.id,
        }
        return StreamingResponse(stream(), status_code=result.status, headers=headers)

    @router.delete("/{run_id}", response_model=RunBody, responses=refusals(404, 409, 503))
    async def cancel_run(request: Request, run_id: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """Cancel a run, whatever it waits for; its slot is free when this answers."""
        return _json(run_body(await backend.runs.cancel(run_id, owner_of(request))))

    return router


def owner_of(request: Request) -> Grant | None:
    """Return the key whose runs a request may see; None where it may see all."""
    grant = grant_of(request.scope)
    return None if grant is None or grant.may(Scope.OPERATOR) else grant


async def _new_run(backend: Backend, request: Request, raw: bytes) -> NewRun:
    """Check a submission.

    Raises:
        InvalidRequestError: it is none.
    """
    refuse_other_types(request)
    try:
        given = await in_steps(submission(raw))
    except BadBodyError as error:
        raise invalid("body", str(error)) from None
    fields = given.rest if given.body is None else {**given.rest, "body": {}}
    try:
        wanted = RunRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid_fields(_problems(error)) from None
    runs = backend.runs
    assert given.body is not None  # noqa: S101  (it is required)
    if len(given.body) > runs.limits.max_body:
        most = runs.limits.max_body
        raise invalid(
            "body.body", f"it has {len(given.body)} bytes; at most {most} are taken (runs.max_body)"
        )
    if wanted.expires_s is not None and wanted.expires_s > runs.limits.retention_s:
        most_s = runs.limits.retention_s
        raise invalid("body.expires_s", f"{wanted.expires_s:g}; at most {most_s:g} (runs.retention_s)")
    origin = origin_of(backend, request)
    lane = wanted.lane or origin.lane
    model = await _model(backend, wanted, given.body, origin, lane, permit=permit_of(request.scope))
    return NewRun(
        path=wanted.path,
        model=model,
        body=given.body,
        caller=RunCaller(
            origin.project, origin.intent, origin.instance, origin.local_only, origin.trace, origin.key
        ),
        lane=lane,
        idempotent=wanted.idempotent,
        expires_s=wanted.expires_s,
    )


async def _model(
    backend: Backend,
    wanted: RunRequest,
    body: bytes,
    origin: Origin,
    lane: str | None,
    *,
    permit: Permit | None,
) -> str:
    """Read the request inside; return its model."""
    route = INFERENCE[wanted.path.encode()]
    try:
        request = await in_steps(reading([body], route, len(body)))
    except BadBodyError as error:
        raise invalid("body.body", str(error)) from None
    model = request.model or lane
    if not model:
        raise invalid("body.body.model", "missing; expected the name of a model or a role, or a lane")
    if unloads(request, route):
        raise invalid("body.body.keep_alive", f"an unload is no run; send it to {route.path}")
    refused = backend.router.decide(RequestFacts(model, route.kind, origin.instance, lane, permit)).refused
    if refused is not None and refused.what == "unknown_lane":
        raise invalid("body.lane", refused.message)
    return model


def _problems(error: ValidationError) -> list[tuple[str, str]]:
    return [
        (".".join(map(str, ("body", *path))), message)
        for one in error.errors()
        for path, message in described(one, RunRequest, mapping="an object")
    ]


def run_body(run: Run) -> RunBody:
    error, result = run.error, run.result
    return RunBody(
        id=run.id,
        status=run.status,
        path=run.path,
        model=run.model,
        lane=run.lane,
        project_id=run.caller.project,
        key=run.caller.key,
        idempotent=run.idempotent,
        executions=run.executions,
        instance=run.instance,
        request_id=run.request_id,
        body_bytes=run.body_bytes,
        expires_s=run.expires_s,
        created_at=run.created_at,
        started_at=run.started_at,
        ended_at=run.ended_at,
        expires_at=run.expires_at,
        error=error and RunErrorBody(code=error.code, message=error.message),
        result=result
        and RunResultBody(
            status=result.status, content_type=result.content_type, size_bytes=result.size_bytes
        ),
    )


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")
