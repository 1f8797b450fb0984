"""Docker Engine through the `docker` SDK; the only file that imports it.

Each call runs in a short-lived thread with a client of its own (the SDK's clients are not thread-safe) and
has a total deadline: the SDK's own time-out is per read. The threads are daemons on purpose: a hung engine
must not keep the program from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import docker
import requests
from docker.errors import APIError, DockerException, ImageNotFound, InvalidVersion, NotFound
from docker.types import DeviceRequest, LogConfig, Mount
from docker.utils import parse_repository_tag

from manager.adapters import docker_answers as answers
from manager.adapters.http_get import HttpGet, plainly
from manager.domain.container import LABEL_MANAGER
from manager.errors import ContainerGoneError, EngineError, EngineUnreachableError, Reason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from manager.domain.container import ContainerRequest
    from manager.domain.instance import ContainerFacts
    from manager.services.ports import ContainerCounters, EngineEvent, EngineInfo, PullProgress

T = TypeVar("T")

_MOST_PING_BYTES = 2**20
# Kept log lines are read over the API; without a bound they would fill the engine's disk.
_LOG_CONFIG = LogConfig(type=LogConfig.types.JSON, config={"max-size": "10m", "max-file": "2"})


class DockerEngine:
    """Implements `services.ports.Engine`. Raises `EngineError` and its kin only.

    Args:
        url: `unix:///…`, `tcp://host:port`, `http://host:port` or `https://host:port`.
        timeout_s: the deadline of every call that names none of its own.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._idle: list[docker.APIClient] = []
        self._api_version: str | None = None
        self._networks = asyncio.Lock()
        self._pings = HttpGet(url, most_bytes=_MOST_PING_BYTES)

    def close(self) -> None:
        """Drop the idle connections; calls that are under way end by themselves."""
        self._pings.close()
        while self._idle:
            self._idle.pop().close()

    async def ping(self, timeout_s: float) -> None:
        if self.url.startswith("https:"):  # its certificates are the SDK's business
            await self._call(lambda client: client.ping(), timeout_s)
            return
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._pings.get("/_ping")
        except OSError as error:
            self._api_version = None  # another engine may answer next time
            if isinstance(error, TimeoutError):
                raise self._late(timeout_s) from error
            raise self._unreachable(plainly(error)) from error
        if answer.status != requests.codes.ok:
            raise answers.refusal(answer.status, answers.said(answer.body))

    async def info(self) -> EngineInfo:
        return await self._call(lambda client: answers.engine_info(client.info()))

    async def list_containers(self, manager_id: str) -> tuple[ContainerFacts, ...]:
        filters = {"label": f"{LABEL_MANAGER}={manager_id}"}
        return await self._call(
            lambda client: tuple(map(answers.listed, client.containers(all=True, filters=filters)))
        )

    async def inspect(self, container: str) -> ContainerFacts | None:
        try:
            return await self._call(lambda client: answers.inspected(client.inspect_container(container)))
        except ContainerGoneError:
            return None

    async def create(self, request: ContainerRequest) -> str:
        return await self._call(lambda client: str(_create(client, request)["Id"]))

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
        def read(client: docker.APIClient) -> tuple[str, ...]:
            raw: bytes = client.logs(container_id, stdout=True, stderr=True, tail=tail)
            return tuple(raw.decode("utf-8", "replace").splitlines())

        return await self._call(read)

    async def counters(self, container_id: str) -> ContainerCounters:
        def read(client: docker.APIClient) -> ContainerCounters:
            try:
                stats = client.stats(container_id, stream=False, one_shot=True)
            except InvalidVersion:  # before API 1.41 the engine takes two readings, a second apart
                stats = client.stats(container_id, stream=False)
            return answers.counters(stats)

        return await self._call(read)

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

        # One at a time: the engine's own check and its creating are two steps, and two at once make two.
        async with self._networks:
            await self._call(ensure)

    async def has_image(self, image: str) -> bool:
        try:
            await self._call(lambda client: client.inspect_image(image))  # type: ignore[no-untyped-call]
        except EngineError as error:
            if error.reason is Reason.IMAGE_MISSING:
                return False
            raise
        return True

    async def events(self, manager_id: str, opened: Callable[[], None]) -> AsyncIterator[EngineEvent]:
        filters = {"type": "container", "label": f"{LABEL_MANAGER}={manager_id}"}
        stream = _Stream(
            lambda: self._connect(timeout_s=None),
            lambda client: _begin_events(client, filters),
            answers.event,
            _refusal,
            "events",
            opened=opened,
        )
        async for event in stream.items():
            yield event

    async def pull(self, image: str) -> AsyncIterator[PullProgress]:
        repository, tag = parse_repository_tag(image)
        stream = _Stream(
            lambda: self._connect(timeout_s=None),
            lambda client: client.pull(repository, tag=tag or "latest", stream=True, decode=True),
            lambda entry: answers.pull_progress(image, entry),
            lambda error: answers.not_pulled(image, _said(error)),
            "pull",
        )
        async for progress in stream.items():
            yield progress

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
        raise self._late(deadline_s)

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
        client.trust_env = False  # proxies and .netrc are for elsewhere, and looking them up costs each call
        return client

    def _translated(self, error: Exception) -> EngineError:
        if isinstance(error, APIError):
            return _refusal(error)
        self._api_version = None  # another engine may answer next time
        if isinstance(error, requests.Timeout):
            return EngineUnreachableError(f"the container engine at {self.url} does not answer")
        if isinstance(error, requests.RequestException | DockerException | OSError):
            return self._unreachable(_innermost(error))
        return EngineError(
            f"unexpected answer of the container engine: {error!r}", reason=Reason.START_FAILED
        )

    def _late(self, deadline_s: float) -> EngineUnreachableError:
        return EngineUnreachableError(
            f"the container engine at {self.url} did not answer within {deadline_s:g} s"
        )

    def _unreachable(self, why: str) -> EngineUnreachableError:
        return EngineUnreachableError(f"the container engine at {self.url} cannot be reached ({why})")


class _Stream(Generic[T]):
    """Items of a blocking iterator of the SDK, read in a thread, closed when the reader leaves.

    Args:
        connect: makes the client that the stream keeps to itself.
        begin: asks for the stream.
        convert: what an entry means, None for one that is to be left out; it may raise an EngineError.
        refused: what a refusal of the whole stream means.
        name: what the stream has.
        opened: called on the loop once the engine has begun to answer.
    """

    def __init__(
        self,
        connect: Callable[[], docker.APIClient],
        begin: Callable[[docker.APIClient], Any],
        convert: Callable[[dict[str, Any]], T | None],
        refused: Callable[[APIError], EngineError],
        name: str,
        *,
        opened: Callable[[], None] = lambda: None,
    ) -> None:
        self._connect = connect
        self._begin = begin
        self._convert = convert
        self._refused = refused
        self._name = name
        self._opened = opened
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[T | Exception | None] = asyncio.Queue()
        self._closed = threading.Event()
        self._source: Any = None

    async def items(self) -> AsyncIterator[T]:
        threading.Thread(target=self._read, name=f"docker-{self._name}", daemon=True).start()
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, APIError):
                    raise self._refused(item) from item
                if isinstance(item, EngineError):
                    raise item
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
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._opened)
                for entry in self._source:
                    if self._closed.is_set():
                        break
                    if (item := self._convert(entry)) is not None:
                        self._post(item)
            finally:
                client.close()
        except Exception as error:  # noqa: BLE001  (goes to whoever reads the items)
            end = error
        self._post(end)

    def _post(self, item: T | Exception | None) -> None:
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


def _begin_events(client: docker.APIClient, filters: dict[str, str]) -> Any:
    stream: Any = client.events(decode=True, filters=filters)
    # Before the SDK's iterator (7.2) does: it takes a refusal, whose exception is an OSError, for the end.
    raise_for_status: Callable[[Any], None] = client._raise_for_status  # type: ignore[attr-defined]  # noqa: SLF001
    raise_for_status(stream._response)  # noqa: SLF001
    return stream


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


def _refusal(error: APIError) -> EngineError:
    return answers.refusal(error.status_code, _said(error))


def _said(error: APIError) -> str:
    return str(error.explanation or error)


def _innermost(error: BaseException) -> str:
    """The cause people can act on: the SDK wraps a refused connection five times."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    plain = next((e for e in reversed(seen) if isinstance(e, OSError) and e.strerror), seen[-1])
    return str(getattr(plain, "strerror", None) or plain)
