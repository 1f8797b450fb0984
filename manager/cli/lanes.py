"""`lanes`: the requests of each lane, and the slots of each instance."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.printing import print_json, table
from manager.cli.tables import duration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_PATH = "/api/runtime/compute/lanes"
_LANES = ("LANE", "IN FLIGHT", "CONCURRENCY", "QUEUED", "OLDEST WAIT", "RESERVED")
_WARM = ("KEPT WARM", "INSTANCE", "IN MEMORY", "REASON", "DETAIL")
_SLOTS = ("INSTANCE", "SLOTS", "IN USE", "RESERVED FREE")
_REFRESH_S = 1.0


@click.command("lanes")
@click.option("--watch", is_flag=True, help="Keep the tables up to date until Ctrl-C.")
@_JSON
@_talks
def lanes_command(*, watch: bool, as_json: bool, url: str | None, config: Path | None) -> None:
    """Show the requests of each lane, the slots of each instance, and the models that are kept warm.

    A lane is a role; `*` has the requests without one.
    """
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    daemon = Daemon(find_daemon(url or _common_url(), config))

    def look() -> dict[str, Any]:
        return daemon.ask("GET", _PATH)

    if as_json and not watch:
        print_json(look())
        return

    def picture() -> str:
        return "\n".join(daemon.read(_tables, look()))

    if not watch:
        click.echo(picture())
    elif as_json or not sys.stdout.isatty():
        _watch_changes((lambda: _json_line(look())) if as_json else picture)
    else:
        _watch_live(picture)


def _tables(document: Mapping[str, Any]) -> list[str]:
    lanes = [
        (
            one["name"],
            one["in_flight"],
            one["concurrency"],
            one["queued"],
            None if one["oldest_wait_s"] is None else duration(one["oldest_wait_s"]),
            one["reserved"],
        )
        for one in document["lanes"]
    ]
    slots = [(one["id"], one["slots"], one["in_use"], one["reserved_free"]) for one in document["instances"]]
    warm = [
        (one["name"], at["instance"], "yes" if at["is_kept"] else "no", at["reason"], at["detail"])
        for one in document["lanes"]
        for at in one.get("keep_warm", ())
    ]
    kept = ["", *table(_WARM, warm)] if warm else []
    return [*table(_LANES, lanes), "", *table(_SLOTS, slots), *kept]


def _json_line(document: Mapping[str, Any]) -> str:
    import json  # noqa: PLC0415

    return json.dumps(document, ensure_ascii=False)


def _watch_changes(read: Callable[[], str]) -> None:
    shown = ""
    while True:
        text = read()
        if text != shown:
            click.echo(text)
            shown = text
        time.sleep(_REFRESH_S)


def _watch_live(read: Callable[[], str]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    with Live(console=Console(highlight=False), auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(Text(read()), refresh=True)
            time.sleep(_REFRESH_S)
