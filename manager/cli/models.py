"""`load` and `unload`: models in the memory of one instance."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from manager.cli.progress import follow

if TYPE_CHECKING:
    from manager.cli.locate import Endpoint


def load_model(endpoint: Endpoint, instance_id: str, model: str, keep_alive: str | None) -> None:
    began = time.monotonic()
    kept = _number(keep_alive)
    change = follow(endpoint, instance_id, "load", lambda daemon: daemon.load(instance_id, model, kept))
    if change.changed:
        click.echo(f"{model} is loaded on {instance_id} ({time.monotonic() - began:.1f} s)")
    else:
        click.echo(f"{model} was loaded already on {instance_id}")


def unload_model(endpoint: Endpoint, instance_id: str, model: str) -> None:
    change = follow(endpoint, instance_id, "unload", lambda daemon: daemon.unload(instance_id, model))
    what = "is unloaded from" if change.changed else "was not loaded on"
    click.echo(f"{model} {what} {instance_id}")


def _number(text: str | None) -> str | float | None:
    """Ollama takes a number of seconds as a number only."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
