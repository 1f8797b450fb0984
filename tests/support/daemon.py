"""A daemon as its users have it: a process with a configuration file, talked to over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import requests
import yaml

from tests.support import nursery

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
COMPUTE = "/api/runtime/compute"

T = TypeVar("T")


# A stream that says nothing for so long has said everything.
_SILENCE_S = 0.5
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A port nobody listens on right now; well below the range that outgoing connections use.

    A daemon listens a while after its port was handed out: processes that run tests have ports of their own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = os.getppid() * 37 + worker * 1_000
    for port in (_PORTS[(first + step) % len(_PORTS)] for step in range(len(_PORTS))):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _handed_out:
            _handed_out.add(port)
            return port
    raise RuntimeError("no free port")


_handed_out: set[int] = set()


def wait_for(read: Callable[[], T], holds: Callable[[T], object] = bool, *, within_s: float = 60.0) -> T:
    """Read until `holds` says yes; the value it said yes to.

    Raises:
        AssertionError: it never did; the message shows the last value.
    """
    deadline = time.monotonic() + within_s
    while True:
        value = read()
        if holds(value):
            return value
        assert time.monotonic() < deadline, f"not within {within_s:g} s; last seen: {value!r}"
        time.sleep(0.01)


class Daemon:
    """`ollama-manager serve` in a process of its own. A context manager: leaving it ends the process.

    Args:
        home: a directory of its own for configuration and state.
        config: the configuration, without `server.port` and `state.dir`, which are filled in.
        engine_url: given to the process as `DOCKER_HOST`.
        environment: added to the process's environment.
    """

    def __init__(
        self,
        home: Path,
        config: Mapping[str, Any],
        *,
        engine_url: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.state_dir = home / "state"
        self.manager_id = f"t{uuid.uuid4().hex[:8]}"
        self.config_file = home / "config.yaml"
        self.log_file = home / "daemon.log"
        self.engine_url = engine_url
        self.config = dict(config)
        self.process: nursery.Process | None = None
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("OLLAMA_MANAGER_", "PYTHONDONT"))},
            # Compiling every import anew would treble the time of a start; the tree is left as it is.
            "PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir(), "ollama-manager-tests-bytecode")),
            "DOCKER_HOST": engine_url,
            **(environment or {}),
        }
        self._session = requests.Session()
        home.mkdir(parents=True, exist_ok=True)
        self.configure(config)

    def configure(self, config: Mapping[str, Any]) -> None:
        """Write the configuration file anew; the next start reads it."""
        server = {"port": self.port, **config.get("server", {})}
        state = {"dir": str(self.state_dir), **config.get("state", {})}
        # Other daemons of the tests have engines of the same name: each has an id of its own.
        whole = {"manager_id": self.manager_id, **config, "server": server, "state": state}
        text = yaml.safe_dump(whole, sort_keys=False)
        self.config_file.write_text(text, encoding="utf-8")

    def start(
        self,
        *,
        die_at: str | None = None,
        until_ready: bool = True,
        arguments: Sequence[str] = (),
        watched: Path | None = None,
    ) -> Self:
        """Start the process.

        Args:
            arguments: added to those of `serve`.
            die_at: `INSTANCE:STEP[:NTH]`, where it is to kill itself.
            until_ready: wait until it says so of itself.
            watched: where it counts what it holds, on SIGUSR1 (`tests.support.watched`).
        """
        main = ["tests.support.watched", str(watched)] if watched else ["manager"]
        program = (
            ["-m", "tests.support.launch", str(self.config_file), die_at]
            if die_at
            else ["-m", *main, "serve", "--config", str(self.config_file), *arguments]
        )
        with self.log_file.open("ab") as log:
            if nursery.can_begin(self.environment):
                argv, fd = program[1:], log.fileno()
                self.process = nursery.begin(argv, cwd=ROOT, env=self.environment, log=fd)
            else:
                self.process = subprocess.Popen(
                    [sys.executable, *program], cwd=ROOT, env=self.environment, stdout=log, stderr=log
                )
        if until_ready:
            self.wait_until_ready()
        return self

    def wait_until_ready(self, within_s: float = 60.0) -> None:
        wait_for(lambda: self._status("/readyz"), lambda status: status == 200, within_s=within_s)

    def wait_until_alive(self, within_s: float = 60.0) -> None:
        wait_for(lambda: self._status("/healthz"), lambda status: status == 200, within_s=within_s)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the process and wait for it; its exit status."""
        process = self._running()
        process.send_signal(number)
        try:
            return process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"the daemon did not end:\n{self.log()}") from None
        finally:
            self.process = None

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def wait_until_dead(self) -> int:
        """Wait for a process that ends by itself; its exit status."""
        status = self._running().wait(timeout=30)
        self.process = None
        return status

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def call(self, method: str, path: str, *, timeout_s: float = 60.0, **options: Any) -> requests.Response:
        """One request; paths that do not begin with / are below the compute API."""
        full = path if path.startswith("/") else f"{COMPUTE}/{path}"
        # A session is not for several threads at once; a fresh connection a call is cheap enough here.
        return requests.request(method, self.url + full, timeout=timeout_s, **options)

    def get(self, path: str) -> Any:
        answer = self.call("GET", path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def instance(self, instance_id: str) -> dict[str, Any]:
        body: dict[str, Any] = self.get(f"instances/{instance_id}")
        return body

    def begin(self, instance_id: str, action: str, **query: Any) -> requests.Response:
        return self.call("POST", f"instances/{instance_id}/{action}", params=query)

    def started(self, instance_id: str) -> dict[str, Any]:
        """Start an instance, which must succeed."""
        answer = self.begin(instance_id, "start")
        assert answer.status_code == 200, f"{answer.text}\n{self.log()}"
        body: dict[str, Any] = answer.json()["instance"]
        return body

    def stopped(self, instance_id: str, **query: Any) -> dict[str, Any]:
        """Stop an instance, which must succeed."""
        answer = self.begin(instance_id, "stop", **query)
        assert answer.status_code == 200, f"{answer.text}\n{self.log()}"
        body: dict[str, Any] = answer.json()["instance"]
        return body

    def wait_for_phase(self, instance_id: str, *phases: str, within_s: float = 60.0) -> dict[str, Any]:
        return wait_for(
            lambda: self.instance(instance_id), lambda body: body["phase"] in phases, within_s=within_s
        )

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        """Everything the event stream has after an id, read until it falls silent."""
        lines: list[bytes] = []
        answer = wait_for(lambda: self._event_stream(after), lambda answer: answer is not None)
        assert answer is not None
        with answer, suppress(requests.ConnectionError):  # silence: the read timed out
            lines.extend(answer.iter_lines())
        return [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: ")]

    def _event_stream(self, after: int) -> requests.Response | None:
        """The stream once its head has come; None when a busy machine took too long for that."""
        try:
            return requests.get(
                f"{self.url}{COMPUTE}/events",
                headers={"Last-Event-ID": str(after)},
                stream=True,
                timeout=(5, _SILENCE_S),
            )
        except requests.ReadTimeout:
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()
        if self.process is not None:
            self.stop(signal.SIGKILL)

    def _running(self) -> nursery.Process:
        assert self.process is not None, "the daemon is not running"
        return self.process

    def _status(self, path: str) -> int:
        process = self._running()
        assert process.poll() is None, f"the daemon ended with {process.returncode}:\n{self.log()}"
        try:
            return requests.get(self.url + path, timeout=5).status_code
        except requests.RequestException:
            return 0
