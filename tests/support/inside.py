"""A daemon inside the test: on its event loop, where leases are taken and operations can be held up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
import yaml

import manager.app
from manager.settings import load_settings
from manager.web.app import application
from manager.wire.access import Access
from tests.support.daemon import Daemon
from tests.support.fixtures import FAST, write_templates

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping
    from pathlib import Path

    import docker

    from manager.services.instances.fleet import Fleet
    from manager.services.instances.supervisor import Supervisor
    from tests.support.engine import Engine

T = TypeVar("T")

LABEL_MANAGER = "ollama-manager.manager"
LABEL_INSTANCE = "ollama-manager.instance"


class Gate:
    """A step at which the next operation waits until it is opened."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()
        self._opened = asyncio.Event()

    async def reached(self, within_s: float = 60.0) -> None:
        async with asyncio.timeout(within_s):
            await self._reached.wait()

    def open(self) -> None:
        self._opened.set()

    async def pass_through(self) -> None:
        self._reached.set()
        await self._opened.wait()


class Steps:
    """Where a test holds operations up: at a step that an instance has recorded."""

    def __init__(self) -> None:
        self._gates: dict[tuple[str, str], Gate] = {}

    def hold(self, instance: str, step: str) -> Gate:
        gate = self._gates[instance, step] = Gate()
        return gate

    async def on_step(self, instance: str, step: str) -> None:
        gate = self._gates.pop((instance, step), None)
        if gate is not None:
            await gate.pass_through()


class Inside:
    """A daemon that runs on this event loop, with its control API on a port of its own."""

    def __init__(self, daemon: manager.app.Daemon, steps: Steps, port: int) -> None:
        self.daemon = daemon
        self.steps = steps
        self.url = f"http://127.0.0.1:{port}"
        self.compute_url = f"{self.url}/api/runtime/compute"

    @property
    def fleet(self) -> Fleet:
        return self.daemon.fleet

    def get(self, instance: str) -> Supervisor:
        return self.fleet.managed(instance)

    def phase(self, instance: str) -> str:
        return self.get(instance).view().phase.value

    def kinds(self, instance: str) -> list[str]:
        """What has happened to an instance, in order."""
        return [event.kind for event in self.daemon.backend.journal._recent if event.instance == instance]

    def moments(self, instance: str, kind: str) -> list[float]:
        """When something has happened to an instance, in seconds since the epoch."""
        return [
            event.at.timestamp()
            for event in self.daemon.backend.journal._recent
            if event.instance == instance and event.kind == kind
        ]


async def until(read: Callable[[], T], holds: Callable[[T], object] = bool, *, within_s: float = 60.0) -> T:
    """As `tests.support.daemon.wait_for`, without holding up the event loop."""
    deadline = time.monotonic() + within_s
    while True:
        value = read()
        if holds(value):
            return value
        assert time.monotonic() < deadline, f"not within {within_s:g} s; last seen: {value!r}"
        await asyncio.sleep(0.005)


def write_configuration(
    home: Path,
    manager_id: str,
    engine_url: str,
    *,
    instances: Mapping[str, Any],
    templates: Mapping[str, Mapping[str, Any]],
    lifecycle: Mapping[str, Any],
    timeout_s: float = 30,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A configuration file for a daemon with its state below `home`; `config` has other sections."""
    directory = write_templates(home / "templates", templates)
    text = yaml.safe_dump(
        {
            "manager_id": manager_id,
            "engine": {"url": engine_url, "timeout_s": timeout_s},
            "state": {"dir": str(home / "state")},
            "templates": {"dir": str(directory)},
            "gpus": "none",
            "instances": dict(instances),
            "lifecycle": {**FAST, "probe_interval_s": 0.5, **lifecycle},
            **(config or {}),
        }
    )
    file = home / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@asynccontextmanager
async def run_inside(config_file: Path) -> AsyncIterator[Inside]:
    """Run a daemon until leaving; it has listed the engine once on entry."""
    steps = Steps()
    async with (
        manager.app.open_daemon(load_settings(config_file), on_step=steps.on_step) as daemon,
        _served(daemon) as port,
    ):
        running = asyncio.ensure_future(daemon.run())
        try:
            settled = asyncio.ensure_future(daemon.parts.first_look.settled(within_s=60))
            await asyncio.wait({running, settled}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                settled.cancel()
                running.result()
            settled.result()
            yield Inside(daemon, steps, port)
            assert not running.done(), running.exception()
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


@asynccontextmanager
async def _served(daemon: manager.app.Daemon) -> AsyncIterator[int]:
    app = application(daemon.backend, access=Access(allowed_hosts={"127.0.0.1"}))
    config = uvicorn.Config(
        app,
        port=0,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    serving = asyncio.ensure_future(server.serve())
    await until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class NewInside:
    """Makes daemons inside the test; arguments as those of `write_configuration`."""

    def __init__(self, stack: AsyncExitStack, home: Path, manager_id: str, engine_url: str) -> None:
        self._stack = stack
        self._home = home
        self._manager_id = manager_id
        self._engine_url = engine_url

    async def __call__(
        self,
        *,
        instances: Mapping[str, Any] | None = None,
        templates: Mapping[str, Mapping[str, Any]] | None = None,
        lifecycle: Mapping[str, Any] | None = None,
        timeout_s: float = 30,
        config: Mapping[str, Any] | None = None,
        engine_url: str | None = None,
    ) -> Inside:
        file = write_configuration(
            self._home,
            self._manager_id,
            engine_url or self._engine_url,
            instances=instances or {"cpu": {"template": "sim"}},
            templates=templates or {},
            lifecycle=lifecycle or {},
            timeout_s=timeout_s,
            config=config,
        )
        return await self._stack.enter_async_context(run_inside(file))


@contextmanager
def only_mine(engine: Engine, manager_id: str) -> Iterator[None]:
    """Remove every container of a manager afterwards."""
    try:
        yield
    finally:
        with closing(engine.client()) as client:
            for container in own_containers(client, manager_id):
                container.remove(force=True)


def own_containers(client: docker.DockerClient, manager_id: str, instance: str | None = None) -> list[Any]:
    """Every container with the labels of a manager, and of an instance if one is named."""
    labels = [f"{LABEL_MANAGER}={manager_id}"]
    if instance is not None:
        labels.append(f"{LABEL_INSTANCE}={instance}")
    # Sparse: otherwise each is inspected, and one that is just being removed is an error.
    found: list[Any] = client.containers.list(all=True, sparse=True, filters={"label": labels})
    return found


class EngineEvents:
    """The engine's own record of what has happened to the containers of a manager.

    Args:
        client: of the engine.
        manager_id: whose containers count.
        log: the file of a Podman's events: over its API it answers when the last second is over.
    """

    def __init__(self, client: docker.DockerClient, manager_id: str, log: Path | None = None) -> None:
        self._client = client
        self._manager_id = manager_id
        self._log = log
        self._since = f"{time.time():.6f}"

    def all(self, instance: str) -> list[dict[str, Any]]:
        if self._log is not None:
            mine = {LABEL_MANAGER: self._manager_id, LABEL_INSTANCE: instance}.items()
            return [event for event in self._logged("container") if mine <= event["Attributes"].items()]
        labels = [f"{LABEL_MANAGER}={self._manager_id}", f"{LABEL_INSTANCE}={instance}"]
        return self._read({"type": "container", "label": labels})

    def actions(self, instance: str) -> list[str]:
        return [event["Action"] for event in self.all(instance)]

    def count(self, instance: str, action: str) -> int:
        return self.actions(instance).count(action)

    def moments(self, instance: str, action: str) -> list[float]:
        """Seconds since the epoch by the engine's clock, which is ours."""
        return [event["timeNano"] / 1e9 for event in self.all(instance) if event["Action"] == action]

    def pulls(self) -> list[dict[str, Any]]:
        if self._log is not None:
            return [event for event in self._logged("image") if event["Action"] == "pull"]
        return self._read({"type": "image", "event": "pull"})

    def _read(self, filters: dict[str, Any]) -> list[dict[str, Any]]:
        window: Any = {"since": self._since, "until": f"{time.time():.6f}"}  # stubs know whole seconds only
        return list(self._client.events(decode=True, filters=filters, **window))

    def _logged(self, kind: str) -> list[dict[str, Any]]:
        """Podman's own record, with Docker's words; without what Docker does not report."""
        assert self._log is not None
        words = {"died": "die", "remove": "destroy"}
        entries = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [
            {
                "Action": words.get(entry["Status"], entry["Status"]),
                "Attributes": entry["Attributes"] or {},
                "timeNano": datetime.fromisoformat(entry["Time"]).timestamp() * 1e9,
            }
            for entry in entries
            if entry["Type"] == kind and entry["Status"] not in ("init", "cleanup")
        ]


@contextmanager
def running_outside(
    engine: Engine,
    home: Path,
    manager_id: str,
    *,
    instances: Mapping[str, Any],
    templates: Mapping[str, Mapping[str, Any]],
    lifecycle: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Daemon]:
    """A daemon process for several tests, and nothing left of it afterwards."""
    config = {
        "manager_id": manager_id,
        "templates": {"dir": str(write_templates(home / "templates", templates))},
        "gpus": "none",
        "instances": dict(instances),
        "lifecycle": {**FAST, **(lifecycle or {})},
    }
    with (
        only_mine(engine, manager_id),
        Daemon(home, config, engine_url=engine.url, environment=environment) as daemon,
    ):
        yield daemon.start()
