"""Builds the parts of a daemon from its settings and from what was stored. `manager.app` wires them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from manager.adapters.request_log import RequestLog
from manager.adapters.run_files import DirectoryFiles
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
from manager.services.benchmarks.benchmarks import Benchmarks
from manager.services.bodies import BodyBudget
from manager.services.following import FollowedOrders, Following
from manager.services.instances.capacity import Capacity
from manager.services.instances.cloud import CloudInstance
from manager.services.instances.engine_link import EngineLink, Swarm
from manager.services.instances.external import ExternalInstance
from manager.services.instances.first_look import FirstLook
from manager.services.instances.fleet import Fleet
from manager.services.instances.found_cards import FoundCards
from manager.services.instances.lifts import Lifts
from manager.services.instances.nodes import FoundNodes
from manager.services.instances.service import Service
from manager.services.instances.supervisor import Supervisor
from manager.services.instances.sweeps import Schedule, Sweeps
from manager.services.models.keeping import Keeper
from manager.services.models.loading import Loading
from manager.services.models.use import ModelUses
from manager.services.requests_history import History, Retention
from manager.services.routing.rollout import Rollout
from manager.services.routing.stages import RolloutControl
from manager.services.routing.whole import WholeRequests
from manager.services.runs.ensemble import Executions
from manager.services.runs.execution import Execution
from manager.services.runs.runs import RunLimits, Runs
from manager.services.traffic import Traffic
from manager.settings import (
    auto_gpu_spec,
    node_spec,
    written_fallback,
    written_roles,
    written_rollout,
)
from manager.settings.rollout import rollout_refusals
from manager.settings.server_keys import read_server_key
from manager.wire.caller import HeaderNames

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from manager.adapters.cgroups import ProcCgroups
    from manager.adapters.log_writer import LogWriter
    from manager.adapters.otel import Spans
    from manager.adapters.registry import SqlRegistry
    from manager.adapters.swarm_engine import SwarmEngine
    from manager.api.backend import Backend, Passing
    from manager.domain.budgets import Budget
    from manager.domain.instance import KeySource
    from manager.domain.lifted import Lifted
    from manager.domain.record import RequestRecord, Samples
    from manager.domain.template import Template
    from manager.relay.upstream import UpstreamPools
    from manager.services.accounts.keyring import Keyring
    from manager.services.accounts.quotas import Quotas
    from manager.services.benchmarks.scores import BenchmarkScores
    from manager.services.instances.instance import Instance
    from manager.services.instances.nodes import FoundInstance, Nodes
    from manager.services.journal import Journal
    from manager.services.models.model_settings import ModelSettings
    from manager.services.models.volumes import Volumes
    from manager.services.ports import ModelServer, Shared
    from manager.services.routing.attempting import Routing
    from manager.services.routing.breakers import Breakers
    from manager.services.routing.overload import Overload
    from manager.services.world import World
    from manager.settings import LoadedSettings, Settings
    from manager.settings.changes import Changes
    from manager.settings.model import LogSettings

    Loop: TypeAlias = Callable[[], Coroutine[None, None, None]]

# The first of the fixed loopback ports; each instance keeps the one it got first.
_FIRST_LOOPBACK_PORT = 11500
# The port of the CPU of a node of a swarm; those of its cards follow.
_FIRST_NODE_PORT = 11700


@dataclass(frozen=True, slots=True)
class SwarmParts:
    """The outside of the instances of Docker Swarm, and the nodes."""

    engine: SwarmEngine
    world: World
    nodes: Nodes


@dataclass(frozen=True, slots=True)
class Instances:
    """The instances and what goes on around all of them.

    `link` is that to the engine, `links` are all of them: with one to Docker Swarm where there are services.
    """

    fleet: Fleet
    capacity: Capacity
    link: EngineLink
    links: tuple[EngineLink, ...]
    sweeps: Sweeps
    cards: FoundCards
    first_look: FirstLook
    service: Service
    lifts: Lifts
    nodes: FoundNodes | None

    def loops(self) -> dict[str, Loop]:
        loops: dict[str, Loop] = {
            "instances": self.fleet.run,
            "places": self.capacity.run,
            "engine": self.link.run,
            "gpus": self.cards.run,
            "sweeps": self.sweeps.run,
        }
        if self.nodes is not None:
            loops |= {"swarm": self.links[-1].run, "nodes": self.nodes.run}
        return loops


async def benchmarks_of(
    world: World,
    settings: Settings,
    registry: SqlRegistry,
    fleet: Fleet,
    passing: Passing,
    *,
    whole: WholeRequests,
    scores: BenchmarkScores,
    recovers: bool,
) -> Benchmarks:
    """Return the benchmarks; with `recovers` those are interrupted that another process has left."""
    benchmarks = Benchmarks(
        registry,
        whole,
        passing.catalogue,
        fleet,
        world.journal,
        workloads=settings.routing.benchmark_workloads,
        scores=scores,
        utcnow=world.utcnow,
    )
    await benchmarks.load(recovers=recovers)
    return benchmarks


def whole_requests_of(passing: Passing) -> WholeRequests:
    """Return what makes the daemon's own requests, which are among the open ones."""
    whole = WholeRequests(passing.routing, passing.server, passing.requests)
    passing.passages.open_requests.add(whole.open)
    return whole


async def runs_of(
    stack: AsyncExitStack,
    settings: Settings,
    world: World,
    passing: Passing,
    keyring: Keyring,
    *,
    whole: WholeRequests,
    recovers: bool,
) -> Runs:
    files = stack.enter_context(contextlib.closing(DirectoryFiles(settings.state.dir / "runs")))
    stored = BodyBudget(settings.runs.max_stored)
    single = Execution(
        passing.routing, passing.server, passing.requests, files, stored, grant_of=keyring.grant
    )
    runs = Runs(
        world.registry,
        files,
        Executions(single, whole),
        stored=stored,
        limits=run_limits(settings),
        utcnow=world.utcnow,
        on_step=world.on_step,
    )
    passing.passages.open_requests.add(runs.open)
    if recovers:
        await runs.recover()
    return runs


def run_limits(settings: Settings) -> RunLimits:
    return RunLimits(**settings.runs.model_dump())


def warming(
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


def following_of(
    shared: Shared | None,
    world: World,
    parts: Instances,
    quotas: Quotas | None,
    *,
    keyring: Keyring,
    model_settings: ModelSettings,
    rollout: RolloutControl,
) -> Following | None:
    """Return what follows the changes of other gateways; None where no database is shared."""
    if shared is None or quotas is None:
        return None
    orders = FollowedOrders(world.registry, parts.fleet, parts.service, parts.lifts, utcnow=world.utcnow)
    return Following(
        shared,
        world.journal,
        reloads={
            "keys": keyring.reload,
            "overrides": model_settings.reload,
            OrderKind.ROLLOUT: rollout.load,
            OrderKind.DRAINED: orders.drains,
            OrderKind.LIFTED: orders.lifted,
        },
        quotas=quotas,
    )


def header_names(settings: Settings) -> HeaderNames:
    names = settings.gateway.headers
    return HeaderNames(
        instance=names.instance.lower().encode(),
        lane=names.lane.lower().encode(),
        project=names.project.lower().encode(),
        intent=names.intent.lower().encode(),
        local_only=names.local_only.lower().encode(),
    )


async def instances_of(
    world: World,
    settings: Settings,
    *,
    specs: Iterable[InstanceSpec],
    make: Maker,
    own_names: tuple[str, ...],
    swarm: SwarmParts | None = None,
) -> Instances:
    """Return the instances, those that the nodes of a swarm give included.

    `swarm` is what those of Docker Swarm need, None where there are none.
    """
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
    links: tuple[EngineLink, ...] = (link,)
    nodes: FoundNodes | None = None
    if swarm is not None:
        services = EngineLink(
            swarm.world,
            fleet,
            capacity,
            own_names=own_names,
            probe_interval_s=probe_interval_s,
            resync_interval_s=resync_interval_s,
            swarm=Swarm(
                settings.swarm.reach,
                settings.swarm.network,
                settings.swarm.instances != "none",
                world.engine.inspect,
            ),
        )
        nodes = FoundNodes(
            swarm.world,
            swarm.nodes,
            fleet,
            services,
            wanted=settings.swarm.instances,
            make=partial(make.found_on_node, capacity),
            interval_s=probe_interval_s,
        )
        links = (link, services)
    sweeps = Sweeps(
        world, fleet, capacity, links, schedules=schedules_of(settings), interval_s=probe_interval_s
    )
    cards = FoundCards(
        world,
        fleet,
        link,
        make=lambda instance_id: make.found(capacity, instance_id),
        interval_s=probe_interval_s,
    )
    for spec in specs:
        fleet.add(make.instance(capacity, spec))
    if nodes is not None:
        await nodes.look()
    return Instances(
        fleet=fleet,
        capacity=capacity,
        link=link,
        links=links,
        sweeps=sweeps,
        cards=cards,
        first_look=FirstLook(world, fleet, links),
        service=Service(world, fleet, capacity, [one.asked for one in links]),
        lifts=Lifts(world, fleet, make.orders.lifted),
        nodes=nodes,
    )


@dataclass(frozen=True, slots=True)
class Orders:
    """Orders of operators for instances, by id."""

    drained: dict[str, Drained]
    images: dict[str, ImageOverride]
    lifted: dict[str, Lifted]


async def read_orders(
    registry: SqlRegistry, settings: Settings, journal: Journal, *, ends_none: bool
) -> Orders:
    """Read the orders of an earlier run; `ends_none` is whether no container is to be stopped for one.

    No container is stopped for an order whose time has passed. An image that is not allowed any more is not
    used.
    """
    now = utcnow()
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
    return Orders(drained, allowed, await registry.orders(OrderKind.LIFTED, lifted_from))


class Maker:
    """Makes instances from their specs and what was stored of them."""

    def __init__(
        self,
        world: World,
        settings: Settings,
        templates: dict[str, Template],
        rows: dict[str, InstanceRow],
        orders: Orders,
        *,
        swarm: SwarmParts | None = None,
    ) -> None:
        self._world = world
        self.swarm = swarm
        self.orders = orders
        self.settings = settings
        self._templates = templates
        self._rows = rows
        self._on_nodes: dict[str, FoundInstance] = {}
        self._ports = {row.loopback_port for row in rows.values()} | {settings.server.port}

    def spec(self, instance_id: str) -> InstanceSpec:
        """Return the specification of an instance that no configuration names: it was found."""
        on_node = self._on_nodes.get(instance_id)
        if on_node is None:
            return auto_gpu_spec(instance_id, self.settings, self._templates)
        return node_spec(
            instance_id, self.settings, self._templates, card=on_node.card, placement=on_node.placement
        )

    def instance(self, capacity: Capacity, spec: InstanceSpec) -> Instance:
        if spec.driver is Driver.EXTERNAL:
            return ExternalInstance(self._world, spec, drained=self.orders.drained.get(spec.id))
        if spec.driver is Driver.CLOUD:
            return CloudInstance(self._world, spec, drained=self.orders.drained.get(spec.id))
        row = self._rows.get(spec.id, InstanceRow(id=spec.id))
        return Supervisor(
            self._world if self.swarm is None or spec.driver is Driver.DOCKER else self.swarm.world,
            spec,
            self._with_port(row),
            may_run=capacity.may_run,
            drained=self.orders.drained.get(spec.id),
            image=self.orders.images.get(spec.id),
        )

    def found(self, capacity: Capacity, instance_id: str) -> Instance:
        return self.instance(capacity, self.spec(instance_id))

    def found_on_node(self, capacity: Capacity, found: FoundInstance) -> Instance:
        self._on_nodes[found.id] = found
        # A port need not be another one on another node, and is the same for all gateways.
        row = self._rows.get(found.id, InstanceRow(id=found.id))
        if row.loopback_port is None:
            self._rows[found.id] = replace(row, loopback_port=_FIRST_NODE_PORT + found.number)
        return self.instance(capacity, self.spec(found.id))

    def _with_port(self, row: InstanceRow) -> InstanceRow:
        if row.loopback_port is not None:
            return row
        port = _FIRST_LOOPBACK_PORT
        while port in self._ports:
            port += 1
        self._ports.add(port)
        return replace(row, loopback_port=port)


@dataclass(frozen=True, slots=True)
class Reconfigure:
    """Puts in force what can change while the daemon runs."""

    make: Maker
    backend: Backend
    traffic: Traffic
    sink: RecordSink

    def __call__(self, changed: Changes) -> None:
        settings, fleet = changed.loaded.settings, self.backend.fleet
        self.make.settings = settings
        if self.make.swarm is not None:
            self.make.swarm.engine.stop_timeout_s = settings.lifecycle.stop_timeout_s
        written = {spec.id for spec in changed.specs}
        found = [self.make.spec(one.id) for one in fleet.instances() if one.id not in written]
        fleet.reconfigure((*changed.specs, *found))
        self.backend.capacity.reconfigure(settings.lifecycle.max_running)
        self.backend.sweeps.reconfigure(schedules_of(settings))
        self.backend.passing.routing.breakers.reconfigure(breaker_limits(settings))
        self.backend.model_settings.reconfigure(
            written_roles(changed.loaded),
            settings.models,
            written_fallback(changed.loaded),
            settings.routing.rules,
            settings.routing.ensemble,
            weights=settings.routing.weights.values,
        )
        self.backend.passing.requests.default_project = settings.gateway.default_project
        self.backend.runs.limits = run_limits(settings)
        self.traffic.share_logged = settings.gateway.access_log
        self.sink.level = settings.log.level
        self.backend.history.retention = retention_of(settings)
        self.backend.ledger.budgets = budgets_of(settings)
        self.backend.rollout.reconfigure(written_rollout(changed.loaded))
        if changed.applied:
            self.backend.journal.record("settings_reloaded", detail=", ".join(changed.applied))


def forget_server(breakers: Breakers, overload: Overload, instance: str) -> None:
    """The server of an instance is another one: nothing that is known of the old one holds for it."""
    breakers.server_changed(instance)
    overload.server_changed(instance)


def breaker_limits(settings: Settings) -> BreakerLimits:
    breaker = settings.breaker
    return BreakerLimits(breaker.failures, breaker.open_s, breaker.max_open_s)


async def history_of(
    held: AsyncExitStack, registry: SqlRegistry, settings: Settings
) -> tuple[History, ModelUses]:
    """Return the history of requests, and the use of models, which passes requests on to it.

    The history is written to its end before the registry is closed.
    """
    store = registry.requests()
    held.push_async_callback(store.close)
    history = History(store, retention=retention_of(settings), utcnow=utcnow)
    held.push_async_callback(history.close)
    await history.seed()
    uses = ModelUses(history.add, now_s=time.time)
    await uses.seed(store)
    return history, uses


async def rollout_of(
    registry: SqlRegistry,
    journal: Journal,
    loaded: LoadedSettings,
    make: Maker,
    model_settings: ModelSettings,
) -> RolloutControl:
    """Return the stage of the rollout; what was changed at run time is in force."""
    control = RolloutControl(
        Rollout(journal),
        registry,
        journal,
        written=written_rollout(loaded),
        refusals=lambda section: rollout_refusals(section, make.settings, model_settings.routing.roles),
    )
    await control.load()
    return control


def budgets_of(settings: Settings) -> tuple[Budget, ...]:
    return tuple(one.budget for one in settings.budgets)


def model_server(settings: Settings, pools: UpstreamPools) -> PooledModelServer:
    return PooledModelServer(
        pools,
        connect_timeout_s=settings.gateway.connect_timeout_s,
        patience_s=settings.gateway.first_byte_timeout_s,
    )


def retention_of(settings: Settings) -> Retention:
    return Retention(**settings.audit.model_dump())


def schedules_of(settings: Settings) -> tuple[Schedule, ...]:
    return tuple(
        Schedule(entry.cron, entry.action, entry.instance, entry.timezone) for entry in settings.schedules
    )


def selectors_of(
    specs: tuple[InstanceSpec, ...], driver: Driver = Driver.DOCKER
) -> dict[str, tuple[str, ...]]:
    """Return the cards that the configuration gives to the instances of a driver."""
    return {
        spec.id: spec.devices or (spec.device or AUTO,)
        for spec in specs
        if spec.driver is driver and spec.device_kind is DeviceKind.GPU
    }


def slots_of(fleet: Fleet) -> dict[str, int | None]:
    return {instance.id: instance.spec.slots for instance in fleet.instances()}


def gpus_of(fleet: Fleet) -> dict[str, bool | None]:
    """Return for each instance that a role may name whether it runs on a GPU; roles name no paid servers."""
    specs = [instance.spec for instance in fleet.instances()]
    return {spec.id: on_gpu(spec) for spec in specs if not spec.is_paid}


def paid_of(fleet: Fleet) -> dict[str, bool]:
    return {instance.id: instance.spec.is_paid for instance in fleet.instances()}


def on_gpu(spec: InstanceSpec) -> bool | None:
    return None if spec.device_kind is None else spec.device_kind is DeviceKind.GPU


def own_names_of(pids: ProcCgroups) -> tuple[str, ...]:
    """The engine's names for this process if it runs in a container: the id, or the host name."""
    return tuple(filter(None, (pids.container_of(os.getpid()), socket.gethostname())))


def traffic_of(
    stack: AsyncExitStack, settings: Settings, log: LogWriter | None
) -> tuple[RecordSink, Traffic, Samples]:
    """Return the log of requests, their counters, and which traces are sampled; spans end with the stack."""
    sink = RecordSink(log, settings.log)
    spans = _spans() if settings.gateway.tracing else None
    if spans is None:
        return sink, Traffic(sink.write, share_logged=settings.gateway.access_log), never
    stack.push_async_callback(spans.close)
    traffic = Traffic(sink.write, share_logged=settings.gateway.access_log, trace=spans.write)
    return sink, traffic, spans.samples


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


class RecordSink:
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


async def read_key(source: KeySource) -> str:
    """Return the key for a server, read in a thread."""
    return await asyncio.to_thread(read_server_key, source)


def utcnow() -> datetime:
    return datetime.now(UTC)
