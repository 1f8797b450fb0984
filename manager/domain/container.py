"""From an instance to the exact container the engine is asked for; nothing else can be asked for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from manager.domain.instance import ContainerFacts, DeviceKind
from manager.domain.ownership import LABEL_OWNER, Owner
from manager.domain.template import CPU_ONLY_ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manager.domain.template import Template, Volume

LABEL = "ollama-manager"
LABEL_MANAGER = f"{LABEL}.manager"
LABEL_INSTANCE = f"{LABEL}.instance"
LABEL_HASH = f"{LABEL}.template-hash"
LABEL_DEVICE = f"{LABEL}.device"
LABEL_PORT = f"{LABEL}.port"
LABEL_LOOPBACK_PORT = f"{LABEL}.loopback-port"
# On containers that are never started and only make a volume readable. They have no other label of ours: no
# listing of instances has them.
LABEL_READER = f"{LABEL}.reader"

_OLLAMA_HOME = "/root/.ollama"
_TMPFS = "rw,nosuid,nodev,size=1g,mode=1777"


class Reach(StrEnum):
    """The way from the daemon to a container's HTTP port."""

    ADDRESS = "address"
    NAME = "name"
    LOOPBACK = "loopback"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class Mount:
    source: str
    target: str
    read_only: bool
    bind: bool


@dataclass(frozen=True, slots=True)
class ContainerRequest:
    """Everything a container is created with. Sizes in bytes.

    `gpu` is the UUID of the one card it may see, or those of several, see `device_text`; None for a CPU-only
    container, whose `runtime` is then forced to plain `runc`. `loopback_port` publishes the port on
    127.0.0.1 only. `host_port` publishes it on the node of a Swarm service, and `placement` constrains that
    node; both are for services only.
    """

    name: str
    image: str
    env: dict[str, str]
    labels: dict[str, str]
    mounts: tuple[Mount, ...]
    tmpfs: dict[str, str]
    network: str
    port: int
    loopback_port: int | None
    gpu: str | None
    runtime: str | None
    memory_bytes: int | None
    pids: int | None
    shm_bytes: int | None
    host_port: int | None = None
    placement: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServicePlace:
    """The place of a service of Docker Swarm: its network, its port on the node, and the choice of the node.

    `host_port` None publishes no port: the service is reached on the network.
    """

    network: str
    host_port: int | None
    placement: tuple[str, ...]


def device_text(uuids: Iterable[str]) -> str | None:
    """Return the cards of a container in one text, as its label and NVIDIA_VISIBLE_DEVICES have them.

    Their order is that of the UUIDs: the same cards in another order are no other container.
    """
    return ",".join(sorted(uuids)) or None


def cards_of_device(text: str) -> tuple[str, ...]:
    """Return the UUIDs in such a text; none where it is that of a container for the CPU."""
    return () if text in ("", DeviceKind.CPU.value) else tuple(text.split(","))


def container_name(manager_id: str, instance_id: str) -> str:
    return f"{manager_id}-ollama-{instance_id}"


def container_request(
    template: Template,
    *,
    manager_id: str,
    instance_id: str,
    gpu: str | None,
    loopback_port: int | None,
    owner: Owner | None = None,
    service: ServicePlace | None = None,
) -> ContainerRequest:
    """The container of an instance; its template hash covers every setting, so any change shows.

    Args:
        template: of the instance.
        manager_id: of this manager.
        instance_id: of the instance.
        gpu: the cards, see `device_text`; None for the CPU.
        loopback_port: see `ContainerRequest`.
        owner: of the state directory.
        service: the place of a service of Docker Swarm; None: it is a container of one engine.
    """
    if (template.device is DeviceKind.GPU) != (gpu is not None):
        raise ValueError(f"template for {template.device.value} with gpu={gpu!r}")
    binding = CPU_ONLY_ENVIRONMENT if gpu is None else {"NVIDIA_VISIBLE_DEVICES": gpu}
    targets = {volume.target for volume in template.volumes}
    tmpfs = {path: _TMPFS for path in ("/tmp", _OLLAMA_HOME) if path not in targets}  # noqa: S108
    request = ContainerRequest(
        name=container_name(manager_id, instance_id),
        image=template.image,
        env=dict(sorted((template.env | binding).items())),
        labels={},
        mounts=tuple(
            Mount(source=v.source, target=v.target, read_only=v.read_only, bind=v.is_bind)
            for v in template.volumes
        ),
        tmpfs=tmpfs,
        network=template.network if service is None else service.network,
        port=template.port,
        loopback_port=loopback_port,
        gpu=gpu,
        # Services have no field for a runtime.
        runtime="runc" if gpu is None and service is None else None,
        memory_bytes=template.limits.memory,
        pids=template.limits.pids,
        shm_bytes=template.limits.shm,
        host_port=None if service is None else service.host_port,
        placement=() if service is None else service.placement,
    )
    covered = asdict(request)
    if service is None:
        # The hash of a container is that of earlier versions, which did not have these.
        del covered["host_port"], covered["placement"]
    settings = json.dumps(covered, sort_keys=True).encode()
    labels = {
        LABEL_MANAGER: manager_id,
        LABEL_INSTANCE: instance_id,
        LABEL_HASH: hashlib.sha256(settings).hexdigest()[:16],
        LABEL_DEVICE: gpu or DeviceKind.CPU.value,
        LABEL_PORT: str(request.host_port or request.port),
    }
    if loopback_port is not None:
        labels[LABEL_LOOPBACK_PORT] = str(loopback_port)
    if owner is not None:
        labels[LABEL_OWNER] = owner.id
    return replace(request, labels=labels)


def reader_request(template: Template, mount: Volume, *, manager_id: str, name: str) -> ContainerRequest:
    """Return the container through which the engine reads a volume: one mount, no network, never started.

    Args:
        template: of an instance on the volume.
        mount: where it has the volume.
        manager_id: of this manager, which removes the container.
        name: of the container.
    """
    return ContainerRequest(
        name=name,
        image=template.image,
        env={},
        labels={LABEL_READER: manager_id},
        mounts=(Mount(source=mount.source, target=mount.target, read_only=True, bind=mount.is_bind),),
        tmpfs={},
        network="none",
        port=template.port,
        loopback_port=None,
        gpu=None,
        runtime=None,
        memory_bytes=None,
        pids=None,
        shm_bytes=None,
    )


def is_ours(facts: ContainerFacts, *, manager_id: str, instance_id: str, owner: Owner | None = None) -> bool:
    """A name proves nothing; only the labels make a container ours."""
    labels = facts.labels
    if owner is not None and not owner.owns(facts):
        return False
    return labels.get(LABEL_MANAGER) == manager_id and labels.get(LABEL_INSTANCE) == instance_id


def choose_reach(wanted: str, *, in_container: bool, direct: bool, elsewhere: bool) -> Reach | None:
    """Return the way to containers; None when only a person who knows the network could tell.

    Args:
        wanted: the template's `auto`, `network` or `loopback`.
        in_container: the daemon itself runs in a container, so names on a shared network resolve.
        direct: container addresses are reachable from here: a local engine that shares our network stack.
        elsewhere: the engine is on another machine, whose loopback nobody reaches from here.
    """
    if wanted == "loopback":
        return Reach.LOOPBACK
    if in_container:
        return Reach.NAME
    if direct or wanted == "network":
        return Reach.ADDRESS
    return None if elsewhere else Reach.LOOPBACK


def endpoint_of(container: ContainerFacts, wanted: ContainerRequest, *, by_name: bool) -> str | None:
    """The address of a container of ours; None while it has none.

    What it was made with counts, and not what its template says by now (`wanted`); a container without
    those labels was made by somebody else in our name.
    """
    made_by_us = LABEL_PORT in container.labels
    loopback = container.labels.get(LABEL_LOOPBACK_PORT) if made_by_us else wanted.loopback_port
    if loopback is not None:
        return f"http://127.0.0.1:{loopback}"
    host = container.name if by_name else container.address
    return f"http://{host}:{container.labels.get(LABEL_PORT, wanted.port)}" if host else None
