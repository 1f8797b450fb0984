"""`/api/runtime/compute/live`: the sections that the page and the live views of the command line show."""

from __future__ import annotations

import heapq
import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict
from starlette.responses import StreamingResponse

from manager.api.answers import json_bytes
from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals, text
from manager.api.lanes import LanesBody, lanes_values
from manager.api.models import FitBody, LiveModelBody, MissingModelBody, PullBody, model_sections
from manager.api.requests import RequestBody, ended_json
from manager.api.schemas import EventBody, GpusBody, InstanceBody, event_json, gpus_body, instance_json
from manager.domain.history import Ended, record_values
from manager.services.live import Live, Section
from manager.services.open_requests import open_json
from manager.services.requests_history import MOST_RECENT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

    from starlette.types import Receive, Scope, Send

    from manager.api.backend import Backend
    from manager.services.live import Frame
    from manager.services.overview import InstanceState, Overview
    from manager.services.routing.attempting import Attempting

_KEEP_ALIVE_S = 15.0
# An `EventSource` waits so long before it connects again.
_BEGINNING = b"retry: 1000\n\n"
_STILL_HERE = b": still here\n\n"


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LiveBody(_Shape):
    """One frame; sections that are left out have not changed since the last one.

    Clocks, such as the rest of a TTL or the duration of an open request, are of the moment of the frame; a
    frame is not sent for them. `requests` are the newest: the open ones, then the last that ended. `problems`
    are the last events with a reason, newest first.
    """

    revision: int
    instances: list[InstanceBody] | None = None
    gpus: GpusBody | None = None
    lanes: LanesBody | None = None
    models: list[LiveModelBody] | None = None
    missing: list[MissingModelBody] | None = None
    fit: FitBody | None = None
    pulls: list[PullBody] | None = None
    requests: list[RequestBody] | None = None
    problems: list[EventBody] | None = None


# One event of the stream, as OpenAPI 3.1 describes what is JSON inside a string.
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": LiveBody.model_json_schema(mode="serialization"),
        },
    },
}


def live_channel(backend: Backend) -> Live:
    """Return the live channel of a daemon."""
    return Live(Sections(backend).read, now=time.monotonic)


def live_router(live: Live) -> APIRouter:
    router = APIRouter(prefix="/api/runtime/compute", tags=["compute"])
    encoded = _Encoded()

    @router.get(
        "/live",
        response_class=StreamingResponse,
        responses={200: text("text/event-stream", _EVENT), **refusals(503)},
    )
    async def follow_live(_query: Annotated[NoQuery, Query()]) -> StreamingResponse:
        """Stream what instances, cards, lanes, models and requests are, as server-sent events.

        The first one has every section, the following ones the sections that have changed. A client that
        reads slowly skips frames, and gets the latest values.
        """
        frames = live.follow(idle_s=_KEEP_ALIVE_S)
        first = await anext(frames)  # a refusal is an error status, not a stream
        return _Answer(encoded, first, frames)

    return router


class _Answer(StreamingResponse):
    """Leaves the channel when it has ended, however that is."""

    def __init__(self, encoded: _Encoded, first: Frame, frames: AsyncGenerator[Frame, None]) -> None:
        super().__init__(
            self._events(encoded, first),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._frames = frames

    async def _events(self, encoded: _Encoded, first: Frame) -> AsyncIterator[bytes]:
        yield _BEGINNING + encoded.event(first)
        del first
        async for frame in self._frames:
            yield encoded.event(frame) if frame.sections else _STILL_HERE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._frames.aclose()


class _Encoded:
    """Encodes each value once, and each frame once, for all subscribers of a tick."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[object, bytes]] = {}
        self._latest: tuple[Frame, bytes] | None = None

    def event(self, frame: Frame) -> bytes:
        """Return a frame as a server-sent event."""
        if self._latest is None or self._latest[0] is not frame:
            parts = [b'"%b":%b' % (name.encode(), self._value(name, frame)) for name in frame.sections]
            event = b'data: {"revision":%d,%b}\n\n' % (frame.revision, b",".join(parts))
            self._latest = frame, event
        return self._latest[1]

    def _value(self, name: str, frame: Frame) -> bytes:
        value = frame.sections[name]
        kept = self._values.get(name)
        if kept is None or kept[0] is not value:
            kept = self._values[name] = value, json_bytes(value)
        return kept[1]


class Sections:
    """Reads the sections of the live channel: values of the API's other calls."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._built_from: object = None
        self._instances: object = None

    def read(self) -> Mapping[str, Section]:
        """Return every section as it is now."""
        backend = self._backend
        overview = backend.overviews.current()
        lanes = lanes_values(backend)
        opened = heapq.nlargest(
            MOST_RECENT, (one for _, one in backend.passing.passages.open_requests), key=_began_at
        )
        ended = tuple(backend.history.recent)
        return {
            "instances": Section(
                self._instances_key(overview), lambda: [instance_json(one) for one in overview.instances]
            ),
            "gpus": Section(
                (overview.cards, overview.cards_trouble), lambda: gpus_body(overview).model_dump(mode="json")
            ),
            # Roles are lanes: a change of their settings is one of this section.
            "lanes": Section((_without_waits(lanes), _settings_state(backend)), lambda: lanes),
            **model_sections(backend, overview),
            "requests": Section(
                ([dict(one.record.__dict__) for one in opened], ended[-1:]),
                lambda: _requests_json(opened, ended),
            ),
            "problems": Section(
                [one.id for one in backend.journal.problems],
                lambda: [event_json(one) for one in reversed(backend.journal.problems)],
            ),
        }

    def _instances_key(self, overview: Overview) -> object:
        """Return the values of the instances without clocks; the same ones where the revision is the same.

        A revision also grows where something else has changed.
        """
        last_uses = [_last_use_s(one) for one in overview.instances]
        if self._built_from != (overview.revision, last_uses):
            self._built_from = overview.revision, last_uses
            self._instances = last_uses, [_without_clocks(instance_json(one)) for one in overview.instances]
        return self._instances


def _last_use_s(state: InstanceState) -> int | None:
    """Return the last use, from which a TTL runs; None while the instance is in use, or was never used.

    In whole seconds: under steady use it changes once a second.
    """
    view = state.view
    return None if view.in_flight or view.last_used_at is None else int(view.last_used_at.timestamp())


def _without_clocks(values: Mapping[str, object]) -> Mapping[str, object]:
    return {**values, "ttl_remaining_s": None, "last_seen_at": None, "last_used_at": None}


def _without_waits(lanes: Mapping[str, Sequence[Mapping[str, Any]]]) -> object:
    """Return the values of the lanes, and since when the oldest request waits, in whole seconds."""
    now = time.monotonic()
    waits = [one["oldest_wait_s"] for one in lanes["lanes"]]
    return (
        [{**one, "oldest_wait_s": None} for one in lanes["lanes"]],
        [None if wait_s is None else round(now - wait_s) for wait_s in waits],
        lanes["instances"],
    )


def _settings_state(backend: Backend) -> object:
    """Return what differs after each change of the settings of roles, and of the rollout."""
    return backend.model_settings.version, backend.rollout.values


def _began_at(attempting: Attempting) -> float:
    return attempting.began_at


def _requests_json(
    opened: Sequence[Attempting], ended: Sequence[Ended | Mapping[str, Any]]
) -> list[dict[str, object]]:
    """Return the values of a `RequestBody` for each: the open ones, then those that ended, newest first."""
    last = [ended_json(record_values(one.record) if isinstance(one, Ended) else one) for one in ended]
    known = {one["request_id"] for one in last}
    under_way = [one for one in map(open_json, opened) if one["request_id"] not in known]
    return [_with_text_time(one) for one in [*under_way, *reversed(last)][:MOST_RECENT]]


def _with_text_time(values: dict[str, Any]) -> dict[str, object]:
    """Return a record with its time as text, as stored ones have it."""
    began = values["ts"]
    return values if isinstance(began, str) else {**values, "ts": began.isoformat().replace("+00:00", "Z")}
