"""`/api/v1/llm`: small jobs by tier, the models of the tiers, and what routing has saved."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool
from starlette.responses import JSONResponse, Response

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.leaving import while_there
from manager.api.moments import MomentText  # noqa: TC001
from manager.api.runs import SubmittedBody
from manager.api.submitted import asking_of, invalid, origin_of
from manager.api.usage import UsageNumbers, numbers, read_usage, time_of
from manager.domain.classification import Tier
from manager.domain.models import model_key
from manager.domain.runs import RunCaller
from manager.domain.usage import Sums
from manager.errors import (
    EnsembleOffError,
    Reason,
)
from manager.services.routing.attempting import RUNS_PATH
from manager.services.runs.ensemble import PATH as ENSEMBLE
from manager.services.runs.ensemble import Wanted
from manager.services.runs.runs import NewRun
from manager.settings.auto import MOST_MODELS
from manager.wire.details import details_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from manager.api.backend import Backend
    from manager.domain.facts import ModelFacts
    from manager.services.llm import Verdict
    from manager.services.requests import Origin
    from manager.services.routing.whole import Whole
    from manager.wire.listing import KnownModel

PATH = "/api/v1/llm"
MOST_TEXT = 200_000
MOST_CATEGORIES = 100
# A character of JSON may be written as two escapes of six bytes.
MOST_BODY_BYTES = 4 * 2**20
_ASKS = (400, 402, 404, 409, 429, 501, 502, 503, 504)
_DEFAULT_SPAN = timedelta(days=1)


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _each_once(categories: list[str]) -> list[str]:
    for name in categories:
        if not name.strip():
            raise ValueError("an empty category; expected some text")
        if categories.count(name) > 1:
            raise ValueError(f"{name!r} is listed twice; expected each category once")
    return categories


_Text = Annotated[str, Field(strict=True, min_length=1, max_length=MOST_TEXT)]
_Name = Annotated[str, Field(strict=True, min_length=1, max_length=512)]
_Category = Annotated[str, Field(strict=True, min_length=1, max_length=200)]
_Categories = Annotated[
    list[_Category],
    Field(min_length=2, max_length=MOST_CATEGORIES, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_each_once),
]


class SentimentRequest(_Shape):
    text: _Text


class ClassifyRequest(_Shape):
    text: _Text
    categories: _Categories


class ChatRequest(_Shape):
    """Without `auto_route` the tier is `complex`. `force_model` is a model or a role, and wins over both."""

    message: _Text
    auto_route: StrictBool = True
    force_model: Annotated[str, Field(strict=True, min_length=1, max_length=600)] | None = None


class MessageBody(_Shape):
    role: Literal["system", "user", "assistant"]
    content: _Text


class EnsembleRequest(_Shape):
    """`models` and `judge` are models or roles; left out, they are those of `routing.ensemble`."""

    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=1000)]
    models: Annotated[list[_Name], Field(min_length=2, max_length=MOST_MODELS)] | None = None
    judge: _Name | None = None


class RoutingFacts(_Shape):
    """The origin of an answer, and its reasons; `task_type` to `reasoning` are null for a forced model."""

    task_type: str | None
    tier: str | None
    confidence: float | None
    reasoning: str | None
    role: str | None
    selected_model: str | None
    instance: str | None
    provider: str
    was_fallback: bool
    fallback_reason: Reason | None
    fallback_from: str | None
    routing_ms: float
    request_id: str


class SentimentBody(_Shape):
    """`confidence` is what the model says of itself, held within 0 to 1."""

    sentiment: Literal["BULLISH", "BEARISH", "NEUTRAL"]
    confidence: float
    model_used: str
    latency_ms: float
    routing: RoutingFacts


class CategoryBody(_Shape):
    category: str
    model_used: str
    latency_ms: float
    routing: RoutingFacts


class ChatBody(_Shape):
    response: str
    model: str
    tier: str | None
    latency_ms: float
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float
    routing: RoutingFacts


class TierModelBody(_Shape):
    """One model with its facts: what is configured, else what its server says; null is not known.

    `available`: an instance has it. `latency_ms` is its recent time to the first token.
    """

    name: str
    tiers: list[str]
    context_window: int | None
    expected_latency_ms: float | None
    latency_ms: float | None
    cost_factor: float
    max_tokens: int | None
    temperature: float | None
    capabilities: list[str]
    parameters: str | None
    available: bool
    loaded: bool
    instances: list[str]


class TierModelsBody(_Shape):
    """`tiers` has the models of each tier in the order in which they are tried, before its fallbacks."""

    models: list[TierModelBody]
    tiers: dict[str, list[str]]
    auto: bool


class TierStats(UsageNumbers):
    tier: str


class ModelStats(UsageNumbers):
    model: str


class SavedBody(_Shape):
    """Requests that a smaller tier has answered, and about how much less time they took than the highest one.

    `seconds` is null where the highest tier has answered nothing in that time.
    """

    requests: int
    seconds: float | None


class RoutingStatsBody(_Shape):
    """The requests to tiers, and to the tasks of tiers, that ended in a time."""

    begins: Annotated[str, Field(alias="from")]
    ends: Annotated[str, Field(alias="to")]
    total: UsageNumbers
    fallback_rate: float
    by_tier: list[TierStats]
    by_model: list[ModelStats]
    saved: SavedBody


class StatsQuery(BaseModel):
    """The last day where no time is given; `from` and `to` are times, or spans before now."""

    model_config = ConfigDict(extra="forbid")

    begins: Annotated[MomentText | None, Field(alias="from")] = None
    ends: Annotated[MomentText | None, Field(alias="to")] = None


def llm_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix=PATH, tags=["llm"])
    llm = backend.llm

    @router.post("/sentiment", response_model=SentimentBody, responses=refusals(*_ASKS))
    async def judge_sentiment(
        wanted: SentimentRequest, request: Request, _query: Annotated[NoQuery, Query()]
    ) -> Response:
        """Judge a text as BULLISH, BEARISH or NEUTRAL, by the role `sentiment` or the tier `fast`."""
        asking = asking_of(backend, request, f"{PATH}/sentiment")
        found = await while_there(request, llm.sentiment(wanted.text, asking))
        return _answer({"sentiment": found.word, "confidence": found.confidence}, found)

    @router.post("/classify", response_model=CategoryBody, responses=refusals(*_ASKS))
    async def classify_text(
        wanted: ClassifyRequest, request: Request, _query: Annotated[NoQuery, Query()]
    ) -> Response:
        """Put a text into one of the categories, by the role `classification` or the tier `fast`."""
        asking = asking_of(backend, request, f"{PATH}/classify")
        found = await while_there(request, llm.classify(wanted.text, wanted.categories, asking))
        return _answer({"category": found.word}, found)

    @router.post("/chat", response_model=ChatBody, responses=refusals(*_ASKS))
    async def answer_message(
        wanted: ChatRequest, request: Request, _query: Annotated[NoQuery, Query()]
    ) -> Response:
        """Answer a message with a model that fits it."""
        asking = asking_of(backend, request, f"{PATH}/chat")
        work = llm.chat(wanted.message, asking, auto_route=wanted.auto_route, model=wanted.force_model)
        text, whole = await while_there(request, work)
        record = whole.record
        return JSONResponse(
            {
                "response": text,
                "model": record.model,
                "tier": record.tier,
                "latency_ms": round(whole.latency_ms, 1),
                "input_tokens": record.input_tokens,
                "output_tokens": record.output_tokens,
                "cost_usd": record.cost_usd,
                "routing": _facts_of(whole),
            }
        )

    @router.post(
        "/ensemble", status_code=202, response_model=SubmittedBody, responses=refusals(409, 429, 503)
    )
    async def submit_ensemble(
        wanted: EnsembleRequest, request: Request, _query: Annotated[NoQuery, Query()]
    ) -> Response:
        """Have several models answer, and the best answer chosen, as an async run."""
        run = await backend.runs.submit(_ensemble(backend, wanted, origin_of(backend, request)))
        return JSONResponse(
            {"id": run.id, "status": run.status},
            status_code=202,
            headers={"Location": f"{RUNS_PATH}/{run.id}"},
        )

    @router.get("/models", response_model=TierModelsBody, responses=refusals())
    async def list_tiers(_query: Annotated[NoQuery, Query()]) -> Response:
        """The models of the tiers, and every other model with its facts. Starts nothing."""
        await backend.passing.catalogue.refresh(lists=True)
        return JSONResponse(_models(backend))

    @router.get("/routing-stats", response_model=RoutingStatsBody, responses=refusals(503))
    async def show_stats(query: Annotated[StatsQuery, Query()]) -> Response:
        """The requests that the tiers have answered, their times, and the time saved."""
        now = datetime.now(UTC)
        begins, ends = time_of(query, now, _DEFAULT_SPAN)
        return JSONResponse(await routing_stats(backend, begins, ends, now=now))

    return router


async def routing_stats(
    backend: Backend, begins: datetime, ends: datetime, *, now: datetime
) -> dict[str, Any]:
    """Return the values of a `RoutingStatsBody`.

    Raises:
        RegistryUnwritableError: they cannot be read.
    """
    sums, span = await read_usage(backend, begins, ends, ["role", "model"], now=now)
    tier_of = _tiers_of_roles(backend)
    tiers = {tier.value: Sums() for tier in Tier}
    models: dict[str, Sums] = {}
    total = Sums()
    for (role, model), one in sums.items():
        tier = tier_of.get(role)
        if tier is not None:
            tiers[tier].add(one)
            models.setdefault(model, Sums()).add(one)
            total.add(one)
    ordered = sorted(models.items(), key=lambda item: (-item[1].requests, item[0]))
    return {
        "from": datetime.fromtimestamp(span.begins, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "to": datetime.fromtimestamp(span.ends, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "total": numbers(total, total),
        "fallback_rate": round(total.fallbacks / total.requests, 6) if total.requests else 0.0,
        "by_tier": [{"tier": tier, **numbers(one, total)} for tier, one in tiers.items()],
        "by_model": [{"model": model, **numbers(one, total)} for model, one in ordered],
        "saved": _saved(tiers),
    }


# --- helpers, in call order ---


def _ensemble(backend: Backend, wanted: EnsembleRequest, origin: Origin) -> NewRun:
    """Return the run of an ensemble.

    Raises:
        EnsembleOffError: the configuration has none.
        InvalidRequestError: the messages are too large for a run.
    """
    usual = backend.model_settings.ensemble
    if usual is None:
        raise EnsembleOffError("ensembles are off; set routing.ensemble, with `models` and a `judge`")
    messages = [one.model_dump() for one in wanted.messages]
    judge = wanted.judge or usual.judge
    body = Wanted(messages, tuple(wanted.models or usual.models), judge).dumped()
    most = backend.runs.limits.max_body
    if len(body) > most:
        message = f"they have {len(body)} bytes; at most {most} are taken (runs.max_body)"
        raise invalid("body.messages", message)
    caller = RunCaller(
        origin.project, origin.intent, origin.instance, origin.local_only, origin.trace, origin.key
    )
    return NewRun(ENSEMBLE, judge, body, caller, origin.lane)


def _answer(values: Mapping[str, Any], found: Verdict) -> Response:
    whole = found.whole
    return JSONResponse(
        {
            **values,
            "model_used": whole.record.model,
            "latency_ms": round(whole.latency_ms, 1),
            "routing": _facts_of(whole),
        }
    )


def _facts_of(whole: Whole) -> dict[str, Any]:
    record = whole.record
    return {
        "task_type": record.task_type,
        "tier": record.tier,
        "confidence": record.task_confidence,
        "reasoning": record.task_reasoning,
        "role": record.role,
        "selected_model": record.model,
        "instance": record.effective_target,
        "provider": record.provider,
        "was_fallback": record.fallback,
        "fallback_reason": record.fallback_reason if record.fallback else None,
        "fallback_from": record.fallback_from,
        "routing_ms": round(record.routing_ms or 0.0, 3),
        "request_id": record.request_id,
    }


def _models(backend: Backend) -> dict[str, Any]:
    routing = backend.model_settings.routing
    known = {model_key(one.entry.get("name", "")): one for one in backend.passing.catalogue.models()}
    tiers = {
        tier.value: list(routing.models_of(role))
        for tier in Tier
        if (role := routing.roles.get(tier.value)) is not None
    }
    names = {key: one.entry["name"] for key, one in known.items()}
    for name in (
        *(one.name for one in routing.facts.values()),
        *(name for some in tiers.values() for name in some),
    ):
        names.setdefault(model_key(name), name)
    rows = []
    for key, name in sorted(names.items()):
        of_tiers = [tier for tier, some in tiers.items() if key in map(model_key, some)]
        rows.append(_model(name, routing.facts.get(key), known.get(key), of_tiers))
    return {"models": rows, "tiers": tiers, "auto": routing.auto is not None and routing.auto.is_on}


def _model(
    name: str, facts: ModelFacts | None, known: KnownModel | None, tiers: Iterable[str]
) -> dict[str, Any]:
    entry = {} if known is None else known.entry
    said = details_of(entry)
    shown = entry.get("details")
    return {
        "name": name,
        "tiers": list(tiers),
        "context_window": (facts and facts.context_tokens) or said.context_length,
        "expected_latency_ms": facts and facts.latency_ms,
        "latency_ms": known and known.latency_ms,
        "cost_factor": 1.0 if facts is None else facts.cost_factor,
        "max_tokens": facts and facts.output_tokens,
        "temperature": facts and facts.temperature,
        "capabilities": list(facts.capabilities)
        if facts is not None and facts.capabilities
        else list(said.capabilities or ()),
        "parameters": (shown.get("parameter_size") or None) if isinstance(shown, dict) else None,
        "available": known is not None,
        "loaded": known is not None and bool(known.loaded_on),
        "instances": [] if known is None else list(known.instances),
    }


def _tiers_of_roles(backend: Backend) -> dict[str, str]:
    """Return the tier of each role that is a tier, or a task of one."""
    rules = backend.model_settings.routing.auto
    tasks = {} if rules is None else {one.name: one.tier.value for one in rules.lexicon.tasks}
    return {**tasks, **{tier.value: tier.value for tier in Tier}}


def _saved(tiers: Mapping[str, Sums]) -> dict[str, Any]:
    highest = tiers[Tier.COMPLEX.value].mean_ms
    below = [one for tier, one in tiers.items() if tier != Tier.COMPLEX.value and one.mean_ms is not None]
    seconds = None
    if highest is not None:
        seconds = round(sum(one.ok * (highest - (one.mean_ms or 0.0)) for one in below) / 1000, 1)
    return {"requests": sum(one.ok for one in below), "seconds": seconds}
