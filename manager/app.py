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
from typing import TYPE_CHECKING, Any, TypeAlias

import structlog

from manager import __version__
from manager.adapters.cgroups import ProcCgroups
from manager.adapters.docker_engine import DockerEngine
from manager.adapters.locks import FileLocks, StateDirLock
from manager.adapters.metrics import FleetMetrics
from manager.adapters.nvml import Nvml
from manager.adapters.owner import ManagerIdLock, keep_manager_id, read_owner, take_over
from manager.adapters.registry import open_registry
from manager.adapters.request_log import RequestLog
from manager.adapters.schedule import ApScheduler
from manager.adapters.tls import SharedTls
from manager.adapters.upstream import HttpUpstream
from manager.api.app import control_api
from manager.api.backend import Backend, Passing
from manager.api.passage import PassageLimits, Passages
from manager.domain.instance import DeviceKind, Driver, InstanceSpec
from manager.domain.ownership import foreign, left_behind, owner_of
from manager.domain.record import never
from manager.domain.registry import InstanceRow
from manager.domain.template import image_allowed
from manager.errors import ConfigurationError, EngineError, ForeignOwnerError, ManagerIdChangedError
from manager.handover import CLAIMS_WITHIN_S, Giving, Predecessor, Succession, replace_daemon
from manager.relay.connections import ConnectionLimit
from manager.relay.front import listening_with
from manager.relay.model_server import PooledModelServer
from manager.relay.relay import Limits, Relay
from manager.relay.upstream import UpstreamPools
from manager.reloading import Reloader, log_weak_key
from manager.services.bodies import BodyBudget
from manager.services.gpus import Gpus
from manager.services.instances.capacity import Capacity
from manager.services.instances.engine_link import EngineLink
from manager.services.instances.external import ExternalInstance
from manager.services.instances.first_look import FirstLook
from manager.services.instances.fleet import Fleet
from manager.services.instances.found_cards import FoundCards
from manager.services.instances.supervisor import Supervisor
from manager.services.instances.sweeps import Schedule, Sweeps, Swept
from manager.services.journal import Journal
from manager.services.models.catalogue import Catalogue
from manager.services.models.model_lists import ModelLists
from manager.services.models.model_settings import ModelSettings
from manager.services.models.pulls import Pulls
from manager.services.models.volume_reader import VolumeReader
from manager.services.models.volumes import Volumes
from manager.services.overview import Overviews
from manager.services.refusals import Refusals
from manager.services.requests import Requests
from manager.services.routing.attempting import Deadlines, Routing
from manager.services.routing.fallback_events import FallbackEvents
from manager.services.routing.model_status import ModelStatus
from manager.services.routing.placement import Placement
from manager.services.routing.router import Router
from manager.services.traffic import Traffic
from manager.services.world import World, no_step
from manager.serving import (
    DescriptorWatch,
    Server,
    connection_budget,
    inherited_listener,
    listening,
    raise_descriptor_limit,
    serve_until_stopped,
    server_config,
    tune_interpreter,
    url_of,
)
from manager.settings import (
    auto_gpu_spec,
    key_weaknesses,
    load_templates,
    read_key,
    real_writers,
    resolve_instances,
    template_warnings,
    written_roles,
)
from manager.settings.addresses import is_loopback
from manager.wire.access import Access
from manager.wire.caller import HeaderNames

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping

    from manager.adapters.log_writer import LogWriter
    from manager.adapters.otel import Spans
    from manager.domain.instance import ContainerFacts
    from manager.domain.ownership import Owner
    from manager.domain.record import RequestRecord, Samples
    from manager.domain.template import Template
    from manager.services.instances.instance import Instance
    from manager.settings import LoadedSettings, Settings
    from manager.settings.changes import Changes
    from manager.settings.model import LogSettings

    Loop: TypeAlias = Callable[[], Coroutine[None, None, None]]

_log = structlog.get_logger("daemon")

# How long another process (a clean-up from cron) may hold an instance before a request is refused.
_LOCK_WAIT_S = 10.0
# How long a start waits for the engine in order to see whose the containers are.
_OWNER_CHECK_S = 2.0
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
async def open_daemon(
    loaded: LoadedSettings,
    *,
    log: LogWriter | None = None,
    on_step: Callable[[str, str], Awaitable[None]] = no_step,
    resume_idle_clock: bool = False,
    takes_over: bool = False,
    claims_within_s: float = 0.0,
    dry_run: bool = False,
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
        state_lock, id_lock = held.enter_context(_claims(settings, within_s=claims_within_s))
        registry = await open_registry(state_dir / "registry.sqlite3", stores=not dry_run)
        held.push_async_callback(registry.close)
        rows = await registry.instances()
        journal = Journal(registry, last_id=await registry.last_event_id(), utcnow=_utcnow)
        held.push_async_callback(journal.flush)
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
        owner = await _settled_owner(engine, settings, read_owner(state_dir), takes_over=takes_over)
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
        )
        make = _Maker(world, settings, templates, rows)
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
            auto_gpus=settings.gpus == "auto",
        )
        await model_settings.load()
        router = Router(
            fleet,
            model_settings,
            lists,
            first_look=parts.first_look,
            revision=world.revision,
            in_flight=world.in_flight,
            now=time.monotonic,
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
        status = ModelStatus(fleet)
        overviews = Overviews(fleet, parts.capacity, parts.link, gpus, lists=lists, settings=model_settings)
        catalogue = Catalogue(
            fleet,
            overviews,
            status,
            traffic,
            lists,
            settings=model_settings,
            reader=volume_reader,
            now=time.monotonic,
        )
        server = PooledModelServer(
            pools,
            connect_timeout_s=settings.gateway.connect_timeout_s,
            patience_s=settings.gateway.first_byte_timeout_s,
        )
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
            pulls,
            Deadlines(settings.gateway.first_byte_timeout_s, settings.gateway.total_timeout_s),
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
        refusals = Refusals(now=time.monotonic)
        backend = Backend(
            fleet=fleet,
            capacity=parts.capacity,
            sweeps=parts.sweeps,
            link=parts.link,
            first_look=parts.first_look,
            overviews=overviews,
            journal=journal,
            engine=engine,
            passing=passing,
            model_settings=model_settings,
            router=router,
            may_pull=lambda image: image_allowed(image, settings.allow.images),
            render_metrics=FleetMetrics(
                overviews,
                traffic,
                refusals,
                log_lines_dropped=lambda: 0 if log is None else log.dropped,
            ).render,
            refusals=refusals,
        )

        loops: dict[str, Loop] = {
            **parts.loops(),
            "journal": journal.run,
            "model lists": lists.run,
            "pulls": pulls.run,
            "owner": partial(_refuse_foreign_later, engine, settings, owner),
        }
        if not resume_idle_clock:  # a sweep reads no volume
            loops["volumes"] = volume_reader.run
        reconfigure = _Reconfigure(make, backend, traffic, sink)
        yield Daemon(
            settings,
            parts,
            backend,
            pools,
            state_lock,
            id_lock.claim,
            templates,
            reconfigure,
            let_go=held.aclose,
            loops=loops,
        )


async def serve(
    loaded: LoadedSettings,
    *,
    log: LogWriter | None = None,
    read_again: Callable[[], LoadedSettings] | None = None,
    configure_log: Callable[[LogSettings, str | None], None] = lambda _settings, _key: None,
    on_step: Callable[[str, str], Awaitable[None]] = no_step,
    stop_instances: bool = False,
    take_over: bool = False,
    replaces: bool = False,
) -> None:
    """Run the daemon until SIGTERM or SIGINT. Containers keep running and are adopted by the next one.

    SIGHUP has the configuration read again (`manager.reloading`). Another daemon may replace this one
    meanwhile (`manager.handover`).

    Args:
        loaded: the configuration.
        log: takes one line a request; None: requests are not logged.
        read_again: reads the configuration for a reload.
        configure_log: changes the level of the log, and has it hide a new key.
        on_step: see `World`.
        stop_instances: stop the containers too, once the last stream has ended.
        take_over: see `takes_over` of `open_daemon`.
        replaces: replace the daemon that runs, if one does.

    Raises:
        ManagerError: it could not be started.
        BaseExceptionGroup: something that must go on for ever ended; the daemon is stopped then.
    """
    host, port = loaded.settings.server.host, loaded.settings.server.port
    listener = inherited_listener(host, port)
    predecessor = await _predecessor(loaded) if replaces else None
    if predecessor is not None:
        _log.info("replacing", pid=predecessor.pid)
        passed = predecessor.usable_listener(host, port)
        listener = listener or passed
    serves = partial(
        _serve_once,
        loaded,
        log=log,
        read_again=read_again,
        configure_log=configure_log,
        on_step=on_step,
        stop_instances=stop_instances,
        take_over=take_over,
    )
    listener = await serves(listener, predecessor)
    while listener is not None:
        _log.error("not_replaced", hint="the new daemon has ended; this one serves again")
        listener = await serves(listener, None)
    _log.info("ended")


async def _serve_once(
    loaded: LoadedSettings,
    given: socket.socket | None,
    predecessor: Predecessor | None,
    *,
    log: LogWriter | None,
    read_again: Callable[[], LoadedSettings] | None,
    configure_log: Callable[[LogSettings, str | None], None],
    on_step: Callable[[str, str], Awaitable[None]],
    stop_instances: bool,
    take_over: bool,
) -> socket.socket | None:
    """Run the daemon until it is to end, or was replaced; as `serve`.

    It serves with the `given` listener, or makes one. `predecessor` is the daemon that it replaces. Returns
    the listener where the daemon that was to replace this one has ended before it served.
    """
    settings = loaded.settings
    key = _key_of(settings)
    descriptors = raise_descriptor_limit()
    async with open_daemon(
        loaded,
        log=log,
        on_step=on_step,
        takes_over=take_over,
        claims_within_s=0.0 if predecessor is None else CLAIMS_WITHIN_S,
    ) as daemon:
        for danger in template_warnings(loaded):
            _log.warning("dangerous_template_setting", detail=danger)
        with given or listening(settings.server.host, settings.server.port) as listener:
            url = url_of(settings.server.host, settings.server.port)
            daemon.state_lock.describe(url=url)
            access = Access(**_access_rules(settings, key))
            relay = _relay(daemon, settings, access)
            budget = connection_budget(descriptors, len(settings.instances))
            connections = ConnectionLimit(budget.most, budget.spare)
            watch = DescriptorWatch(relay.loop, lambda: connections.close_quiet() + relay.close_idle())
            server = Server(
                server_config(control_api(daemon.backend, access=access), listening_with(relay, connections)),
                (relay.drain, daemon.backend.passing.passages.drain),
                settings.gateway.drain_timeout_s,
            )

            def new_key(settings: Settings, key: str | None) -> None:
                configure_log(settings.log, key)
                access.configure(**_access_rules(settings, key))

            def apply(changed: Changes, key: str | None) -> None:
                now = changed.loaded.settings
                new_key(now, key)
                relay.limits = replace(relay.limits, keep_alive_s=now.gateway.keep_alive_s)
                daemon.reconfigure(changed)

            async def let_go() -> None:
                succession.close()
                daemon.backend.passing.routing.placement.freeze()
                await daemon.let_go()

            reloader = Reloader(loaded, daemon.templates, key, read=read_again, apply=apply, new_key=new_key)
            daemon.loops["reload"] = reloader.run
            tune_interpreter()
            running = asyncio.ensure_future(daemon.run())
            giving = Giving(
                server,
                listener,
                running,
                is_busy=lambda: daemon.busy,
                let_go=let_go,
                patience_s=settings.gateway.drain_timeout_s,
            )
            succession = Succession(daemon.id_claim, settings.state.dir, giving.begin)
            greeting = asyncio.ensure_future(_greet(server, predecessor))
            _log.info(
                "serving",
                url=url,
                version=__version__,
                state_dir=str(settings.state.dir),
                most_connections=budget.most,
            )
            try:
                await serve_until_stopped(
                    server,
                    listener,
                    running,
                    before_end=daemon.parts.capacity.stop_all if stop_instances else None,
                    on_hangup=reloader.ask,
                )
            except BaseExceptionGroup as group:
                refusal, _ = group.split((ForeignOwnerError, ManagerIdChangedError))
                if refusal is None:
                    raise
                raise _innermost(refusal) from group
            finally:
                greeting.cancel()
                succession.close()
                watch.stop()
                await relay.close()
    return giving.listener_if_failed()


def _key_of(settings: Settings) -> str | None:
    file = settings.server.key_file
    if file is None:
        return None
    key = read_key(file)
    log_weak_key(key_weaknesses(file, key))
    return key


async def _predecessor(loaded: LoadedSettings) -> Predecessor | None:
    """Have the daemon that runs give way; None where none runs.

    Raises:
        ConfigurationError: this daemon could not serve; the other one was not asked.
        ManagerError: the other one goes on.
    """
    settings = loaded.settings
    resolve_instances(loaded, load_templates(settings))
    channel = ManagerIdLock(settings.manager_id, settings.engine.url).connect()
    if channel is None:
        return None
    return await asyncio.to_thread(
        replace_daemon,
        channel,
        settings.state.dir,
        within_s=settings.gateway.drain_timeout_s + CLAIMS_WITHIN_S,
    )


async def _greet(server: Server, predecessor: Predecessor | None) -> None:
    """Take over the connections of the replaced daemon, once this one accepts its own."""
    await server.accepts.wait()
    if predecessor is not None:
        predecessor.serves(server.adopt)


async def sweep_once(loaded: LoadedSettings, *, dry_run: bool) -> tuple[Swept, ...]:
    """One clean-up without a daemon, by the stored last use; holds the state directory meanwhile.

    A dry run stops nothing and stores nothing, but a registry that is missing is made.

    Raises:
        StateDirHeldError: a daemon runs; it has to be asked.
        UnavailableError: the engine does not answer.
    """
    async with open_daemon(loaded, resume_idle_clock=True, dry_run=dry_run) as daemon:
        within_s = loaded.settings.engine.timeout_s
        running = asyncio.ensure_future(daemon.run_unscheduled())
        try:
            settled = asyncio.ensure_future(daemon.parts.first_look.settled(within_s=within_s))
            await asyncio.wait({running, settled}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                settled.cancel()
                running.result()
            settled.result()
            return await daemon.parts.sweeps.reap(dry_run=dry_run)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextlib.contextmanager
def _claims(settings: Settings, *, within_s: float) -> Iterator[tuple[StateDirLock, ManagerIdLock]]:
    """Hold the state directory, and the manager id on the engine.

    Raises:
        StateDirHeldError, ManagerIdHeldError: another daemon holds one of them.
    """
    with contextlib.ExitStack() as stack:
        state_lock = StateDirLock(settings.state.dir, settings.manager_id)
        state_lock.acquire(within_s=within_s)
        stack.callback(state_lock.release)
        id_lock = ManagerIdLock(settings.manager_id, settings.engine.url)
        id_lock.acquire()
        stack.callback(id_lock.release)
        yield state_lock, id_lock


async def _settled_owner(
    engine: DockerEngine, settings: Settings, owner: Owner, *, takes_over: bool
) -> Owner:
    """Return the owner, once no container of the manager id belongs to another one, and none is left behind.

    An engine that is away is no obstacle: containers of another owner are never adopted. The former manager
    id is kept until the engine was asked for its containers.
    """
    try:
        async with asyncio.timeout(settings.engine.timeout_s if takes_over else _OWNER_CHECK_S):
            listed = await engine.list_containers(settings.manager_id)
            await _refuse_left_behind(engine, settings, owner)
    except (TimeoutError, EngineError):
        if takes_over:
            raise
        return owner
    if not takes_over:
        _refuse_foreign(settings, owner, listed)
    owner = keep_manager_id(settings.state.dir, owner, settings.manager_id)
    if not takes_over:
        return owner
    ids = frozenset(filter(None, map(owner_of, foreign(owner, listed))))
    _log.warning("taken_over", owners=sorted(ids))
    return take_over(settings.state.dir, owner, ids) if ids else owner


async def _refuse_foreign_later(engine: DockerEngine, settings: Settings, owner: Owner) -> None:
    """Look at the owners once the engine answers: it may have been away when the daemon started."""
    while True:
        await asyncio.sleep(settings.lifecycle.probe_interval_s)
        with contextlib.suppress(EngineError):
            _refuse_foreign(settings, owner, await engine.list_containers(settings.manager_id))
            await _refuse_left_behind(engine, settings, owner)
            await asyncio.to_thread(keep_manager_id, settings.state.dir, owner, settings.manager_id)
            return


def _refuse_foreign(settings: Settings, owner: Owner, listed: tuple[ContainerFacts, ...]) -> None:
    strangers = foreign(owner, listed)
    if strangers:
        raise ForeignOwnerError(
            f"containers with manager_id {settings.manager_id!r} belong to another state directory than "
            f"{settings.state.dir}: {', '.join(facts.name for facts in strangers)}"
        )


async def _refuse_left_behind(engine: DockerEngine, settings: Settings, owner: Owner) -> None:
    former = owner.manager_id
    if former is None or former == settings.manager_id:
        return
    wrong = left_behind(owner, settings.manager_id, await engine.list_containers(former))
    if wrong is not None:
        message, remedy = wrong
        raise ManagerIdChangedError(message, details={"remedy": remedy})


def _relay(daemon: Daemon, settings: Settings, access: Access) -> Relay:
    wanted, passing = settings.gateway, daemon.backend.passing
    return Relay(
        passing.routing,
        pools=daemon.pools,
        access=access,
        limits=Limits(
            connect_timeout_s=wanted.connect_timeout_s,
            idle_timeout_s=wanted.idle_timeout_s,
            most_body_bytes=wanted.max_body,
            keep_alive_s=wanted.keep_alive_s,
        ),
        bodies=passing.bodies,
        requests=passing.requests,
        refusals=daemon.backend.refusals,
        unload=passing.volumes.unload,
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
    return Instances(fleet, capacity, link, sweeps, cards, FirstLook(world, fleet, link))


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
        self.settings = settings
        self._templates = templates
        self._rows = rows
        self._ports = {row.loopback_port for row in rows.values()} | {settings.server.port}

    def spec(self, instance_id: str) -> InstanceSpec:
        """Return the specification of an instance that no configuration names: of a card that was found."""
        return auto_gpu_spec(instance_id, self.settings, self._templates)

    def instance(self, capacity: Capacity, spec: InstanceSpec) -> Instance:
        if spec.driver is Driver.EXTERNAL:
            return ExternalInstance(self._world, spec)
        row = self._rows.get(spec.id, InstanceRow(id=spec.id))
        return Supervisor(self._world, spec, self._with_port(row), may_run=capacity.may_run)

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
        self.backend.model_settings.reconfigure(written_roles(changed.loaded), settings.models)
        self.backend.passing.requests.default_project = settings.gateway.default_project
        self.traffic.share_logged = settings.gateway.access_log
        self.sink.level = settings.log.level
        if changed.applied:
            self.backend.journal.record("settings_reloaded", detail=", ".join(changed.applied))


def _access_rules(settings: Settings, key: str | None) -> dict[str, Any]:
    """Return the arguments of `Access`.

    Where other machines reach the daemon, a key is required and clients use names that are not known here:
    every Host is allowed, unless `server.allowed_hosts` differs from its default.
    """
    server = settings.server
    usual = type(server).model_fields["allowed_hosts"].default
    host = server.host.lower()
    machine = socket.gethostname().lower()
    short = machine.partition(".")[0]
    return {
        "allowed_hosts": server.allowed_hosts,
        "allowed_origins": server.allowed_origins,
        "key": key,
        "own_names": {f"[{host}]" if ":" in host else host, machine, short, f"{short}.local"},
        "any_host": not is_loopback(host) and server.allowed_hosts == usual,
    }


def _schedules(settings: Settings) -> tuple[Schedule, ...]:
    return tuple(
        Schedule(entry.cron, entry.action, entry.instance, entry.timezone) for entry in settings.schedules
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
