"""Docker Engine through the `docker` SDK; the only file that imports it.

Each call runs in a short-lived thread with a client of its own (the SDK's clients are not thread-safe) and
has a total deadline: the SDK's own time-out is per read. The threads are daemons on purpose: a hung engine
must not keep the program from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound, InvalidVersion, NotFound
from docker.types import DeviceRequest, LogConfig, Mount
from docker.utils import parse_repository_tag

from manager.domain.container import LABEL_INSTANCE, LABEL_MANAGER
from manager.domain.instance import ContainerFacts, ContainerStatus
from manager.errors import (
    ContainerGoneError,
    EngineError,
    EngineUnreachableError,
    NetworkMissingError,
    Reason,
)
from manager.services.ports import ContainerCounters, EngineEvent, EngineInfo, PullProgress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from manager.domain.container import ContainerRequest

T = TypeVar("T")

# Kept log lines are read over the API; without a bound they would fill the engine's disk.
_LOG_CONFIG = LogConfig(type=LogConfig.types.JSON, config={"max-size": "10m", "max-file": "2"})


class DockerEngine:
    """Implements `services.ports.Engine`. Raises `EngineError` and its kin only.

    Args:
        url: `unix:///…`, `tcp://host:port` or `http://host:port`.
        timeout_s: the deadline of every call that names none of its own.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._idle: list[docker.APIClient] = []
        self._api_version: str | None = None

    def close(self) -> None:
        """Drop the idle connections; calls that are under way end by themselves."""
        while self._idle:
            self._idle.pop().close()

    async def ping(self, timeout_s: float) -> None:
        await self._call(lambda client: client.ping(), timeout_s)

    async def info(self) -> EngineInfo:
        info = await self._call(lambda client: client.info())
        security = " ".join(info.get("SecurityOptions") or ())
        return EngineInfo(
            version=str(info.get("ServerVersion", "")),
            desktop="Docker Desktop" in str(info.get("OperatingSystem", "")),
            rootless="name=rootless" in security,
            runtimes=tuple(info.get("Runtimes") or ()),
        )

    async def list_containers(self, manager_id: str) -> tuple[ContainerFacts, ...]:
        filters = {"label": f"{LABEL_MANAGER}={manager_id}"}
        found = await self._call(lambda client: client.containers(all=True, filters=filters))
        return tuple(_listed(entry) for entry in found)

    async def inspect(self, container: str) -> ContainerFacts | None:
        try:
            return _inspected(await self._call(lambda client: client.inspect_container(container)))
        except ContainerGoneError:
            return None

    async def create(self, request: ContainerRequest) -> str:
        created = await self._call(lambda client: _create(client, request))
        return str(created["Id"])

    async def start(self, container_id: str) -> None:
        await self._call(lambda client: client.start(container_id))

    async def signal(self, container_id: str, name: str) -> None:
        try:
            await self._call(lambda client: client.kill(container_id, signal=name))
        except ContainerGoneError:
            pass
        except EngineError as error:
            if "is not running" not in error.message:
                raise

    async def remove(self, container_id: str) -> None:
        try:
            await self._call(lambda client: client.remove_container(container_id, force=True, v=True))
        except ContainerGoneError:
            pass
        except EngineError as error:
            if "is already in progress" not in error.message:
                raise

    async def logs(self, container_id: str, tail: int) -> tuple[str, ...]:
        raw: bytes = await self._call(
            lambda client: client.logs(container_id, stdout=True, stderr=True, tail=tail)
        )
        return tuple(raw.decode("utf-8", "replace").splitlines())

    async def counters(self, container_id: str) -> ContainerCounters:
        def read(client: docker.APIClient) -> dict[str, Any]:
            try:
                stats: dict[str, Any] = client.stats(container_id, stream=False, one_shot=True)
            except InvalidVersion:  # before API 1.41 the engine takes two readings, a second apart
                stats = client.stats(container_id, stream=False)
            return stats

        stats = await self._call(read)
        networks = (stats.get("networks") or {}).values()
        cpu_ns = ((stats.get("cpu_stats") or {}).get("cpu_usage") or {}).get("total_usage") or 0
        return ContainerCounters(
            network_bytes=sum(n.get("rx_bytes", 0) + n.get("tx_bytes", 0) for n in networks),
            cpu_s=cpu_ns / 1e9,
        )

    async def has_network(self, name: str) -> bool:
        return await self._call(lambda client: _has_network(client, name))

    async def ensure_network(self, name: str) -> None:
        """Create the bridge network `name` unless there is one; never a second of that name."""

        def ensure(client: docker.APIClient) -> None:
            if _has_network(client, name):
                return
            try:
                client.create_network(name, driver="bridge", check_duplicate=True)
            except APIError as error:
                if error.status_code != requests.codes.conflict:
                    raise

        await self._call(ensure)

    async def has_image(self, image: str) -> bool:
        try:
            await self._call(lambda client: client.inspect_image(image))  # type: ignore[no-untyped-call]
        except EngineError as error:
            if error.reason is Reason.IMAGE_MISSING:
                return False
            raise
        return True

    async def events(self, manager_id: str) -> AsyncIterator[EngineEvent]:
        filters = {"type": "container", "label": f"{LABEL_MANAGER}={manager_id}"}
        stream = _Stream(
            lambda: self._connect(timeout_s=None),
            lambda client: client.events(decode=True, filters=filters),
            "events",
        )
        async for entry in stream.items():
            if (event := _event(entry)) is not None:
                yield event

    async def pull(self, image: str) -> AsyncIterator[PullProgress]:
        repository, tag = parse_repository_tag(image)
        stream = _Stream(
            lambda: self._connect(timeout_s=None),
            lambda client: client.pull(repository, tag=tag or "latest", stream=True, decode=True),
            "pull",
        )
        async for entry in _naming(image, stream.items()):
            if "error" in entry:
                raise _not_pulled(image, str(entry["error"]))
            detail = entry.get("progressDetail") or {}
            yield PullProgress(
                status=str(entry.get("status", "")),
                layer=entry.get("id"),
                current_bytes=detail.get("current"),
                total_bytes=detail.get("total"),
            )

    async def _call(self, function: Callable[[docker.APIClient], T], timeout_s: float | None = None) -> T:
        deadline_s = timeout_s or self._timeout_s
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                client = self._take(deadline_s)
                try:
                    result = function(client)
                except (ImageNotFound, NotFound, APIError):
                    self._idle.append(client)  # a refusal is an answer: the connection is sound
                    raise
                except BaseException:
                    client.close()
                    raise
                self._idle.append(client)
            except BaseException as error:  # noqa: BLE001  (whatever it is goes to whoever waits)
                _post(loop, answer, error=error)
            else:
                _post(loop, answer, result=result)

        threading.Thread(target=work, name="docker-call", daemon=True).start()
        try:
            # `wait` and not `wait_for`: the thread cannot be cancelled, and its late answer is nobody's.
            done, _ = await asyncio.wait({answer}, timeout=deadline_s)
            if done:
                return answer.result()
        except Exception as error:
            raise self._translated(error) from error
        raise EngineUnreachableError(
            f"the container engine at {self.url} did not answer within {deadline_s:g} s"
        )

    def _take(self, timeout_s: float) -> docker.APIClient:
        try:
            client = self._idle.pop()  # list.pop and list.append are atomic
        except IndexError:
            client = self._connect(timeout_s)
        client.timeout = timeout_s  # type: ignore[assignment]  # the stubs know whole seconds only
        return client

    def _connect(self, timeout_s: float | None) -> docker.APIClient:
        # Negotiated once: it costs a request, and each connection would ask again.
        client = docker.APIClient(
            base_url=self.url,
            version=self._api_version or "auto",
            timeout=timeout_s,  # type: ignore[arg-type]  # None is "no time-out", for streams
        )
        self._api_version = client.api_version
        return client

    def _translated(self, error: Exception) -> EngineError:
        if isinstance(error, APIError):
            return _refusal(error)
        self._api_version = None  # another engine may answer next time
        if isinstance(error, requests.Timeout):
            return EngineUnreachableError(f"the container engine at {self.url} does not answer")
        if isinstance(error, requests.RequestException | DockerException | OSError):
            return EngineUnreachableError(
                f"the container engine at {self.url} cannot be reached ({_innermost(error)})"
            )
        return EngineError(
            f"unexpected answer of the container engine: {error!r}", reason=Reason.START_FAILED
        )


class _Stream:
    """Items of a blocking iterator of the SDK, read in a thread, closed when the reader leaves."""

    def __init__(
        self,
        connect: Callable[[], docker.APIClient],
        begin: Callable[[docker.APIClient], Any],
        name: str,
    ) -> None:
        self._connect = connect
        self._begin = begin
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        self._closed = threading.Event()
        self._source: Any = None

    async def items(self) -> AsyncIterator[dict[str, Any]]:
        threading.Thread(target=self._read, name=f"docker-{self._name}", daemon=True).start()
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, APIError):
                    raise _refusal(item) from item
                if isinstance(item, Exception):
                    raise EngineUnreachableError(
                        f"the engine's {self._name} stream failed ({_innermost(item)})"
                    ) from item
                yield item
        finally:
            self._closed.set()
            # Shutting the socket down is what wakes the reading thread. A generator has no socket to close.
            close = getattr(self._source, "close", None)
            if close is not None and not isinstance(self._source, _Generator):
                with contextlib.suppress(Exception):
                    close()

    def _read(self) -> None:
        end: Exception | None = None
        try:
            client = self._connect()
            try:
                self._source = self._begin(client)
                for item in self._source:
                    if self._closed.is_set():
                        break
                    self._post(item)
            finally:
                client.close()
        except Exception as error:  # noqa: BLE001  (goes to whoever reads the items)
            end = error
        self._post(end)

    def _post(self, item: dict[str, Any] | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


_Generator = type(_ for _ in ())


def _post(
    loop: asyncio.AbstractEventLoop,
    answer: asyncio.Future[T],
    *,
    result: T | None = None,
    error: BaseException | None = None,
) -> None:
    def settle() -> None:
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
            answer.exception()  # read here, so that an answer nobody waits for is not reported as lost
        else:
            answer.set_result(result)  # type: ignore[arg-type]

    with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
        loop.call_soon_threadsafe(settle)


async def _naming(image: str, items: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """The lines of a pull; a refusal says which image it is about."""
    try:
        async for item in items:
            yield item
    except EngineUnreachableError:
        raise
    except EngineError as error:
        raise _not_pulled(image, error.message) from error


def _not_pulled(image: str, said: str) -> EngineError:
    remedy = "check its name and whether the engine can reach the registry"
    return EngineError(f"{image} could not be pulled: {said}; {remedy}", reason=Reason.IMAGE_MISSING)


def _has_network(client: docker.APIClient, name: str) -> bool:
    # The engine's name filter matches parts of names.
    return any(network["Name"] == name for network in client.networks(names=[name]))


def _create(client: docker.APIClient, request: ContainerRequest) -> dict[str, Any]:
    port = f"{request.port}/tcp"
    bindings: dict[int | str, Any] | None = (
        {port: ("127.0.0.1", request.loopback_port)} if request.loopback_port else None
    )
    devices = (
        [DeviceRequest(driver="nvidia", device_ids=[request.gpu], capabilities=[["gpu"]])]
        if request.gpu
        else None
    )
    host = client.create_host_config(
        network_mode=request.network,
        port_bindings=bindings,
        mounts=[
            Mount(
                target=mount.target,
                source=mount.source,
                type="bind" if mount.bind else "volume",
                read_only=mount.read_only,
            )
            for mount in request.mounts
        ],
        tmpfs=request.tmpfs,
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        pids_limit=request.pids,
        mem_limit=request.memory_bytes,
        memswap_limit=request.memory_bytes,
        shm_size=request.shm_bytes,
        device_requests=devices,
        runtime=request.runtime,
        restart_policy={"Name": "no"},
        log_config=_LOG_CONFIG,
    )
    created: dict[str, Any] = client.create_container(
        image=request.image,
        name=request.name,
        environment=request.env,
        labels=request.labels,
        ports=[request.port] if bindings else None,
        host_config=host,
        use_config_proxy=False,
    )
    return created


# The engine's words for a container's state -> what it means for us. `restarting` cannot last, because our
# containers have no restart policy; a state we do not know is treated as ended, which is looked into.
_STATUS: dict[str, ContainerStatus] = {
    "created": "created",
    "running": "running",
    "paused": "paused",
    "restarting": "exited",
    "removing": "exited",
    "exited": "exited",
    "dead": "exited",
}


def _listed(entry: dict[str, Any]) -> ContainerFacts:
    names = entry.get("Names") or ["/"]
    networks = (entry.get("NetworkSettings") or {}).get("Networks") or {}
    return ContainerFacts(
        id=entry["Id"],
        name=names[0].lstrip("/"),
        image=str(entry.get("Image", "")),
        status=_STATUS.get(str(entry.get("State", "")).lower(), "exited"),
        labels=dict(entry.get("Labels") or {}),
        address=_address(networks),
        exit_code=_exit_code(str(entry.get("Status", ""))),
    )


def _inspected(entry: dict[str, Any]) -> ContainerFacts:
    state = entry.get("State") or {}
    config = entry.get("Config") or {}
    networks = (entry.get("NetworkSettings") or {}).get("Networks") or {}
    status = _STATUS.get(str(state.get("Status", "")).lower(), "exited")
    return ContainerFacts(
        id=entry["Id"],
        name=str(entry.get("Name", "")).lstrip("/"),
        image=str(config.get("Image", "")),
        status=status,
        labels=dict(config.get("Labels") or {}),
        address=_address(networks),
        exit_code=state.get("ExitCode") if status == "exited" else None,
        out_of_memory=bool(state.get("OOMKilled")),
        error=str(state.get("Error") or ""),
        pid=state.get("Pid") or None,
        started_at=_time(state.get("StartedAt")),
    )


def _address(networks: dict[str, Any]) -> str | None:
    return next((str(n["IPAddress"]) for n in networks.values() if n.get("IPAddress")), None)


_EXITED = re.compile(r"Exited \((\d+)\)")


def _exit_code(status: str) -> int | None:
    match = _EXITED.match(status)
    return int(match[1]) if match else None


def _time(text: str | None) -> datetime | None:
    """The engine's RFC 3339 time; it writes year 1 for "never"."""
    if not text or text.startswith("0001-"):
        return None
    seconds, _, rest = text.partition(".")
    fraction = re.match(r"\d*", rest)
    micros = (fraction[0] if fraction else "")[:6].ljust(6, "0")
    return datetime.fromisoformat(f"{seconds.removesuffix('Z')}.{micros}").replace(tzinfo=UTC)


def _event(entry: dict[str, Any]) -> EngineEvent | None:
    actor = entry.get("Actor") or {}
    attributes = actor.get("Attributes") or {}
    instance = attributes.get(LABEL_INSTANCE)
    if instance is None or entry.get("Type") != "container":
        return None
    exit_code = str(attributes.get("exitCode", ""))
    return EngineEvent(
        action=str(entry.get("Action", "")),
        container_id=str(actor.get("ID", "")),
        instance=instance,
        exit_code=int(exit_code) if exit_code.isdigit() else None,
    )


# What an engine says, in the order in which it is looked for -> the reason and what to do about it. The
# wording was read in moby and in the NVIDIA container toolkit; none of it has an error code of its own.
_REFUSALS: tuple[tuple[str, Reason, str], ...] = (
    ("no such image", Reason.IMAGE_MISSING, "pull it with `ollama-manager pull`"),
    ("manifest unknown", Reason.IMAGE_MISSING, "check the image's name and tag"),
    ("pull access denied", Reason.IMAGE_MISSING, "check the image's name and tag"),
    ("is already in use by container", Reason.NAME_CONFLICT, "remove or rename that container"),
    ("port is already allocated", Reason.PORT_TAKEN, "another container holds the port"),
    ("address already in use", Reason.PORT_TAKEN, "another program holds the port"),
    ("ports are not available", Reason.PORT_TAKEN, "another program holds the port"),
    ("could not select device driver", Reason.GPU_MISSING, "install the NVIDIA container toolkit"),
    ("unknown device", Reason.GPU_MISSING, "the card is not there; check `nvidia-smi -L`"),
    ("nvidia-container-cli", Reason.GPU_MISSING, "check the NVIDIA driver with `nvidia-smi`"),
    ("unresolvable cdi devices", Reason.GPU_MISSING, "check the CDI specification of the NVIDIA driver"),
    ("no space left on device", Reason.START_FAILED, "free some disk space for the engine"),
)


def _refusal(error: APIError) -> EngineError:
    said = str(error.explanation or error).strip()
    lowered = said.lower()
    for words, reason, remedy in _REFUSALS:
        if words in lowered:
            return EngineError(f"{said}: {remedy}", reason=reason)
    if error.status_code == requests.codes.not_found:
        if "network" in lowered:
            return NetworkMissingError(said)
        if "no such container" in lowered:
            return ContainerGoneError(said)
    return EngineError(said or "the engine refused without a word", reason=Reason.START_FAILED)


def _innermost(error: BaseException) -> str:
    """The cause people can act on: the SDK wraps a refused connection five times."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    plain = next((e for e in reversed(seen) if isinstance(e, OSError) and e.strerror), seen[-1])
    return str(getattr(plain, "strerror", None) or plain)
