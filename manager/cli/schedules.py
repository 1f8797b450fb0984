"""`schedules`: what happens by the clock, when next, and what the last run did."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.printing import NONE, one_line, print_json, table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_PATH = "/api/runtime/compute/schedules"
_COLUMNS = ("WHEN", "CRON", "ACTION", "INSTANCE", "NEXT", "LAST")


@click.command("schedules")
@_JSON
@_talks
def schedules_command(*, as_json: bool, url: str | None, config: Path | None) -> None:
    """List what happens by the clock: when next, in the time zone of this machine, and what it did last."""
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    daemon = Daemon(find_daemon(url or _common_url(), config))
    document = daemon.ask("GET", _PATH)
    if as_json:
        print_json(document)
    else:
        click.echo("\n".join(daemon.read(_table, document)))


def _table(document: Mapping[str, Any]) -> list[str]:
    return table(_COLUMNS, map(_row, document["schedules"]))


def _row(one: Mapping[str, Any]) -> tuple[str | None, ...]:
    last = one["last"]
    return (
        one_line(one["words"]),
        one["cron"] and one_line(one["cron"]),
        one["action"],
        one["instance"],
        ", ".join(map(_local, one["next"])) or NONE,
        last and one_line(f"{_local(last['at'])}: {last['detail']}"),
    )


def _local(text: str) -> str:
    return datetime.fromisoformat(text).astimezone().strftime("%a %Y-%m-%d %H:%M")
