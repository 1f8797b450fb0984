"""Where a request may go, in which order, and why: one pure function."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, TypeAlias

from manager.domain.instance import DeviceKind
from manager.domain.models import model_key
from manager.domain.roles import Policy, RequestKind
from manager.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from manager.domain.roles import Role, RoutingSettings

_PIN = re.compile(r"(?P<model>.+)@(?P<instance>[a-z][a-z0-9-]{0,31})")
# So many names of models fit into an error message that somebody reads.
_MOST_NAMES = 50


class State(StrEnum):
    READY = "ready"
    STARTABLE = "startable"
    OUT = "out"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One instance as routing sees it.

    `device` is None for an external instance that does not say. `models` maps the key of each model it has to
    its name, None while its list was never read; `loaded` are keys. `why_out` is set exactly for `State.OUT`.
    """

    id: str
    device: DeviceKind | None
    state: State
    priority: int = 0
    models: Mapping[str, str] | None = None
    loaded: frozenset[str] = frozenset()
    why_out: Reason | None = None


@dataclass(frozen=True)
class Snapshot:
    """All instances at one moment, in the configured order."""

    candidates: tuple[Candidate, ...]
    _having: dict[str, tuple[Candidate, ...]] = field(init=False, repr=False, compare=False)
    _by_id: dict[str, Candidate] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        having: dict[str, list[Candidate]] = {}
        for candidate in self.candidates:
            for key in candidate.models or ():
                having.setdefault(key, []).append(candidate)
        object.__setattr__(self, "_having", {key: tuple(found) for key, found in having.items()})
        object.__setattr__(self, "_by_id", {candidate.id: candidate for candidate in self.candidates})

    def having(self, key: str) -> tuple[Candidate, ...]:
        return self._having.get(key, ())

    def get(self, instance: str) -> Candidate | None:
        return self._by_id.get(instance)

    def unread(self) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if candidate.models is None)

    def names(self) -> list[str]:
        """The name of every model there is, each once."""
        named = (candidate.models or {} for candidate in self.candidates)
        return sorted({key: name for models in named for key, name in models.items()}.values())


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What a request says about where it should go.

    `instance` is a pin given beside the model's name, `lane` the name of a role.
    """

    model: str
    kind: RequestKind
    instance: str | None = None
    lane: str | None = None


Because: TypeAlias = Literal["loaded", "running", "startable", "unread", "pull"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to answer. `fallback` says why it is not what was preferred; None when it is."""

    instance: str
    model: str
    role: str | None
    because: Because
    fallback: Reason | None = None


@dataclass(frozen=True, slots=True)
class PassedOver:
    instance: str
    model: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Refused:
    """Why there is no attempt. `what` tells an unknown name from one that cannot be had now."""

    what: Literal["unknown", "unavailable", "contradiction"]
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The attempts for one request. Those within a group are equal but for their load.

    `refused` is set exactly when there is no attempt.
    """

    request: RequestFacts
    role: str | None
    policy: Policy
    requested_target: str | None
    groups: tuple[tuple[Attempt, ...], ...]
    passed_over: tuple[PassedOver, ...]
    refused: Refused | None = None

    def in_order(self, load: Mapping[str, int]) -> Iterator[Attempt]:
        """The attempts in order; of a group always the one whose instance has the fewest requests in flight.

        Args:
            load: requests in flight by instance, looked at each time the next attempt is asked for.
        """
        for group in self.groups:
            if len(group) == 1:
                yield group[0]
                continue
            waiting = list(group)
            while waiting:
                best = min(waiting, key=lambda one: load[one.instance])
                waiting.remove(best)
                yield best


def decide(request: RequestFacts, settings: RoutingSettings, snapshot: Snapshot) -> Decision:
    """Where `request` may go.

    Warm instances come first, then running ones, then those that can be started, each by priority; the last
    are those whose models nobody has read yet. The policy of a role filters before its target counts.
    """
    match = _PIN.fullmatch(request.model)
    name = match["model"] if match else request.model
    pin = match["instance"] if match else request.instance
    lane = settings.roles.get(request.lane) if request.lane else None
    if pin is not None and snapshot.get(pin) is None:
        there_is = ", ".join(candidate.id for candidate in snapshot.candidates) or "none"
        message = f"there is no instance {pin!r}; there is: {there_is}"
        return _refusal(request, None, Refused("unknown", Reason.INSTANCE_UNAVAILABLE, message))
    role = settings.roles.get(name)
    if role is not None and not snapshot.having(model_key(name)):
        if role.kind is not request.kind:
            message = f"the role {name!r} does {role.kind}, and this request wants to {request.kind}"
            return _refusal(request, role, Refused("contradiction", Reason.POLICY, message))
        if role.model is None:
            message = f"the role {name!r} has no model; set one under roles.{name}.model"
            return _refusal(request, role, Refused("unknown", Reason.MODEL_MISSING, message))
        legs = list(_legs(role, settings))
    else:
        legs = [_Leg(name, lane, fallback=False)]
        role = lane
    return _Decider(request, settings, snapshot, role, pin).over(legs)


@dataclass(frozen=True, slots=True)
class _Leg:
    """One model under the rules of one role."""

    model: str
    role: Role | None
    fallback: bool


def _legs(role: Role, settings: RoutingSettings) -> Iterator[_Leg]:
    """The role's own model, then those of the roles it falls back to, each role once."""
    seen: set[str] = set()
    waiting = [role]
    while waiting:
        current = waiting.pop(0)
        if current.name in seen:
            continue
        seen.add(current.name)
        # Vectors of two models cannot be compared: an embedding role may change its place, not its model.
        same = current.model is not None and role.model is not None
        if same and (
            role.kind is not RequestKind.EMBED
            or model_key(current.model or "") == model_key(role.model or "")
        ):
            yield _Leg(current.model or "", current, fallback=current is not role)
        followers = (settings.roles.get(name) for name in current.fallbacks)
        waiting += [other for other in followers if other is not None and other.kind is role.kind]


class _Decider:
    """Goes over the legs of one decision."""

    def __init__(
        self,
        request: RequestFacts,
        settings: RoutingSettings,
        snapshot: Snapshot,
        role: Role | None,
        pin: str | None,
    ) -> None:
        self._request = request
        self._settings = settings
        self._snapshot = snapshot
        self._role = role
        self._pin = pin
        self._passed_over: list[PassedOver] = []
        self._groups: list[tuple[Attempt, ...]] = []

    def over(self, legs: list[_Leg]) -> Decision:
        for leg in legs:
            self._add(leg)
        role = self._role
        return Decision(
            request=self._request,
            role=role.name if role else None,
            policy=role.policy if role else Policy.AUTO,
            requested_target=self._pin or (role.target if role else None),
            groups=tuple(self._groups),
            passed_over=tuple(self._passed_over),
            refused=None if self._groups else self._why_none(legs),
        )

    def _add(self, leg: _Leg) -> None:
        key = model_key(leg.model)
        having = self._snapshot.having(key)
        found = having + self._snapshot.unread()
        pulls = not having and not found and self._settings.auto_pull
        if pulls:
            found = self._snapshot.candidates
        allowed: list[tuple[tuple[int, int, int], Candidate, Because]] = []
        preferred_out: Reason | None = None if having or pulls else Reason.MODEL_MISSING
        for candidate in found:
            rank = self._class_of(candidate, leg)
            out = candidate.why_out if rank is not None else Reason.POLICY
            if out is not None or rank is None:
                reason = out or Reason.POLICY
                self._passed_over.append(PassedOver(candidate.id, leg.model, reason))
                if rank == 0 and preferred_out in (None, Reason.MODEL_MISSING):
                    preferred_out = reason
                continue
            because = _because(candidate, key, pulls=pulls)
            order = (rank + (10 if because == "unread" else 0), _TIER[because], -candidate.priority)
            allowed.append((order, candidate, because))
        best = min((order[0] % 10 for order, _, _ in allowed), default=0)
        allowed.sort(key=itemgetter(0))
        for order, group in groupby(allowed, key=itemgetter(0)):
            fallback = self._fallback(leg, order[0] % 10, best, preferred_out)
            self._groups.append(
                tuple(
                    Attempt(
                        instance=candidate.id,
                        model=leg.model,
                        role=leg.role.name if leg.role else None,
                        because=because,
                        fallback=fallback,
                    )
                    for _, candidate, because in group
                )
            )

    def _class_of(self, candidate: Candidate, leg: _Leg) -> int | None:
        """0 for what is preferred, more for what is permitted after it, None for what is not permitted."""
        policy = leg.role.policy if leg.role else Policy.AUTO
        if policy is Policy.CPU_ONLY and candidate.device is not DeviceKind.CPU:
            return None
        if self._pin is not None:
            return 0 if candidate.id == self._pin else None
        target = leg.role.target if leg.role else None
        if target is not None and candidate.id == target:
            return 0
        if policy is Policy.PREFER_GPU:
            away = 0 if target is None else 1
            return away if candidate.device is DeviceKind.GPU else away + 1
        return 0 if target is None else None

    def _fallback(self, leg: _Leg, rank: int, best: int, preferred_out: Reason | None) -> Reason | None:
        if leg.fallback:
            first = self._passed_over[0].reason if self._passed_over else None
            return first or Reason.MODEL_MISSING
        if rank == 0:
            return None
        # What is preferred is there, or it is not: then this says why.
        if best == 0:
            return Reason.INSTANCE_UNAVAILABLE
        if preferred_out is not None:
            return preferred_out
        return Reason.MODEL_MISSING if leg.role and leg.role.target else Reason.GPU_MISSING

    def _why_none(self, legs: list[_Leg]) -> Refused:
        model = legs[0].model
        pin = self._pin or (legs[0].role.target if legs[0].role else None)
        outs = [one for one in self._passed_over if one.reason is not Reason.POLICY]
        if outs:
            first = next((one for one in outs if one.instance == pin), outs[0])
            where = f"{first.instance} has {model!r} and cannot be used now ({first.reason})"
            return Refused("unavailable", first.reason, where)
        has = self._snapshot.having(model_key(model))
        if has and pin is not None and all(candidate.id != pin for candidate in has):
            others = ", ".join(candidate.id for candidate in has)
            message = f"model {model!r} is not on {pin}; it is on: {others}"
            return Refused("unknown", Reason.MODEL_MISSING, message)
        if self._passed_over:
            names = ", ".join(one.instance for one in self._passed_over)
            rule = f"the policy of role {self._role.name!r}" if self._role else "the pin"
            return Refused("contradiction", Reason.POLICY, f"{rule} permits none of: {names}")
        names_there = self._snapshot.names()
        more = f" and {len(names_there) - _MOST_NAMES} more" if len(names_there) > _MOST_NAMES else ""
        listed = ", ".join(names_there[:_MOST_NAMES]) or "none"
        roles = ", ".join(name for name, role in self._settings.roles.items() if role.model is not None)
        also = f"; roles: {roles}" if roles else ""
        message = f"model {model!r} not found; models: {listed}{more}{also}"
        return Refused("unknown", Reason.MODEL_MISSING, message)


_TIER: dict[Because, int] = {"loaded": 0, "running": 1, "startable": 2, "unread": 3, "pull": 4}


def _because(candidate: Candidate, key: str, *, pulls: bool) -> Because:
    if pulls:
        return "pull"
    if candidate.models is None:
        return "unread"
    if candidate.state is State.STARTABLE:
        return "startable"
    return "loaded" if key in candidate.loaded else "running"


def _refusal(request: RequestFacts, role: Role | None, refused: Refused) -> Decision:
    return Decision(
        request=request,
        role=role.name if role else None,
        policy=role.policy if role else Policy.AUTO,
        requested_target=request.instance or (role.target if role else None),
        groups=(),
        passed_over=(),
        refused=refused,
    )
