"""The composition root: builds the daemon from its parts and closes them in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import structlog

from manager.adapters.cgroups import ProcCgroups
from manager.adapters.docker_engine import DockerEngine
from manager.adapters.locks import FileLocks, StateDirLock
from manager.adapters.metrics import FleetMetrics
from manager.adapters.nvml import Nvml
from manager.adapters.owner import read_owner
from manager.adapters.registry import open_registry
from manager.adapters.request_log import RequestLog
from manager.adapters.run_files import DirectoryFiles
from manager.adapters.schedule import ApScheduler
from manager.adapters.tls import SharedTls
from manager.adapters.upstream import HttpUpstream
from manager.api.backend import Backend, Passing
from manager.api.passage import PassageLimits, Passages
from manager.claims import claims, refuse_foreign_later, settled_owner
from manager.domain.breaker import BreakerLimits
from manager.domain.drained import Drained, drained_from
from manager.domain.gpu import AUTO
from manager.domain.image_override import ImageOverride, override_from
from manager.domain.instance import DeviceKind, Driver, InstanceSpec
from manager.domain.lifted import lifted_from
from manager.domain.record import never
from manager.domain.registry import InstanceRow, OrderKind
from manager.domain.template import image_allowed
from manager.errors import ConfigurationError
from manager.relay.model_server import PooledModelServer
from manager.relay.upstream import UpstreamPools
from manager.services.bodies import BodyBudget
from manager.services.gpus import Gpus
from manager.services.instances.capacity import Capacity
from manager.services.instances.engine_link import EngineLink
from manager.services.instances.external import ExternalInstance
from manager.services.instances.first_look import FirstLook
from manager.services.instances.fleet import Fleet
from manager.services.instances.found_cards import FoundCards
from manager.services.instances.lifts import Lifts
from manager.services.instances.service import Service
from manager.services.instances.supervisor import Supervisor
from manager.services.instances.sweeps import Schedule, Sweeps
from manager.services.instances.upgrades import Upgrades
from manager.services.journal import Journal
from manager.services.lanes.slots import Slots
from manager.services.models.catalogue import Catalogue
from manager.services.models.details import ModelDetails
from manager.services.models.keeping import Keeper
from manager.services.models.loading import Loading
from manager.services.models.model_lists import ModelLists
from manager.services.models.model_settings import ModelSettings
from manager.services.models.pulls import Pulls
from manager.services.models.volume_reader import VolumeReader
from manager.services.models.volumes import Volumes
from manager.services.overview import Overviews
from manager.services.refusals import Refusals
from manager.services.requests import Requests
from manager.services.requests_history import History, Retention
from manager.services.routing.attempting import Deadlines, Routing
from manager.services.routing.breakers import Breakers
from manager.services.routing.fallback_events import FallbackEvents
from manager.services.routing.model_status import ModelStatus
from manager.services.routing.overload import Overload
from manager.services.routing.placement import Placement
from manager.services.routing.router import Router
from manager.services.runs.execution import Execution
from manager.services.runs.runs import RunLimits, Runs
from manager.services.traffic import Traffic
from manager.services.world import Revision, World, no_others, no_step
from manager.settings import (
    auto_gpu_spec,
    load_templates,
    real_writers,
    resolve_instances,
    written_roles,
)
from manager.wire.caller import HeaderNames

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping

    from manager.adapters.log_writer import LogWriter
    from manager.adapters.otel import Spans
    from manager.adapters.registry import SqlRegistry
    from manager.domain.lifted import Lifted
    from manager.domain.record import RequestRecord, Samples
    from manager.domain.template import Template
    from manager.services.instances.instance import Instance
    from manager.services.ports import ModelServer
    from manager.settings import LoadedSettings, Settings
    from manager.settings.changes import Changes
    from manager.settings.model import LogSettings

    Loop: TypeAlias = Callable[[], Coroutine[None, None, None]]

_log = structlog.get_logger("daemon")

# How long another process (a clean-up from cron) may hold an instance before a request is refused.
_LOCK_WAIT_S = 10.0
# The first of the fixed loopback ports; each instance keeps the one it got first.
_FIRST_LOOPBACK_PORT = 11500


@dataclass(frozen=True, slots=True)
class Instances:
    """The instances and what goes on around all of them."""

    fleet: Fleet
    capacity: Capacity
    link: EngineLink
    sweeps: Sweeps
    cards: FoundCards
    first_look: FirstLook
    service: Service
    lifts: Lifts

    def loops(self) -> dict[str, Loop]:
        return {
            "instances": self.fleet.run,
            "places": self.capacity.run,
            "engine": self.link.run,
            "gpus": self.cards.run,
            "sweeps": self.sweeps.run,
        }


@dataclass(frozen=True, slots=True)
class Daemon:
    """Everything of a daemon but its listener. `loops` are what goes on by itself, by name.

    `reconfigure` puts in force what can change while it runs, but for the listener's part. `let_go` stores
    the state and gives up all claims, once `run` has ended. `id_claim` is the socket of the manager id.
    """

    settings: Settings
    parts: Instances
    backend: Backend
    pools: UpstreamPools
    state_lock: StateDirLock
    id_claim: socket.socket | None
    templates: Mapping[str, Template]
    reconfigure: Callable[[Changes], None]
    let_go: Callable[[], Awaitable[None]]
    loops: dict[str, Loop]

    @property
    def fleet(self) -> Fleet:
        return self.parts.fleet

    @property
    def busy(self) -> bool:
        """Whether an instance starts or stops, a model is pulled, or a request waits for one of these."""
        passing = self.backend.passing
        return (
            passing.pulls.busy
            or passing.routing.placement.preparing > 0
            or any(supervisor.busy for supervisor in self.fleet.supervisors())
        )

    async def run(self) -> None:
        """Run everything, schedules too, until cancelled."""
        scheduler = ApScheduler()
        self.parts.sweeps.schedule(scheduler)
        scheduler.start()
        try:
            await self.run_unscheduled()
        finally:
            scheduler.stop()

    async def run_unscheduled(self) -> None:
        """Run everything but the schedules, until cancelled. An error in a loop ends all of them."""
        async with asyncio.TaskGroup() as tasks:
            for name, loop in self.loops.items():
                tasks.create_task(loop(), name=name)


@asynccontextmanager
async def open_daemon(  # noqa: PLR0915  (split once lanes, breakers and runs are wired)
    loaded: LoadedSettings,
    *,
    log: LogWriter | None = None,
    on_step: Callable[[str, str], Awaitable[None]] = no_step,
    resume_idle_clock: bool = False,
    takes_over: bool = False,
    claims_within_s: float = 0.0,
    dry_run: bool = False,
    others_work: Callable[[], bool] = no_others,
) -> AsyncIterator[Daemon]:
    """Build a daemon that holds its state directory. On leaving, its state is saved; containers run on.

    Args:
        loaded: the configuration.
        log: takes one line a request; None: requests are not logged.
        on_step: see `World`.
        resume_idle_clock: see `World`.
        takes_over: take over the containers of other state directories, which were lost.
        claims_within_s: how long to wait for the claims of another daemon, which has promised to let go.
        dry_run: see `World`; nothing that happens is stored.
        others_work: see `World`.

    Raises:
        StateDirHeldError: another daemon holds the state directory.
        ManagerIdHeldError: another daemon serves the manager id with another state directory.
        ForeignOwnerError: containers of the manager id belong to another state directory.
        ManagerIdChangedError: the state directory has containers under a former manager id.
        ConfigurationError, RegistryCorruptError, UnavailableError: it cannot be built.
    """
    settings = loaded.settings
    templates = load_templates(settings)
    specs = resolve_instances(loaded, templates)
    state_dir = settings.state.dir
    async with AsyncExitStack() as stack:
        held = await stack.enter_async_context(AsyncExitStack())
        state_lock, id_lock = held.enter_context(claims(settings, within_s=claims_within_s))
        registry = await open_registry(state_dir / "registry.sqlite3", stores=not dry_run)
        held.push_async_callback(registry.close)
        history = _history(held, registry, settings)
        rows = await registry.instances()
        journal = Journal(registry, last_id=await registry.last_event_id(), utcnow=_utcnow)
        held.push_async_callback(journal.retire)
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
            utcnow=_utcnow,
            journal=journal,
        )
        await gpus.load()
        tls = SharedTls().context
        pools = stack.enter_context(contextlib.closing(UpstreamPools(tls)))
        engine = stack.enter_context(
            contextlib.closing(DockerEngine(settings.engine.url, settings.engine.timeout_s))
        )
        owner = await settled_owner(engine, settings, read_owner(state_dir), takes_over=takes_over)
        revision = Revision()
        breakers = Breakers(
            journal, revision, limits=_breaker_limits(settings), now=time.monotonic, utcnow=_utcnow
        )
        overload = Overload(revision, now=time.monotonic)
        world = World(
            manager_id=settings.manager_id,
            engine=engine,
            registry=registry,
            locks=FileLocks(state_dir / "locks", _LOCK_WAIT_S),
            upstream=await stack.enter_async_context(HttpUpstream(tls)),
            gpus=gpus,
            journal=journal,
            now=time.monotonic,
            utcnow=_utcnow,
            on_step=on_step,
            resume_idle_clock=resume_idle_clock,
            dry_run=dry_run,
            owner=owner,
            others_work=others_work,
            revision=revision,
            server_changed=partial(_forget_server, breakers, overload),
        )
        make = _Maker(
            world,
            settings,
            templates,
            rows,
            await _orders(registry, settings, journal, ends_none=resume_idle_clock or dry_run),
        )
        parts = _instances(
            world,
            settings,
            specs=(*specs, *map(make.spec, gpus.instance_ids())),
            make=make,
            own_names=_own_names(pids),
        )
        fleet = parts.fleet
        held.push_async_callback(fleet.save)
        sink = _RecordSink(log, settings.log)
        traffic, samples = _traffic(stack, settings, sink)
        lists = ModelLists(registry, journal, await registry.model_lists())
        model_settings = ModelSettings(
            registry,
            journal,
            written=written_roles(loaded),
            models=settings.models,
            instances=lambda: {instance.id: _on_gpu(instance.spec) for instance in fleet.instances()},
            slots=partial(_slots_of, fleet),
            auto_gpus=settings.gpus == "auto",
        )
        await model_settings.load()
        status, details = ModelStatus(fleet), ModelDetails(fleet, lists, now=time.monotonic)
        slots = Slots(model_settings, partial(_slots_of, fleet), status.workers, now=time.monotonic)
        router = Router(
            fleet,
            model_settings,
            lists,
            first_look=parts.first_look,
            revision=world.revision,
            in_flight=world.in_flight,
            breakers=breakers,
            overload=overload,
            now=time.monotonic,
            lifted=parts.lifts.of,
            renewed=slots.refresh,
        )
        volume_reader = VolumeReader(
            fleet,
            parts.link,
            parts.first_look,
            engine,
            lists,
            journal=journal,
            manager_id=settings.manager_id,
            now=time.monotonic,
        )
        placement = Placement(
            fleet, parts.capacity, router, lists, model_settings, now=time.monotonic, reader=volume_reader
        )
        overviews = Overviews(
            fleet,
            parts.capacity,
            parts.link,
            gpus,
            lists=lists,
            settings=model_settings,
            lifted=parts.lifts.of,
            breakers=breakers,
        )
        catalogue = Catalogue(
            fleet,
            overviews,
            status,
            traffic,
            lists,
            settings=model_settings,
            reader=volume_reader,
            details=details,
            now=time.monotonic,
        )
        server = _model_server(settings, pools)
        volumes = Volumes(
            fleet, router, placement, catalogue, lists, server=server, chosen=real_writers(settings)
        )
        pulls = Pulls(volumes, server, now=time.monotonic)
        routing = Routing(
            router,
            placement,
            status,
            FallbackEvents(journal),
            traffic,
            slots,
            pulls,
            Deadlines(settings.gateway.first_byte_timeout_s, settings.gateway.total_timeout_s),
            breakers,
            overload,
            keep=history.add,
        )
        passing = Passing(
            routing=routing,
            catalogue=catalogue,
            volumes=volumes,
            pulls=pulls,
            server=server,
            requests=Requests(
                _header_names(settings), default_project=settings.gateway.default_project, samples=samples
            ),
            bodies=BodyBudget(settings.gateway.max_buffered),
            limits=PassageLimits(
                most_body_bytes=settings.gateway.max_body,
                most_upload_bytes=settings.gateway.max_upload,
                stall_s=settings.gateway.idle_timeout_s,
            ),
            passages=Passages(),
        )
        loading, keeper = _warming(
            world, parts, routing, volumes=volumes, model_settings=model_settings, server=server
        )
        refusals = Refusals(now=time.monotonic)
        backend = Backend(
            fleet=fleet,
            capacity=parts.capacity,
            sweeps=parts.sweeps,
            service=parts.service,
            upgrades=Upgrades(
                world,
                fleet,
                parts.capacity,
                may_use=lambda image: image_allowed(image, settings.allow.images),
            ),
            link=parts.link,
            first_look=parts.first_look,
            overviews=overviews,
            journal=journal,
            engine=engine,
            passing=passing,
            model_settings=model_settings,
            lifts=parts.lifts,
            loading=loading,
            router=router,
            may_pull=lambda image: image_allowed(image, settings.allow.images),
            render_metrics=FleetMetrics(
                overviews,
                traffic,
                refusals,
                slots,
                log_lines_dropped=lambda: 0 if log is None else log.dropped,
                history=history,
            ).render,
            refusals=refusals,
            history=history,
            runs=await _runs(stack, settings, world, passing, recovers=not resume_idle_clock),
        )

        loops: dict[str, Loop] = {
            **parts.loops(),
            "journal": journal.run,
            "history": history.run,
            "model lists": lists.run,
            "model details": details.run,
            "pulls": pulls.run,
            "lanes": partial(slots.run, router.snapshot),
            "owner": partial(refuse_foreign_later, engine, settings, owner),
        }
        if not resume_idle_clock:  # a sweep reads no volume, puts nothing back in service, executes no run
            loops |= {
                "volumes": volume_reader.run,
                "service": parts.service.run,
                "runs": backend.runs.run,
                "lifts": parts.lifts.run,
                "warm models": keeper.run,
            }
        yield Daemon(
            settings,
            parts,
            backend,
            pools,
            state_lock,
            id_lock.claim,
            templates,
            _Reconfigure(make, backend, traffic, sink),
            let_go=held.aclose,
            loops=loops,
        )


async def _runs(
    stack: AsyncExitStack, settings: Settings, world: World, passing: Passing, *, recovers: bool
) -> Runs:
    files = stack.enter_context(contextlib.closing(DirectoryFiles(settings.state.dir / "runs")))
    stored = BodyBudget(settings.runs.max_stored)
    runs = Runs(
        world.registry,
        files,
        Execution(passing.routing, passing.server, passing.requests, files, stored),
        stored=stored,
        limits=_run_limits(settings),
        utcnow=world.utcnow,
        on_step=world.on_step,
    )
    if recovers:
        await runs.recover()
    return runs


def _run_limits(settings: Settings) -> RunLimits:
    return RunLimits(**settings.runs.model_dump())


def _warming(
    world: World,
    parts: Instances,
    routing: Routing,
    *,
    volumes: Volumes,
    model_settings: ModelSettings,
    server: ModelServer,
) -> tuple[Loading, Keeper]:
    """Return what loads models on instances, and what keeps them there."""
    loading = Loading(
        parts.fleet,
        parts.capacity,
        routing.router,
        routing.placement,
        routing.status,
        volumes=volumes,
        settings=model_settings,
        server=server,
    )
    keeper = Keeper(
        world,
        parts.fleet,
        parts.capacity,
        parts.first_look,
        routing.router,
        settings=model_settings,
        loading=loading,
    )
    return loading, keeper


def _header_names(settings: Settings) -> HeaderNames:
    names = settings.gateway.headers
    return HeaderNames(
        instance=names.instance.lower().encode(),
        lane=names.lane.lower().encode(),
        project=names.project.lower().encode(),
        intent=names.intent.lower().encode(),
        local_only=names.local_only.lower().encode(),
    )


def _instances(
    world: World,
    settings: Settings,
    *,
    specs: Iterable[InstanceSpec],
    make: _Maker,
    own_names: tuple[str, ...],
) -> Instances:
    lifecycle = settings.lifecycle
    probe_interval_s, resync_interval_s = lifecycle.probe_interval_s, lifecycle.resync_interval_s
    fleet = Fleet(world, save_interval_s=resync_interval_s)
    capacity = Capacity(world, fleet, max_running=lifecycle.max_running, recheck_s=probe_interval_s)
    link = EngineLink(
        world,
        fleet,
        capacity,
        own_names=own_names,
        probe_interval_s=probe_interval_s,
        resync_interval_s=resync_interval_s,
    )
    sweeps = Sweeps(world, fleet, capacity, link, schedules=_schedules(settings), interval_s=probe_interval_s)
    cards = FoundCards(
        world,
        fleet,
        link,
        make=lambda instance_id: make.found(capacity, instance_id),
        interval_s=probe_interval_s,
    )
    for spec in specs:
        fleet.add(make.instance(capacity, spec))
    service = Service(world, fleet, capacity, link.asked)
    lifts = Lifts(world, fleet, make.orders.lifted)
    return Instances(fleet, capacity, link, sweeps, cards, FirstLook(world, fleet, link), service, lifts)


@dataclass(frozen=True, slots=True)
class _Orders:
    """What operators have ordered for instances, by id."""

    drained: dict[str, Drained]
    images: dict[str, ImageOverride]
    lifted: dict[str, Lifted]


async def _orders(registry: SqlRegistry, settings: Settings, journal: Journal, *, ends_none: bool) -> _Orders:
    """Read the orders of an earlier run; `ends_none` is whether no container is to be stopped for one.

    No container is stopped for an order whose time has passed. An image that is not allowed any more is not
    used.
    """
    now = _utcnow()
    drained = {
        instance_id: replace(order, stops=False) if ends_none or order.has_passed(now) else order
        for instance_id, order in (await registry.orders(OrderKind.DRAINED, drained_from)).items()
    }
    images = await registry.orders(OrderKind.IMAGE, override_from)
    for instance_id, override in images.items():
        if not image_allowed(override.image, settings.allow.images):
            journal.record(
                "image_not_allowed",
                instance=instance_id,
                detail=f"{override.image} is not in allow.images any more: its template's image is used",
            )
    allowed = {
        instance_id: override
        for instance_id, override in images.items()
        if image_allowed(override.image, settings.allow.images)
    }
    return _Orders(drained, allowed, await registry.orders(OrderKind.LIFTED, lifted_from))


class _Maker:
    """Makes instances from their specs and what was stored of them."""

    def __init__(
        self,
        world: World,
        settings: Settings,
        templates: dict[str, Template],
        rows: dict[str, InstanceRow],
        orders: _Orders,
    ) -> None:
        self._world = world
        self.orders = orders
        self.settings = settings
        self._templates = templates
        self._rows = rows
        self._ports = {row.loopback_port for row in rows.values()} | {settings.server.port}

    def spec(self, instance_id: str) -> InstanceSpec:
        """Return the specification of an instance that no configuration names: of a card that was found."""
        return auto_gpu_spec(instance_id, self.settings, self._templates)

    def instance(self, capacity: Capacity, spec: InstanceSpec) -> Instance:
        if spec.driver is Driver.EXTERNAL:
            return ExternalInstance(self._world, spec, drained=self.orders.drained.get(spec.id))
        row = self._rows.get(spec.id, InstanceRow(id=spec.id))
        return Supervisor(
            self._world,
            spec,
            self._with_port(row),
            may_run=capacity.may_run,
            drained=self.orders.drained.get(spec.id),
            image=self.orders.images.get(spec.id),
        )

    def found(self, capacity: Capacity, instance_id: str) -> Instance:
        return self.instance(capacity, self.spec(instance_id))

    def _with_port(self, row: InstanceRow) -> InstanceRow:
        if row.loopback_port is not None:
            return row
        port = _FIRST_LOOPBACK_PORT
        while port in self._ports:
            port += 1
        self._ports.add(port)
        return replace(row, loopback_port=port)


@dataclass(frozen=True, slots=True)
class _Reconfigure:
    """Puts in force what can change while the daemon runs."""

    make: _Maker
    backend: Backend
    traffic: Traffic
    sink: _RecordSink

    def __call__(self, changed: Changes) -> None:
        settings, fleet = changed.loaded.settings, self.backend.fleet
        self.make.settings = settings
        written = {spec.id for spec in changed.specs}
        found = [self.make.spec(one.id) for one in fleet.instances() if one.id not in written]
        fleet.reconfigure((*changed.specs, *found))
        self.backend.capacity.reconfigure(settings.lifecycle.max_running)
        self.backend.sweeps.reconfigure(_schedules(settings))
        self.backend.passing.routing.breakers.reconfigure(_breaker_limits(settings))
        self.backend.model_settings.reconfigure(written_roles(changed.loaded), settings.models)
        self.backend.passing.requests.default_project = settings.gateway.default_project
        self.backend.runs.limits = _run_limits(settings)
        self.traffic.share_logged = settings.gateway.access_log
        self.sink.level = settings.log.level
        self.backend.history.retention = _retention(settings)
        if changed.applied:
            self.backend.journal.record("settings_reloaded", detail=", ".join(changed.applied))


def _forget_server(breakers: Breakers, overload: Overload, instance: str) -> None:
    """The server of an instance is another one: nothing that is known of the old one holds for it."""
    breakers.server_changed(instance)
    overload.server_changed(instance)


def _breaker_limits(settings: Settings) -> BreakerLimits:
    breaker = settings.breaker
    return BreakerLimits(breaker.failures, breaker.open_s, breaker.max_open_s)


def _history(held: AsyncExitStack, registry: SqlRegistry, settings: Settings) -> History:
    """Return the history of requests; it is written to its end before the registry is closed."""
    store = registry.requests()
    held.push_async_callback(store.close)
    history = History(store, retention=_retention(settings), utcnow=_utcnow)
    held.push_async_callback(history.close)
    return history


def _model_server(settings: Settings, pools: UpstreamPools) -> PooledModelServer:
    return PooledModelServer(
        pools,
        connect_timeout_s=settings.gateway.connect_timeout_s,
        patience_s=settings.gateway.first_byte_timeout_s,
    )


def _retention(settings: Settings) -> Retention:
    return Retention(settings.history.retention_days, settings.history.max_rows)


def _schedules(settings: Settings) -> tuple[Schedule, ...]:
    return tuple(
        Schedule(entry.cron, entry.action, entry.instance, entry.timezone) for entry in settings.schedules
    )


def _selectors(specs: tuple[InstanceSpec, ...]) -> dict[str, tuple[str, ...]]:
    return {
        spec.id: spec.devices or (spec.device or AUTO,)
        for spec in specs
        if spec.driver is Driver.DOCKER and spec.device_kind is DeviceKind.GPU
    }


def _slots_of(fleet: Fleet) -> dict[str, int | None]:
    return {instance.id: instance.spec.slots for instance in fleet.instances()}


def _on_gpu(spec: InstanceSpec) -> bool | None:
    return None if spec.device_kind is None else spec.device_kind is DeviceKind.GPU


def _own_names(pids: ProcCgroups) -> tuple[str, ...]:
    """The engine's names for this process if it runs in a container: the id, or the host name."""
    return tuple(filter(None, (pids.container_of(os.getpid()), socket.gethostname())))


def _traffic(stack: AsyncExitStack, settings: Settings, sink: _RecordSink) -> tuple[Traffic, Samples]:
    """Return the counters of requests, and which traces are sampled; spans are closed with the stack."""
    spans = _spans() if settings.gateway.tracing else None
    if spans is None:
        return Traffic(sink.write, share_logged=settings.gateway.access_log), never
    stack.push_async_callback(spans.close)
    traffic = Traffic(sink.write, share_logged=settings.gateway.access_log, trace=spans.write)
    return traffic, spans.samples


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


class _RecordSink:
    """Writes requests to the log, at level info."""

    def __init__(self, log: LogWriter | None, settings: LogSettings) -> None:
        self.level = settings.level
        readable = settings.format == "console" or (
            settings.format == "auto" and log is not None and log.is_terminal
        )
        self._log = None if log is None else RequestLog(log.write, readable=readable)

    def write(self, record: RequestRecord) -> None:
        if self._log is not None and self.level in ("debug", "info"):
            self._log.write(record)


def _utcnow() -> datetime:
    return datetime.now(UTC)
