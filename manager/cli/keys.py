"""`keys`: make keys for clients and people, list, rotate and revoke them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.failures import printable, warn
from manager.cli.options import seconds
from manager.cli.printing import local_time, print_json, print_rows
from manager.domain.durations import parse_duration
from manager.domain.keys import LIMIT_NAMES
from manager.domain.money import micro_usd, usd_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from manager.cli.client import Daemon

_API = "/api/v1/keys"
_HEADING = ("NAME", "STATE", "SCOPES", "PREFIX", "PROJECT", "CREATED", "EXPIRES", "LAST USED", "LIMITS")
_SCOPES = ("client", "read", "operator", "admin")
_NAME = click.argument("name", metavar="NAME")


def _overlap(_context: click.Context, _option: click.Parameter, value: str) -> float:
    try:
        return parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}") from error


@click.group("keys")
def keys_group() -> None:
    """Keys: who may use the daemon, and for what."""


@keys_group.command("create")
@_NAME
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(_SCOPES),
    multiple=True,
    required=True,
    help="client: models; read: status; operator: start, stop, settings, read; admin: all. May be repeated.",
)
@click.option("--project", help="The project of its requests, whatever a header says.")
@click.option("--role", "roles", multiple=True, help="Only these roles.")
@click.option("--model", "models", multiple=True, metavar="GLOB", help="Only these models, such as qwen3:*.")
@click.option("--instance", "instances", multiple=True, help="Only these instances.")
@click.option("--concurrency", type=click.IntRange(1), help="Requests in flight.")
@click.option("--rpm", type=click.IntRange(1), help="Requests a minute.")
@click.option("--tokens-per-day", type=click.IntRange(1), help="Tokens a day (UTC).")
@click.option("--usd-per-month", type=click.FloatRange(0), help="US dollars a month (UTC).")
@click.option("--local-only", is_flag=True, help="Never a paid server.")
@click.option("--expires", "expires_s", metavar="TIME", callback=seconds, help="Its life: 12h, 90d.")
@_JSON
@_talks
def create_key(
    name: str,
    url: str | None,
    config: Path | None,
    *,
    as_json: bool,
    **limits: Any,
) -> None:
    """Make a key and print it. It is shown this once."""
    given = {key: value for key, value in limits.items() if value not in (None, ()) and value is not False}
    body = {"name": name} | {
        key: list(value) if isinstance(value, tuple) else value for key, value in given.items()
    }
    _print_made(_daemon(url, config).ask("POST", _API, body), as_json=as_json)


@keys_group.command("list")
@_JSON
@_talks
def list_keys(url: str | None, config: Path | None, *, as_json: bool) -> None:
    """List all keys, those that have ended too. Secrets are not shown, only their first characters."""
    document = _daemon(url, config).ask("GET", _API)
    if as_json:
        print_json(document)
        return
    print_rows(_HEADING, map(_row, document["keys"]))
    if not document["required"]:
        warn("requests need no key: none is configured")


@keys_group.command("revoke")
@_NAME
@click.option("--cut", is_flag=True, help="End its open requests too.")
@click.option("--forget", is_flag=True, help="Remove its name; without keys and key file the daemon is open.")
@_JSON
@_talks
def revoke_key(
    name: str, url: str | None, config: Path | None, *, cut: bool, forget: bool, as_json: bool
) -> None:
    """Revoke a key at once. Its open requests go on, unless --cut ends them."""
    options = [word for word, is_on in (("cut=true", cut), ("forget=true", forget)) if is_on]
    query = f"?{'&'.join(options)}" if options else ""
    document = _daemon(url, config).ask("DELETE", _path(name) + query)
    if as_json:
        print_json(document)
    else:
        ended = f"; {document['cut']} open requests were ended" if cut else ""
        click.echo(f"{printable(name)} is {'forgotten' if forget else 'revoked'}{ended}")
    if not document["required"]:
        warn("no key is left: requests need none any more")
    elif not document["admin_left"]:
        warn(
            "no key is left that can manage keys, and the daemon stays closed to requests without one; "
            "set server.key_file and reload the configuration to get in"
        )


@keys_group.command("rotate")
@_NAME
@click.option(
    "--overlap",
    default="24h",
    show_default=True,
    metavar="TIME",
    callback=_overlap,
    help="How long the earlier secret is in force beside the new one; 0 ends it at once.",
)
@_JSON
@_talks
def rotate_key(name: str, url: str | None, config: Path | None, *, overlap: float, as_json: bool) -> None:
    """Make a new secret for a key and print it. It is shown this once."""
    made = _daemon(url, config).ask("POST", f"{_path(name)}/rotate", {"overlap_s": overlap})
    _print_made(made, as_json=as_json)


def _daemon(url: str | None, config: Path | None) -> Daemon:
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    return Daemon(find_daemon(url or _common_url(), config))


def _path(name: str) -> str:
    return f"{_API}/{quote(name, safe='')}"


def _print_made(document: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the secret alone on stdout, for scripts."""
    if as_json:
        print_json(document)
        return
    click.echo(printable(str(document["secret"])))
    click.echo("keep it now: only a hash of it is stored", err=True)
    for old in document["secrets"][:-1]:
        click.echo(
            f"the earlier secret {printable(old['prefix'])}… ends at {local_time(old['ends_at'])}", err=True
        )


def _row(key: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        key["name"],
        key["state"],
        ",".join(key["scopes"]),
        key["secrets"][-1]["prefix"] if key["secrets"] else None,
        key["project"],
        local_time(key["created_at"]),
        key["expires_at"] and local_time(key["expires_at"]),
        key["last_used_at"] and local_time(key["last_used_at"]),
        " ".join(f"{name}={_limit(key[name])}" for name in LIMIT_NAMES if key[name]),
    )


def _limit(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "true" if value is True else usd_text(micro_usd(value)) if isinstance(value, float) else str(value)
