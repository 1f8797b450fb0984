"""`requests` and `explain`: the last requests, one of them in a sentence, and where one would go."""

from __future__ import annotations

import json
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from manager.cli.commands import _JSON, _common_url, _talks, program
from manager.cli.failures import DONE, REFUSED, printable, warn
from manager.cli.options import follow_option, when
from manager.cli.printing import Columns, aligned, one_line, print_json
from manager.domain.money import micro_usd, usd_text
from manager.domain.record import LOCAL, Outcome
from manager.domain.roles import RequestKind
from manager.domain.wording import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from manager.cli.client import Daemon

    Command = TypeVar("Command", bound=Callable[..., Any])

_LISTED = 20
_MOST = 1000
_FOLLOW_S = 1.0
_NONE = "-"
_HEADINGS = ("TIME", "OUTCOME", "PROJECT", "ASKED", "INSTANCE", "MODEL", "TOOK", "TOKENS", "REASON", "ID")
_FILTERS = ("project", "role", "model", "instance", "key")


def _filtered(command: Command) -> Command:
    outcome = click.option(
        "--outcome", type=click.Choice(get_args(Outcome)), help="Only those of this outcome."
    )
    command = outcome(command)
    for name in reversed(_FILTERS):
        command = click.option(f"--{name}", metavar=name.upper(), help=f"Only those of this {name}.")(command)
    since = click.option(
        "--since",
        metavar="WHEN",
        callback=when,
        help="Only those that ended since: today, yesterday, 15m, 7d or 2026-03-01T12:00:00Z.",
    )
    return since(command)


@program.group("requests", invoke_without_command=True)
@follow_option("Go on with each request that ends, until Ctrl-C.")
@click.option(
    "--limit", type=click.IntRange(1, _MOST), default=_LISTED, show_default=True, help="How many to list."
)
@_filtered
@_JSON
@_talks
@click.pass_context
def requests_group(
    context: click.Context,
    /,
    *,
    follow: bool,
    limit: int,
    url: str | None,
    config: Path | None,
    as_json: bool,
    **filters: str | None,
) -> None:
    """List the last requests, newest first: the open ones, then those that ended.

    `requests show ID` explains one of them, `requests cancel ID` ends one that is open.
    """
    if context.invoked_subcommand is not None:
        return
    daemon = _daemon(url, config)
    if follow:
        _follow(daemon, limit, filters, as_json=as_json)
        return
    document = daemon.last_requests(limit=limit, **filters)
    if as_json:
        print_json(document)
    elif document["requests"]:
        click.echo("\n".join(table(document["requests"])))
    else:
        click.echo("no requests", err=True)
    if not document["requests"]:
        _warn_of_unknown(daemon, filters)


@requests_group.command("show")
@click.argument("request_id", metavar="ID")
@_JSON
@_talks
def show(request_id: str, url: str | None, config: Path | None, as_json: bool) -> None:
    """Explain one request: where it went, and why not elsewhere."""
    document = _daemon(url, config).request(request_id)
    _print(document, _explained, as_json=as_json)


@requests_group.command("cancel")
@click.argument("request_id", metavar="ID")
@_talks
def cancel(request_id: str, url: str | None, config: Path | None) -> None:
    """Cancel an open request. Its client gets an error."""
    _daemon(url, config).cancel_request(request_id)
    click.echo(f"{printable(request_id)}: cancelled")


@program.command()
@click.argument("model")
@click.option(
    "--kind",
    type=click.Choice([kind.value for kind in RequestKind]),
    help="What is asked for; else generate.",
)
@click.option("--lane", metavar="ROLE", help="As a request in this lane.")
@click.option("--instance", metavar="ID", help="As a request that is pinned to this instance.")
@click.option("--key", metavar="NAME", help="As a request with this key.")
@click.option("--text", metavar="TEXT", help="What the user asks, for the model `auto`.")
@_JSON
@_talks
def explain(
    model: str,
    *,
    text: str | None,
    kind: str | None,
    lane: str | None,
    instance: str | None,
    key: str | None,
    url: str | None,
    config: Path | None,
    as_json: bool,
) -> int:
    """Say where a request for MODEL (or a role) would go now, and why. Starts nothing.

    Exit 4 where the request would be refused.
    """
    daemon = _daemon(url, config)
    document = daemon.explain(model=model, kind=kind, lane=lane, instance=instance, key=key, text=text)
    _print(document, _decided, as_json=as_json)
    return DONE if document.get("refused") is None else REFUSED


def _print(document: dict[str, Any], say: Callable[[Mapping[str, Any]], list[str]], *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        click.echo("\n".join(say(document)))


def table(requests: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a heading and a line for each request."""
    return aligned([_HEADINGS, *map(_cells, requests)])


def _daemon(url: str | None, config: Path | None) -> Daemon:
    from manager.cli.client import Daemon  # noqa: PLC0415
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    group = click.get_current_context().parent
    given = {} if group is None else group.params  # `requests --config FILE show ID`
    return Daemon(find_daemon(url or given.get("url") or _common_url(), config or given.get("config")))


def _follow(daemon: Daemon, limit: int, filters: Mapping[str, str | None], *, as_json: bool) -> None:
    """Print what ended, oldest first, then each request that ends."""
    columns, heading, cursor = Columns(), [_HEADINGS], None
    while True:
        document = daemon.last_requests(limit=limit, after=cursor, **filters)
        if cursor is None and not document["requests"]:
            _warn_of_unknown(daemon, filters)
        ended = [one for one in reversed(document["requests"]) if not one["open"]]
        if as_json:
            for one in ended:
                click.echo(json.dumps(one))
        else:
            rows = [*heading, *map(_cells, ended)]
            columns.widen(rows)
            for row in rows:
                click.echo(columns.line(row))
        if len(ended) < _MOST:
            time.sleep(_FOLLOW_S)
        cursor, limit, heading = document["cursor"], _MOST, []


def _warn_of_unknown(daemon: Daemon, filters: Mapping[str, str | None]) -> None:
    """Warn of an instance or role that is not there. The history may have requests of former ones."""
    if (instance := filters["instance"]) is not None:
        document = daemon.ask("GET", "/api/runtime/compute/instances")
        ids = daemon.read(lambda body: [str(one["id"]) for one in body["instances"]], document)
        if instance not in ids:
            warn(f"there is no instance {instance!r}; there is: {listed(ids)}")
    if (role := filters["role"]) is not None:
        document = daemon.ask("GET", "/api/settings/models")
        roles = daemon.read(lambda body: list(map(str, body["roles"])), document)
        if role not in roles:
            warn(f"there is no role {role!r}; there is: {listed(roles)}")


def _cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    tokens = one["output_tokens"]
    asked = one["role"] or one["lane"] or one["model"] or one["path"]
    cells = (
        _local_time(one["ts"]),
        "open" if one["open"] else f"{one['outcome']}",
        one["project_id"],
        asked,
        one["effective_target"],
        one["model"] if one["model"] != asked else None,
        _duration(one["duration_ms"]),
        None if tokens is None else str(tokens),
        one["fallback_reason"],
        one["request_id"],
    )
    return tuple(" ".join(printable(cell or _NONE).split()) for cell in cells)


def _explained(document: Mapping[str, Any]) -> list[str]:
    decision = document["decision"]
    lines = [
        printable(document["summary"]),
        "",
        *_pairs(
            ("request", document["request_id"]),
            ("trace", document["trace_id"]),
            ("began", _local_time(document["ts"], day=True)),
            ("path", document["path"]),
            ("project", document["project_id"]),
            ("key", document.get("key")),
            ("asked for", document.get("requested_model")),
            ("task", document.get("task_type")),
            ("tier", document.get("tier")),
            ("role", document["role"]),
            ("lane", document["lane"]),
            ("model", document["model"]),
            ("policy", document["policy"]),
            ("endpoint", document["endpoint"]),
            ("status", document["status"] or None),
            ("queued", _duration(document["queue_ms"])),
            ("started in", _duration(document["start_ms"])),
            ("first byte", _duration(document["ttfb_ms"])),
            ("took", _duration(document["duration_ms"])),
            ("tokens", _tokens(document)),
            ("paid", _paid(document)),
        ),
    ]
    attempts = [
        (one["instance"], one["model"], one["because"], one["outcome"] or "open", _why(one))
        for one in decision["attempts"]
    ]
    passed = [(one["instance"], one["model"], one["words"]) for one in decision["passed_over"]]
    lines += _section("attempts", attempts, decision["more_attempts"])
    lines += _section("passed over", passed, decision["more_passed_over"])
    return lines


def _decided(document: Mapping[str, Any]) -> list[str]:
    from manager.domain.explanation import passed_over_words  # noqa: PLC0415

    attempts = [(one["instance"], one["model"], one["because"]) for one in document["attempts"]]
    passed = [(one["instance"], one["model"], passed_over_words(one)) for one in document["passed_over"]]
    lines = [printable(document["summary"])]
    lines += _pairs(("role", document["role"]), ("policy", document["policy"]))
    return [*lines, *_section("attempts", attempts), *_section("passed over", passed)]


def _section(title: str, rows: Sequence[Sequence[str]], more: int = 0) -> list[str]:
    lines = [f"  {line}" for line in aligned([tuple(map(one_line, row)) for row in rows])]
    if more:
        lines.append(f"  and {more} more")
    return ["", f"{title}:", *lines] if lines else []


def _pairs(*pairs: tuple[str, object]) -> list[str]:
    known = [(name, one_line(str(value))) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in known), default=0)
    return [f"{name.ljust(width)}  {value}" for name, value in known]


def _why(attempt: Mapping[str, Any]) -> str:
    """Return why an attempt failed; nothing for one that did not."""
    return ": ".join(filter(None, (attempt["reason"], attempt["message"])))


def _tokens(document: Mapping[str, Any]) -> str | None:
    given, made = document["input_tokens"], document["output_tokens"]
    return None if given is None and made is None else f"{given or 0} in, {made or 0} out"


def _paid(document: Mapping[str, Any]) -> str | None:
    """Return the paid server that was asked, and the cost; None where none was."""
    provider = document.get("provider", LOCAL)
    return None if provider == LOCAL else f"{usd_text(micro_usd(document['cost_usd']))} USD to {provider}"


def _duration(milliseconds: float | None) -> str | None:
    from manager.domain.explanation import duration_words  # noqa: PLC0415

    return None if milliseconds is None else duration_words(milliseconds)


def _local_time(text: str, *, day: bool = False) -> str:
    at = datetime.fromisoformat(text).astimezone()
    return at.isoformat(sep=" ", timespec="seconds") if day else at.strftime("%m-%d %H:%M:%S")
