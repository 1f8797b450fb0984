"""Benchmarks over a real registry, with requests that are answered as the test says."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from manager.adapters.registry import open_registry
from manager.domain.benchmark_results import BenchmarkStatus
from manager.domain.benchmarks import Check, CheckKind, Prompt, Sample, Workload
from manager.domain.roles import RequestKind
from manager.errors import (
    BenchmarksFullError,
    InvalidRequestError,
    NotAnsweredError,
    Reason,
    RegistryUnwritableError,
    UnknownBenchmarkError,
    UnknownModelError,
)
from manager.services.benchmarks import benchmarks as module
from manager.services.benchmarks.benchmarks import Benchmarks, NewBenchmark
from manager.services.benchmarks.scores import BenchmarkScores
from manager.services.routing.whole import Whole
from manager.services.world import Revision
from manager.wire.listing import Alias, KnownModel
from tests.support.inside import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NOW = datetime(2026, 11, 29, tzinfo=UTC)
CHECK = Check(CheckKind.CONTAINS, "yes")
WORKLOADS = {
    "a": Workload("a", (Prompt("one", "?", (CHECK,)), Prompt("two", "??", (CHECK,), "Be brief."))),
    "b": Workload("b", (Prompt("one", "?", (CHECK,)),)),
}


class Requests:
    """Stands in for `WholeRequests`: each answer is what `answer` returns or raises."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.go = asyncio.Event()
        self.go.set()
        self.says: Any = "yes"
        self.target: str | None = None

    async def ask(self, _route: object, fields: Any, asking: Any) -> Whole:
        self.asked.append((fields, asking))
        await self.go.wait()
        says = self.says(len(self.asked)) if callable(self.says) else self.says
        if isinstance(says, Exception):
            raise says
        record: Any = SimpleNamespace(
            effective_target=self.target or asking.origin.instance,
            queue_ms=100.0,
            start_ms=None,
            output_tokens=8,
        )
        lines = [{"message": {"content": says}}, {"message": {"content": ""}, "done": True}]
        content = "\n".join(map(json.dumps, lines)).encode()
        return Whole(content, record, began_s=10.0, first_s=10.3, ended_s=10.7)


class Catalogue:
    """A fleet with `tiny` on cpu and paid, and in the memory of cpu."""

    def __init__(self) -> None:
        known = KnownModel({"name": "Tiny"}, ("cpu", "paid"), ("cpu",))
        vectors = KnownModel({"name": "minilm", "capabilities": ["embedding"]}, ("cpu",), ("cpu",))
        self.known = {"tiny": known, "tiny:latest": known}
        self.listed = [known, vectors]

    async def refresh(self, *, lists: bool) -> None:
        assert lists

    def models(self) -> list[KnownModel]:
        return self.listed

    def find(self, name: str) -> KnownModel | Alias | None:
        if name == "role":
            return Alias("role", "Tiny", RequestKind.GENERATE, self.listed[0])
        return Alias("lost", "gone", RequestKind.GENERATE, None) if name == "lost" else self.known.get(name)


class Rig:
    def __init__(self, benchmarks: Benchmarks, requests: Requests, events: list[str], registry: Any) -> None:
        self.benchmarks = benchmarks
        self.requests = requests
        self.events = events
        self.registry = registry
        self.revision = Revision()
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self.benchmarks.run())

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            with suppress(asyncio.CancelledError):
                await self.task

    async def submit(self, *workloads: str, **wanted: Any) -> str:
        new = NewBenchmark(workloads or ("b",), **({"model": "tiny"} | wanted))
        return (await self.benchmarks.submit(new, "default")).id

    def status(self, id_: str) -> str:
        return self.benchmarks._get(id_).status.value

    async def ended(self, id_: str) -> str:
        await until(lambda: not self.benchmarks._get(id_).is_open)
        return self.status(id_)


@asynccontextmanager
async def rigged(tmp_path: Path, workloads: Any = None, *, recovers: bool = True) -> AsyncIterator[Rig]:
    registry = await open_registry(tmp_path / "registry.sqlite3")
    requests, events, revision = Requests(), [], Revision()
    specs = {"cpu": False, "paid": True}
    instances = {
        id_: SimpleNamespace(id=id_, spec=SimpleNamespace(is_paid=paid)) for id_, paid in specs.items()
    }
    fleet = SimpleNamespace(get=instances.__getitem__, instances=instances.values)
    journal = SimpleNamespace(record=lambda kind, **_: events.append(kind))
    benchmarks = Benchmarks(
        registry,
        cast("Any", requests),
        cast("Any", Catalogue()),
        cast("Any", fleet),
        cast("Any", journal),
        workloads=WORKLOADS if workloads is None else workloads,
        scores=BenchmarkScores(revision),
        utcnow=lambda: NOW,
    )
    await benchmarks.load(recovers=recovers)
    rig = Rig(benchmarks, requests, events, registry)
    rig.revision = revision
    try:
        yield rig
    finally:
        await rig.stop()
        await registry.close()


async def test_each_prompt_is_asked_as_its_workload_says(tmp_path: Path) -> None:
    async with rigged(tmp_path) as rig:
        rig.start()
        id_ = await rig.submit("a", repeat=2)
        assert await rig.ended(id_) == "succeeded"
        (warm, _), *asked = rig.requests.asked
        assert warm["options"] == {"num_predict": 1}
        assert [len(fields["messages"]) for fields, _ in asked] == [1, 2, 1, 2]
        fields, asking = asked[0]
        assert (fields["model"], fields["stream"]) == ("tiny:latest", True)
        assert fields["options"] == {"temperature": 0.0, "num_predict": 256}
        assert (asking.is_background, asking.grant, asking.origin.local_only) == (True, None, True)
        assert (asking.origin.instance, asking.origin.project) == ("cpu", "default")
        found = await rig.benchmarks.find(id_)
        sample = found.samples[0]
        assert sample.ttft_ms == pytest.approx(200), "the wait for a slot is no part of it"
        assert sample.duration_ms == pytest.approx(600)
        assert sample.tokens_per_s == pytest.approx(8 / 0.4), "the server has not said how long it took"
        assert sample.quality == 1.0
        assert rig.benchmarks.scores() == {("cpu", "tiny:latest"): pytest.approx(1 / 1.04)}


async def test_an_answer_of_another_instance_is_no_measurement(tmp_path: Path) -> None:
    async with rigged(tmp_path) as rig:
        rig.requests.target = "gpu0"
        rig.start()
        id_ = await rig.submit()
        assert await rig.ended(id_) == "failed"
        assert (await rig.benchmarks.find(id_)).benchmark.error == "gpu0 has answered in place of cpu"


async def test_one_answer_is_enough_to_succeed(tmp_path: Path) -> None:
    async with rigged(tmp_path) as rig:
        lost = NotAnsweredError("out of \ud800 order", reason=Reason.UPSTREAM_ERROR, refused=None)
        rig.requests.says = lambda number: "yes" if number == 2 else lost
        rig.start()
        id_ = await rig.submit("a")
        assert await rig.ended(id_) == "succeeded"
        samples = (await rig.benchmarks.find(id_)).samples
        assert [(one.ok, one.error) for one in samples] == [(True, None), (False, "out of \\ud800 order")]
        assert rig.benchmarks.scores() == {("cpu", "tiny:latest"): pytest.approx(0.5 / 1.04)}


@pytest.mark.parametrize("refused", ["overloaded", "queue_full", "rate_limited"])
async def test_a_refusal_that_passes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.0)
    async with rigged(tmp_path) as rig:
        full = NotAnsweredError("full", reason=Reason.OVERLOADED, refused=refused)
        rig.requests.says = lambda number: full if number in (1, 2, 4, 5) else "yes"
        rig.start()
        id_ = await rig.submit()
        assert await rig.ended(id_) == "succeeded"
        assert len(rig.requests.asked) == 6
        found = await rig.benchmarks.find(id_)
        assert (found.waits_for, [one.ok for one in found.samples]) == (None, [True])


async def test_a_wait_is_shown_while_it_lasts_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.0)
    async with rigged(tmp_path) as rig:
        seen: list[str | None] = []

        def says(number: int) -> Any:
            assert rig.benchmarks._running is not None
            seen.append(rig.benchmarks._running.waits_for)
            full = NotAnsweredError("full", reason=Reason.OVERLOADED, refused="overloaded")
            return full if number == 1 else "yes"

        rig.requests.says = says
        rig.start()
        assert await rig.ended(await rig.submit()) == "succeeded"
        assert seen == [None, "full", None]


async def test_a_fault_of_the_program_fails_one_benchmark_and_no_other(tmp_path: Path) -> None:
    async with rigged(tmp_path) as rig:
        rig.requests.says = lambda number: ZeroDivisionError() if number == 2 else "yes"
        rig.start()
        ids = [await rig.submit() for _ in range(2)]
        assert [await rig.ended(one) for one in ids] == ["failed", "succeeded"]
        assert "its log says more" in (rig.benchmarks._get(ids[0]).error or "")


async def test_an_end_that_cannot_be_stored_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_S", 0.0)
    async with rigged(tmp_path) as rig:
        save, failures = rig.registry.save_benchmark, [0]

        async def fails_twice(one: Any, samples: Any, kept: int) -> None:
            if one.status is BenchmarkStatus.SUCCEEDED and failures[0] < 2:
                failures[0] += 1
                raise RegistryUnwritableError("the disk is full")
            await save(one, samples, kept)

        rig.registry.save_benchmark = fails_twice
        rig.start()
        id_ = await rig.submit()
        assert await rig.ended(id_) == "succeeded"
        await until(lambda: rig.benchmarks._running is None)
        stored = await rig.registry.benchmark(id_)
        assert (failures, stored[0].status.value, len(stored[1])) == ([2], "succeeded", 1)


async def test_what_runs_as_the_daemon_ends_is_interrupted_at_once(tmp_path: Path) -> None:
    async with rigged(tmp_path) as rig:
        rig.requests.go.clear()
        rig.start()
        ids = [await rig.submit() for _ in range(2)]
        await until(lambda: rig.requests.asked)
        await rig.stop()
        assert [rig.status(one) for one in ids] == ["interrupted", "queued"]
        stored = {one.id: one.status.value for one in await rig.registry.benchmarks()}
        assert [stored[one] for one in ids] == ["interrupted", "queued"]
        assert rig.events == ["benchmark_started", "benchmark_interrupted"]


async def test_what_a_crash_has_left_running_is_interrupted_with_what_it_had_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SAVE_EVERY_S", 0.0)
    async with rigged(tmp_path) as rig:

        def says(number: int) -> str:
            if number == 2:
                rig.requests.go.clear()
            return "yes"

        rig.requests.says = says
        rig.start()
        id_ = await rig.submit("a")
        await until(lambda: len(rig.requests.asked) == 3)
        found = await rig.benchmarks.find(id_)
        assert (found.benchmark.status.value, found.benchmark.done, len(found.samples)) == ("running", 1, 1)
        saved = rig.registry.save_benchmark

        async def nothing(*_: Any) -> None:
            raise RegistryUnwritableError("the process is gone")

        rig.registry.save_benchmark = nothing
        await rig.stop()
        rig.registry.save_benchmark = saved
    async with rigged(tmp_path, recovers=False) as rig:
        assert rig.status(id_) == "running", "a sweep leaves what another process runs"
    async with rigged(tmp_path) as rig:
        found = await rig.benchmarks.find(id_)
        assert (found.benchmark.status.value, found.benchmark.done) == ("interrupted", 1)
        assert [one.quality for one in found.samples] == [1.0]
        assert rig.events == ["benchmark_interrupted"]


async def test_a_workload_that_is_gone_after_a_restart_fails_the_benchmark(tmp_path: Path) -> None:
    async with rigged(tmp_path) as rig:
        id_ = await rig.submit("a")
    async with rigged(tmp_path, {"b": WORKLOADS["b"]}) as rig:
        rig.start()
        assert await rig.ended(id_) == "failed"
        assert rig.benchmarks._get(id_).error == "there is no workload 'a' any more"
        assert not rig.requests.asked


def samples(**changes: Any) -> list[Sample]:
    values: dict[str, Any] = {
        "workload": "w",
        "prompt": "p",
        "instance": "lab",
        "model": "m:latest",
        "ok": True,
    }
    return [Sample(**(values | {"ttft_ms": 0.0, "quality": 0.5} | changes))]


async def report(rig: Rig, **changes: Any) -> str:
    done = await rig.benchmarks.report("lab", samples(**changes), "default", started_at=None, ended_at=None)
    return done.id


async def test_only_the_newest_are_kept_in_memory_as_in_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT_BENCHMARKS", 2)
    async with rigged(tmp_path) as rig:
        waiting = await rig.submit()
        ids = [await report(rig, model=f"m{number}:latest") for number in range(4)]
        assert set(rig.benchmarks._all) == {waiting, *ids[2:]}
        assert {one.id for one in await rig.registry.benchmarks()} == {waiting, *ids[2:]}
        assert [model for _, model in rig.benchmarks.scores()] == ["m2:latest", "m3:latest"]


async def test_a_benchmark_that_is_removed_scores_nothing_any_more(tmp_path: Path) -> None:
    async with rigged(tmp_path) as rig:
        old, new = await report(rig, quality=0.25), await report(rig, quality=1.0)
        before, revision = rig.benchmarks.scores(), rig.revision.number
        assert before == {("lab", "m:latest"): 1.0}
        assert await rig.benchmarks.remove(new) is None
        assert rig.benchmarks.scores() == {("lab", "m:latest"): 0.25}
        assert before == {("lab", "m:latest"): 1.0}, "a snapshot stays as it was"
        assert rig.benchmarks._scores.of("lab", "m:latest") == 0.25
        assert rig.revision.number > revision, "routing decides anew"
        await rig.benchmarks.remove(old)
        assert rig.benchmarks.scores() == {}
        assert rig.benchmarks._scores.of("lab", "m:latest") is None
        with pytest.raises(UnknownBenchmarkError):
            await rig.benchmarks.remove(old)


async def test_a_report_without_an_answer_has_failed(tmp_path: Path) -> None:
    async with rigged(tmp_path) as rig:
        id_ = await report(rig, ok=False, ttft_ms=None, quality=None, error="gone")
        found = rig.benchmarks._get(id_)
        assert (found.status.value, found.error) == ("failed", "gone")
        many = [one for number in range(65) for one in samples(instance=f"i{number}")]
        with pytest.raises(InvalidRequestError, match="65 pairs of a workload"):
            await rig.benchmarks.report("lab", many, "default", started_at=None, ended_at=None)


async def test_a_cancel_that_cannot_be_stored_leaves_the_benchmark_queued(tmp_path: Path) -> None:
    async with rigged(tmp_path) as rig:
        id_ = await rig.submit()
        save = rig.registry.save_benchmark

        async def fails(*_: Any) -> None:
            raise RegistryUnwritableError("the disk is full")

        rig.registry.save_benchmark = fails
        with pytest.raises(RegistryUnwritableError):
            await rig.benchmarks.remove(id_)
        assert rig.status(id_) == "queued"
        rig.registry.save_benchmark = save
        cancelled = await rig.benchmarks.remove(id_)
        assert cancelled is not None
        assert cancelled.status is BenchmarkStatus.CANCELLED


# --- the plan ---


@pytest.mark.parametrize(
    ("wanted", "targets"),
    [
        ({"model": "tiny"}, [("cpu", "tiny:latest")]),
        ({"model": "role"}, [("cpu", "tiny:latest")]),
        ({"model": None}, [("cpu", "tiny:latest")]),
        ({"model": None, "instance": "cpu"}, [("cpu", "tiny:latest")]),
    ],
)
async def test_paid_servers_and_models_without_words_are_not_measured(
    tmp_path: Path, wanted: dict[str, Any], targets: list[tuple[str, str]]
) -> None:
    async with rigged(tmp_path) as rig:
        one = rig.benchmarks._get(await rig.submit(**wanted))
        assert list(one.targets) == targets
        assert (one.total, one.status.value) == (1, "queued")
        every = await rig.benchmarks.submit(NewBenchmark(model="tiny", repeat=3), "default")
        assert (every.workloads, every.total) == (("a", "b"), 9)


@pytest.mark.parametrize(
    ("wanted", "kind", "said"),
    [
        ({"model": "none"}, UnknownModelError, "no instance has the model 'none'"),
        ({"model": "lost"}, UnknownModelError, "no instance has the model 'lost'"),
        ({"repeat": 1001}, InvalidRequestError, "1001 requests; at most 1000"),
        ({"instance": "paid"}, InvalidRequestError, "paid is a paid server"),
    ],
)
async def test_what_cannot_be_planned_is_refused(
    tmp_path: Path, wanted: dict[str, Any], kind: type[Exception], said: str
) -> None:
    async with rigged(tmp_path) as rig:
        with pytest.raises(kind, match=said):
            await rig.submit(**wanted)
        assert not rig.benchmarks._all


async def test_no_more_than_some_wait(tmp_path: Path) -> None:
    async with rigged(tmp_path) as rig:
        for _ in range(module.MOST_OPEN):
            await rig.submit()
        with pytest.raises(BenchmarksFullError, match="16 benchmarks wait or run"):
            await rig.submit()
