"""Whether the engine is there, and what it says has happened. Events are hints; listings are the truth."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from manager.errors import EngineError, EngineUnreachableError, Reason
from manager.services.instances.container_run import happens

if TYPE_CHECKING:
    from manager.domain.instance import ContainerFacts
    from manager.services.ports import EngineEvent, EngineInfo
    from manager.services.world import World


class Listener(Protocol):
    """Who is told about the engine; the fleet is one."""

    def engine_found(
        self, info: EngineInfo, containers: tuple[ContainerFacts, ...], *, in_container: bool
    ) -> None:
        """The engine has answered for the first time; `in_container`: the daemon is one of its containers."""
        ...

    def engine_listed(self, containers: tuple[ContainerFacts, ...]) -> None: ...
    def engine_changed(self, *, up: bool) -> None: ...
    def engine_hint(self, event: EngineEvent) -> None: ...


class EngineWatch:
    """Owns the answer to "is the engine up". A hung engine is found within two probe intervals.

    Args:
        own_names: see `Fleet`.
        probe_interval_s: the deadline of a ping; pings begin twice as often.
        resync_interval_s: how long a lost event can stay unnoticed.
    """

    def __init__(
        self,
        world: World,
        listener: Listener,
        *,
        own_names: tuple[str, ...],
        probe_interval_s: float,
        resync_interval_s: float,
    ) -> None:
        self._world = world
        self._listener = listener
        self._own_names = own_names
        self._probe_interval_s = probe_interval_s
        self._resync_interval_s = resync_interval_s
        self.came_up = asyncio.Event()
        self._resync = asyncio.Event()
        self._following: asyncio.Future[None] | None = None
        self._refusal = ""
        self.asked = False
        self.found = False
        self.up = False
        self.trouble = f"the container engine at {world.engine.url} has not answered yet"

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._ping_forever(), name="engine pings")
            tasks.create_task(self._listen_forever(), name="engine events")
            tasks.create_task(self._list_forever(), name="engine listings")

    async def _ping_forever(self) -> None:
        while True:
            began = self._world.now()
            await self._ping()
            spent_s = self._world.now() - began
            await asyncio.sleep(max(0.0, self._probe_interval_s / 2 - spent_s))

    async def _ping(self) -> None:
        try:
            await self._world.engine.ping(self._probe_interval_s)
            if not self.found:
                await self._find()
        except EngineError as error:
            # A lack of descriptors of our own says nothing about the engine.
            if not (self.up and error.reason is Reason.OVERLOADED):
                self._went_down(error.message, error.reason)
        else:
            self._is_up()
        self.asked = True

    async def _find(self) -> None:
        engine = self._world.engine
        info = await engine.info()
        containers = await engine.list_containers(self._world.manager_id)
        itself = [(name, await engine.inspect(name)) for name in self._own_names]
        # A container may merely be named like this host: only an id proves that it is us.
        in_container = any(facts is not None and facts.id.startswith(name) for name, facts in itself)
        self._listener.engine_found(info, containers, in_container=in_container)
        self.found = True

    def _is_up(self) -> None:
        if self.up:
            return
        self.up = True
        self.trouble = ""
        self._world.journal.record("engine_up", detail=self._world.engine.url)
        self._listener.engine_changed(up=True)
        self.came_up.set()
        self._resync.set()

    def _went_down(self, message: str, why: Reason) -> None:
        reason = why if why is Reason.OVERLOADED else Reason.ENGINE_UNAVAILABLE
        if self.up or message != self.trouble:
            self._world.journal.record("engine_down", reason=reason, detail=message)
        self.trouble = message
        if self.up:
            self.up = False
            self.came_up.clear()
            if self._following is not None:
                self._following.cancel()  # a connection that was cut without a word would stay silent
            self._listener.engine_changed(up=False)

    async def _listen_forever(self) -> None:
        while True:
            await self.came_up.wait()
            following = self._following = asyncio.ensure_future(self._follow())
            try:
                await asyncio.wait({following})
            finally:
                following.cancel()
            if not following.cancelled():
                following.result()
            await asyncio.sleep(self._probe_interval_s / 4)

    async def _follow(self) -> None:
        try:
            # What happened before the stream was open is found by a listing that begins after it.
            async for event in self._world.engine.events(self._world.manager_id, self._resync.set):
                self._listener.engine_hint(event)
        except EngineUnreachableError:
            pass  # the ping says whether the engine is gone
        except EngineError as error:
            # Something in between forbids it: listings find everything too, only later.
            if error.message != self._refusal:
                self._world.journal.record("events_refused", detail=error.message)
            self._refusal = error.message
            await asyncio.sleep(self._resync_interval_s)

    async def _list_forever(self) -> None:
        while True:
            await self.came_up.wait()
            self._resync.clear()
            try:
                containers = await self._world.engine.list_containers(self._world.manager_id)
            except EngineError:
                await asyncio.sleep(self._probe_interval_s / 4)
                continue
            self._listener.engine_listed(containers)
            await happens(self._resync, self._resync_interval_s)
