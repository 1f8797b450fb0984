"""`/api/runtime/compute/models`: what is known of every model, what fits where, and pulls."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from manager.api.answers import json_bytes
from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.domain.models import is_possible, model_key
from manager.errors import InvalidRequestError
from manager.services.instances.first_look import MAX_STARTUP_WAIT_S
from manager.services.live import Section
from manager.wire.details import details_of
from manager.wire.listing import Status  # noqa: TC001  (pydantic reads annotations at run time)
from manager.wire.management import read_named
from manager.wire.ollama import name_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.api.backend import Backend
    from manager.services.models.fitting import Fits
    from manager.services.models.pull import PullView
    from manager.services.models.use import ModelUse
    from manager.services.overview import ModelPlace, ModelState, Overview
    from manager.services.routing.model_status import ModelFailure

_OWN_STORE = "instance:"
# JavaScript counts exactly to 2^53.
_MOST_NUMBER = 2**53


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelPlaceBody(_Shape):
    """A model on one volume; `volume` is null for the store of an instance that has none of ours.

    `may_change`: one of the instances can copy and delete it there. Null is what the server does not say.
    """

    volume: str | None
    instances: list[str]
    digest: str | None
    size_bytes: int | None
    may_change: bool


class ModelErrorBody(_Shape):
    """The failure of the last request for a model, or of the last load of it."""

    reason: str
    message: str


class LatelyBody(_Shape):
    """The use of a model in the last 24 hours; tokens are those that servers have counted."""

    requests: int
    input_tokens: int
    output_tokens: int


class LiveModelBody(_Shape):
    """One model that some instance has. Null is what its server does not say.

    `loaded_on` has the instances whose servers list it in memory, also while they load it. `offload` is the
    largest share of it in a card's memory, null where no instance holds it. `status` `error`: the last
    request for it failed, and no instance holds it. `places` are the volumes that have it; with several
    digests among them, one name is different models. `roles` are those whose model it is. `last_used_at` is
    the end of the last request that went to an instance, null where none is known; of the time before the
    daemon's start it is the hour.
    """

    name: str
    size_bytes: int | None
    family: str | None
    parameters: str | None
    quantization: str | None
    context_length: int | None
    capabilities: list[str] | None
    digest: str | None
    instances: list[str]
    loaded_on: list[str]
    loading_on: list[str]
    offload: float | None
    status: Status
    error: ModelErrorBody | None
    places: list[ModelPlaceBody]
    roles: list[str]
    last_used_at: str | None
    lately: LatelyBody | None


class MissingModelBody(_Shape):
    """A model that roles name and no instance has."""

    model: str
    roles: list[str]


class RoomBody(_Shape):
    """The memory that a load on an instance may take now; null where it is unknown.

    It is what is free on the cards of the instance, less what others were promised, and what the instance
    holds itself: its server unloads models to make room.
    """

    instance: str
    room_bytes: int | None


class ModelFitBody(_Shape):
    """A model on the cards of an instance that has it.

    `basis`: `measured` on this instance; what its `server` says, the least that was measured `elsewhere`, or
    the size of its `file`, all of which are less than it takes. `fits` null is unknown: only what was
    measured tells that it fits.
    """

    model: str
    instance: str
    needed_bytes: int | None
    basis: Literal["measured", "server", "elsewhere", "file"] | None
    fits: bool | None


class FitBody(_Shape):
    rooms: list[RoomBody]
    models: list[ModelFitBody]


class LayerBody(_Shape):
    digest: str
    completed_bytes: int
    total_bytes: int


class PullBody(_Shape):
    """One pull. Byte counts are those of the layers that the server has named so far.

    `volume` as in `places`; `instance` is the one that pulls, null while the pull waits. `is_kept`: it goes
    on without clients. `bytes_per_s` and `left_s` are null where the speed is not known.
    """

    id: int
    model: str
    volume: str | None
    instance: str | None
    state: Literal["waiting", "pulling", "done", "failed", "cancelled"]
    status: str
    layers: list[LayerBody]
    completed_bytes: int
    total_bytes: int
    bytes_per_s: float | None
    left_s: float | None
    clients: int
    is_kept: bool
    error: str | None


class ModelsBody(_Shape):
    models: list[LiveModelBody]
    count: int
    missing: list[MissingModelBody]
    fit: FitBody
    pulls: list[PullBody]


class PullModelRequest(_Shape):
    """`instance`: the model goes to its volume; left out, it goes where new models go."""

    model: Annotated[str, Field(strict=True, min_length=1, max_length=600)]
    instance: Annotated[str, Field(strict=True, min_length=1, max_length=64)] | None = None
    insecure: Annotated[bool, Field(strict=True)] = False


def models_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/runtime/compute/models", tags=["compute"])
    pulls, volumes = backend.passing.pulls, backend.passing.volumes

    @router.get("", response_model=ModelsBody, responses=refusals())
    async def list_models(_query: Annotated[NoQuery, Query()]) -> Response:
        """Every model that some instance has, what would fit where now, and the pulls. Starts nothing.

        Servers that run are asked for their models, as for `/api/tags`.
        """
        await backend.passing.catalogue.refresh(lists=True)
        sections = model_sections(backend, backend.overviews.current())
        values = {name: section.build() for name, section in sections.items()}
        models: Any = values["models"]
        return Response(json_bytes({**values, "count": len(models)}), media_type="application/json")

    @router.post("/pulls", status_code=202, response_model=PullBody, responses=refusals(404, 409, 503))
    async def begin_pull(request: PullModelRequest, _query: Annotated[NoQuery, Query()]) -> Response:
        """Begin to pull a model. The pull goes on without clients, and is the one that is under way already.

        What has come of a pull that is cancelled, or ends with the daemon, stays on the volume: the next one
        goes on from there.
        """
        if not is_possible(request.model):
            raise InvalidRequestError(f"model: {request.model!r} is no possible name of a model")
        if backend.passing.catalogue.is_role(request.model):
            raise InvalidRequestError(
                f"model: {request.model!r} is a role; requests that name it are answered by the role's model"
            )
        await backend.first_look.known(within_s=MAX_STARTUP_WAIT_S)
        volume = volumes.default(request.instance)
        body = {"model": request.model, **({"insecure": True} if request.insecure else {})}
        return _answer(pull_json(pulls.begin(volume, read_named(orjson.dumps(body)))), 202)

    @router.delete("/pulls/{number}", response_model=PullBody, responses=refusals(404))
    async def cancel_pull(number: int, _query: Annotated[NoQuery, Query()]) -> Response:
        """Cancel a pull, whoever waits for it; one that has ended is listed no longer."""
        return _answer(pull_json(pulls.cancel(number)))

    return router


def model_sections(backend: Backend, overview: Overview) -> Mapping[str, Section]:
    """Return the sections of the live channel about models."""
    statuses = backend.passing.catalogue.statuses(overview.models)
    uses, failures, fits = backend.uses, backend.status, backend.fitting.current()
    loading = failures.loading_on()
    # Small, and with a speed that changes while nothing comes.
    pulls = [pull_json(one) for one in backend.passing.pulls.views()]
    missing = _missing(overview)

    def models() -> list[dict[str, object]]:
        roles = _roles(overview)
        return [
            _model_json(
                model,
                statuses[key],
                loading_on=list(loading.get(key, ())),
                failure=failures.failure(key),
                roles=roles.get(key, []),
                use=uses.of(key),
            )
            for key, model in overview.models.items()
        ]

    return {
        "models": Section(
            (overview.models, overview.lanes, statuses, loading, failures.version, uses.version), models
        ),
        "missing": Section(missing, lambda: missing),
        "fit": Section(fits, lambda: _fit_json(fits, overview)),
        "pulls": Section(pulls, lambda: pulls),
    }


def pull_json(pull: PullView) -> dict[str, object]:
    """Return the values of a `PullBody`."""
    return {
        "id": pull.id,
        "model": pull.model,
        "volume": _volume(pull.volume),
        "instance": pull.instance or _instance(pull.volume),
        "state": pull.state,
        "status": pull.status,
        "layers": [
            {"digest": one.digest, "completed_bytes": one.completed_bytes, "total_bytes": one.total_bytes}
            for one in pull.layers
        ],
        "completed_bytes": pull.completed_bytes,
        "total_bytes": pull.total_bytes,
        "bytes_per_s": None if pull.bytes_per_s is None else round(pull.bytes_per_s),
        "left_s": None if pull.left_s is None else round(pull.left_s),
        "clients": pull.clients,
        "is_kept": pull.is_kept,
        "error": pull.error,
    }


def _answer(values: Mapping[str, object], status: int = 200) -> Response:
    return Response(json_bytes(values), status_code=status, media_type="application/json")


def _model_json(
    model: ModelState,
    status: Status,
    *,
    loading_on: list[str],
    failure: ModelFailure | None,
    roles: list[str],
    use: ModelUse | None,
) -> dict[str, object]:
    """Return the values of a `LiveModelBody`; a server may say anything."""
    entry = model.entry
    details = entry.get("details")
    details = details if isinstance(details, dict) else {}
    known = details_of(entry)
    return {
        "name": name_of(entry),
        "size_bytes": _size(entry),
        "family": _text(details.get("family")),
        "parameters": _text(details.get("parameter_size")),
        "quantization": _text(details.get("quantization_level")),
        "context_length": known.context_length,
        "capabilities": None if known.capabilities is None else list(known.capabilities),
        "digest": _text(entry.get("digest")),
        "instances": model.instances,
        "loaded_on": model.loaded_on,
        "loading_on": loading_on,
        "offload": model.offload,
        "status": status,
        "error": None if failure is None else {"reason": failure.reason.value, "message": failure.message},
        "places": [_place_json(one) for one in model.places],
        "roles": roles,
        "last_used_at": None if use is None or not use.last_s else _time(use.last_s),
        "lately": None
        if use is None
        else {
            "requests": use.requests,
            "input_tokens": use.input_tokens,
            "output_tokens": use.output_tokens,
        },
    }


def _place_json(place: ModelPlace) -> dict[str, object]:
    return {
        "volume": _volume(place.volume),
        "instances": place.instances,
        "digest": _text(place.entry.get("digest")),
        "size_bytes": _size(place.entry),
        "may_change": place.may_change,
    }


def _fit_json(fits: Fits, overview: Overview) -> dict[str, object]:
    return {
        "rooms": [{"instance": id_, "room_bytes": room.bytes} for id_, room in fits.rooms.items()],
        "models": [
            {
                "model": name_of(overview.models[one.key].entry) if one.key in overview.models else one.key,
                "instance": one.instance,
                "needed_bytes": one.need.bytes if one.need else None,
                "basis": one.need.basis if one.need else None,
                "fits": one.fits,
            }
            for one in fits.models
        ],
    }


def _roles(overview: Overview) -> dict[str, list[str]]:
    """Return the roles of each model, by its key."""
    found: dict[str, list[str]] = {}
    for lane in overview.lanes:
        if lane.model is not None:
            found.setdefault(model_key(lane.model), []).append(lane.name)
    return found


def _missing(overview: Overview) -> list[dict[str, object]]:
    names = {model_key(lane.model): lane.model for lane in overview.lanes if lane.model is not None}
    return [
        {"model": names[key], "roles": roles}
        for key, roles in _roles(overview).items()
        if key not in overview.models
    ]


def _volume(volume: str) -> str | None:
    return None if volume.startswith(_OWN_STORE) else volume


def _instance(volume: str) -> str | None:
    return volume.removeprefix(_OWN_STORE) if volume.startswith(_OWN_STORE) else None


def _size(entry: Mapping[str, Any]) -> int | None:
    size = entry.get("size")
    return size if type(size) is int and 0 < size < _MOST_NUMBER else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _time(at_s: int) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
