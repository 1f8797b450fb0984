"""`lift`: the deny rules of an instance do not hold for a time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from manager.cli.client import Daemon

if TYPE_CHECKING:
    from manager.cli.locate import Endpoint


def lift_rules(
    endpoint: Endpoint, instance_id: str, *, for_s: float | None, ends: bool, reason: str | None
) -> None:
    if ends == (for_s is not None):
        raise click.UsageError("give either --for TIME or --end")
    if for_s is None:
        change = Daemon(endpoint).end_lift(instance_id)
        words = "are in force again" if change.changed else "were in force already"
        click.echo(f"the deny rules of {instance_id} {words}")
        return
    try:
        until = datetime.now(UTC) + timedelta(seconds=for_s)
    except OverflowError:
        raise click.UsageError("--for ends beyond the year 9999") from None
    change = Daemon(endpoint).lift(instance_id, until.isoformat(timespec="seconds"), reason)
    click.echo(f"the deny rules of {instance_id} are lifted until {until:%Y-%m-%dT%H:%M:%SZ}")
