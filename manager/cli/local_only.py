"""`local-only`: the live switch that keeps every request from paid servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.failures import printable
from manager.cli.printing import print_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SETTINGS = "/api/settings/models"
_EFFECTIVE = "/api/settings/models/effective"
_VALUES: Mapping[str, bool | None] = {"on": True, "off": False, "unset": None}


@click.command("local-only")
@click.argument("action", type=click.Choice(["show", *_VALUES]), default="show")
@_JSON
@_talks
def local_only_command(action: str, *, as_json: bool, url: str | None, config: Path | None) -> None:
    """Keep every request local, or allow paid servers again: at once, and across restarts.

    `show` says whether it is on, and what that means now; `unset` takes the change back, so that
    `fallback.force_local` of the configuration counts again.
    """
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    daemon = Daemon(find_daemon(url or _common_url(), config))
    if action != "show":
        daemon.ask("POST", _SETTINGS, {"force_local": _VALUES[action]})
    document = daemon.ask("GET", _EFFECTIVE)
    if as_json:
        print_json(daemon.read(_switch, document))
    else:
        click.echo(daemon.read(_line, document))


def _switch(document: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = document["force_local"]
    return {"value": found["value"], "source": found["source"]}


def _line(document: Mapping[str, Any]) -> str:
    switch = _switch(document)
    return f"local only: {'on' if switch['value'] else 'off'} ({switch['source']}) - {_effect(document)}"


def _effect(document: Mapping[str, Any]) -> str:
    """Return what the switch means with the other settings as they are."""
    if document["force_local"]["value"]:
        return "no paid server is used"
    if not document["fallback"]["enabled"]["value"]:
        return "fallback.enabled is off, so no paid server is used"
    paying = [name for name, role in document["roles"].items() if role["paid_fallback"]["value"]]
    if not paying:
        return "no role has paid_fallback, so no paid server is used"
    return f"paid servers may answer for {printable(', '.join(paying))} where nothing local can"
