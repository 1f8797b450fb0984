"""What a Docker Engine is asked to create, as the JSON of its API. No I/O in here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manager.domain.container import ContainerRequest

# Kept log lines are read over the API; without a bound they would fill the engine's disk.
_LOG_CONFIG = {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "2"}}


def create_body(request: ContainerRequest) -> dict[str, Any]:
    """The body of `POST /containers/create`; nothing in it but the request and what always holds."""
    port = f"{request.port}/tcp"
    host: dict[str, Any] = {
        "NetworkMode": request.network,
        "Mounts": [
            {
                "Target": mount.target,
                "Source": mount.source,
                "Type": "bind" if mount.bind else "volume",
                "ReadOnly": mount.read_only,
            }
            for mount in request.mounts
        ],
        "Tmpfs": request.tmpfs,
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "RestartPolicy": {"Name": "no"},
        "LogConfig": _LOG_CONFIG,
        "PidsLimit": request.pids,
        "Memory": request.memory_bytes,
        "MemorySwap": request.memory_bytes,
        "ShmSize": request.shm_bytes,
        "Runtime": request.runtime,
    }
    body: dict[str, Any] = {
        "Image": request.image,
        "Env": [f"{name}={value}" for name, value in request.env.items()],
        "Labels": request.labels,
        "HostConfig": host,
    }
    if request.loopback_port:
        body["ExposedPorts"] = {port: {}}
        host["PortBindings"] = {port: [{"HostIp": "127.0.0.1", "HostPort": str(request.loopback_port)}]}
    if request.gpu:
        # By id alone: a count means the first so many cards.
        host["DeviceRequests"] = [{"Driver": "nvidia", "DeviceIDs": [request.gpu], "Capabilities": [["gpu"]]}]
    return body
