"""Inspections of one container: what has happened to it without an operation of ours."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from manager.domain.condition import (
    BurialBegun,
    BurialFailed,
    Inspected,
    LogRead,
    LookBegun,
    LookRequested,
)
from manager.domain.instance import ALIVE, Phase
from manager.errors import EngineError, EngineUnreachableError, ManagerError
from manager.services.waiters import Waiters

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.instance import ContainerFacts
    from manager.services.instances.workings import Workings
    from manager.services.ports import EngineEvent

# How long a refused connection is looked into: the engine notices the end of a process a moment later.
_CLOSER_LOOK_S = 1.0
_FIRST_PAUSE_S = 0.05
# Docker 20.10 reports the killed process before the end of the container that it may have been.
_OUT_OF_MEMORY_PAUSE_S = 0.5

_REASONS_TO_LOOK = ("start", "die", "oom", "pause", "unpause", "destroy")
_OPERATION_NEWS = ("die", "destroy", "pause", "unpause")


class Looking:
    """Inspects the container and applies what is found.

    Args:
        workings: the container and what acts on it.
        wake: wakes the loop that carries out inspections.
        on_pause: called with whether the container is paused, after that has changed.
    """

    def __init__(
        self, workings: Workings, wake: Callable[[], None], on_pause: Callable[[bool], None]
    ) -> None:
        self._w = workings
        self._wake = wake
        self._on_pause = on_pause
        self._looked = Waiters()

    def soon(self, in_s: float = 0.0) -> None:
        """Have the container inspected."""
        self._w.condition.apply(LookRequested(in_s))
        self._wake()

    def take_event(self, event: EngineEvent) -> bool:
        """Have the container inspected because of an event; True when the event is about the current one.

        An event says nothing by itself: it may be late, or about an earlier container.
        """
        container = self._w.condition.state.container
        is_current = container is not None and event.container_id == container.id
        if is_current and event.action == "oom":
            self._w.signals.out_of_memory = True
        if is_current and event.action in _OPERATION_NEWS:
            self._w.signals.news.set()
        if event.action in _REASONS_TO_LOOK:
            self.soon(_OUT_OF_MEMORY_PAUSE_S if event.action == "oom" else 0.0)
        return is_current

    def compare(self, listed: ContainerFacts | None) -> None:
        """Have the container inspected when a listing differs from its last inspection."""
        known = self._w.condition.state.container
        if listed is not None and listed.status == "parked":
            listed = None
        if listed is None or known is None:
            differs = listed is not known
        else:
            differs = (listed.id, listed.status, listed.address) != (known.id, known.status, known.address)
        if differs:
            self.soon()

    async def has_gone(self) -> bool:
        """Whether the server is gone, or another one by now; waits a moment for the engine to notice."""
        condition, now = self._w.condition, self._w.world.now
        before = condition.state.usable_endpoint
        deadline = now() + _CLOSER_LOOK_S
        pause_s = _FIRST_PAUSE_S
        while condition.state.usable_endpoint is not None:
            self.soon()
            try:
                async with asyncio.timeout(max(0.0, deadline - now())):
                    await self._looked.outcome()
            except TimeoutError:
                pass  # the engine is slow
            if condition.state.usable_endpoint != before:
                return True
            if now() + pause_s >= deadline:
                return False
            await asyncio.sleep(pause_s)
            pause_s *= 2
        return True

    async def once(self) -> None:
        """Inspect the container and apply what is found."""
        w, condition = self._w, self._w.condition
        condition.apply(LookBegun())
        was_paused = condition.state.paused
        try:
            facts = w.mine(await w.world.engine.inspect(w.name))
            condition.apply(Inspected(facts, out_of_memory=w.signals.out_of_memory))
            # The reason of a service that was scaled to zero went with its task: it is the one that is known.
            has_ended = facts is not None and facts.status not in ALIVE and facts.status != "parked"
            if facts is not None and has_ended and condition.state.phase is Phase.FAILED:
                condition.apply(LogRead(facts, await w.run.log_tail(facts.id)))
        except EngineUnreachableError:
            condition.apply(LookRequested(w.spec.limits.probe_interval_s))
        except EngineError as error:
            w.world.journal.record("look_failed", instance=w.id, detail=error.message)
        finally:
            self._looked.settle()
        if condition.state.paused is not was_paused:
            self._on_pause(condition.state.paused)
        await w.store.save_quietly()

    async def bury(self) -> None:
        """Remove a container that has ended, unless it was started again."""
        w, condition = self._w, self._w.condition
        condition.apply(BurialBegun())
        try:
            async with w.world.locks.hold(w.id):
                facts = w.mine(await w.world.engine.inspect(w.name))
                if facts is not None and facts.status in ALIVE:
                    condition.apply(LookRequested())
                    return
                await w.run.down(w.name, w.signals, at_once=True)
        except ManagerError as error:
            w.world.journal.record("removal_failed", instance=w.id, detail=error.message)
            condition.apply(BurialFailed())
