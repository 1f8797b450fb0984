"""Opens what the parts of a daemon share, and has it closed in time. `manager.app` wires them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from manager.adapters.cgroups import NoPids
from manager.adapters.collections import open_collections
from manager.adapters.gpu_exporters import NodeCards
from manager.adapters.locks import FileLocks
from manager.adapters.nvml import Nvml
from manager.adapters.owner import keep_owner, read_owner
from manager.adapters.registry import open_registry
from manager.adapters.registry.extra import database_at
from manager.adapters.swarm_engine import SwarmEngine
from manager.adapters.tls import SharedTls
from manager.adapters.vectors import LanceVectors, installed
from manager.claims import settled_owner
from manager.domain.instance import Driver
from manager.domain.models import model_key
from manager.parts import SwarmParts, budgets_of, selectors_of, utcnow
from manager.services.accounts.keyring import Keyring
from manager.services.accounts.ledger import Ledger
from manager.services.accounts.quotas import Quotas
from manager.services.embeddings import collections
from manager.services.gpus import GpuHistory, Gpus
from manager.services.instances.nodes import Nodes
from manager.services.instances.sharing import NoSharing, Sharing
from manager.services.journal import Journal
from manager.services.world import STARTS_AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AsyncExitStack

    from manager.adapters.cgroups import ProcCgroups
    from manager.adapters.docker_engine import DockerEngine
    from manager.adapters.registry import SqlRegistry
    from manager.adapters.registry.shared import SharedDatabase
    from manager.api.backend import Passing
    from manager.domain.instance import InstanceSpec
    from manager.domain.ownership import Owner
    from manager.parts import Loop
    from manager.services.embeddings.collections import Collections
    from manager.services.overview import Overviews
    from manager.services.ports import InstanceLocks, RequestStore, Shares
    from manager.services.world import World
    from manager.settings import Settings

# How long another process (a clean-up from cron), or another gateway, may hold an instance before a request
# is refused.
_LOCK_WAIT_S = 10.0


async def opened_registry(
    stack: AsyncExitStack, settings: Settings, *, stores: bool
) -> tuple[SqlRegistry, SharedDatabase | None]:
    """Return the registry, and what gateways tell each other where they share a database.

    Args:
        stack: closes both.
        settings: name the state directory and the database.
        stores: whether anything is written.
    """
    path, url = settings.state.dir / "registry.sqlite3", settings.state.url
    if url is None:
        registry = await open_registry(path, stores=stores)
        stack.push_async_callback(registry.close)
        return registry, None
    registry = await open_registry(path, stores=stores, shared=database_at(url))
    stack.push_async_callback(registry.close)
    # Both are of an optional extra.
    from manager.adapters.postgres import AdvisoryLocks  # noqa: PLC0415
    from manager.adapters.registry.shared import SharedDatabase  # noqa: PLC0415

    shared = SharedDatabase(database_at(url), AdvisoryLocks(url), str(registry.gateway))
    stack.push_async_callback(shared.close)
    return registry, shared


def opened_locks(stack: AsyncExitStack, settings: Settings) -> tuple[InstanceLocks, Shares, dict[str, Loop]]:
    """Return the locks of instances, the shares of them, and what goes on for these by itself."""
    locks = FileLocks(settings.state.dir / "locks", _LOCK_WAIT_S)
    url = settings.state.url
    if url is None:
        return locks, NoSharing(), {}
    from manager.adapters.postgres import AdvisoryLocks  # noqa: PLC0415  (an optional extra)

    session = AdvisoryLocks(url)
    stack.push_async_callback(session.close)
    lifecycle = settings.lifecycle
    wait_s = lifecycle.start_timeout_s + lifecycle.stop_timeout_s + _LOCK_WAIT_S
    sharing = Sharing(session, settings.manager_id, beneath=locks, wait_s=wait_s)
    return sharing, sharing, {"shares": sharing.run}


async def opened_owner(
    engine: DockerEngine, settings: Settings, shared: SharedDatabase | None, *, takes_over: bool
) -> Owner:
    """Return the owner of the containers, as `settled_owner`; gateways that share a database have one.

    That one is written into the state directory too, where commands read it.
    """
    owner = read_owner(settings.state.dir)
    if shared is None:
        return await settled_owner(engine, settings, owner, takes_over=takes_over)
    owner = keep_owner(settings.state.dir, await shared.owner(owner))
    owner = await settled_owner(engine, settings, owner, takes_over=takes_over)
    await shared.save_owner(owner)
    return owner


async def opened_journal(stack: AsyncExitStack, registry: SqlRegistry) -> Journal:
    """Return the journal, which goes on with the numbers of the stored events."""
    journal = Journal(registry, last_id=await registry.last_event_id(), utcnow=utcnow)
    await journal.load()
    stack.push_async_callback(journal.retire)
    return journal


async def opened_keyring(registry: SqlRegistry, journal: Journal) -> Keyring:
    keyring = Keyring(registry, journal, utcnow=utcnow)
    await keyring.load()
    return keyring


async def opened_quotas(keyring: Keyring, store: RequestStore) -> Quotas:
    """Return the quotas, with the tokens that keys have used today."""
    quotas = Quotas(now=time.monotonic, utcnow=utcnow)
    grants = (key.grant for key in keyring.all())
    await quotas.load(store, [grant.name for grant in grants if grant.tokens_per_day is not None])
    return quotas


async def opened_gpus(
    stack: AsyncExitStack,
    pids: ProcCgroups,
    registry: SqlRegistry,
    journal: Journal,
    *,
    specs: tuple[InstanceSpec, ...],
    auto: bool,
) -> Gpus:
    """Return the cards with their stored bindings; none was read yet."""
    reader = Nvml()
    stack.push_async_callback(reader.close)
    gpus = Gpus(
        reader,
        pids,
        registry,
        selectors=selectors_of(specs),
        taken_ids=[spec.id for spec in specs],
        auto=auto,
        now=time.monotonic,
        utcnow=utcnow,
        journal=journal,
    )
    await gpus.load()
    return gpus


async def opened_swarm(
    stack: AsyncExitStack, world: World, specs: tuple[InstanceSpec, ...], settings: Settings
) -> SwarmParts | None:
    """Return what the instances of Docker Swarm need; None where there are none.

    Args:
        stack: closes it.
        world: of the instances of this machine.
        specs: the configured instances.
        settings: name the engine, which is that of a manager node.
    """
    if not settings.uses_swarm:
        return None
    lifecycle, swarm = settings.lifecycle, settings.swarm
    engine = SwarmEngine(
        settings.engine.url,
        settings.engine.timeout_s,
        resource=swarm.resource,
        stop_timeout_s=lifecycle.stop_timeout_s,
        poll_s=lifecycle.probe_interval_s,
    )
    stack.enter_context(contextlib.closing(engine))
    nodes = Nodes(engine)
    reader = NodeCards(nodes.advertised, swarm.gpu_exporter, tls=SharedTls().context)
    stack.push_async_callback(reader.close)
    gpus = Gpus(
        reader,
        NoPids(),
        world.registry,
        selectors=selectors_of(specs, Driver.SWARM),
        taken_ids=(),
        auto=False,
        now=time.monotonic,
        utcnow=utcnow,
        journal=world.journal,
        place="advertised by a node of the swarm",
    )
    await nodes.refresh()
    await gpus.load()
    services = replace(
        world,
        engine=engine,
        gpus=gpus,
        starting=asyncio.Semaphore(STARTS_AT_ONCE),
        services_network=swarm.network,
        why_no_node=nodes.why_no_node,
    )
    return SwarmParts(engine, services, nodes)


async def opened_gpu_history(
    stack: AsyncExitStack, registry: SqlRegistry, gpus: Gpus, *, loads: bool
) -> GpuHistory:
    """Return the history of the cards; what waits is written before the registry is closed."""
    history = GpuHistory(gpus, registry, now=time.monotonic, utcnow=utcnow)
    if loads:
        await history.load()
    stack.push_async_callback(history.close)
    return history


async def opened_ledger(
    stack: AsyncExitStack,
    registry: SqlRegistry,
    journal: Journal,
    settings: Settings,
    keyring: Keyring,
    *,
    recovers: bool,
    is_alone: bool,
) -> Ledger:
    """Return the ledger of paid requests; what waits is written before the registry is closed.

    Args:
        stack: closes it.
        registry: has its rows.
        journal: takes its events.
        settings: have the budgets.
        keyring: has the monthly limits of keys.
        recovers: settle what a crash has left open.
        is_alone: no other process has requests under way.
    """
    ledger = Ledger(
        registry.ledger(),
        journal,
        budgets=budgets_of(settings),
        longest_request_s=settings.gateway.total_timeout_s,
        utcnow=utcnow,
        key_limits=keyring.monthly_limits,
    )
    stack.push_async_callback(ledger.close)
    if recovers:
        await ledger.recover(is_alone=is_alone)
    return ledger


async def opened_collections(
    stack: AsyncExitStack,
    settings: Settings,
    passing: Passing,
    overviews: Overviews,
    journal: Journal,
    *,
    stores: bool,
) -> Collections:
    """Return the collections of the state directory; without `stores` nothing is written to it."""
    state_dir = settings.state.dir
    vectors = LanceVectors(state_dir / "vectors") if installed() else None
    if vectors is not None:
        stack.push_async_callback(vectors.close)
    # No file that was lost, and whose tables of vectors are left, has a key as high as the time.
    path, first_version = state_dir / "embeddings.sqlite3", int(time.time())
    store = await open_collections(path, stores=stores, first_version=first_version)
    stack.push_async_callback(store.close)

    def digests_of(model: str) -> Mapping[str, tuple[str, ...]]:
        state = overviews.models().get(model_key(model))
        return {} if state is None else state.digests

    opened = await collections.opened(
        store,
        vectors,
        routing=passing.routing,
        server=passing.server,
        requests=passing.requests,
        journal=journal,
        digests_of=digests_of,
        refresh=partial(passing.catalogue.refresh, lists=True),
        utcnow=utcnow,
    )
    # A write that has added its vectors must still note them: it ends before the file is closed.
    stack.push_async_callback(opened.shelf.tables.close)
    passing.passages.open_requests.add(opened.embedder.open)
    return opened
