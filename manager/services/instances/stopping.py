"""Stops of one instance: drain, end, remove, and the start that was requested meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from manager.domain.condition import (
    DiedInDrain,
    DrainBegun,
    RunEnded,
    StopBegun,
    StopFailed,
    Stopped,
)
from manager.domain.instance import Explanation, Phase, Target
from manager.errors import ConflictError, LimitReachedError, ManagerError
from manager.services.instances.container_run import happens
from manager.services.instances.workings import reason_of
from manager.services.waiters import Waiters

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.services.instances.workings import Workings


# How often other gateways are looked for.
_OTHERS_S = 0.5


class Stopping:
    """Stops and removes the container.

    Args:
        workings: the container and what acts on it.
        may_run: raises when no further instance may run.
        cut_leases: called when the container is ended although leases are open.

    Attributes:
        detail: why it is stopped, for the journal.
        stoppers: the callers that wait for the stop.
    """

    def __init__(
        self, workings: Workings, may_run: Callable[[str], None], cut_leases: Callable[[], None]
    ) -> None:
        self._w = workings
        self._may_run = may_run
        self._cut_leases = cut_leases
        self._force = False
        self._kill_at_once = False
        self._news = asyncio.Event()
        self.detail = "begun before a restart"
        self.stoppers = Waiters()

    def force(self) -> None:
        """Do not wait for open leases, or no longer."""
        self._force = True
        self._news.set()

    def kill_at_once(self) -> None:
        """Nobody can have work in a container that was never ready: kill it without SIGTERM."""
        self._kill_at_once = True

    def nudge(self) -> None:
        """A lease was released, or the container may have ended."""
        self._news.set()

    async def once(self) -> None:
        """Carry out the requested stop. A failure settles the waiting callers; it is not raised."""
        w = self._w
        try:
            # A stop goes on even if it cannot be stored: at worst the next daemon adopts what is left.
            await w.store.save_quietly()
            await w.world.on_step(w.id, "stored")
            await self._drain()
            if w.condition.state.ends:
                await self._end_container()
        except ManagerError as error:
            self._end_failed(error)
        else:
            if w.condition.state.phase is Phase.STOPPING:
                self._end()
            else:
                self._end_kept()
        await w.store.save_quietly()

    async def _drain(self) -> None:
        """Wait for the open leases; no new ones are given until the next start.

        The wait has a limit unless the stop is patient. A patient one can be taken back or become plain.
        """
        w, limit_s = self._w, self._w.spec.limits.drain_timeout_s
        state = w.condition.state
        if not state.ends or state.phase is not Phase.READY or not self._is_used() or self._force:
            return
        w.condition.apply(DrainBegun())
        w.world.journal.record("draining", instance=w.id, detail=self._open_leases())
        recall_at = w.world.now() + limit_s  # when a patient stop tells that it still waits
        deadline: float | None = None
        while w.condition.state.ends and self._is_used() and not self._force:
            now = w.world.now()
            if not w.condition.state.is_patient:
                deadline = now + limit_s if deadline is None else deadline
                if now >= deadline:
                    break
            elif now >= recall_at:
                recall_at = float("inf")
                self._tell_that_it_waits()
            self._news.clear()
            # A lost event must not cost the whole time: inspect now and then.
            until = min(recall_at if deadline is None else deadline, now + w.spec.limits.resync_interval_s)
            is_news = await happens(self._news, until - now)
            if (w.signals.news.is_set() or not is_news) and await self._has_died():
                if w.condition.state.phase is Phase.DRAINING:
                    w.condition.apply(DiedInDrain())
                break
        await w.world.on_step(w.id, "drained")

    def _tell_that_it_waits(self) -> None:
        w = self._w
        how = f"none is cut off; `ollama-manager stop --force {w.id}` does not wait for them"
        w.world.journal.record("drain_waits", instance=w.id, detail=f"{self._open_leases()}; {how}")

    def _is_used(self) -> bool:
        """Return whether leases are open; a patient stop waits for those of the daemon before, too."""
        w = self._w
        return w.in_flight() > 0 or (w.condition.state.is_patient and w.world.others_work())

    def _open_leases(self) -> str:
        count = self._w.in_flight()
        return f"{count} open leases" if count else "open requests of the daemon that was replaced"

    async def _end_container(self) -> None:
        w, gpus = self._w, self._w.world.gpus
        if not await self._others_are_done():
            return
        if w.in_flight():
            self._cut_leases()
        w.condition.apply(StopBegun())
        w.world.journal.record("stopping", instance=w.id, detail=self.detail)
        held = gpus.holdings(w.id) if w.is_gpu else {}
        async with w.world.locks.hold(w.id):
            await w.run.down(w.name, w.signals, at_once=self._kill_at_once)
        w.world.shares.over(w.id)  # others may start it while the memory of its cards is given back
        w.condition.apply(RunEnded())
        for uuid in await gpus.given_back(held, w.spec.limits.vram_wait_s):
            w.world.journal.record("vram_not_given_back", instance=w.id, detail=uuid)

    async def _others_are_done(self) -> bool:
        """Wait for other gateways as for open leases; return False where the stop was taken back."""
        w = self._w
        deadline = w.world.now() + w.spec.limits.drain_timeout_s
        while not await self._is_alone():
            if self._force or (not w.condition.state.is_patient and w.world.now() >= deadline):
                w.world.journal.record("others_cut", instance=w.id, detail="other gateways still used it")
                return True
            if w.condition.state.phase is Phase.READY:
                w.condition.apply(DrainBegun())
                w.world.journal.record("draining", instance=w.id, detail="other gateways use it")
            self._news.clear()
            await happens(self._news, _OTHERS_S)
            if w.signals.news.is_set() and await self._has_died():
                return True
            if not w.condition.state.ends:
                break
        if w.condition.state.ends:
            return True
        with suppress(ManagerError):  # it is taken again once the database is back
            await w.world.shares.take(w.id)
        return False

    async def _is_alone(self) -> bool:
        try:
            return await self._w.world.shares.alone(self._w.id)
        except ManagerError:
            return False

    async def _has_died(self) -> bool:
        self._w.signals.news.clear()
        container = self._w.condition.state.container
        try:
            return container is None or await self._w.run.has_ended(container.id)
        except ManagerError:
            return False  # the stop that follows finds out

    def _end_kept(self) -> None:
        """The stop was taken back before the container was ended."""
        self._force = False
        self._kill_at_once = False
        taken_back = f"the stop of {self._w.id} was taken back: it is to run on"
        self.stoppers.settle(ConflictError(taken_back, instance=self._w.id))

    def _end(self) -> None:
        w = self._w
        w.condition.apply(Stopped(may_start=self._may_start_again()))
        self._force = False
        self._kill_at_once = False
        w.world.journal.record("stopped", instance=w.id, detail=self.detail)
        self.stoppers.settle()

    def _may_start_again(self) -> bool:
        """Whether the start that was requested during the stop goes ahead: its place may have gone."""
        w, state = self._w, self._w.condition.state
        if state.target is not Target.RUNNING or state.pinned:
            return True
        try:
            # The stop has ended: the instance itself does not count any more.
            self._may_run(w.id)
        except LimitReachedError as error:
            w.condition.starters.settle(error)
            return False
        return True

    def _end_failed(self, error: ManagerError) -> None:
        """The stop stays requested and is tried again. The callers get the error.

        So do those that wait to start afterwards: nobody can tell how long that will take.
        """
        w = self._w
        why = Explanation(reason_of(error), f"it could not be stopped yet: {error.message}")
        w.condition.apply(StopFailed(why))
        error.instance = error.instance or w.id
        self.stoppers.settle(error)
        w.condition.starters.settle(error)
