"""`events`: what happened, and what happens."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.options import follow_option, last_option
from manager.cli.printing import Columns, cell, local_time

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from manager.cli.client import Event
    from manager.cli.locate import Endpoint

_RETRY_S = 1.0
_HEADING = ("TIME", "INSTANCE", "KIND", "REASON", "DETAIL")


@click.command("events")
@follow_option("Go on with each event as it happens, until Ctrl-C.")
@last_option("--limit", 20, "How many of the last events.")
@_JSON
@_talks
def events_command(*, follow: bool, limit: int, as_json: bool, url: str | None, config: Path | None) -> None:
    """Print the last events, oldest first.

    --follow waits for a daemon that is restarted or replaced, and misses no event.
    With --json one line an event.
    """
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    locate = functools.partial(find_daemon, url or _common_url(), config)
    show = _print_json if as_json else _Lines().show
    if follow:
        _follow(locate, limit, show)
        return
    for event in Daemon(locate()).events(last=limit, follow=False):
        if event is not None:
            show(event)


def _follow(locate: Callable[[], Endpoint], limit: int, show: Callable[[Event], None]) -> None:
    """Until interrupted. A daemon that goes away is waited for, once it has been there."""
    from manager.cli.client import Daemon, DaemonUnreachableError  # noqa: PLC0415

    after_id: int | None = None
    has_begun = is_away = False
    while True:
        try:
            for event in Daemon(locate()).events(after_id, last=limit):
                if is_away:
                    click.echo("the daemon is back", err=True)
                has_begun, is_away = True, False
                if event is not None:
                    after_id = event.id
                    show(event)
            why = "its stream of events ended"
        except DaemonUnreachableError as error:
            if not has_begun:
                raise
            why = error.message
        if not is_away:
            click.echo(f"the daemon is away: {why}; waiting for it", err=True)
        is_away = True
        after_id = after_id or 0  # it had no event yet
        time.sleep(_RETRY_S)


def _print_json(event: Event) -> None:
    click.echo(json.dumps(asdict(event), ensure_ascii=False))


class _Lines:
    """Events in columns, below a heading."""

    def __init__(self) -> None:
        self._columns = Columns()
        self._has_heading = False

    def show(self, event: Event) -> None:
        cells = (local_time(event.at), event.instance, event.kind, event.reason, event.detail)
        row = tuple(map(cell, cells))
        if not self._has_heading:
            self._has_heading = True
            self._columns.widen([row])
            click.echo(self._columns.line(_HEADING))
        click.echo(self._columns.line(row))
