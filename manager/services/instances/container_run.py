"""The two procedures that touch the engine: bring a container up, bring it down. Each records its steps.

Both may be cancelled between any two steps: an engine call that was begun is waited for, because it may
still happen. A start that fails removes what it has made; one that is cancelled leaves that to what comes
next, a stop, or the next daemon, which adopts it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from manager.domain.condition import explain_end
from manager.domain.container import endpoint_of, is_ours
from manager.domain.instance import ALIVE, ContainerFacts
from manager.domain.ownership import whose
from manager.errors import (
    ContainerGoneError,
    EngineError,
    EngineUnreachableError,
    ManagerError,
    NameConflictError,
    NetworkMissingError,
    Reason,
    StartFailedError,
    UnavailableError,
)
from manager.services.finishing import finish

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.container import ContainerRequest
    from manager.domain.instance import Limits
    from manager.services.world import World

T = TypeVar("T")

LOG_LINES = 20
_KEPT_LINES = 1000
_FIRST_POLL_S = 0.01
_SLOWEST_POLL_S = 0.25
_INSPECT_EVERY_S = 1.0
_ANSWER_TIMEOUT_S = 2.0
_KILLED_WAIT_S = 10.0


@dataclass(slots=True)
class Signals:
    """The engine's events about the container that an operation works on.

    Attributes:
        news: set by an event: the container may have ended. Only an inspection shows whether it has.
        out_of_memory: the engine has reported that a process of the container was killed.
    """

    news: asyncio.Event = field(default_factory=asyncio.Event)
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """A container whose server answers."""

    container: ContainerFacts
    endpoint: str
    adopted: bool


class ContainerRun:
    """Brings one instance's container up and down.

    Args:
        on_container: told of each change of what is known of the container, None once it is gone.

    Attributes:
        limits: how long things may take; may be replaced at any time.
        kept_log: the last lines of the last container that was removed and had said something.
    """

    def __init__(
        self,
        world: World,
        instance: str,
        limits: Limits,
        on_container: Callable[[ContainerFacts | None], None],
    ) -> None:
        self._world = world
        self._instance = instance
        self.limits = limits
        self._on_container = on_container
        self.kept_log: tuple[str, ...] = ()

    async def up(
        self,
        request: ContainerRequest,
        *,
        known: ContainerFacts | None,
        by_name: bool,
        ready_path: str,
        signals: Signals,
    ) -> Started:
        """Create and start the container, or take over the one that runs, and wait until it answers.

        One that is paused is taken over as it is. One that was taken over is never removed here, whatever
        happens: somebody may be using it.

        Args:
            request: what is created where nothing runs.
            known: the container as far as it is known, alive or not.
            by_name: containers are reached by name.
            ready_path: what a ready server answers.
            signals: the engine's events about it.

        Raises:
            NameConflictError: a container that is not ours has the name; it was not touched.
            StartFailedError: it ended, or did not answer in time; nothing that was made here is left.
            EngineError: the engine refused; nothing is left, unless the engine cannot be reached.
        """
        adopted = known is not None and known.status in ALIVE
        try:
            container, adopted = await self._obtain(request, known)
            if adopted:
                container = await self._attached(container, request.network, by_name=by_name)
            endpoint = self._endpoint(container, request, by_name=by_name)
            # A paused container cannot answer, perhaps for long: take it over as it is.
            if not (adopted and container.status == "paused"):
                await self._until_ready(container, endpoint + ready_path, signals)
        except StartFailedError as error:
            raise await self._explained(error, request.name, keep=adopted) from error
        except ManagerError:
            if not adopted:
                await finish(self._remove_leftover(request.name))
            raise
        await self._step("ready")
        return Started(container, endpoint, adopted)

    async def down(self, name: str, signals: Signals, *, at_once: bool) -> None:
        """End the container with SIGTERM, then SIGKILL, and remove it.

        What is there is looked up first: a start that was cancelled may have got further than it could tell.

        Args:
            name: the container's.
            signals: the engine's events about it.
            at_once: there is no work in it that could be cut off; do not ask it, kill it.

        Raises:
            EngineError: the engine is away or the container will not end; trying again later is right.
        """
        engine = self._world.engine
        container = await engine.inspect(name)
        if container is None or not self._is_ours(container):
            self._on_container(None)
            return
        if container.status in ALIVE and not at_once:
            await engine.signal(container.id, "SIGTERM")
            await self._step("signalled")
            if not await self._ended(container.id, signals, self.limits.stop_timeout_s):
                await engine.signal(container.id, "SIGKILL")
                if not await self._ended(container.id, signals, _KILLED_WAIT_S):
                    raise EngineError(
                        f"{container.name} did not end within {_KILLED_WAIT_S:g} s of SIGKILL",
                        reason=Reason.INSTANCE_UNHEALTHY,
                        retry_after_s=5,
                    )
            await self._step("ended")
        await self._keep_log(container.id)
        await engine.remove(container.id)
        self._on_container(None)
        await self._step("removed")

    async def log_tail(self, container_id: str, lines: int = LOG_LINES) -> tuple[str, ...]:
        try:
            return await self._world.engine.logs(container_id, lines)
        except EngineError:
            return ()

    async def _keep_log(self, container_id: str) -> tuple[str, ...]:
        lines = await self.log_tail(container_id, _KEPT_LINES)
        self.kept_log = lines or self.kept_log
        return lines[-LOG_LINES:]

    async def _obtain(
        self, request: ContainerRequest, known: ContainerFacts | None
    ) -> tuple[ContainerFacts, bool]:
        """The running container, and whether it ran already."""
        if known is not None:
            now = await self._world.engine.inspect(known.id)
            self._on_container(now)
            if now is not None and now.status in ALIVE:
                return now, True
            if known.status in ALIVE and (now is None or now.status != "parked"):
                raise self._death(request.name, now)
            if now is not None:
                await self._world.engine.remove(now.id)
                self._on_container(None)
        async with self._world.starting:
            return await self._begun(request)

    async def _begun(self, request: ContainerRequest) -> tuple[ContainerFacts, bool]:
        """A container that was made and started, or one that somebody else has started meanwhile."""
        try:
            container_id = await finish(self._create(request))
        except EngineError as error:
            if error.reason is not Reason.NAME_CONFLICT:
                raise
            other = await self._holder_of_name(request.name, error)
            if other is not None and other.status in ALIVE:
                self._on_container(other)
                return other, True
            if other is not None:  # what an earlier run left between two steps
                await self._world.engine.remove(other.id)
            container_id = await finish(self._create(request))
        container = await self._started(container_id, request)
        if container.networks and container.address is None:
            # Docker 28.5 starts a container whose network is made meanwhile, but may never connect it.
            await self._world.engine.remove(container.id)
            self._on_container(None)
            container = await self._started(await finish(self._create(request)), request)
        return container, False

    async def _started(self, container_id: str, request: ContainerRequest) -> ContainerFacts:
        engine = self._world.engine
        # Known before it runs: its death may be told before anyone has looked at it.
        self._on_container(
            ContainerFacts(
                id=container_id,
                name=request.name,
                image=request.image,
                status="created",
                labels=request.labels,
            )
        )
        await self._step("created")
        try:
            await finish(engine.start(container_id))
        except NetworkMissingError:
            await engine.ensure_network(request.network)
            await finish(engine.start(container_id))
        await self._step("started")
        return await self._inspected(container_id)

    async def _inspected(self, container_id: str) -> ContainerFacts:
        facts = await self._world.engine.inspect(container_id)
        if facts is None:
            raise ContainerGoneError("the container was removed while it was being started")
        self._on_container(facts)
        if facts.status not in ALIVE:
            raise self._death(facts.name, facts)  # sooner than anyone could look
        return facts

    async def _create(self, request: ContainerRequest) -> str:
        try:
            return await self._world.engine.create(request)
        except NetworkMissingError:
            await self._world.engine.ensure_network(request.network)
            return await self._world.engine.create(request)

    async def _holder_of_name(self, name: str, refusal: EngineError) -> ContainerFacts | None:
        """The container of ours that has the name, None when it is free by now.

        Raises:
            NameConflictError: it is not ours.
        """
        other = await self._world.engine.inspect(name)
        if other is not None and not self._is_ours(other):
            raise NameConflictError(
                whose(
                    other,
                    manager_id=self._world.manager_id,
                    is_of_manager=is_ours(
                        other, manager_id=self._world.manager_id, instance_id=self._instance
                    ),
                    is_service=self._world.services_network is not None,
                ),
                instance=self._instance,
                details={"container": other.id, "image": other.image},
            ) from refusal
        return other

    def _endpoint(self, container: ContainerFacts, request: ContainerRequest, *, by_name: bool) -> str:
        endpoint = endpoint_of(container, request, by_name=by_name)
        if endpoint is None:
            raise StartFailedError(
                f"{container.name} has no address on its network",
                reason=Reason.START_FAILED,
                instance=self._instance,
            )
        return endpoint

    async def _attached(self, container: ContainerFacts, network: str, *, by_name: bool) -> ContainerFacts:
        """The container, connected to its network again where it was disconnected.

        By name it is reached on that network only; by address any network will do.
        """
        networks = container.networks
        if networks is None or (networks and not (by_name and network not in networks)):
            return container
        engine = self._world.engine
        try:
            await engine.connect(container.id, network)
        except NetworkMissingError:
            await engine.ensure_network(network)
            await engine.connect(container.id, network)
        self._world.journal.record("reconnected", instance=self._instance, detail=f"to network {network}")
        return await self._inspected(container.id)

    async def _until_ready(self, container: ContainerFacts, url: str, signals: Signals) -> None:
        now = self._world.now
        deadline = now() + self.limits.start_timeout_s
        inspect_at = now() + _INSPECT_EVERY_S
        pause_s = _FIRST_POLL_S
        while True:
            # Events are hints: a lost one must not cost the whole deadline.
            if signals.news.is_set() or now() >= min(inspect_at, deadline):
                signals.news.clear()
                inspect_at = now() + _INSPECT_EVERY_S
                facts = await self._facts_if_reachable(container)
                if facts is None or facts.status not in ALIVE:
                    raise self._death(container.name, facts)
                # A paused container cannot answer: the whole time begins when it goes on.
                if "paused" in (container.status, facts.status):
                    deadline = now() + self.limits.start_timeout_s
                container = facts
            left_s = deadline - now()
            # A slow inspection must not cost a server its last moments: it is asked once more.
            if await self._world.upstream.answers(url, min(_ANSWER_TIMEOUT_S, max(left_s, 0.05))):
                return
            if left_s <= 0:
                raise StartFailedError(
                    f"{container.name} runs, but did not answer {url} within "
                    f"{self.limits.start_timeout_s:g} s",
                    reason=Reason.START_TIMEOUT,
                    instance=self._instance,
                )
            await happens(signals.news, pause_s)
            pause_s = min(_SLOWEST_POLL_S, pause_s * 1.5)

    async def _facts_if_reachable(self, known: ContainerFacts) -> ContainerFacts | None:
        """The container as it is, or as it was known where the engine cannot be asked."""
        try:
            return await self._world.engine.inspect(known.id)
        except EngineUnreachableError:
            return known

    def _death(self, name: str, facts: ContainerFacts | None) -> StartFailedError:
        why = explain_end(name, facts)
        return StartFailedError(why.message, reason=why.code, instance=self._instance)

    async def _ended(self, container_id: str, signals: Signals, timeout_s: float) -> bool:
        """Wait until the container has ended; False where it has not in time."""
        deadline = self._world.now() + timeout_s
        while (left_s := deadline - self._world.now()) > 0:
            if await happens(signals.news, min(_INSPECT_EVERY_S, left_s)):
                signals.news.clear()
            if await self.has_ended(container_id):
                return True
        return await self.has_ended(container_id)

    async def has_ended(self, container_id: str) -> bool:
        """Whether the container does not run any more; False where the engine cannot be asked."""
        try:
            facts = await self._world.engine.inspect(container_id)
        except EngineUnreachableError:
            return False
        return facts is None or facts.status not in ALIVE

    async def _explained(self, error: StartFailedError, name: str, *, keep: bool) -> StartFailedError:
        """The error with the container's last words; unless it is to be kept, the container is removed."""
        tail = await self._keep_log(name)
        if not keep:
            await finish(self._remove_leftover(name))
        return StartFailedError(
            error.message,
            reason=error.reason,
            instance=self._instance,
            log_tail=tail,
            retry_after_s=error.retry_after_s,
        )

    async def _remove_leftover(self, name: str) -> None:
        """Remove what a failed start has made. By name, because a create may have happened unanswered."""
        try:
            facts = await self._world.engine.inspect(name)
            if facts is not None and self._is_ours(facts):
                await self._world.engine.remove(facts.id)
        except UnavailableError:
            return  # the engine is away: the first listing after it is back finds the rest
        self._on_container(None)

    def _is_ours(self, facts: ContainerFacts) -> bool:
        world = self._world
        return is_ours(facts, manager_id=world.manager_id, instance_id=self._instance, owner=world.owner)

    async def _step(self, name: str) -> None:
        await self._world.on_step(self._instance, name)


async def happens(event: asyncio.Event, within_s: float) -> bool:
    """Wait for `event`, at most `within_s` seconds; whether it came."""
    try:
        async with asyncio.timeout(within_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
