"""`tiers`: the models of each tier, and what choosing by tier has answered and saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.failures import warn
from manager.cli.options import when
from manager.cli.printing import local_time, print_json, table
from manager.cli.tables import duration
from manager.cli.usage import NUMBERS, number_cells, time_text
from manager.domain.models import model_key

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from manager.cli.client import Daemon

_MODELS = "/api/v1/llm/models"
_STATS = "/api/v1/llm/routing-stats"
_MINUTE_S = 60.0
_HEADING = (
    "TIER",
    "MODEL",
    "STATUS",
    "ON",
    "EXPECTED",
    "MEASURED",
    "COST",
    "CONTEXT",
    "MAX TOKENS",
    "TEMPERATURE",
    "CAPABILITIES",
)


@click.group("tiers", invoke_without_command=True)
@_JSON
@_talks
@click.pass_context
def tiers_group(context: click.Context, *, as_json: bool, url: str | None, config: Path | None) -> None:
    """Show the models of each tier in the order in which they are tried, with facts. Starts nothing.

    `tiers stats` shows what the tiers have answered, and about how much time that has saved.
    """
    if context.invoked_subcommand is not None:
        return
    daemon = _daemon(url, config)
    document = daemon.ask("GET", _MODELS)
    if as_json:
        print_json(document)
        return
    lines, is_on = daemon.read(_lines, document)
    if lines:
        click.echo("\n".join(lines))
    else:
        click.echo("no tiers: no role fast, medium or complex, and no facts that name a tier", err=True)
    if not is_on:
        warn("`model: auto` is not understood; set routing.auto: true in the configuration")


@tiers_group.command("stats")
@click.option(
    "--since",
    metavar="WHEN",
    callback=when,
    help="today, yesterday, a span such as 7d, or a time.  [default: 1d]",
)
@click.option("--until", metavar="WHEN", callback=when, help="As --since.  [default: now]")
@_JSON
@_talks
def stats_command(
    *, since: str | None, until: str | None, as_json: bool, url: str | None, config: Path | None
) -> None:
    """Show the requests to each tier: by tier, by model, how many fell back, and what that has saved.

    Times are widened to whole hours. The time saved is an estimate: it compares the times of the lower tiers
    with the mean of `complex`.
    """
    daemon = _daemon(url, config)
    given = {name: value for name, value in (("from", since), ("to", until)) if value is not None}
    document = daemon.ask("GET", f"{_STATS}?{urlencode(given)}" if given else _STATS)
    if as_json:
        print_json(document)
    else:
        click.echo("\n".join(daemon.read(_stats, document)))


# --- helpers, in call order ---


def _daemon(url: str | None, config: Path | None) -> Daemon:
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    return Daemon(find_daemon(url or _common_url(), config))


def _lines(document: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Return the lines of the table, none without a tier, and whether `auto` is understood."""
    known = {model_key(one["name"]): one for one in document["models"]}
    rows: list[tuple[object, ...]] = []
    for tier, models in document["tiers"].items():
        if not models:
            rows.append((tier, None, "no model of its own", *([None] * (len(_HEADING) - 3))))
        rows += [(tier, name, *_facts(known[model_key(name)])) for name in models]
    return table(_HEADING, rows) if rows else [], bool(document["auto"])


def _facts(one: Mapping[str, Any]) -> tuple[object, ...]:
    status = "loaded" if one["loaded"] else "available" if one["available"] else "missing"
    return (
        status,
        ", ".join(one["instances"]),
        time_text(one["expected_latency_ms"]),
        time_text(one["latency_ms"]),
        f"{one['cost_factor']:g}",
        one["context_window"],
        one["max_tokens"],
        one["temperature"],
        ", ".join(one["capabilities"]),
    )


def _stats(document: Mapping[str, Any]) -> list[str]:
    total = document["total"]
    tiers = [(one["tier"], *number_cells(one)) for one in document["by_tier"]]
    models = [(one["model"] or None, *number_cells(one)) for one in document["by_model"]]
    lines = [
        f"{local_time(document['from'])} to {local_time(document['to'])}",
        *table(("TIER", *NUMBERS), [*tiers, ("total", *number_cells(total))]),
    ]
    if models:
        lines += ["", *table(("MODEL", *NUMBERS), models)]
    return [*lines, "", f"fallbacks: {document['fallback_rate']:.1%}", _saved(document["saved"])]


def _saved(saved: Mapping[str, Any]) -> str:
    seconds, answered = saved["seconds"], f"answered below complex: {saved['requests']}"
    if seconds is None:
        return f"saved: unknown, for complex has answered nothing ({answered})"
    took = duration(abs(seconds)) if abs(seconds) >= _MINUTE_S else f"{abs(seconds):g} s"
    return f"{'lost' if seconds < 0 else 'saved'}: about {took} ({answered})"
