"""What is measured: a daemon with default settings on an engine of its own, and a cheap client."""

from __future__ import annotations

import http.client
import ipaddress
import json
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from docker.types import IPAMConfig, IPAMPool

from tests.simulated.image import IMAGE, ensure_simulated_image
from tests.support.daemon import COMPUTE, Daemon
from tests.support.engine import PrivateEngine
from tests.support.fixtures import write_templates

if TYPE_CHECKING:
    from collections.abc import Iterator

    import docker

INSTANCES = 64
NETWORK = "ollama-manager"
MANAGER_ID = "bench"

_LIMIT_S = 120.0
_POLL_S = 0.002


class MeasurementError(RuntimeError):
    """Something did not do what had to be timed; the message says what."""


@dataclass(frozen=True, slots=True)
class Rig:
    """All instances are stopped between measurements."""

    engine: PrivateEngine
    docker: docker.DockerClient
    daemon: Daemon
    bare_address: str

    @property
    def pid(self) -> int:
        process = self.daemon.process
        if process is None:
            raise MeasurementError("the daemon does not run")
        return process.pid

    def start(self, ids: list[str]) -> None:
        """Start all at once and wait until all are ready."""
        self._each(ids, "start")

    def stop(self, ids: list[str]) -> None:
        self._each(ids, "stop")

    def reset(self) -> None:
        """Have everything stopped, in whatever state a measurement that failed has left it."""
        with Client(self.daemon.port) as client:
            deadline = time.monotonic() + 2 * _LIMIT_S
            while True:
                left = [one for one in client.json(f"{COMPUTE}/instances")["instances"] if one["container"]]
                if not left:
                    return
                if time.monotonic() > deadline:
                    raise MeasurementError(f"{left[0]['id']} could not be stopped: {left[0]['reason']}")
                for one in left:
                    client.post(f"{COMPUTE}/instances/{one['id']}/stop?wait=false")
                time.sleep(1)

    def _each(self, ids: list[str], action: str) -> None:
        with ThreadPoolExecutor(len(ids)) as pool:
            answers = list(pool.map(lambda id_: self._post(id_, action), ids))
        refused = [body.decode() for status, body in answers if status != http.client.OK]
        if refused:
            raise MeasurementError(f"{len(refused)} of {len(ids)} could not {action}: {refused[0]}")

    def _post(self, instance: str, action: str) -> tuple[int, bytes]:
        with Client(self.daemon.port) as client:
            return client.post(f"{COMPUTE}/instances/{instance}/{action}")


class Client:
    """One kept connection to a port of this machine. Not for two threads."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=_LIMIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, path: str) -> tuple[int, bytes]:
        return self._ask("GET", path)

    def post(self, path: str, body: Any = None) -> tuple[int, bytes]:
        """`body` is what becomes a JSON document; None sends none."""
        return self._ask("POST", path, None if body is None else json.dumps(body).encode())

    def json(self, path: str) -> Any:
        status, body = self.get(path)
        if status != http.client.OK:
            raise MeasurementError(f"{path} was answered with {status}")
        return json.loads(body)

    def _ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        headers = {} if body is None else {"Content-Type": "application/json"}
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        return answer.status, answer.read()


def ids(count: int) -> list[str]:
    return [f"i{number:02}" for number in range(count)]


def bare_run(rig: Rig, name: str, address: str | None = None) -> None:
    """What anyone would type: `docker run -d`, then ask for /api/version until it is answered.

    The address is chosen beforehand, which saves the inspection that one would need otherwise.
    """
    at = address or rig.bare_address
    command = ["docker", "--host", rig.engine.url, "run", "--detach", "--name", name]
    command += ["--network", NETWORK, "--ip", at, IMAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise MeasurementError(f"docker run: {result.stderr.strip()}")
    wait_for_version(at)


def wait_for_version(address: str) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while True:
        try:
            with Client(11434, address) as client:
                if client.get("/api/version")[0] == http.client.OK:
                    return
        except (OSError, http.client.HTTPException):
            if time.monotonic() > deadline:
                raise MeasurementError(f"{address} does not answer") from None
        time.sleep(_POLL_S)


@contextmanager
def open_rig(instances: int = INSTANCES) -> Iterator[Rig]:
    """An engine and a daemon with so many instances, called `i00` and so on."""
    with PrivateEngine() as engine, tempfile.TemporaryDirectory(prefix="bench-") as home:
        client = engine.client()
        ensure_simulated_image(client)
        network = _network(client)
        config = {
            "manager_id": MANAGER_ID,
            "gpus": "none",
            "templates": {"dir": str(write_templates(Path(home, "templates"), {}))},
            "instances": {id_: {"template": "sim"} for id_ in ids(instances)},
        }
        with Daemon(Path(home, "daemon"), config, engine_url=engine.url) as daemon:
            daemon.start()
            yield Rig(engine, client, daemon, str(network[-2]))


def _network(client: docker.DockerClient) -> ipaddress.IPv4Network:
    """The network of the containers, wide enough for all of them: those the engine makes itself are small."""
    bridge = client.networks.get("bridge")
    gateway = bridge.attrs["IPAM"]["Config"][0]["Gateway"]
    whole = ipaddress.IPv4Network(f"{gateway}/20", strict=False)
    wide = list(whole.subnets(new_prefix=22))[2]
    pool = IPAMPool(subnet=str(wide), gateway=str(wide[1]))
    client.networks.create(NETWORK, driver="bridge", ipam=IPAMConfig(pool_configs=[pool]))
    return wide
