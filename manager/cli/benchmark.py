"""`benchmark`: measure models by workloads, and look at, compare and end benchmarks."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import click

from manager.cli.collections import daemon_at
from manager.cli.commands import _JSON, _talks
from manager.cli.failures import DONE, FAILED, MISUSED, CommandError, complain, printable, warn
from manager.cli.printing import local_time, print_json, print_rows

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from manager.cli.client import Daemon

_API = "/api/v1/benchmarks"
_LOOK_S = 0.5
_OPEN = ("queued", "running")
_LIST = ("ID", "STATUS", "SOURCE", "WORKLOADS", "TARGETS", "DONE", "SCORE", "CREATED")
_RESULTS = ("WORKLOAD", "INSTANCE", "MODEL", "TTFT", "TOKENS/S", "SUCCESS", "QUALITY", "SCORE")
_SPREAD = ("WORKLOAD", "INSTANCE", "MODEL", "FIGURE", "", "MEAN", "P50", "P95", "STDDEV")
_FIGURES = {
    "ttft_ms": "time to first token",
    "tokens_per_s": "tokens/s",
    "success": "success",
    "quality": "quality",
}
_SHARES = ("success", "quality")
_SHOWN_FAILURES = 10

_ID = click.argument("benchmark_id", metavar="ID")


@click.group("benchmark")
def benchmark_group() -> None:
    """Benchmarks: how well and how fast models answer the prompts of workloads."""


@benchmark_group.command("run")
@click.option("--workload", "workloads", multiple=True, metavar="W", help="A workload; all of them without.")
@click.option("--instance", metavar="I", help="The only instance; else each that has the model.")
@click.option("--model", metavar="M", help="A model or a role; else those that are in memory.")
@click.option("--repeat", type=click.IntRange(1, 50), default=1, show_default=True, help="How often to ask.")
@click.option("--no-wait", is_flag=True, help="Print the id, and do not wait for the end.")
@_JSON
@_talks
def run_benchmark(
    url: str | None, config: Path | None, *, no_wait: bool, as_json: bool, **wanted: Any
) -> int:
    """Measure models, and wait for the end. Ends with 1 where it has not succeeded.

    It takes free slots only: requests of others come first. Ctrl-C leaves it running.
    """
    daemon = daemon_at(url, config)
    body = {name: value for name, value in wanted.items() if value not in (None, ())}
    started = daemon.ask("POST", _API, body, is_long=True)
    if no_wait:
        if as_json:
            print_json(started)
        else:
            click.echo(printable(str(started["id"])))
        return DONE
    one = _ended(daemon, str(started["id"]))
    if as_json:
        print_json(one)
    else:
        daemon.read(_print, one)
    if one["status"] != "succeeded":
        complain(f"{one['id']} is {one['status']}" + (f": {one['error']}" if one["error"] else ""))
        return FAILED
    return DONE


@benchmark_group.command("list")
@click.option("--model", metavar="M", help="Only those of this model.")
@click.option("--instance", metavar="I", help="Only those of this instance.")
@click.option("--workload", metavar="W", help="Only those of this workload.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True, help="At most so many.")
@_JSON
@_talks
def list_benchmarks(url: str | None, config: Path | None, *, as_json: bool, **asked: Any) -> None:
    """List the newest benchmarks first."""
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    daemon = daemon_at(url, config)
    document = daemon.ask("GET", f"{_API}?{query}")
    if as_json:
        print_json(document)
    else:
        print_rows(_LIST, daemon.read(lambda it: [_row(one) for one in it["benchmarks"]], document))


@benchmark_group.command("show")
@_ID
@_JSON
@_talks
def show_benchmark(benchmark_id: str, url: str | None, config: Path | None, *, as_json: bool) -> None:
    """Show one benchmark: its figures, and the requests that were not answered."""
    daemon = daemon_at(url, config)
    one = daemon.ask("GET", _path(benchmark_id))
    if as_json:
        print_json(one)
    else:
        daemon.read(_print, one)


@benchmark_group.command("compare")
@click.argument("a", metavar="ID")
@click.argument("b", metavar="ID")
@_JSON
@_talks
def compare_benchmarks(a: str, b: str, url: str | None, config: Path | None, *, as_json: bool) -> None:
    """Show two benchmarks side by side, with the spread of each figure and the difference of the means."""
    daemon = daemon_at(url, config)
    document = daemon.ask("GET", f"{_API}/compare?{urlencode({'a': a, 'b': b})}")
    if as_json:
        print_json(document)
    else:
        print_rows(_SPREAD, daemon.read(_compared_rows, document))


@benchmark_group.command("cancel")
@_ID
@_talks
def cancel_benchmark(benchmark_id: str, url: str | None, config: Path | None) -> None:
    """Cancel a benchmark that waits or runs; its request has ended when this command ends.

    One that has ended is refused: this command removes no results.
    """
    daemon = daemon_at(url, config)
    one = daemon.ask("GET", _path(benchmark_id))
    if one["status"] not in _OPEN:
        raise CommandError(f"{benchmark_id} has ended: it is {one['status']}")
    document = daemon.ask("DELETE", _path(benchmark_id), is_long=True)
    click.echo(f"{printable(str(document['id']))} is {document['status']}")


# --- helpers, in call order ---


def _path(benchmark_id: str) -> str:
    if benchmark_id in ("", ".", ".."):
        raise CommandError(f"{benchmark_id!r} is no id of a benchmark", exit_code=MISUSED)
    return f"{_API}/{quote(benchmark_id, safe='')}"


def _ended(daemon: Daemon, benchmark_id: str) -> dict[str, Any]:
    """Return the benchmark once it has ended, showing how far it is meanwhile."""
    is_terminal, shown = sys.stderr.isatty(), ""
    while (one := daemon.ask("GET", _path(benchmark_id)))["status"] in _OPEN:
        text = f"{benchmark_id} {one['status']}: {one['done']}/{one['total']} requests"
        line = printable(text + (f", waits: {one['waits_for']}" if one["waits_for"] else ""))
        if line != shown:
            click.echo(f"\r\x1b[K{line}" if is_terminal else line, err=True, nl=not is_terminal)
            shown = line
        time.sleep(_LOOK_S)
    if shown and is_terminal:
        click.echo("\r\x1b[K", err=True, nl=False)
    return one


def _print(one: Mapping[str, Any]) -> None:
    shown = {
        "id": one["id"],
        "status": one["status"],
        "source": one["source"],
        "requests": f"{one['done']} of {one['total']}",
        "waits for": one["waits_for"],
        "error": one["error"],
        "created": local_time(one["created_at"]),
        "started": one["started_at"] and local_time(one["started_at"]),
        "ended": one["ended_at"] and local_time(one["ended_at"]),
    }
    width = max(map(len, shown))
    for name, value in shown.items():
        if value is not None:
            click.echo(f"{name.ljust(width)}  {printable(str(value))}")
    if one["results"]:
        click.echo()
        print_rows(_RESULTS, map(_result_row, one["results"]))
    failures = [sample for sample in one["samples"] if not sample["ok"]]
    for sample in failures[:_SHOWN_FAILURES]:
        place = f"{sample['workload']}/{sample['prompt']} of {sample['model']} on {sample['instance']}"
        warn(f"{place}: {sample['error']}")
    if len(failures) > _SHOWN_FAILURES:
        warn(f"{len(failures) - _SHOWN_FAILURES} more requests were not answered: --json lists them")


def _row(one: Mapping[str, Any]) -> tuple[object, ...]:
    scores = [result["score"] for result in one["results"]]
    return (
        one["id"],
        one["status"],
        one["source"],
        ",".join(one["workloads"]),
        ",".join(f"{it['model']}@{it['instance']}" for it in one["targets"]),
        f"{one['done']}/{one['total']}",
        f"{sum(scores) / len(scores):.3f}" if scores else None,
        local_time(one["created_at"]),
    )


def _result_row(one: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        one["workload"],
        one["instance"],
        one["model"],
        _number("ttft_ms", one["ttft_ms"]["p50"]),
        _number("tokens_per_s", one["tokens_per_s"]["p50"]),
        _number("success", one["success"]["mean"]),
        _number("quality", one["quality"]["mean"]),
        f"{one['score']:.3f}",
    )


def _compared_rows(document: Mapping[str, Any]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for result in document["results"]:
        place = (result["workload"], result["instance"], result["model"])
        for name, words in _FIGURES.items():
            compared = result[name]
            for side in ("a", "b"):
                spread = (_number(name, compared[side][key]) for key in ("mean", "p50", "p95", "stddev"))
                rows.append((*place, words, side, *spread))
            rows.append((*place, words, "b - a", _number(name, compared["difference"]), None, None, None))
        score = result["score"]
        for side, value in (("a", score["a"]), ("b", score["b"]), ("b - a", score["difference"])):
            rows.append((*place, "score", side, None if value is None else f"{value:.3f}", None, None, None))
    return rows


def _number(figure: str, value: float | None) -> str | None:
    if value is None:
        return None
    if figure in _SHARES:
        return f"{100 * value:.1f}%"
    return f"{value:.0f} ms" if figure == "ttft_ms" else f"{value:.1f}"
