"""`rollout`: the stage in force, and changes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.failures import warn
from manager.cli.printing import cell, print_json
from manager.cli.tables import ROLLOUT_WORDS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from manager.cli.client import Daemon

_SETTINGS = "/api/settings/models"
_EFFECTIVE = "/api/settings/models/effective"
_STAGES = ("observe", "shadow", "lanes", "all")
_FIELDS = ("stage", "lanes", "raw_url")


@click.group("rollout", invoke_without_command=True)
@_JSON
@_talks
@click.pass_context
def rollout_group(context: click.Context, *, as_json: bool, url: str | None, config: Path | None) -> None:
    """Show which requests are managed, and which pass to the raw server as they came.

    `rollout set STAGE` changes it while the daemon runs, `rollout unset` takes all changes back.
    """
    if context.invoked_subcommand is not None:
        return
    daemon = _daemon(url, config)
    document = daemon.ask("GET", _EFFECTIVE)
    if as_json:
        print_json(daemon.read(_rollout, document))
        return
    _show(daemon, document)
    for concern in daemon.read(_ignored, document):
        warn(concern)


@rollout_group.command("set")
@click.argument("stage", type=click.Choice(_STAGES))
@click.option("--lane", "lanes", metavar="ROLE", multiple=True, help="A role that is managed; once for each.")
@click.option("--raw-url", metavar="URL", help="The server for all requests that are not managed.")
@_talks
def set_command(
    stage: str, lanes: tuple[str, ...], raw_url: str | None, *, url: str | None, config: Path | None
) -> None:
    """Change the stage, at once and across restarts. Requests under way go on as they began.

    Lanes and URL stay as they are unless they are given:

        ollama-manager rollout set lanes --lane output --lane embedding
    """
    change: dict[str, Any] = {"stage": stage}
    if lanes:
        change["lanes"] = list(dict.fromkeys(lanes))
    if raw_url is not None:
        change["raw_url"] = raw_url
    _change(_daemon(url, config), change)


@rollout_group.command("unset")
@_talks
def unset_command(*, url: str | None, config: Path | None) -> None:
    """Take all changes back. What the configuration says counts again."""
    _change(_daemon(url, config), None)


def _daemon(url: str | None, config: Path | None) -> Daemon:
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    group = click.get_current_context().parent
    given = {} if group is None else group.params  # `rollout --config FILE set …`
    return Daemon(find_daemon(url or given.get("url") or _common_url(), config or given.get("config")))


def _change(daemon: Daemon, change: dict[str, Any] | None) -> None:
    daemon.ask("POST", _SETTINGS, {"rollout": change})
    _show(daemon, daemon.ask("GET", _EFFECTIVE))


def _show(daemon: Daemon, document: dict[str, Any]) -> None:
    rollout = daemon.read(_rollout, document)
    for field in _FIELDS:
        value = rollout[field]["value"]
        text = cell(", ".join(value) if isinstance(value, list) else value)
        words = f" - {ROLLOUT_WORDS[value]}" if field == "stage" else ""
        click.echo(f"{field}: {text} ({rollout[field]['source']}){words}")


def _rollout(document: Mapping[str, Any]) -> dict[str, Any]:
    found = {field: document["rollout"][field] for field in _FIELDS}
    ROLLOUT_WORDS[found["stage"]["value"]]
    return found


def _ignored(document: Mapping[str, Any]) -> list[str]:
    keys = tuple(f"rollout.{field}" for field in _FIELDS)
    return [f"{one['key']} is ignored: {one['reason']}" for one in document["ignored"] if one["key"] in keys]
