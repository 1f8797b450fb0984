"""The part of `doctor` that asks Docker Swarm."""

from __future__ import annotations

import asyncio
import re
from contextlib import closing
from typing import TYPE_CHECKING

from manager.cli.findings import Finding, broken, fine, warning
from manager.domain.instance import Driver
from manager.domain.orphans import find_orphans
from manager.domain.swarm import node_of, nodes_with
from manager.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from manager.adapters.swarm_engine import SwarmEngine
    from manager.domain.instance import InstanceSpec
    from manager.domain.swarm import Node
    from manager.settings import Settings

_LONGEST_WAIT_S = 5.0
_NO_MANAGER = "not a swarm manager"
# The first engine with API 1.44, which has security options of services.
_HARDENING_MAJOR = 25


def swarm_findings(settings: Settings, specs: Sequence[InstanceSpec]) -> Iterator[Finding]:
    """Return what is to be said of the swarm; nothing where no instance needs one.

    Args:
        settings: name the engine.
        specs: the configured instances.
    """
    if not settings.uses_swarm:
        return
    from manager.adapters.swarm_engine import SwarmEngine  # noqa: PLC0415

    async def collect() -> list[Finding]:
        engine = SwarmEngine(
            settings.engine.url,
            min(settings.engine.timeout_s, _LONGEST_WAIT_S),
            resource=settings.swarm.resource,
            stop_timeout_s=settings.lifecycle.stop_timeout_s,
            poll_s=settings.lifecycle.probe_interval_s,
        )
        with closing(engine):
            return [finding async for finding in _swarm(engine, settings, specs)]

    yield from asyncio.run(collect())


async def _swarm(
    engine: SwarmEngine, settings: Settings, specs: Sequence[InstanceSpec]
) -> AsyncIterator[Finding]:
    services = [spec for spec in specs if spec.driver is Driver.SWARM]
    try:
        nodes = await engine.nodes()
    except EngineError as error:
        yield broken("swarm", error.message, _remedy(error.message))
        return
    yield nodes_finding(nodes)
    if (unplaced := placement_finding(services, nodes)) is not None:
        yield unplaced
    if (old := hardening_finding(nodes)) is not None:
        yield old
    yield await _services(engine, settings, services)


def _remedy(message: str) -> str:
    if _NO_MANAGER in message:
        return (
            "`docker swarm init` makes a swarm; in one that there is, set engine.url to a manager node, or "
            "make this one a manager by `docker node promote`"
        )
    return "check engine.url, and that a majority of the manager nodes run"


def nodes_finding(nodes: Sequence[Node]) -> Finding:
    """Return which nodes there are, and which of them run nothing."""
    lines = [f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}: {', '.join(map(_described, nodes))}"]
    if any(not node.is_up for node in nodes):
        return warning(
            "swarm",
            lines[0],
            "start the machine or its engine; `docker node rm NODE` forgets one that does not return",
        )
    return fine("swarm", lines[0])


def _described(node: Node) -> str:
    notes = [f"{len(node.cards)} {'card' if len(node.cards) == 1 else 'cards'}"] if node.cards else []
    if not node.is_up:
        notes.append("down")
    elif not node.is_active:
        notes.append("drained or paused")
    return f"{node.name} ({', '.join(notes)})" if notes else node.name


def placement_finding(specs: Sequence[InstanceSpec], nodes: Sequence[Node]) -> Finding | None:
    """Return which instances name a node or cards that are not there; None where all are."""
    lines = []
    for spec in specs:
        wanted = node_of(spec.placement)
        if wanted is not None and all(wanted not in (node.id, node.hostname) for node in nodes):
            lines.append(f"{spec.id} wants node {wanted}, which is not in the swarm")
        cards = spec.devices or (() if spec.device is None else (spec.device,))
        if cards and not nodes_with(nodes, cards):
            lines.append(f"{spec.id} wants {', '.join(cards)}, which no node advertises")
    if not lines:
        return None
    return warning(
        "placement",
        "\n".join(lines),
        "correct `placement` or `device`; `docker node ls` lists the nodes, and `docker node inspect NODE` "
        "has their cards",
    )


def hardening_finding(nodes: Sequence[Node]) -> Finding | None:
    """Return which engines are too old for a security option of services; None where none is."""
    old = [f"{node.name} ({node.engine})" for node in nodes if _is_old(node.engine)]
    if not old:
        return None
    return warning(
        "services",
        f"engines older than {_HARDENING_MAJOR}.0 (API 1.44) ignore no-new-privileges: {', '.join(old)}",
        "update Docker Engine there, or set `no-new-privileges` to true in its /etc/docker/daemon.json",
    )


def _is_old(version: str) -> bool:
    major = re.match(r"\d+", version)
    return major is not None and int(major[0]) < _HARDENING_MAJOR


async def _services(engine: SwarmEngine, settings: Settings, specs: Sequence[InstanceSpec]) -> Finding:
    configured = {spec.id for spec in specs}
    finds = settings.swarm.instances != "none"
    try:
        listed = await engine.list_containers(settings.manager_id)
    except EngineError as error:
        return broken("services", error.message, "look at the engine's log")
    orphans = find_orphans(
        listed,
        manager_id=settings.manager_id,
        is_configured=lambda id_: id_ in configured or (finds and settings.found_ids.on_gpu(id_) is not None),
        removal="docker service rm",
    )
    if not orphans:
        return fine("services", f"{len(listed)} of manager {settings.manager_id!r}, each of an instance")
    lines = [f"{one.name} ({'running' if one.is_running else 'ended'}): {one.why}" for one in orphans]
    remedy = f"nothing watches them; `{'`, `'.join(one.remedy for one in orphans)}` removes them"
    return warning("services", "\n".join(lines), remedy)
