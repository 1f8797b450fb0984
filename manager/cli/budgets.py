"""`budgets`: the money of each budget in its current period."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.printing import print_json, table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_PATH = "/api/v1/budgets"
_HEADINGS = ("SCOPE", "PERIOD", "SPENT", "RESERVED", "SOFT", "HARD", "STATE")


@click.command("budgets")
@_JSON
@_talks
def budgets_command(*, as_json: bool, url: str | None, config: Path | None) -> None:
    """Show what each budget has spent and reserved in its current period, in US dollars."""
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    daemon = Daemon(find_daemon(url or _common_url(), config))
    document = daemon.ask("GET", _PATH)
    if as_json:
        print_json(document)
    elif document["budgets"]:
        click.echo("\n".join(daemon.read(_rows, document)))
    else:
        click.echo("no budgets", err=True)


def _rows(document: Mapping[str, Any]) -> list[str]:
    return table(
        _HEADINGS,
        [
            (
                one["scope"],
                one["period"],
                _usd(one["spent_usd"]),
                _usd(one["reserved_usd"]),
                _usd(one["soft_usd"]),
                _usd(one["hard_usd"]),
                one["state"],
            )
            for one in document["budgets"]
        ],
    )


def _usd(value: float | None) -> str | None:
    """Return dollars with the digits that they have, two at least."""
    if value is None:
        return None
    text = f"{value:.6f}".rstrip("0")
    whole, _, part = text.partition(".")
    return f"{whole}.{part:0<2}"
