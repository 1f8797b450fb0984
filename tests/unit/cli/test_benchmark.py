"""`ollama-manager benchmark`, against an HTTP server that answers like a daemon."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from manager.cli import benchmark
from tests.unit.cli.stand_in import Answer, error

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from tests.unit.cli.stand_in import StandInDaemon

    Run = Callable[..., Result]

API = "/api/v1/benchmarks"
ONE = f"{API}/bench_1"


@pytest.fixture(autouse=True)
def found(daemon: StandInDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands talk to this daemon, and look often."""
    monkeypatch.setenv("OLLAMA_MANAGER_URL", daemon.url)
    monkeypatch.setattr(benchmark, "_LOOK_S", 0.0)


def a_figure(mean: float | None, **changes: Any) -> dict[str, Any]:
    return {"count": 2, "mean": mean, "p50": mean, "p95": mean, "stddev": None} | changes


RESULT = {
    "workload": "chat.short_reasoning",
    "instance": "cpu",
    "model": "tiny:latest",
    "score": 0.4999,
    "ttft_ms": a_figure(120.4),
    "tokens_per_s": a_figure(33.33),
    "success": a_figure(0.5),
    "quality": a_figure(None),
}
LOST = {
    "workload": "w",
    "prompt": "p",
    "instance": "cpu",
    "model": "tiny:latest",
    "ok": False,
    "error": "out of \x1b[2Jorder",
}


def a_benchmark(**changes: Any) -> dict[str, Any]:
    """A benchmark in the shape of the API: one that has succeeded, unless `changes` say otherwise."""
    return {
        "id": "bench_1",
        "status": "succeeded",
        "source": "local",
        "project_id": "default",
        "workloads": ["chat.short_reasoning"],
        "targets": [{"instance": "cpu", "model": "tiny:latest"}],
        "repeat": 1,
        "total": 2,
        "done": 2,
        "waits_for": None,
        "error": None,
        "created_at": "2026-11-28T12:00:00.000Z",
        "started_at": "2026-11-28T12:00:01.000Z",
        "ended_at": "2026-11-28T12:00:02.000Z",
        "results": [RESULT],
        "samples": [LOST],
    } | changes


def test_run_sends_what_is_given_and_prints_the_figures(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {API}"] = Answer({"id": "bench_1", "status": "queued"}, 202)
    daemon.answers[f"GET {ONE}"] = Answer(a_benchmark())
    options = ("--workload", "a", "--workload", "b", "--instance", "cpu", "--model", "tiny", "--repeat", "3")
    result = run("benchmark", "run", *options)
    assert result.exit_code == 0
    assert json.loads(daemon.seen[0].body) == {
        "workloads": ["a", "b"], "instance": "cpu", "model": "tiny", "repeat": 3,
    }  # fmt: skip
    heading, row = result.stdout.splitlines()[-2:]
    assert heading.split() == [
        "WORKLOAD",
        "INSTANCE",
        "MODEL",
        "TTFT",
        "TOKENS/S",
        "SUCCESS",
        "QUALITY",
        "SCORE",
    ]
    assert row.split() == [
        "chat.short_reasoning",
        "cpu",
        "tiny:latest",
        "120",
        "ms",
        "33.3",
        "50.0%",
        "-",
        "0.500",
    ]
    assert "warning: w/p of tiny:latest on cpu: out of order" in result.stderr
    run("benchmark", "run")
    assert json.loads(daemon.seen[-2].body) == {"repeat": 1}
    shown = run("benchmark", "run", "--json").stdout
    assert json.loads(shown) == a_benchmark()


def test_run_shows_how_far_it_is_and_ends_with_1_where_it_fails(
    daemon: StandInDaemon, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.answers[f"POST {API}"] = Answer({"id": "bench_1", "status": "queued"}, 202)
    states = [
        a_benchmark(status="running", done=1, waits_for="a slot"),
        a_benchmark(status="running", done=1, waits_for="a slot"),
        a_benchmark(status="failed", error="no answer", results=[]),
    ]

    def next_state(_seconds: float) -> None:
        daemon.answers[f"GET {ONE}"] = Answer(states.pop(0))

    next_state(0)
    monkeypatch.setattr("manager.cli.benchmark.time.sleep", next_state)
    result = run("benchmark", "run")
    assert result.exit_code == 1
    assert result.stderr.count("bench_1 running: 1/2 requests, waits: a slot\n") == 1
    assert "error: bench_1 is failed: no answer" in result.stderr
    assert "WORKLOAD" not in result.stdout


def test_run_without_waiting_prints_the_id(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"POST {API}"] = Answer({"id": "bench_1", "status": "queued"}, 202)
    assert run("benchmark", "run", "--no-wait").stdout == "bench_1\n"
    assert json.loads(run("benchmark", "run", "--no-wait", "--json").stdout)["status"] == "queued"
    assert {one.method for one in daemon.seen} == {"POST"}


def test_list_has_a_line_for_each(daemon: StandInDaemon, run: Run) -> None:
    listed = [a_benchmark(), a_benchmark(id="bench_0", status="queued", done=0, results=[])]
    document = {"benchmarks": listed, "count": 2, "available": []}
    query = "?model=tiny&instance=cpu&workload=w&limit=5"
    daemon.answers[f"GET {API}{query}"] = Answer(document)
    options = ("--model", "tiny", "--instance", "cpu", "--workload", "w", "--limit", "5")
    heading, first, second = run("benchmark", "list", *options).stdout.splitlines()
    assert heading.split() == ["ID", "STATUS", "SOURCE", "WORKLOADS", "TARGETS", "DONE", "SCORE", "CREATED"]
    assert first.split()[:7] == [
        "bench_1", "succeeded", "local", "chat.short_reasoning", "tiny:latest@cpu", "2/2", "0.500",
    ]  # fmt: skip
    assert second.split()[5:7] == ["0/2", "-"]
    assert json.loads(run("benchmark", "list", *options, "--json").stdout) == document


def test_show_has_all_of_one_and_the_first_failures(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {ONE}"] = Answer(a_benchmark(samples=[LOST] * 12))
    result = run("benchmark", "show", "bench_1")
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines()[:6])
    assert (lines["status"], lines["requests"], lines["source"]) == ("succeeded", "2 of 2", "local")
    assert result.stderr.count("out of order") == 10
    assert "2 more requests were not answered" in result.stderr
    assert json.loads(run("benchmark", "show", "bench_1", "--json").stdout)["id"] == "bench_1"
    daemon.answers[f"GET {ONE}"] = Answer(error("unknown_benchmark", "there is no benchmark 'bench_1'"), 404)
    result = run("benchmark", "show", "bench_1")
    assert result.exit_code == 2
    assert "`ollama-manager benchmark list`" in result.stderr
    assert run("benchmark", "show", "..").exit_code == 2


def test_compare_has_the_spread_of_each_figure_and_the_difference(daemon: StandInDaemon, run: Run) -> None:
    none = a_figure(None)
    result = {
        **{name: {"a": none, "b": none, "difference": None} for name in ("ttft_ms", "success", "quality")},
        "tokens_per_s": {
            "a": a_figure(10.0, stddev=1.5), "b": a_figure(12.25, p50=12.0, p95=13.0), "difference": 2.25,
        },
        "workload": "w",
        "instance": "cpu / gpu0",
        "model": "tiny:latest",
        "score": {"a": 0.5, "b": None, "difference": None},
    }  # fmt: skip
    document = {"a": a_benchmark(), "b": a_benchmark(id="bench_2"), "results": [result]}
    daemon.answers[f"GET {API}/compare?a=bench_1&b=bench_2"] = Answer(document)
    lines = run("benchmark", "compare", "bench_1", "bench_2").stdout.splitlines()
    assert lines[0].split() == ["WORKLOAD", "INSTANCE", "MODEL", "FIGURE", "MEAN", "P50", "P95", "STDDEV"]
    speeds = [line.split("tokens/s", 1)[1].split() for line in lines if "tokens/s" in line]
    assert speeds == [
        ["a", "10.0", "10.0", "10.0", "1.5"],
        ["b", "12.2", "12.0", "13.0", "-"],
        ["b", "-", "a", "2.2", "-", "-", "-"],
    ]
    scores = [line.split("score", 1)[1].split()[:2] for line in lines if "score" in line]
    assert scores[0] == ["a", "0.500"]
    shown = run("benchmark", "compare", "bench_1", "bench_2", "--json").stdout
    assert json.loads(shown) == document


def test_cancel_ends_one_that_is_open_and_removes_no_results(daemon: StandInDaemon, run: Run) -> None:
    daemon.answers[f"GET {ONE}"] = Answer(a_benchmark(status="running"))
    daemon.answers[f"DELETE {ONE}"] = Answer({"id": "bench_1", "status": "cancelled", "removed": False})
    assert run("benchmark", "cancel", "bench_1").stdout == "bench_1 is cancelled\n"
    daemon.answers[f"GET {ONE}"] = Answer(a_benchmark())
    result = run("benchmark", "cancel", "bench_1")
    assert result.exit_code == 1
    assert "bench_1 has ended: it is succeeded" in result.stderr
    assert [one.method for one in daemon.seen] == ["GET", "DELETE", "GET"]
