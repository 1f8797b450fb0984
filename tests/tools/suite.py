"""`make check` and `make test`: every step is taken, whatever became of those before; one failure fails all.

The last line of `make test` is pytest's own summary.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.tools.console import ToolError, say
from tests.tools.system import (
    COMPILER,
    COMPOSE,
    DOCKERD,
    IP,
    IPTABLES,
    SYSTEM_SOCKET,
    lacking,
    provide,
    why_no_engine,
)

_BIN = Path(sys.executable).parent
_PYTEST = ["-m", "pytest", f"--color={'yes' if sys.stdout.isatty() else 'no'}"]
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SUMMARY = re.compile(r"=+ .* in [0-9.]+s.* =+|.* in [0-9.]+s(?: \([0-9:]+\))?")

STATIC = (
    (str(_BIN / "ruff"), "check", "--output-format=concise", "."),
    (str(_BIN / "ruff"), "format", "--check", "."),
    (str(_BIN / "mypy"),),
    (str(_BIN / "lint-imports"),),
)
# The pure parts have no excuse: every line and branch of them is tested.
_PURE = ("manager/domain/*", "manager/wire/*")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.tools.suite", description=__doc__)
    parser.add_argument("what", choices=("check", "test"))
    options, pytest_arguments = parser.parse_known_args()
    began = time.monotonic()
    if options.what == "test":
        _provide_for_tests()
    failed = [step for command in STATIC if (step := _failed(*command))]
    if options.what == "check":
        failed += filter(None, [_failed(sys.executable, *_PYTEST, "-q", "tests/unit", *pytest_arguments)])
        summary = ""
    else:
        summary = _test(pytest_arguments, failed)
    say("")
    for step in failed:
        say(f"FAILED: {step}")
    say(f"make {options.what}: {'failed' if failed else 'all good'} ({time.monotonic() - began:.0f} s)")
    if summary:
        print(summary, flush=True)
    return 1 if failed else 0


def _provide_for_tests() -> None:
    needs = [COMPILER]
    if os.geteuid() == 0:
        needs += [DOCKERD, IPTABLES, IP]
        if (
            lacking([COMPOSE])
            and subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
        ):
            needs.append(COMPOSE)
    provide(needs)
    if os.geteuid() != 0:
        url = os.environ.get("DOCKER_HOST", SYSTEM_SOCKET)
        trouble = why_no_engine(url)
        if trouble is not None:
            raise ToolError(
                "the tests need root, for a Docker engine of their own, or an engine of yours for one inside "
                f"it; {url} does not answer: {trouble}\n`make check` needs neither."
            )


def _test(arguments: list[str], failed: list[str]) -> str:
    """All tests under coverage; adds what failed to `failed` and returns pytest's summary line."""
    command = [sys.executable, "-m", "coverage", "run", *_PYTEST, *arguments]
    say(f"== {_shown(command)}")
    summary = ""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if _SUMMARY.fullmatch(_COLOUR.sub("", line).strip()):
                summary = line.rstrip("\n")
    if process.returncode:
        failed.append(f"pytest (exit status {process.returncode})")
    for report in (
        ["report"],
        ["report", f"--include={','.join(_PURE)}", "--fail-under=100"],
    ):
        failed += filter(None, [_failed(sys.executable, "-m", "coverage", *report)])
    return summary


def _failed(*command: str) -> str | None:
    """Run a command; its name when it failed."""
    say(f"== {_shown(command)}")
    try:
        status = subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        status = 127
    return _shown(command) if status else None


def _shown(command: tuple[str, ...] | list[str]) -> str:
    """A command without the directory of the environment."""
    return " ".join([Path(command[0]).name, *command[1:]])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolError as error:
        say(f"make: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
