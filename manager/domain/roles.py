"""Roles: names that callers may ask for, and the changes to their requests."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from manager.domain.denial import denying
from manager.domain.facts import models_by_tier
from manager.domain.models import DEFAULT_TAG, model_key
from manager.domain.scoring import DEFAULT_WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from manager.domain.classification import AutoRules
    from manager.domain.facts import ModelFacts
    from manager.domain.scoring import Weights

SystemMode: TypeAlias = Literal["prepend", "append", "replace"]
Mode: TypeAlias = Literal["sync", "async"]

# Waiting requests of a role, and how long one waits, where the settings do not say.
DEFAULT_QUEUE_LENGTH = 100
DEFAULT_QUEUE_WAIT_S = 60.0


class RequestKind(StrEnum):
    """The work that a request has a model do. A role serves one kind, and falls back to roles of the same."""

    GENERATE = "generate"
    EMBED = "embed"
    TRANSCRIBE = "transcribe"


# What an instance serves by default: everything that a current Ollama does.
USUAL_KINDS = frozenset(RequestKind)


class Policy(StrEnum):
    """Which devices a role may run on."""

    AUTO = "auto"
    PREFER_GPU = "prefer_gpu"
    CPU_ONLY = "cpu_only"


class Strategy(StrEnum):
    """The order of the instances that are permitted and able, within one model of a role.

    `warm_first`: that of `instances`, then by whether the model is loaded, and by priority. The others order
    all instances that run, and after them those that have to be started: `scored` by a sum of signals,
    `round_robin` each in turn, `least_loaded` by the requests in flight.
    """

    WARM_FIRST = "warm_first"
    SCORED = "scored"
    ROUND_ROBIN = "round_robin"
    LEAST_LOADED = "least_loaded"


# The roles that there always are, whether or not they have a model.
BUILT_IN_ROLES: Mapping[str, RequestKind] = MappingProxyType(
    {
        "thinking": RequestKind.GENERATE,
        "control": RequestKind.GENERATE,
        "output": RequestKind.GENERATE,
        "tool_selector": RequestKind.GENERATE,
        "embedding": RequestKind.EMBED,
    }
)


class Parameters(NamedTuple):
    """Parameters of a model that count where the caller says nothing; None leaves one alone."""

    temperature: float | None = None
    context_tokens: int | None = None
    output_tokens: int | None = None


NO_PARAMETERS = Parameters()


@dataclass(frozen=True, slots=True)
class BodyChanges:
    """The changes to the body of a request before it is sent on.

    `defaults` count where the caller says nothing, `overrides` always; both are merged deeply. `system` is
    put into the system prompt. `think` None leaves the model's way alone. `parameters` count where neither
    the caller nor `defaults` say anything, under the names of the request's dialect.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    system_mode: SystemMode = "prepend"
    think: bool | None = None
    parameters: Parameters = NO_PARAMETERS

    @property
    def empty(self) -> bool:
        return (
            not self.defaults
            and not self.overrides
            and self.system is None
            and self.think is None
            and self.parameters == NO_PARAMETERS
        )

    @property
    def size(self) -> int:
        """Bytes that the changes add to a body, at most."""
        return 0 if self.empty else len(repr(self).encode(errors="backslashreplace"))


@dataclass(frozen=True, slots=True)
class Role:
    """A role, which is a lane too, with every default resolved.

    Attributes:
        target: None means any instance that the policy allows.
        instances: the only ones it may use, in this order; None means any.
        reserved: slots on each of `instances` that no other role may take.
        concurrency: its requests in flight, all instances together; None is no limit.
        queue_length: its requests that may wait for a slot; one more is refused.
        queue_wait_s: how long one of them waits.
        weight: its share of slots where roles compete.
        attempt_timeouts_s: for the first byte, by place in `instances`; the last one repeats. Empty: that of
            the gateway.
        mode: `async` refuses requests that wait for their answer.
        keep_warm: instances where its model stays loaded.
        paid_fallback: whether a paid provider may answer where nothing local can.
        strategy: orders its instances; all but `warm_first` leave the order of `instances` aside.
    """

    name: str
    kind: RequestKind
    model: str | None = None
    target: str | None = None
    policy: Policy = Policy.AUTO
    fallbacks: tuple[str, ...] = ()
    changes: BodyChanges = field(default_factory=BodyChanges)
    instances: tuple[str, ...] | None = None
    reserved: int = 0
    concurrency: int | None = None
    queue_length: int = DEFAULT_QUEUE_LENGTH
    queue_wait_s: float = DEFAULT_QUEUE_WAIT_S
    weight: int = 1
    attempt_timeouts_s: tuple[float, ...] = ()
    mode: Mode = "sync"
    keep_warm: tuple[str, ...] = ()
    paid_fallback: bool = False
    strategy: Strategy = Strategy.WARM_FIRST

    def timeout_s(self, place: int) -> float | None:
        """Return the time for the first byte at a place in `instances`; None: that of the gateway."""
        timeouts_s = self.attempt_timeouts_s
        return timeouts_s[min(place, len(timeouts_s) - 1)] if timeouts_s else None


@dataclass(frozen=True, slots=True)
class Fallback:
    """The use of paid servers: none while `enabled` is off, and none at all while `force_local` is on.

    `order` has the only ones that are used, in this order; empty: all, as they are configured.
    """

    enabled: bool = False
    force_local: bool = False
    order: tuple[str, ...] = ()


NO_FALLBACK = Fallback()


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """All that the operator decides about routing.

    `models` maps keys of models (`model_key`) to changes, `facts` to what is known of them. `list_roles` puts
    roles into Ollama's own list of models too. `auto` has the rules for requests that leave the choice of a
    model to the daemon; None while that is off. `weights` are those of the strategy `scored`.
    """

    roles: Mapping[str, Role]
    models: Mapping[str, BodyChanges] = field(default_factory=dict)
    auto_pull: bool = False
    list_roles: bool = True
    fallback: Fallback = NO_FALLBACK
    facts: Mapping[str, ModelFacts] = field(default_factory=dict)
    auto: AutoRules | None = None
    weights: Weights = DEFAULT_WEIGHTS
    # The models of each tier, the fastest one first; worked out of `facts`.
    tiers: Mapping[str, tuple[str, ...]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiers", models_by_tier(self.facts.values()))

    def expected_ms(self, key: str) -> float | None:
        """Return the time to the first token that is expected of a model; None where it is not stated."""
        facts = self.facts.get(key)
        return None if facts is None else facts.latency_ms

    def models_of(self, role: Role) -> tuple[str, ...]:
        """Return the models of a role in order: its own one, then those of the tier of its name."""
        others = self.tiers.get(role.name, ())
        if role.model is None or not others:
            return others if role.model is None else (role.model,)
        own = model_key(role.model)
        return (role.model, *(one for one in others if model_key(one) != own))

    def chain(self, role: Role) -> Iterator[Role]:
        """Yield a role, then those of its kind that it falls back to, each once."""
        seen: set[str] = set()
        waiting = [role]
        while waiting:
            current = waiting.pop(0)
            if current.name not in seen:
                seen.add(current.name)
                yield current
                followers = (self.roles.get(name) for name in current.fallbacks)
                waiting += [other for other in followers if other is not None and other.kind is role.kind]

    def role(self, name: str) -> Role | None:
        """The role of that name, in any case: names of models ignore case as well."""
        return self.roles.get(name) or self.roles.get(name.strip().lower())

    def kept_on(self, instance: str) -> Iterator[Role]:
        """Yield the roles whose models stay in the memory of an instance."""
        return (one for one in self.roles.values() if one.model is not None and instance in one.keep_warm)

    def role_meant(self, name: str, *, is_model: Callable[[str], bool]) -> Role | None:
        """The role that a name in a request means; None where it means a model.

        A bare name means the role, unless the role has no model and a model has that name. `NAME:latest`
        means the model, unless there is none: lists name roles so, because clients add that tag to any
        name without one.

        Args:
            name: as in the request, without a pin.
            is_model: whether an instance has the model of that key.
        """
        role = self.role(name)
        if role is not None and role.model is not None:
            return role
        role = role or self.role(name.strip().lower().removesuffix(f":{DEFAULT_TAG}"))
        return None if role is None or is_model(model_key(name)) else role

    def changes_for(
        self, model: str, role: str | None, capabilities: Collection[str] | None = None
    ) -> BodyChanges:
        """Return the changes in a request for `model` under `role`; the role wins, key by key.

        Args:
            model: its name.
            role: the name of a role, if any.
            capabilities: what the server lists for the model (`/api/show`); None where that is unknown.
        """
        found = self.models.get(model_key(model), _UNCHANGED)
        mine = self.roles[role].changes if role is not None and role in self.roles else _UNCHANGED
        quiet = has_optional_thinking(model) and (capabilities is None or "thinking" in capabilities)
        facts = self.facts.get(model_key(model))
        parameters = NO_PARAMETERS if facts is None else Parameters(*facts.parameters)
        if found is _UNCHANGED and mine is _UNCHANGED and not quiet and facts is None:
            return _UNCHANGED
        return BodyChanges(
            defaults=merged(found.defaults, mine.defaults),
            overrides=merged(found.overrides, mine.overrides),
            system=found.system if mine.system is None else mine.system,
            system_mode=found.system_mode if mine.system is None else mine.system_mode,
            think=_first(mine.think, found.think, False if quiet else None),
            parameters=parameters,
        )


_UNCHANGED = BodyChanges()


# Builds of Qwen3 that think unless they are told not to. Those of July 2025 ("2507") always think or never
# do, and Ollama's library moved the bare tags 4b, 30b and 235b to builds that always do: of these sizes only
# quantised tags still name the first builds. Any other name is left alone.
_QUANTISED = r"(?:(?:i?q[0-9]|b?f(?:p)?16|f32)[a-z0-9_]*)"
_IN_LIBRARY = re.compile(
    r"qwen3:(?:latest|(?:0\.6b|1\.7b|8b|14b|32b)"
    rf"|(?:0\.6b|1\.7b|4b|8b|14b|32b|30b-a3b|235b-a22b)-{_QUANTISED})"
)
_ON_HUGGING_FACE = re.compile(
    r"qwen3-[0-9]+(?:\.[0-9]+)?b(?:-a[0-9]+b)?(?:-128k)?(?:-unsloth)?(?:-gguf)?"
    rf":(?:latest|(?:ud-)?{_QUANTISED})"
)


def has_optional_thinking(model: str) -> bool:
    """Whether a model of this name thinks at length unless it is told not to, and can be told so.

    A build that always thinks writes its thoughts into the answer when thinking is switched off: see
    https://ollama.com/library/qwen3/tags and https://github.com/ollama/ollama/issues/12917.
    """
    name = model_key(model).rpartition("/")[2]
    return (_IN_LIBRARY.fullmatch(name) or _ON_HUGGING_FACE.fullmatch(name)) is not None


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, deeply; where both say something that is no mapping, `above` wins."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


_NO_RULES: Mapping[str, tuple[str, ...]] = MappingProxyType({})


def role_contradictions(
    roles: Mapping[str, Role],
    gpu_of: Mapping[str, bool | None],
    slots_of: Mapping[str, int | None],
    deny_of: Mapping[str, tuple[str, ...]] = _NO_RULES,
) -> Iterator[tuple[str, str, str]]:
    """Yield problems, as (role, field, message).

    Args:
        roles: all roles.
        gpu_of: for every instance whether it runs on a GPU, None where that is not declared.
        slots_of: the slots of instances; None or no entry: without a limit.
        deny_of: the `deny_models` of instances. What is denied by its size is not known before it is there.
    """
    for role in roles.values():
        yield from _instance_contradictions(role, gpu_of)
        yield from _denied(role, deny_of)
        if role.mode == "async" and role.kind is RequestKind.TRANSCRIBE:
            yield role.name, "mode", "runs take no transcriptions; expected sync"
        if role.target is not None and role.target not in gpu_of:
            yield role.name, "target", f"{role.target!r} is no instance; expected {', '.join(gpu_of)} or auto"
        elif role.policy is Policy.CPU_ONLY and role.target is not None and gpu_of[role.target] is not False:
            cpus = ", ".join(name for name, gpu in gpu_of.items() if gpu is False) or "auto"
            message = f"{role.target!r} does not run on the CPU only, which policy cpu_only asks for; "
            yield role.name, "target", f"{message}expected {cpus}"
        for name in role.fallbacks:
            other = roles.get(name)
            if other is role:
                yield role.name, "fallbacks", "a role cannot fall back to itself; expected other roles"
            elif other is None:
                yield role.name, "fallbacks", f"{name!r} is no role; expected {', '.join(roles)}"
            elif other.kind is not role.kind:
                message = f"{name!r} does {other.kind}, and {role.name!r} {role.kind}"
                yield role.name, "fallbacks", f"{message}; expected a role of the same kind"
            elif role.kind is RequestKind.EMBED and _differ(role.model, other.model):
                message = f"{name!r} embeds with another model, whose vectors cannot be compared"
                yield role.name, "fallbacks", f"{message}; expected a role with the same model"

    yield from _reservation_contradictions(roles, slots_of)


def _instance_contradictions(role: Role, gpu_of: Mapping[str, bool | None]) -> Iterator[tuple[str, str, str]]:
    """Yield the problems of `instances` and `keep_warm`."""
    for field_, named in (("instances", role.instances or ()), ("keep_warm", role.keep_warm)):
        for name in named:
            if name not in gpu_of:
                yield role.name, field_, f"{name!r} is no instance; expected {', '.join(gpu_of)}"
    if role.instances is None:
        return
    allowed = ", ".join(role.instances)
    if role.target is not None and role.target not in role.instances:
        yield role.name, "target", f"{role.target!r} is none of its instances; expected {allowed} or auto"
    for name in role.keep_warm:
        if name not in role.instances:
            yield role.name, "keep_warm", f"{name!r} is none of its instances; expected {allowed}"


def _denied(role: Role, deny_of: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, str, str]]:
    """Yield the problems of models that are to be kept where their names are denied."""
    for name in role.keep_warm:
        rule = denying(deny_of.get(name, ()), model_key(role.model)) if role.model is not None else ""
        if rule:
            message = f"{name} must not run {role.model!r} (deny_models {rule})"
            yield role.name, "keep_warm", f"{message}; expected another instance, or another model"


def _reservation_contradictions(
    roles: Mapping[str, Role], slots_of: Mapping[str, int | None]
) -> Iterator[tuple[str, str, str]]:
    """Yield the problems of `reserved`: no instances, instances without slots, more than there are."""
    reserved: dict[str, int] = {}
    for role in roles.values():
        if not role.reserved:
            continue
        if role.instances is None:
            message = f"{role.reserved} slots on no instance; name them in `instances` of the role"
            yield role.name, "reserved", message
        for name in role.instances or ():
            slots = slots_of.get(name)
            reserved[name] = total = reserved.get(name, 0) + role.reserved
            if slots is None:
                yield role.name, "reserved", f"{name} has no slots; set instances.{name}.slots first"
            elif total > slots:
                message = f"{total} slots of {name} are reserved by roles together, and it has {slots}"
                yield role.name, "reserved", f"{message}; expected at most {slots - total + role.reserved}"


def _differ(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and model_key(one) != model_key(other)


def _first(*values: bool | None) -> bool | None:
    return next((value for value in values if value is not None), None)
