"""`/api/runtime/compute/routing`: where requests for each role go, and where any request would go."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.model_settings import ByRole, PolicyWord, Saying, Target, change_roles
from manager.domain.auto import choose, is_auto
from manager.domain.classification import Tier  # noqa: TC001
from manager.domain.instance import Health  # noqa: TC001
from manager.domain.roles import Policy, RequestKind
from manager.domain.routing import Because, PassedOver, Refused, RequestFacts, What
from manager.errors import Reason, UnknownKeyError
from manager.services.lanes.slots import FULL
from manager.settings.routing import ANY_INSTANCE, RoleName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manager.api.backend import Backend
    from manager.domain.roles import Role
    from manager.domain.routing import Attempt, Decision

# A query is a part of a URL.
MOST_TEXT = 4000


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RoleRouting(_Shape):
    """Where requests for a role go now, and why not where it was asked for.

    `requested_target` is `auto` or the id of an instance. `effective_target`, its `endpoint` and `health`,
    and `model` are those of the first attempt; `message` says why there is none.
    """

    requested_target: str
    effective_target: str | None
    endpoint: str | None
    health: Health | None
    policy: Policy
    model: str | None
    fallback_reason: Reason | None
    message: str | None


class RoutingBody(_Shape):
    roles: dict[str, RoleRouting]


class RoleRoutingChange(_Shape):
    """What is left out stays; null takes a value back to what is configured."""

    target: Target = None
    policy: PolicyWord = None


class RoutingChange(_Shape):
    roles: Annotated[dict[RoleName, RoleRoutingChange], ByRole]


class RequestDescription(_Shape):
    """A request as routing sees it. `model` may be a role, or have an instance (`MODEL@INSTANCE`).

    `key` is the name of the client's key, whose limits hold; without one there are none. `text` is what the
    user asks, for `auto`.
    """

    model: Annotated[str, Field(min_length=1, max_length=600)]
    kind: RequestKind = RequestKind.GENERATE
    instance: Annotated[str, Field(max_length=100)] | None = None
    lane: Annotated[str, Field(max_length=100)] | None = None
    local_only: bool = False  # a query has text only
    key: Annotated[str, Field(max_length=100)] | None = None
    text: Annotated[str, Field(max_length=MOST_TEXT)] = ""


class ClassificationBody(_Shape):
    """The task of a request, the tier that follows, the confidence (0 to 1), and the reasons."""

    task_type: str
    tier: Tier
    confidence: float
    reasoning: str


class AttemptBody(_Shape):
    """One way to answer. `fallback` says why it is not what was preferred."""

    instance: str
    model: str
    role: str | None
    because: Because
    fallback: Reason | None


class PassedOverBody(_Shape):
    """A candidate that a request does not go to; `detail` adds to the reason in words."""

    instance: str
    model: str
    reason: Reason
    detail: str


class RefusedBody(_Shape):
    what: What
    reason: Reason
    message: str


class DecisionBody(_Shape):
    """The attempts in the order in which they would be made; `refused` says why there is none.

    `would_wait` says that no instance for the first one has a free slot: all that stand in for each other are
    full. A full instance is in `passed_over`, and among the attempts after those of its rank that are free.
    With `runs_only` they are those of a run: a request that waits for its answer is refused with 409.
    With `passes_to_raw` they are what would be made if such requests were managed. `classification` is null
    for a request that names its model.
    """

    role: str | None
    policy: Policy
    requested_target: str
    attempts: list[AttemptBody]
    passed_over: list[PassedOverBody]
    refused: RefusedBody | None
    runs_only: bool
    passes_to_raw: bool
    would_wait: bool
    classification: ClassificationBody | None


def routing_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/runtime/compute/routing", tags=["routing"])

    @router.get("", response_model=RoutingBody, responses=refusals())
    async def show_routing(_query: Annotated[NoQuery, Query()]) -> Response:
        """Where requests for each role go now. Starts nothing."""
        return JSONResponse(routing_values(backend))

    @router.post("", response_model=RoutingBody, responses=refusals(503))
    async def change_routing(change: RoutingChange, _query: Annotated[NoQuery, Query()]) -> Response:
        """Change targets and policies, which are those of `/api/settings/models`."""
        await change_roles(backend.model_settings, _sayings(change))
        return JSONResponse(routing_values(backend))

    @router.post("/explain", response_model=DecisionBody, responses=refusals(404))
    async def explain_routing(request: RequestDescription, _query: Annotated[NoQuery, Query()]) -> Response:
        """Explain the route of a request, without making it. Starts nothing."""
        return JSONResponse(described(backend, request))

    return router


def _sayings(change: RoutingChange) -> Iterator[Saying]:
    for role, values in change.model_dump(mode="json", exclude_unset=True)["roles"].items():
        where = f"body.roles.{role}"
        if not values:
            yield where, role, None, values
        for field, value in values.items():
            yield f"{where}.{field}", role, field, value


def routing_values(backend: Backend) -> dict[str, Any]:
    roles = backend.model_settings.routing.roles.values()
    return {"roles": {role.name: _role(backend, role) for role in roles}}


def _role(backend: Backend, role: Role) -> dict[str, Any]:
    decision = backend.router.decide(RequestFacts(role.name, role.kind))
    first = decision.first(backend.router.load(), backend.router.ranks(decision))
    refused = decision.refused
    view = backend.overviews.of(first.instance).view if first else None
    return {
        "requested_target": role.target or ANY_INSTANCE,
        "effective_target": first and first.instance,
        "endpoint": view and view.endpoint,
        "health": view and view.health,
        "policy": role.policy,
        "model": first.model if first else role.model,
        "fallback_reason": first.fallback if first else refused and refused.reason,
        "message": refused and refused.message,
    }


def described(backend: Backend, request: RequestDescription) -> dict[str, Any]:
    """Return the values of a `DecisionBody` about a request that is not made.

    Raises:
        UnknownKeyError: no key of that name is in force.
    """
    settings = backend.model_settings.routing
    if settings.auto is None or not is_auto(request.model, request.kind, settings):
        return {**decision_json(backend, _decided(backend, request, request.model)), "classification": None}
    choice = choose(request.model, request.text, settings, settings.auto)
    decision = _decided(backend, request, choice.model)
    if choice.role is None:
        decision = replace(decision, refused=Refused("unknown", Reason.MODEL_MISSING, choice.message))
    found = choice.classification
    return {
        **decision_json(backend, decision),
        "classification": {
            "task_type": found.task_type,
            "tier": found.tier.value,
            "confidence": found.confidence,
            "reasoning": found.reasoning,
        },
    }


def _decided(backend: Backend, request: RequestDescription, model: str) -> Decision:
    facts = RequestFacts(model, request.kind, request.instance, request.lane, local_only=request.local_only)
    if request.key is not None:
        grant = backend.keyring.grant(request.key)
        if grant is None:
            raise UnknownKeyError(f"no key {request.key!r} is in force")
        facts = facts._replace(permit=grant.permit, local_only=request.local_only or grant.is_local)
    return backend.router.decide(facts)


def attempts_now(backend: Backend, decision: Decision) -> tuple[list[Attempt], list[Attempt]]:
    """Return the attempts in the order in which they would be made now, and those without a free slot."""
    slots, router = backend.passing.routing.slots, backend.router
    attempts = list(decision.in_order(router.load(), router.ranks(decision)))
    full = [one for one in attempts if not slots.has_room(decision.role, one.instance)]
    ranks = list(dict.fromkeys(one.choice for one in attempts))
    attempts.sort(key=lambda one: (ranks.index(one.choice), one in full))
    if attempts and full and attempts[0] not in full and attempts[0].fallback is not None:
        attempts[0] = attempts[0]._replace(fallback=Reason.OVERLOADED)  # what is preferred has no free slot
    return attempts, full


def decision_json(backend: Backend, decision: Decision) -> dict[str, Any]:
    """Return the values of a `DecisionBody`."""
    refused = decision.refused
    attempts, full = attempts_now(backend, decision)
    passed_over = [PassedOver(one.instance, one.model, Reason.OVERLOADED, FULL) for one in full]
    return {
        "role": decision.role,
        "policy": decision.policy,
        "requested_target": decision.requested_target or ANY_INSTANCE,
        "attempts": [
            {
                "instance": one.instance,
                "model": one.model,
                "role": one.role,
                "because": one.because,
                "fallback": one.fallback,
            }
            for one in attempts
        ],
        "passed_over": [
            {"instance": one.instance, "model": one.model, "reason": one.reason, "detail": one.detail}
            for one in (*passed_over, *decision.passed_over)
        ],
        "refused": refused and {"what": refused.what, "reason": refused.reason, "message": refused.message},
        "runs_only": decision.is_async,
        "passes_to_raw": not backend.rollout.in_force.stages.manages(decision.role, decision.request.lane),
        "would_wait": bool(attempts) and attempts[0] in full,
    }
