"""`make check` and `make test`: every step is taken, whatever became of those before; one failure fails all.

The last lines of `make test` are pytest's own summaries.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from manager.cli.machine import DOCKERD, IPTABLES, SYSTEM_SOCKET, lacking, why_no_engine
from tests.tools.console import ToolError, say
from tests.tools.system import COMPILER, COMPOSE, IP, provide

_BIN = Path(sys.executable).parent
_PYTEST = ["-m", "pytest", f"--color={'yes' if sys.stdout.isatty() else 'no'}"]
_COVERAGE = (sys.executable, "-m", "coverage")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SUMMARY = re.compile(r"=+ .* in [0-9.]+s.* =+|.* in [0-9.]+s(?: \([0-9:]+\))?")

STATIC = (
    (str(_BIN / "ruff"), "check", "--output-format=concise", "."),
    (str(_BIN / "ruff"), "format", "--check", "."),
    (str(_BIN / "mypy"),),
    (str(_BIN / "lint-imports"),),
)
_QUICK = ("tests/unit", "tests/contract")
_REAL = ("tests/api", "tests/relay", "tests/integration", "tests/web")
# Types take a minute of one core, in the time that the real tests leave.
_BESIDE = ("nice", "-n", "10")
_CORES = len(os.sched_getaffinity(0))
# Two at a time, the real tests use less than half of two cores: they wait for daemons, engines and timers.
_REAL_WORKERS = min(_CORES + 1, 8)
_TESTS_FAILED = 1  # pytest.ExitCode.TESTS_FAILED
_FAILURE = re.compile(r"(?:FAILED|ERROR) (tests/[^ ]+?\.py(?:::.+?)?)(?: - .*)?")
# A test that fails and then passes is flaky, which is a defect. More of them than this fail the run.
_MOST_FLAKY = 2
# The pure parts have no excuse: every line and branch of them is tested.
_PURE = ("manager/domain/*", "manager/wire/*")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.tools.suite", description=__doc__)
    parser.add_argument("what", choices=("check", "test"))
    options, pytest_arguments = parser.parse_known_args()
    began = time.monotonic()
    if options.what == "test":
        _provide_for_tests()
    failed: list[str] = []
    if options.what == "check":
        failed += [step for command in STATIC if (step := _failed(*command))]
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
    """Run all tests; add what failed to `failed`, and return pytest's summary lines and the flaky tests.

    The pure and quick ones use the processor: one process a core, under coverage. The others wait most of the
    time, so there are more of them than cores, and the static checks go on beside them. The tests of one file
    run in order, in one process.
    """
    each_file = ("--dist", "loadfile")
    quick = [sys.executable, *_PYTEST, "-p", "tests.tools.measured", "-n", str(_CORES), *each_file, *_QUICK]
    real = [sys.executable, *_PYTEST, "-n", str(_REAL_WORKERS), *each_file, *_REAL]
    failed += filter(None, [_failed(*_COVERAGE, "erase")])
    summaries: list[str] = []
    flaky: list[str] = []

    def run(command: list[str], paths: tuple[str, ...]) -> None:
        first = streamed([*command, *arguments])
        summaries.append(first.summary)
        status = first.status
        if status == _TESTS_FAILED:
            say("== failures are run once more, to tell defects of the product from flaky tests")
            again = streamed([sys.executable, *_PYTEST, "--last-failed", *paths, *arguments])
            summaries.append(again.summary)
            status = again.status
            flaky.extend(sorted(first.failures - again.failures))
        if status:
            failed.append(f"pytest {command[-1]} (exit status {status})")

    run(quick, _QUICK)
    with ThreadPoolExecutor(1) as beside:
        static = beside.submit(lambda: [_quietly(*_BESIDE, *command) for command in STATIC])
        run(real, _REAL)
    for test in flaky:
        say(f"FLAKY: {test}")
    if len(flaky) > _MOST_FLAKY:
        failed.append(f"{len(flaky)} flaky tests; at most {_MOST_FLAKY} are let pass")
    for step in (
        ["combine", "--quiet"],
        ["report"],
        ["report", f"--include={','.join(_PURE)}", "--fail-under=100"],
    ):
        failed += filter(None, [_failed(*_COVERAGE, *step)])
    for command, (status, output) in zip(STATIC, static.result(), strict=True):
        say(f"== {_shown(command)}")
        print(output, end="", flush=True)
        failed += [_shown(command)] if status else []
    summaries += [f"FLAKY: {test}" for test in flaky]
    return "\n".join(filter(None, summaries))


class _Run(NamedTuple):
    """One run of pytest. `failures` are the ids of the tests that failed."""

    status: int
    summary: str
    failures: frozenset[str]


def streamed(command: list[str]) -> _Run:
    """Run pytest and print its output."""
    say(f"== {_shown(command)}")
    summary, failures = "", set()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # Each process of the tests would compile the product anew, which takes half as long again as loading it.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            plain = _COLOUR.sub("", line).strip()
            if _SUMMARY.fullmatch(plain):
                summary = line.rstrip("\n")
            if failure := _FAILURE.fullmatch(plain):
                failures.add(failure[1])
    return _Run(process.returncode, summary, frozenset(failures))


def _quietly(*command: str) -> tuple[int, str]:
    """Run a command beside others; its exit status and what it said."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except FileNotFoundError as error:
        return 127, f"{error}\n"
    return done.returncode, done.stdout


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
