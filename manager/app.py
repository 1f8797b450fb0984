"""The composition root: builds the daemon from its parts and closes them in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

import structlog
import uvicorn

from manager import __version__
from manager.adapters.cgroups import ProcCgroups
from manager.adapters.docker_engine import DockerEngine
from manager.adapters.locks import FileLocks, StateDirLock
from manager.adapters.metrics import FleetMetrics
from manager.adapters.model_server import AiohttpModelServer
from manager.adapters.nvml import Nvml
from manager.adapters.registry import open_registry
from manager.adapters.request_log import RequestLog
from manager.adapters.schedule import ApScheduler
from manager.adapters.upstream import HttpUpstream
from manager.api.app import control_api
from manager.api.backend import Backend, Passing
from manager.api.passage import PassageLimits, Passages
from manager.domain.instance import DeviceKind, Driver, InstanceSpec
from manager.domain.registry import InstanceRow
from manager.domain.template import image_allowed
from manager.errors import ConfigurationError, ManagerError
from manager.relay.front import listening_with
from manager.relay.relay import Limits, Relay
from manager.services.catalogue import Catalogue
from manager.services.external import ExternalInstance
from manager.services.fleet import Fleet, Schedule, Swept
from manager.services.gateway import Gateway
from manager.services.gpus import Gpus
from manager.services.journal import Journal
from manager.services.model_lists import ModelLists
from manager.services.model_settings import ModelSettings
from manager.services.pulls import Pulls
from manager.services.refusals import Refusals
from manager.services.requests import Requests
from manager.services.supervisor import Supervisor
from manager.services.traffic import Traffic, never
from manager.services.volumes import Volumes
from manager.services.world import World, no_step
from manager.settings import (
    auto_gpu_spec,
    key_weaknesses,
    load_templates,
    read_key,
    resolve_instances,
    written_roles,
)
from manager.settings.addresses import is_loopback
from manager.wire.access import Access
from manager.wire.caller import HeaderNames

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from manager.adapters.otel import Spans
    from manager.domain.template import Template
    from manager.services.instance import Instance
    from manager.services.traffic import RequestRecord
    from manager.settings import LoadedSettings, Settings
    from manager.settings.model import LogSettings

_log = structlog.get_logger("daemon")

# How long another process (a clean-up from cron) may hold an instance before a request is refused.
_LOCK_WAIT_S = 10.0
# The first of the fixed loopback ports; each instance keeps the one it got first.
_FIRST_LOOPBACK_PORT = 11500
# Streams of events have no end of their own; nothing else takes as long.
_GOODBYE_S = 2


@dataclass(frozen=True, slots=True)
class Daemon:
    """Everything of a daemon but its listener. `run` goes on until cancelled."""

    settings: Settings
    fleet: Fleet
    gateway: Gateway
    backend: Backend
    state_lock: StateDirLock
    samples: Callable[[str], bool]

    async def run(self) -> None:
        scheduler = ApScheduler()
        self.fleet.schedule(scheduler)
        scheduler.start()
        try:
            await self.fleet.run()
        finally:
            scheduler.stop()


@asynccontextmanager
async def open_daemon(
    loaded: LoadedSettings,
    *,
    on_step: Callable[[str, str], Awaitable[None]] = no_step,
    resume_idle_clock: bool = False,
) -> AsyncIterator[Daemon]:
    """Build a daemon that holds its state directory. On leaving, its state is saved; containers run on.

    Args:
        loaded: the configuration.
        on_step: see `World`.
        resume_idle_clock: see `World`.

    Raises:
        StateDirHeldError: another daemon holds the state directory.
        ConfigurationError, RegistryCorruptError, UnavailableError: it cannot be built.
    """
    settings = loaded.settings
    templates = load_templates(settings)
    specs = resolve_instances(loaded, templates)
    state_dir = settings.state.dir
    async with AsyncExitStack() as stack:
        state_lock = StateDirLock(state_dir, settings.manager_id)
        state_lock.acquire()
        stack.callback(state_lock.release)
        registry = await open_registry(state_dir / "registry.sqlite3")
        stack.push_async_callback(registry.close)
        rows = await registry.instances()
        utcnow = _utcnow
        journal = Journal(registry, last_id=await registry.last_event_id(), utcnow=utcnow)
        stack.push_async_callback(journal.flush)
        reader = Nvml()
        stack.push_async_callback(reader.close)
        pids = ProcCgroups()
        gpus = Gpus(
            reader,
            pids,
            registry,
            selectors=_selectors(specs),
            taken_ids=[spec.id for spec in specs],
            auto=settings.gpus == "auto",
            now=time.monotonic,
            utcnow=utcnow,
        )
        await gpus.load()
        engine = DockerEngine(settings.engine.url, settings.engine.timeout_s)
        stack.callback(engine.close)
        world = World(
            manager_id=settings.manager_id,
            engine=engine,
            registry=registry,
            locks=FileLocks(state_dir / "locks", _LOCK_WAIT_S),
            upstream=await stack.enter_async_context(HttpUpstream()),
            gpus=gpus,
            journal=journal,
            now=time.monotonic,
            utcnow=utcnow,
            on_step=on_step,
            resume_idle_clock=resume_idle_clock,
        )
        make = _Maker(world, settings, templates, rows)
        found = [auto_gpu_spec(id_, settings, templates) for id_ in gpus.instance_ids()]
        fleet = Fleet(
            world,
            members=lambda fleet: [make.instance(fleet, spec) for spec in (*specs, *found)],
            find_member=make.found,
            schedules=tuple(
                Schedule(entry.cron, entry.action, entry.instance, entry.timezone)
                for entry in settings.schedules
            ),
            max_running=settings.lifecycle.max_running,
            own_names=_own_names(pids),
            probe_interval_s=settings.lifecycle.probe_interval_s,
            resync_interval_s=settings.lifecycle.resync_interval_s,
        )
        stack.push_async_callback(fleet.save)
        request_log = RequestLog(asyncio.get_running_loop(), readable=_is_readable(settings.log))
        stack.callback(request_log.flush)
        told = settings.log.level in ("debug", "info")
        spans = _spans() if settings.gateway.tracing else None
        if spans is not None:
            stack.push_async_callback(spans.close)
        samples = spans.samples if spans is not None else never
        traffic = Traffic(
            request_log.write if told else _not_told,
            share_logged=settings.gateway.access_log,
            trace=spans.write if spans is not None else None,
        )
        lists = ModelLists(registry, journal, await registry.model_lists())
        fleet.also_run("model lists", lists.run)
        model_settings = ModelSettings(
            registry,
            journal,
            written=written_roles(loaded),
            models=settings.models,
            instances=lambda: {instance.id: _on_gpu(instance.spec) for instance in fleet.instances()},
            auto_gpus=settings.gpus == "auto",
        )
        await model_settings.load()
        gateway = Gateway(
            fleet,
            model_settings,
            lists,
            traffic,
            journal,
            in_flight=world.in_flight,
            changes=world.changes,
            now=time.monotonic,
        )
        catalogue = Catalogue(fleet, gateway, lists, model_settings, now=time.monotonic)
        volumes = Volumes(fleet, gateway, catalogue, lists, chosen=settings.models.writers)
        server = AiohttpModelServer(
            connect_timeout_s=settings.gateway.connect_timeout_s,
            patience_s=settings.gateway.first_byte_timeout_s,
        )
        pulls = Pulls(volumes, await stack.enter_async_context(server), now=time.monotonic)
        fleet.also_run("pulls", pulls.run)
        gateway.puller = pulls
        passing = Passing(
            gateway=gateway,
            catalogue=catalogue,
            volumes=volumes,
            pulls=pulls,
            server=server,
            requests=Requests(
                _header_names(settings), default_project=settings.gateway.default_project, samples=samples
            ),
            limits=PassageLimits(
                most_body_bytes=settings.gateway.max_body,
                most_upload_bytes=settings.gateway.max_upload,
                stall_s=settings.gateway.idle_timeout_s,
            ),
            passages=Passages(),
        )
        refusals = Refusals(now=time.monotonic)
        backend = Backend(
            fleet=fleet,
            gpus=gpus,
            journal=journal,
            engine=engine,
            passing=passing,
            model_settings=model_settings,
            router=gateway,
            may_pull=lambda image: image_allowed(image, settings.allow.images),
            render_metrics=FleetMetrics(fleet, gpus, traffic, refusals).render,
            refusals=refusals,
        )
        yield Daemon(settings, fleet, gateway, backend, state_lock, samples)


async def serve(
    loaded: LoadedSettings,
    *,
    on_step: Callable[[str, str], Awaitable[None]] = no_step,
    stop_instances: bool = False,
) -> None:
    """Run the daemon until SIGTERM or SIGINT. Containers keep running and are adopted by the next one.

    Args:
        loaded: the configuration.
        on_step: see `World`.
        stop_instances: stop the containers too, once the last stream has ended.

    Raises:
        ManagerError: it could not be started.
        BaseExceptionGroup: something that must go on for ever ended; the daemon is stopped then.
    """
    settings = loaded.settings
    key = None
    if settings.server.key_file is not None:
        key = read_key(settings.server.key_file)
        for weakness in key_weaknesses(settings.server.key_file, key):
            _log.warning("weak_key", detail=weakness)
    async with open_daemon(loaded, on_step=on_step) as daemon:
        with _listening(settings.server.host, settings.server.port) as listener:
            url = _url(settings.server.host, settings.server.port)
            daemon.state_lock.describe(url=url)
            access = _access(settings, key)
            app = control_api(daemon.backend, access=access)
            relay = _relay(daemon, settings, access)
            config = uvicorn.Config(
                app,
                http=listening_with(relay),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_GOODBYE_S,
            )
            drains = (relay.drain, daemon.backend.passing.passages.drain)
            server = _Server(config, drains, settings.gateway.drain_timeout_s)
            _be_quick_to_answer()
            _log.info("serving", url=url, version=__version__, state_dir=str(settings.state.dir))
            try:
                await _until_stopped(server, listener, daemon, stop_instances=stop_instances)
            finally:
                await relay.close()
    _log.info("ended")


def _be_quick_to_answer() -> None:
    """Keep what the interpreter does by itself out of the way of requests.

    What was built by now lives as long as the daemon: collecting it again and again took 80 ms at a time.
    Threads that talk to the engine give the event loop its turn ten times as soon as they would by default.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # requests leave no cycles behind: there is little to look for
    sys.setswitchinterval(0.0005)


async def sweep_once(loaded: LoadedSettings, *, dry_run: bool) -> tuple[Swept, ...]:
    """One clean-up without a daemon, by the stored last use; holds the state directory meanwhile.

    Raises:
        StateDirHeldError: a daemon runs; it has to be asked.
        UnavailableError: the engine does not answer.
    """
    async with open_daemon(loaded, resume_idle_clock=True) as daemon:
        fleet = daemon.fleet
        running = asyncio.ensure_future(fleet.run())
        try:
            settled = asyncio.ensure_future(fleet.settled(within_s=loaded.settings.engine.timeout_s))
            await asyncio.wait({running, settled}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                settled.cancel()
                running.result()
            settled.result()
            return await fleet.reap(dry_run=dry_run)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


async def _until_stopped(
    server: _Server, listener: socket.socket, daemon: Daemon, *, stop_instances: bool
) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)
    running = asyncio.ensure_future(daemon.run())
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    try:
        await asyncio.wait({running, serving}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            _log.critical("a background loop ended; the daemon stops")
        server.stop()
        await serving
        if running.done():
            running.result()
        elif stop_instances:
            await daemon.fleet.stop_all()
    finally:
        running.cancel()
        await asyncio.wait({running})


class _Drain(Protocol):
    """Lets what is under way come to its end, for so long or until `cut` is set; then cuts it."""

    async def __call__(self, timeout_s: float, *, cut: asyncio.Event) -> None: ...


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process before our own clean-up.

    Streams are let come to their end first; a second signal cuts them.
    """

    def __init__(self, config: uvicorn.Config, drains: Sequence[_Drain], drain_timeout_s: float) -> None:
        super().__init__(config)
        self._drains = drains
        self._drain_timeout_s = drain_timeout_s
        self._cut = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        if self.should_exit:
            self._cut.set()
        else:
            _log.info("ending", drains_s=self._drain_timeout_s, hint="a second signal cuts what is under way")
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        for connection in tuple(self.server_state.connections):
            connection.shutdown()
        await asyncio.gather(*(drain(self._drain_timeout_s, cut=self._cut) for drain in self._drains))
        await super().shutdown(sockets)


def _relay(daemon: Daemon, settings: Settings, access: Access) -> Relay:
    wanted = settings.gateway
    return Relay(
        daemon.gateway,
        access=access,
        limits=Limits(
            connect_timeout_s=wanted.connect_timeout_s,
            first_byte_timeout_s=wanted.first_byte_timeout_s,
            idle_timeout_s=wanted.idle_timeout_s,
            total_timeout_s=wanted.total_timeout_s,
            most_body_bytes=wanted.max_body,
            keep_alive_s=wanted.keep_alive_s,
        ),
        headers=_header_names(settings),
        default_project=wanted.default_project,
        samples=daemon.samples,
    )


def _header_names(settings: Settings) -> HeaderNames:
    names = settings.gateway.headers
    return HeaderNames(
        instance=names.instance.lower().encode(),
        lane=names.lane.lower().encode(),
        project=names.project.lower().encode(),
        intent=names.intent.lower().encode(),
        local_only=names.local_only.lower().encode(),
    )


class _Maker:
    """Makes instances from their specs and what was stored of them."""

    def __init__(
        self,
        world: World,
        settings: Settings,
        templates: dict[str, Template],
        rows: dict[str, InstanceRow],
    ) -> None:
        self._world = world
        self._settings = settings
        self._templates = templates
        self._rows = rows
        self._ports = {row.loopback_port for row in rows.values()} | {settings.server.port}

    def instance(self, fleet: Fleet, spec: InstanceSpec) -> Instance:
        if spec.driver is Driver.EXTERNAL:
            return ExternalInstance(self._world, spec)
        row = self._rows.get(spec.id, InstanceRow(id=spec.id))
        return Supervisor(self._world, spec, self._with_port(row), may_run=fleet.may_run)

    def found(self, fleet: Fleet, instance_id: str) -> Instance:
        return self.instance(fleet, auto_gpu_spec(instance_id, self._settings, self._templates))

    def _with_port(self, row: InstanceRow) -> InstanceRow:
        if row.loopback_port is not None:
            return row
        port = _FIRST_LOOPBACK_PORT
        while port in self._ports:
            port += 1
        self._ports.add(port)
        return replace(row, loopback_port=port)


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        message = f"cannot listen on {_url(host, port)}: {os.strerror(error.errno or 0)}"
        raise ManagerError(message) from error
    with listener:
        yield listener


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _access(settings: Settings, key: str | None) -> Access:
    """Return the check of the settings.

    Where other machines reach the daemon, a key is required and clients use names that are not known here:
    every Host is allowed, unless `server.allowed_hosts` differs from its default.
    """
    server = settings.server
    usual = type(server).model_fields["allowed_hosts"].default
    host = server.host.lower()
    machine = socket.gethostname().lower()
    short = machine.partition(".")[0]
    return Access(
        allowed_hosts=server.allowed_hosts,
        allowed_origins=server.allowed_origins,
        key=key,
        own_names={f"[{host}]" if ":" in host else host, machine, short, f"{short}.local"},
        any_host=not is_loopback(host) and server.allowed_hosts == usual,
    )


def _selectors(specs: tuple[InstanceSpec, ...]) -> dict[str, str]:
    return {
        spec.id: spec.device or "auto"
        for spec in specs
        if spec.driver is Driver.DOCKER and spec.device_kind is DeviceKind.GPU
    }


def _on_gpu(spec: InstanceSpec) -> bool | None:
    return None if spec.device_kind is None else spec.device_kind is DeviceKind.GPU


def _own_names(pids: ProcCgroups) -> tuple[str, ...]:
    """What the engine would call us if we run in one of its containers: the id, or the host name."""
    return tuple(filter(None, (pids.container_of(os.getpid()), socket.gethostname())))


def _is_readable(log: LogSettings) -> bool:
    return log.format == "console" or (log.format == "auto" and sys.stderr.isatty())


def _spans() -> Spans:
    try:
        from manager.adapters.otel import Spans  # noqa: PLC0415  (an optional extra)
    except ModuleNotFoundError as error:
        message = (
            "gateway.tracing: OpenTelemetry is not installed; "
            "run: pip install 'ollama-endpoint-manager[otel]'"
        )
        raise ConfigurationError(message) from error
    return Spans()


def _not_told(_record: RequestRecord) -> None:
    """Requests are told at level info."""


def _utcnow() -> datetime:
    return datetime.now(UTC)
