"""The decision where a request may go, in which order, and why: one pure function."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeAlias

from manager.domain.instance import DeviceKind
from manager.domain.models import INVALID_NAME, is_possible, model_key, split_pin
from manager.domain.overload import behind_others
from manager.domain.paid import Wish, verdicts
from manager.domain.roles import USUAL_KINDS, Policy, RequestKind, Strategy
from manager.domain.wording import listed, model_not_found
from manager.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from manager.domain.denial import Denials
    from manager.domain.keys import Permit
    from manager.domain.overload import Order, Overloaded, Overloads
    from manager.domain.paid import Offer, Verdict
    from manager.domain.roles import Role, RoutingSettings

# The role whose model every embedding request of that name obeys: vectors of two places must be comparable.
_EMBEDDING = "embedding"


class State(StrEnum):
    READY = "ready"
    STARTABLE = "startable"
    OUT = "out"


# Looked up once for every candidate.
_STARTABLE = State.STARTABLE
_CPU = DeviceKind.CPU
_NOTHING_MOVED: Mapping[str, Order] = {}
_GPU = DeviceKind.GPU
_UNAVAILABLE = Reason.INSTANCE_UNAVAILABLE
_WARM_FIRST = Strategy.WARM_FIRST
# The tier of an instance that has to be started.
_TO_START = 2


@dataclass(frozen=True, slots=True)
class Candidate:
    """One instance as routing sees it.

    `device` is None for an external instance that does not say. `models` maps the key of each model it has to
    its name, None while its list was never read; `loaded` are keys. `why_out` is set exactly for `State.OUT`,
    and `detail` adds to it in words. `serves` are the kinds of requests that it is there for. `overloads` is
    None where it is not overloaded. `denials` say which models it must not run, None where it may run any.
    One that is `paid` is used as a last resort only, for what its `offers` stand in for; it has no `models`.
    `pulls` is whether its server can be asked to pull a model.
    """

    id: str
    device: DeviceKind | None
    state: State
    priority: int = 0
    models: Mapping[str, str] | None = None
    loaded: frozenset[str] = frozenset()
    why_out: Reason | None = None
    serves: frozenset[RequestKind] = USUAL_KINDS
    detail: str = ""
    overloads: Overloads | None = None
    denials: Denials | None = None
    paid: bool = False
    offers: tuple[Offer, ...] = ()
    pulls: bool = True


@dataclass(frozen=True)
class Snapshot:
    """All instances at one moment, in the configured order."""

    candidates: tuple[Candidate, ...]

    def having(self, key: str) -> tuple[Candidate, ...]:
        return tuple([one for one in self.candidates if one.models is not None and key in one.models])

    def get(self, instance: str) -> Candidate | None:
        return self._by_id.get(instance)

    def unread(self) -> tuple[Candidate, ...]:
        return self._unread

    def out_of_reach(self) -> tuple[Candidate, ...]:
        """Return the instances whose lists were never read and cannot be read now.

        They keep an unknown name from being looked up, but do not make it likely. An engine that is away is
        no such case: it comes back by itself, and the lists of its volumes with it.
        """
        return tuple(
            one
            for one in self._unread
            if one.state is State.OUT and one.why_out is not Reason.ENGINE_UNAVAILABLE
        )

    def lacks(self, key: str) -> bool:
        """Whether a list was read, none has the model, and the others cannot be read now."""
        unread = self._unread
        return (
            len(unread) < len(self.candidates)
            and len(unread) == len(self.out_of_reach())
            and not self.having(key)
        )

    def names(self) -> list[str]:
        """The name of every model there is, each once."""
        return self._names

    def serving(self, kind: RequestKind) -> Snapshot:
        """The instances that serve such requests."""
        found = self._serving.get(kind)
        if found is None:
            able = tuple([one for one in self.candidates if kind in one.serves])
            found = self._serving[kind] = self if len(able) == len(self.candidates) else Snapshot(able)
        return found

    @property
    def local(self) -> Snapshot:
        """The instances that cost nothing."""
        return self._local if self.paid else self

    # Worked out when they are first asked for: most snapshots are replaced before.

    @cached_property
    def paid(self) -> tuple[Candidate, ...]:
        """The instances that cost money."""
        return tuple([one for one in self.candidates if one.paid])

    @cached_property
    def _local(self) -> Snapshot:
        return Snapshot(tuple([one for one in self.candidates if not one.paid]))

    @cached_property
    def _serving(self) -> dict[RequestKind, Snapshot]:
        return {}

    @cached_property
    def _by_id(self) -> dict[str, Candidate]:
        return {candidate.id: candidate for candidate in self.candidates}

    @cached_property
    def _unread(self) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if candidate.models is None)

    @cached_property
    def _names(self) -> list[str]:
        named = (candidate.models or {} for candidate in self.candidates)
        return sorted({key: name for models in named for key, name in models.items()}.values())


def not_asked(candidates: tuple[Candidate, ...]) -> str:
    """Return the end of a message about an unknown model: `; could not be asked: nas (…)`."""
    whys = [f"{one.id} ({one.why_out})" for one in candidates]
    return f"; could not be asked: {listed(whys)}" if whys else ""


def missing_models(settings: RoutingSettings, snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """Yield each role whose model no instance is known to have, and a sentence about that."""
    unread = ", ".join(candidate.id for candidate in snapshot.unread())
    for role in settings.roles.values():
        if role.model is None or snapshot.having(model_key(role.model)):
            continue
        if settings.auto_pull:
            then = "the first request pulls it"
        elif unread:
            then = f"the models of {unread} are not known yet"
        else:
            then = "requests for the role get 404 until it is pulled"
        yield role.name, f"no instance is known to have the model {role.model!r}: {then}"


class RequestFacts(NamedTuple):
    """The wishes of a request about where it should go.

    `instance` is a pin given beside the model's name, `lane` the name of a role. `permit` is that of the
    client's key, None where it may go anywhere. `local_only` forbids paid servers.
    """

    model: str
    kind: RequestKind
    instance: str | None = None
    lane: str | None = None
    permit: Permit | None = None
    local_only: bool = False


Because: TypeAlias = Literal["loaded", "running", "startable", "unread", "pull", "paid"]
What: TypeAlias = Literal[
    "unknown",
    "unknown_lane",
    "impossible",
    "unavailable",
    "contradiction",
    "denied",
    "local_only",
    "forbidden",
]


class Load(Protocol):
    """Requests in flight by instance, or what instances are compared by in their place."""

    def __getitem__(self, instance: str, /) -> float: ...


class Attempt(NamedTuple):
    """One way to answer.

    Attributes:
        fallback: why it is not what was preferred; None when it is.
        timeout_s: for the first byte; None: that of the gateway.
        choice: attempts of the same number stand in for each other where one merely has no free slot.
    """

    instance: str
    model: str
    role: str | None
    because: Because
    fallback: Reason | None = None
    timeout_s: float | None = None
    choice: int = 0


class Group(NamedTuple):
    """Attempts that are equal but for the load of their instances; the rest is as in `Attempt`."""

    instances: tuple[str, ...]
    model: str
    role: str | None
    because: Because
    fallback: Reason | None = None
    timeout_s: float | None = None
    choice: int = 0

    def attempt(self, instance: str) -> Attempt:
        return Attempt(instance, *self[1:])


# The groups that a strategy orders together, in the order that counts where the strategy sees no difference.
Band: TypeAlias = tuple[Group, ...]
# The values that the instances of a band are compared by, lowest first; given the requests in flight.
Ranks: TypeAlias = "Callable[[Band, Load], Load]"


# A tuple: a decision has many of them, and a frozen dataclass takes three times as long to make.
class PassedOver(NamedTuple):
    """An instance that a request does not go to; `detail` adds to the reason in words."""

    instance: str
    model: str
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """The lack of an attempt. `what` tells an unknown name from an impossible one, or one out of reach."""

    what: What
    reason: Reason
    message: str


@dataclass(frozen=True)
class Decision:
    """The groups of instances that one request may go to, the first one first.

    Every instance that has the model, or may have it, is in an attempt or was passed over, never both and
    never twice for one model. Only an overloaded one may be both: it is attempted after the others. `refused`
    is set exactly when there is no attempt. `is_async` is whether the role takes runs only, no requests that
    wait for their answer. `by_place` is whether the role orders its instances: each is a group of its own.
    `bands` has the groups in the same order; it is empty where every role takes its instances warm first.
    """

    request: RequestFacts
    role: str | None
    policy: Policy
    requested_target: str | None
    groups: tuple[Group, ...]
    passed_over: tuple[PassedOver, ...]
    refused: Refused | None = None
    is_async: bool = False
    by_place: bool = False
    bands: tuple[Band, ...] = ()

    @cached_property
    def has_equals(self) -> bool:
        """Return whether another instance could answer as well as the first one."""
        first, *others = self.groups
        count = sum(len(group.instances) for group in self.bands[0]) if self.bands else len(first.instances)
        return count > 1 or bool(self.by_place and others and others[0].choice == first.choice)

    def leaning(self, instance: str, load: Load) -> Attempt | None:
        """Return the attempt on an instance that is to go before the ones that a role prefers by its order.

        None where it is none of them, does not have the model in memory, is overloaded, or has a higher load.
        """
        first = self.groups[0]
        if not self.by_place or instance in first.instances:
            return None
        for group in self.groups:
            if group.choice != first.choice:
                return None
            if instance in group.instances and group.model == first.model:
                is_free = load[instance] <= min(map(load.__getitem__, first.instances))
                if group.because != "loaded" or not is_free or self._is_overloaded(instance):
                    return None
                return group.attempt(instance)._replace(fallback=first.fallback)
        return None

    def _is_overloaded(self, instance: str) -> bool:
        return any(one.instance == instance and one.reason is Reason.OVERLOADED for one in self.passed_over)

    def first(self, load: Load, ranks: Ranks | None = None) -> Attempt | None:
        """Return the first attempt of `in_order`; None where there is none."""
        if self.bands:
            return next(self.in_order(load, ranks))
        if not self.groups:
            return None
        group = self.groups[0]
        instances = group.instances
        return group.attempt(instances[0] if len(instances) == 1 else min(instances, key=load.__getitem__))

    def in_order(self, load: Load, ranks: Ranks | None = None) -> Iterator[Attempt]:
        """The attempts in order; of a group always the one whose instance has the fewest requests in flight.

        Args:
            load: requests in flight by instance, looked at each time the next attempt is asked for.
            ranks: compares the instances of a band; None compares them by `load`.
        """
        for band in self.bands:
            yield from _ranked(band, load if ranks is None else ranks(band, load))
        if self.bands:
            return
        for group in self.groups:
            waiting = list(group.instances)
            while len(waiting) > 1:
                best = min(waiting, key=load.__getitem__)
                waiting.remove(best)
                yield group.attempt(best)
            yield group.attempt(waiting[0])


def _ranked(band: Band, ranks: Load) -> Iterator[Attempt]:
    """Yield the attempts of a band, always the one whose instance has the lowest rank at that moment."""
    waiting = [group.attempt(instance) for group in band for instance in group.instances]
    while waiting:
        best = min(waiting, key=lambda attempt: ranks[attempt.instance])
        waiting.remove(best)
        yield best


def decide(request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot) -> Decision:
    """Return where `request` may go.

    A name means, in this order: a pin (`NAME@INSTANCE`), a role that has a model, a model that an instance
    has, a role that could not be meant otherwise. Instances with the model loaded come first, then running
    ones, then those that can be started, each by priority; the last are those with an unread list of models.
    The policy of a role filters before its target counts, and filters its fallbacks as well. A target is
    held, unless the role merely prefers GPUs; a pin always. A role with another strategy than `warm_first`
    has its instances in bands, which are ordered when a request is routed: those that run, then the others.

    A permit filters last, and nothing widens it: the role or lane that is asked for must be permitted, and so
    must the instance, the model and the role of each attempt. A model may be named itself where the permit
    has no roles, where its models include it, or where it is that of a permitted role which it obeys anyway.
    """
    name, pin = split_pin(request.model)
    pin, permit = pin or request.instance, request.permit
    lane = settings.role(request.lane) if request.lane else None
    refused = _unknown(request, settings, snapshot, lane, pin)
    if refused is not None:
        return _refusal(request, None, pin, refused)
    able = snapshot.serving(request.kind)
    local = able.local
    if (snapshot.candidates and not able.candidates) or (pin is not None and able.get(pin) is None):
        who = f"{pin} does not" if pin else "no instance does"
        message = f"this request wants to {request.kind}, and {who}; one that does says so in its `serves`"
        return _refusal(request, None, pin, Refused("contradiction", Reason.POLICY, message))
    role = settings.role_meant(name, is_model=lambda key: bool(local.having(key)))
    is_bare = role is None
    limit = _limit_of_request(permit, pin, role or lane)
    if limit:
        return _refusal(request, role or lane, pin, Refused("forbidden", Reason.POLICY, limit))
    if role is not None:
        if role.kind is not request.kind:
            message = f"the role {role.name!r} does {role.kind}, and this request wants to {request.kind}"
            return _refusal(request, role, pin, Refused("contradiction", Reason.POLICY, message))
        legs = list(_legs(role, settings))
        if not legs:
            message = f"the role {role.name!r} has no model; set one under roles.{role.name}.model"
            decision = _refusal(request, role, pin, Refused("unknown", Reason.MODEL_MISSING, message))
            return _with_paid(decision, (), role, settings, able, "") if able.paid else decision
    else:
        # A lane adds its rules, not its fallbacks: those have models of their own. Those of the role
        # `embedding` have the same one.
        role, legs = lane, [_Leg(name, lane)]
        embedding = _embedding_role(name, request.kind, settings)
        if lane is None and embedding is not None:
            role, legs = embedding, [_Leg(name, leg.role) for leg in _legs(embedding, settings)]
    legs = _within(permit, legs, is_bare=is_bare)
    decision = _Decider(request, settings, local, role, pin, everybody=snapshot.local).over(legs)
    models = tuple(leg.model for leg in legs if not leg.limit)
    limit = legs[0].limit if is_bare else ""
    return _with_paid(decision, models, role, settings, able, limit) if able.paid else decision


def _with_paid(  # noqa: PLR0917  (the parts of a decision)
    decision: Decision,
    models: tuple[str, ...],
    role: Role | None,
    settings: RoutingSettings,
    able: Snapshot,
    limit_of_name: str,
) -> Decision:
    """Return a decision with the paid servers: as the last attempts, or passed over, each with why.

    `limit_of_name` is that of the key that the model named is beyond, empty for none.
    """
    request, groups, refused = decision.request, decision.groups, decision.refused
    named, pin = split_pin(request.model)
    wish = Wish(named, models, role, request.kind, pin or request.instance, request.local_only)
    found, limit = _within_key(tuple(verdicts(wish, settings, able.paid)), request.permit, limit_of_name)
    # The failure of the first local attempt is reported, if there is one.
    why: Reason | None = _UNAVAILABLE if refused is None else refused.reason
    if wish.pin is not None:
        why = None  # it is what the request asks for
    timeout_s = role.timeout_s(len(role.instances or ())) if role is not None else None
    choice = max((group.choice for group in groups), default=-1) + 1
    paid = tuple(
        Group((one.instance,), one.model, role.name if role else None, "paid", why, timeout_s, choice + place)
        for place, one in enumerate(one for one in found if one.reason is None)
    )
    passed = (
        PassedOver(one.instance, one.model, one.reason, one.detail) for one in found if one.reason is not None
    )
    if paid:
        refused = None
    elif refused is not None:
        refused = next(filter(None, (_paid_refusal(one, refused, wish.pin) for one in found)), refused)
        if limit and refused.what != "unavailable":
            refused = Refused("forbidden", Reason.POLICY, limit)
    return replace(
        decision,
        groups=groups + paid,
        passed_over=(*decision.passed_over, *passed),
        refused=refused,
        bands=decision.bands and (*decision.bands, *((group,) for group in paid)),
    )


def _within_key(
    found: tuple[Verdict, ...], permit: Permit | None, limit_of_name: str
) -> tuple[tuple[Verdict, ...], str]:
    """Bar the paid servers that a key does not permit.

    Returns:
        The verdicts, and the limit that keeps a server from answering that the client has to hear of.
    """
    if permit is None:
        return found, ""
    within, told = [], ""
    for one in found:
        limit = limit_of_name or permit.limit_of_instance(one.instance)
        limit = limit or permit.limit_of_model(model_key(one.model))
        if limit and one.is_meant:
            told = told or limit
        within.append(one._replace(reason=Reason.POLICY, detail=limit, is_meant=False) if limit else one)
    return tuple(within), told


def _paid_refusal(verdict: Verdict, local: Refused, pin: str | None) -> Refused | None:
    """Return the refusal of a request that only a paid server could answer; None where that is not it."""
    reason = verdict.reason
    if reason is None or not verdict.is_meant or (local.what == "unavailable" and pin is None):
        return None
    if reason in (Reason.POLICY, Reason.LOCAL_ONLY):
        message = f"{verdict.model!r} on {verdict.instance} costs money and may not answer: {verdict.detail}"
        return Refused("local_only", reason, message)
    message = f"{verdict.instance} has {verdict.model!r} and cannot be used now ({reason}"
    return Refused(
        "unavailable", reason, f"{message}; {verdict.detail})" if verdict.detail else f"{message})"
    )


def _no_lane(request: RequestFacts, lane: Role | None, settings: RoutingSettings) -> str:
    """Return the message about a lane that is no role, or one of another kind."""
    names = _names_of_roles(settings, request.permit)
    if lane is None:
        return f"there is no lane '{request.lane}'; lanes: {listed(names)}"
    able = [name for name in names if settings.roles[name].kind is request.kind]
    wants = f"this request wants to {request.kind}; lanes for that: {listed(able)}"
    return f"X-Lane: the lane {lane.name!r} does {lane.kind}, and {wants}"


def _unknown(
    request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot, lane: Role | None, pin: str | None
) -> Refused | None:
    """Refuse a lane or a pin that does not exist, and a lane of another kind."""
    if request.lane and (lane is None or lane.kind is not request.kind):
        return Refused("unknown_lane", Reason.POLICY, _no_lane(request, lane, settings))
    if pin is not None and snapshot.get(pin) is None:
        there_is = _listed(snapshot.candidates, request.permit)
        message = f"there is no instance {pin!r}; there is: {there_is}"
        return Refused("unknown", Reason.INSTANCE_UNAVAILABLE, message)
    return None


def _limit_of_request(permit: Permit | None, pin: str | None, asked: Role | None) -> str:
    """Return the limit of the key that a pin, or the role or lane asked for, is beyond; empty for none."""
    if permit is None:
        return ""
    limit = "" if pin is None else permit.limit_of_instance(pin)
    return limit or ("" if asked is None else permit.limit_of_role(asked.name))


def _within(permit: Permit | None, legs: list[_Leg], *, is_bare: bool) -> list[_Leg]:
    """Return the legs, each with the limit of the key that it is beyond."""
    if permit is None:
        return legs
    return [replace(leg, limit=_limit_of_leg(permit, leg, is_bare=is_bare)) for leg in legs]


def _limit_of_leg(permit: Permit, leg: _Leg, *, is_bare: bool) -> str:
    """Return the limit of the key that a leg is beyond; empty where it is permitted.

    Args:
        permit: of the key.
        leg: one way to answer.
        is_bare: the request names a model, and no role.
    """
    role, key = leg.role, model_key(leg.model)
    limit = permit.limit_of_model(key)
    of_role = "" if role is None else permit.limit_of_role(role.name)
    if limit or not is_bare:
        return limit or of_role
    is_of_role = role is not None and role.model is not None and model_key(role.model) == key
    return "" if is_of_role and not of_role else permit.limit_of_bare_model(leg.model)


def _names_of_roles(settings: RoutingSettings, permit: Permit | None) -> list[str]:
    """Return the roles that a client may see."""
    return [name for name in settings.roles if permit is None or not permit.limit_of_role(name)]


def _embedding_role(name: str, kind: RequestKind, settings: RoutingSettings) -> Role | None:
    """The role `embedding`, if the request names its model; it then obeys that role."""
    role = settings.roles.get(_EMBEDDING) if kind is RequestKind.EMBED else None
    if role is None or role.model is None or role.kind is not kind:
        return None
    return role if model_key(role.model) == model_key(name) else None


@dataclass(frozen=True, slots=True)
class _Leg:
    """One model under the rules of one role; `limit` is that of the key that it is beyond, empty for none."""

    model: str
    role: Role | None
    limit: str = ""

    def held(self, pin: str | None) -> str | None:
        """The only instance that may be used, None when there may be others."""
        if pin is not None or self.role is None or self.role.policy is Policy.PREFER_GPU:
            return pin
        return self.role.target


def _legs(role: Role, settings: RoutingSettings) -> Iterator[_Leg]:
    """The models of the role, then those of the roles it falls back to, each role once."""
    own = None if role.model is None else model_key(role.model)
    for current in settings.chain(role):
        # Vectors of two models cannot be compared: an embedding role may change its place, not its model.
        for model in settings.models_of(current):
            if role.kind is not RequestKind.EMBED or model_key(model) == own:
                yield _Leg(model, current)


# By stage and tier: a model that is there goes before one that may be there, and that before one to pull.
_WAYS: tuple[tuple[Because, ...], ...] = (
    ("loaded", "running", "startable"),
    ("unread", "unread", "unread"),
    ("pull", "pull", "pull"),
)
_ANYBODY: Mapping[DeviceKind | None, int | None] = {_GPU: 0, _CPU: 0, None: 0}
_NOBODY: Mapping[DeviceKind | None, int | None] = {_GPU: None, _CPU: None, None: None}
_GPUS_FIRST: Mapping[DeviceKind | None, int | None] = {_GPU: 0, _CPU: 1, None: 1}
_GPUS_SECOND: Mapping[DeviceKind | None, int | None] = {_GPU: 1, _CPU: 2, None: 2}


class _Decider:
    """Goes over the legs of one decision."""

    _bands: list[Band] | None = None  # where a leg has a strategy

    def __init__(
        self,
        request: RequestFacts,
        settings: RoutingSettings,
        snapshot: Snapshot,
        role: Role | None,
        pin: str | None,
        *,
        everybody: Snapshot,
    ) -> None:
        self._everybody = everybody
        self._request = request
        self._settings = settings
        self._snapshot = snapshot
        self._role = role
        self._pin = pin
        self._cpu_only = role is not None and role.policy is Policy.CPU_ONLY
        self._tried: defaultdict[str, set[str]] = defaultdict(set)
        self._passed_over: list[PassedOver] = []
        self._groups: list[Group] = []
        self._numbers: dict[str | None, int] = {}  # of roles: the models of one stand in for each other
        self._forbidden = ""  # the first limit of the key that has barred something

    def over(self, legs: list[_Leg]) -> Decision:
        preferred = legs[0]
        first, *others = legs = self._overloaded_last(legs)
        for leg in legs:
            if leg.role is not None and leg.role.strategy is not _WARM_FIRST:
                self._bands = []
        why = None if first.role is self._role else Reason.MODEL_MISSING  # the role has no model of its own
        if first is not preferred:
            why = Reason.OVERLOADED
        self._add(first, why)
        if others:
            # What is preferred is there and goes first, or this says why it is not.
            why = why or (Reason.INSTANCE_UNAVAILABLE if self._groups else self._why_none(first).reason)
            for leg in others:
                self._add(leg, why)
        role = self._role
        if self._bands is not None:
            self._groups = [group for band in self._bands for group in band]
        return Decision(
            request=self._request,
            role=role.name if role else None,
            policy=role.policy if role else Policy.AUTO,
            requested_target=self._pin or (role.target if role else None),
            groups=tuple(self._groups),
            passed_over=tuple(self._once_each() if others else self._passed_over),
            refused=None if self._groups else self._why_none(first),
            is_async=role is not None and role.mode == "async",
            by_place=_is_by_place(first.role),
            bands=tuple(self._bands or ()),
        )

    def _overloaded_last(self, legs: list[_Leg]) -> list[_Leg]:
        """Put models of the role that are slow wherever they run behind its other ones."""
        own = [leg for leg in legs if leg.role is self._role]
        if len(own) == 1:
            return legs
        busy = [leg for leg in own if self._is_overloaded(leg)]
        if not busy or len(busy) == len(own):
            return legs
        return [leg for leg in own if leg not in busy] + busy + [leg for leg in legs if leg not in own]

    def _is_overloaded(self, leg: _Leg) -> bool:
        key = model_key(leg.model)
        ready = [one for one in self._snapshot.having(key) if one.state is State.READY]
        return bool(ready) and all(one.overloads is not None and one.overloads.of(key) for one in ready)

    def _add(self, leg: _Leg, fallback: Reason | None) -> None:
        """The attempts of one leg; `fallback` is why it is not the preferred one."""
        model, key, role = leg.model, model_key(leg.model), leg.role
        name = role.name if role else None
        found, busy, preferred_out = self._usable(leg, key)
        places = _listed_places(role) if role is not None and role.attempt_timeouts_s else None
        in_order, moved = sorted(found.items()), _NOTHING_MOVED
        if busy:
            in_order, moved = behind_others(in_order, busy)
            self._passed_over += (PassedOver(id_, model, Reason.OVERLOADED, busy[id_].why) for id_ in moved)
            if any(order[1] == order[2] == 0 for order in moved.values()):
                preferred_out = preferred_out or Reason.OVERLOADED
        if places is not None and _strategy(role) is not _WARM_FIRST:
            in_order = [(order, [id_]) for order, ids in in_order for id_ in ids]  # each has its own time-out
        preferred_there = any(order[:3] == (0, 0, 0) and ids[0] not in moved for order, ids in in_order)
        number = self._numbers.setdefault(name, len(self._numbers))
        for (stage, rank, place, tier, _), ids in in_order:
            reason = fallback
            if reason is None and (rank or place):
                reason = self._why_not_preferred(leg, preferred_out, is_there=preferred_there)
            timeout_s = None
            if role is not None and role.attempt_timeouts_s:
                timeout_s = role.timeout_s(0 if places is None else places[ids[0]])
            choice = (number * len(_WAYS) + rank) * len(_WAYS) + stage
            self._groups.append(Group(tuple(ids), model, name, _WAYS[stage][tier], reason, timeout_s, choice))
            self._tried[key].update(ids)
        if self._bands is not None:
            added = self._groups[len(self._groups) - len(in_order) :]
            orders = [order for order, _ in in_order]
            self._bands += _bands(role, list(zip(orders, added, strict=True)), moved)

    def _usable(
        self, leg: _Leg, key: str
    ) -> tuple[dict[Order, list[str]], dict[str, Overloaded], Reason | None]:
        """Pass over what cannot be used for a leg.

        Returns:
            The other instances by their order, those of them that are overloaded, and why a preferred one
            cannot be used.
        """
        model, tried, permit = leg.model, self._tried[key], self._request.permit
        chosen, rank_of, cpu_only = self._ranking(leg)
        places = _places(leg.role, first=chosen)
        found: dict[Order, list[str]] = {}
        busy: dict[str, Overloaded] = {}
        preferred_out: Reason | None = None
        for stage, candidates in enumerate(self._found(key, places)):
            for candidate in candidates:
                id_, device, why, detail = candidate.id, candidate.device, candidate.why_out, candidate.detail
                rank = 0 if id_ == chosen else rank_of[device]
                place = 0 if places is None else places.get(id_, -1)
                if rank is None or place < 0 or (cpu_only and device is not _CPU):
                    detail = "" if place >= 0 else "not among the instances of the role"
                    self._passed_over.append(PassedOver(id_, model, Reason.POLICY, detail))
                    continue
                if permit is not None or candidate.denials is not None:
                    why, detail = self._bar(candidate, leg, key)
                if why is not None:
                    self._passed_over.append(PassedOver(id_, model, why, detail))
                    if rank == place == 0:
                        preferred_out = preferred_out or why
                elif id_ not in tried:
                    tier = _TO_START if candidate.state is _STARTABLE else 0 if key in candidate.loaded else 1
                    order = (stage, rank, place, tier, -candidate.priority)
                    if candidate.overloads is not None and (one := candidate.overloads.of(key)) is not None:
                        busy[id_] = one
                    group = found.get(order)
                    if group is None:
                        found[order] = [id_]
                    else:
                        group.append(id_)
        return found, busy, preferred_out

    def _bar(self, candidate: Candidate, leg: _Leg, key: str) -> tuple[Reason | None, str]:
        """Return why a candidate cannot be used where keys or deny rules are to be obeyed."""
        permit, denials = self._request.permit, candidate.denials
        if permit is not None and (limit := leg.limit or permit.limit_of_instance(candidate.id)):
            self._forbidden = self._forbidden or limit
            return Reason.POLICY, limit
        if denials is not None and (rule := denials.rule(key)):
            return Reason.HOST_DENIED, rule
        return candidate.why_out, candidate.detail

    def _found(self, key: str, places: Mapping[str, int] | None) -> tuple[tuple[Candidate, ...], ...]:
        """Instances that have the model, those that may have it, and those that may pull it."""
        having, unread = self._snapshot.having(key), self._snapshot.unread()
        usable = _visible(having, self._request.permit)
        if not self._settings.auto_pull or any(places is None or one.id in places for one in usable):
            return having, unread
        without = [
            one
            for one in self._snapshot.candidates
            if one.models is not None and one.pulls and one not in having
        ]
        return having, unread, tuple(without)

    def _ranking(self, leg: _Leg) -> tuple[str | None, Mapping[DeviceKind | None, int | None], bool]:
        """The preferred instances, the ranks of the others by device, and whether only the CPU is permitted.

        0 is what is preferred, more what is permitted after it, None what is not permitted.
        """
        target = leg.role.target if leg.role else None
        held = leg.held(self._pin)
        if held is not None:
            return held, _NOBODY, self._is_cpu_only(leg)
        if leg.role is None or leg.role.policy is not Policy.PREFER_GPU:
            return None, _ANYBODY, self._is_cpu_only(leg)
        return target, _GPUS_FIRST if target is None else _GPUS_SECOND, self._is_cpu_only(leg)

    def _is_cpu_only(self, leg: _Leg) -> bool:
        return self._cpu_only or (leg.role is not None and leg.role.policy is Policy.CPU_ONLY)

    def _once_each(self) -> Iterator[PassedOver]:
        """The instances that are not attempted under another role, each with the reason that says most."""
        found: dict[tuple[str, str], PassedOver] = {}
        for one in self._passed_over:
            place = one.instance, model_key(one.model)
            if place not in found or found[place].reason is Reason.POLICY:
                found[place] = one
        return (
            one
            for (instance, key), one in found.items()
            if one.reason is Reason.OVERLOADED or instance not in self._tried[key]
        )

    def _why_not_preferred(self, leg: _Leg, out: Reason | None, *, is_there: bool) -> Reason:
        """The reason why no GPU, or not the one that is the target, answers."""
        if is_there:
            return Reason.INSTANCE_UNAVAILABLE  # when it comes to this attempt
        if out is not None:
            return out
        target = leg.role.target if leg.role else None
        if target is not None:
            known = self._snapshot.get(target) is not None
            return Reason.MODEL_MISSING if known else Reason.INSTANCE_UNAVAILABLE
        gpus = any(candidate.device is _GPU for candidate in self._snapshot.candidates)
        return Reason.MODEL_MISSING if gpus else Reason.GPU_MISSING

    def _why_none(self, leg: _Leg) -> Refused:
        """The reason why there is no attempt, told by the leg that is preferred."""
        outs = [one for one in self._passed_over if one.reason is not Reason.POLICY]
        if outs and not self._is_unknown(leg):
            if all(one.reason is Reason.HOST_DENIED for one in outs):
                return Refused("denied", Reason.HOST_DENIED, denied_message(outs))
            outs = [one for one in outs if one.reason is not Reason.HOST_DENIED]
            target = leg.role.target if leg.role else None
            return self._unavailable(next((one for one in outs if one.instance == target), outs[0]))
        if self._forbidden or leg.limit:
            return Refused("forbidden", Reason.POLICY, leg.limit or self._forbidden)
        having = self._snapshot.having(model_key(leg.model))
        held = leg.held(self._pin)
        place = self._snapshot.get(held) if held is not None else None
        if held is not None and self._everybody.get(held) is not place:
            message = f"{held!r}, which the role's target is, does not {self._request.kind}"
            return Refused("contradiction", Reason.POLICY, message)
        if held is not None and place is None:
            there_is = self._listed(self._snapshot.candidates)
            message = f"there is no instance {held!r}, which the role's target is; there is: {there_is}"
            return Refused("unavailable", Reason.INSTANCE_UNAVAILABLE, message)
        return self._barred(leg, having, place)

    def _barred(self, leg: _Leg, having: tuple[Candidate, ...], place: Candidate | None) -> Refused:
        """Refuse what only instances have that the rules do not permit, or no instance at all."""
        places = _places(leg.role)
        barred = having if place is None else (place,)
        if places is not None and barred:
            allowed = tuple(one for one in barred if one.id in places)
            if not allowed:
                return self._outside(leg, places, barred, is_held=place is not None)
            barred = allowed
        if self._is_cpu_only(leg) and barred and all(one.device is not _CPU for one in barred):
            rule = f"policy cpu_only permits none of: {self._listed(barred)}"
            return Refused("contradiction", Reason.POLICY, rule)
        if having:
            elsewhere = self._listed(having)
            message = f"{self._missing(leg.model)}; it is not on {leg.held(self._pin)}, but on: {elsewhere}"
            return Refused("unknown", Reason.MODEL_MISSING, message)
        return self._not_found(leg)

    def _outside(
        self, leg: _Leg, places: Mapping[str, int], barred: tuple[Candidate, ...], *, is_held: bool
    ) -> Refused:
        """Refuse what is only on other instances than the role may use."""
        rule = f"the role may use only: {', '.join(places)}"
        if is_held:
            return Refused("contradiction", Reason.POLICY, f"{self._listed(barred)} is barred: {rule}")
        message = f"{self._missing(leg.model)}; {rule}; it is on: {self._listed(barred)}"
        return Refused("unknown", Reason.MODEL_MISSING, message)

    def _is_unknown(self, leg: _Leg) -> bool:
        """Whether the client gave a name that nothing supports: no list, no role, and no place for it."""
        key = model_key(leg.model)
        of_role = leg.role.model if leg.role is not None else None
        if leg.held(self._pin) is not None or (of_role is not None and model_key(of_role) == key):
            return False
        return self._snapshot.lacks(key) and not self._settings.auto_pull

    def _unavailable(self, one: PassedOver) -> Refused:
        place = self._snapshot.get(one.instance)
        models = place.models if place else None
        has = "may have" if models is None else "has" if model_key(one.model) in models else "could pull"
        why = f"{one.reason}; {one.detail}" if one.detail else one.reason
        message = f"{one.instance} {has} {one.model!r} and cannot be used now ({why})"
        return Refused("unavailable", one.reason, message)

    def _not_found(self, leg: _Leg) -> Refused:
        if not is_possible(leg.model):
            return Refused("impossible", Reason.MODEL_MISSING, INVALID_NAME)
        role, asked_for = self._role, split_pin(self._request.model)[0]
        stands_for = role is not None and leg.role is role and model_key(asked_for) != model_key(leg.model)
        of_role = f"; it is the model of the role {role.name!r}" if role is not None and stands_for else ""
        permit, roles = self._request.permit, self._settings.roles
        visible = (roles[name] for name in _names_of_roles(self._settings, permit))
        others = [one.name for one in visible if one.model is not None and one is not role]
        also = f"; roles: {listed(others)}" if others else ""
        models = listed(names_of_models(self._snapshot, permit))
        message = f"{self._missing(leg.model)}{of_role}; models: {models}{also}"
        message += not_asked(_visible(self._snapshot.out_of_reach(), permit))
        return Refused("unknown", Reason.MODEL_MISSING, message)

    def _listed(self, candidates: tuple[Candidate, ...]) -> str:
        return _listed(candidates, self._request.permit)

    def _missing(self, model: str) -> str:
        return model_not_found(model, embeds=self._request.kind is RequestKind.EMBED)


def denied_message(denied: Sequence[PassedOver]) -> str:
    """Return the message about a model that no instance which has it, or could have it, is to run."""
    first = denied[0]
    rules = listed([f"{one.instance} ({one.detail})" for one in denied])
    return (
        f"{first.model!r} must not run on: {rules}; "
        f"`ollama-manager lift {first.instance} --for 2h` permits it there for a time"
    )


def _places(role: Role | None, *, first: str | None = None) -> Mapping[str, int] | None:
    """The places of the only instances that a role may use; None where it may use any.

    `first` stands before the others, wherever it is listed: it was named as the one that is preferred. All
    are at the same place where a strategy orders them.
    """
    if role is None or role.instances is None:
        return None
    if role.strategy is not _WARM_FIRST:
        return dict.fromkeys(role.instances, 0)
    return {name: 0 if name == first else place for place, name in enumerate(role.instances)}


def _listed_places(role: Role) -> Mapping[str, int] | None:
    """Return the places at which a role lists its instances, whatever orders them; None without a list."""
    return None if role.instances is None else {name: place for place, name in enumerate(role.instances)}


def _strategy(role: Role | None) -> Strategy:
    return _WARM_FIRST if role is None else role.strategy


def _is_by_place(role: Role | None) -> bool:
    return role is not None and role.instances is not None and role.strategy is _WARM_FIRST


def _bands(
    role: Role | None, placed: list[tuple[Order, Group]], moved: Mapping[str, Order]
) -> Iterator[Band]:
    """Yield the bands of one leg.

    A strategy orders what runs, and after it what has to be started; `stage` and `rank` stay what they are.
    Overloaded instances that others can stand in for come after those others, whatever the strategy.
    """
    if _strategy(role) is _WARM_FIRST:
        yield from ((group,) for _, group in placed)
        return
    found: dict[tuple[int, int, bool, bool], list[Group]] = {}
    place = (0, 0, False)
    for order, group in placed:
        is_moved = group.instances[0] in moved
        if not is_moved:  # an overloaded one stands behind the others of its place, whose order says where
            place = (order[0], order[1], order[3] == _TO_START)
        found.setdefault((*place, is_moved), []).append(group)
    yield from (tuple(found[at]) for at in sorted(found))


def _refusal(request: RequestFacts, role: Role | None, pin: str | None, refused: Refused) -> Decision:
    return Decision(
        request=request,
        role=role.name if role else None,
        policy=role.policy if role else Policy.AUTO,
        requested_target=pin or (role.target if role else None),
        groups=(),
        passed_over=(),
        refused=refused,
    )


def names_of_models(snapshot: Snapshot, permit: Permit | None) -> list[str]:
    """Return the names of the models that a client may see, each once."""
    if permit is None:
        return snapshot.names()
    if permit.roles is not None and permit.models is None:
        return []
    names = Snapshot(_visible(snapshot.candidates, permit)).names()
    return [name for name in names if not permit.limit_of_model(model_key(name))]


def _visible(candidates: tuple[Candidate, ...], permit: Permit | None) -> tuple[Candidate, ...]:
    """Return the instances that a client may see."""
    if permit is None or permit.instances is None:
        return candidates
    return tuple([one for one in candidates if one.id in permit.instances])


def _listed(candidates: tuple[Candidate, ...], permit: Permit | None) -> str:
    return listed([candidate.id for candidate in _visible(candidates, permit)])
