"""`/api/runtime/compute`: instances, sweeps, pulls, cards and events."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, cast

import orjson
from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse, StreamingResponse

from manager.api.errors import manager_error_response, refusals, text
from manager.api.log_followers import LogFollowers
from manager.api.schemas import (
    ChangeBody,
    EventBody,
    GpusBody,
    InstanceBody,
    InstancePatch,
    InstancesBody,
    OrphansBody,
    PullRequest,
    SweepBody,
    gpus_body,
    instance_json,
    orphans_body,
    swept_body,
)
from manager.errors import EngineError, InvalidRequestError, ManagerError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from manager.api.backend import Backend
    from manager.domain.registry import PinAndTtl

_KEEP_ALIVE_S = 15.0

# One event of the stream, as OpenAPI 3.1 describes what is JSON inside a string.
_EVENT = {
    "type": "object",
    "required": ["id", "data"],
    "properties": {
        "id": {"type": "string"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": EventBody.model_json_schema(mode="serialization"),
        },
    },
}


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NoQuery(_Query):
    """A route without parameters: a mistyped one must not pass unnoticed."""


class StartQuery(_Query):
    wait: bool = True


class StopQuery(_Query):
    wait: bool = True
    force: bool = False


class ReapQuery(_Query):
    dry_run: bool = False


class LogsQuery(_Query):
    tail: int = Field(default=100, ge=1, le=10_000)
    follow: bool = False


class EventsQuery(_Query):
    last: int = Field(default=0, ge=0, le=10_000)
    follow: bool = True


def _json(body: BaseModel | dict[str, object], status: int = 200) -> Response:
    # Built from our own data: serialised once, not validated again.
    text = orjson.dumps(body) if isinstance(body, dict) else body.model_dump_json()
    return Response(text, status_code=status, media_type="application/json")


def compute_router(backend: Backend) -> APIRouter:  # noqa: C901  (a function for each route, none of them long)
    router = APIRouter(prefix="/api/runtime/compute", tags=["compute"])
    fleet, capacity = backend.fleet, backend.capacity
    followers = LogFollowers()

    def shown(instance_id: str) -> dict[str, object]:
        return instance_json(backend.overviews.of(instance_id))

    def changed(instance_id: str, done: bool, status: int = 200) -> Response:
        return _json({"instance": shown(instance_id), "changed": done}, status)

    @router.get("/instances", response_model=InstancesBody, responses=refusals())
    async def list_instances(_query: Annotated[NoQuery, Query()]) -> Response:
        """All instances as they are now. Starts nothing and extends nothing."""
        bodies = [instance_json(state) for state in backend.overviews.current().instances]
        return _json({"instances": bodies, "count": len(bodies), **backend.rollout.partial})

    @router.get("/instances/{instance_id}", response_model=InstanceBody, responses=refusals(404))
    async def show_instance(instance_id: str, _query: Annotated[NoQuery, Query()]) -> Response:
        return _json(shown(instance_id))

    @router.post(
        "/instances/{instance_id}/start",
        response_model=ChangeBody,
        responses={202: {"model": ChangeBody}, **refusals(404, 409, 503, 504)},
    )
    async def start_instance(instance_id: str, query: Annotated[StartQuery, Query()]) -> Response:
        """Have an instance running; answers when it is ready, or at once (202) without `wait`.

        Where `max_running` is reached, an unused instance is stopped first, as for a request.
        """
        await _engine_asked(backend, instance_id)
        if query.wait:
            return changed(instance_id, await capacity.start(instance_id))
        return changed(instance_id, capacity.begin_start(instance_id), 202)

    @router.post(
        "/instances/{instance_id}/stop",
        response_model=ChangeBody,
        responses={202: {"model": ChangeBody}, **refusals(404, 409, 503, 504)},
    )
    async def stop_instance(instance_id: str, query: Annotated[StopQuery, Query()]) -> Response:
        """Drain an instance and stop it; `force` does not drain."""
        await _engine_asked(backend, instance_id)
        if query.wait:
            return changed(instance_id, await capacity.stop(instance_id, force=query.force))
        return changed(instance_id, capacity.begin_stop(instance_id, force=query.force), 202)

    @router.patch("/instances/{instance_id}", response_model=InstanceBody, responses=refusals(404, 409, 503))
    async def configure_instance(
        instance_id: str, patch: InstancePatch, _query: Annotated[NoQuery, Query()]
    ) -> Response:
        """Override an instance's TTL or pin it; kept across restarts of the daemon. Null takes it back."""
        supervisor = fleet.managed(instance_id)
        if changes := patch.model_dump(exclude_unset=True):
            await supervisor.configure(cast("PinAndTtl", changes))
        return _json(shown(instance_id))

    @router.get(
        "/instances/{instance_id}/logs",
        response_class=Response,  # says nothing of the type of errors, which are JSON here too
        responses={200: text("text/plain"), **refusals(404, 409, 503)},
    )
    async def show_logs(instance_id: str, query: Annotated[LogsQuery, Query()]) -> Response:
        """The last lines an instance's container wrote; after a stop, the ones that were kept.

        With `follow` the answer goes on with what the container writes, until it ends.
        """
        await _engine_asked(backend, instance_id)
        if query.follow:
            return await followers.answer(fleet.managed(instance_id).follow_logs(query.tail))
        lines = await fleet.managed(instance_id).logs(query.tail)
        return PlainTextResponse("".join(f"{line}\n" for line in lines))

    @router.post("/reap", response_model=SweepBody, responses=refusals(503))
    async def reap(query: Annotated[ReapQuery, Query()]) -> Response:
        """One sweep: stop every instance that is idle past its TTL."""
        await _engine_asked(backend)
        swept = [swept_body(entry) for entry in await backend.sweeps.reap(dry_run=query.dry_run)]
        return _json(SweepBody(instances=swept, count=len(swept)))

    @router.post(
        "/pull",
        response_class=StreamingResponse,
        responses={200: text("application/x-ndjson"), **refusals(503)},
    )
    async def pull(request: PullRequest, _query: Annotated[NoQuery, Query()]) -> Response:
        """Pull an allowed image; progress as NDJSON, `{"status":"done"}` or an `error` last."""
        images = (request.image,) if request.image else fleet.images()
        for image in images:
            if not backend.may_pull(image):
                raise InvalidRequestError(f"image: {image!r} is not in allow.images of the configuration")
        await _engine_asked(backend)
        backend.link.refuse_if_down()
        lines = _pull_lines(backend, images, keep=request.image is None)
        first = await anext(lines)  # what fails at once is an error status, not a stream

        async def stream() -> AsyncIterator[bytes]:
            yield first
            async for line in lines:
                yield line

        return StreamingResponse(stream(), media_type="application/x-ndjson")

    @router.get("/gpus", response_model=GpusBody, responses=refusals())
    async def list_gpus(_query: Annotated[NoQuery, Query()]) -> Response:
        """The cards as last measured; `error` says why there are none to see."""
        return _json(gpus_body(backend.overviews.current()))

    @router.get("/orphans", response_model=OrphansBody, responses=refusals())
    async def list_orphans(_query: Annotated[NoQuery, Query()]) -> Response:
        """Containers of this manager that belong to no instance, as last listed; nothing touches them."""
        return _json(orphans_body(backend.overviews.current()))

    @router.get(
        "/events",
        response_class=StreamingResponse,
        responses={200: text("text/event-stream", _EVENT), **refusals()},
    )
    async def follow_events(
        query: Annotated[EventsQuery, Query()],
        last_event_id: Annotated[int, Header(ge=0, le=2**62)] = None,  # type: ignore[assignment]  # noqa: RUF013  (None stands for "left out" and is no value)
    ) -> StreamingResponse:
        """Stream events as they happen, as server-sent events; `Last-Event-ID` resumes after that event.

        Without it, `last` begins with that many of the events there are. `follow=false` ends after those.
        """
        return _events_answer(backend, query, last_event_id)

    return router


async def _engine_asked(backend: Backend, instance_id: str | None = None) -> None:
    """Wait for the first answer of the engine, without which each call would be refused.

    Raises:
        UnknownInstanceError, ConflictError: there is no such instance, or it is external.
    """
    if instance_id is not None:
        backend.fleet.managed(instance_id)
    await backend.first_look.engine_asked()


async def _pull_lines(backend: Backend, images: tuple[str, ...], *, keep: bool) -> AsyncIterator[bytes]:
    """Progress of one image after the other.

    Args:
        backend: whose engine pulls.
        images: their names.
        keep: one that the engine has and cannot pull is no error: it is used on.
    """
    begun = False
    try:
        for image in images:
            try:
                async for progress in backend.engine.pull(image):
                    yield PullLine(
                        image=image,
                        status=progress.status,
                        layer=progress.layer,
                        current_bytes=progress.current_bytes,
                        total_bytes=progress.total_bytes,
                    ).line()
                    begun = True
            except EngineError as error:
                if not keep or not await backend.engine.has_image(image):
                    raise
                why = error.message.removeprefix(f"{image} ")  # the line names it already
                yield PullLine(image=image, status=f"kept: {why}").line()
                begun = True
    except ManagerError as error:
        if not begun:
            raise
        yield bytes(manager_error_response(error).body) + b"\n"
    else:
        yield PullLine(status="done").line()


class PullLine(BaseModel):
    """One line of progress; byte counts are of one layer."""

    status: str
    image: str | None = None
    layer: str | None = None
    current_bytes: int | None = None
    total_bytes: int | None = None

    def line(self) -> bytes:
        return self.model_dump_json(exclude_none=True).encode() + b"\n"


def _events_answer(backend: Backend, query: EventsQuery, last_event_id: int | None) -> StreamingResponse:
    newest = backend.journal.last_id
    after = max(0, newest - query.last) if last_event_id is None else last_event_id
    return StreamingResponse(
        _event_lines(backend, after, None if query.follow else newest),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _event_lines(backend: Backend, after_id: int, until_id: int | None) -> AsyncIterator[bytes]:
    """Server-sent events, with a comment now and then so that a dead client is noticed.

    Args:
        backend: whose events they are.
        after_id: begin after that one.
        until_id: end with that one; None: never.
    """
    yield b": events follow\n\n"
    if until_id is not None and after_id >= until_id:
        return
    events = backend.journal.follow(after_id)
    upcoming = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait({upcoming}, timeout=_KEEP_ALIVE_S)
            if not done:
                yield b": still here\n\n"
                continue
            event = upcoming.result()
            body = EventBody(
                id=event.id,
                at=event.at,
                instance=event.instance,
                kind=event.kind,
                reason=event.reason,
                detail=event.detail,
            )
            yield f"id: {event.id}\ndata: {body.model_dump_json()}\n\n".encode()
            if until_id is not None and event.id >= until_id:
                return
            upcoming = asyncio.ensure_future(anext(events))
    finally:
        upcoming.cancel()
