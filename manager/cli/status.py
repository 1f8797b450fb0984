"""`status`: once, or again and again as things change."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from manager.cli.client import Daemon, DaemonUnreachableError, Event, RefusalError
from manager.cli.failures import printable
from manager.cli.live import Feed, Seen, passes
from manager.cli.printing import Columns, one_line
from manager.cli.tables import (
    duration,
    orphan_lines,
    plain_rows,
    plain_table,
    rollout_lines,
    terminal_view,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import RenderableType

    from manager.cli.client import Instance, Orphan
    from manager.cli.locate import Endpoint

_REFRESH_S = 1.0
# Orphans and the stage of the rollout are not in the live channel. The daemon lists the engine as often.
_BESIDE_S = 15.0
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
    try:
        watch.begin()
        if as_json or not sys.stdout.isatty():
            _watch_in_lines(watch, as_json=as_json)
        else:
            _watch_live(watch)
    except KeyboardInterrupt:
        return  # the way to end it
    finally:
        watch.end()


class _Watch:
    """The latest view of a daemon: instances as the live channel sends them, orphans and events beside them.

    `look` is called by one thread; the channel and the events are read in two others.
    """

    def __init__(self, locate: Callable[[], Endpoint]) -> None:
        self._locate = locate
        self._news = threading.Event()
        self._ended = threading.Event()
        self._feed = Feed(locate, self._news.set)
        self._daemon: Daemon | None = None
        self._beside: dict[str, Any] = {}
        self._beside_due = 0.0
        self.seen = Seen()
        self.instances: tuple[Instance, ...] = ()
        self.orphans: tuple[Orphan, ...] = ()
        self.events: deque[Event] = deque(maxlen=_EVENTS_SHOWN)

    def begin(self) -> None:
        """Connect, and look for the first time; raises what is wrong then."""
        self._feed.begin()
        threading.Thread(target=self._follow_events, name="events", daemon=True).start()
        self.look()

    def end(self) -> None:
        """Connect no more."""
        self._ended.set()
        self._feed.end()

    def look(self) -> None:
        """Take over what is known now. Raises a refusal, and an answer of something that is no daemon."""
        self.seen = self._feed.seen
        if self.seen.trouble is not None:
            self._daemon = None
            return
        if self._daemon is None:  # it may have come back elsewhere
            self._daemon, self._beside_due = Daemon(self._locate()), 0.0
        if time.monotonic() >= self._beside_due:
            self._look_beside(self._daemon)
        self.instances = self._daemon.read_instances(self.document)

    @property
    def document(self) -> dict[str, Any]:
        """The instances in the shape of the API, with the orphans and the stage of the rollout."""
        instances = self.seen.sections.get("instances", [])
        return {**self._beside, "instances": instances, "count": len(instances)}

    def wait(self) -> None:
        """For news, but no longer than until the clocks have to be drawn again."""
        self._news.wait(_REFRESH_S)
        self._news.clear()

    def _look_beside(self, daemon: Daemon) -> None:
        self._beside_due = time.monotonic() + _BESIDE_S
        try:
            self._beside = daemon.status_document()
        except DaemonUnreachableError:
            return  # the channel says so too
        except RefusalError as error:
            if not passes(error):
                raise
            return
        self.orphans = daemon.read_orphans(self._beside)

    def _follow_events(self) -> None:
        """Whatever goes wrong here goes wrong with the live channel too, which says so."""
        while True:
            try:
                for event in Daemon(self._locate()).events():
                    if event is not None:
                        self.events.append(event)
                        self._beside_due = min(self._beside_due, time.monotonic() + _REFRESH_S)
                        self._news.set()
            except Exception:  # noqa: BLE001, S110  (a thread of its own: there is nobody to tell)
                pass
            if self._ended.wait(_REFRESH_S):
                return


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

    now, seen = time.monotonic(), watch.seen
    parts: list[RenderableType] = []
    if seen.trouble is not None:
        away = duration(now - seen.since)
        parts.append(Text(f"daemon unreachable for {away}, last seen state below", style="bold red"))
        parts.append(Text(printable(seen.trouble), style="red"))
    age_s = now - seen.at.get("instances", now)
    instances = [_aged(one, age_s) for one in watch.instances]
    parts.append(terminal_view(instances, width, watch.orphans, rollout_lines(watch.document)))
    events = list(watch.events)
    if events:
        parts.append(Text())
        parts.extend(
            Text(_event_line(event), style="dim", no_wrap=True, overflow="ellipsis") for event in events
        )
    return Group(*parts)


def _aged(instance: Instance, age_s: float) -> Instance:
    """Return an instance with its clock as it is so many seconds later."""
    left_s = instance.ttl_remaining_s
    return instance if left_s is None else replace(instance, ttl_remaining_s=max(0.0, left_s - age_s))


def _watch_in_lines(watch: _Watch, *, as_json: bool) -> None:
    """Write a line for each instance, then one for each change, and what is wrong to stderr."""
    shown: dict[str, str] = {}
    lines = _Lines()
    notes: list[str] = []
    trouble: str | None = None
    while True:
        if watch.seen.trouble != trouble:
            trouble = watch.seen.trouble
            click.echo(
                "the daemon is back" if trouble is None else f"daemon unreachable: {trouble}", err=True
            )
        now = {one["id"]: _without_clock(one) for one in watch.document["instances"]}
        if as_json:
            if now != shown:
                click.echo(json.dumps(watch.document, ensure_ascii=False))
        else:
            lines.show([one for one in watch.instances if shown.get(one.id) != now[one.id]])
            for gone in shown.keys() - now.keys():
                click.echo(one_line(f"{gone} is no instance any more"))
        shown = now
        said = [*rollout_lines(watch.document), *orphan_lines(watch.orphans)]
        for line in () if as_json else said:
            if line not in notes:
                click.echo(line, err=True)
        notes = said
        sys.stdout.flush()
        watch.wait()
        watch.look()


class _Lines:
    """Instances in columns, below a heading. The columns only grow."""

    def __init__(self) -> None:
        self._columns = Columns()
        self._has_heading = False

    def show(self, instances: Sequence[Instance]) -> None:
        heading, *rows = plain_rows(instances)
        if not self._has_heading:
            self._columns.widen([heading, *rows])
            click.echo(self._columns.line(heading))
            self._has_heading = True
        self._columns.widen(rows)
        for row in rows:
            click.echo(self._columns.line(row))


def _without_clock(instance: Mapping[str, Any]) -> str:
    """The part of an instance whose change is worth a new line; a clock that runs is none."""
    clocks = {"ttl_remaining_s", "last_seen_at", "last_used_at"}
    values = {key: value for key, value in instance.items() if key not in clocks}
    return json.dumps({**values, "device": _without_memory(values["device"])})


def _without_memory(device: dict[str, Any]) -> dict[str, Any]:
    cards = [_without_memory(card) for card in device.get("cards", ())]
    return {key: value for key, value in device.items() if "vram" not in key} | {"cards": cards}


def _event_line(event: Event) -> str:
    parts = (event.at[11:19], event.instance or "", event.kind, event.reason or "", event.detail)
    return printable("  ".join(part for part in parts if part))
