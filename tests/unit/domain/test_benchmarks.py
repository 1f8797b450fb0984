"""Checks of answers, figures with their spread, scores, and benchmarks side by side."""

from __future__ import annotations

import statistics
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.benchmark_results import OPEN, Benchmark, BenchmarkStatus, compared, latest
from manager.domain.benchmarks import (
    HALF_LATENCY_S,
    NO_FIGURE,
    Check,
    CheckKind,
    Sample,
    Target,
    figure,
    groups_of,
    passes,
    quality,
    score_of,
    without_thinking,
)

NOW = datetime(2026, 11, 29, tzinfo=UTC)
SHARES = st.floats(0, 1)
SECONDS = st.floats(0, 1e6)


@pytest.mark.parametrize(
    ("kind", "value", "answer", "expected"),
    [
        ("contains", "Big  Cat", "one big\ncat", True),
        ("contains", "cat", "dog", False),
        ("any_of", ("cat", "dog"), "a DOG", True),
        ("any_of", ("cat", "dog"), "a cow", False),
        ("equals", "Yes", "  yes\n", True),
        ("equals", "Yes", "yes!", False),
        ("regex", r"^\d+$", "42", True),
        ("regex", r"^\d+$", "42 apples", False),
        ("regex", "yes", "YES", False),
        ("max_words", 2, "one two", True),
        ("max_words", 2, "one two three", False),
        ("json", True, "[1]", True),
        ("json", True, "{", False),
        ("json", True, "[" * 100_000, False),
        ("json", ("a", "b"), '{"a": 1, "b": null}', True),
        ("json", ("a", "b"), '{"a": 1}', False),
        ("json", ("a",), '["a"]', False),
    ],
)
def test_an_answer_passes_a_check_or_not(kind: str, value: Any, answer: str, expected: bool) -> None:
    assert passes(Check(CheckKind(kind), value), answer) is expected


def test_every_kind_of_check_is_decided() -> None:
    values: dict[CheckKind, Any] = {CheckKind.ANY_OF: ("x",), CheckKind.MAX_WORDS: 1, CheckKind.JSON: True}
    assert all(isinstance(passes(Check(kind, values.get(kind, "x")), "x"), bool) for kind in CheckKind)


def test_thoughts_in_front_of_an_answer_are_no_part_of_it() -> None:
    assert without_thinking("<think>\n7? no, 8\n</think>\n8").strip() == "8"
    assert without_thinking("8 <think>7</think>") == "8 <think>7</think>"
    assert without_thinking("<think>without an end") == "<think>without an end"
    assert passes(Check(CheckKind.EQUALS, "8"), " <think>a lot of words</think> 8")
    assert passes(Check(CheckKind.MAX_WORDS, 1), "<think>a lot of words</think> 8")


def test_the_quality_is_the_share_of_the_checks_that_are_passed() -> None:
    checks = [Check(CheckKind.CONTAINS, word) for word in ("a", "b", "c", "d")]
    assert quality(checks, "a b c") == 0.75
    assert quality([], "anything") == 1.0


# --- figures ---


def test_a_figure_of_nothing_has_nothing() -> None:
    assert figure([]) == NO_FIGURE
    assert (NO_FIGURE.count, NO_FIGURE.mean, NO_FIGURE.p50) == (0, None, None)


def test_a_figure_has_the_spread_of_its_values() -> None:
    one = figure([7.0])
    assert (one.count, one.mean, one.p50, one.p95, one.stddev) == (1, 7.0, 7.0, 7.0, None)
    ten = figure(range(10, 0, -1))
    assert (ten.count, ten.mean, ten.p50) == (10, 5.5, 5.5)
    assert ten.p95 == pytest.approx(9.55)
    assert ten.stddev == pytest.approx(statistics.stdev(range(1, 11)))


@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=50))
def test_a_figure_lies_within_its_values(values: list[float]) -> None:
    found = figure(values)
    assert found.mean is not None
    assert found.p50 is not None
    assert found.p95 is not None
    assert found.stddev is not None
    assert min(values) <= found.mean <= max(values)
    assert min(values) <= found.p50 <= found.p95 <= max(values)
    assert found.p50 == pytest.approx(statistics.median(values), rel=1e-9, abs=1e-6)
    assert found.stddev == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-6)
    assert figure(reversed(values)) == found


# --- scores ---


@given(SHARES, SHARES, SECONDS)
def test_a_score_is_within_0_and_1(good: float, answered: float, latency_s: float) -> None:
    assert 0.0 <= score_of(good, answered, latency_s) <= 1.0


@given(st.tuples(SHARES, SHARES), st.tuples(SHARES, SHARES), st.tuples(SECONDS, SECONDS))
def test_better_figures_never_lower_a_score(
    good: tuple[float, float], answered: tuple[float, float], latency_s: tuple[float, float]
) -> None:
    assert score_of(min(good), min(answered), max(latency_s)) <= score_of(
        max(good), max(answered), min(latency_s)
    )


def test_a_score_is_quality_by_success_discounted_by_latency() -> None:
    assert score_of(1.0, 1.0, 0.0) == 1.0
    assert score_of(0.8, 0.5, 0.0) == 0.4
    assert score_of(1.0, 1.0, HALF_LATENCY_S) == 0.5
    assert score_of(1.0, 0.0, 1.0) == 0.0


# --- groups ---


def sample(**changes: Any) -> Sample:
    values: dict[str, Any] = {
        "workload": "w",
        "prompt": "p",
        "instance": "cpu",
        "model": "tiny:latest",
        "ok": True,
        "ttft_ms": 100.0,
        "tokens_per_s": 10.0,
        "quality": 1.0,
    }
    return Sample(**(values | changes))


def test_figures_of_a_request_without_an_answer_do_not_count() -> None:
    (one,) = groups_of([sample(), sample(ok=False, ttft_ms=900.0, quality=0.0)])
    assert (one.ttft_ms.mean, one.quality.mean, one.success.mean) == (100.0, 1.0, 0.5)


LOST = sample(ok=False, ttft_ms=None, tokens_per_s=None, quality=None, error="gone")


def test_samples_are_grouped_by_workload_instance_and_model() -> None:
    found = groups_of(
        [
            sample(ttft_ms=5000.0, quality=0.5),
            sample(workload="v"),
            LOST,
            sample(ttft_ms=None, tokens_per_s=None, quality=None),
            sample(model="other:latest"),
            sample(instance="gpu0"),
        ]
    )
    assert [(one.workload, *one.target) for one in found] == [
        ("w", "cpu", "tiny:latest"),
        ("v", "cpu", "tiny:latest"),
        ("w", "cpu", "other:latest"),
        ("w", "gpu0", "tiny:latest"),
    ]
    first = found[0]
    assert first.success.mean == pytest.approx(2 / 3)
    assert (first.quality.count, first.quality.mean, first.ttft_ms.count) == (1, 0.5, 1)
    assert first.score == pytest.approx(0.5 * 2 / 3 / 2)
    assert first.is_answered


def test_a_group_without_an_answer_has_no_quality_and_the_score_0() -> None:
    (lost,) = groups_of([LOST, LOST])
    assert not lost.is_answered
    assert (lost.success.mean, lost.quality, lost.score) == (0.0, NO_FIGURE, 0.0)


# --- benchmarks ---


def benchmark(number: int, *samples: Sample, status: str = "succeeded", **changes: Any) -> Benchmark:
    one = Benchmark(
        number=number,
        id=f"bench_{number}",
        status=BenchmarkStatus(status),
        source="local",
        project="default",
        workloads=("w",),
        targets=(Target("cpu", "tiny:latest"),),
        repeat=1,
        total=len(samples),
        created_at=NOW,
    )
    return replace(one.measured(samples), **changes)


def test_a_benchmark_moves_only_where_its_status_leads() -> None:
    leads = {
        (one, other)
        for one in BenchmarkStatus
        for other in BenchmarkStatus
        if _may_move(benchmark(1, status=one), other)
    }
    queued, running = BenchmarkStatus.QUEUED, BenchmarkStatus.RUNNING
    ends = set(BenchmarkStatus) - {queued, running}
    expected = {(queued, running), (queued, BenchmarkStatus.CANCELLED)}
    assert leads == expected | {(running, end) for end in ends}
    assert {queued, running} == OPEN
    assert benchmark(1, status="running").is_open
    assert not benchmark(1).is_open


def _may_move(one: Benchmark, status: BenchmarkStatus) -> bool:
    try:
        one.moved(status, NOW)
    except ValueError:
        return False
    return True


def test_a_move_notes_when_and_why() -> None:
    running = benchmark(1, status="queued").moved(BenchmarkStatus.RUNNING, NOW)
    assert (running.started_at, running.ended_at) == (NOW, None)
    failed = running.moved(BenchmarkStatus.FAILED, NOW, "why")
    assert (failed.ended_at, failed.error) == (NOW, "why")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, True),
        ({"instance": "cpu"}, True),
        ({"instance": "gpu0"}, True),
        ({"instance": "gpu1"}, False),
        ({"model": "tiny:latest"}, True),
        ({"model": "other:latest", "instance": "gpu0"}, True),
        ({"model": "other:latest", "instance": "cpu"}, False),
        ({"workload": "w"}, True),
        ({"workload": "v"}, False),
    ],
)
def test_a_benchmark_concerns_what_it_plans_and_what_it_has_measured(
    asked: dict[str, str], expected: bool
) -> None:
    one = benchmark(1, sample(instance="gpu0", model="other:latest"))
    wanted = {"instance": None, "model": None, "workload": None} | asked
    assert one.concerns(**wanted) is expected


def test_the_newest_benchmark_that_has_succeeded_counts_for_each_workload() -> None:
    old = benchmark(1, sample(quality=0.2, ttft_ms=0.0), sample(workload="v", quality=0.4, ttft_ms=0.0))
    new = benchmark(2, sample(quality=0.6, ttft_ms=0.0), sample(instance="gpu0", quality=None))
    cut = benchmark(3, sample(quality=1.0), status="cancelled")
    lost = benchmark(4, LOST)
    found = latest([new, lost, old, cut])
    (one,) = found
    assert one.target == ("cpu", "tiny:latest")
    assert [(by.id, group.workload) for by, group in one.measured] == [("bench_1", "v"), ("bench_2", "w")]
    assert one.score == pytest.approx((0.4 + 0.6) / 2)
    assert latest([]) == ()


@given(
    st.lists(
        st.builds(
            sample,
            workload=st.sampled_from("wv"),
            instance=st.sampled_from(["cpu", "gpu0"]),
            ok=st.just(True),
            ttft_ms=st.none() | st.floats(0, 1e6),
            quality=st.none() | SHARES,
        ),
        max_size=20,
    )
)
def test_every_score_of_a_model_is_within_0_and_1(samples: list[Sample]) -> None:
    assert all(0.0 <= one.score <= 1.0 for one in latest([benchmark(1, *samples)]))


# --- side by side ---


def test_the_same_groups_are_side_by_side_with_their_difference() -> None:
    a = groups_of([sample(tokens_per_s=10.0), sample(workload="v")])
    b = groups_of([sample(workload="u"), sample(tokens_per_s=15.0, ttft_ms=None)])
    found = compared(a, b)
    assert [one.workload for one in found] == ["w", "v", "u"]
    both, left, right = found
    assert (both.instance, both.model) == ("cpu", "tiny:latest")
    speeds = both.figures["tokens_per_s"]
    assert (speeds.a.mean, speeds.b.mean, speeds.difference) == (10.0, 15.0, 5.0)
    assert both.figures["ttft_ms"].difference is None
    assert set(both.figures) == {"ttft_ms", "tokens_per_s", "success", "quality"}
    assert left.score_a == right.score_b == pytest.approx(1 / 1.02)
    assert left.score_b is None
    assert right.score_a is None
    assert right.figures["quality"].a == NO_FIGURE


def test_two_models_are_compared_where_each_benchmark_has_one() -> None:
    a = groups_of([sample()])
    b = groups_of([sample(instance="gpu0", model="other:latest")])
    (one,) = compared(a, b)
    assert (one.instance, one.model) == ("cpu / gpu0", "tiny:latest / other:latest")
    assert one.figures["quality"].difference == 0.0
    more = groups_of([sample(instance="gpu0"), sample(instance="gpu1")])
    assert [(one.instance, one.score_a is None) for one in compared(a, more)] == [
        ("cpu", False),
        ("gpu0", True),
        ("gpu1", True),
    ]
    assert len(compared(more, a)) == 3
    assert compared((), ()) == ()
