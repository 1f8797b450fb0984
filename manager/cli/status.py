"""`status`: once, or again and again as things change."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from manager.cli.client import Daemon, DaemonUnreachableError, Event
from manager.cli.failures import printable
from manager.cli.tables import duration, orphan_lines, plain_table, rollout_lines, terminal_view

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from manager.cli.client import Instance, Orphan
    from manager.cli.locate import Endpoint

_REFRESH_S = 1.0
_EVENTS_SHOWN = 5


def show_status(endpoint: Endpoint, *, as_json: bool) -> None:
    daemon = Daemon(endpoint)
    document = daemon.status_document()
    if as_json:
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    instances, orphans = daemon.read_instances(document), daemon.read_orphans(document)
    if not sys.stdout.isatty():
        click.echo(plain_table(instances))
        for line in (*rollout_lines(document), *orphan_lines(orphans)):
            click.echo(line, err=True)  # stdout has one line an instance
        return
    from rich.console import Console  # noqa: PLC0415  (a pipe needs none of it)

    console = Console(highlight=False)
    console.print(terminal_view(instances, console.width, orphans, rollout_lines(document)))


def watch_status(locate: Callable[[], Endpoint], *, as_json: bool) -> None:
    """Until interrupted. A daemon that goes away is waited for, once it has been there.

    Args:
        locate: finds the daemon; asked again after it went away, as it may come back elsewhere.
        as_json: one line of JSON for every change.
    """
    watch = _Watch(locate)
    watch.look()
    if watch.trouble is not None:
        raise watch.trouble
    threading.Thread(target=watch.follow, name="events", daemon=True).start()
    if as_json or not sys.stdout.isatty():
        _watch_in_lines(watch, as_json=as_json)
    else:
        _watch_live(watch)


@dataclass
class _Watch:
    """The last view of the daemon. `look` is called by one thread, `follow` runs in another."""

    locate: Callable[[], Endpoint]
    document: dict[str, Any] = field(default_factory=dict)
    instances: tuple[Instance, ...] = ()
    orphans: tuple[Orphan, ...] = ()
    trouble: DaemonUnreachableError | None = None
    since: float = 0.0
    news: threading.Event = field(default_factory=threading.Event)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=_EVENTS_SHOWN))
    _daemon: Daemon | None = None

    def look(self) -> None:
        """Ask the daemon; one that does not answer becomes `trouble`, a refusal is raised."""
        try:
            if self._daemon is None:
                self._daemon = Daemon(self.locate())
            self.document = self._daemon.status_document()
            self.instances = self._daemon.read_instances(self.document)
            self.orphans = self._daemon.read_orphans(self.document)
        except DaemonUnreachableError as error:
            self._daemon = None
            if self.trouble is None:
                self.since = time.monotonic()
            self.trouble = error
        else:
            self.trouble = None

    def wait(self) -> None:
        """For news, but no longer than until the next refresh."""
        self.news.wait(_REFRESH_S)
        self.news.clear()

    def follow(self) -> None:
        """Events only say that it is worth looking now: whatever goes wrong with them, `look` finds out."""
        while True:
            try:
                for event in Daemon(self.locate()).events():
                    if event is not None:
                        self.events.append(event)
                    self.news.set()
            except Exception:  # noqa: BLE001  (a thread of its own: there is nobody to tell)
                self.news.set()
            time.sleep(_REFRESH_S)


def _watch_live(watch: _Watch) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415

    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            live.update(_picture(watch, console.width), refresh=True)
            watch.wait()
            watch.look()


def _picture(watch: _Watch, width: int) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    parts: list[RenderableType] = []
    if watch.trouble is not None:
        away = duration(time.monotonic() - watch.since)
        parts.append(Text(f"daemon unreachable for {away}, last seen state below", style="bold red"))
        parts.append(Text(watch.trouble.message, style="red"))
    parts.append(terminal_view(watch.instances, width, watch.orphans, rollout_lines(watch.document)))
    events = list(watch.events)
    if events:
        parts.append(Text())
        parts.extend(
            Text(_event_line(event), style="dim", no_wrap=True, overflow="ellipsis") for event in events
        )
    return Group(*parts)


def _watch_in_lines(watch: _Watch, *, as_json: bool) -> None:
    shown = ""
    while True:
        if watch.trouble is not None:
            now = "unreachable"
            text = f"daemon unreachable: {watch.trouble.message}"
        else:
            text = json.dumps(watch.document, ensure_ascii=False) if as_json else plain_table(watch.instances)
            now = _without_clock(watch.document)
        if now != shown:
            click.echo(text, err=watch.trouble is not None)
            if watch.trouble is None and not as_json:
                for line in (*rollout_lines(watch.document), *orphan_lines(watch.orphans)):
                    click.echo(line, err=True)
            shown = now
        watch.wait()
        watch.look()


def _without_clock(document: dict[str, Any]) -> str:
    """The part of a view whose change is worth a new line; a clock that runs is none."""
    clocks = {"ttl_remaining_s", "last_seen_at", "last_used_at"}
    instances = [
        {key: value for key, value in one.items() if key not in clocks} for one in document["instances"]
    ]
    for one in instances:
        one["device"] = _without_memory(one["device"])
    return json.dumps([instances, document.get("orphans"), document.get("rollout")])


def _without_memory(device: dict[str, Any]) -> dict[str, Any]:
    cards = [_without_memory(card) for card in device.get("cards", ())]
    return {key: value for key, value in device.items() if "vram" not in key} | {"cards": cards}


def _event_line(event: Event) -> str:
    parts = (event.at[11:19], event.instance or "", event.kind, event.reason or "", event.detail)
    return printable("  ".join(part for part in parts if part))
