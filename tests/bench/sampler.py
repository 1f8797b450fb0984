"""`python -m tests.bench.sampler PORT SECONDS PATH…` asks for the paths in turn and prints their latencies.

A process of its own: whoever makes the instances change must not delay who measures. It prints a JSON object,
path to milliseconds in order. Requests are spread out, as those of people and dashboards are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from tests.bench.rig import Client, MeasurementError
from tests.support.daemon import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

_PAUSE_S = 0.005


class Sampling:
    """Latencies in milliseconds by path; there are some once the block has been left."""

    def __init__(self) -> None:
        self.milliseconds: dict[str, list[float]] = {}


@contextmanager
def sampling(port: int, *paths: str, seconds: float = 3600.0) -> Iterator[Sampling]:
    """Sample while the block runs, and for `seconds` at most."""
    command = [sys.executable, "-m", "tests.bench.sampler", str(port), str(seconds), *paths]
    result = Sampling()
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            if process.stdout is None or process.stdout.readline() != "go\n":
                process.kill()
                raise MeasurementError(
                    f"the sampler did not start: {process.stderr and process.stderr.read()}"
                )
            yield result
            output, errors = process.communicate("stop\n", timeout=60)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise MeasurementError(f"the sampler failed: {errors}")
    result.milliseconds = cast("dict[str, list[float]]", json.loads(output))


def main() -> None:
    import select  # noqa: PLC0415

    port, seconds, *paths = sys.argv[1:]
    found: dict[str, list[float]] = {path: [] for path in paths}
    with Client(int(port)) as client:
        for path in paths:
            client.json(path)
        print("go", flush=True)
        end = time.monotonic() + float(seconds)
        while time.monotonic() < end and not select.select([sys.stdin], [], [], 0)[0]:
            for path in paths:
                began = time.perf_counter()
                status, _ = client.get(path)
                found[path].append((time.perf_counter() - began) * 1e3)
                if status >= 500:
                    raise MeasurementError(f"{path} was answered with {status}")
                time.sleep(_PAUSE_S)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
