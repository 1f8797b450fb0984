"""A daemon on a stand-in of a Docker Swarm: see `tests.support.swarm_stand_in`."""

from __future__ import annotations

import http.client
import json
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.rig import Client, MeasurementError
from tests.bench.sampler import talking
from tests.support.daemon import COMPUTE, Daemon, free_port, wait_for
from tests.support.fixtures import write_templates

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MODEL = "tiny"
_LIST = f"{COMPUTE}/instances"
_RUNNING = ("loaded", "running")
_CALLERS = 32
_LIMIT_S = 240.0


@dataclass(frozen=True, slots=True)
class SwarmRig:
    """A daemon, not yet started, and the hosts that it finds."""

    daemon: Daemon
    port: int
    hosts: int
    cards: int

    @property
    def count(self) -> int:
        """How many instances the hosts give."""
        return self.hosts * (self.cards + 1)

    @property
    def pid(self) -> int:
        process = self.daemon.process
        if process is None:
            raise MeasurementError("the daemon does not run")
        return process.pid

    def instances(self) -> list[dict[str, Any]]:
        with Client(self.daemon.port) as client:
            found: list[dict[str, Any]] = client.json(_LIST)["instances"]
        return found

    def phases(self) -> Counter[str]:
        return Counter(one["phase"] for one in self.instances())

    def ids(self) -> list[str]:
        return [one["id"] for one in self.instances()]

    def of_host(self, number: int) -> list[str]:
        stem = f"host{number:02}-"
        return [id_ for id_ in self.ids() if id_.startswith(stem)]

    def wait_for_phases(self, wanted: Mapping[str, int]) -> None:
        wait_for(self.phases, lambda phases: dict(phases) == dict(wanted), within_s=_LIMIT_S)

    def start(self, ids: list[str]) -> None:
        """Start all at once and wait until all are ready."""
        with ThreadPoolExecutor(_CALLERS) as pool:
            refused = [one for one in pool.map(self._begin, ids) if one]
        if refused:
            raise MeasurementError(f"{len(refused)} of {len(ids)} could not start: {refused[0]}")
        wanted = set(ids)

        def left() -> set[str]:
            return wanted - {one["id"] for one in self.instances() if one["phase"] == "ready"}

        wait_for(left, lambda ids: not ids, within_s=_LIMIT_S)

    def _begin(self, instance: str) -> str:
        with Client(self.daemon.port) as client:
            status, body = client.post(f"{_LIST}/{instance}/start?wait=false")
        return "" if status in (http.client.OK, http.client.ACCEPTED) else body.decode()

    def running(self, model: str) -> set[str]:
        """The instances that a request may go to now without a start."""
        with Client(self.daemon.port) as client:
            status, body = client.post(f"{COMPUTE}/routing/explain", {"model": model})
        if status != http.client.OK:
            raise MeasurementError(f"the explanation was answered with {status}")
        return {one["instance"] for one in json.loads(body)["attempts"] if one["because"] in _RUNNING}

    def change(self, what: str, host: int, **more: str) -> None:
        """Have the stand-in do something to a host."""
        query = "".join(f"&{name}={value}" for name, value in more.items())
        with Client(self.port) as client:
            client.post(f"/stand-in/{what}?host={host}{query}")

    def calls(self) -> dict[str, int]:
        """How many calls the daemon has made so far, by kind."""
        with Client(self.port) as client:
            found: dict[str, int] = client.json("/stand-in/counts")
        return found


@contextmanager
def swarm_rig(hosts: int, cards: int, **config: Any) -> Iterator[SwarmRig]:
    """A rig of so many hosts, each with so many cards and a processor; `config` is added to the daemon's."""
    port = free_port()
    command = [sys.executable, "-m", "tests.support.swarm_stand_in", str(port), str(hosts), str(cards)]
    with tempfile.TemporaryDirectory(prefix="bench-") as home, talking(command):
        templates: dict[str, dict[str, Any]] = {"ollama-cpu": {}, "ollama-gpu": {"device": "gpu"}}
        whole = {
            "gpus": "none",
            "templates": {"dir": str(write_templates(Path(home, "templates"), templates))},
            "instances": {},
            "swarm": {"reach": "host", "instances": "auto"},
            **config,
        }
        with Daemon(Path(home, "daemon"), whole, engine_url=f"http://127.0.0.1:{port}") as daemon:
            yield SwarmRig(daemon, port, hosts, cards)
