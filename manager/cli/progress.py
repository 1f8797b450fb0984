"""`start`, `stop` and `pull`: progress on stderr, the outcome on stdout."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Self

import click
import requests

from manager.cli.client import Daemon, DaemonUnreachableError, RefusalError
from manager.cli.failures import CommandError, printable
from manager.cli.tables import duration

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from rich.progress import Progress, TaskID

    from manager.cli.client import Change, Instance, PullLine
    from manager.cli.locate import Endpoint

_LOOK_S = 0.3
# A daemon that answers nothing for this long is given up, although the connection still stands.
_PATIENCE_S = 30.0
_LOG_LINES = 20
_FAILED = {
    "stop": "was not stopped",
    "drain": "was not stopped",
    "load": "did not load the model",
    "unload": "may still have the model",
}
_IMAGE_CHANGES = frozenset({"upgrade", "rollback"})
_UNDONE_BY = {
    "start": "stop",
    "stop": "start",
    "drain": "resume",
    "restart": "stop",
    "upgrade": "rollback",
    "rollback": "stop",
}


def start_instance(endpoint: Endpoint, instance_id: str) -> None:
    began = time.monotonic()
    change = follow(endpoint, instance_id, "start", lambda daemon: daemon.start(instance_id))
    instance = change.instance
    if change.changed:
        click.echo(f"{instance.id} is ready at {instance.endpoint} ({time.monotonic() - began:.1f} s)")
    else:
        click.echo(f"{instance.id} was running already, at {instance.endpoint}")
    _remark(instance)


def stop_instance(endpoint: Endpoint, instance_id: str, *, force: bool) -> None:
    change = follow(endpoint, instance_id, "stop", lambda daemon: daemon.stop(instance_id, force=force))
    if change.instance.phase not in {"stopped", "failed"}:  # somebody has started it again meanwhile
        click.echo(f"{instance_id} was stopped, and is {change.instance.phase} again")
    else:
        click.echo(f"{instance_id} is stopped" if change.changed else f"{instance_id} was stopped already")


def pull_images(endpoint: Endpoint, image: str | None) -> None:
    lines = Daemon(endpoint).pull(image)
    outcomes: dict[str, str] = {}
    with ExitStack() as stack:
        shown = stack.enter_context(_Bars()) if sys.stderr.isatty() else _Lines()
        for line in lines:
            if line.image is not None:
                outcomes.setdefault(line.image, "pulled")
                if "up to date" in line.status:
                    outcomes[line.image] = "is up to date"
                elif line.status.startswith("kept"):
                    outcomes[line.image] = "is there and could not be pulled anew"
                shown.show(line)
            elif line.status == "done":
                break
        else:
            raise DaemonUnreachableError(
                "the daemon ended in the middle of the pull", "pull again: what is there already is kept"
            )
    for name, outcome in outcomes.items():
        click.echo(f"{outcome} {name}" if outcome == "pulled" else f"{name} {outcome}")


def follow(endpoint: Endpoint, instance_id: str, verb: str, call: Callable[[Daemon], Change]) -> Change:
    """Make a call that takes long, showing the phases of the instance meanwhile; `verb` is the command."""
    request = _Request(lambda: call(Daemon(endpoint)))
    try:
        with _Phases(instance_id) as phases:
            answered = time.monotonic()
            looking = Daemon(endpoint)
            while not request.wait(_LOOK_S):
                try:
                    phases.show(looking.instance(instance_id))
                    answered = time.monotonic()
                except DaemonUnreachableError:
                    if time.monotonic() - answered > _PATIENCE_S:
                        raise
                except RefusalError:
                    pass  # the call itself is refused as well, and says so better
    except KeyboardInterrupt:
        other = _UNDONE_BY.get(verb)
        undo = f"; `ollama-manager {other} {instance_id}` would undo it" if other else ""
        click.echo(f"\nThe {verb} goes on in the daemon{undo}.", err=True)
        raise
    try:
        return request.result()
    except RefusalError as error:
        raise _told_fully(error, endpoint, instance_id, verb) from error


def _told_fully(error: RefusalError, endpoint: Endpoint, instance_id: str, verb: str) -> CommandError:
    """The failure of the daemon, with the container's last words, which the instance may still know."""
    if error.status < requests.codes.server_error:
        return error
    lines = error.log_tail
    if not lines:
        with suppress(CommandError):
            reason = Daemon(endpoint).instance(instance_id).reason
            lines = reason.log_tail if reason is not None and reason.code == error.code else ()
    outcome = _FAILED.get(verb, "did not start")
    if verb in _IMAGE_CHANGES and error.code == "image_missing":
        outcome = "keeps its image"  # the daemon looks for the new one before it changes anything
    message = f"{instance_id} {outcome}: {error.message}" + ("; its container said last:" if lines else "")
    return CommandError(
        message, exit_code=error.exit_code, next_step=error.next_step, lines=lines[-_LOG_LINES:]
    )


def _remark(instance: Instance) -> None:
    """A fallback is visible wherever the instance is."""
    if instance.reason is not None:
        click.echo(f"note: {printable(instance.reason.message)} ({instance.reason.code})", err=True)


class _Request:
    """A call in a thread of its own, so that the main thread can be interrupted."""

    def __init__(self, call: Callable[[], Change]) -> None:
        self._call = call
        self._done = threading.Event()
        self._change: Change | None = None
        self._error: Exception | None = None
        threading.Thread(target=self._run, name="request", daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        return self._done.wait(timeout_s)

    def result(self) -> Change:
        if self._error is not None:
            raise self._error
        if self._change is None:
            raise RuntimeError("the call has not ended")
        return self._change

    def _run(self) -> None:
        try:
            self._change = self._call()
        except Exception as error:  # noqa: BLE001  (raised again by `result`)
            self._error = error
        finally:
            self._done.set()


class _Phases:
    """The phases of an instance on stderr: a spinner on a terminal, elsewhere a line for each."""

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._shown = ""
        self._began = time.monotonic()
        self._stack = ExitStack()
        self._status = None
        if sys.stderr.isatty():
            from rich.console import Console  # noqa: PLC0415  (only for people)

            self._status = Console(stderr=True, highlight=False).status(f"{instance_id}: asking the daemon")

    def __enter__(self) -> Self:
        if self._status is not None:
            self._stack.enter_context(self._status)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def show(self, instance: Instance) -> None:
        text = instance.phase
        if instance.phase == "draining":
            text += f", {instance.in_flight} in flight (`stop --force` does not wait)"
        if self._status is not None:
            taken = duration(time.monotonic() - self._began)
            self._status.update(f"{self._instance_id}: {text} [dim]{taken}[/dim]")
        elif text != self._shown:
            click.echo(f"{self._instance_id}: {text}", err=True)
        self._shown = text


class _Lines:
    """A pull where nobody watches: a line when a layer, or the whole, comes to something new."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def show(self, line: PullLine) -> None:
        what = line.layer or ""
        status = printable(line.status)
        if self._seen.get(what) != status:
            self._seen[what] = status
            click.echo(f"{what}: {status}" if what else status, err=True)


class _Bars:
    """A pull on a terminal: a bar for every layer that is under way."""

    _ENDS = ("Pull complete", "Already exists", "Download complete")

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415  (only for people)
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

        self._progress: Progress = Progress(
            TextColumn("{task.fields[layer]}", markup=False),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, line: PullLine) -> None:
        status = printable(line.status)
        if line.layer is None or status.startswith("Pulling from"):
            self._progress.console.print(
                f"{line.layer}: {status}" if line.layer else status, markup=False, style="dim"
            )
            return
        task = self._tasks.get(line.layer)
        if task is None:
            task = self._tasks[line.layer] = self._progress.add_task(status, total=None, layer=line.layer)
        done = status in self._ENDS
        self._progress.update(
            task,
            description=status,
            completed=line.current_bytes,
            total=line.total_bytes,
            visible=status not in {"Pull complete", "Already exists"},
        )
        if done:
            self._progress.update(task, total=1, completed=1)
