"""`breaker reset`: requests go to an instance again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from manager.cli.client import Daemon

if TYPE_CHECKING:
    from manager.cli.locate import Endpoint


def reset_breaker(endpoint: Endpoint, instance_id: str) -> None:
    instance = Daemon(endpoint).reset_breaker(instance_id)
    click.echo(
        f"the breaker of {instance.id} is closed: it gets requests again as soon as its server answers"
    )
