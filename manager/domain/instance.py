"""An instance: its configured side (`InstanceSpec`) and the words for its actual side."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from manager.domain.roles import USUAL_KINDS
from manager.domain.target import Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from pathlib import Path

    from manager.domain.money import Price
    from manager.domain.paid import Offer
    from manager.domain.roles import RequestKind
    from manager.domain.template import Template
    from manager.errors import Reason


class Driver(StrEnum):
    DOCKER = "docker"
    EXTERNAL = "external"
    CLOUD = "cloud"
    SWARM = "swarm"

    @property
    def has_container(self) -> bool:
        """Return whether the daemon starts and stops its server from a template."""
        return self in (Driver.DOCKER, Driver.SWARM)


# For programs that read the API.
MANAGED_DRIVERS = frozenset(driver.value for driver in Driver if driver.has_container)


class DeviceKind(StrEnum):
    CPU = "cpu"
    GPU = "gpu"


class Target(StrEnum):
    """The wanted state. A request sets it; reconciliation moves the phase towards it."""

    RUNNING = "running"
    STOPPED = "stopped"


class Phase(StrEnum):
    """The actual state. Moves only along the table in `domain.lifecycle`."""

    UNAVAILABLE = "unavailable"
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


class Health(StrEnum):
    """The result of the last probe; separate from the phase."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Explanation:
    """The reason why an instance is not as one would wish, for people and programs."""

    code: Reason
    message: str
    log_tail: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits of one instance; seconds throughout. `ttl_s` 0 means never idle-stopped."""

    ttl_s: float
    start_timeout_s: float
    stop_timeout_s: float
    drain_timeout_s: float
    probe_interval_s: float
    resync_interval_s: float
    vram_wait_s: float


@dataclass(frozen=True, slots=True)
class KeySource:
    """The place of the key for a server: an environment variable, or a file. Never the key itself."""

    env: str | None = None
    file: Path | None = None

    def __str__(self) -> str:
        return self.env or str(self.file)


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One configured instance with every default resolved.

    `device` is what the operator wrote for a GPU instance (`auto`, a UUID or a PCI bus id) and None for
    the CPU. `devices` are the cards of an instance over several, (`all`,) for every card; `device` is None
    then. `device_kind` is None only for an external instance whose device was not declared. `serves` are
    the kinds of requests that it is there for. `slots` bounds its requests in flight, None is no limit.
    `deny_models` are patterns of models that it must not run, `max_parameters` bounds their size.

    `protocol` is the API of its server, and `key` the place of the key for it. `prices` and `offers` are
    those of a paid server: its models by name, and what each stands in for. `model_names` are the models of
    an external server that cannot list them; None: it is asked. `placement` are the constraints of Docker
    Swarm on the node of a service, in its own notation.
    """

    id: str
    driver: Driver
    device_kind: DeviceKind | None
    limits: Limits
    template: Template | None = None
    template_name: str | None = None
    device: str | None = None
    url: str | None = None
    pinned: bool = False
    priority: int = 0
    prewarm: bool = False
    serves: frozenset[RequestKind] = USUAL_KINDS
    devices: tuple[str, ...] = ()
    slots: int | None = None
    deny_models: tuple[str, ...] = ()
    max_parameters: int | None = None
    protocol: Protocol = Protocol.OLLAMA
    key: KeySource | None = None
    prices: Mapping[str, Price] = field(default_factory=dict, hash=False)
    offers: tuple[Offer, ...] = ()
    model_names: tuple[str, ...] | None = None
    placement: tuple[str, ...] = ()

    @property
    def is_paid(self) -> bool:
        """Return whether each request to its server costs money."""
        return self.driver is Driver.CLOUD


@dataclass(frozen=True, slots=True)
class Model:
    """A model that an instance holds in memory, as `/api/ps` tells it; `entry` is all that it says."""

    name: str
    digest: str
    size_bytes: int
    vram_bytes: int
    expires_at: datetime | None
    entry: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


# `parked` is a Swarm service with no replicas, whose last task has ended: somebody has scaled it to zero.
ContainerStatus: TypeAlias = Literal["created", "running", "paused", "exited", "parked"]


# A paused container's process is there and holds what it holds, even though it cannot answer.
ALIVE: tuple[ContainerStatus, ...] = ("running", "paused")


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    """One container, or one service of Docker Swarm, as the engine last described it.

    `status` is the engine's word mapped onto five: what it means for us, not how the engine spells it.
    `address` is the container's address on its first network, None while it has none. `networks` are the
    names of its networks, None where they are not known. `reason` is the reason of its end where the engine
    tells one, and `error` the words for it. `node` is the name of the host that a service runs on.
    """

    id: str
    name: str
    image: str
    status: ContainerStatus
    labels: dict[str, str] = field(default_factory=dict)
    address: str | None = None
    exit_code: int | None = None
    out_of_memory: bool = False
    error: str = ""
    pid: int | None = None
    started_at: datetime | None = None
    networks: tuple[str, ...] | None = None
    reason: Reason | None = None
    node: str | None = None

    @property
    def is_detached(self) -> bool:
        """Whether the container was disconnected from all of its networks: nobody can reach it."""
        return self.networks == ()
