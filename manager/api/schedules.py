"""`/api/runtime/compute/schedules`: what happens by the clock, and when next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.schemas import Time  # noqa: TC001
from manager.domain.cron_words import cron_words

if TYPE_CHECKING:
    from manager.api.backend import Backend
    from manager.services.instances.sweeps import Entry

# The next times that are listed.
NEXT = 3


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LastBody(_Shape):
    """The last time since the daemon began, and what was done then."""

    at: Time
    detail: str


class ScheduleBody(_Shape):
    """One schedule; or the regular sweep, which has no `cron` and comes `every_s` seconds.

    `words` say the same for people. `timezone` is the one of `next`; null where there is no next time.
    `last` of the regular sweep is the last one that found something idle.
    """

    cron: str | None
    every_s: float | None
    words: str
    action: Literal["start", "stop", "reap"]
    instance: str | None
    timezone: str | None
    next: list[Time]
    last: LastBody | None


class SchedulesBody(_Shape):
    """The schedules in the order of the configuration, then the regular sweep."""

    schedules: list[ScheduleBody]
    count: int


def schedules_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/runtime/compute", tags=["compute"])

    @router.get("/schedules", response_model=SchedulesBody, responses=refusals())
    async def list_schedules(_query: Annotated[NoQuery, Query()]) -> Response:
        """The schedules with their next times and what the last run did; and the regular sweep."""
        found = [ScheduleBody.model_validate(one) for one in await schedules(backend)]
        body = SchedulesBody(schedules=found, count=len(found))
        return Response(body.model_dump_json(), media_type="application/json")

    return router


async def schedules(backend: Backend) -> list[dict[str, Any]]:
    """Return the values of a `ScheduleBody` for each; times are in the zone of the schedule."""
    return [_schedule(entry) for entry in await backend.sweeps.entries(NEXT)]


def _schedule(entry: Entry) -> dict[str, Any]:
    schedule, last, upcoming = entry.schedule, entry.last, entry.upcoming
    return {
        "cron": schedule and schedule.cron,
        "every_s": entry.every_s,
        "words": cron_words(schedule.cron) if schedule else f"every {entry.every_s:g} s",
        "action": schedule.action if schedule else "reap",
        "instance": schedule and schedule.instance,
        "timezone": str(upcoming[0].tzinfo) if upcoming else None,
        "next": list(upcoming),
        "last": last and {"at": last.at, "detail": last.detail},
    }
