"""`reap`: one sweep, by the daemon where one runs, else by this process."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import click

from manager.cli.client import Daemon, Swept
from manager.cli.failures import DONE, FAILED, printable
from manager.cli.locate import Endpoint, configured_daemon, current_holder, find_daemon, load
from manager.errors import StateDirHeldError

if TYPE_CHECKING:
    from pathlib import Path

    from manager.settings import LoadedSettings

# A daemon that starts has no address yet, and another sweep has none at all but ends soon.
_WAIT_S = 60.0
_LOOK_S = 0.2


def reap(url: str | None, config: Path | None, *, dry_run: bool) -> int:
    """Returns the exit code: 1 when an instance could not be stopped, or the engine is away.

    Raises:
        CommandError, ManagerError: nothing was swept.
    """
    if url:
        return _ask(find_daemon(url, config), dry_run=dry_run)
    loaded = load(config)
    deadline = time.monotonic() + _WAIT_S
    while True:
        holder = current_holder(loaded.settings.state.dir)
        if holder is not None and holder.url is not None:
            return _ask(configured_daemon(loaded), dry_run=dry_run)
        try:
            if holder is None:
                return _report(_sweep(loaded, dry_run=dry_run))
        except StateDirHeldError:
            if time.monotonic() >= deadline:
                raise
        else:
            if time.monotonic() >= deadline:
                raise StateDirHeldError(
                    f"the state directory {loaded.settings.state.dir} is in use by {holder}"
                )
        time.sleep(_LOOK_S)


def _ask(endpoint: Endpoint, *, dry_run: bool) -> int:
    return _report(Daemon(endpoint).reap(dry_run=dry_run))


def _sweep(loaded: LoadedSettings, *, dry_run: bool) -> tuple[Swept, ...]:
    from manager.cli.logs import configure_logging  # noqa: PLC0415

    log = configure_logging(loaded.settings.log, least="error")
    from manager.daemon import sweep_once  # noqa: PLC0415  (brings the whole daemon along)

    try:
        swept = asyncio.run(sweep_once(loaded, dry_run=dry_run))
    finally:
        log.close()
    return tuple(Swept(one.instance, one.action, one.detail) for one in swept)


def _report(swept: tuple[Swept, ...]) -> int:
    words = {"would_stop": "would be stopped"}
    for one in swept:
        click.echo(printable(f"{one.id}: {words.get(one.action, one.action)}: {one.detail}"))
    return FAILED if any(one.action == "failed" for one in swept) else DONE
