"""The composition root: builds the daemon from its parts and closes them in reverse."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from manager.adapters.cgroups import ProcCgroups
from manager.adapters.docker_engine import DockerEngine
from manager.adapters.metrics import FleetMetrics
from manager.adapters.schedule import ApScheduler
from manager.adapters.tls import SharedTls, own_tls_of
from manager.adapters.upstream import HttpUpstream
from manager.api.backend import Backend, Passing
from manager.api.passage import PassageLimits, Passages
from manager.claims import claims, refuse_foreign_later
from manager.domain.template import image_allowed
from manager.opening import (
    opened_collections,
    opened_gpu_history,
    opened_gpus,
    opened_journal,
    opened_keyring,
    opened_ledger,
    opened_locks,
    opened_owner,
    opened_quotas,
    opened_registry,
    opened_swarm,
)
from manager.parts import (
    Instances,
    Maker,
    Reconfigure,
    benchmarks_of,
    breaker_limits,
    following_of,
    forget_server,
    gpus_of,
    header_names,
    history_of,
    instances_of,
    model_server,
    own_names_of,
    paid_of,
    read_key,
    read_orders,
    rollout_of,
    runs_of,
    slots_of,
    traffic_of,
    utcnow,
    warming,
    whole_requests_of,
)
from manager.relay.upstream import UpstreamPools
from manager.services.benchmarks.scores import BenchmarkScores
from manager.services.bodies import BodyBudget
from manager.services.instances.upgrades import Upgrades
from manager.services.lanes.slots import Slots
from manager.services.llm import Llm
from manager.services.models.catalogue import Catalogue
from manager.services.models.details import ModelDetails
from manager.services.models.differing import DifferingModels
from manager.services.models.fitting import Fitting
from manager.services.models.model_lists import ModelLists
from manager.services.models.model_settings import ModelSettings
from manager.services.models.pulls import Pulls
from manager.services.models.volume_reader import VolumeReader
from manager.services.models.volumes import Volumes
from manager.services.overview import Overviews, nowhere
from manager.services.refusals import Refusals
from manager.services.requests import Requests
from manager.services.routing.attempting import Deadlines, Routing
from manager.services.routing.breakers import Breakers
from manager.services.routing.cloud_events import CloudEvents
from manager.services.routing.fallback_events import FallbackEvents
from manager.services.routing.learned import vector_of
from manager.services.routing.model_status import ModelStatus
from manager.services.routing.overload import Overload
from manager.services.routing.placement import Placement
from manager.services.routing.router import Router
from manager.services.world import Revision, World, no_others, no_step
from manager.settings import (
    load_templates,
    real_writers,
    resolve_instances,
    written_fallback,
    written_roles,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from manager.adapters.locks import StateDirLock
    from manager.adapters.log_writer import LogWriter
    from manager.domain.template import Template
    from manager.parts import Loop
    from manager.services.instances.fleet import Fleet
    from manager.settings import LoadedSettings, Settings
    from manager.settings.changes import Changes


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
    async with AsyncExitStack() as stack:
        held = await stack.enter_async_context(AsyncExitStack())
        state_lock, id_lock = held.enter_context(claims(settings, within_s=claims_within_s))
        registry, shared = await opened_registry(held, settings, stores=not dry_run)
        journal = await opened_journal(held, registry)
        keyring = await opened_keyring(registry, journal)
        history, uses = await history_of(held, registry, settings)
        ledger = await opened_ledger(
            held,
            registry,
            journal,
            settings,
            keyring,
            is_alone=not claims_within_s and (shared is None or resume_idle_clock or await shared.hold()),
            recovers=not resume_idle_clock,
        )
        pids = ProcCgroups()
        gpus = await opened_gpus(stack, pids, registry, journal, specs=specs, auto=settings.gpus == "auto")
        tls, own_tls = SharedTls().context, await asyncio.to_thread(own_tls_of, settings)
        pools = stack.enter_context(contextlib.closing(UpstreamPools(tls, own_tls)))
        engine = stack.enter_context(
            contextlib.closing(DockerEngine(settings.engine.url, settings.engine.timeout_s))
        )
        owner = await opened_owner(engine, settings, shared, takes_over=takes_over)
        scores = BenchmarkScores(revision := Revision())
        breakers = Breakers(
            journal, revision, limits=breaker_limits(settings), now=time.monotonic, utcnow=utcnow
        )
        overload = Overload(
            revision,
            now=time.monotonic,
            expected_ms=lambda key: model_settings.routing.expected_ms(key),  # noqa: PLW0108  (made below)
        )
        locks, shares, sharing = opened_locks(held, settings)
        world = World(
            manager_id=settings.manager_id,
            engine=engine,
            registry=registry,
            locks=locks,
            shares=shares,
            upstream=await stack.enter_async_context(HttpUpstream(tls, own_tls)),
            gpus=gpus,
            journal=journal,
            now=time.monotonic,
            utcnow=utcnow,
            on_step=on_step,
            resume_idle_clock=resume_idle_clock,
            dry_run=dry_run,
            owner=owner,
            others_work=others_work,
            revision=revision,
            server_changed=partial(forget_server, breakers, overload),
            read_key=read_key,
        )
        swarm = await opened_swarm(stack, world, specs, settings)
        make = Maker(
            world,
            settings,
            templates,
            await registry.instances(),
            await read_orders(registry, settings, journal, ends_none=resume_idle_clock or dry_run),
            swarm=swarm,
        )
        parts = await instances_of(
            world,
            settings,
            specs=(*specs, *map(make.spec, gpus.instance_ids())),
            make=make,
            own_names=own_names_of(pids),
            swarm=swarm,
        )
        held.push_async_callback((fleet := parts.fleet).save)
        sink, traffic, samples = traffic_of(stack, settings, log)
        lists = ModelLists(registry, journal, await registry.model_lists())
        model_settings = ModelSettings(
            registry,
            journal,
            written=written_roles(loaded),
            models=settings.models,
            instances=partial(gpus_of, fleet),
            slots=partial(slots_of, fleet),
            denied=lambda: {instance.id: instance.spec.deny_models for instance in fleet.instances()},
            found=settings.found_ids,
            fallback=written_fallback(loaded),
            auto=settings.routing.rules,
            weights=settings.routing.weights.values,
            ensemble=settings.routing.ensemble,
            paid=partial(paid_of, fleet),
        )
        await model_settings.load()
        status, details = ModelStatus(fleet), ModelDetails(fleet, lists, now=time.monotonic)
        slots = Slots(model_settings, partial(slots_of, fleet), status.workers, now=time.monotonic)
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
            benchmarks=scores,
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
            parts.links,
            [gpus] if swarm is None else [gpus, swarm.world.gpus],
            lists=lists,
            settings=model_settings,
            lifted=parts.lifts.of,
            breakers=breakers,
            loading=status.loading,
            node=nowhere if swarm is None else swarm.nodes.name_for,
        )
        catalogue = Catalogue(
            fleet,
            overviews,
            status,
            overload,
            lists,
            settings=model_settings,
            reader=volume_reader,
            details=details,
            now=time.monotonic,
        )
        server, rollout = (
            model_server(settings, pools),
            await rollout_of(registry, journal, loaded, make, model_settings),
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
            slots,
            pulls,
            Deadlines(settings.gateway.first_byte_timeout_s, settings.gateway.total_timeout_s),
            breakers,
            overload,
            keep=uses.keep,
            ledger=ledger,
            rollout=rollout.in_force,
            quotas=await opened_quotas(keyring, history.store),
            cloud=CloudEvents(journal),
            vector_of=lambda text, model: vector_of(whole, text, model),
        )
        passing = Passing(
            routing=routing,
            catalogue=catalogue,
            volumes=volumes,
            pulls=pulls,
            server=server,
            requests=Requests(
                header_names(settings),
                default_project=settings.gateway.default_project,
                samples=samples,
                used=keyring.used,
            ),
            bodies=BodyBudget(settings.gateway.max_buffered),
            limits=PassageLimits(
                most_body_bytes=settings.gateway.max_body,
                most_upload_bytes=settings.gateway.max_upload,
                stall_s=settings.gateway.idle_timeout_s,
            ),
            passages=Passages(),
        )
        loading, keeper = warming(
            world, parts, routing, volumes=volumes, model_settings=model_settings, server=server
        )
        refusals, whole = Refusals(now=time.monotonic), whole_requests_of(passing)
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
            gpu_history=await opened_gpu_history(held, registry, gpus, loads=not resume_idle_clock),
            journal=journal,
            engine=engine,
            passing=passing,
            model_settings=model_settings,
            lifts=parts.lifts,
            loading=loading,
            uses=uses,
            fitting=Fitting(fleet, overviews),
            status=status,
            keeper=keeper,
            router=router,
            may_pull=lambda image: image_allowed(image, settings.allow.images),
            render_metrics=FleetMetrics(
                overviews,
                traffic,
                refusals,
                slots,
                log_lines_dropped=lambda: 0 if log is None else log.dropped,
                history=history,
                rollout=rollout.in_force,
                budgets=lambda: ledger.last_seen,
                collections=lambda: backend.collections.counting.last,
                benchmarks=lambda: backend.benchmarks.latest,
            ).render,
            refusals=refusals,
            history=history,
            keyring=keyring,
            following=following_of(
                shared,
                world,
                parts,
                routing.quotas,
                keyring=keyring,
                model_settings=model_settings,
                rollout=rollout,
            ),
            ledger=ledger,
            rollout=rollout,
            nodes=None if swarm is None else swarm.nodes,
            runs=await runs_of(
                stack, settings, world, passing, keyring, whole=whole, recovers=not resume_idle_clock
            ),
            llm=Llm(whole, model_settings),
            benchmarks=await benchmarks_of(
                world,
                settings,
                registry,
                fleet,
                passing,
                whole=whole,
                scores=scores,
                recovers=not resume_idle_clock,
            ),
            collections=await opened_collections(
                held, settings, passing, overviews, journal, stores=not dry_run
            ),
        )

        loops: dict[str, Loop] = {
            **parts.loops(),
            **sharing,
            "journal": journal.run,
            "history": history.run,
            "keys": keyring.run,
            "ledger": ledger.run,
            "model lists": lists.run,
            "model details": details.run,
            "differing models": DifferingModels(overviews, journal).run,
            "pulls": pulls.run,
            "lanes": partial(slots.run, router.snapshot),
            "owner": partial(refuse_foreign_later, engine, settings, owner),
        }
        if not resume_idle_clock:  # a sweep reads no volume, puts nothing back in service, executes no run
            loops |= {
                "volumes": volume_reader.run,
                "service": parts.service.run,
                "runs": backend.runs.run,
                "collections": backend.collections.tending.run,
                "builds of models": backend.collections.tending.follow_builds,
                "backfills": backend.collections.backfilling.run,
                "counts of collections": backend.collections.counting.run,
                "benchmarks": backend.benchmarks.run,
                "lifts": parts.lifts.run,
                "warm models": keeper.run,
                "gpu history": backend.gpu_history.run,
                **({} if backend.following is None else {"shared database": backend.following.run}),
            }
        yield Daemon(
            settings,
            parts,
            backend,
            pools,
            state_lock,
            id_lock.claim,
            templates,
            Reconfigure(make, backend, traffic, sink),
            let_go=held.aclose,
            loops=loops,
        )
