"""`runs`: submit async runs, look at them, cancel them, fetch their results."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from manager.cli.commands import _JSON, _common_url, _talks
from manager.cli.failures import DONE, FAILED, MISUSED, CommandError, complain, printable
from manager.cli.printing import print_json, table
from manager.domain.durations import parse_duration

if TYPE_CHECKING:
    from manager.cli.client import Daemon

_API = "/api/v1/runs"
_ERROR = 400
_COLUMNS = ("ID", "STATUS", "LANE", "MODEL", "INSTANCE", "CREATED", "ENDED", "RESULT")
_PIECE_BYTES = 64 * 1024

_ID = click.argument("run_id", metavar="ID")


def _seconds(_context: click.Context, _option: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}; {error}") from None


@click.group("runs")
def runs_group() -> None:
    """Async runs: requests that are executed some time later."""


@runs_group.command("submit")
@click.argument("file", type=click.File("rb"))
@click.option("--path", required=True, metavar="ROUTE", help="The route of the request, such as /api/chat.")
@click.option("--lane", help="The role whose lane it waits in; else the model decides.")
@click.option("--idempotent", is_flag=True, help="It may be executed again after the daemon ended in it.")
@click.option(
    "--expires",
    metavar="TIME",
    callback=_seconds,
    help="How long the result is kept: 90s, 15m, 2h, 1h30m, 30d.",
)
@_talks
def submit_run(
    file: BinaryIO,
    url: str | None,
    config: Path | None,
    *,
    path: str,
    lane: str | None,
    expires: float | None,
    idempotent: bool,
) -> None:
    """Submit the request in FILE (JSON; - is stdin), and print the id of the run."""
    try:
        body = json.loads(file.read())
    except ValueError as error:
        raise CommandError(f"{file.name} is not JSON: {error}", exit_code=MISUSED) from None
    wanted = {"path": path, "body": body, "lane": lane, "idempotent": idempotent, "expires_s": expires}
    run = _daemon(url, config).ask("POST", _API, {k: v for k, v in wanted.items() if v is not None})
    click.echo(printable(str(run["id"])))


@runs_group.command("list")
@click.option(
    "--status",
    type=click.Choice(["queued", "running", "succeeded", "failed", "cancelled", "interrupted", "expired"]),
    help="Only runs of this status.",
)
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="At most so many."
)
@_JSON
@_talks
def list_runs(status: str | None, limit: int, url: str | None, config: Path | None, *, as_json: bool) -> None:
    """List the newest runs first."""
    query = f"?limit={limit}" + (f"&status={status}" if status else "")
    document = _daemon(url, config).ask("GET", _API + query)
    if as_json:
        print_json(document)
    else:
        click.echo(_table(document["runs"]))


@runs_group.command("show")
@_ID
@_JSON
@_talks
def show_run(run_id: str, url: str | None, config: Path | None, *, as_json: bool) -> None:
    """Show all of one run."""
    run = _daemon(url, config).ask("GET", _path(run_id))
    if as_json:
        print_json(run)
    else:
        click.echo(_described(run))


@runs_group.command("cancel")
@_ID
@_talks
def cancel_run(run_id: str, url: str | None, config: Path | None) -> None:
    """Cancel a run. Its slot is free when this command ends."""
    run = _daemon(url, config).ask("DELETE", _path(run_id))
    click.echo(f"{printable(str(run['id']))} is {run['status']}")


@runs_group.command("result")
@_ID
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write it there instead of to stdout.",
)
@_talks
def write_result(run_id: str, output: Path | None, url: str | None, config: Path | None) -> int:
    """Write the answer of a run as it came. Ends with 1 where it is an error."""
    daemon = _daemon(url, config)
    run = daemon.ask("GET", _path(run_id))
    status = (run["result"] or {}).get("status", 0)
    with ExitStack() as stack:
        answer = stack.enter_context(daemon.fetch(f"{_path(run_id)}/result", also=status))
        stream: BinaryIO = sys.stdout.buffer
        if output is not None:
            stream = stack.enter_context(output.open("wb"))
        for piece in answer.iter_content(_PIECE_BYTES):
            stream.write(piece)
        stream.flush()
    if run["status"] == "failed":
        complain(f"the run has failed: {run['error']['message']} ({run['error']['code']})")
        return FAILED
    return DONE


def _daemon(url: str | None, config: Path | None) -> Daemon:
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    return Daemon(find_daemon(url or _common_url(), config))


def _path(run_id: str) -> str:
    from urllib.parse import quote  # noqa: PLC0415

    return f"{_API}/{quote(run_id, safe='')}"


def _table(runs: list[dict[str, Any]]) -> str:
    """One line a run, nothing cut off."""
    rows = [
        (
            run["id"],
            run["status"],
            run["lane"],
            run["model"],
            run["instance"],
            run["created_at"],
            run["ended_at"],
            None if run["result"] is None else f"{run['result']['status']}, {run['result']['size_bytes']} B",
        )
        for run in runs
    ]
    return "\n".join(table(_COLUMNS, rows))


def _described(run: dict[str, Any]) -> str:
    """One line a field, those without a value left out."""
    shown = {
        **run,
        "error": run["error"] and f"{run['error']['message']} ({run['error']['code']})",
        "result": run["result"] and ", ".join(f"{name} {value}" for name, value in run["result"].items()),
    }
    width = max(map(len, shown))
    return "\n".join(
        f"{name.ljust(width)}  {printable(str(value))}" for name, value in shown.items() if value is not None
    )
