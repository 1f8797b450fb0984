"""Starts of one instance: what refuses them, and one start from its intent to its outcome."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from manager.domain.condition import BecameReady, RestartDue, RestartRefused, StartBegun, StartFailed
from manager.domain.container import Reach
from manager.domain.instance import Explanation, Phase, Target
from manager.domain.registry import Operation
from manager.domain.start_progress import Begun
from manager.errors import (
    BackingOffError,
    LimitReachedError,
    ManagerError,
    Reason,
    StartFailedError,
    UnavailableError,
)
from manager.services.instances.container_run import Signals
from manager.services.instances.workings import reason_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.services.instances.container_run import Started
    from manager.services.instances.workings import Workings


# Failures that an operator's choice of an image may have caused.
_OF_THE_IMAGE = (
    Reason.IMAGE_MISSING,
    Reason.START_FAILED,
    Reason.START_TIMEOUT,
    Reason.CONTAINER_EXITED,
    Reason.OUT_OF_MEMORY,
)


class Starting:
    """Starts the container, or adopts the one that runs.

    Args:
        workings: the container and what acts on it.
        may_run: raises when no further instance may run.
        on_ready: called when a start has succeeded, before its callers are told.

    Attributes:
        is_fresh: the current or last start was not an adoption.
        begun: the current or last start, None before the first one.
        done: how many containers were started.
        failed: how many starts have failed.
    """

    def __init__(
        self, workings: Workings, may_run: Callable[[str], None], on_ready: Callable[[Started], None]
    ) -> None:
        self._w = workings
        self._may_run = may_run
        self._on_ready = on_ready
        self.is_fresh = False
        self.begun: Begun | None = None
        self.done = 0
        self.failed = 0

    def refuse(self, *, explicit: bool) -> None:
        """Raise the error that keeps a start from being requested now.

        Raises:
            ManagerError: it is out of service, the engine or the card is missing, it is backing off, or too
                many instances run.
        """
        w, state = self._w, self._w.condition.state
        if state.drained is not None:
            raise w.out_of_service(state.drained)
        if not w.engine_up or not state.is_listed:
            raise w.engine_away()
        if state.intent is Operation.START:
            return  # one more caller waits for its outcome
        self.refuse_unusable()
        failure, wait_s = state.failure, state.start_retry.at - w.world.now()
        if not explicit and failure is not None and wait_s > 0:
            raise BackingOffError(
                f"{w.id} failed to start and is left alone for {wait_s:.0f} s: {failure.message}",
                reason=failure.code,
                instance=w.id,
                log_tail=failure.log_tail,
                retry_after_s=wait_s,
            )
        if not state.occupies:
            self._may_run(w.id)

    def unusable(self) -> Explanation | None:
        """The reason why no start can succeed; None when one may."""
        w = self._w
        lost = w.condition.state.card_lost
        if lost is not None and w.condition.state.phase is Phase.READY:
            return lost  # until its next probe finds the card again
        missing = w.world.gpus.why_missing(w.id) if w.is_gpu else None
        if missing is not None:
            return Explanation(Reason.GPU_MISSING, missing)
        if w.condition.state.phase is not Phase.READY and (why := w.world.why_no_node(w.spec.placement)):
            return Explanation(Reason.INSTANCE_UNAVAILABLE, why)
        if w.reach is None:
            return Explanation(
                Reason.INSTANCE_UNAVAILABLE,
                f"the engine at {w.world.engine.url} is on another machine, whose containers are not "
                f"reached by themselves: set `reach: network` in the template {w.spec.template_name!r} "
                "if their addresses are routed to here, or run the daemon in a container beside them",
            )
        return None

    async def once(self) -> None:
        """Carry out the requested start. A failure settles the waiting callers; it is not raised."""
        w = self._w
        if w.condition.state.intent is not Operation.START:
            if not self._restart_is_due():
                return
            w.condition.apply(RestartDue())
        w.signals = Signals()
        self.is_fresh = not w.condition.state.is_alive
        self.begun = Begun(w.world.utcnow())
        w.condition.apply(StartBegun())
        w.world.journal.record("starting" if self.is_fresh else "adopting", instance=w.id)
        try:
            await w.store.save()
            await w.world.on_step(w.id, "stored")
            await w.world.shares.take(w.id)  # first, as a stop has it: what ends is waited for
            async with w.world.locks.hold(w.id):
                started = await self._bring_up()
        except ManagerError as error:
            w.world.shares.over(w.id)
            self._end_failed(error)
        else:
            self._end_ready(started)
        await w.store.save_quietly()

    def _restart_is_due(self) -> bool:
        """Whether a failed instance that should run is started again; within the limits only."""
        w, state = self._w, self._w.condition.state
        wanted = state.intent is None and state.phase is Phase.FAILED and state.target is Target.RUNNING
        if not wanted:
            return False  # the start was taken back before it began
        try:
            self._may_run(w.id)
        except LimitReachedError as error:
            w.world.journal.record("restart_refused", instance=w.id, detail=error.message)
            w.condition.apply(RestartRefused())
            return False
        return True

    def refuse_unusable(self) -> None:
        """Raise the error that keeps any start from succeeding."""
        why = self.unusable()
        if why is not None:
            raise UnavailableError(why.message, reason=why.code, instance=self._w.id)

    async def _bring_up(self) -> Started:
        w, gpus = self._w, self._w.world.gpus
        need = gpus.need_of(w.id, w.template.limits.vram) if w.is_gpu else 0
        if not self.is_fresh:
            gpus.claim(w.id, need)
        else:
            self.refuse_unusable()
            if w.is_gpu:
                await self._admitted(need)
                self.refuse_unusable()  # admission takes new readings: the card may have gone meanwhile
        return await w.run.up(
            w.request(),
            known=w.condition.state.container,
            by_name=w.reach is Reach.NAME,
            ready_path=w.template.ready.path,
            signals=w.signals,
        )

    async def _admitted(self, need: int) -> None:
        w, wait_s = self._w, self._w.spec.limits.vram_wait_s
        begun = self.begun or Begun(w.world.utcnow())
        self.begun = replace(begun, memory_until=begun.at + timedelta(seconds=wait_s)) if need else begun
        await w.world.gpus.admit(w.id, needed_bytes=need, wait_s=wait_s)
        self.begun = begun

    def _end_ready(self, started: Started) -> None:
        w = self._w
        w.condition.apply(BecameReady(started.endpoint))
        if not started.adopted:
            w.store.count_start()
            self.done += 1
        self._on_ready(started)
        w.condition.starters.settle()

    def _end_failed(self, error: ManagerError) -> None:
        w = self._w
        tail = error.log_tail if isinstance(error, StartFailedError) else ()
        if self.is_fresh and reason_of(error) in _OF_THE_IMAGE:
            error.message += w.remedy
            error.args = (error.message,)
        w.condition.apply(StartFailed(Explanation(reason_of(error), error.message, tail)))
        self.failed += 1
        error.instance = error.instance or w.id
        w.condition.starters.settle(error)
