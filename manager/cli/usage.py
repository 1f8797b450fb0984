"""`usage`: who has used what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.options import when
from manager.cli.printing import local_time, print_json, table
from manager.domain.money import micro_usd, usd_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_PATH = "/api/v1/usage"
NUMBERS = ("REQUESTS", "SHARE", "OK", "FALLBACKS", "TOKENS IN", "TOKENS OUT", "COST", "MEAN", "P50", "P95")


@click.command("usage")
@click.option(
    "--by",
    default="project",
    show_default=True,
    metavar="WHAT,…",
    help="Some of project, key, role, model, instance, day, hour.",
)
@click.option(
    "--since",
    metavar="WHEN",
    callback=when,
    help="today, yesterday, a span such as 7d, or a time.  [default: 30d]",
)
@click.option("--until", metavar="WHEN", callback=when, help="As --since.  [default: now]")
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
@_JSON
@_talks
def usage_command(
    *,
    by: str,
    since: str | None,
    until: str | None,
    as_csv: bool,
    as_json: bool,
    url: str | None,
    config: Path | None,
) -> None:
    """Show what requests have used: tokens, cost and time, by project or whatever --by says.

    `--since yesterday --until today` is one day of this machine. Times are widened to whole hours; the days
    and hours of `--by day` and `--by hour` are in UTC. Hours are kept for 100 days.
    """
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other")
    daemon = Daemon(find_daemon(url or _common_url(), config))
    query = {"from": since, "to": until, "by": by}
    given = {name: value for name, value in query.items() if value is not None}
    if as_csv:
        with daemon.fetch(f"{_PATH}?{urlencode({**given, 'format': 'csv'})}", also=200) as answer:
            click.echo(answer.text, nl=False)
        return
    document = daemon.ask("GET", f"{_PATH}?{urlencode(given)}")
    if as_json:
        print_json(document)
    else:
        click.echo("\n".join(daemon.read(_lines, document)))


def _lines(document: Mapping[str, Any]) -> list[str]:
    by = document["by"]
    rows = [(*(one[name] or None for name in by), *number_cells(one)) for one in document["rows"]]
    if len(rows) != 1:
        rows.append(("total", *([""] * (len(by) - 1)), *number_cells(document["total"])))
    lines = table((*map(str.upper, by), *NUMBERS), rows)
    if document["more"]:
        lines.append(f"and {document['more']} more")
    return [f"{local_time(document['from'])} to {local_time(document['to'])}", *lines]


def number_cells(one: Mapping[str, Any]) -> tuple[object, ...]:
    """Return the cells of `NUMBERS` for an `api.usage.UsageNumbers`."""
    return (
        one["requests"],
        f"{one['share']:.1%}",
        one["ok"],
        one["fallbacks"],
        one["input_tokens"],
        one["output_tokens"],
        f"{usd_text(micro_usd(one['cost_usd']))} USD",
        time_text(one["mean_ms"]),
        time_text(one["p50_ms"]),
        time_text(one["p95_ms"]),
    )


def time_text(value_ms: float | None) -> str | None:
    """Return milliseconds or seconds; None where the time is not known."""
    if value_ms is None:
        return None
    return f"{value_ms:.0f} ms" if value_ms < 1000 else f"{value_ms / 1000:.1f} s"  # noqa: PLR2004
