"""The body of `POST /containers/create`, built with `docker.types`. No I/O in here.

Why `docker.types` and not a client of the SDK: docs/decisions/0015-docker-types.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from docker.types import ContainerConfig, DeviceRequest, HostConfig, LogConfig, Mount

from manager.domain.container import cards_of_device

if TYPE_CHECKING:
    from manager.domain.container import ContainerRequest

# Decides which arguments `docker.types` allows. Docker 20.10 and Podman 4.3 know it.
_API_VERSION = "1.41"
# Kept log lines are read over the API; without a bound they would fill the engine's disk.
LOG_OPTIONS = {"max-size": "10m", "max-file": "2"}


def create_body(request: ContainerRequest, *, by_cdi: bool = False) -> dict[str, Any]:
    """Return the body that asks for exactly this container.

    Args:
        request: what the container is.
        by_cdi: ask for the cards by the Container Device Interface, as Podman wants it.
    """
    bindings: dict[int | str, Any] = {f"{request.port}/tcp": ("127.0.0.1", request.loopback_port)}
    host = HostConfig(
        _API_VERSION,
        network_mode=request.network,
        mounts=[
            Mount(
                mount.target,
                mount.source,
                type="bind" if mount.bind else "volume",
                read_only=mount.read_only,
            )
            for mount in request.mounts
        ],
        tmpfs=request.tmpfs,
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        restart_policy={"Name": "no"},
        log_config=LogConfig(type=LogConfig.types.JSON, config=LOG_OPTIONS),
        pids_limit=request.pids,
        mem_limit=request.memory_bytes,
        memswap_limit=request.memory_bytes,
        shm_size=request.shm_bytes,
        runtime=request.runtime,
        port_bindings=bindings if request.loopback_port else None,
        device_requests=_device_requests(request.gpu, by_cdi=by_cdi),
    )
    return ContainerConfig(
        _API_VERSION,
        request.image,
        None,  # type: ignore[arg-type]  # the image's own command
        environment=request.env,
        labels=request.labels,
        ports=[(request.port, "tcp")] if request.loopback_port else None,
        host_config=host,
    )


def _device_requests(gpu: str | None, *, by_cdi: bool) -> list[DeviceRequest] | None:
    """By id alone: a count means the first so many cards."""
    if gpu is None:
        return None
    cards = cards_of_device(gpu)
    driver, ids = ("cdi", [f"nvidia.com/gpu={uuid}" for uuid in cards]) if by_cdi else ("nvidia", [*cards])
    return [DeviceRequest(driver=driver, device_ids=ids, capabilities=[["gpu"]])]
