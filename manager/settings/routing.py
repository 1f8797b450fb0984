"""The settings of roles, models and the gateway: what callers may ask for, and how it is passed on."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, StrictBool

from manager.domain.classification import AutoRules, Tier
from manager.domain.facts import ModelFacts
from manager.domain.models import model_key
from manager.domain.roles import (
    BUILT_IN_ROLES,
    DEFAULT_QUEUE_LENGTH,
    DEFAULT_QUEUE_WAIT_S,
    NO_FALLBACK,
    BodyChanges,
    Fallback,
    Mode,
    Policy,
    RequestKind,
    Role,
    RoutingSettings,
    Strategy,
    SystemMode,
    role_contradictions,
)
from manager.domain.scoring import DEFAULT_WEIGHTS
from manager.domain.template import Refusal, parse_size
from manager.settings.section import (
    MOST_S,
    FoundIds,
    InstanceId,
    Number,
    Section,
    Text,
    Timeout,
    Wait,
    WholeNumber,
    refuse,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from manager.domain.scoring import Weights

ANY_INSTANCE = "auto"

_NOT_IN_A_MODEL = re.compile(r"[\s\x00-\x1f\x7f]")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
# Headers that mean something to everyone on the way: none of them can be given another meaning.
_TAKEN_HEADERS = re.compile(
    r"(?:accept|content|proxy)-.*|authorization|connection|cookie|date|expect|host|keep-alive|origin|range|te"
    r"|traceparent|tracestate|trailer|transfer-encoding|upgrade|user-agent|via|x-api-key|x-request-id"
)
_DEEPEST = 32
_DECIDED_ELSEWHERE = {
    "model": "which model answers is decided by the role",
    "stream": "whether an answer is streamed is the caller's to say",
}


def _model_name(name: str) -> str:
    if _NOT_IN_A_MODEL.search(name):
        raise ValueError("expected the name of a model, without spaces")
    if "@" in name:
        raise ValueError("expected the name of a model alone; the instance goes into `target`")
    return name


def _empty_is_null(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def _auto_is_null(value: object) -> object:
    return None if isinstance(value, str) and value.strip() in ("", ANY_INSTANCE) else value


def _json_object(body: dict[str, Any]) -> dict[str, Any]:
    refuse(_not_json(body, ()))
    for key in body:
        # A server takes the name of a field in any case.
        if (why := _DECIDED_ELSEWHERE.get(key.lower())) is not None:
            refuse([Refusal(key=(key,), message=f"{why}; expected other keys of the request")])
    return body


def _not_json(value: Any, path: tuple[str | int, ...]) -> Iterator[Refusal]:
    """Refusals of values that a request's body cannot carry: it is sent as JSON in UTF-8."""
    if len(path) > _DEEPEST:
        yield Refusal(key=path[:1], message=f"nested too deeply; expected at most {_DEEPEST} levels")
    elif isinstance(value, dict):
        for key, inner in value.items():
            if _is_unicode(key):
                yield from _not_json(inner, (*path, key))
            else:
                yield Refusal(key=path, message="half a character in a key; expected text in Unicode")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _not_json(inner, (*path, index))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Refusal(key=path, message=f"{value}; expected a finite number")
    elif isinstance(value, str) and not _is_unicode(value):
        yield Refusal(key=path, message="half a character; expected text in Unicode")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _header_name(name: str) -> str:
    if not _TOKEN.fullmatch(name):
        raise ValueError("expected the name of a header")
    if _TAKEN_HEADERS.fullmatch(name.lower()):
        raise ValueError("expected the name of a header that has no meaning yet")
    return name


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is listed twice; expected each instance once")
    return names


def _at_least_one(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("expected at least one instance, or null for any")
    return names


def _size_text(size: int) -> str:
    """Bytes in Docker's notation, in the largest unit that says them exactly."""
    unit = next(power for power in (4, 3, 2, 1, 0) if size % 2 ** (10 * power) == 0)
    return f"{size // 2 ** (10 * unit)}{('', 'k', 'm', 'g', 't')[unit]}"


MOST_TOKENS = 100_000_000
EntryT = TypeVar("EntryT")
ROLE_NAME = r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)*"
LONGEST_ROLE_NAME = 64
RoleName = Annotated[str, Field(pattern=f"^{ROLE_NAME}$", max_length=LONGEST_ROLE_NAME)]
ModelName = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_model_name)]
OptionalModel = Annotated[ModelName | None, BeforeValidator(_empty_is_null)]
OptionalTarget = Annotated[
    InstanceId | None,
    BeforeValidator(_auto_is_null),
    PlainSerializer(lambda target: target or ANY_INSTANCE, when_used="json"),
]
OptionalText = Annotated[str | None, BeforeValidator(_empty_is_null)]
JsonObject = Annotated[dict[str, Any], AfterValidator(_json_object)]
HeaderName = Annotated[str, AfterValidator(_header_name)]
MOST_INSTANCES_OF_ROLE = 64
QueueLength = Annotated[WholeNumber, Field(ge=0, le=10_000)]
Reserved = Annotated[WholeNumber, Field(ge=0, le=1000)]
Concurrency = Annotated[WholeNumber, Field(ge=1, le=10_000)]
Weight = Annotated[WholeNumber, Field(ge=1, le=1000)]
KeepWarm = Annotated[
    tuple[InstanceId, ...], Field(max_length=MOST_INSTANCES_OF_ROLE), AfterValidator(_each_once)
]
RoleInstances = Annotated[KeepWarm, AfterValidator(_at_least_one)]
AttemptTimeouts = Annotated[tuple[Timeout, ...], Field(max_length=MOST_INSTANCES_OF_ROLE)]
Size = Annotated[int, BeforeValidator(parse_size), PlainSerializer(_size_text, when_used="json")]


class BodySettings(Section):
    """Fields for a request's body: `defaults` where the caller says nothing, `overrides` always."""

    defaults: JsonObject = Field(default_factory=dict)
    overrides: JsonObject = Field(default_factory=dict)


class SystemSettings(Section):
    """The change to the system prompt; none while `text` is None."""

    text: OptionalText = None
    mode: SystemMode = "prepend"


class QueueSettings(Section):
    """The requests of a role that wait for a slot: how many, and how long each."""

    length: QueueLength = DEFAULT_QUEUE_LENGTH
    wait_s: Wait = DEFAULT_QUEUE_WAIT_S


class RoleSettings(Section):
    """One role, which is a lane too, as it is written. Within `Settings` every role has its `kind`."""

    model: OptionalModel = None
    target: OptionalTarget = None
    policy: Policy = Policy.AUTO
    kind: RequestKind | None = None
    fallbacks: tuple[RoleName, ...] = ()
    body: BodySettings = Field(default_factory=BodySettings)
    system: SystemSettings = Field(default_factory=SystemSettings)
    think: StrictBool | None = None
    instances: RoleInstances | None = None
    reserved: Reserved = 0
    concurrency: Concurrency | None = None
    queue: QueueSettings = Field(default_factory=QueueSettings)
    weight: Weight = 1
    attempt_timeouts_s: AttemptTimeouts = ()
    mode: Mode = "sync"
    keep_warm: KeepWarm = ()
    paid_fallback: StrictBool = False
    strategy: Strategy = Strategy.WARM_FIRST


class ModelEntrySettings(Section):
    """The changes to requests for one model, whatever their role."""

    body: BodySettings = Field(default_factory=BodySettings)
    system: SystemSettings = Field(default_factory=SystemSettings)
    think: StrictBool | None = None


def _each_model_once(settings: dict[str, EntryT]) -> dict[str, EntryT]:
    first: dict[str, str] = {}
    refuse(
        Refusal(key=(name,), message=f"the same model as {first[key]!r}; expected each model once")
        for name in settings
        if first.setdefault(key := model_key(name), name) != name
    )
    return settings


class ModelFactsSettings(Section):
    """Facts about a model, as `domain.facts.ModelFacts` has them; what is left out is not known."""

    tier: Tier | None = None
    context_window: Annotated[WholeNumber, Field(ge=1, le=MOST_TOKENS)] | None = None
    expected_latency_ms: Annotated[Number, Field(gt=0, le=MOST_S * 1000)] | None = None
    cost_factor: Annotated[Number, Field(ge=0, le=1_000_000)] = 1.0
    max_tokens: Annotated[WholeNumber, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    capabilities: Annotated[tuple[Text, ...], Field(max_length=64)] = ()


class ModelsSettings(Section):
    """`writers` says which instance alone pulls and deletes in a volume that several have.

    `list_roles` puts roles into `/api/tags` too, so that clients offer them.
    """

    auto_pull: StrictBool = False
    list_roles: StrictBool = True
    writers: dict[Text, InstanceId] = Field(default_factory=dict)
    settings: Annotated[dict[ModelName, ModelEntrySettings], AfterValidator(_each_model_once)] = Field(
        default_factory=dict
    )
    facts: Annotated[dict[ModelName, ModelFactsSettings], AfterValidator(_each_model_once)] = Field(
        default_factory=dict
    )


class HeaderSettings(Section):
    """Under which names requests carry what they say beside their body."""

    instance: HeaderName = "X-Instance"
    lane: HeaderName = "X-Lane"
    project: HeaderName = "X-Project-ID"
    intent: HeaderName = "X-Intent"
    local_only: HeaderName = "X-Local-Only"


def _each_header_once(headers: HeaderSettings) -> HeaderSettings:
    first: dict[str, str] = {}
    refuse(
        Refusal(key=(key,), message=f"{name!r} is the name for {first[name.lower()]} already")
        for key, name in headers
        if first.setdefault(name.lower(), key) != key
    )
    return headers


class GatewaySettings(Section):
    """Seconds throughout; `keep_alive_s` 0 sends nothing while a start is waited for.

    `max_body` bounds a body that is held in memory, `max_buffered` all of them together, and `max_upload` a
    body that only passes through; None is no bound.
    `access_log` is the share of successful requests that are logged; the others always are. `tracing` needs
    what `pip install 'ollama-endpoint-manager[otel]'` brings.
    """

    connect_timeout_s: Timeout = 5.0
    first_byte_timeout_s: Timeout = 600.0
    idle_timeout_s: Timeout = 300.0
    total_timeout_s: Timeout = 3600.0
    drain_timeout_s: Wait = 30.0
    max_body: Size = 256 * 2**20
    max_upload: Size | None = None
    max_buffered: Size = 512 * 2**20
    keep_alive_s: Wait = 15.0
    default_project: Annotated[str, Field(min_length=1, max_length=128)] = "default"
    access_log: Annotated[Number, Field(ge=0, le=1)] = 1.0
    tracing: StrictBool = False
    headers: Annotated[HeaderSettings, AfterValidator(_each_header_once)] = Field(
        default_factory=HeaderSettings
    )


def _with_built_in_roles(roles: dict[str, RoleSettings]) -> dict[str, RoleSettings]:
    """All roles with their kind: the built-in ones first, then those of the configuration's own."""
    refuse(
        Refusal(key=(name, "kind"), message=f"the role {name!r} does {kind}; leave `kind` out")
        for name, kind in BUILT_IN_ROLES.items()
        if name in roles and roles[name].kind not in (None, kind)
    )
    return {
        name: role if role.kind else role.model_copy(update={"kind": default_kind(name)})
        for name, role in ({name: RoleSettings() for name in BUILT_IN_ROLES} | roles).items()
    }


def default_kind(role: str) -> RequestKind:
    return BUILT_IN_ROLES.get(role, RequestKind.GENERATE)


RolesSettings = Annotated[dict[RoleName, RoleSettings], AfterValidator(_with_built_in_roles)]


def default_roles() -> dict[str, RoleSettings]:
    return _with_built_in_roles({})


def role_values(role: RoleSettings) -> dict[str, Any]:
    """The settings of a role, as JSON values by dotted field, such as `model` and `body.defaults`."""
    values = role.model_dump(mode="json")
    return {
        field: value
        for key, inner in values.items()
        for field, value in (
            ((f"{key}.{name}", one) for name, one in inner.items())
            if key in ("body", "system", "queue")
            else [(key, inner)]
        )
    }


def read_role(values: Mapping[str, Any]) -> RoleSettings:
    """The role that values by dotted field make.

    Raises:
        ValidationError: they make none.
    """
    nested: dict[str, Any] = {}
    for field, value in values.items():
        key, _, inner = field.partition(".")
        if inner:
            nested.setdefault(key, {})[inner] = value
        else:
            nested[key] = value
    return RoleSettings.model_validate(nested)


def to_role(name: str, settings: RoleSettings) -> Role:
    return Role(
        name=name,
        kind=settings.kind or default_kind(name),
        model=settings.model,
        target=settings.target,
        policy=settings.policy,
        fallbacks=settings.fallbacks,
        changes=to_changes(settings),
        instances=settings.instances,
        reserved=settings.reserved,
        concurrency=settings.concurrency,
        queue_length=settings.queue.length,
        queue_wait_s=settings.queue.wait_s,
        weight=settings.weight,
        attempt_timeouts_s=settings.attempt_timeouts_s,
        mode=settings.mode,
        keep_warm=settings.keep_warm,
        paid_fallback=settings.paid_fallback,
        strategy=settings.strategy,
    )


def to_changes(settings: RoleSettings | ModelEntrySettings) -> BodyChanges:
    return BodyChanges(
        defaults=settings.body.defaults,
        overrides=settings.body.overrides,
        system=settings.system.text,
        system_mode=settings.system.mode,
        think=settings.think,
    )


def to_facts(name: str, settings: ModelFactsSettings) -> ModelFacts:
    return ModelFacts(
        name=name,
        tier=settings.tier,
        context_tokens=settings.context_window,
        latency_ms=settings.expected_latency_ms,
        cost_factor=settings.cost_factor,
        output_tokens=settings.max_tokens,
        temperature=settings.temperature,
        capabilities=settings.capabilities,
    )


def routing_settings(
    roles: Mapping[str, RoleSettings],
    models: ModelsSettings,
    fallback: Fallback = NO_FALLBACK,
    auto: AutoRules | None = None,
    weights: Weights = DEFAULT_WEIGHTS,
) -> RoutingSettings:
    """Return the settings that routing obeys. A tier that has models is a role, named or not."""
    tiers = {one.tier.value for one in models.facts.values() if one.tier is not None}
    unnamed = [tier.value for tier in Tier if tier.value in tiers and tier.value not in roles]
    return RoutingSettings(
        roles={name: to_role(name, role) for name, role in roles.items()}
        | {name: Role(name, RequestKind.GENERATE) for name in unnamed},
        models={model_key(name): to_changes(one) for name, one in models.settings.items()},
        auto_pull=models.auto_pull,
        list_roles=models.list_roles,
        fallback=fallback,
        facts={model_key(name): to_facts(name, one) for name, one in models.facts.items()},
        auto=auto,
        weights=weights,
    )


def role_refusals(
    roles: Mapping[str, RoleSettings],
    gpu_of: Mapping[str, bool | None],
    slots_of: Mapping[str, int | None],
    *,
    deny_of: Mapping[str, tuple[str, ...]] | None = None,
    found: FoundIds,
) -> Iterator[Refusal]:
    """Yield the problems of `roles`, with keys relative to them.

    Args:
        roles: all roles.
        gpu_of: see `role_contradictions`.
        slots_of: see `role_contradictions`.
        deny_of: see `role_contradictions`; None checks no names.
        found: the instances that may be found later.
    """
    resolved = {name: to_role(name, role) for name, role in roles.items()}
    targets = {role.target for role in resolved.values() if role.target is not None} - set(gpu_of)
    named = {name for role in resolved.values() for name in (*(role.instances or ()), *role.keep_warm)}
    away = targets | (named - set(gpu_of))
    later = {name: on_gpu for name in sorted(away) if (on_gpu := found.on_gpu(name)) is not None}
    known = {**gpu_of, **later}
    for role, field, message in role_contradictions(resolved, known, slots_of, deny_of or {}):
        target = resolved[role].target
        unknown = field == "target" and target in targets and target not in later
        text = no_instance(target, [*gpu_of], found=found, auto=True) if unknown else message
        yield Refusal(key=(role, field), message=text)


def writer_refusals(
    models: ModelsSettings, managed: Mapping[str, bool], *, found: FoundIds
) -> Iterator[Refusal]:
    """Problems of `models.writers`, with keys relative to `models`.

    Args:
        models: the section.
        managed: for every instance whether it has a container of ours.
        found: as in `role_refusals`.
    """
    for volume, writer in models.writers.items():
        if managed.get(writer) is False:
            message = f"{writer!r} has driver external, which has no volume of ours"
            yield Refusal(key=("writers", volume), message=message)
        elif writer not in managed and found.on_gpu(writer) is None:
            ours = [name for name, ours in managed.items() if ours]
            yield Refusal(key=("writers", volume), message=no_instance(writer, ours, found=found, auto=False))


def no_instance(wanted: str | None, known: list[str], *, found: FoundIds, auto: bool) -> str:
    allowed = [*known, *found.words, *([ANY_INSTANCE] if auto else [])]
    return f"{wanted!r} is no instance; expected {', '.join(allowed) or 'nothing'}"
