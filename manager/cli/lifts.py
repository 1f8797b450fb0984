"""`lift`: the deny rules of an instance do not hold for a time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from manager.cli.client import Daemon
from manager.domain.durations import parse_duration

if TYPE_CHECKING:
    from manager.cli.locate import Endpoint


def lift_rules(
    endpoint: Endpoint, instance_id: str, *, lasts: str | None, ends: bool, reason: str | None
) -> None:
    if ends == (lasts is not None):
        raise click.UsageError("give either --for TIME or --end")
    if lasts is None:
        change = Daemon(endpoint).end_lift(instance_id)
        words = "are in force again" if change.changed else "were in force already"
        click.echo(f"the deny rules of {instance_id} {words}")
        return
    until = _end(lasts)
    change = Daemon(endpoint).lift(instance_id, until.isoformat(timespec="seconds"), reason)
    click.echo(f"the deny rules of {instance_id} are lifted until {until:%Y-%m-%dT%H:%M:%SZ}")


def _end(lasts: str) -> datetime:
    try:
        return datetime.now(UTC) + timedelta(seconds=parse_duration(lasts))
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(f"{lasts!r}: {error}", param_hint="--for") from error
