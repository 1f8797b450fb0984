"""Docker Swarm as a container engine: an instance is a service of no replica or one.

What `services.ports.Engine` says of a container holds for a service: creating is a service without
replicas, or a new specification of the one that was scaled to zero; starting and stopping is scaling. Why:
docs/decisions/0031-swarm.md.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import orjson

from manager.adapters import docker_answers, swarm_answers
from manager.adapters import docker_streams as streams
from manager.adapters.docker_calls import EngineCalls, checked, filters, query, read
from manager.adapters.swarm_request import service_spec, with_replicas
from manager.domain.container import LABEL_INSTANCE, LABEL_MANAGER, cards_of_device
from manager.domain.instance import ALIVE
from manager.domain.ownership import LABEL_OWNER
from manager.domain.swarm import TaskStage, held, newest, nodes_with, service_facts, standing
from manager.errors import ContainerGoneError, EngineError, EngineUnreachableError, Reason
from manager.services.ports import EngineEvent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Mapping
    from datetime import datetime

    from manager.domain.container import ContainerRequest
    from manager.domain.instance import ContainerFacts
    from manager.domain.swarm import Node, Service, Task
    from manager.services.ports import Archive, ContainerCounters, EngineInfo, PullProgress

_NOT_FOUND = 404
_CONFLICT = 409
# Another client has changed the service since it was read: read it again.
_OUT_OF_SEQUENCE = "update out of sequence"
_MOST_UPDATES = 5
# A constraint that names one node by its id: the other nodes need not be read.
_ONE_NODE = "node.id=="
_FIRST_POLL_S = 0.02
_SLOWEST_POLL_S = 0.25
# A task without a node for so long finds none: the port of one that ends may still be taken.
_PENDING_S = 5.0
# Beyond the time that a container has to end, before its service counts as stuck.
_END_SLACK_S = 10.0
# Docker's words for events of a container.
_DIE = "die"
_START = "start"


class SwarmEngine:
    """Implements `services.ports.Engine` with services. Raises `EngineError` and its kin only.

    Tasks have no events: `events` compares the tasks every `poll_s`.

    Args:
        url: of the engine of a manager node; as `DockerEngine`.
        timeout_s: the deadline of every call that names none of its own.
        resource: the kind of generic resource that nodes advertise their cards as.
        stop_timeout_s: how long a container has to end after the first signal; may be replaced at any time.
        poll_s: how often `events` looks.
    """

    def __init__(
        self, url: str, timeout_s: float, *, resource: str, stop_timeout_s: float, poll_s: float
    ) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._resource = resource
        self.stop_timeout_s = stop_timeout_s
        self._poll_s = poll_s
        self._calls = EngineCalls(url, timeout_s)
        self._networks = asyncio.Lock()

    def close(self) -> None:
        """Drop the connections that are kept."""
        self._calls.close()

    async def ping(self, timeout_s: float) -> None:
        """Ask the managers, so that a swarm without a majority of them counts as away."""
        answer = await self._calls.ask("GET", "/swarm", timeout_s=timeout_s)
        if not 200 <= answer.status < 300:  # noqa: PLR2004
            raise EngineUnreachableError(
                f"Docker Swarm at {self.url}: {docker_answers.said(answer.body).strip()}"
            )

    async def info(self) -> EngineInfo:
        raw = await self._calls.call("GET", "/info")
        return read(self.url, lambda found: docker_answers.engine_info(found, None), raw)

    async def own_node(self) -> str | None:
        """Return the id of the node that this engine is."""
        raw = await self._calls.call("GET", "/info")
        return read(self.url, lambda found: (found.get("Swarm") or {}).get("NodeID") or None, raw)

    async def nodes(self) -> tuple[Node, ...]:
        """Return all nodes of the swarm."""
        raw = await self._calls.call("GET", "/nodes")
        return read(
            self.url, lambda found: tuple(swarm_answers.node(one, self._resource) for one in found), raw
        )

    async def list_containers(
        self, manager_id: str, *, label: str = LABEL_MANAGER
    ) -> tuple[ContainerFacts, ...]:
        of_manager = {"label": [f"{label}={manager_id}"]}
        raw = await self._calls.call("GET", f"/services?{_filtered(of_manager)}")
        services = read(self.url, lambda found: tuple(map(swarm_answers.service, found)), raw)
        # Ended tasks are many. `inspect` reads those of one service.
        raw = await self._calls.call(
            "GET", f"/tasks?{_filtered(of_manager | {'desired-state': ['running']})}"
        )
        by_service: dict[str, list[Task]] = {}
        for task in read(self.url, lambda found: tuple(map(swarm_answers.task, found)), raw):
            by_service.setdefault(task.service, []).append(task)
        nodes = {node.id: node for node in await self.nodes()}
        return tuple(service_facts(one, by_service.get(one.id, []), nodes) for one in services)

    async def inspect(self, container: str) -> ContainerFacts | None:
        found = await self._service(container)
        if found is None:
            return None
        with suppress(ContainerGoneError):
            return await self._facts(found[0])
        return None  # it was removed between two questions

    async def create(self, request: ContainerRequest) -> str:
        spec = service_spec(
            request,
            replicas=0,
            node_id=await self._node_with(request),
            stop_timeout_s=self.stop_timeout_s,
        )
        answer = await self._calls.ask("POST", "/services/create", body=orjson.dumps(spec))
        if answer.status == _CONFLICT:
            return await self._respecify(request, spec)
        return read(self.url, lambda created: str(created["ID"]), checked(answer))

    async def start(self, container_id: str) -> None:
        """Scale to one replica, and wait until a node has taken the task, or it has failed.

        Raises:
            EngineError: no node takes it, or its container could not be made.
        """
        found = await self._service(container_id)
        if found is not None and not found[0].replicas:
            await self._until_ended(container_id)  # its port and its card are taken until then
        # One that is to run is there where somebody else has scaled the service meanwhile.
        before = {task.id for task in await self._tasks(container_id) if not task.wanted}
        await self._scale(container_id, 1)
        loop = asyncio.get_running_loop()
        deadline, pause_s = loop.time() + _PENDING_S, _FIRST_POLL_S
        while True:
            task = newest(one for one in await self._tasks(container_id) if one.id not in before)
            if task is not None and task.stage is not TaskStage.WAITING:
                return
            if loop.time() >= deadline:
                raise await self._unplaced(task)
            await asyncio.sleep(pause_s)
            pause_s = min(_SLOWEST_POLL_S, pause_s * 1.5)

    async def signal(self, container_id: str, name: str) -> None:
        """Scale to zero, whatever the signal: the node sends SIGTERM, and SIGKILL when the time is over."""
        if name in ("SIGTERM", "SIGKILL"):
            await self._scale(container_id, 0)

    async def remove(self, container_id: str) -> None:
        """Scale to zero and wait until no container is left. The service stays, for the next start."""
        await self._scale(container_id, 0)
        await self._until_ended(container_id)

    async def logs(self, container_id: str, tail: int) -> tuple[str, ...]:
        return await self._logs(container_id, tail=str(tail))

    async def logs_between(self, container_id: str, since: datetime, until: datetime) -> tuple[str, ...]:
        """Return all lines since then: the logs of tasks have no end in time."""
        del until
        return await self._logs(container_id, since=f"{since.timestamp():.0f}")

    async def follow_logs(self, container_id: str, tail: int) -> AsyncGenerator[str, None]:
        task = await self._task_with_log(container_id)
        async with aclosing(streams.task_logs(self.url, task.id, tail)) as pieces:
            coming: asyncio.Future[str] = asyncio.ensure_future(anext(pieces))
            try:
                while True:
                    # The stream of a task goes on for ever, also when the task has ended.
                    await asyncio.wait({coming}, timeout=self._poll_s)
                    if not coming.done():
                        if not await self._holds(container_id, task.id):
                            return
                        continue
                    try:
                        piece = coming.result()
                    except StopAsyncIteration:
                        return
                    coming = asyncio.ensure_future(anext(pieces))
                    yield piece
            finally:
                coming.cancel()
                await asyncio.wait({coming})

    async def counters(self, container_id: str) -> ContainerCounters:
        """Raise EngineError: a manager node has no counters of containers on other nodes."""
        raise EngineError(
            f"Docker Swarm has no counters of service {container_id}", reason=Reason.INSTANCE_UNAVAILABLE
        )

    async def ensure_network(self, name: str) -> None:
        """Create the attachable overlay network `name` unless there is one."""
        body = orjson.dumps({"Name": name, "Driver": "overlay", "Attachable": True, "CheckDuplicate": True})
        async with self._networks:
            options = query(filters=filters(name=name))
            raw = await self._calls.call("GET", f"/networks?{options}")
            found = read(self.url, lambda entries: [one for one in entries if one["Name"] == name], raw)
            if any(one.get("Scope") == "swarm" for one in found):
                return
            if found:
                raise EngineError(
                    f"swarm.network: {name!r} is a network of driver {found[0].get('Driver')} on the manager "
                    "node; expected another name, or an overlay network",
                    reason=Reason.NAME_CONFLICT,
                )
            try:
                await self._calls.call("POST", "/networks/create", body=body)
            except EngineError as error:
                if not docker_answers.exists_already(error):
                    raise

    async def connect(self, container_id: str, network: str) -> None:
        """Do nothing: the network of a service is part of its specification."""

    async def has_image(self, image: str) -> bool:  # noqa: ARG002
        """Return True: each node looks for the image itself, and pulls it."""
        return True

    async def has_volume(self, name: str) -> bool:  # noqa: ARG002
        """Return False: a manager node has no sight of the volumes of other nodes."""
        return False

    async def read_archive(self, container_id: str, path: str, most_bytes: int) -> Archive | None:  # noqa: ARG002
        """Return None: a manager node has no sight of the files of other nodes."""
        return None

    async def events(self, manager_id: str, opened: Callable[[], None]) -> AsyncIterator[EngineEvent]:
        seen = await self._listed(manager_id)
        opened()
        while True:
            await asyncio.sleep(self._poll_s)
            now = await self._listed(manager_id)
            for service in seen.keys() | now.keys():
                before, after = seen.get(service), now.get(service)
                if _run_of(before) == _run_of(after):
                    continue
                instance = _instance(after or before)
                if instance is not None:
                    yield EngineEvent(_START if _runs(after) else _DIE, service, instance, None)
            seen = now

    async def pull(self, image: str) -> AsyncIterator[PullProgress]:
        """Raise EngineError: each node pulls an image when it needs it."""
        raise EngineError(
            f"{image} is pulled by the node that runs the service; a manager node cannot do it for others",
            reason=Reason.IMAGE_MISSING,
        )
        yield  # pragma: no cover  (makes it a generator)

    # --- helpers ---

    async def _until_ended(self, service: str) -> None:
        """Wait until no task of a service without replicas holds anything.

        Raises:
            EngineError: one has not ended in time.
        """
        loop = asyncio.get_running_loop()
        deadline, pause_s = loop.time() + self.stop_timeout_s + _END_SLACK_S, _FIRST_POLL_S
        while await self._holds(service):
            if loop.time() >= deadline:
                raise EngineError(
                    f"a task of service {service} has not ended {_END_SLACK_S:g} s after its time",
                    reason=Reason.INSTANCE_UNHEALTHY,
                    retry_after_s=5,
                )
            await asyncio.sleep(pause_s)
            pause_s = min(_SLOWEST_POLL_S, pause_s * 1.5)

    async def _listed(self, manager_id: str) -> dict[str, ContainerFacts]:
        return {facts.id: facts for facts in await self.list_containers(manager_id)}

    async def _tasks(self, service: str) -> tuple[Task, ...]:
        """Return all tasks of a service.

        Raises:
            ContainerGoneError: there is no such service.
        """
        answer = await self._calls.ask("GET", f"/tasks?{query(filters=filters(service=service))}")
        if answer.status == _NOT_FOUND:
            raise ContainerGoneError(f"service {service} was removed")
        return read(self.url, lambda found: tuple(map(swarm_answers.task, found)), checked(answer))

    async def _holds(self, service: str, task: str | None = None) -> bool:
        """Return whether a service, or one task of it, holds something on a node that answers."""
        try:
            tasks = await self._tasks(service)
        except ContainerGoneError:
            return False
        wanted = [one for one in tasks if task in (None, one.id)]
        return bool(held(wanted, await self._nodes_of(wanted)))

    async def _nodes_of(self, tasks: Iterable[Task]) -> dict[str, Node]:
        """Return the nodes of tasks by id. Docker tells kilobytes of each node: the others are left out."""
        return await self._nodes_by_id({task.node for task in tasks if task.node is not None})

    async def _nodes_by_id(self, ids: Collection[str]) -> dict[str, Node]:
        if not ids:
            return {}
        raw = await self._calls.call("GET", f"/nodes?{_filtered({'id': sorted(ids)})}")
        found = read(self.url, lambda found: [swarm_answers.node(one, self._resource) for one in found], raw)
        return {node.id: node for node in found}

    async def _facts(self, service: Service) -> ContainerFacts:
        tasks = await self._tasks(service.id)
        return service_facts(service, tasks, await self._nodes_of(tasks))

    async def _service(self, name: str) -> tuple[Service, dict[str, Any]] | None:
        """Return a service by id or name, with its specification; None where there is none."""
        answer = await self._calls.ask("GET", f"/services/{quote(name)}")
        if answer.status == _NOT_FOUND:
            return None
        return read(self.url, lambda found: (swarm_answers.service(found), found["Spec"]), checked(answer))

    async def _scale(self, name: str, replicas: int) -> None:
        """Set the number of replicas; a service that is gone, or has that number, is no error."""
        await self._update(name, lambda spec: with_replicas(spec, replicas), replicas)

    async def _update(
        self, name: str, change: Callable[[dict[str, Any]], dict[str, Any]], replicas: int | None
    ) -> None:
        for attempt in range(_MOST_UPDATES):
            found = await self._service(name)
            if found is None or found[0].replicas == replicas:
                return
            service, spec = found
            body = orjson.dumps(change(spec))
            path = f"/services/{quote(service.id)}/update?{query(version=str(service.version))}"
            answer = await self._calls.ask("POST", path, body=body)
            try:
                checked(answer)
            except EngineError as error:
                is_outdated = answer.status == _NOT_FOUND or _OUT_OF_SEQUENCE in error.message
                if not is_outdated or attempt == _MOST_UPDATES - 1:
                    raise
            else:
                return

    async def _respecify(self, request: ContainerRequest, spec: dict[str, Any]) -> str:
        """Give the service of that name, which has no replicas, a new specification.

        Raises:
            EngineError: it is not of the same instance and owner, or runs.
        """
        found = await self._service(request.name)
        if found is None:
            raise EngineError(f"service {request.name} was removed meanwhile", reason=Reason.START_FAILED)
        service = found[0]
        same = all(service.labels.get(one) == request.labels.get(one) for one in _IDENTITY)
        if not same or service.replicas:
            raise EngineError(
                f"the name {request.name!r} is already in use by a service of this swarm; "
                f"`docker service inspect {request.name}` shows it",
                reason=Reason.NAME_CONFLICT,
            )
        await self._update(service.id, lambda before: _instead_of(before, spec), None)
        return service.id

    async def _node_with(self, request: ContainerRequest) -> str | None:
        """Return the node that advertises the cards of a request, None where it has none.

        Raises:
            EngineError: no node advertises them.
        """
        cards = cards_of_device(request.gpu or "")
        if not cards:
            return None
        named = [one.removeprefix(_ONE_NODE) for one in request.placement if one.startswith(_ONE_NODE)]
        nodes = (await self._nodes_by_id(named)).values() if named else await self.nodes()
        found = nodes_with(nodes, cards)
        if not found:
            raise EngineError(
                f"no node of the swarm advertises {', '.join(cards)} as {self._resource}: "
                "see node-generic-resources in its /etc/docker/daemon.json",
                reason=Reason.GPU_MISSING,
            )
        # A host that has left the swarm and joined again is listed twice: as the node that it was, too.
        return max(found, key=lambda node: (node.is_up, node.is_active)).id

    async def _unplaced(self, task: Task | None) -> EngineError:
        said = task.error if task is not None and task.error else "it does not say why"
        return EngineError(
            f"Docker Swarm has found no node within {_PENDING_S:g} s: {said}",
            reason=Reason.INSTANCE_UNAVAILABLE,
        )

    async def _task_with_log(self, service: str) -> Task:
        """Return the newest task of a service, on a node that can be asked for its log.

        Raises:
            EngineError: there is none: the engine would wait for such a node without an end.
        """
        task = standing(await self._tasks(service))
        if task is None or task.node is None:
            raise EngineError(f"service {service} has no task", reason=Reason.INSTANCE_UNAVAILABLE)
        node = (await self._nodes_by_id((task.node,))).get(task.node)
        if node is None or not node.is_up:
            name = task.node if node is None else node.name
            raise EngineError(
                f"the log of service {service} is on node {name}, which is down",
                reason=Reason.INSTANCE_UNAVAILABLE,
            )
        return task

    async def _logs(self, service: str, **options: str) -> tuple[str, ...]:
        task = await self._task_with_log(service)
        path = f"/tasks/{quote(task.id)}/logs?{query(stdout='1', stderr='1', **options)}"
        raw = await self._calls.call("GET", path)
        return tuple(docker_answers.demultiplexed(raw).decode("utf-8", "replace").splitlines())


def _filtered(wanted: Mapping[str, list[str]]) -> str:
    return query(filters=orjson.dumps(wanted).decode())


# The labels by which a service is the same instance of the same owner.
_IDENTITY = (LABEL_MANAGER, LABEL_INSTANCE, LABEL_OWNER)


def _instead_of(before: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    """Return a specification with the count of forced updates of the one before, which only grows."""
    forced = before["TaskTemplate"].get("ForceUpdate") or 0
    return spec | {"TaskTemplate": spec["TaskTemplate"] | {"ForceUpdate": forced}}


def _run_of(facts: ContainerFacts | None) -> tuple[object, ...]:
    """Return what tells one run of a service from another."""
    return () if facts is None else (facts.status, facts.started_at, facts.address)


def _runs(facts: ContainerFacts | None) -> bool:
    return facts is not None and facts.status in ALIVE


def _instance(facts: ContainerFacts | None) -> str | None:
    return None if facts is None else facts.labels.get(LABEL_INSTANCE)
