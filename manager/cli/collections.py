"""`collections`: make, show and remove collections; switch between the versions of their embeddings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.failures import MISUSED, CommandError, printable
from manager.cli.options import Finite
from manager.cli.printing import local_time, print_json, print_rows

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from manager.cli.client import Daemon, RefusalError

_API = "/api/v1/collections"
_HEADING = ("NAME", "MODEL", "VERSION", "STATE", "ITEMS", "COVERAGE", "VERSIONS", "BACKFILL", "CREATED")
_VERSIONS = (
    "VERSION",
    "STATE",
    "MODEL",
    "DIGEST",
    "DIMENSIONS",
    "ROWS",
    "COVERAGE",
    "QUARANTINE",
    "CREATED",
    "PREFIX",
)
_DIGEST_CHARACTERS = 12
# Items that are named where a version cannot be active.
_MOST_NAMED = 10

NAME = click.argument("name", metavar="NAME")
THRESHOLD = click.option(
    "--threshold",
    type=Finite(0, 1, min_open=True),
    metavar="SHARE",
    help="The share of the items that needs a vector, such as 0.99; else that of the last backfill, or 1.",
)


@click.group("collections")
def collections_group() -> None:
    """Collections of vectors: items, queries, and the versions of their embeddings."""


@collections_group.command("list")
@_JSON
@_talks
def list_collections(url: str | None, config: Path | None, *, as_json: bool) -> None:
    """List all collections."""
    document = daemon_at(url, config).ask("GET", _API)
    if as_json:
        print_json(document)
    else:
        print_rows(_HEADING, map(_row, document["collections"]))


@collections_group.command("show")
@NAME
@_JSON
@_talks
def show_collection(name: str, url: str | None, config: Path | None, *, as_json: bool) -> None:
    """Show all of one collection."""
    print_collection(daemon_at(url, config).ask("GET", path_of(name)), as_json=as_json)


@collections_group.command("create")
@NAME
@click.option("--model", help="A model or a role; else the model of the role embedding.")
@click.option("--prefix", help="Is put before each text, also before the text of a query.")
@click.option("--dimensions", type=click.IntRange(1), help="What servers are asked for; else they decide.")
@click.option("--truncate", is_flag=True, help="Servers may cut texts that are too long.")
@click.option("--no-keep-text", is_flag=True, help="Store no texts; no backfill is possible then.")
@_JSON
@_talks
def create_collection(
    name: str, url: str | None, config: Path | None, *, as_json: bool, no_keep_text: bool, **wanted: Any
) -> None:
    """Make a collection. Its first item makes its first version."""
    given = {key: value for key, value in wanted.items() if value is not None}
    body = {"name": name, "keep_text": not no_keep_text, **given}
    made = daemon_at(url, config).ask("POST", _API, body)
    if as_json:
        print_json(made)
    else:
        click.echo(f"{printable(made['name'])} is made, for vectors of {printable(made['model'])}")


@collections_group.command("delete")
@NAME
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@_JSON
@_talks
def delete_collection(name: str, url: str | None, config: Path | None, *, yes: bool, as_json: bool) -> None:
    """Remove a collection with all of its items and versions."""
    daemon = daemon_at(url, config)
    if not yes:
        found = daemon.ask("GET", path_of(name))
        _agree(f"Remove {printable(name)} with {found['items']} items and {found['versions']} versions?")
    document = daemon.ask("DELETE", path_of(name), is_long=True)
    if as_json:
        print_json(document)
    else:
        click.echo(f"{printable(name)} is removed")


@collections_group.command("versions")
@NAME
@_JSON
@_talks
def list_versions(name: str, url: str | None, config: Path | None, *, as_json: bool) -> None:
    """List the versions of a collection, the active one first."""
    versions = daemon_at(url, config).listed(path_of(name, "versions"))
    if as_json:
        print_json(versions)
    else:
        print_rows(_VERSIONS, map(_version_row, versions))


@collections_group.command("cutover")
@NAME
@click.argument("version", required=False)
@THRESHOLD
@_JSON
@_talks
def cut_over(
    name: str,
    version: str | None,
    url: str | None,
    config: Path | None,
    *,
    threshold: float | None,
    as_json: bool,
) -> None:
    """Make VERSION the active one; without it, the one that the last backfill has filled."""
    daemon = daemon_at(url, config)
    wanted = version or daemon.ask("GET", path_of(name, "backfill"))["version"]
    print_switched(
        switched(daemon, name, "cutover", {"version": wanted, "threshold": threshold}), as_json=as_json
    )


@collections_group.command("rollback")
@NAME
@THRESHOLD
@_JSON
@_talks
def roll_back(
    name: str, url: str | None, config: Path | None, *, threshold: float | None, as_json: bool
) -> None:
    """Make the version active again that was active before."""
    daemon = daemon_at(url, config)
    print_switched(switched(daemon, name, "rollback", {"threshold": threshold}), as_json=as_json)


@collections_group.command("delete-version")
@NAME
@click.argument("version")
@_JSON
@_talks
def delete_version(name: str, version: str, url: str | None, config: Path | None, *, as_json: bool) -> None:
    """Remove VERSION with its vectors; it must not be active and not being built."""
    document = daemon_at(url, config).ask("DELETE", path_of(name, "versions", version), is_long=True)
    if as_json:
        print_json(document)
    else:
        click.echo(f"version {printable(version)} of {printable(name)} is removed")


def daemon_at(url: str | None, config: Path | None) -> Daemon:
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    return Daemon(find_daemon(url or _common_url(), config))


def path_of(*segments: str) -> str:
    """Return the path of a collection, or of something in it.

    Raises:
        CommandError: a segment is a step for those who resolve paths: it would lead elsewhere.
    """
    for segment in segments:
        if segment in ("", ".", ".."):
            raise CommandError(f"{segment!r} names nothing in a collection", exit_code=MISUSED)
    return "/".join([_API, *(quote(segment, safe="") for segment in segments)])


def switched(daemon: Daemon, name: str, verb: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Switch to another version; return the collection.

    Raises:
        CommandError: it was refused. Below the threshold it names the items that are missing.
    """
    from manager.cli.client import RefusalError  # noqa: PLC0415

    try:
        return daemon.ask("POST", path_of(name, verb), body, is_long=True)
    except RefusalError as error:
        if error.code != "below_threshold":
            raise
        raise CommandError(
            error.message, exit_code=error.exit_code, next_step=error.next_step, lines=_lacking(error)
        ) from error


def print_switched(collection: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(collection)
    else:
        click.echo(f"version {collection['version']} of {printable(collection['name'])} is active")


def print_collection(collection: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(collection)
        return
    shown = {**collection, "coverage": share(collection["coverage"])}
    width = max(map(len, shown))
    for name, value in shown.items():
        if value not in (None, ""):
            text = str(value).lower() if isinstance(value, bool) else str(value)
            click.echo(f"{name.ljust(width)}  {printable(text)}")


def share(value: float | None) -> str | None:
    """Return a share in percent, rounded down: only all of them are 100%."""
    return None if value is None else f"{int(value * 1000) / 10:g}%"


def _row(one: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        one["name"],
        one["model"],
        one["version"],
        one["state"],
        one["items"],
        share(one["coverage"]),
        one["versions"],
        one["backfill"],
        local_time(one["created_at"]),
    )


def _version_row(one: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        one["version"],
        one["state"],
        one["model"],
        one["digest"] and one["digest"][:_DIGEST_CHARACTERS],
        one["dimensions"],
        f"{one['rows']}/{one['items']}",
        share(one["coverage"]),
        one["quarantined"],
        local_time(one["created_at"]),
        one["prefix"],
    )


def _lacking(error: RefusalError) -> list[str]:
    """Return a line for each of the first items that keep a version from being active."""
    lines = []
    for count, named, word in (
        ("missing", "missing_ids", "is missing"),
        ("quarantined", "quarantined_ids", "is in quarantine"),
    ):
        ids = (error.details.get(named) or [])[:_MOST_NAMED]
        lines += [f"{one} {word}" for one in ids]
        more = error.details.get(count, 0) - len(ids)
        if more > 0:
            lines.append(f"{more} more: each {word}")
    return lines


def _agree(question: str) -> None:
    if not sys.stdin.isatty():
        raise CommandError(
            "this command asks first, and there is no terminal to ask on",
            exit_code=MISUSED,
            next_step="give --yes to agree",
        )
    if not click.confirm(question, err=True):
        raise CommandError("nothing was changed")
