"""Docker Engine, or Podman's Docker-compatible API, over HTTP; what streams is in `docker_streams`.

Calls go over a few kept connections on the event loop. Measured against the SDK and aiodocker:
docs/decisions/0015-docker-types.md.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

import orjson
from requests.utils import DEFAULT_CA_BUNDLE_PATH

from manager.adapters import docker_answers as answers
from manager.adapters import docker_streams as streams
from manager.adapters.docker_request import create_body
from manager.adapters.http_client import AnswerTooLongError, HttpClient, plainly
from manager.adapters.tls import SharedTls
from manager.descriptors import lacks_descriptors
from manager.domain.container import LABEL_MANAGER
from manager.errors import (
    ArchiveTooLargeError,
    ContainerGoneError,
    EngineError,
    EngineUnreachableError,
    NoDescriptorForEngineError,
    Reason,
)
from manager.services.ports import Archive

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from datetime import datetime

    from manager.adapters.http_client import Answer
    from manager.domain.container import ContainerRequest
    from manager.domain.instance import ContainerFacts
    from manager.services.ports import ContainerCounters, EngineEvent, EngineInfo, PullProgress

T = TypeVar("T")

# The last ten thousand lines of a container, if they are long ones.
_MOST_BYTES = 64 * 2**20
_MOST_KEPT = 8
_NOT_MODIFIED = 304
_NOT_FOUND = 404
_PATH_STAT = b"x-docker-container-path-stat"


class DockerEngine:
    """Implements `services.ports.Engine`. Raises `EngineError` and its kin only.

    Paths have no version: the engine takes them as of its own. Its answers are read leniently.

    Args:
        url: `unix:///…`, `tcp://host:port`, `http://host:port` or `https://host:port`.
        timeout_s: the deadline of every call that names none of its own.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url
        self._timeout_s = timeout_s
        # The authorities that the SDK trusts, which talks to the same engine.
        tls = SharedTls(DEFAULT_CA_BUNDLE_PATH).context
        self._client = HttpClient(url, most_bytes=_MOST_BYTES, most_kept=_MOST_KEPT, tls=tls)
        self._networks = asyncio.Lock()

    def close(self) -> None:
        """Drop the connections that are kept."""
        self._client.close()

    async def ping(self, timeout_s: float) -> None:
        await self._call("GET", "/_ping", timeout_s=timeout_s)

    async def info(self) -> EngineInfo:
        info = await self._call("GET", "/info")
        podman = await self._podman()
        return self._read(lambda read: answers.engine_info(read, podman), info)

    async def list_containers(
        self, manager_id: str, *, label: str = LABEL_MANAGER
    ) -> tuple[ContainerFacts, ...]:
        query = _query(all="1", filters=_filters(label=f"{label}={manager_id}"))
        raw = await self._call("GET", f"/containers/json?{query}")
        return self._read(lambda entries: tuple(map(answers.listed, entries)), raw)

    async def inspect(self, container: str) -> ContainerFacts | None:
        try:
            raw = await self._call("GET", f"/containers/{quote(container)}/json")
        except ContainerGoneError:
            return None
        return self._read(answers.inspected, raw)

    async def create(self, request: ContainerRequest) -> str:
        if self.url.startswith("unix:") and any(mount.bind for mount in request.mounts):
            await asyncio.to_thread(_refuse_moved_binds, request)
        by_cdi = request.gpu is not None and await self._gives_cards_by_cdi()
        path = f"/containers/create?{_query(name=request.name)}"
        raw = await self._call("POST", path, body=orjson.dumps(create_body(request, by_cdi=by_cdi)))
        return self._read(lambda answer: str(answer["Id"]), raw)

    async def start(self, container_id: str) -> None:
        await self._call("POST", f"/containers/{quote(container_id)}/start")

    async def signal(self, container_id: str, name: str) -> None:
        try:
            await self._call("POST", f"/containers/{quote(container_id)}/kill?{_query(signal=name)}")
        except ContainerGoneError:
            pass
        except EngineError as error:
            if not answers.is_not_running(error):
                raise

    async def remove(self, container_id: str) -> None:
        try:
            await self._call("DELETE", f"/containers/{quote(container_id)}?{_query(force='1', v='1')}")
        except ContainerGoneError:
            pass
        except EngineError as error:
            if not answers.is_being_removed(error):
                raise

    async def logs(self, container_id: str, tail: int) -> tuple[str, ...]:
        query = _query(stdout="1", stderr="1", tail=str(tail))
        raw = await self._call("GET", f"/containers/{quote(container_id)}/logs?{query}")
        return tuple(answers.demultiplexed(raw).decode("utf-8", "replace").splitlines())

    async def logs_between(self, container_id: str, since: datetime, until: datetime) -> tuple[str, ...]:
        # Without `tail` the engine reads from the beginning; with it, it filters the last lines only.
        times = {"since": f"{since.timestamp():.6f}", "until": f"{until.timestamp():.6f}"}
        query = _query(stdout="1", stderr="1", **times)
        raw = await self._call("GET", f"/containers/{quote(container_id)}/logs?{query}")
        return tuple(answers.demultiplexed(raw).decode("utf-8", "replace").splitlines())

    async def counters(self, container_id: str) -> ContainerCounters:
        # Before API 1.41 the engine takes two readings whatever it is asked, a second apart.
        query = _query(**{"stream": "0", "one-shot": "1"})
        raw = await self._call("GET", f"/containers/{quote(container_id)}/stats?{query}")
        return self._read(answers.counters, raw)

    async def has_volume(self, name: str) -> bool:
        answer = await self._ask("GET", f"/volumes/{quote(name)}")
        if answer.status == _NOT_FOUND:
            return False
        return self._read(lambda volume: bool(volume["Name"]), _checked(answer))

    async def read_archive(self, container_id: str, path: str, most_bytes: int) -> Archive | None:
        target = f"/containers/{quote(container_id)}/archive?{_query(path=path)}"
        try:
            answer = await self._ask("GET", target, most_bytes=most_bytes)
        except EngineUnreachableError as error:
            if isinstance(error.__cause__, AnswerTooLongError):
                raise ArchiveTooLargeError(f"{path} has more than {most_bytes} bytes") from error
            raise
        if answer.status == _NOT_FOUND and not answers.names_no_container(answers.said(answer.body)):
            return None
        body = _checked(answer)
        stat = next((value for name, value in answer.headers if name.lower() == _PATH_STAT), b"")
        return Archive(body, stat.decode("latin-1"))

    async def has_network(self, name: str) -> bool:
        raw = await self._call("GET", f"/networks?{_query(filters=_filters(name=name))}")
        # The engine's name filter matches parts of names.
        return self._read(lambda entries: any(entry["Name"] == name for entry in entries), raw)

    async def ensure_network(self, name: str) -> None:
        """Create the bridge network `name` unless there is one; never a second of that name."""
        body = orjson.dumps({"Name": name, "Driver": "bridge", "CheckDuplicate": True})
        # One at a time: the engine's own check and its creating are two steps, and two at once make two.
        async with self._networks:
            if not await self.has_network(name):
                try:
                    await self._call("POST", "/networks/create", body=body)
                except EngineError as error:
                    if not answers.exists_already(error):
                        raise

    async def connect(self, container_id: str, network: str) -> None:
        body = orjson.dumps({"Container": container_id})
        try:
            await self._call("POST", f"/networks/{quote(network)}/connect", body=body)
        except EngineError as error:
            # The words of moby and of Podman for a container that is connected already.
            if "already exists in network" not in error.message and "already connected" not in error.message:
                raise

    async def has_image(self, image: str) -> bool:
        try:
            raw = await self._call("GET", f"/images/{quote(image, safe='/:@')}/json")
        except EngineError as error:
            if error.reason is Reason.IMAGE_MISSING:
                return False
            raise
        return self._read(lambda answer: bool(answer["Id"]), raw)

    async def ensure_volume(self, name: str) -> None:
        """Create the volume `name` unless there is one; the engine does nothing then."""
        await self._call("POST", "/volumes/create", body=orjson.dumps({"Name": name}))

    async def events(self, manager_id: str, opened: Callable[[], None]) -> AsyncIterator[EngineEvent]:
        filters = {"type": "container", "label": f"{LABEL_MANAGER}={manager_id}"}
        async for event in streams.events(self.url, filters, opened):
            yield event

    async def pull(self, image: str) -> AsyncIterator[PullProgress]:
        async for progress in streams.pull(self.url, image):
            yield progress

    async def follow_logs(self, container_id: str, tail: int) -> AsyncGenerator[str, None]:
        async with aclosing(streams.logs(self.url, container_id, tail)) as pieces:
            try:
                async with asyncio.timeout(self._timeout_s):
                    first = await anext(pieces)
            except TimeoutError as error:
                raise self._silent(self._timeout_s) from error
            yield first
            async for piece in pieces:
                yield piece

    async def _podman(self) -> tuple[int, int] | None:
        """Return Podman's version, None for Docker and where a proxy forbids the question."""
        try:
            raw = await self._call("GET", "/version")
        except EngineUnreachableError:
            raise
        except EngineError:
            return None
        return self._read(answers.podman_version, raw)

    async def _gives_cards_by_cdi(self) -> bool:
        """Whether the engine gives cards by the Container Device Interface only.

        Raises:
            EngineError: it gives none, and would start the container without one.
        """
        podman = await self._podman()
        if podman is None:
            return False
        if not answers.podman_gives_cards(podman):
            raise EngineError(
                f"Podman {podman[0]}.{podman[1]} gives no GPU to a container that is created over its "
                "Docker-compatible API: Podman 5.4 or newer does",
                reason=Reason.GPU_MISSING,
            )
        return True

    async def _call(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        """Return the body of the answer.

        Args:
            method: of HTTP.
            path: with the query.
            body: a JSON document.
            timeout_s: the deadline of the whole call.

        Raises:
            EngineError: the engine refused, or cannot be reached.
        """
        return _checked(await self._ask(method, path, body=body, timeout_s=timeout_s))

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        timeout_s: float | None = None,
        most_bytes: int | None = None,
    ) -> Answer:
        """Return the answer, whatever its status. The arguments are those of `_call` and of `HttpClient`."""
        deadline_s = timeout_s or self._timeout_s
        try:
            async with asyncio.timeout(deadline_s):
                return await self._client.ask(method, path, body, most_bytes=most_bytes)
        except TimeoutError as error:
            raise self._silent(deadline_s) from error
        except OSError as error:
            if lacks_descriptors(error):
                raise NoDescriptorForEngineError from error
            raise EngineUnreachableError(
                f"the container engine at {self.url} cannot be reached ({plainly(error)})"
            ) from error

    def _silent(self, deadline_s: float) -> EngineUnreachableError:
        return EngineUnreachableError(
            f"the container engine at {self.url} did not answer within {deadline_s:g} s"
        )

    def _read(self, convert: Callable[[Any], T], raw: bytes) -> T:
        """The meaning of an answer.

        Raises:
            EngineError: it is not one of an engine.
        """
        try:
            return convert(orjson.loads(raw))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise EngineError(
                f"unexpected answer of the container engine at {self.url}: {error!r}",
                reason=Reason.START_FAILED,
            ) from error


def _checked(answer: Answer) -> bytes:
    """Return the body of an answer.

    Raises:
        EngineError: its status is a refusal.
    """
    if not 200 <= answer.status < 300 and answer.status != _NOT_MODIFIED:  # noqa: PLR2004
        raise answers.refusal(answer.status, answers.said(answer.body))
    return answer.body


def _refuse_moved_binds(request: ContainerRequest) -> None:
    """Refuse a bind whose path has become a symbolic link since it was checked against what is allowed.

    Templates name what their paths lead to, so a path that leads elsewhere now was changed after that.
    """
    for mount in request.mounts:
        if mount.bind and (found := os.path.realpath(mount.source)) != mount.source:
            raise EngineError(
                f"{mount.source} leads to {found} now; templates are checked when the daemon starts: "
                "restart it to have the new place checked",
                reason=Reason.START_FAILED,
            )


def _query(**values: str) -> str:
    return urlencode(values)


def _filters(**values: str) -> str:
    return orjson.dumps({name: [value] for name, value in values.items()}).decode()
