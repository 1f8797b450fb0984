"""Runs the simulated Ollama as a process of this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROOT = Path(__file__).parents[2]

_POLL_S = 0.01
_START_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True)
class RunningOllama:
    """A simulated Ollama that is being run."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def set(self, **knobs: object) -> dict[str, Any]:
        """Turn knobs; returns all of them. Raises urllib.error.HTTPError (400) for a wrong one."""
        return set_knobs(self.url, **knobs)

    def wait_until_bound(self) -> None:
        """Returns once the port accepts connections. Raises RuntimeError with the log if it never does."""
        port = int(self.url.rpartition(":")[2])
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                time.sleep(_POLL_S)
            else:
                return
        raise RuntimeError(f"the simulated Ollama did not start:\n{self.log.read_text()}")


def set_knobs(url: str, **knobs: object) -> dict[str, Any]:
    """Turn knobs of the simulated Ollama at `url`, wherever it runs; returns all of them."""
    with urlopen(
        Request(f"{url}/_sim/knobs", json.dumps(knobs).encode(), method="POST"), timeout=10
    ) as answer:
        result: dict[str, Any] = json.load(answer)
        return result


@contextmanager
def running_ollama(
    environment: Mapping[str, str] | None = None, *, wait: bool = True, **knobs: object
) -> Iterator[RunningOllama]:
    """A simulated Ollama on a free port of loopback with a home of its own; it is killed on leaving.

    `knobs` are its knobs from the start, `environment` is added to a small one. With `wait` the port is bound
    on entry.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="simulated-ollama-") as home:
        settings = {f"OLLAMA_SIM_{name.upper()}": str(value) for name, value in knobs.items()}
        log = Path(home, "log")
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-m", "tests.simulated.ollama", "serve"],
                cwd=ROOT,
                env={
                    "PATH": os.environ["PATH"], "HOME": home, "OLLAMA_HOST": f"127.0.0.1:{port}", "TZ": "UTC",
                    **settings, **(environment or {}),
                },
                stdout=sink,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        running = RunningOllama(f"http://127.0.0.1:{port}", process, log)
        try:
            if wait:
                running.wait_until_bound()
            yield running
        finally:
            process.kill()
            process.wait()
