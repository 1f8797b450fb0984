"""The number of instances that may run: places, eviction, and instances that wait for a place."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from manager.domain.backoff import STABLE_S
from manager.domain.capacity import (
    AwaitEnd,
    CannotStart,
    Evict,
    NoPlace,
    Occupant,
    PlaceFree,
    place_for,
    running,
)
from manager.domain.container import container_name, is_ours
from manager.domain.instance import Driver, Explanation
from manager.domain.ownership import whose
from manager.errors import (
    LimitReachedError,
    ManagerError,
    Reason,
    StartFailedError,
    UnavailableError,
)
from manager.services.instances.container_run import happens

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterator

    from manager.domain.capacity import Verdict
    from manager.services.instances.fleet import Fleet
    from manager.services.instances.supervisor import Supervisor
    from manager.services.world import World


class Capacity:
    """Owns the places of `max_running`. Requests, operators and schedules get one by the same rule.

    The rule is `domain.capacity.place_for`. A start with the daemon (`prewarm`) stops nothing: it waits.

    Args:
        world: the engine and the journal.
        fleet: the instances.
        max_running: how many instances with containers may run at a time, None for any number.
        recheck_s: how soon a place that has become free is found by instances that wait for one.

    Attributes:
        stopped_by_operator: instances that an operator or a schedule has stopped and none has started since.
    """

    def __init__(self, world: World, fleet: Fleet, *, max_running: int | None, recheck_s: float) -> None:
        self._world = world
        self._fleet = fleet
        self._max_running = max_running
        self._recheck_s = recheck_s
        self._turn = asyncio.Lock()
        self._promised: Counter[str] = Counter()
        self._prewarms: dict[str, None] = {}
        self._begun: dict[str, asyncio.Task[None] | None] = {}
        self._news = asyncio.Event()
        self._is_closed = False
        self.stopped_by_operator: set[str] = set()

    def reconfigure(self, max_running: int | None) -> None:
        """Take over a new limit. What runs beyond it goes on."""
        self._max_running = max_running
        self._news.set()

    # --- places ---

    def may_run(self, instance_id: str) -> None:
        """Raise LimitReachedError unless one more instance may run; nothing is stopped for it."""
        self._refuse_at_the_end(instance_id)
        holders = running(instance_id, self._occupants(), self._promised)
        if self._max_running is not None and len(holders) >= self._max_running:
            raise self._full(instance_id, NoPlace(holders))

    @asynccontextmanager
    async def place_for(
        self, instance_id: str, *, keep: Collection[str] = (), explicit: bool = False
    ) -> AsyncIterator[None]:
        """Stop another instance where `max_running` is reached. The place is reserved until this is left.

        Args:
            instance_id: the instance that is started while this is held.
            keep: instances that are not to be stopped.
            explicit: an operator asks: earlier failures are no obstacle.

        Raises:
            LimitReachedError: no other instance may be stopped.
            StartFailedError: the instance would not start; nothing was stopped.
            ManagerError: the stop failed.
        """
        self._refuse_at_the_end(instance_id)
        with ExitStack() as stack:
            async with self._turn:  # many may want a place at once, and the same one
                stack.enter_context(self._promise(instance_id))
                await self._make_place(instance_id, set(keep), explicit=explicit)
            yield

    # --- what operators and schedules ask for ---

    async def start(self, instance_id: str) -> bool:
        """Have an instance running and ready; False when it already was.

        Raises:
            ManagerError: it cannot be started, or its start failed.
        """
        supervisor = self._fleet.managed(instance_id)
        self.stopped_by_operator.discard(instance_id)
        try:
            return await supervisor.start()
        except LimitReachedError:
            async with self.place_for(instance_id, explicit=True):
                return await supervisor.start()

    def begin_start(self, instance_id: str) -> bool:
        """Ask for an instance to run, without waiting; False when it already does.

        Where another one has to be stopped first, `waiting` says so meanwhile.

        Raises:
            ManagerError: it cannot be started now; nothing was changed.
        """
        supervisor = self._fleet.managed(instance_id)
        self.stopped_by_operator.discard(instance_id)
        try:
            return supervisor.begin_start()
        except LimitReachedError:
            if instance_id not in self._begun:
                # Images are not looked at here: that takes a call of the engine.
                verdict = self._verdict(instance_id, obstacle=supervisor.why_unusable, absent=())
                self._refuse(instance_id, verdict)
                self._begun[instance_id] = None
                self._news.set()
            return True

    async def stop(self, instance_id: str, *, force: bool = False) -> bool:
        """Have an instance stopped; False when it already was and did not wait for a place."""
        supervisor = self._fleet.managed(instance_id)
        waited = self.withdraw(instance_id)
        self.stopped_by_operator.add(instance_id)
        return await supervisor.stop(force=force) or waited

    def begin_stop(self, instance_id: str, *, force: bool = False) -> bool:
        """Ask for an instance to be stopped, without waiting; False as `stop`."""
        supervisor = self._fleet.managed(instance_id)
        waited = self.withdraw(instance_id)
        self.stopped_by_operator.add(instance_id)
        return supervisor.begin_stop(force=force) or waited

    async def stop_all(self) -> None:
        """Stop every instance of ours, and start none any more. A failed stop is left to the next daemon."""
        self._is_closed = True
        for instance_id in (*self._prewarms, *self._begun):
            self.withdraw(instance_id)
        supervisors = self._fleet.supervisors()
        stops = (supervisor.stop() for supervisor in supervisors)
        for supervisor, error in zip(
            supervisors, await asyncio.gather(*stops, return_exceptions=True), strict=True
        ):
            if isinstance(error, ManagerError):
                self._world.journal.record("stop_failed", instance=supervisor.id, detail=error.message)
            elif isinstance(error, BaseException):
                raise error

    def prewarm(self, supervisor: Supervisor) -> None:
        """Start an instance with the daemon, now or when a place is free. A sweep starts nothing."""
        if self._world.resume_idle_clock:
            return
        if self._has_place(supervisor.id):
            supervisor.prewarm()
            return
        self._prewarms[supervisor.id] = None
        self._news.set()
        self._world.journal.record(
            "prewarm_waits",
            instance=supervisor.id,
            reason=Reason.OVERLOADED,
            detail=self._limit(running(supervisor.id, self._occupants(), self._promised)),
        )

    def waiting(self, instance_id: str) -> Explanation | None:
        """Return why an instance that is to run has not been started yet; None when it does not wait."""
        if instance_id in self._begun:
            what = "another instance is stopped for it"
        elif instance_id in self._prewarms:
            what = "it starts when a place is free"
        else:
            return None
        holders = running(instance_id, self._occupants(), self._promised)
        return Explanation(Reason.OVERLOADED, f"{self._limit(holders)}; {what}")

    async def run(self) -> None:
        """Start the instances that wait for a place, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                if self._prewarms:
                    await happens(self._news, self._recheck_s)
                else:
                    await self._news.wait()
                self._news.clear()
                for instance_id, task in self._begun.items():
                    if task is None:
                        self._begun[instance_id] = tasks.create_task(
                            self._start_later(instance_id), name=f"place for {instance_id}"
                        )
                for instance_id in [*self._prewarms]:
                    if self._has_place(instance_id):
                        del self._prewarms[instance_id]
                        self._fleet.managed(instance_id).prewarm()

    # --- helpers, in call order ---

    def _refuse_at_the_end(self, instance_id: str) -> None:
        if self._is_closed:
            raise LimitReachedError("the manager ends, and starts nothing any more", instance=instance_id)

    async def _make_place(self, instance_id: str, keep: set[str], *, explicit: bool) -> None:
        while not self._has_place(instance_id):
            obstacle, absent = await self._look(instance_id, explicit=explicit)
            verdict = self._verdict(instance_id, obstacle=obstacle, absent=absent, keep=keep)
            match verdict:
                case AwaitEnd(instance=other):
                    await self._fleet.managed(other).stopped()
                case Evict(instance=other):
                    if not await self._fleet.managed(other).make_way(f"to make way for {instance_id}"):
                        keep.add(other)
                case _:
                    self._refuse(instance_id, verdict)

    def _has_place(self, instance_id: str) -> bool:
        verdict = self._verdict(instance_id, obstacle=None, absent=())
        return isinstance(verdict, PlaceFree)

    async def _look(self, instance_id: str, *, explicit: bool) -> tuple[Explanation | None, frozenset[str]]:
        """Return why the instance would not start, and the instances whose image their engine does not have.

        Raises:
            EngineError: the engine cannot be asked.
        """
        supervisor = self._fleet.managed(instance_id)
        asked = [one for one in self._fleet.supervisors() if one is supervisor or one.occupies]
        wanted = {(one.engine, _image(one)) for one in asked}
        present = {pair for pair in wanted if await pair[0].has_image(pair[1])}
        absent = frozenset([one.id for one in asked if (one.engine, _image(one)) not in present])
        obstacle = supervisor.why_unusable or (None if explicit else supervisor.why_failing)
        if obstacle is None and instance_id in absent:
            message = (
                f"{instance_id} needs the image {_image(supervisor)}; pull it with `ollama-manager pull`"
            )
            obstacle = Explanation(Reason.IMAGE_MISSING, message)
        if obstacle is None:
            obstacle = await self._name_conflict(supervisor)
        return obstacle, absent

    async def _name_conflict(self, supervisor: Supervisor) -> Explanation | None:
        manager_id, instance_id = self._world.manager_id, supervisor.id
        facts = await supervisor.engine.inspect(container_name(manager_id, instance_id))
        if facts is None or is_ours(
            facts, manager_id=manager_id, instance_id=instance_id, owner=self._world.owner
        ):
            return None
        message = whose(
            facts,
            manager_id=manager_id,
            is_of_manager=is_ours(facts, manager_id=manager_id, instance_id=instance_id),
            is_service=supervisor.spec.driver is Driver.SWARM,
        )
        return Explanation(Reason.NAME_CONFLICT, message)

    def _verdict(
        self,
        instance_id: str,
        *,
        obstacle: Explanation | None,
        absent: Collection[str],
        keep: Collection[str] = (),
    ) -> Verdict:
        return place_for(
            instance_id,
            self._occupants(absent),
            max_running=self._max_running,
            promised=self._promised,
            keep=keep,
            obstacle=obstacle,
        )

    def _occupants(self, absent: Collection[str] = ()) -> list[Occupant]:
        return [
            Occupant(
                id=one.id,
                priority=one.spec.priority,
                occupies=one.occupies,
                is_ending=one.ends,
                in_use=one.in_flight > 0,
                pinned=one.pinned,
                unused_since=one.unused_since,
                may_return=one.why_unusable is None and one.id not in absent,
            )
            for one in self._fleet.supervisors()
        ]

    def _refuse(self, instance_id: str, verdict: Verdict) -> None:
        """Raise the error of a verdict that gives no place.

        Raises:
            LimitReachedError: no other instance may be stopped.
            StartFailedError: the instance would not start.
        """
        if isinstance(verdict, NoPlace):
            raise self._full(instance_id, verdict)
        if isinstance(verdict, CannotStart):
            why = verdict.why
            raise StartFailedError(
                f"{why.message}; no other instance is stopped for {instance_id} while it cannot start",
                reason=why.code,
                instance=instance_id,
                log_tail=why.log_tail,
                retry_after_s=STABLE_S if why.log_tail else None,  # a missing image does not come by waiting
            )

    def _full(self, instance_id: str, verdict: NoPlace) -> LimitReachedError:
        message = self._limit(verdict.running)
        if verdict.not_returning:
            message += f"; not stopped, for it could not start again: {', '.join(verdict.not_returning)}"
        return LimitReachedError(message, instance=instance_id)

    def _limit(self, holders: Collection[str]) -> str:
        return f"lifecycle.max_running is {self._max_running}; running already: {', '.join(holders)}"

    @contextmanager
    def _promise(self, instance_id: str) -> Iterator[None]:
        """Count an instance as running before it is."""
        self._promised[instance_id] += 1
        try:
            yield
        finally:
            self._promised[instance_id] -= 1
            if not self._promised[instance_id]:
                del self._promised[instance_id]

    async def _start_later(self, instance_id: str) -> None:
        try:
            async with self.place_for(instance_id, explicit=True):
                self._fleet.managed(instance_id).begin_start()
        except ManagerError as error:
            reason = error.reason if isinstance(error, UnavailableError) else Reason.OVERLOADED
            self._world.journal.record(
                "start_refused", instance=instance_id, reason=reason, detail=error.message
            )
        finally:
            if self._begun.get(instance_id) is asyncio.current_task():
                del self._begun[instance_id]

    def withdraw(self, instance_id: str) -> bool:
        """Take back a start that waits for a place; False when none does."""
        if instance_id in self._prewarms:
            del self._prewarms[instance_id]
            return True
        if instance_id not in self._begun:
            return False
        task = self._begun.pop(instance_id)
        if task is not None:
            task.cancel()
        return True


def _image(supervisor: Supervisor) -> str:
    template = supervisor.spec.template
    return "" if template is None else template.image
