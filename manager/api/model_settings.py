"""`/api/settings/models`: the roles as they are in force, where each value comes from, and their changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from fastapi import APIRouter, Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, WithJsonSchema
from starlette.responses import JSONResponse, Response

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.domain.roles import Mode, Policy, RequestKind, Strategy, SystemMode
from manager.domain.rollout import Stage  # noqa: TC001  (pydantic reads annotations at run time)
from manager.domain.routing import missing_models
from manager.errors import InvalidRequestError
from manager.services.models.model_settings import NOTHING
from manager.settings.overrides import Origin, role_key, setting_key
from manager.settings.rollout import MOST_LANES, MOST_URL
from manager.settings.routing import (
    LONGEST_ROLE_NAME,
    MOST_INSTANCES_OF_ROLE,
    ROLE_NAME,
    Concurrency,
    JsonObject,
    ModelName,
    QueueLength,
    Reserved,
    RoleName,
    Weight,
)
from manager.settings.section import MOST_S, InstanceId, Number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from manager.api.backend import Backend
    from manager.services.models.model_settings import ModelSettings
    from manager.settings.overrides import Sourced

_EMBEDDING = "embedding"
_NESTED = {"body": ("defaults", "overrides"), "system": ("text", "mode"), "queue": ("length", "wait_s")}


def _stripped(value: object) -> object:
    """Text without the whitespace around it; text that is nothing else is null."""
    return (value.strip() or None) if isinstance(value, str) else value


def _text_schema(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": "string", "pattern": pattern}, {"type": "null"}]})


def _word_schema(words: list[str]) -> WithJsonSchema:
    return WithJsonSchema({"enum": [*words, "", None]})


# Null, which may also be written as empty text, takes a value back.
Model = Annotated[
    ModelName | None, BeforeValidator(_stripped), _text_schema(r"^\s*([^\s@\x00-\x1f\x7f]{1,512})?\s*$")
]
Target = Annotated[
    InstanceId | None, BeforeValidator(_stripped), _text_schema(r"^\s*([a-z][a-z0-9-]{0,31})?\s*$")
]
PolicyWord = Annotated[Policy | None, BeforeValidator(_stripped), _word_schema(list(Policy))]
KindWord = Annotated[RequestKind | None, BeforeValidator(_stripped), _word_schema(list(RequestKind))]
ModeWord = Annotated[
    SystemMode | None, BeforeValidator(_stripped), _word_schema(["prepend", "append", "replace"])
]
ModeOfRole = Annotated[Mode | None, BeforeValidator(_stripped), _word_schema(["sync", "async"])]
StrategyWord = Annotated[Strategy | None, BeforeValidator(_stripped), _word_schema(list(Strategy))]
Name = Annotated[
    RoleName,
    BeforeValidator(_stripped),
    WithJsonSchema({"type": "string", "pattern": rf"^\s*{ROLE_NAME}\s*$", "maxLength": LONGEST_ROLE_NAME}),
]
SystemText = Annotated[str | None, BeforeValidator(_stripped)]
Body = Annotated[
    JsonObject | None,
    WithJsonSchema({"anyOf": [{"type": "object", "not": {"required": ["model"]}}, {"type": "null"}]}),
]


# The description of a mapping by pattern alone would allow any other key as well.
ByRole = Field(max_length=1000, json_schema_extra={"additionalProperties": False})


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BodyChange(_Shape):
    """Fields for the body of requests; each replaces the whole of what was there."""

    defaults: Body = None
    overrides: Body = None


class SystemChange(_Shape):
    text: SystemText = None
    mode: ModeWord = None


class QueueChange(_Shape):
    """The requests that wait for a slot; `wait_s` in seconds."""

    length: QueueLength | None = None
    wait_s: Annotated[Number, Field(ge=0, le=MOST_S)] | None = None


class RoleChange(_Shape):
    """New values of one role. What is left out stays; null takes a value back to what is configured."""

    model: Model = None
    target: Target = None
    policy: PolicyWord = None
    kind: KindWord = None
    fallbacks: Annotated[list[Name], Field(max_length=100)] | None = None
    body: BodyChange | None = None
    system: SystemChange | None = None
    think: StrictBool | None = None
    instances: Annotated[list[InstanceId], Field(min_length=1, max_length=MOST_INSTANCES_OF_ROLE)] | None = (
        None
    )
    reserved: Reserved | None = None
    concurrency: Concurrency | None = None
    queue: QueueChange | None = None
    weight: Weight | None = None
    attempt_timeouts_s: (
        Annotated[list[Annotated[Number, Field(gt=0, le=MOST_S)]], Field(max_length=MOST_INSTANCES_OF_ROLE)]
        | None
    ) = None
    mode: ModeOfRole = None
    keep_warm: Annotated[list[InstanceId], Field(max_length=MOST_INSTANCES_OF_ROLE)] | None = None
    paid_fallback: StrictBool | None = None
    strategy: StrategyWord = None


class RolloutChange(_Shape):
    """The stage of the rollout, the roles of the stage `lanes`, and where all other requests pass."""

    stage: Stage | None = None
    lanes: Annotated[list[RoleName], Field(max_length=MOST_LANES)] | None = None
    raw_url: Annotated[str, Field(max_length=MOST_URL)] | None = None


class FallbackChange(_Shape):
    """The use of paid servers; `order` names instances of driver cloud, empty: all of them."""

    enabled: StrictBool | None = None
    force_local: StrictBool | None = None
    order: Annotated[list[InstanceId], Field(max_length=64)] | None = None


class ModelsChange(_Shape):
    """New values. A role that is new is made, with its kind; null takes all that was changed of a role back.

    `embedding_runtime_policy` is `roles.embedding.policy`, `embedding_target_instance` is
    `roles.embedding.target`, and `layer_routing` has the target of any role. `force_local` is
    `fallback.force_local`: while it is on, no paid server is used.
    """

    roles: Annotated[dict[RoleName, RoleChange | None], ByRole] = Field(default_factory=dict)
    embedding_runtime_policy: PolicyWord = None
    embedding_target_instance: Target = None
    layer_routing: Annotated[dict[RoleName, Target], ByRole] = Field(default_factory=dict)
    rollout: RolloutChange | None = None
    fallback: FallbackChange | None = None
    force_local: StrictBool | None = None


class BodyValues(_Shape):
    defaults: dict[str, Any]
    overrides: dict[str, Any]


class SystemValues(_Shape):
    text: str | None
    mode: SystemMode


class QueueValues(_Shape):
    length: int
    wait_s: float


class RoleBody(_Shape):
    """One role as it is in force; `target` is `auto` or the id of an instance, `instances` null is any."""

    model: str | None
    target: str
    policy: Policy
    kind: RequestKind
    fallbacks: list[str]
    body: BodyValues
    system: SystemValues
    think: bool | None
    instances: list[str] | None
    reserved: int
    concurrency: int | None
    queue: QueueValues
    weight: int
    attempt_timeouts_s: list[float]
    mode: Mode
    keep_warm: list[str]
    paid_fallback: bool
    strategy: Strategy


class WarningBody(_Shape):
    """A value that is in force and does not work as things are."""

    key: str
    message: str


class RolloutValues(_Shape):
    """Requests that are not managed pass to `raw_url`: all in `observe` and `shadow`, none in `all`."""

    stage: Stage
    lanes: list[str]
    raw_url: str | None


class FallbackValues(_Shape):
    """The use of paid servers: none while `force_local` is on or `enabled` is off."""

    enabled: bool
    force_local: bool
    order: list[str]


class ModelsBody(_Shape):
    roles: dict[str, RoleBody]
    embedding_runtime_policy: Policy
    embedding_target_instance: str
    layer_routing: dict[str, str]
    rollout: RolloutValues
    fallback: FallbackValues
    force_local: bool
    warnings: list[WarningBody]


class EffectiveValue(_Shape):
    """A value and where it was said: `override` is what was changed at run time."""

    value: Any
    source: Origin


class EffectiveBodyValues(_Shape):
    defaults: EffectiveValue
    overrides: EffectiveValue


class EffectiveSystemValues(_Shape):
    text: EffectiveValue
    mode: EffectiveValue


class EffectiveQueueValues(_Shape):
    length: EffectiveValue
    wait_s: EffectiveValue


class EffectiveRoleBody(_Shape):
    model: EffectiveValue
    target: EffectiveValue
    policy: EffectiveValue
    kind: EffectiveValue
    fallbacks: EffectiveValue
    body: EffectiveBodyValues
    system: EffectiveSystemValues
    think: EffectiveValue
    instances: EffectiveValue
    reserved: EffectiveValue
    concurrency: EffectiveValue
    queue: EffectiveQueueValues
    weight: EffectiveValue
    attempt_timeouts_s: EffectiveValue
    mode: EffectiveValue
    keep_warm: EffectiveValue
    paid_fallback: EffectiveValue
    strategy: EffectiveValue


class EffectiveRollout(_Shape):
    stage: EffectiveValue
    lanes: EffectiveValue
    raw_url: EffectiveValue


class EffectiveFallback(_Shape):
    enabled: EffectiveValue
    force_local: EffectiveValue
    order: EffectiveValue


class IgnoredBody(_Shape):
    """A value that was changed at run time and does not fit the configuration any more."""

    key: str
    value: Any
    reason: str


class EffectiveModelsBody(_Shape):
    roles: dict[str, EffectiveRoleBody]
    embedding_runtime_policy: EffectiveValue
    embedding_target_instance: EffectiveValue
    layer_routing: dict[str, EffectiveValue]
    rollout: EffectiveRollout
    fallback: EffectiveFallback
    force_local: EffectiveValue
    ignored: list[IgnoredBody]


def model_settings_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/settings", tags=["settings"])

    @router.get("/models", response_model=ModelsBody, responses=refusals())
    async def show_models(_query: Annotated[NoQuery, Query()]) -> Response:
        """The values in force; `warnings` names roles whose model no instance is known to have."""
        return JSONResponse(settings_values(backend))

    @router.post("/models", response_model=ModelsBody, responses=refusals(503))
    async def change_models(change: ModelsChange, _query: Annotated[NoQuery, Query()]) -> Response:
        """Change values: in force at once, and kept across restarts. The answer has all values after it."""
        rollout = _of_rollout(change)
        if rollout:
            backend.rollout.check(rollout)  # what is wrong with it is known before anything is changed
        await change_roles(backend.model_settings, _sayings(change), _of_fallback(change))
        if rollout:
            await backend.rollout.change(rollout)
        return JSONResponse(settings_values(backend))

    @router.get("/models/effective", response_model=EffectiveModelsBody, responses=refusals())
    async def show_effective_models(_query: Annotated[NoQuery, Query()]) -> Response:
        """The values in force, each with where it was said."""
        return JSONResponse(effective_values(backend))

    return router


# One thing that a request says: where it says so, of which role, of which field (None: the role), and what.
Saying: TypeAlias = tuple[str, str, str | None, Any]


def _of_fallback(change: ModelsChange) -> dict[str, Any]:
    """Return the new values of `fallback`.

    Raises:
        InvalidRequestError: two values are given for one.
    """
    given = change.model_dump(mode="json", exclude_unset=True)
    # Null takes back whatever was changed.
    section = given.get("fallback", {})
    values = dict.fromkeys(FallbackValues.model_fields) if section is None else dict(section)
    if "force_local" in given:
        if values.get("force_local", given["force_local"]) != given["force_local"]:
            raise _two_things("body.fallback.force_local", "body.force_local")
        values["force_local"] = given["force_local"]
    return values


async def change_roles(
    settings: ModelSettings, sayings: Iterable[Saying], fallback: Mapping[str, Any] = NOTHING
) -> None:
    """Change what a request says, be it said in several ways.

    Raises:
        InvalidRequestError: it says two things, or cannot be meant; `details.fields` names where it is said.
        RegistryUnwritableError: it could not be saved.
    """
    said: dict[str, tuple[str, Any]] = {}
    change: dict[str, dict[str, Any] | None] = {}
    for where, role, field, value in sayings:
        values = change.setdefault(role, {})
        if field is None:
            said[role_key(role)] = (where, value)
            change[role] = value
            continue
        key = setting_key(role, field) if values is not None else role_key(role)
        if key in said and said[key][1] != value:
            raise _two_things(said[key][0], where)
        said[key] = (where, value)
        if values is not None:
            values[field] = value
    try:
        await settings.change(change, fallback)
    except InvalidRequestError as error:
        raise _as_said(error, {key: where for key, (where, _) in said.items()}) from error


def _sayings(change: ModelsChange) -> Iterator[Saying]:
    given = change.model_dump(mode="json", exclude_unset=True)
    for role, values in given.get("roles", {}).items():
        yield from _role_sayings(f"body.roles.{role}", role, values)
    if "embedding_runtime_policy" in given:
        yield "body.embedding_runtime_policy", _EMBEDDING, "policy", given["embedding_runtime_policy"]
    if "embedding_target_instance" in given:
        yield "body.embedding_target_instance", _EMBEDDING, "target", given["embedding_target_instance"]
    for role, target in given.get("layer_routing", {}).items():
        yield f"body.layer_routing.{role}", role, "target", target


def _role_sayings(where: str, role: str, values: Mapping[str, Any] | None) -> Iterator[Saying]:
    if not values:
        yield where, role, None, values
    for key, value in (values or {}).items():
        names = _NESTED.get(key)
        if names is None:
            yield f"{where}.{key}", role, key, value
        elif value is None:
            for name in names:
                yield f"{where}.{key}", role, f"{key}.{name}", None
        else:
            for name, inner in value.items():
                yield f"{where}.{key}.{name}", role, f"{key}.{name}", inner


def _of_rollout(change: ModelsChange) -> dict[str, Any]:
    """Return the new values of `rollout`; null takes back whatever was changed."""
    given = change.model_dump(mode="json", exclude_unset=True)
    values = given.get("rollout", {})
    return dict.fromkeys(RolloutValues.model_fields) if values is None else values


def _two_things(one: str, other: str) -> InvalidRequestError:
    fields = [
        {"field": one, "message": f"says another thing than {other}; expected one of them"},
        {"field": other, "message": f"says another thing than {one}; expected one of them"},
    ]
    return InvalidRequestError(f"{one} and {other} say two different things", details={"fields": fields})


def _as_said(error: InvalidRequestError, spelling: Mapping[str, str]) -> InvalidRequestError:
    """The same error with the fields as the request has them."""
    fields = [
        {"field": spelling.get(one["field"], f"body.{one['field']}"), "message": one["message"]}
        for one in error.details["fields"]  # type: ignore[attr-defined]
    ]
    message = "; ".join(f"{one['field']}: {one['message']}" for one in fields)
    return InvalidRequestError(message, details={"fields": fields})


def _shaped(settings: ModelSettings, show: Callable[[Sourced], Any]) -> dict[str, Any]:
    """All values, nested as requests have them, each as `show` shows it."""
    values = settings.values
    roles = {}
    for name, fields in values.items():
        shown = {field: show(one) for field, one in fields.items()}
        roles[name] = {
            **{field: one for field, one in shown.items() if "." not in field},
            **{key: {name: shown[f"{key}.{name}"] for name in names} for key, names in _NESTED.items()},
        }
    return {
        "roles": roles,
        "embedding_runtime_policy": show(values[_EMBEDDING]["policy"]),
        "embedding_target_instance": show(values[_EMBEDDING]["target"]),
        "layer_routing": {name: show(fields["target"]) for name, fields in values.items()},
        "fallback": {field: show(one) for field, one in settings.fallback.items()},
        "force_local": show(settings.fallback["force_local"]),
    }


def settings_values(backend: Backend) -> dict[str, Any]:
    shaped = _shaped(backend.model_settings, lambda one: one.value)
    snapshot, routing = backend.router.snapshot(), backend.model_settings.routing
    warnings = [
        {"key": setting_key(role, "model"), "message": message}
        for role, message in missing_models(routing, snapshot)
    ]
    warnings += [
        {"key": "rollout.lanes", "message": f"{lane!r} is no role any more"}
        for lane in backend.rollout.values["lanes"].value
        if lane not in routing.roles
    ]
    rollout = {field: one.value for field, one in backend.rollout.values.items()}
    return {**shaped, "rollout": rollout, "warnings": warnings}


def effective_values(backend: Backend) -> dict[str, Any]:
    settings, control = backend.model_settings, backend.rollout
    ignored = [
        {"key": one.key, "value": one.value, "reason": one.reason}
        for one in (*settings.ignored, *control.ignored)
    ]
    shaped = _shaped(settings, lambda one: {"value": one.value, "source": one.source})
    rollout = {field: {"value": one.value, "source": one.source} for field, one in control.values.items()}
    return {**shaped, "rollout": rollout, "ignored": ignored}
