"""All instances together: who there is, how many may run, sweeps and schedules."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from manager.domain.container import LABEL_INSTANCE, choose_reach, container_name
from manager.domain.instance import Phase
from manager.domain.wording import listed
from manager.errors import (
    ConfigurationError,
    ConflictError,
    EngineUnreachableError,
    LimitReachedError,
    ManagerError,
    UnknownInstanceError,
)
from manager.services.instances.engine_watch import EngineWatch
from manager.services.instances.supervisor import Supervisor
from manager.settings.addresses import is_loopback

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator

    from manager.domain.instance import ContainerFacts, InstanceSpec
    from manager.services.instances.instance import Instance, View
    from manager.services.ports import EngineEvent, EngineInfo, Scheduler
    from manager.services.world import World


_SETTLE_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Schedule:
    """One cron line and what it does; `instance` is None for a sweep of all."""

    cron: str
    action: Literal["start", "stop", "reap"]
    instance: str | None
    timezone: str | None


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep did to one instance, and why."""

    instance: str
    action: Literal["stopped", "would_stop", "kept", "failed"]
    detail: str


class Fleet:
    """Owns the set of instances. Everyone else reads views, which are copies.

    Args:
        members: the configured instances, in order.
        find_member: makes the instance of a card that was found by itself; raises ConfigurationError where
            the configuration has no template for it.
        max_running: how many container instances may run at a time, None for any number.
        own_names: names under which the engine would know the daemon, if it ran in one of its containers.
    """

    def __init__(
        self,
        world: World,
        *,
        members: Callable[[Fleet], Iterable[Instance]],
        find_member: Callable[[Fleet, str], Instance],
        schedules: tuple[Schedule, ...],
        max_running: int | None,
        own_names: tuple[str, ...],
        probe_interval_s: float,
        resync_interval_s: float,
    ) -> None:
        self._world = world
        self._find_member = find_member
        self._schedules = schedules
        self._scheduler: Scheduler | None = None
        self._max_running = max_running
        self._in_container = False
        self._probe_interval_s = probe_interval_s
        self._resync_interval_s = resync_interval_s
        self._direct = True
        self._elsewhere = False
        self._containers: dict[str, ContainerFacts] = {}
        self._strangers: set[str] = set()
        self._unusable: set[str] = set()
        self._also: list[tuple[str, Callable[[], Coroutine[None, None, None]]]] = []
        self._ticks: asyncio.Queue[Schedule | None] = asyncio.Queue()
        self._tasks: asyncio.TaskGroup | None = None
        self._instances: dict[str, Instance] = {}
        self._is_known = False
        self._making_way = asyncio.Lock()
        self._promised: Counter[str] = Counter()
        self.engine = EngineWatch(
            world,
            self,
            own_names=own_names,
            probe_interval_s=probe_interval_s,
            resync_interval_s=resync_interval_s,
        )
        for instance in members(self):
            self._instances[instance.id] = instance

    # --- who there is ---

    def get(self, instance_id: str) -> Instance:
        """The instance of that id.

        Raises:
            UnknownInstanceError: there is none; the message names those there are.
        """
        try:
            return self._instances[instance_id]
        except KeyError:
            message = f"there is no instance {instance_id!r}; there is: {listed(self._instances)}"
            raise UnknownInstanceError(message, instance=instance_id) from None

    def managed(self, instance_id: str) -> Supervisor:
        """The instance of that id, which must be one with a container.

        Raises:
            ConflictError: it is an external one.
        """
        instance = self.get(instance_id)
        if not isinstance(instance, Supervisor):
            raise ConflictError(
                f"{instance_id} is external: it has no container of ours", instance=instance_id
            )
        return instance

    def instances(self) -> tuple[Instance, ...]:
        return tuple(self._instances.values())

    def views(self) -> tuple[View, ...]:
        return tuple(instance.view() for instance in self._instances.values())

    def images(self) -> tuple[str, ...]:
        """The images that the instances are made of, each once."""
        templates = (instance.spec.template for instance in self._instances.values())
        return tuple(dict.fromkeys(template.image for template in templates if template is not None))

    def supervisors(self) -> list[Supervisor]:
        return [instance for instance in self._instances.values() if isinstance(instance, Supervisor)]

    def may_run(self, instance_id: str) -> None:
        """Raise LimitReachedError unless one more instance may run."""
        running = [s.id for s in self.supervisors() if s.occupies and s.id != instance_id]
        running += [id_ for id_ in self._promised if id_ != instance_id and id_ not in running]
        if self._max_running is not None and len(running) >= self._max_running:
            raise LimitReachedError(
                f"lifecycle.max_running is {self._max_running}; running already: {', '.join(running)}",
                instance=instance_id,
            )

    @asynccontextmanager
    async def place_for(self, instance_id: str, *, keep: Collection[str] = ()) -> AsyncIterator[None]:
        """Where `max_running` is reached, stop another instance; nobody else gets its place meanwhile.

        One that ends anyway is waited for. Otherwise, of those that nobody uses and that are not pinned, the
        one of the lowest priority goes, and of these the one that was used least recently.

        Args:
            instance_id: what is to be started while this is held.
            keep: instances that are not to be stopped.

        Raises:
            LimitReachedError: all others are used.
            ManagerError: the stop failed.
        """
        with ExitStack() as stack:
            async with self._making_way:  # in their turn: many may want a place, and the same one
                stack.enter_context(self._promise(instance_id))
                while not self._has_place(instance_id):
                    await self._stop_another(instance_id, keep)
            yield

    @contextmanager
    def _promise(self, instance_id: str) -> Iterator[None]:
        """Whoever else would be started has to count this one as running already."""
        self._promised[instance_id] += 1
        try:
            yield
        finally:
            self._promised[instance_id] -= 1
            if not self._promised[instance_id]:
                del self._promised[instance_id]

    def _has_place(self, instance_id: str) -> bool:
        if self.managed(instance_id).occupies:
            return True
        try:
            self.may_run(instance_id)
        except LimitReachedError:
            return False
        return True

    async def _stop_another(self, instance_id: str, keep: Collection[str]) -> None:
        others = [one for one in self.supervisors() if one.id != instance_id]
        for one in others:
            if one.ends and not one.in_flight and not one.pinned:
                await one.stopped()
                return
        unused = [
            (one.spec.priority, since, one)
            for one in others
            if (since := one.unused_since) is not None and one.id not in keep
        ]
        for _, _, one in sorted(unused, key=lambda entry: entry[:2]):
            if await one.make_way(f"to make way for {instance_id}"):
                return
        self.may_run(instance_id)

    def refuse_without_engine(self) -> None:
        """Raise EngineUnreachableError unless the engine can be asked."""
        if not self.engine.up:
            raise EngineUnreachableError(self.engine.trouble)

    def why_not_ready(self) -> tuple[str, ...]:
        """What keeps the daemon from being usable; nothing when it is."""
        reasons = []
        if not self.engine.up:
            reasons.append(f"engine: {self.engine.trouble}")
        if not self._world.gpus.snapshot.attempted:
            reasons.append("gpus: NVML has not been asked yet")
        if (trouble := self._world.journal.trouble) is not None:
            reasons.append(f"registry: {trouble}")
        return tuple(reasons)

    @property
    def is_known(self) -> bool:
        """Whether the engine and each external server have answered or failed once."""
        if not self._is_known:
            waiting = (one for one in self._instances.values() if not isinstance(one, Supervisor))
            engine = self.engine.asked or not self.supervisors()
            self._is_known = engine and all(one.is_probed for one in waiting)
        return self._is_known

    async def known(self, *, within_s: float) -> None:
        """Wait until `is_known`, at most for `within_s`."""
        deadline = self._world.now() + within_s
        while not self.is_known and self._world.now() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_SETTLE_POLL_S)

    # --- what goes on by itself ---

    async def run(self) -> None:
        """Everything, until cancelled. An error here is a defect and ends the daemon."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for instance in self._instances.values():
                tasks.create_task(instance.run(), name=f"instance {instance.id}")
            tasks.create_task(self.engine.run(), name="engine watch")
            tasks.create_task(self._watch_gpus(), name="gpus")
            tasks.create_task(self._world.journal.run(), name="journal")
            tasks.create_task(self._work_off_ticks(), name="schedules")
            tasks.create_task(self._save_forever(), name="saving")
            for name, work in self._also:
                tasks.create_task(work(), name=name)

    def also_run(self, name: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Have something else go on as long as the fleet does; to be called before `run`."""
        self._also.append((name, work))

    def schedule(self, scheduler: Scheduler) -> None:
        """Register the sweep and the configured schedules; a tick only posts what is to be done."""
        scheduler.every("sweep", self._probe_interval_s, lambda: self._ticks.put_nowait(None))
        self._scheduler = scheduler
        for number, entry in enumerate(self._schedules):
            self._add_schedule(scheduler, number, entry)

    def _add_schedule(self, scheduler: Scheduler, number: int, entry: Schedule) -> None:
        name = f"schedules[{number}]"
        scheduler.cron(name, entry.cron, entry.timezone, lambda: self._ticks.put_nowait(entry))

    def reconfigure(
        self, specs: Iterable[InstanceSpec], schedules: tuple[Schedule, ...], max_running: int | None
    ) -> None:
        """Take over a new configuration of the same instances.

        Args:
            specs: of all instances; only what may change while they run differs.
            schedules: in place of the old ones. One that has not changed keeps its next time.
            max_running: what runs beyond it goes on.
        """
        for spec in specs:
            self.get(spec.id).reconfigure(spec)
        self._max_running = max_running
        before, self._schedules = self._schedules, schedules
        for number, (old, new) in enumerate(zip_longest(before, schedules)):
            if self._scheduler is not None and old != new:
                if old is not None:
                    self._scheduler.remove(f"schedules[{number}]")
                if new is not None:
                    self._add_schedule(self._scheduler, number, new)
        self._world.revision.advance()

    async def settled(self, *, within_s: float) -> None:
        """Wait until the engine was listed and every container found was adopted, as far as that goes.

        Raises:
            UnavailableError: the engine has not answered within `within_s`.
        """
        deadline = self._world.now() + within_s
        try:
            async with asyncio.timeout(within_s):
                await self.engine.came_up.wait()
        except TimeoutError:
            raise EngineUnreachableError(self.engine.trouble) from None
        while any(s.busy for s in self.supervisors()) and self._world.now() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_SETTLE_POLL_S)

    async def stop_all(self) -> None:
        """Stop every instance of ours; one that cannot be stopped is left to the next daemon."""
        stops = (supervisor.stop() for supervisor in self.supervisors())
        for supervisor, error in zip(
            self.supervisors(), await asyncio.gather(*stops, return_exceptions=True), strict=True
        ):
            if isinstance(error, ManagerError):
                self._world.journal.record("stop_failed", instance=supervisor.id, detail=error.message)
            elif isinstance(error, BaseException):
                raise error

    async def save(self) -> None:
        for supervisor in self.supervisors():
            await supervisor.save_use()

    # --- what the engine says ---

    def engine_found(
        self, info: EngineInfo, containers: tuple[ContainerFacts, ...], *, in_container: bool
    ) -> None:
        self._in_container = in_container
        url = self._world.engine.url
        local = url.startswith("unix://")
        self._direct = local and not info.desktop and not info.rootless
        self._elsewhere = not local and not is_loopback(urlsplit(url).hostname or "")
        self._containers = self._by_instance(containers)
        # Where not all may run, those of higher priority are the first to be started.
        for supervisor in sorted(self.supervisors(), key=lambda s: -s.spec.priority):
            self._introduce(supervisor)

    def engine_listed(self, containers: tuple[ContainerFacts, ...]) -> None:
        self._containers = self._by_instance(containers)
        for supervisor in self.supervisors():
            supervisor.compare(self._containers.get(supervisor.id))
        for facts in containers:
            instance = facts.labels.get(LABEL_INSTANCE, "")
            if instance not in self._instances and facts.id not in self._strangers:
                self._strangers.add(facts.id)
                self._world.journal.record(
                    "unknown_container",
                    detail=f"{facts.name} is labelled as instance {instance!r}, which is not configured; "
                    f"`docker rm -f {facts.name}` removes it",
                )

    def engine_changed(self, *, up: bool) -> None:
        for supervisor in self.supervisors():
            supervisor.engine_changed(up=up)

    def engine_hint(self, event: EngineEvent) -> None:
        instance = self._instances.get(event.instance)
        if isinstance(instance, Supervisor):
            instance.hint(event)

    def _by_instance(self, containers: tuple[ContainerFacts, ...]) -> dict[str, ContainerFacts]:
        named = {container_name(self._world.manager_id, id_): id_ for id_ in self._instances}
        return {named[facts.name]: facts for facts in containers if facts.name in named}

    def _introduce(self, supervisor: Supervisor) -> None:
        template = supervisor.spec.template
        wanted = template.reach if template else "auto"
        supervisor.reach = choose_reach(
            wanted, in_container=self._in_container, direct=self._direct, elsewhere=self._elsewhere
        )
        supervisor.first_listing(self._containers.get(supervisor.id))
        if supervisor.spec.prewarm:
            supervisor.prewarm()

    async def _watch_gpus(self) -> None:
        while True:
            await asyncio.sleep(self._probe_interval_s)
            await self._world.gpus.refresh()
            for instance_id in self._world.gpus.instance_ids():
                if instance_id not in self._instances and instance_id not in self._unusable:
                    self._join(instance_id)

    def _join(self, instance_id: str) -> None:
        """Take a card that was found while running into the fleet."""
        try:
            instance = self._find_member(self, instance_id)
        except ConfigurationError as error:
            # A card that somebody plugs in must not end a daemon that works without it.
            self._unusable.add(instance_id)
            self._world.journal.record("found_unusable", instance=instance_id, detail=error.message)
            return
        self._instances[instance.id] = instance
        self._world.revision.advance()
        self._world.journal.record("found", instance=instance.id, detail=str(instance.view().gpu_uuid))
        if isinstance(instance, Supervisor) and self.engine.found:
            self._introduce(instance)
            instance.engine_changed(up=self.engine.up)
        if self._tasks is not None:
            self._tasks.create_task(instance.run(), name=f"instance {instance.id}")

    # --- sweeps and schedules ---

    async def reap(self, *, dry_run: bool = False) -> tuple[Swept, ...]:
        """One sweep of everything idle past its TTL; returns what became of each container instance.

        Raises:
            EngineUnreachableError: nothing can be stopped now.
        """
        self.refuse_without_engine()
        return tuple(
            await asyncio.gather(*(self._sweep(supervisor, dry_run) for supervisor in self.supervisors()))
        )

    async def _sweep(self, supervisor: Supervisor, dry_run: bool) -> Swept:
        if not supervisor.idle:
            return Swept(supervisor.id, "kept", _why_kept(supervisor.view()))
        if dry_run:
            return Swept(supervisor.id, "would_stop", f"idle past its TTL of {supervisor.ttl_s:g} s")
        try:
            if not await supervisor.stop_if_idle():
                return Swept(supervisor.id, "kept", "used just now")
            await supervisor.stopped()
        except ManagerError as error:
            return Swept(supervisor.id, "failed", error.message)
        return Swept(supervisor.id, "stopped", f"idle past its TTL of {supervisor.ttl_s:g} s")

    async def _work_off_ticks(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            sweeping: dict[str, asyncio.Task[Swept]] = {}
            while True:
                tick = await self._ticks.get()
                if tick is None or tick.action == "reap":
                    for supervisor in (one for one in self.supervisors() if one.idle):
                        # A stop that hangs must not delay the others, nor be asked for twice.
                        if supervisor.id not in sweeping or sweeping[supervisor.id].done():
                            sweeping[supervisor.id] = tasks.create_task(self._sweep(supervisor, False))
                else:
                    tasks.create_task(self._run_schedule(tick))

    async def _run_schedule(self, entry: Schedule) -> None:
        try:
            supervisor = self.managed(str(entry.instance))
            changed = supervisor.begin_start() if entry.action == "start" else supervisor.begin_stop()
        except ManagerError as error:
            self._world.journal.record(
                "schedule_failed", instance=entry.instance, detail=f"{entry.cron}: {error.message}"
            )
        else:
            if changed:
                self._world.journal.record(
                    "scheduled", instance=entry.instance, detail=f"{entry.action} by {entry.cron!r}"
                )

    async def _save_forever(self) -> None:
        while True:
            await asyncio.sleep(self._resync_interval_s)
            await self.save()


def _why_kept(view: View) -> str:
    if view.phase is not Phase.READY:
        return view.phase.value
    if view.in_flight:
        return f"{view.in_flight} open leases"
    if view.pinned:
        return "pinned"
    if view.ttl_s <= 0:
        return "its TTL is 0: it is never stopped for being idle"
    return f"used recently; {view.ttl_remaining_s or 0:.0f} s left of {view.ttl_s:g} s"
