"""`/api/runtime/compute/instances/{id}/load` and `/unload`: models in the memory of one instance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import orjson
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.requests import Request  # noqa: TC002  (FastAPI reads annotations at run time)
from starlette.responses import Response

from manager.api.compute import (  # FastAPI reads annotations at run time
    NoQuery,  # noqa: TC001
    StartQuery,  # noqa: TC001
)
from manager.api.errors import refusals
from manager.api.leaving import while_there
from manager.api.schemas import ChangeBody, instance_json
from manager.services.instances.first_look import MAX_STARTUP_WAIT_S
from manager.wire.loading import duration_s, unloads_at_once

if TYPE_CHECKING:
    from manager.api.backend import Backend

# Ollama counts in nanoseconds of 63 bits.
_MOST_S = 9_000_000_000
_EXPECTED = "expected seconds, or a duration such as 90s, 30m or 2h"


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class UnloadRequest(_Shape):
    """`model` is the name of a model, or of a role that has one."""

    model: Annotated[str, Field(strict=True, min_length=1, max_length=600)]


class LoadRequest(UnloadRequest):
    """`keep_alive` is how long the model stays after its last use, as Ollama takes it.

    A number of seconds or a duration such as `30m`; negative means for good. Left out, the server decides.
    """

    keep_alive: (
        Annotated[float, Field(strict=True, ge=-_MOST_S, le=_MOST_S, allow_inf_nan=False)]
        | Annotated[str, Field(strict=True, max_length=64)]
        | None
    ) = None

    @field_validator("keep_alive", mode="before")
    @classmethod
    def _is_kept(cls, value: object) -> object:
        """Check it whole: what none of several types takes would be told once for each of them."""
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, float | int | str):
            raise ValueError(_EXPECTED)  # noqa: TRY004  (a wrong value as any other)
        seconds = duration_s(value) if isinstance(value, str) else value
        if seconds is None:
            raise ValueError(_EXPECTED)
        if not -_MOST_S <= seconds <= _MOST_S:
            raise ValueError(f"expected {_MOST_S} seconds at most, or a negative number for good")
        if unloads_at_once(value):
            raise ValueError("that would unload the model; expected more, or less than nothing for good")
        return value


def loading_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/runtime/compute/instances", tags=["compute"])
    loading = backend.loading

    def changed(instance_id: str, *, done: bool, status: int = 200) -> Response:
        body = {"instance": instance_json(backend.overviews.of(instance_id)), "changed": done}
        return Response(orjson.dumps(body), status_code=status, media_type="application/json")

    @router.post(
        "/{instance_id}/load",
        response_model=ChangeBody,
        responses={202: {"model": ChangeBody}, **refusals(404, 409, 503, 504)},
    )
    async def load_model(
        instance_id: str, request: LoadRequest, query: Annotated[StartQuery, Query()], caller: Request
    ) -> Response:
        """Load a model on an instance, which is started if need be; answers when it is in memory.

        `changed` is false where it was in memory already. The load is cancelled when the last caller that
        waits for it disconnects, and when the instance is drained or stopped. Without `wait` it goes on
        without callers, and what does not end at once is answered with 202.
        """
        backend.fleet.get(instance_id)
        await backend.first_look.known(within_s=MAX_STARTUP_WAIT_S)
        if not query.wait:
            ended = await loading.begin(instance_id, request.model, request.keep_alive)
            return changed(instance_id, done=ended is not False, status=202 if ended is None else 200)
        work = loading.load(instance_id, request.model, request.keep_alive)
        done = await while_there(caller, work)
        return changed(instance_id, done=done)

    @router.post("/{instance_id}/unload", response_model=ChangeBody, responses=refusals(404, 409, 503, 504))
    async def unload_model(
        instance_id: str, request: UnloadRequest, _query: Annotated[NoQuery, Query()]
    ) -> Response:
        """Unload a model from an instance. Requests that use it come to their end first.

        `changed` is false where it was not in memory. Nothing is started.
        """
        backend.fleet.get(instance_id)
        await backend.first_look.known(within_s=MAX_STARTUP_WAIT_S)
        return changed(instance_id, done=await loading.unload(instance_id, request.model))

    return router
