"""`/api/v1/benchmarks`: how well and how fast models answer; `/v1/cluster/benchmarks`: the latest figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool
from starlette.convertors import Convertor, register_url_convertor
from starlette.responses import Response

from manager.api.cluster import CLUSTER
from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.schemas import GivenTime, Time  # noqa: TC001  (pydantic reads annotations at run time)
from manager.api.submitted import invalid, origin_of
from manager.domain.benchmark_results import LOCAL, BenchmarkStatus
from manager.domain.benchmarks import FIGURES, MOST_REPEATS, MOST_REQUESTS, Sample
from manager.domain.models import model_key
from manager.services.benchmarks.benchmarks import Found, NewBenchmark
from manager.services.benchmarks.measuring import BENCHMARKS_PATH as PATH

if TYPE_CHECKING:
    from manager.api.backend import Backend
    from manager.domain.benchmark_results import Benchmark, Compared, ComparedGroup, Latest
    from manager.domain.benchmarks import Figure, Group

_ONE = f"{PATH}/{{benchmark_id:benchmark_id}}"
_DAY_MS = 86_400_000


class _Id(Convertor[str]):
    """An id of a benchmark in a path: the names of other routes are none."""

    regex = "(?!compare$|reports$)[^/]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("benchmark_id", _Id())


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _whole(value: object) -> object:
    """To JSON 20.0 is a whole number too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _foreign(source: str) -> str:
    if source == LOCAL:
        raise ValueError("expected the name of who has measured it: local is this daemon itself")
    return source


_Name = Annotated[str, Field(strict=True, pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
_Instance = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Model = Annotated[str, Field(strict=True, min_length=1, max_length=600)]
_Milliseconds = Annotated[float, Field(strict=True, ge=0, le=_DAY_MS, allow_inf_nan=False)]


class BenchmarkRequest(_Shape):
    """Which models on which instances to measure, and by what.

    No workload is all of them. Without `model` those are measured that are in memory; a role means its model.
    Without `instance` each local one is measured that has the model.
    """

    workloads: Annotated[list[_Name], Field(max_length=100)] = []
    instance: _Instance | None = None
    model: _Model | None = None
    repeat: Annotated[int, Field(strict=True, ge=1, le=MOST_REPEATS), BeforeValidator(_whole)] = 1


class SampleBody(_Shape):
    """One request. `ttft_ms` is from sending it to the first piece of the answer. Null is not known.

    `quality` is the share of the checks that the answer passes. Figures of a request without an answer (`ok`)
    do not count.
    """

    workload: _Name
    prompt: _Name
    instance: _Instance
    model: Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,299}$")]
    ok: StrictBool
    ttft_ms: _Milliseconds | None = None
    duration_ms: _Milliseconds | None = None
    tokens_per_s: Annotated[float, Field(strict=True, gt=0, le=1e6, allow_inf_nan=False)] | None = None
    output_tokens: Annotated[int, Field(strict=True, ge=0, le=10**9), BeforeValidator(_whole)] | None = None
    quality: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] | None = None
    error: Annotated[str, Field(strict=True, max_length=500)] | None = None


class ReportRequest(_Shape):
    """The measurements of another program. `source` names it."""

    source: Annotated[_Name, AfterValidator(_foreign)]
    started_at: GivenTime | None = None
    ended_at: GivenTime | None = None
    samples: Annotated[list[SampleBody], Field(min_length=1, max_length=MOST_REQUESTS)]


class StartedBody(_Shape):
    id: str
    status: BenchmarkStatus


class RemovedBody(_Shape):
    """`removed` is whether the benchmark is gone; one that waited or ran is kept as it was cancelled."""

    id: str
    status: BenchmarkStatus
    removed: bool


class FigureBody(_Shape):
    """A figure over `count` requests. `stddev` is null under two of them, all others without any."""

    count: int
    mean: float | None
    p50: float | None
    p95: float | None
    stddev: float | None


class ResultBody(_Shape):
    """The figures of one workload on one instance with one model.

    `success` is the share of requests that were answered, `quality` that of the checks that answers pass.
    `score` is quality x success / (1 + median time to the first token / 5 s).
    """

    workload: str
    instance: str
    model: str
    score: float
    ttft_ms: FigureBody
    tokens_per_s: FigureBody
    success: FigureBody
    quality: FigureBody


class TargetBody(_Shape):
    instance: str
    model: str


class BenchmarkBody(_Shape):
    """One benchmark. `done` of `total` requests were measured; `source` is who has measured them.

    `waits_for` is why it does not get on just now.
    """

    id: str
    status: BenchmarkStatus
    source: str
    project_id: str
    workloads: list[str]
    targets: list[TargetBody]
    repeat: int
    total: int
    done: int
    waits_for: str | None
    error: str | None
    created_at: Time
    started_at: Time | None
    ended_at: Time | None
    results: list[ResultBody]


class BenchmarkWithSamples(BenchmarkBody):
    samples: list[SampleBody]


class BenchmarksBody(_Shape):
    """The newest first. `available` are the workloads that there are."""

    benchmarks: list[BenchmarkBody]
    count: int
    available: list[str]


class ComparedBody(_Shape):
    """One figure in both; `difference` is the mean of `b` less that of `a`."""

    a: FigureBody
    b: FigureBody
    difference: float | None


class ComparedScore(_Shape):
    a: float | None
    b: float | None
    difference: float | None


class ComparedResult(_Shape):
    """One workload side by side. Where the two have measured different models, both are named."""

    workload: str
    instance: str
    model: str
    score: ComparedScore
    ttft_ms: ComparedBody
    tokens_per_s: ComparedBody
    success: ComparedBody
    quality: ComparedBody


class ComparisonBody(_Shape):
    a: BenchmarkBody
    b: BenchmarkBody
    results: list[ComparedResult]


class LatestWorkload(_Shape):
    """The newest figures of one workload, and the benchmark that they are of."""

    benchmark: str
    source: str
    ended_at: Time | None
    result: ResultBody


class LatestBody(_Shape):
    """The newest figures of a model on an instance; `score` is the mean over its workloads."""

    instance: str
    model: str
    score: float
    workloads: list[LatestWorkload]


class ClusterBenchmarksBody(_Shape):
    benchmarks: list[LatestBody]
    count: int


class BenchmarksQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=600)] | None = None
    instance: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    workload: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class CompareQuery(BaseModel):
    """The ids of two benchmarks."""

    model_config = ConfigDict(extra="forbid")

    a: Annotated[str, Field(min_length=1, max_length=100)]
    b: Annotated[str, Field(min_length=1, max_length=100)]


def benchmarks_router(backend: Backend) -> APIRouter:
    router = APIRouter(tags=["benchmarks"])
    benchmarks = backend.benchmarks

    @router.post(PATH, status_code=202, response_model=StartedBody, responses=refusals(404, 409, 429, 503))
    async def start_benchmark(
        wanted: BenchmarkRequest, request: Request, _query: Annotated[NoQuery, Query()]
    ) -> Response:
        """Measure models in the background, one benchmark at a time; `Location` is where to look."""
        new = NewBenchmark(tuple(wanted.workloads), wanted.instance, wanted.model, wanted.repeat)
        one = await benchmarks.submit(new, origin_of(backend, request).project)
        answer = _json(StartedBody(id=one.id, status=one.status), 202)
        answer.headers["Location"] = f"{PATH}/{one.id}"
        return answer

    @router.get(PATH, response_model=BenchmarksBody, responses=refusals())
    async def list_benchmarks(query: Annotated[BenchmarksQuery, Query()]) -> Response:
        """The newest benchmarks first, without their requests; at most 200 ended ones are kept."""
        found = benchmarks.newest(
            instance=query.instance, model=query.model, workload=query.workload, limit=query.limit
        )
        bodies = [BenchmarkBody(**_values(one)) for one in found]
        names = list(benchmarks.workloads)
        return _json(BenchmarksBody(benchmarks=bodies, count=len(bodies), available=names))

    @router.post(
        f"{PATH}/reports", status_code=201, response_model=BenchmarkWithSamples, responses=refusals(503)
    )
    async def take_report(
        wanted: ReportRequest, request: Request, _query: Annotated[NoQuery, Query()]
    ) -> Response:
        """Store what another program has measured; it counts as what the daemon measures itself."""
        if wanted.started_at and wanted.ended_at and wanted.started_at > wanted.ended_at:
            raise invalid("body.ended_at", "it is before body.started_at")
        samples = [Sample(**{**one.model_dump(), "model": model_key(one.model)}) for one in wanted.samples]
        one = await benchmarks.report(
            wanted.source,
            samples,
            origin_of(backend, request).project,
            started_at=wanted.started_at,
            ended_at=wanted.ended_at,
        )
        return _json(_with_samples(await benchmarks.find(one.id)), 201)

    @router.get(f"{PATH}/compare", response_model=ComparisonBody, responses=refusals(404))
    async def compare_benchmarks(query: Annotated[CompareQuery, Query()]) -> Response:
        """The figures of two benchmarks side by side, with their spread."""
        one, other, results = benchmarks.compare(query.a, query.b)
        return _json(
            ComparisonBody(
                a=_body(one), b=_body(other), results=[_compared_result(result) for result in results]
            )
        )

    @router.get(
        _ONE,
        response_model=BenchmarkWithSamples,
        responses=refusals(404, 503),
    )
    async def show_benchmark(benchmark_id: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """One benchmark with its requests."""
        return _json(_with_samples(await benchmarks.find(benchmark_id)))

    @router.delete(_ONE, response_model=RemovedBody, responses=refusals(404, 503))
    async def remove_benchmark(benchmark_id: str, _query: Annotated[NoQuery, Query()]) -> Response:
        """Cancel a benchmark that waits or runs; its request has ended when this answers. Remove another."""
        before = (await benchmarks.find(benchmark_id)).benchmark
        one = await benchmarks.remove(benchmark_id)
        status = before.status if one is None else one.status
        return _json(RemovedBody(id=before.id, status=status, removed=one is None))

    @router.get(f"{CLUSTER}/benchmarks", response_model=ClusterBenchmarksBody, responses=refusals())
    async def list_latest(_query: Annotated[NoQuery, Query()]) -> Response:
        """The latest figures of each model on each instance."""
        found = [_latest(one) for one in benchmarks.latest]
        return _json(ClusterBenchmarksBody(benchmarks=found, count=len(found)))

    return router


# --- helpers, in call order ---


def _json(body: BaseModel, status: int = 200) -> Response:
    return Response(body.model_dump_json(), status_code=status, media_type="application/json")


def _values(found: Found) -> dict[str, Any]:
    one = found.benchmark
    return {
        "id": one.id,
        "status": one.status,
        "source": one.source,
        "project_id": one.project,
        "workloads": list(one.workloads),
        "targets": [TargetBody(instance=it.instance, model=it.model) for it in one.targets],
        "repeat": one.repeat,
        "total": one.total,
        "done": one.done,
        "waits_for": found.waits_for,
        "error": one.error,
        "created_at": one.created_at,
        "started_at": one.started_at,
        "ended_at": one.ended_at,
        "results": [_result(group) for group in one.groups],
    }


def _body(one: Benchmark) -> BenchmarkBody:
    return BenchmarkBody(**_values(Found(one, None)))


def _with_samples(found: Found) -> BenchmarkWithSamples:
    samples = [
        SampleBody.model_construct(**{name: getattr(one, name) for name in SampleBody.model_fields})
        for one in found.samples
    ]
    return BenchmarkWithSamples.model_construct(**_values(found), samples=samples)


def _result(group: Group) -> ResultBody:
    return ResultBody(
        workload=group.workload,
        instance=group.instance,
        model=group.model,
        score=group.score,
        ttft_ms=_figure(group.ttft_ms),
        tokens_per_s=_figure(group.tokens_per_s),
        success=_figure(group.success),
        quality=_figure(group.quality),
    )


def _figure(one: Figure) -> FigureBody:
    return FigureBody(count=one.count, mean=one.mean, p50=one.p50, p95=one.p95, stddev=one.stddev)


def _compared_result(one: ComparedGroup) -> ComparedResult:
    a, b = one.score_a, one.score_b
    difference = None if a is None or b is None else b - a
    return ComparedResult(
        workload=one.workload,
        instance=one.instance,
        model=one.model,
        score=ComparedScore(a=a, b=b, difference=difference),
        **{name: _compared(one.figures[name]) for name in FIGURES},
    )


def _compared(one: Compared) -> ComparedBody:
    return ComparedBody(a=_figure(one.a), b=_figure(one.b), difference=one.difference)


def _latest(one: Latest) -> LatestBody:
    workloads = [
        LatestWorkload(
            benchmark=benchmark.id,
            source=benchmark.source,
            ended_at=benchmark.ended_at,
            result=_result(group),
        )
        for benchmark, group in one.measured
    ]
    return LatestBody(
        instance=one.target.instance, model=one.target.model, score=one.score, workloads=workloads
    )
