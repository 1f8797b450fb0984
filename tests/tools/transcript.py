"""How demonstrations are shown: commands as a user would type them, what came of them, how long they took."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.support.daemon import ROOT
from tests.tools.console import ToolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.daemon import Daemon


class Transcript:
    """What is shown: commands as a user would type them, what came of them, and how long they took."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._number = 0
        self._bold, self._dim, self._plain = (
            ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
        )

    def title(self, text: str) -> None:
        self._print(f"{self._bold}{text}{self._plain}")

    def step(self, text: str) -> None:
        self._number += 1
        self._print(f"\n{self._bold}{self._number}. {text}{self._plain}")

    def command(self, text: str) -> None:
        self._print(f"   {self._dim}$ {text}{self._plain}")

    def result(self, text: str) -> None:
        self._print("\n".join(f"   {line}".rstrip() for line in text.splitlines()))

    def piece(self, text: str) -> None:
        """A part of a line, as it comes."""
        print(text, end="", flush=True)

    @contextmanager
    def timed(self, text: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._print(f"   {text} {self._dim}({time.monotonic() - began:.1f} s){self._plain}")

    def end(self, text: str) -> None:
        self._print(f"\n{self._bold}{text}{self._plain} ({time.monotonic() - self._began:.0f} s in all)")

    @staticmethod
    def _print(text: str) -> None:
        print(text, flush=True)


def run_command(show: Transcript, daemon: Daemon, *arguments: str) -> None:
    """Run a command of ours as a user would; it must exit 0."""
    show.command(f"ollama-manager {' '.join(arguments)}")
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "manager", *arguments],
        cwd=daemon.home,
        env={
            **os.environ,
            "OLLAMA_MANAGER_URL": daemon.url,
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "100",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    expect(
        result.returncode == 0,
        f"`ollama-manager {' '.join(arguments)}` exits 0, not {result.returncode}: {result.stdout}",
    )
    show.result(result.stdout.strip("\n"))
    if arguments[0] != "status":
        show.result(f"({time.monotonic() - began:.1f} s)")


def expect(holds: bool, what: str) -> None:
    """Raise ToolError unless it holds."""
    if not holds:
        raise ToolError(f"not as it should be; expected: {what}")


def tail(log: str) -> str:
    return "\n".join(log.splitlines()[-20:])
