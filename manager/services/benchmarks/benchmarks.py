"""Benchmarks: takes them, measures one at a time, stores the results, and scores models by them."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import structlog

from manager.domain.benchmark_results import LOCAL, Benchmark, BenchmarkStatus, compared, latest
from manager.domain.benchmarks import groups_of
from manager.domain.models import model_key
from manager.errors import BenchmarksFullError, Reason, RegistryUnwritableError, UnknownBenchmarkError
from manager.services.benchmarks.measuring import NoSlotError, measure, warm_up
from manager.services.benchmarks.planning import refuse_large, targets_of, workloads_of
from manager.services.finishing import finish

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from datetime import datetime

    from manager.domain.benchmark_results import ComparedGroup, Latest
    from manager.domain.benchmarks import Sample, Workload
    from manager.services.benchmarks.scores import BenchmarkScores
    from manager.services.instances.fleet import Fleet
    from manager.services.journal import Journal
    from manager.services.models.catalogue import Catalogue
    from manager.services.ports import BenchmarkStore
    from manager.services.routing.whole import WholeRequests

_T = TypeVar("_T")
_log = structlog.get_logger("benchmarks")

# Benchmarks that have ended are kept up to this number; beyond it the oldest are forgotten.
KEPT_BENCHMARKS = 200
# Benchmarks that wait or run.
MOST_OPEN = 16
# Measurements are stored so often while a benchmark runs.
_SAVE_EVERY_S = 1.0
# The end of a benchmark is stored so late at most; after that a restart finds it interrupted.
_TRIES, _RETRY_S = 5, 1.0
# The pause before another look for a free slot grows from the first to the last.
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.1, 5.0


@dataclass(frozen=True, slots=True)
class NewBenchmark:
    """A benchmark as a client asks for it. No workload is all of them.

    Without `instance` it measures every instance that has the model. Without `model` it measures the models
    that are in memory.
    """

    workloads: tuple[str, ...] = ()
    instance: str | None = None
    model: str | None = None
    repeat: int = 1


class Found(NamedTuple):
    """A benchmark. `waits_for` is why it does not get on just now; None where it does."""

    benchmark: Benchmark
    waits_for: str | None
    samples: tuple[Sample, ...] = ()


@dataclass(slots=True, eq=False)
class _Running:
    """The benchmark that is measured now. `over` is set once its end is stored."""

    benchmark: Benchmark
    samples: list[Sample] = field(default_factory=list)
    task: asyncio.Task[str | None] | None = None
    waits_for: str | None = None
    is_cancelled: bool = False
    saved_at: float = 0.0
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Benchmarks:
    """Owns all benchmarks. `load` comes first, `run` measures one after the other. Lives on the event loop.

    Each request takes a free slot only, in the background lane, and waits for one otherwise.

    Args:
        store: has the results.
        whole: makes the requests.
        catalogue: has the models of the instances.
        fleet: has the instances.
        journal: takes the events.
        workloads: all there are, by name.
        scores: are kept up to date.
        utcnow: the wall clock.
    """

    def __init__(
        self,
        store: BenchmarkStore,
        whole: WholeRequests,
        catalogue: Catalogue,
        fleet: Fleet,
        journal: Journal,
        *,
        workloads: Mapping[str, Workload],
        scores: BenchmarkScores,
        utcnow: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._whole = whole
        self._catalogue = catalogue
        self._fleet = fleet
        self._journal = journal
        self._workloads = workloads
        self._utcnow = utcnow
        self._number = 0
        self._all: dict[str, Benchmark] = {}
        self._running: _Running | None = None
        self._latest: tuple[Latest, ...] = ()
        self._scores = scores
        self._news = asyncio.Event()

    async def load(self, *, recovers: bool) -> None:
        """Read all benchmarks.

        Args:
            recovers: a benchmark that runs was left by a process that has ended: it is interrupted.
        """
        self._number = await self._store.last_benchmark()
        for one in reversed(await self._store.benchmarks()):
            self._all[one.id] = one
            if recovers and one.status is BenchmarkStatus.RUNNING:
                await self._interrupt(one)
        self._count()

    # --- what others read ---

    @property
    def workloads(self) -> Mapping[str, Workload]:
        return self._workloads

    def scores(self) -> Mapping[tuple[str, str], float]:
        """Return the score of each model on each instance that was measured, from 0 to 1.

        The keys are the id of the instance and the key of the model (`domain.models.model_key`). A score is
        the mean over the workloads of quality x success / (1 + latency / HALF_LATENCY_S), each by the newest
        benchmark that has succeeded (`domain.benchmarks.score_of`, `latest`). It is a snapshot: a later
        benchmark makes another one.
        """
        return self._scores.all()

    @property
    def latest(self) -> tuple[Latest, ...]:
        """The latest figures of each model on each instance."""
        return self._latest

    @property
    def open_count(self) -> int:
        """The benchmarks that wait or run."""
        return sum(one.is_open for one in self._all.values())

    # --- what clients ask for ---

    def newest(
        self, *, instance: str | None, model: str | None, workload: str | None, limit: int
    ) -> tuple[Found, ...]:
        """Return the newest benchmarks first that concern all that is named, without their requests."""
        key = None if model is None else model_key(model)
        ones = sorted(self._all.values(), key=lambda one: one.number, reverse=True)
        found = (one for one in ones if one.concerns(instance=instance, model=key, workload=workload))
        return tuple(self._found(one) for one, _ in zip(found, range(limit), strict=False))

    async def find(self, benchmark_id: str) -> Found:
        """Return one benchmark with its requests.

        Raises:
            UnknownBenchmarkError: there is none of that id.
        """
        one = self._get(benchmark_id)
        running = self._running
        if running is not None and running.benchmark.id == one.id:
            return self._found(one, running.samples)
        stored = await self._store.benchmark(one.id)
        return self._found(one, () if stored is None else stored[1])

    def compare(self, a: str, b: str) -> tuple[Benchmark, Benchmark, tuple[ComparedGroup, ...]]:
        """Return two benchmarks, and their figures side by side.

        Raises:
            UnknownBenchmarkError: there is none of that id.
        """
        one, other = self._get(a), self._get(b)
        return one, other, compared(one.groups, other.groups)

    async def submit(self, new: NewBenchmark, project: str) -> Benchmark:
        """Take a benchmark. It is stored before this returns.

        Raises:
            BenchmarksFullError: too many wait already.
            InvalidRequestError: it is too large, or its instance is a paid server.
            NothingLoadedError: it names no model, and none is in memory.
            UnknownInstanceError: there is no such instance.
            UnknownWorkloadError: there is no such workload.
            UnknownModelError: no instance has the model.
        """
        self._refuse_full()
        names = workloads_of(new.workloads, self._workloads)
        targets = await targets_of(new.instance, new.model, self._catalogue, self._fleet)
        requests = sum(len(self._workloads[name].prompts) for name in names) * len(targets) * new.repeat
        refuse_large(len(names) * len(targets), requests)
        self._refuse_full()
        self._number += 1
        one = Benchmark(
            number=self._number,
            id=f"bench_{secrets.token_hex(8)}",
            status=BenchmarkStatus.QUEUED,
            source=LOCAL,
            project=project,
            workloads=names,
            targets=targets,
            repeat=new.repeat,
            total=requests,
            created_at=self._utcnow(),
        )
        await finish(self._save(one, ()))
        self._news.set()
        return one

    async def report(
        self,
        source: str,
        samples: Sequence[Sample],
        project: str,
        *,
        started_at: datetime | None,
        ended_at: datetime | None,
    ) -> Benchmark:
        """Store what somebody else has measured. It counts as what this daemon measures.

        Raises:
            InvalidRequestError: it has too many groups.
        """
        groups = groups_of(samples)
        refuse_large(len(groups), len(samples))
        now = self._utcnow()
        self._number += 1
        has_answer = any(one.ok for one in samples)
        error = None if has_answer else next((one.error for one in samples if one.error), "no answer")
        one = Benchmark(
            number=self._number,
            id=f"bench_{secrets.token_hex(8)}",
            status=BenchmarkStatus.SUCCEEDED if has_answer else BenchmarkStatus.FAILED,
            source=source,
            project=project,
            workloads=tuple(dict.fromkeys(group.workload for group in groups)),
            targets=tuple(dict.fromkeys(group.target for group in groups)),
            repeat=1,
            total=len(samples),
            created_at=now,
            done=len(samples),
            started_at=started_at,
            ended_at=ended_at or now,
            error=error,
            groups=groups,
        )
        await finish(self._save(one, samples))
        self._journal.record("benchmark_reported", detail=f"{one.id}: {len(samples)} requests by {source}")
        return one

    async def remove(self, benchmark_id: str) -> Benchmark | None:
        """Cancel a benchmark that waits or runs, and return it; its requests have ended then.

        One that has ended is removed; None.

        Raises:
            UnknownBenchmarkError: there is none of that id.
        """
        one, running = self._get(benchmark_id), self._running
        if running is not None and running.benchmark.id == one.id:
            running.is_cancelled = True
            if running.task is not None:
                running.task.cancel()
            await running.over.wait()
            return self._all.get(one.id, running.benchmark)
        if one.is_open:
            return await finish(self._cancel_queued(one))
        await finish(self._forget(one))
        return None

    async def run(self) -> None:
        """Measure one benchmark after the other, until cancelled."""
        while True:
            self._news.clear()
            queued = [one for one in self._all.values() if one.status is BenchmarkStatus.QUEUED]
            if queued:
                await self._execute(min(queued, key=lambda one: one.number))
            else:
                await self._news.wait()

    # --- the work ---

    def _refuse_full(self) -> None:
        if self.open_count >= MOST_OPEN:
            message = (
                f"{MOST_OPEN} benchmarks wait or run, which is the limit; cancel one, or try again later"
            )
            raise BenchmarksFullError(message)

    async def _execute(self, one: Benchmark) -> None:
        """Measure one benchmark, and store how it has ended."""
        running = self._running = _Running(one.moved(BenchmarkStatus.RUNNING, self._utcnow()))
        self._all[one.id] = running.benchmark
        self._journal.record("benchmark_started", detail=_told(running.benchmark))
        task = running.task = asyncio.ensure_future(self._measure(running))
        tries = 1  # where the daemon ends
        try:
            await asyncio.wait({task})
            tries = _TRIES
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
            await finish(self._end(running, task, tries))

    async def _measure(self, running: _Running) -> str | None:
        """Make all requests of a benchmark; return why it has failed, None where it has not."""
        await self._keep(running)
        one = running.benchmark
        missing = [name for name in one.workloads if name not in self._workloads]
        if missing:
            return f"there is no workload {missing[0]!r} any more"
        workloads = [self._workloads[name] for name in one.workloads]
        for target in one.targets:
            await _patiently(running, partial(warm_up, self._whole, target, one.project))
            for _, workload in product(range(one.repeat), workloads):
                for prompt in workload.prompts:
                    asked = partial(measure, self._whole, workload, prompt, target, one.project)
                    running.samples.append(await _patiently(running, asked))
                    running.benchmark = running.benchmark.measured(running.samples)
                    self._all[one.id] = running.benchmark
                    await self._keep(running)
        if any(sample.ok for sample in running.samples):
            return None
        return next((sample.error for sample in running.samples if sample.error), "no answer")

    async def _keep(self, running: _Running) -> None:
        """Store what was measured, a while after the last time; the end is stored anyway."""
        if monotonic() - running.saved_at < _SAVE_EVERY_S:
            return
        running.saved_at = monotonic()
        try:
            await finish(self._save(running.benchmark, tuple(running.samples)))
        except RegistryUnwritableError as error:
            _log.warning("benchmark_not_stored", benchmark=running.benchmark.id, error=error.message)

    async def _end(self, running: _Running, task: asyncio.Task[str | None], tries: int) -> None:
        """Store the end of a benchmark; it counts also where that fails `tries` times."""
        error: str | None = None
        if task.cancelled():
            is_cancelled = running.is_cancelled
            status = BenchmarkStatus.CANCELLED if is_cancelled else BenchmarkStatus.INTERRUPTED
        elif (failure := task.exception()) is not None:
            _log.error("benchmark_broke", benchmark=running.benchmark.id, exc_info=failure)
            status, error = BenchmarkStatus.FAILED, "the manager failed; its log says more"
        else:
            error = task.result()
            status = BenchmarkStatus.SUCCEEDED if error is None else BenchmarkStatus.FAILED
        running.benchmark = running.benchmark.moved(status, self._utcnow(), error)
        try:
            for left in reversed(range(tries)):
                if await self._saved(running):
                    break
                await asyncio.sleep(_RETRY_S if left else 0)
        finally:
            self._all[running.benchmark.id] = running.benchmark
            self._count()
            self._running = None
            running.over.set()
        self._record_end(running.benchmark)

    async def _saved(self, running: _Running) -> bool:
        try:
            await self._save(running.benchmark, tuple(running.samples))
        except RegistryUnwritableError as error:
            _log.warning("benchmark_not_stored", benchmark=running.benchmark.id, error=error.message)
            return False
        return True

    async def _interrupt(self, one: Benchmark) -> None:
        """Note that a process has ended in a benchmark; what it had measured is kept."""
        stored = await self._store.benchmark(one.id)
        ended = one.moved(BenchmarkStatus.INTERRUPTED, self._utcnow())
        with suppress(RegistryUnwritableError):  # the next start finds it again
            await self._store.save_benchmark(ended, () if stored is None else stored[1], KEPT_BENCHMARKS)
        self._all[one.id] = ended
        self._record_end(ended)

    async def _cancel_queued(self, one: Benchmark) -> Benchmark:
        cancelled = self._all[one.id] = one.moved(BenchmarkStatus.CANCELLED, self._utcnow())
        try:
            await self._save(cancelled, ())
        except BaseException:
            self._all[one.id] = one
            self._news.set()
            raise
        self._record_end(cancelled)
        return cancelled

    async def _forget(self, one: Benchmark) -> None:
        await self._store.forget_benchmark(one.id)
        self._all.pop(one.id, None)
        self._count()

    # --- helpers ---

    async def _save(self, one: Benchmark, samples: Sequence[Sample]) -> None:
        await self._store.save_benchmark(one, samples, KEPT_BENCHMARKS)
        self._all[one.id] = one
        ended = sorted((it for it in self._all.values() if not it.is_open), key=lambda it: it.number)
        for old in ended[: max(0, len(ended) - KEPT_BENCHMARKS)]:
            del self._all[old.id]
        if not one.is_open:
            self._count()

    def _count(self) -> None:
        """Count the scores anew."""
        self._latest = latest(self._all.values())
        self._scores.replace({(one.target.instance, one.target.model): one.score for one in self._latest})

    def _get(self, benchmark_id: str) -> Benchmark:
        one = self._all.get(benchmark_id)
        if one is None:
            raise UnknownBenchmarkError(f"there is no benchmark {benchmark_id!r}")
        return one

    def _found(self, one: Benchmark, samples: Sequence[Sample] = ()) -> Found:
        running = self._running
        is_running = running is not None and running.benchmark.id == one.id
        return Found(one, running.waits_for if running is not None and is_running else None, tuple(samples))

    def _record_end(self, one: Benchmark) -> None:
        failed = one.status is BenchmarkStatus.FAILED
        detail = _told(one) if one.error is None else f"{_told(one)}: {one.error}"
        self._journal.record(
            _EVENTS[one.status], reason=Reason.UPSTREAM_ERROR if failed else None, detail=detail
        )


_EVENTS = {
    BenchmarkStatus.SUCCEEDED: "benchmark_succeeded",
    BenchmarkStatus.FAILED: "benchmark_failed",
    BenchmarkStatus.CANCELLED: "benchmark_cancelled",
    BenchmarkStatus.INTERRUPTED: "benchmark_interrupted",
}


def _told(one: Benchmark) -> str:
    return f"{one.id}: {one.done} of {one.total} requests, {', '.join(one.workloads)}"


async def _patiently(running: _Running, ask: Callable[[], Awaitable[_T]]) -> _T:
    """Make a request once a slot is free for it."""
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            done = await ask()
        except NoSlotError as error:
            running.waits_for = error.message
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)
        else:
            running.waits_for = None
            return done
