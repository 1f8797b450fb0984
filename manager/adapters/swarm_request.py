"""The specification of a service of Docker Swarm. No I/O in here.

Services have no fields for a runtime, a bound of swap memory, and security options beside those below; see
docs/swarm.md for what follows from that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from docker.types import LogConfig

from manager.adapters.docker_request import LOG_OPTIONS

if TYPE_CHECKING:
    from manager.domain.container import ContainerRequest

_TMPFS_BYTES = 2**30
_TMPFS_MODE = 0o1777
_SHM = "/dev/shm"  # noqa: S108
_NANOSECONDS = 1_000_000_000


def service_spec(
    request: ContainerRequest, *, replicas: int, node_id: str | None, stop_timeout_s: float
) -> dict[str, Any]:
    """Return the specification of the service that runs exactly this container.

    Swarm starts nothing again by itself (`RestartPolicy`): the manager does, with a back-off, as on one host.
    Cards are named and not reserved: Swarm ends tasks with reserved generic resources at each change of their
    node. Why: docs/decisions/0031-swarm.md.

    Args:
        request: what the container is.
        replicas: 0 or 1.
        node_id: the node that has the cards, None where Swarm chooses within the placement.
        stop_timeout_s: how long the container has to end after the first signal.
    """
    tmpfs = [(path, _TMPFS_BYTES) for path in request.tmpfs]
    if request.shm_bytes is not None:
        tmpfs.append((_SHM, request.shm_bytes))
    mounts: list[dict[str, Any]] = [
        {"Type": "volume", "Source": one.source, "Target": one.target, "ReadOnly": one.read_only}
        for one in request.mounts
    ]
    mounts += [
        {"Type": "tmpfs", "Target": path, "TmpfsOptions": {"SizeBytes": size, "Mode": _TMPFS_MODE}}
        for path, size in tmpfs
    ]
    container = {
        "Image": request.image,
        "Env": [f"{name}={value}" for name, value in request.env.items()],
        "Mounts": mounts,
        "ReadOnly": True,
        "CapabilityDrop": ["ALL"],
        "Privileges": {"NoNewPrivileges": True},
        "StopGracePeriod": int(max(1.0, stop_timeout_s) * _NANOSECONDS),
    }
    limits = {"MemoryBytes": request.memory_bytes, "Pids": request.pids}
    constraints = [*request.placement, *([] if node_id is None else [f"node.id=={node_id}"])]
    endpoint: dict[str, Any] = {"Mode": "dnsrr"}
    if request.host_port is not None:
        endpoint["Ports"] = [
            {
                "Protocol": "tcp",
                "TargetPort": request.port,
                "PublishedPort": request.host_port,
                "PublishMode": "host",
            }
        ]
    return {
        "Name": request.name,
        "Labels": request.labels,
        "TaskTemplate": {
            "ContainerSpec": container,
            "Resources": {"Limits": {name: size for name, size in limits.items() if size is not None}},
            "RestartPolicy": {"Condition": "none"},
            "Placement": {"Constraints": constraints},
            "Networks": [{"Target": request.network}] if request.host_port is None else [],
            "LogDriver": {"Name": str(LogConfig.types.JSON), "Options": LOG_OPTIONS},
        },
        "Mode": {"Replicated": {"Replicas": replicas}},
        "EndpointSpec": endpoint,
    }


def with_replicas(spec: dict[str, Any], replicas: int) -> dict[str, Any]:
    """Return a specification with another number of replicas, and all else as it is.

    One that is to run gets a new task in any case: where the last one has ended without a restart, Swarm
    takes the slot for filled until the specification of its task changes (swarmkit `UpdatableTasksInSlot`).
    """
    task = spec["TaskTemplate"]
    if replicas:
        task = task | {"ForceUpdate": int(task.get("ForceUpdate") or 0) + 1}
    return spec | {"TaskTemplate": task, "Mode": {"Replicated": {"Replicas": replicas}}}
