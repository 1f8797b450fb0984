"""Docker Engine, or Podman's Docker-compatible API, over HTTP; what streams is in `docker_streams`.

Calls go over a few kept connections on the event loop. Measured against the SDK and aiodocker:
docs/decisions/0015-docker-types.md.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from typing import TYPE_CHECKING
from urllib.parse import quote

import orjson

from manager.adapters import docker_answers as answers
from manager.adapters import docker_streams as streams
from manager.adapters.docker_calls import EngineCalls, checked, filters, query, read
from manager.adapters.docker_request import create_body
from manager.adapters.http_client import AnswerTooLongError
from manager.domain.container import LABEL_MANAGER
from manager.errors import (
    ArchiveTooLargeError,
    ContainerGoneError,
    EngineError,
    EngineUnreachableError,
    Reason,
)
from manager.services.ports import Archive

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from datetime import datetime

    from manager.domain.container import ContainerRequest
    from manager.domain.instance import ContainerFacts
    from manager.services.ports import ContainerCounters, EngineEvent, EngineInfo, PullProgress

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
        self._calls = EngineCalls(url, timeout_s)
        self._networks = asyncio.Lock()

    def close(self) -> None:
        """Drop the connections that are kept."""
        self._calls.close()

    async def ping(self, timeout_s: float) -> None:
        await self._calls.call("GET", "/_ping", timeout_s=timeout_s)

    async def info(self) -> EngineInfo:
        info = await self._calls.call("GET", "/info")
        podman = await self._podman()
        return read(self.url, lambda found: answers.engine_info(found, podman), info)

    async def list_containers(
        self, manager_id: str, *, label: str = LABEL_MANAGER
    ) -> tuple[ContainerFacts, ...]:
        options = query(all="1", filters=filters(label=f"{label}={manager_id}"))
        raw = await self._calls.call("GET", f"/containers/json?{options}")
        return read(self.url, lambda entries: tuple(map(answers.listed, entries)), raw)

    async def inspect(self, container: str) -> ContainerFacts | None:
        try:
            raw = await self._calls.call("GET", f"/containers/{quote(container)}/json")
        except ContainerGoneError:
            return None
        return read(self.url, answers.inspected, raw)

    async def create(self, request: ContainerRequest) -> str:
        if self.url.startswith("unix:") and any(mount.bind for mount in request.mounts):
            await asyncio.to_thread(_refuse_moved_binds, request)
        by_cdi = request.gpu is not None and await self._gives_cards_by_cdi()
        path = f"/containers/create?{query(name=request.name)}"
        raw = await self._calls.call("POST", path, body=orjson.dumps(create_body(request, by_cdi=by_cdi)))
        return read(self.url, lambda answer: str(answer["Id"]), raw)

    async def start(self, container_id: str) -> None:
        await self._calls.call("POST", f"/containers/{quote(container_id)}/start")

    async def signal(self, container_id: str, name: str) -> None:
        try:
            await self._calls.call("POST", f"/containers/{quote(container_id)}/kill?{query(signal=name)}")
        except ContainerGoneError:
            pass
        except EngineError as error:
            if not answers.is_not_running(error):
                raise

    async def remove(self, container_id: str) -> None:
        try:
            await self._calls.call("DELETE", f"/containers/{quote(container_id)}?{query(force='1', v='1')}")
        except ContainerGoneError:
            pass
        except EngineError as error:
            if not answers.is_being_removed(error):
                raise

    async def logs(self, container_id: str, tail: int) -> tuple[str, ...]:
        options = query(stdout="1", stderr="1", tail=str(tail))
        raw = await self._calls.call("GET", f"/containers/{quote(container_id)}/logs?{options}")
        return tuple(answers.demultiplexed(raw).decode("utf-8", "replace").splitlines())

    async def logs_between(self, container_id: str, since: datetime, until: datetime) -> tuple[str, ...]:
        # Without `tail` the engine reads from the beginning; with it, it filters the last lines only.
        times = {"since": f"{since.timestamp():.6f}", "until": f"{until.timestamp():.6f}"}
        options = query(stdout="1", stderr="1", **times)
        raw = await self._calls.call("GET", f"/containers/{quote(container_id)}/logs?{options}")
        return tuple(answers.demultiplexed(raw).decode("utf-8", "replace").splitlines())

    async def counters(self, container_id: str) -> ContainerCounters:
        # Before API 1.41 the engine takes two readings whatever it is asked, a second apart.
        options = query(**{"stream": "0", "one-shot": "1"})
        raw = await self._calls.call("GET", f"/containers/{quote(container_id)}/stats?{options}")
        return read(self.url, answers.counters, raw)

    async def has_volume(self, name: str) -> bool:
        answer = await self._calls.ask("GET", f"/volumes/{quote(name)}")
        if answer.status == _NOT_FOUND:
            return False
        return read(self.url, lambda volume: bool(volume["Name"]), checked(answer))

    async def read_archive(self, container_id: str, path: str, most_bytes: int) -> Archive | None:
        target = f"/containers/{quote(container_id)}/archive?{query(path=path)}"
        try:
            answer = await self._calls.ask("GET", target, most_bytes=most_bytes)
        except EngineUnreachableError as error:
            if isinstance(error.__cause__, AnswerTooLongError):
                raise ArchiveTooLargeError(f"{path} has more than {most_bytes} bytes") from error
            raise
        if answer.status == _NOT_FOUND and not answers.names_no_container(answers.said(answer.body)):
            return None
        body = checked(answer)
        stat = next((value for name, value in answer.headers if name.lower() == _PATH_STAT), b"")
        return Archive(body, stat.decode("latin-1"))

    async def has_network(self, name: str) -> bool:
        raw = await self._calls.call("GET", f"/networks?{query(filters=filters(name=name))}")
        # The engine's name filter matches parts of names.
        return read(self.url, lambda entries: any(entry["Name"] == name for entry in entries), raw)

    async def ensure_network(self, name: str) -> None:
        """Create the bridge network `name` unless there is one; never a second of that name."""
        body = orjson.dumps({"Name": name, "Driver": "bridge", "CheckDuplicate": True})
        # One at a time: the engine's own check and its creating are two steps, and two at once make two.
        async with self._networks:
            if not await self.has_network(name):
                try:
                    await self._calls.call("POST", "/networks/create", body=body)
                except EngineError as error:
                    if not answers.exists_already(error):
                        raise

    async def connect(self, container_id: str, network: str) -> None:
        body = orjson.dumps({"Container": container_id})
        try:
            await self._calls.call("POST", f"/networks/{quote(network)}/connect", body=body)
        except EngineError as error:
            # The words of moby and of Podman for a container that is connected already.
            if "already exists in network" not in error.message and "already connected" not in error.message:
                raise

    async def has_image(self, image: str) -> bool:
        try:
            raw = await self._calls.call("GET", f"/images/{quote(image, safe='/:@')}/json")
        except EngineError as error:
            if error.reason is Reason.IMAGE_MISSING:
                return False
            raise
        return read(self.url, lambda answer: bool(answer["Id"]), raw)

    async def ensure_volume(self, name: str) -> None:
        """Create the volume `name` unless there is one; the engine does nothing then."""
        await self._calls.call("POST", "/volumes/create", body=orjson.dumps({"Name": name}))

    async def events(self, manager_id: str, opened: Callable[[], None]) -> AsyncIterator[EngineEvent]:
        wanted = {"type": "container", "label": f"{LABEL_MANAGER}={manager_id}"}
        async for event in streams.events(self.url, wanted, opened):
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
                raise self._calls.silent(self._timeout_s) from error
            yield first
            async for piece in pieces:
                yield piece

    async def _podman(self) -> tuple[int, int] | None:
        """Return Podman's version, None for Docker and where a proxy forbids the question."""
        try:
            raw = await self._calls.call("GET", "/version")
        except EngineUnreachableError:
            raise
        except EngineError:
            return None
        return read(self.url, answers.podman_version, raw)

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
