"""`roles`: all roles as they are in force, and changes of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.failures import printable, warn
from manager.cli.printing import cell, print_json, print_rows
from manager.cli.role_values import check_key, flat, nested, read_pairs, shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from manager.cli.client import Daemon

_SETTINGS = "/api/settings/models"
_EFFECTIVE = "/api/settings/models/effective"
_HEADING = (
    "ROLE",
    "MODEL",
    "INSTANCES",
    "POLICY",
    "MODE",
    "RESERVED",
    "CONCURRENCY",
    "QUEUE",
    "WEIGHT",
    "NOT THE DEFAULT",
)

_Entries = dict[str, "Mapping[str, Any]"]


@click.group("roles", invoke_without_command=True)
@_JSON
@_talks
@click.pass_context
def roles_group(context: click.Context, *, as_json: bool, url: str | None, config: Path | None) -> None:
    """Show all roles: model, instances, limits of their lanes, and where each value comes from.

    `roles set NAME KEY=VALUE…` changes one while the daemon runs, `roles unset NAME [KEY…]` takes
    changes back.
    """
    if context.invoked_subcommand is not None:
        return
    daemon = _daemon(url, config)
    document = daemon.ask("GET", _EFFECTIVE)
    if as_json:
        print_json(document)
        return
    roles = daemon.read(_entries, document)
    concerns = [
        *daemon.read(_ignored, document),
        *daemon.read(_warnings, daemon.ask("GET", _SETTINGS)).values(),
    ]
    print_rows(_HEADING, [_row(name, entries) for name, entries in roles.items()])
    for concern in concerns:
        warn(concern)


@roles_group.command("set")
@click.argument("role", metavar="NAME")
@click.argument("pairs", metavar="KEY=VALUE…", nargs=-1, required=True)
@_talks
def set_command(role: str, pairs: tuple[str, ...], *, url: str | None, config: Path | None) -> None:
    """Change values of one role, at once and across restarts; a new role needs its kind.

    Lists are written with commas, durations as 90s, 15m or 2h, an empty value (KEY=) takes a change back:

        ollama-manager roles set thinking model=qwen3:8b instances=gpu0,cpu queue.wait_s=2m concurrency=
    """
    _change(_daemon(url, config), role, nested(read_pairs(pairs)))


@roles_group.command("unset")
@click.argument("role", metavar="NAME")
@click.argument("keys", metavar="[KEY…]", nargs=-1)
@_talks
def unset_command(role: str, keys: tuple[str, ...], *, url: str | None, config: Path | None) -> None:
    """Take changes of one role back: those named, else all. What the configuration says counts again."""
    for key in keys:
        check_key(key)
    _change(_daemon(url, config), role, nested(dict.fromkeys(keys)) if keys else None)


def _daemon(url: str | None, config: Path | None) -> Daemon:
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    group = click.get_current_context().parent
    given = {} if group is None else group.params  # `roles --config FILE set …`
    return Daemon(find_daemon(url or given.get("url") or _common_url(), config or given.get("config")))


def _change(daemon: Daemon, role: str, values: dict[str, Any] | None) -> None:
    """Make a change, and print each value that is another one, or comes from elsewhere, after it."""
    before = daemon.read(_entries, daemon.ask("GET", _EFFECTIVE))
    warnings = daemon.read(_warnings, daemon.ask("POST", _SETTINGS, {"roles": {role: values}}))
    after = daemon.read(_entries, daemon.ask("GET", _EFFECTIVE))
    old, new = before.get(role, {}), after.get(role, {})
    if old and not new:
        click.echo(f"{role}: removed")
        return
    changed = [key for key in new if (old.get(key) != new[key] if old else new[key]["source"] != "default")]
    for key in changed:
        was = f"{_sourced(old[key])} -> " if key in old else ""
        click.echo(f"{role}.{key}: {was}{_sourced(new[key])}")
    if not changed:
        click.echo(f"{role}: nothing changed")
    for key, message in warnings.items():
        if key.startswith((f"roles.{role}.", f'roles."{role}".')):
            warn(message)


def _entries(document: Mapping[str, Any]) -> dict[str, _Entries]:
    return {name: flat(values) for name, values in document["roles"].items()}


def _ignored(document: Mapping[str, Any]) -> list[str]:
    return [f"{one['key']} is ignored: {one['reason']}" for one in document["ignored"]]


def _warnings(document: Mapping[str, Any]) -> dict[str, str]:
    return {one["key"]: one["message"] for one in document["warnings"]}


def _sourced(entry: Mapping[str, Any]) -> str:
    return f"{cell(shown(entry['value']))} ({entry['source']})"


def _row(name: str, entries: _Entries) -> tuple[object, ...]:
    values = {key: entry["value"] for key, entry in entries.items()}
    places = values["instances"]
    others = [f"{key} ({entry['source']})" for key, entry in entries.items() if entry["source"] != "default"]
    return (
        name,
        values["model"],
        values["target"] if places is None else printable(",".join(places)),
        values["policy"],
        values["mode"],
        values["reserved"],
        values["concurrency"],
        f"{values['queue.length']}, {shown(values['queue.wait_s'])} s",
        values["weight"],
        ", ".join(others) or None,
    )
