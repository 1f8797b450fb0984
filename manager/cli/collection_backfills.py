"""`collections backfill`: begin, watch, pause and end the backfill of a collection."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from manager.cli.collections import NAME, collections_group, daemon_at, path_of, share
from manager.cli.commands import _JSON, _talks
from manager.cli.failures import DONE, FAILED, REFUSED, complain, printable, warn
from manager.cli.options import Finite
from manager.cli.printing import local_time, print_json
from manager.cli.tables import duration

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from manager.cli.client import Daemon

_LOOK_S = 1.0
_RUNNING = "running"
_SHOWN_FAILURES = 10


@collections_group.command("backfill")
@NAME
@click.option("--model", help="A model or a role; else the model of the collection, as it is now.")
@click.option("--prefix", help="Is put before each text; else that of the collection.")
@click.option("--dimensions", type=click.IntRange(1), help="What servers are asked for.")
@click.option(
    "--truncate/--no-truncate", default=None, help="Whether servers may cut texts that are too long."
)
@click.option(
    "--threshold",
    type=Finite(0, 1, min_open=True),
    metavar="SHARE",
    help="The share of the items at which it may cut over; 1 unless it is given.",
)
@click.option("--rate", type=Finite(0, min_open=True), help="Items a second at most.")
@click.option("--auto-cutover", is_flag=True, help="Make the version active at the end.")
@click.option("--wait", is_flag=True, help="Wait for the end; ends with 1 where it has failed.")
@click.option("--status", "action", flag_value="status", help="Only show how far it is.")
@click.option("--pause", "action", flag_value="pause", help="Let no further batch begin.")
@click.option("--resume", "action", flag_value="resume", help="Go on with a paused one.")
@click.option("--cancel", "action", flag_value="cancel", help="End it; what is embedded is kept.")
@_JSON
@_talks
def backfill(
    name: str,
    url: str | None,
    config: Path | None,
    *,
    action: str | None,
    wait: bool,
    as_json: bool,
    **wanted: Any,
) -> int:
    """Begin to embed all items of a collection anew, in the background; queries go on meanwhile.

    The new version is made of the model as it is now. `cutover` makes it the active one.
    With --status, --pause, --resume or --cancel the backfill that there is gets looked at or changed.
    """
    daemon = daemon_at(url, config)
    body = {key: value for key, value in wanted.items() if value is not None and value is not False}
    if wanted["truncate"] is False:
        body["truncate"] = False
    if action is not None and body:
        given = ", ".join(f"--{key.replace('_', '-')}" for key in body)
        raise click.UsageError(f"--{action} is about the backfill that there is: it goes without {given}")
    path = path_of(name, "backfill")
    if action is None:
        state = daemon.ask("POST", path, body, is_long=True)
    elif action == "status":
        state = daemon.ask("GET", path)
    else:
        state = daemon.ask("POST", f"{path}/{action}", is_long=True)
    if wait:
        state = _ended(daemon, path, state)
    if as_json:
        print_json(state)
    else:
        _print(state)
    return _exit_code(state) if wait else DONE


def _ended(daemon: Daemon, path: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return the backfill once it runs no longer, showing how far it is meanwhile."""
    shown = ""
    while state["status"] == _RUNNING:
        line = _line(state)
        if line != shown:
            if sys.stderr.isatty():
                click.echo(f"\r\x1b[K{line}", err=True, nl=False)
            else:
                click.echo(line, err=True)
            shown = line
        time.sleep(_LOOK_S)
        state = daemon.ask("GET", path)
    if shown and sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)
    return state


def _line(state: Mapping[str, Any]) -> str:
    parts = [f"{state['rows']}/{state['items']} items"]
    if state["items_per_s"]:
        parts.append(f"{state['items_per_s']:.1f} a second")
    if state["eta_s"] is not None:
        parts.append(f"{duration(state['eta_s'])} left")
    if state["waits_for"]:
        parts.append(f"waits: {printable(state['waits_for'])}")
    return ", ".join(parts)


def _print(state: Mapping[str, Any]) -> None:
    shown = {
        "status": state["status"],
        "version": state["version"],
        "model": state["model"],
        "items": state["items"],
        "rows": state["rows"],
        "missing": state["missing"],
        "quarantine": state["quarantined"],
        "coverage": share(state["coverage"]),
        "threshold": state["threshold"],
        "rate": state["rate"] and f"{state['rate']:g} items a second at most",
        "cut-over": "at the end" if state["auto_cutover"] else None,
        "speed": state["items_per_s"] and f"{state['items_per_s']:.1f} items a second",
        "left": None if state["eta_s"] is None else duration(state["eta_s"]),
        "waits for": state["waits_for"],
        "error": state["error"],
        "started": local_time(state["started_at"]),
        "ended": state["ended_at"] and local_time(state["ended_at"]),
    }
    width = max(map(len, shown))
    for name, value in shown.items():
        if value is not None:
            click.echo(f"{name.ljust(width)}  {printable(str(value))}")
    failures = state["failures"]
    for one in failures[:_SHOWN_FAILURES]:
        word = "in quarantine" if one["quarantined"] else "is tried again"
        warn(f"item {one['id']} {word} after {one['attempts']} tries: {one['message']}")
    if len(failures) > _SHOWN_FAILURES:
        warn(f"{len(failures) - _SHOWN_FAILURES} more failures: --json lists them")


def _exit_code(state: Mapping[str, Any]) -> int:
    if state["status"] != "succeeded":
        complain(f"the backfill is {state['status']}" + (f": {state['error']}" if state["error"] else ""))
        return FAILED
    if state["error"]:
        complain(state["error"])
        return REFUSED
    return DONE
