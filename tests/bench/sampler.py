"""`python -m tests.bench.sampler SECONDS PORT/PATH…` asks for them in turn and prints their latencies.

A process of its own: whoever makes the instances change must not delay who measures. It prints a JSON object,
milliseconds in order by PORT/PATH. Requests are spread out, as those of people and dashboards are.
"""

from __future__ import annotations

import http.client
import json
import select
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, cast

from tests.bench.rig import Client, MeasurementError
from tests.support.daemon import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAUSE_S = 0.005


class Sampling:
    """Latencies in milliseconds by `PORT/PATH`; there are some once the block has been left."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, list[float]] = {}


@contextmanager
def sampling(*targets: str, seconds: float = 3600.0) -> Iterator[Sampling]:
    """Sample while the block runs, and for `seconds` at most."""
    command = [sys.executable, "-m", "tests.bench.sampler", str(seconds), *targets]
    result = Sampling()
    with talking(command) as process:
        yield result
        output, errors = process.communicate("stop\n", timeout=60)
    if process.returncode:
        raise MeasurementError(f"the sampler failed: {errors}")
    result.milliseconds = cast("dict[str, list[float]]", json.loads(output))


@contextmanager
def talking(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that has said that it is ready, by its first line; it is killed on leaving."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    with process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                _fail(process)
            yield process
        finally:
            process.kill()


def _fail(process: subprocess.Popen[str]) -> NoReturn:
    process.kill()
    raise MeasurementError(f"{process.args!r} did not start: {process.communicate()[1]}")


def main() -> None:
    seconds, *targets = sys.argv[1:]
    found: dict[str, list[float]] = {target: [] for target in targets}
    asked = [
        (target, Client(int(target.partition("/")[0])), target[target.index("/") :]) for target in targets
    ]
    for _, client, path in asked:
        client.get(path)
    print("ready", flush=True)
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end and not select.select([sys.stdin], [], [], 0)[0]:
        for target, client, path in asked:
            began = time.perf_counter()
            status, _ = client.get(path)
            found[target].append((time.perf_counter() - began) * 1e3)
            if status != http.client.OK:
                raise MeasurementError(f"{target} was answered with {status}")
            time.sleep(_PAUSE_S)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
