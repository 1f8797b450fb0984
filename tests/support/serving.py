"""`ollama-manager serve` in a process of its own, without an engine, under limits of the test's choice."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import requests
import yaml

from tests.support.daemon import ROOT, free_port, wait_for
from tests.support.fixtures import new_manager_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

LIMIT_S = 60
_BATCH = 500


class Serving:
    """The process as its clients see it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def is_alive(self) -> bool:
        """Whether `/healthz` answers on a new connection."""
        try:
            return requests.get(f"{self.url}/healthz", timeout=5).ok
        except requests.ConnectionError:
            assert self.process.poll() is None
            return False

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)

    def request(self, method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    def chat(self, count: int, body: bytes = b'{"model":"unknown"}') -> None:
        """So many requests for a model that does not exist; each is a line of the log."""
        with self.connect() as client:
            for done in range(0, count, _BATCH):
                wanted = min(_BATCH, count - done)
                client.sendall(self.request("POST", "/api/chat", body) * wanted)
                answers = b""
                while answers.count(b"HTTP/1.1 4") < wanted or not answers.endswith(b"}"):
                    answers += (piece := client.recv(2**20))
                    assert piece

    def lines_dropped(self) -> int:
        return self._counted("log_lines_dropped_total")

    def requests_stored(self) -> int:
        return self._counted('history_requests_total{result="stored"}')

    def _counted(self, metric: str) -> int:
        text = requests.get(f"{self.url}/metrics", timeout=LIMIT_S).text
        (found,) = re.findall(rf"^ollama_manager_{re.escape(metric)} ([0-9.e+]+)$", text, re.MULTILINE)
        return int(float(found))

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT_S)


@contextmanager
def serving(
    home: Path,
    *,
    stderr: Any,
    config: Mapping[str, Any] | None = None,
    descriptors: tuple[int, int] | None = None,
) -> Iterator[Serving]:
    """The daemon, once `/healthz` answers.

    Args:
        home: for its configuration and state.
        stderr: as `subprocess.Popen` takes it.
        config: the rest of its configuration; without `instances` there is none.
        descriptors: soft and hard limit of open descriptors.
    """
    port = free_port()
    whole = {
        "instances": {},
        "gpus": "none",
        "state": {"dir": "state"},
        "manager_id": new_manager_id(),
        **(config or {}),
    }
    whole["server"] = {"port": port, **whole.get("server", {})}
    (home / "config.yaml").write_text(yaml.safe_dump(whole))

    argv = [sys.executable, "-m", "manager", "serve", "--config", str(home / "config.yaml")]
    if descriptors is not None:
        limited = 'ulimit -Sn "$1" && ulimit -Hn "$2" && shift 2 && exec "$@"'
        argv = ["sh", "-c", limited, "sh", *map(str, descriptors), *argv]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr) as process:
        try:
            running = Serving(process, port)
            wait_for(running.is_alive, within_s=LIMIT_S)
            yield running
        finally:
            process.kill()
