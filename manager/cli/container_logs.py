"""`logs`: the output of an instance's container."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Any

import click

from manager.cli.commands import _common_url, _talks
from manager.cli.failures import printable
from manager.cli.options import follow_option, last_option

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

# A longer line is printed in parts.
_LONGEST_LINE = 65_536


@click.command("logs")
@click.argument("instance", metavar="ID")
@follow_option("Go on with what the container writes, until it ends.")
@last_option("--tail", 100, "How many of the last lines.")
@_talks
def logs_command(instance: str, *, follow: bool, tail: int, url: str | None, config: Path | None) -> None:
    """Print what an instance's container wrote; after a stop, the lines that were kept.

    --follow ends with the container: a restart of the instance is another one.
    """
    from manager.cli.client import Daemon, DaemonUnreachableError  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    daemon = Daemon(find_daemon(url or _common_url(), config))
    before = daemon.instance_document(instance) if follow else {}
    has_begun = False
    try:
        for line in _lines(daemon.logs(instance, tail, follow=follow)):
            has_begun = True
            click.echo(printable(line))
    except DaemonUnreachableError as error:
        if not (follow and has_begun):
            raise
        raise DaemonUnreachableError(
            "the daemon ended, or the connection to it broke", "`ollama-manager logs -f` begins again"
        ) from error
    if follow:
        click.echo(_end(instance, before, daemon.instance_document(instance)), err=True)


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + decoder.decode(piece)).split("\n")
        yield from lines
        if len(rest) > _LONGEST_LINE:
            yield rest
            rest = ""
    if rest:
        yield rest


def _end(instance: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return a sentence about why there is no more."""
    container, other = _container(before), _container(after)
    if container is None:
        return f"{instance} had no container (it was {before.get('phase')}); these lines were kept"
    if other is not None and other != container:
        what = f"the container of {instance} was replaced"
        return f"{what}; `ollama-manager logs -f {instance}` follows the new one"
    return f"the container of {instance} has ended"


def _container(document: Mapping[str, Any]) -> object:
    return (document.get("container") or {}).get("id")
