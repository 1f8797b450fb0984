"""`/v1/cluster/routes`: the candidates for a request with their scores, and the route it would take now."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from fastapi import APIRouter, Query
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from manager.api.cluster import CLUSTER
from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.routing import attempts_now
from manager.domain.auto import choose, is_auto
from manager.domain.models import model_key, split_pin
from manager.domain.roles import RequestKind, Strategy
from manager.domain.routing import Because, RequestFacts, State
from manager.domain.scoring import family_of, score, words_of
from manager.errors import NoRouteError, Reason
from manager.services.routing.ranking import Wish
from manager.wire.details import details_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manager.api.backend import Backend
    from manager.domain.routing import Candidate, Decision

# Pairs of an instance and a model that are looked at where neither a model nor a role is named.
MOST_PAIRS = 4096
_MOST_TEXT = 4096
# The capability that a model needs, in the words of `/api/show`, where its server lists capabilities.
_ABLE = {RequestKind.GENERATE: "completion", RequestKind.EMBED: "embedding"}

Model = Annotated[str, Field(min_length=1, max_length=600)]
RoleWord = Annotated[str, Field(min_length=1, max_length=100)]


def _whole(value: object) -> object:
    """To JSON 20.0 is a whole number too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Limit = Annotated[int, Field(strict=True, ge=1, le=1000), BeforeValidator(_whole)]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MatchRequest(_Shape):
    """A request in outline. Without a model and a role every model of every instance is a candidate.

    `model` may be a role, `auto`, or have an instance (`MODEL@INSTANCE`). Both: the role is its lane. `kind`
    is that of the role, else `generate`. The words of `text` count for the signal `text`, and choose the role
    for `auto`.
    """

    model: Model | None = None
    role: RoleWord | None = None
    kind: RequestKind | None = None
    text: Annotated[str, Field(max_length=_MOST_TEXT)] | None = None
    limit: Limit = 20


class SignalsBody(_Shape):
    """The signals of a score, each from 0 (worst) to 1 (best); null is unknown, and counts as 0.5."""

    text: float | None
    family: float | None
    loaded: float | None
    latency: float | None
    throughput: float | None
    queue: float | None
    benchmark: float | None


class CandidateBody(_Shape):
    """A model on an instance. `score` is null where the request does not go there, and `reason` says why.

    One with both is attempted after the others, because it is overloaded.
    """

    instance: str
    model: str
    score: float | None
    state: State
    signals: SignalsBody
    reason: Reason | None


class MatchBody(_Shape):
    """The candidates by score, the highest first; those that the request does not go to are the last.

    A request obeys the scores where `strategy` is `scored`.
    """

    candidates: list[CandidateBody]
    strategy: Strategy


class RouteQuery(_Shape):
    model: Model | None = None
    role: RoleWord | None = None
    kind: RequestKind | None = None


class RouteBody(_Shape):
    """The first attempt of a request that came now. `endpoint` is null while the instance does not run."""

    instance: str
    model: str
    role: str | None
    endpoint: str | None
    because: Because
    fallback: Reason | None
    score: float


class _Found(NamedTuple):
    """A candidate, and why the request does not go there."""

    candidate: Candidate
    model: str
    is_attempted: bool
    reason: Reason | None


def cluster_routes_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix=f"{CLUSTER}/routes", tags=["cluster"])

    @router.post("/match", response_model=MatchBody, responses=refusals(404))
    async def match_routes(request: MatchRequest, _query: Annotated[NoQuery, Query()]) -> Response:
        """Score the candidates for a request, without making it. Starts nothing."""
        text = request.text or ""
        if request.model is None and request.role is None:
            kind = request.kind or RequestKind.GENERATE
            wish = Wish(words_of(text), _families(backend, words_of(text)))
            found, strategy = list(_all_pairs(backend, kind)), Strategy.WARM_FIRST
        else:
            decision = _decision(backend, request.model, request.role, request.kind, text)
            wish, found = _wish(backend, decision, text), _of_decision(backend, decision)
            strategy = _strategy(backend, decision)
        bodies = [_candidate_json(backend, one, wish) for one in found]
        bodies.sort(key=lambda one: -1.0 if one["score"] is None else one["score"], reverse=True)
        return JSONResponse({"candidates": bodies[: request.limit], "strategy": strategy})

    @router.get("/resolve", response_model=RouteBody, responses=refusals(404))
    async def resolve_route(query: Annotated[RouteQuery, Query()]) -> Response:
        """The route of a request that came now; 404 says why there is none. Starts nothing."""
        if query.model is None and query.role is None:
            raise NoRouteError(Reason.MODEL_MISSING, "the request names no model and no role")
        decision = _decision(backend, query.model, query.role, query.kind)
        attempts, _ = attempts_now(backend, decision)
        refused = decision.refused
        if refused is not None:
            raise NoRouteError(refused.reason, refused.message)
        if decision.is_async:
            raise NoRouteError(Reason.POLICY, f"the role {decision.role!r} takes runs only")
        first = attempts[0]
        candidate = backend.router.snapshot().get(first.instance)
        assert candidate is not None  # noqa: S101  (the decision was made over the same snapshot)
        return JSONResponse(
            {
                "instance": first.instance,
                "model": first.model,
                "role": first.role,
                "endpoint": backend.overviews.of(first.instance).view.endpoint,
                "because": first.because,
                "fallback": first.fallback,
                "score": _score(backend, candidate, first.model, _wish(backend, decision))[0],
            }
        )

    return router


def _decision(
    backend: Backend, model: str | None, role: str | None, kind: RequestKind | None, text: str = ""
) -> Decision:
    """Decide about a request that is not made.

    Raises:
        NoRouteError: there is no such role, or none that `auto` can choose.
    """
    settings = backend.model_settings.routing
    lane = None if role is None else settings.role(role)
    if role is not None and lane is None:
        raise NoRouteError(Reason.MODEL_MISSING, f"there is no role {role!r}")
    name = model or role or ""
    kind = kind or (lane.kind if lane is not None else _kind_of(backend, name))
    if is_auto(name, kind, settings) and settings.auto is not None:
        choice = choose(name, text, settings, settings.auto)
        if choice.role is None:
            raise NoRouteError(Reason.MODEL_MISSING, choice.message)
        name = choice.model
    return backend.router.decide(RequestFacts(name, kind, lane=None if model is None else role))


def _kind_of(backend: Backend, name: str) -> RequestKind:
    role = backend.model_settings.routing.role(split_pin(name)[0])
    return RequestKind.GENERATE if role is None else role.kind


def _wish(backend: Backend, decision: Decision, text: str = "") -> Wish:
    """Return the wish of a request: its words, and the family of the model that it names or its role has."""
    facts, settings = decision.request, backend.model_settings.routing
    name, role = split_pin(facts.model)[0], settings.roles.get(decision.role or "")
    model = name
    if role is not None and settings.role(name) is role:
        model = next(iter(settings.models_of(role)), name)
    words = words_of(name) | words_of(facts.lane or "") | words_of(decision.role or "") | words_of(text)
    return Wish(words, frozenset({family_of(model)}))


def _families(backend: Backend, words: frozenset[str]) -> frozenset[str]:
    """Return the families of models that words name."""
    return words & {family_of(name) for name in backend.router.snapshot().names()}


def _strategy(backend: Backend, decision: Decision) -> Strategy:
    role = backend.model_settings.routing.roles.get(decision.role or "")
    return Strategy.WARM_FIRST if role is None else role.strategy


def _of_decision(backend: Backend, decision: Decision) -> list[_Found]:
    """Return the candidates of a decision: those that are attempted in their order, then the others."""
    snapshot = backend.router.snapshot()
    reasons = {(one.instance, model_key(one.model)): one.reason for one in decision.passed_over}
    found, attempted = [], set()
    for one in attempts_now(backend, decision)[0]:
        candidate, place = snapshot.get(one.instance), (one.instance, model_key(one.model))
        if candidate is not None and place not in attempted:
            attempted.add(place)
            found.append(_Found(candidate, one.model, is_attempted=True, reason=reasons.get(place)))
    for passed in decision.passed_over:
        candidate, place = snapshot.get(passed.instance), (passed.instance, model_key(passed.model))
        if candidate is not None and place not in attempted:
            found.append(_Found(candidate, passed.model, is_attempted=False, reason=passed.reason))
    return found


def _all_pairs(backend: Backend, kind: RequestKind) -> Iterator[_Found]:
    """Yield each model of each instance that serves such requests, but for paid ones."""
    known, able = backend.overviews.models(), _ABLE.get(kind)

    def pairs() -> Iterator[tuple[Candidate, str, str]]:
        for candidate in backend.router.snapshot().serving(kind).local.candidates:
            for key, name in (candidate.models or {}).items():
                can = details_of(known[key].entry).capabilities if key in known else None
                if can is None or able is None or able in can:
                    yield candidate, key, name

    for candidate, key, name in islice(pairs(), MOST_PAIRS):
        denied = candidate.denials is not None and candidate.denials.rule(key)
        reason = candidate.why_out or (Reason.HOST_DENIED if denied else None)
        yield _Found(candidate, name, is_attempted=reason is None, reason=reason)


def _candidate_json(backend: Backend, found: _Found, wish: Wish) -> dict[str, Any]:
    """Return the values of a `CandidateBody`."""
    value, signals = _score(backend, found.candidate, found.model, wish)
    return {
        "instance": found.candidate.id,
        "model": found.model,
        "score": value if found.is_attempted else None,
        "state": found.candidate.state,
        "signals": signals,
        "reason": found.reason,
    }


def _score(
    backend: Backend, candidate: Candidate, model: str, wish: Wish
) -> tuple[float, dict[str, float | None]]:
    """Return the score of a model on an instance, and its signals."""
    router = backend.router
    in_flight = router.load().get(candidate.id, 0)
    signals = router.ranking.signals(wish, candidate, model, in_flight=in_flight)
    rounded = {name: None if value is None else round(value, 4) for name, value in signals._asdict().items()}
    return round(score(signals, backend.model_settings.routing.weights), 4), rounded
