"""`drain`, `resume`, `restart`, `upgrade` and `rollback`: progress on stderr, the outcome on stdout."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from manager.cli.client import Daemon, RefusalError
from manager.cli.failures import CommandError, printable
from manager.cli.progress import follow
from manager.cli.tables import drained_text

if TYPE_CHECKING:
    from manager.cli.client import Instance
    from manager.cli.locate import Endpoint


def drain_instance(
    endpoint: Endpoint, instance_id: str, *, reason: str | None, for_s: float | None, keep_running: bool
) -> None:
    """Take an instance out of service, and wait until its open requests have ended."""
    until = None if for_s is None else _after(for_s)
    change = follow(
        endpoint,
        instance_id,
        "drain",
        lambda daemon: daemon.drain(instance_id, reason=reason, until=until, stop=not keep_running),
    )
    instance = change.instance
    if instance.drained is None:  # somebody has put it back meanwhile, or its time has passed
        click.echo(f"{instance_id} was drained, and is in service again")
        return
    server = "container" if instance.has_container else "server"
    runs = f"its {server} runs on" if instance.phase == "ready" else f"it is {instance.phase}"
    click.echo(f"{instance_id} is out of service ({drained_text(instance.drained)}); {runs}")


def resume_instance(endpoint: Endpoint, instance_id: str) -> None:
    change = Daemon(endpoint).resume(instance_id)
    again = "is in service again" if change.changed else "was in service already"
    click.echo(f"{instance_id} {again}")


def restart_instance(endpoint: Endpoint, instance_id: str) -> None:
    began = time.monotonic()
    change = follow(endpoint, instance_id, "restart", lambda daemon: daemon.restart(instance_id))
    click.echo(f"{instance_id} is ready at {change.instance.endpoint} ({time.monotonic() - began:.1f} s)")


def upgrade_instance(endpoint: Endpoint, instance_id: str, image: str) -> None:
    """Have an instance use another image."""
    try:
        change = follow(endpoint, instance_id, "upgrade", lambda daemon: daemon.upgrade(instance_id, image))
    except CommandError as error:
        if isinstance(error.__cause__, RefusalError) and error.__cause__.code == "image_missing":
            error.next_step = None  # the message names the command
        raise
    if not change.changed:
        click.echo(f"{instance_id} uses {image} already")
        return
    click.echo(f"{instance_id} uses {image}; {_since(change.instance)}")


def roll_instance_back(endpoint: Endpoint, instance_id: str) -> None:
    """Return to the image before the last upgrade."""
    change = follow(endpoint, instance_id, "rollback", lambda daemon: daemon.rollback(instance_id))
    chosen = change.instance.image_override
    image = "the image of its template" if chosen is None else chosen.image
    click.echo(f"{instance_id} uses {printable(image)} again; {_since(change.instance)}")


def _after(seconds: float) -> str:
    try:
        return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
    except OverflowError as error:
        raise click.BadParameter("expected a time before the year 10000", param_hint="--for") from error


def _since(instance: Instance) -> str:
    if instance.phase == "ready":
        return f"it is ready at {instance.endpoint}"
    return f"it is {instance.phase}, and its next start has that image"
