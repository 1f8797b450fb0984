"""`top`: a live view of the whole box on a terminal."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Self

import click

from manager.cli.commands import _common_url, _talks
from manager.cli.failures import MISUSED, CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from manager.cli.live import Feed
    from manager.cli.locate import Endpoint

# Clocks are drawn anew this often.
_REFRESH_S = 1.0
_END = b"qQ\x03\x04"
_READ_BYTES = 1024


@click.command("top")
@_talks
def top_command(*, url: str | None, config: Path | None) -> None:
    """Show cards, instances, lanes and the last requests, live, until q or Ctrl-C.

    A daemon that goes away is waited for, once it has been there.
    """
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        raise CommandError(
            "`top` needs a terminal",
            exit_code=MISUSED,
            next_step="`ollama-manager status --watch` writes a line for every change",
        )
    from manager.cli.locate import find_daemon  # noqa: PLC0415

    _run(functools.partial(find_daemon, url or _common_url(), config))


def _run(locate: Callable[[], Endpoint]) -> None:
    from manager.cli.live import Feed  # noqa: PLC0415

    with _Wakeup() as wakeup:
        feed = Feed(locate, wakeup.set)
        try:
            feed.begin()
            with _keys(), _resizes(wakeup.set):
                _draw_until_ended(feed, wakeup, title=locate().url)
        except KeyboardInterrupt:
            return  # a way to end it
        finally:
            feed.end()


def _draw_until_ended(feed: Feed, wakeup: _Wakeup, *, title: str) -> None:
    from rich.console import Console, Group  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415

    from manager.cli.top_view import picture  # noqa: PLC0415

    console = Console(highlight=False)
    with Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            width, height = console.size
            lines = picture(feed.seen, width, height, now=time.monotonic(), title=title)
            live.update(Group(*lines), refresh=True)
            if wakeup.wait(_REFRESH_S):
                return


class _Wakeup:
    """Waits for news and for a key at once: news of threads and signals come through a pipe."""

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        return self

    def __exit__(self, *_: object) -> None:
        read, write, self._write = self._read, self._write, -1
        os.close(write)
        os.close(read)

    def set(self) -> None:
        """Wake the waiting thread; from any thread, also when nobody waits any more."""
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody waits
            os.write(self._write, b".")

    def wait(self, timeout_s: float) -> bool:
        """Wait for news or a key; whether the key ends the command."""
        ready, _, _ = select.select([self._read, sys.stdin], [], [], timeout_s)
        if self._read in ready:
            os.read(self._read, _READ_BYTES)
        if sys.stdin in ready:
            keys = os.read(sys.stdin.fileno(), _READ_BYTES)
            return not keys or any(key in _END for key in keys)
        return False


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Have keys arrive one by one, unseen, and the terminal as it was afterwards."""
    import termios  # noqa: PLC0415
    import tty  # noqa: PLC0415

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _resizes(notify: Callable[[], None]) -> Iterator[None]:
    """Call `notify` when the terminal has another size."""

    def resized(*_: Any) -> None:
        notify()

    before = signal.signal(signal.SIGWINCH, resized)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
