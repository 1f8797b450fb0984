"""`gpus`: the cards, and who holds their memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.failures import printable, warn
from manager.cli.printing import UNKNOWN, print_json, print_rows
from manager.cli.tables import size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_HOST = "HOST"  # only where a card is in another machine
_HEADING = ("INDEX", "NAME", "UUID", "USED/TOTAL", "FREE", "PROCESSES")


@click.command("gpus")
@_JSON
@_talks
def gpus_command(*, as_json: bool, url: str | None, config: Path | None) -> None:
    """Show all cards with their memory, and the processes that hold it."""
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    daemon = Daemon(find_daemon(url or _common_url(), config))
    document = daemon.ask("GET", "/api/runtime/compute/gpus")
    if as_json:
        print_json(document)
        return
    rows = daemon.read(lambda body: [_row(card) for card in body["gpus"]], document)
    if rows:
        hosts = daemon.read(lambda body: [card.get("host") for card in body["gpus"]], document)
        if any(hosts):
            print_rows((_HOST, *_HEADING), [(host, *row) for host, row in zip(hosts, rows, strict=True)])
        else:
            print_rows(_HEADING, rows)
    if (trouble := document.get("error")) is not None:
        warn(f"{trouble['message']} ({trouble['code']})")
    elif not rows:
        click.echo("no cards", err=True)


def _row(card: Mapping[str, Any]) -> tuple[object, ...]:
    used, total = _size(card["vram_used_bytes"]), _size(card["vram_total_bytes"])
    holders = ", ".join(map(_holder, card["processes"]))
    if card["lost"]:
        holders = f"lost: {card['lost']}" + (f"; {holders}" if holders else "")
    elif card["vram_used_bytes"] is None and card.get("memory_unknown"):
        holders = f"memory unknown: {card['memory_unknown']}"
    name, uuid = card["name"], card["uuid"]
    return card["index"], name, uuid, f"{used}/{total}", _size(card["vram_free_bytes"]), holders or None


def _size(size_bytes: int | None) -> str:
    return UNKNOWN if size_bytes is None else size(size_bytes)


def _holder(process: Mapping[str, Any]) -> str:
    """`4711 ollama of gpu0 5.2G`."""
    name = printable(process["name"] or UNKNOWN)
    instance = f" of {process['instance']}" if process["instance"] else ""
    return f"{process['pid']} {name}{instance} {_size(process['used_bytes'])}"
