"""`/v1/cluster`: hosts, services, roles and health, over the same overview and decisions as all routes."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.api.routing import routing_values
from manager.domain.instance import Driver, Health, Phase  # pydantic reads annotations at run time
from manager.domain.roles import Policy, RequestKind, Strategy  # noqa: TC001
from manager.domain.routing import State
from manager.domain.target import Protocol  # noqa: TC001
from manager.errors import Reason
from manager.settings.addresses import is_loopback

if TYPE_CHECKING:
    from collections.abc import Iterator

    from manager.api.backend import Backend
    from manager.domain.gpu import Gpu
    from manager.domain.routing import Candidate
    from manager.domain.swarm import Node
    from manager.services.overview import InstanceState, Overview

CLUSTER = "/v1/cluster"


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HostEngineBody(_Shape):
    """The container engine; `trouble` says why it is not up."""

    url: str
    up: bool
    trouble: str | None


class HostCpuBody(_Shape):
    """The processors that the daemon sees; null where that cannot be told."""

    count: int | None


class HostGpuBody(_Shape):
    uuid: str
    index: int
    name: str
    vram_total_bytes: int | None
    vram_used_bytes: int | None
    vram_free_bytes: int | None


class HostBody(_Shape):
    """The machine of the daemon, a node of the swarm, or the host in the URLs of external instances.

    The machine is a node too where the engine on it is that of a manager node. `state` and `address` are
    those that Swarm tells of a node, null of what is none; one that is `drained` gets no services. Of a
    `node`, `engine` and `cpu` are null. Of an `external` host only the instances are known.
    """

    name: str
    kind: Literal["machine", "node", "external"]
    state: Literal["ready", "down", "drained"] | None
    address: str | None
    engine: HostEngineBody | None
    cpu: HostCpuBody | None
    gpus: list[HostGpuBody]
    instances: list[str]


class HostsBody(_Shape):
    hosts: list[HostBody]
    count: int


class ServiceBody(_Shape):
    """One instance as a service. Null is what is not known.

    `host` is null where Docker Swarm has not chosen a node yet. `url` is configured, `endpoint` in use now.
    `models` are those that it has, `loaded_models` those in its memory, and `vram_used_bytes` is what these
    hold of cards. `queue_depth` counts the requests that wait and may use it.
    """

    instance: str
    host: str | None
    url: str | None
    endpoint: str | None
    driver: Driver
    protocol: Protocol
    state: State
    phase: Phase
    health: Health
    models: list[str] | None
    loaded_models: list[str]
    loaded_model_count: int
    vram_used_bytes: int | None
    in_flight: int
    queue_depth: int


class ServicesBody(_Shape):
    services: list[ServiceBody]
    count: int


class ClusterRoleBody(_Shape):
    """One role. The target, its `endpoint` and `fallback_reason` are as in `/api/runtime/compute/routing`.

    `models` has its own model and those of the tier of its name, in order.
    """

    name: str
    kind: RequestKind
    model: str | None
    models: list[str]
    strategy: Strategy
    policy: Policy
    requested_target: str
    effective_target: str | None
    endpoint: str | None
    fallback_reason: Reason | None
    message: str | None
    fallbacks: list[str]
    instances: list[str] | None


class ClusterRolesBody(_Shape):
    roles: list[ClusterRoleBody]
    count: int


class DegradedBody(_Shape):
    """An instance that cannot be used as it should be, and why."""

    instance: str
    reason: Reason
    message: str


class ClusterHealthBody(_Shape):
    """`down`: no instance can answer, now or after a start. `degraded`: one of them has a trouble.

    An instance that is drained has no trouble, and cannot answer.
    """

    status: Literal["ok", "degraded", "down"]
    instances: int
    able: int
    phases: dict[Phase, int]
    health: dict[Health, int]
    degraded: list[DegradedBody]


def cluster_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix=CLUSTER, tags=["cluster"])

    @router.get("/hosts", response_model=HostsBody, responses=refusals())
    async def list_hosts(_query: Annotated[NoQuery, Query()]) -> Response:
        """The machine with its engine and cards, the nodes of the swarm, and other hosts."""
        hosts = list(_hosts(backend, backend.overviews.current()))
        return JSONResponse({"hosts": hosts, "count": len(hosts)})

    @router.get("/services", response_model=ServicesBody, responses=refusals())
    async def list_services(_query: Annotated[NoQuery, Query()]) -> Response:
        """Every instance with its models and its load. Starts nothing."""
        services = list(_services(backend, backend.overviews.current()))
        return JSONResponse({"services": services, "count": len(services)})

    @router.get("/roles", response_model=ClusterRolesBody, responses=refusals())
    async def list_roles(_query: Annotated[NoQuery, Query()]) -> Response:
        """Every role with its model, its strategy, and where a request for it would go now."""
        roles = list(_roles(backend))
        return JSONResponse({"roles": roles, "count": len(roles)})

    @router.get("/health", response_model=ClusterHealthBody, responses=refusals())
    async def show_health(_query: Annotated[NoQuery, Query()]) -> Response:
        """The health of the fleet, and the troubles of instances; always 200."""
        return JSONResponse(_health(backend, backend.overviews.current()))

    return router


def _hosts(backend: Backend, overview: Overview) -> Iterator[dict[str, Any]]:
    """Yield the values of each `HostBody`: the machine, the nodes, and the others."""
    machine = platform.node()
    services: dict[str | None, list[str]] = {}
    others: dict[str, list[str]] = {machine: []}
    for state in overview.instances:
        spec = state.view.spec
        if spec.driver is Driver.SWARM:
            services.setdefault(state.node, []).append(spec.id)
        else:
            others.setdefault(_url_host(spec.url, machine), []).append(spec.id)
    nodes = () if backend.nodes is None else backend.nodes.current
    # The engine of another machine is not the one that the daemon runs on.
    own = None if backend.nodes is None or not backend.engine.url.startswith("unix:") else backend.nodes.own
    here = next((node for node in nodes if node.id == own), None)
    local = [card.gpu for card in overview.cards if card.gpu.host is None]
    seen = {gpu.uuid for gpu in local}
    more = [] if here is None else [gpu for gpu in _cards_of(here, overview) if gpu.uuid not in seen]
    yield {
        "name": machine,
        "kind": "machine",
        "state": None if here is None else _node_state(here),
        "address": None if here is None else here.address or None,
        "engine": {
            "url": backend.engine.url,
            "up": backend.link.up,
            "trouble": None if backend.link.up else backend.link.trouble or None,
        },
        "cpu": {"count": os.cpu_count()},
        "gpus": [_gpu_values(gpu) for gpu in (*local, *more)],
        "instances": others.pop(machine) + ([] if here is None else services.get(here.name, [])),
    }
    for node in nodes:
        if node is not here:
            yield {
                "name": node.name,
                "kind": "node",
                "state": _node_state(node),
                "address": node.address or None,
                "engine": None,
                "cpu": None,
                "gpus": [_gpu_values(gpu) for gpu in _cards_of(node, overview)],
                "instances": services.get(node.name, []),
            }
    for host, ids in others.items():
        yield {
            "name": host,
            "kind": "external",
            "state": None,
            "address": None,
            "engine": None,
            "cpu": None,
            "gpus": [],
            "instances": ids,
        }


def _cards_of(node: Node, overview: Overview) -> list[Gpu]:
    gpus = (card.gpu for card in overview.cards)
    return [gpu for gpu in gpus if gpu.host is not None and gpu.uuid in node.cards]


def _gpu_values(gpu: Gpu) -> dict[str, Any]:
    """Return the values of a `HostGpuBody`."""
    return {
        "uuid": gpu.uuid,
        "index": gpu.index,
        "name": gpu.name,
        "vram_total_bytes": gpu.vram_total_bytes,
        "vram_used_bytes": gpu.vram_used_bytes,
        "vram_free_bytes": gpu.vram_free_bytes,
    }


def _node_state(node: Node) -> str:
    if not node.is_up:
        return "down"
    return "ready" if node.is_active else "drained"


def _host(state: InstanceState, machine: str) -> str | None:
    """Return the host of an instance: its node, that of its URL, or the machine where it runs here."""
    spec = state.view.spec
    return state.node if spec.driver is Driver.SWARM else _url_host(spec.url, machine)


def _url_host(url: str | None, machine: str) -> str:
    host = "" if url is None else urlsplit(url).hostname or ""
    return machine if not host or is_loopback(host) else host


def _services(backend: Backend, overview: Overview) -> Iterator[dict[str, Any]]:
    machine, snapshot = platform.node(), backend.router.snapshot()
    queued = {one.id: one.queued for one in backend.passing.routing.slots.instances()}
    for state in overview.instances:
        view, candidate = state.view, snapshot.get(state.view.spec.id)
        spec = view.spec
        loaded = [] if candidate is None else _loaded(state, candidate)
        yield {
            "instance": spec.id,
            "host": _host(state, machine),
            "url": spec.url,
            "endpoint": view.endpoint,
            "driver": spec.driver,
            "protocol": spec.protocol,
            "state": State.OUT if candidate is None else candidate.state,
            "phase": view.phase,
            "health": view.health,
            "models": _models(state, candidate),
            "loaded_models": loaded,
            "loaded_model_count": len(loaded),
            "vram_used_bytes": sum(model.vram_bytes for model in view.models) if state.is_usable else None,
            "in_flight": view.in_flight,
            "queue_depth": queued.get(spec.id, 0),
        }


def _models(state: InstanceState, candidate: Candidate | None) -> list[str] | None:
    if state.view.spec.is_paid:
        return list(state.view.spec.prices)
    return None if candidate is None or candidate.models is None else sorted(candidate.models.values())


def _loaded(state: InstanceState, candidate: Candidate) -> list[str]:
    """Return the models in the memory of an instance as its server names them."""
    names = {**(candidate.models or {}), **{model.name.lower(): model.name for model in state.view.models}}
    return sorted(names.get(key, key) for key in candidate.loaded)


def _roles(backend: Backend) -> Iterator[dict[str, Any]]:
    routing, now = backend.model_settings.routing, routing_values(backend)["roles"]
    for name, role in routing.roles.items():
        here = now[name]
        yield {
            "name": name,
            "kind": role.kind,
            "model": role.model,
            "models": routing.models_of(role),
            "strategy": role.strategy,
            "policy": role.policy,
            "requested_target": here["requested_target"],
            "effective_target": here["effective_target"],
            "endpoint": here["endpoint"],
            "fallback_reason": here["fallback_reason"],
            "message": here["message"],
            "fallbacks": role.fallbacks,
            "instances": role.instances,
        }


def _health(backend: Backend, overview: Overview) -> dict[str, Any]:
    """Return the values of a `ClusterHealthBody`."""
    snapshot = backend.router.snapshot()
    pairs = [(state, snapshot.get(state.view.spec.id)) for state in overview.instances]
    degraded = [one for state, candidate in pairs if (one := _trouble(state, candidate)) is not None]
    able = sum(candidate is not None and candidate.state is not State.OUT for _, candidate in pairs)
    phases, health = dict.fromkeys(Phase, 0), dict.fromkeys(Health, 0)
    for state in overview.instances:
        phases[state.view.phase] += 1
        health[state.view.health] += 1
    return {
        "status": "down" if not able else "degraded" if degraded else "ok",
        "instances": len(pairs),
        "able": able,
        "phases": phases,
        "health": health,
        "degraded": degraded,
    }


def _trouble(state: InstanceState, candidate: Candidate | None) -> dict[str, Any] | None:
    """Return the values of a `DegradedBody`; None where an instance is as it should be."""
    view = state.view
    told = view.explanation
    if view.drained is not None:
        return None
    if candidate is not None and candidate.state is State.OUT:
        reason = candidate.why_out or Reason.INSTANCE_UNAVAILABLE
        message = candidate.detail or (told.message if told is not None else str(reason))
    elif told is not None and (view.phase is Phase.FAILED or view.health is Health.UNHEALTHY):
        reason, message = told.code, told.message
    elif view.health is Health.UNHEALTHY:
        reason, message = Reason.INSTANCE_UNHEALTHY, "the server does not answer its probes"
    elif candidate is not None and candidate.overloads is not None:
        slow = candidate.overloads.slow
        reason = Reason.OVERLOADED
        message = candidate.overloads.refuses or "; ".join(f"{key}: {why}" for key, why in slow.items())
    else:
        return None
    return {"instance": view.spec.id, "reason": reason, "message": message}
