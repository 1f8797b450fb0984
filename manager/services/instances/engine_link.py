"""The link to the engine: whether it answers, what it lists, and containers that belong to no instance.

Events are hints. Listings are the truth.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from manager.domain.container import choose_reach, container_name
from manager.domain.instance import Driver
from manager.domain.orphans import find_orphans
from manager.domain.swarm import service_reach
from manager.errors import EngineError, EngineUnreachableError, NoDescriptorForEngineError, Reason
from manager.services.instances.container_run import happens
from manager.services.instances.supervisor import Supervisor
from manager.settings.addresses import is_loopback

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from manager.domain.container import Reach
    from manager.domain.instance import ContainerFacts
    from manager.domain.orphans import Orphan
    from manager.services.instances.capacity import Capacity
    from manager.services.instances.fleet import Fleet
    from manager.services.ports import EngineEvent, EngineInfo
    from manager.services.world import World

# Something happened to a container that no instance is named after: only a listing tells what it is now.
_RELISTED = ("rename",)


@dataclass(frozen=True, slots=True)
class _Situation:
    """The ways between the daemon and the engine's containers; see `choose_reach`.

    `networks` are those of the daemon's own container.
    """

    in_container: bool
    direct: bool
    elsewhere: bool
    networks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Swarm:
    """The settings of a link to Docker Swarm.

    Attributes:
        reach: the setting `swarm.reach`.
        network: the network of the services.
        itself: inspects the daemon's own container, which is no service.
        finds: nodes give instances by themselves, so that the link is needed without any.
    """

    reach: str
    network: str
    finds: bool
    itself: Callable[[str], Awaitable[ContainerFacts | None]]


class EngineLink:
    """Owns the answer to "is the engine up", its last listing, and the orphans in it.

    A hung engine is found within two probe intervals. Instances learn here what the engine says of them.

    Args:
        world: the engine and the journal.
        fleet: the instances.
        capacity: gives places to instances that start with the daemon.
        own_names: names under which the engine would know the daemon, if it ran in one of its containers.
        probe_interval_s: the deadline of a ping; pings begin twice as often.
        resync_interval_s: how long a lost event can stay unnoticed.
        swarm: set where the engine is Docker Swarm. A link has the instances of its driver, and no others.

    Attributes:
        asked: set once the engine has answered or failed; stays set.
        up: whether it answered last.
        trouble: why it did not; empty while it is up.
        came_up: set while it is up.
        orphans: the containers of the last listing that belong to no instance.
    """

    def __init__(
        self,
        world: World,
        fleet: Fleet,
        capacity: Capacity,
        *,
        own_names: tuple[str, ...],
        probe_interval_s: float,
        resync_interval_s: float,
        swarm: Swarm | None = None,
    ) -> None:
        self._swarm = swarm
        self._driver = Driver.DOCKER if swarm is None else Driver.SWARM
        self._world = world
        self._fleet = fleet
        self._capacity = capacity
        self._own_names = own_names
        self._probe_interval_s = probe_interval_s
        self._resync_interval_s = resync_interval_s
        self._situation: _Situation | None = None
        self._containers: dict[str, ContainerFacts] = {}
        self._resync = asyncio.Event()
        self._following: asyncio.Future[None] | None = None
        self._refusal = ""
        self.came_up = asyncio.Event()
        self.asked = asyncio.Event()
        self.up = False
        self.trouble = f"the container engine at {world.engine.url} has not answered yet"
        self.orphans: tuple[Orphan, ...] = ()

    @property
    def name(self) -> str:
        """Return `engine`, or `swarm`."""
        return "engine" if self._swarm is None else "swarm"

    @property
    def is_needed(self) -> bool:
        """Return whether there are, or may be, instances that this engine runs."""
        return bool(self._supervisors()) or (self._swarm is not None and self._swarm.finds)

    def refuse_if_down(self) -> None:
        """Raise EngineUnreachableError unless the engine can be asked."""
        if not self.up:
            raise EngineUnreachableError(self.trouble)

    def join(self, supervisor: Supervisor) -> None:
        """Tell an instance that joined the fleet late what the engine is known to say."""
        if self._situation is not None:
            self._introduce(supervisor, self._situation)
            if supervisor.spec.prewarm:
                self._capacity.prewarm(supervisor)
            supervisor.engine_changed(up=self.up)

    async def run(self) -> None:
        """Watch the engine, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._ping_forever(), name="engine pings")
            tasks.create_task(self._listen_forever(), name="engine events")
            tasks.create_task(self._list_forever(), name="engine listings")

    # --- pings ---

    async def _ping_forever(self) -> None:
        while True:
            began = self._world.now()
            await self._ping()
            spent_s = self._world.now() - began
            await asyncio.sleep(max(0.0, self._probe_interval_s / 2 - spent_s))

    async def _ping(self) -> None:
        try:
            await self._world.engine.ping(self._probe_interval_s)
            if self._situation is None:
                await self._meet()
        except NoDescriptorForEngineError as error:
            # The process's own lack says nothing about the engine.
            if not self.up:
                self.trouble = error.message
            return
        except EngineError as error:
            self._went_down(error.message)
        else:
            self._is_up()
        self.asked.set()

    async def _meet(self) -> None:
        """Ask an engine that has answered for the first time what it is and what it runs."""
        engine = self._world.engine
        info = await engine.info()
        containers = await engine.list_containers(self._world.manager_id)
        inspect = engine.inspect if self._swarm is None else self._swarm.itself
        itself = [(name, await inspect(name)) for name in self._own_names]
        # A container may merely be named like this host: only an id proves that it is us.
        own = [facts for name, facts in itself if facts is not None and facts.id.startswith(name)]
        situation = self._situation = _situation(engine.url, info, own)
        self._take(containers)
        # Where not all may run, those of higher priority are the first to be started.
        supervisors = sorted(self._supervisors(), key=lambda one: -one.spec.priority)
        for supervisor in supervisors:
            self._introduce(supervisor, situation)
        for supervisor in supervisors:  # once those that run already have their places
            if supervisor.spec.prewarm:
                self._capacity.prewarm(supervisor)

    def _introduce(self, supervisor: Supervisor, situation: _Situation) -> None:
        supervisor.reach = self._reach_of(supervisor, situation)
        supervisor.first_listing(self._containers.get(supervisor.id))

    def _reach_of(self, supervisor: Supervisor, situation: _Situation) -> Reach | None:
        if self._swarm is not None:
            is_on_network = self._swarm.network in situation.networks
            return service_reach(self._swarm.reach, is_on_network=is_on_network)
        template = supervisor.spec.template
        return choose_reach(
            template.reach if template else "auto",
            in_container=situation.in_container,
            direct=situation.direct,
            elsewhere=situation.elsewhere,
        )

    def _supervisors(self) -> list[Supervisor]:
        """Return the instances that this engine runs."""
        return [one for one in self._fleet.supervisors() if one.spec.driver is self._driver]

    def _is_up(self) -> None:
        if self.up:
            return
        self.up = True
        self.trouble = ""
        where = self._world.engine.url
        detail = where if self._swarm is None else f"Docker Swarm at {where}"
        self._world.journal.record("engine_up", detail=detail)
        self._tell_all()
        self.came_up.set()
        self._resync.set()

    def _went_down(self, message: str) -> None:
        if self.up or message != self.trouble:
            self._world.journal.record("engine_down", reason=Reason.ENGINE_UNAVAILABLE, detail=message)
        self.trouble = message
        if self.up:
            self.up = False
            self.came_up.clear()
            if self._following is not None:
                self._following.cancel()  # a connection that was cut without a word would stay silent
            self._tell_all()

    def _tell_all(self) -> None:
        for supervisor in self._supervisors():
            supervisor.engine_changed(up=self.up)

    # --- events ---

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
                self._hint(event)
        except EngineUnreachableError:
            pass  # the ping says whether the engine is gone
        except EngineError as error:
            # Something in between forbids it: listings find everything too, only later.
            if error.message != self._refusal:
                self._world.journal.record("events_refused", detail=error.message)
            self._refusal = error.message
            await asyncio.sleep(self._resync_interval_s)

    def _hint(self, event: EngineEvent) -> None:
        instance = self._fleet.get(event.instance) if event.instance in self._fleet else None
        if isinstance(instance, Supervisor) and instance.spec.driver is self._driver:
            instance.hint(event)
        if event.action in _RELISTED or instance is None:
            self._resync.set()

    # --- listings ---

    async def _list_forever(self) -> None:
        while True:
            await self.came_up.wait()
            self._resync.clear()
            try:
                containers = await self._world.engine.list_containers(self._world.manager_id)
            except EngineError:
                await asyncio.sleep(self._probe_interval_s / 4)
                continue
            self._take(containers)
            for supervisor in self._supervisors():
                supervisor.compare(self._containers.get(supervisor.id))
            await happens(self._resync, self._resync_interval_s)

    def _take(self, containers: tuple[ContainerFacts, ...]) -> None:
        manager_id = self._world.manager_id
        owner = self._world.owner
        if owner is not None:  # those of another state directory are none of ours
            containers = tuple(facts for facts in containers if owner.owns(facts))
        named = {container_name(manager_id, one.id): one.id for one in self._supervisors()}
        self._containers = {named[facts.name]: facts for facts in containers if facts.name in named}
        known = {orphan.id: orphan.name for orphan in self.orphans}
        self.orphans = find_orphans(
            containers,
            manager_id=manager_id,
            is_configured=set(named.values()).__contains__,
            removal="docker rm -f" if self._swarm is None else "docker service rm",
        )
        for orphan in self.orphans:
            if known.get(orphan.id) != orphan.name:
                self._world.journal.record(
                    "unknown_container", detail=f"{orphan.name}: {orphan.why}; `{orphan.remedy}` removes it"
                )


def _situation(url: str, info: EngineInfo, own: Sequence[ContainerFacts]) -> _Situation:
    """Return the ways to the containers of an engine; `own` is the daemon's container, if it runs in one."""
    local = url.startswith("unix://")
    return _Situation(
        in_container=bool(own),
        direct=local and not info.desktop and not info.rootless,
        elsewhere=not local and not is_loopback(urlsplit(url).hostname or ""),
        networks=tuple(network for facts in own for network in facts.networks or ()),
    )
