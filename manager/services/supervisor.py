"""The owner of one Docker instance: everything that happens to it happens here, one thing at a time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from manager.domain import backoff
from manager.domain.container import LABEL_HASH, Reach, container_name, container_request, is_ours
from manager.domain.idle import ttl_remaining_s
from manager.domain.instance import Explanation, Health, Phase, Target
from manager.domain.lifecycle import Fact, advance
from manager.domain.reconcile import (
    RECREATE_PAUSE_S,
    Bury,
    Look,
    Recreate,
    Situation,
    Start,
    Stop,
    Wait,
    next_action,
)
from manager.domain.registry import Operation
from manager.errors import (
    CancelledByStopError,
    EngineError,
    EngineUnreachableError,
    ManagerError,
    Reason,
    RegistryUnwritableError,
    StartFailedError,
    UnavailableError,
)
from manager.services.container_run import ContainerRun, Started, Watch, explain_end, happens
from manager.services.instance import Instance, View
from manager.services.usage import UsageWatch
from manager.wire.ollama_log import fell_back_to_cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from datetime import datetime

    from manager.domain.container import ContainerRequest
    from manager.domain.instance import ContainerFacts, InstanceSpec
    from manager.domain.registry import InstanceRow
    from manager.services.ports import EngineEvent
    from manager.services.world import World

_LOG_LINES_FOR_DEVICE = 200
_ALIVE = ("running", "paused")


class Supervisor(Instance):
    """Moves one container-backed instance towards its target.

    Requests set the target and an intent and wait; `run` alone acts on them, so that one operation goes on at a
    time and N callers share one. What the engine tells is only ever a reason to look.

    Args:
        row: what an earlier run has stored.
        may_run: raises when no further instance may run; called before a start is begun.
    """

    def __init__(
        self,
        world: World,
        spec: InstanceSpec,
        row: InstanceRow,
        *,
        may_run: Callable[[str], None],
    ) -> None:
        super().__init__(world, spec)
        if spec.template is None:
            raise ValueError(f"{spec.id} has no template")
        self._template = spec.template
        self._name = container_name(world.manager_id, spec.id)
        self._may_run = may_run
        self._row = row
        self._saved_row: InstanceRow | None = None
        self.reach = Reach.ADDRESS

        self._target = row.target
        self._intent: Operation | None = None
        self._phase = Phase.UNAVAILABLE
        self._engine_up = False
        self._failure: Explanation | None = None
        self._stale: Explanation | None = None
        self._container: ContainerFacts | None = None
        self._endpoint: str | None = None
        self._ready_at: datetime | None = None
        self._last_use: float | None = None
        self._last_used_at = row.last_used_at

        self._failures = 0
        self._retry_at = 0.0
        self._bury_at: float | None = None
        self._force = False
        self._kill_at_once = False
        self._look_due = False
        self._device_unproven = False
        self._stop_detail = ""
        self.starts_done = 0
        self.starts_failed = 0
        self._kept_log: tuple[str, ...] = ()

        self._watch = Watch()
        self._usage = UsageWatch(world, self)
        self._wake = asyncio.Event()
        self._drain_news = asyncio.Event()
        self._operation: asyncio.Task[None] | None = None
        self._start_waiters: set[asyncio.Future[None]] = set()
        self._stop_waiters: set[asyncio.Future[None]] = set()

    # --- what requests call -------------------------------------------------------------------------------

    def begin_start(self, *, explicit: bool = True) -> bool:
        """Ask for the instance to run, without waiting; False when it already does.

        An explicit start ignores the back-off of earlier failures.

        Raises:
            ManagerError: it cannot be started now; nothing was changed.
        """
        if self.usable_endpoint() is not None:
            return False
        if self._intent is not Operation.START or self._target is not Target.RUNNING:
            self._refuse_start(explicit=explicit)
        self._target = Target.RUNNING
        if explicit:
            self._retry_at = 0.0
        if self._intent is None:
            self._intent = Operation.START
        self._wake.set()
        return True

    async def start(self, *, explicit: bool = True) -> bool:
        if not self.begin_start(explicit=explicit):
            return False
        await self._wait_in(self._start_waiters)
        return True

    def begin_stop(self, *, force: bool = False, detail: str = "asked for") -> bool:
        """Ask for the instance to be stopped, without waiting; False when it already is.

        A start that is going on is cancelled, and those who wait for it are told so.

        Raises:
            EngineUnreachableError: the engine is away; nothing was changed.
        """
        if self._phase is Phase.STOPPED and self._intent is None:
            return False
        if not self._engine_up:
            raise self._engine_away()
        self._target = Target.STOPPED
        self._force = self._force or force
        if self._intent is not Operation.STOP:
            self._stop_detail = detail
            if self._phase is Phase.STARTING and self._operation is not None:
                self._kill_at_once = self._container is None or not self._adopting
                self._operation.cancel()
        self._intent = Operation.STOP
        self._retry_at = 0.0
        cancelled = CancelledByStopError(f"the start of {self.id} was cancelled by a stop", instance=self.id)
        _settle(self._start_waiters, cancelled)
        self._drain_news.set()
        self._wake.set()
        return True

    async def stop(self, *, force: bool = False) -> bool:
        if not self.begin_stop(force=force):
            return False
        await self.stopped()
        return True

    async def stopped(self) -> None:
        """Wait until a stop that was begun has ended.

        Raises:
            ManagerError: it failed; it stays asked for and is tried again.
        """
        if self._intent is Operation.STOP:
            await self._wait_in(self._stop_waiters)

    async def stop_if_idle(self) -> bool:
        """Stop the instance when its TTL has run out, after one last look at whether somebody uses it."""
        if not self.idle:
            return False
        await self.probe()
        await self._usage.sample()
        # From here to the end nothing is awaited: no lease can be taken in between.
        if not self.idle or not self._engine_up:
            return False
        return self.begin_stop(detail=f"idle for {self.ttl_s:g} s")

    async def logs(self, tail: int) -> tuple[str, ...]:
        """The last lines of the container, or of the one that was, as far as they were kept.

        Raises:
            EngineError: there is a container, but the engine does not give them.
        """
        container = self._container
        if container is None:
            return (self._kept_log or (self._failure.log_tail if self._failure else ()))[-tail:]
        return await self._world.engine.logs(container.id, tail)

    async def configure(self, *, ttl_s: float | None = None, pinned: bool | None = None) -> None:
        """Override the configured TTL or pin; kept across restarts.

        Raises:
            RegistryUnwritableError: it could not be stored; nothing was changed.
        """
        row = replace(
            self._row,
            ttl_s=self._row.ttl_s if ttl_s is None else ttl_s,
            pinned=self._row.pinned if pinned is None else pinned,
        )
        await self._world.registry.save_instance(self._current(row))
        self._row = row
        self._world.journal.record(
            "configured", instance=self.id, detail=f"ttl_s={self.ttl_s:g} pinned={self.pinned}"
        )

    # --- what the fleet calls -----------------------------------------------------------------------------

    def first_listing(self, facts: ContainerFacts | None) -> None:
        """Take in what the engine listed at the daemon's start, together with what was stored before."""
        unfinished, wanted = self._row.operation, self._target
        self._container = facts
        if unfinished is Operation.STOP and facts is not None:
            self._intent = Operation.STOP
            self._stop_detail = "begun before a restart"
        elif facts is not None and facts.status in _ALIVE:
            self._adopt(facts)
        elif unfinished is not None or wanted is Target.STOPPED:
            self._move(Fact.FOUND_ABSENT)
            self._intent = Operation.START if wanted is Target.RUNNING else None
            self._mark_carcass()
        else:
            self._move(Fact.FOUND_DEAD)
            self._ended_without_us(facts)
        self._wake.set()

    def prewarm(self) -> None:
        """Start with the daemon, unless something is going on already."""
        if self._intent is None and self._phase in (Phase.STOPPED, Phase.FAILED):
            self._target = Target.RUNNING
            self._intent = Operation.START
            self._wake.set()

    def compare(self, facts: ContainerFacts | None) -> None:
        """Look again when a listing differs from what is known here."""
        known = self._container
        differs = (facts is None) != (known is None) or (
            facts is not None and known is not None and (facts.id, facts.status) != (known.id, known.status)
        )
        if differs:
            self._look_due = True
            self._wake.set()

    def hint(self, event: EngineEvent) -> None:
        """Take in what the engine's event stream says."""
        known = self._container
        if known is not None and event.container_id == known.id:
            if event.action in ("pause", "unpause"):
                self._watch.paused = event.action == "pause"
            if event.action == "die":
                self._watch.ended.set()
                self._drain_news.set()
                self._container = replace(known, status="exited", exit_code=event.exit_code)
                if self._phase is Phase.READY or (self._phase is Phase.STARTING and self._operation is None):
                    self._died()
        if event.action in ("start", "die", "oom", "pause", "unpause", "destroy"):
            self._look_due = True
            self._wake.set()

    def engine_changed(self, *, up: bool) -> None:
        self._engine_up = up
        if not up:
            _settle(self._start_waiters, self._engine_away())
            _settle(self._stop_waiters, self._engine_away())
        self._wake.set()

    async def save_use(self) -> None:
        """Store the last use, for a clean-up that runs without this daemon."""
        await self._save_quietly()

    def _on_release(self) -> None:
        self.used()
        self._usage.leased()
        self._drain_news.set()

    # --- what everyone may read -----------------------------------------------------------------------------

    @property
    def ttl_s(self) -> float:
        return self.spec.limits.ttl_s if self._row.ttl_s is None else self._row.ttl_s

    @property
    def pinned(self) -> bool:
        return self.spec.pinned if self._row.pinned is None else self._row.pinned

    @property
    def occupies(self) -> bool:
        """Whether it counts against the number of instances that may run."""
        return self._intent is Operation.START or self._phase in (
            Phase.STARTING,
            Phase.READY,
            Phase.DRAINING,
            Phase.STOPPING,
        )

    @property
    def busy(self) -> bool:
        """Whether an operation was asked for and has not ended."""
        return self._intent is not None

    @property
    def idle(self) -> bool:
        return self._phase is Phase.READY and self._intent is None and self._ttl_remaining_s() == 0

    @property
    def ready_container(self) -> ContainerFacts | None:
        """The container while the instance is ready."""
        return self._container if self._phase is Phase.READY else None

    @property
    def sampling_interval_s(self) -> float:
        """Often enough to date a use well within the TTL; asking more often would only cost."""
        limits = self.spec.limits
        wanted = self.ttl_s / 4 if self.ttl_s > 0 else limits.resync_interval_s
        return min(limits.resync_interval_s, max(limits.probe_interval_s / 4, wanted))

    @property
    def container_id(self) -> str | None:
        return self._container.id if self._container else None

    @property
    def probed_endpoint(self) -> str | None:
        return self._endpoint if self._phase in (Phase.READY, Phase.DRAINING) else None

    def usable_endpoint(self) -> str | None:
        return self._endpoint if self._phase is Phase.READY and self._intent is None else None

    def used(self) -> None:
        self._last_use = self._world.now()
        self._last_used_at = self._world.utcnow()

    def view(self) -> View:
        phase, explanation = self._shown()
        container = self._container
        return View(
            spec=self.spec,
            gpu_uuid=self._world.gpus.uuid_of(self.id) if self.is_gpu else None,
            endpoint=self._endpoint,
            target=self._target,
            phase=phase,
            health=self._health,
            explanation=explanation,
            in_flight=self._leases.in_flight,
            pinned=self.pinned,
            ttl_s=self.ttl_s,
            ttl_remaining_s=self._ttl_remaining_s() if self._phase is Phase.READY else None,
            started_at=container.started_at if container and container.status in _ALIVE else None,
            ready_at=self._ready_at,
            last_used_at=self._last_used_at,
            last_seen_at=self._last_seen_at,
            starts=self._row.starts,
            container=container,
            template_hash=container.labels.get(LABEL_HASH) if container else None,
            models=self._models,
            available_models=self._available,
        )

    # --- the loop ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reconcile_forever(), name=f"reconcile {self.id}")
            tasks.create_task(self._probe_forever(), name=f"probe {self.id}")
            tasks.create_task(self._usage.run(), name=f"usage {self.id}")

    async def _reconcile_forever(self) -> None:
        while True:
            self._wake.clear()
            match next_action(self._situation()):
                case Wait(for_s=None):
                    await self._wake.wait()
                case Wait(for_s=for_s) if for_s is not None:
                    await happens(self._wake, for_s)
                case Look():
                    await self._look()
                case Start():
                    await self._operate(self._start_once())
                case Stop():
                    await self._operate(self._stop_once())
                case Recreate():
                    await self._recreate()
                case Bury():
                    await self._bury()

    def _situation(self) -> Situation:
        quiet = self._leases.in_flight == 0 and self._last_use is not None
        return Situation(
            now=self._world.now(),
            engine_up=self._engine_up,
            target=self._target,
            phase=self._phase,
            intent=self._intent,
            retry_at=self._retry_at,
            look_due=self._look_due,
            bury_at=self._bury_at,
            recreate_at=self._recreate_at() if self._stale else None,
            quiet_at=(self._last_use or 0.0) + self.spec.limits.resync_interval_s if quiet else None,
        )

    async def _operate(self, operation: Coroutine[None, None, None]) -> None:
        """Run one operation as a task of its own, so that a stop can cancel it and nothing else."""
        task = self._operation = asyncio.create_task(operation)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        finally:
            self._operation = None
        if not task.cancelled():
            task.result()

    # --- start ------------------------------------------------------------------------------------------------

    async def _start_once(self) -> None:
        self._intent = Operation.START
        self._watch = Watch()
        self._kill_at_once = False
        if self._phase is not Phase.STARTING:
            self._move(Fact.START_BEGUN)
        self._failure = None
        self._bury_at = None
        self._world.journal.record("adopting" if self._adopting else "starting", instance=self.id)
        try:
            await self._save()
            await self._world.on_step(self.id, "stored")
            async with self._world.locks.hold(self.id):
                started = await self._bring_up()
        except ManagerError as error:
            self._start_failed(error)
        else:
            self._became_ready(started)
        await self._save_quietly()

    async def _bring_up(self) -> Started:
        if self.is_gpu:
            if (missing := self._world.gpus.why_missing(self.id)) is not None:
                raise self._gpu_missing(missing)
            if not self._adopting:
                need = self._world.gpus.need_of(self.id, self._template.limits.vram)
                wait_s = self.spec.limits.vram_wait_s
                await self._world.gpus.admit(self.id, needed_bytes=need, wait_s=wait_s)
        return await self._container_run().up(
            self._request(),
            known=self._container,
            reach=self.reach,
            ready_path=self._template.ready.path,
            watch=self._watch,
        )

    def _became_ready(self, started: Started) -> None:
        self._move(Fact.BECAME_READY)
        if self._intent is Operation.START:  # a stop may have been asked for in the very last moment
            self._intent = None
        self._failures = 0
        self._retry_at = 0.0
        self._endpoint = started.endpoint
        self._ready_at = self._world.utcnow()
        self._reset_health()
        if started.adopted and self._world.resume_idle_clock:
            self._resume_idle_clock()
        else:
            self.used()
            self._usage.restart(None)
        self._device_unproven = self.is_gpu
        if not started.adopted:
            self._row = replace(self._row, starts=self._row.starts + 1)
            self.starts_done += 1
        self._stale = self._outdated()
        self._world.journal.record(
            "adopted" if started.adopted else "ready",
            instance=self.id,
            reason=self._stale.code if self._stale else None,
            detail=started.endpoint,
        )
        _settle(self._start_waiters, None)

    def _resume_idle_clock(self) -> None:
        """Go on from the stored last use and counters; with nothing stored the clock starts now."""
        if self._row.last_used_at is None:
            self.used()
        else:
            ago_s = (self._world.utcnow() - self._row.last_used_at).total_seconds()
            self._last_use = self._world.now() - max(0.0, ago_s)
        if self._row.usage is not None:
            self.own_bytes += self._row.usage.own_bytes
        self._usage.restart(self._row.usage)

    def _start_failed(self, error: ManagerError) -> None:
        tail = error.log_tail if isinstance(error, StartFailedError) else ()
        self._failure = Explanation(_reason(error), error.message, tail)
        self._failures += 1
        self.starts_failed += 1
        self._retry_at = self._world.now() + backoff.delay_s(self._failures)
        self._endpoint = None
        self._world.gpus.drop_claim(self.id)
        self._move(Fact.START_FAILED)
        if self._intent is Operation.START:
            self._intent = None
            if not self.pinned:
                self._target = Target.STOPPED
        error.instance = error.instance or self.id
        self._world.journal.record(
            "start_failed", instance=self.id, reason=self._failure.code, detail=error.message
        )
        _settle(self._start_waiters, error)

    def _refuse_start(self, *, explicit: bool) -> None:
        if not self._engine_up or self._phase is Phase.UNAVAILABLE:
            raise self._engine_away()
        if self.is_gpu and (missing := self._world.gpus.why_missing(self.id)) is not None:
            raise self._gpu_missing(missing)
        wait_s = self._retry_at - self._world.now()
        if not explicit and self._failure is not None and wait_s > 0:
            raise StartFailedError(
                f"{self.id} failed to start and is left alone for {wait_s:.0f} s: {self._failure.message}",
                reason=self._failure.code,
                instance=self.id,
                log_tail=self._failure.log_tail,
                retry_after_s=wait_s,
            )
        if not self.occupies:
            self._may_run(self.id)

    # --- stop -------------------------------------------------------------------------------------------------

    async def _stop_once(self) -> None:
        try:
            await self._save()
            await self._world.on_step(self.id, "stored")
            await self._drain()
            if self._phase is not Phase.STOPPING:
                self._move(Fact.STOP_BEGUN)
            self._world.journal.record("stopping", instance=self.id, detail=self._stop_detail)
            held = self._world.gpus.holding(self.id)
            gpu = self._world.gpus.gpu_of(self.id) if self.is_gpu else None
            async with self._world.locks.hold(self.id):
                self._kept_log = await self._container_run().down(
                    self._name, self._watch, at_once=self._kill_at_once
                )
            self._endpoint = None
            if gpu is not None:
                wait_s = self.spec.limits.vram_wait_s
                back = await self._world.gpus.given_back(self.id, held, gpu.vram_used_bytes, wait_s)
                if not back:
                    self._world.journal.record("vram_not_given_back", instance=self.id, detail=gpu.uuid)
        except ManagerError as error:
            self._stop_failed(error)
        else:
            self._stopped()
        await self._save_quietly()

    async def _drain(self) -> None:
        """Let the open leases come to their end, for a bounded time; new ones wait until after the stop."""
        if self._phase is not Phase.READY or self._leases.in_flight == 0 or self._force:
            return
        self._move(Fact.DRAIN_BEGUN)
        self._world.journal.record(
            "draining", instance=self.id, detail=f"{self._leases.in_flight} open leases"
        )
        deadline = self._world.now() + self.spec.limits.drain_timeout_s
        while self._leases.in_flight and not self._force and not self._watch.ended.is_set():
            self._drain_news.clear()
            left_s = deadline - self._world.now()
            if left_s <= 0 or not await happens(self._drain_news, left_s):
                break
        if self._watch.ended.is_set():
            self._move(Fact.DIED)
        await self._world.on_step(self.id, "drained")

    def _stopped(self) -> None:
        self._move(Fact.REMOVED)
        self._world.gpus.drop_claim(self.id)
        self._force = False
        self._kill_at_once = False
        self._stale = None
        self._last_use = None
        self._retry_at = 0.0
        self._reset_health()
        self._intent = Operation.START if self._target is Target.RUNNING else None
        self._world.journal.record("stopped", instance=self.id, detail=self._stop_detail)
        _settle(self._stop_waiters, None)

    def _stop_failed(self, error: ManagerError) -> None:
        """The stop stays asked for and is tried again; those who wait are told why it did not work yet."""
        self._failures += 1
        self._retry_at = self._world.now() + backoff.delay_s(self._failures)
        self._failure = Explanation(_reason(error), f"it could not be stopped yet: {error.message}")
        self._world.journal.record(
            "stop_failed", instance=self.id, reason=self._failure.code, detail=error.message
        )
        error.instance = error.instance or self.id
        _settle(self._stop_waiters, error)

    # --- what happens without us ------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Ask the engine for the truth and take it in."""
        self._look_due = False
        try:
            facts = await self._world.engine.inspect(self._name)
            if facts is not None and not is_ours(
                facts, manager_id=self._world.manager_id, instance_id=self.id
            ):
                facts = None
            if self._intent is not None:
                return  # an operation was asked for meanwhile: it looks for itself
            self._take_in(facts)
            if self._failure is not None and self._phase is Phase.FAILED and facts is not None:
                await self._explain_death(facts)
        except EngineUnreachableError:
            self._look_due = True
        except EngineError as error:
            self._world.journal.record("look_failed", instance=self.id, detail=error.message)

    def _take_in(self, facts: ContainerFacts | None) -> None:
        known = self._container
        self._on_container(facts)
        if facts is None or facts.status not in _ALIVE:
            if self._phase is Phase.READY:
                self._died()
            self._mark_carcass()
            return
        if self._phase is not Phase.READY or known is None or known.id != facts.id:
            self._adopt(facts)
        elif facts.status == "paused":
            paused = f"{self._name} is paused; `docker unpause {self._name}` lets it go on"
            self._set_health(Health.UNHEALTHY, Explanation(Reason.INSTANCE_UNHEALTHY, paused))
        elif facts.out_of_memory and self._failure is None:
            killed = f"a process in {self._name} was killed: more memory than its limit allows"
            self._failure = Explanation(Reason.OUT_OF_MEMORY, killed)
            self._world.journal.record("out_of_memory", instance=self.id, reason=Reason.OUT_OF_MEMORY)

    def _adopt(self, facts: ContainerFacts) -> None:
        """Take over a container that runs: it may be in the middle of somebody's work."""
        self._on_container(facts)
        self._target = Target.RUNNING
        self._intent = Operation.START
        self._retry_at = 0.0
        self._bury_at = None
        self._move(Fact.FOUND_RUNNING)
        self._wake.set()

    def _died(self) -> None:
        self._move(Fact.DIED)
        self._ended_without_us(self._container)

    def _ended_without_us(self, facts: ContainerFacts | None) -> None:
        reason, message = explain_end(self._name, facts)
        self._failure = Explanation(reason, message)
        self._failures += 1
        self._retry_at = self._world.now() + backoff.delay_s(self._failures)
        self._endpoint = None
        self._last_use = None
        self._stale = None
        self._intent = None
        self._world.gpus.drop_claim(self.id)
        self._reset_health()
        if not self.pinned:
            self._target = Target.STOPPED
        self._look_due = True
        self._mark_carcass()
        self._world.journal.record("container_ended", instance=self.id, reason=reason, detail=message)

    async def _explain_death(self, facts: ContainerFacts) -> None:
        reason, message = explain_end(self._name, facts)
        tail = await self._container_run().log_tail(facts.id)
        if self._phase is Phase.FAILED:
            self._failure = Explanation(reason, message, tail)
        await self._save_quietly()

    def _mark_carcass(self) -> None:
        """A container that ended stays for a while, for those who want to look at it or start it by hand."""
        if self._container is None:
            self._bury_at = None
        elif self._bury_at is None:
            self._bury_at = self._world.now() + self.spec.limits.resync_interval_s

    async def _bury(self) -> None:
        self._bury_at = None
        try:
            async with self._world.locks.hold(self.id):
                facts = await self._world.engine.inspect(self._name)
                if facts is not None and facts.status in _ALIVE:
                    self._look_due = True
                    return
                await self._container_run().down(self._name, self._watch, at_once=True)
        except ManagerError as error:
            self._world.journal.record("removal_failed", instance=self.id, detail=error.message)
            self._bury_at = self._world.now() + self.spec.limits.resync_interval_s

    # --- better containers ------------------------------------------------------------------------------------

    async def _probed(self) -> None:
        if not self.is_gpu:
            return
        await self._world.gpus.learn(self.id, self._models)
        container = self._container
        if self._device_unproven and container is not None:
            try:
                lines = await self._world.engine.logs(container.id, _LOG_LINES_FOR_DEVICE)
            except EngineError:
                return
            verdict = fell_back_to_cpu(lines)
            self._device_unproven = verdict is None
            if verdict:
                self._fell_back("its log names the CPU as its only device")
        if any(model.size_bytes > 0 and model.vram_bytes == 0 for model in self._models):
            self._fell_back("a loaded model has no byte in GPU memory")

    def _fell_back(self, how: str) -> None:
        if self._phase is not Phase.READY or (self._stale and self._stale.code is Reason.GPU_FALLBACK):
            return
        message = f"{self.id} is bound to a GPU but runs on the CPU: {how}; it is recreated when idle"
        self._stale = Explanation(Reason.GPU_FALLBACK, message)
        self._world.journal.record(
            "gpu_fallback", instance=self.id, reason=Reason.GPU_FALLBACK, detail=message
        )
        self._wake.set()

    def _outdated(self) -> Explanation | None:
        if self._container is None or (self.is_gpu and self._world.gpus.uuid_of(self.id) is None):
            return None
        if self._container.labels.get(LABEL_HASH) == self._request().labels[LABEL_HASH]:
            return None
        return Explanation(
            Reason.TEMPLATE_OUTDATED,
            f"{self._name} was made from an older template; it is recreated when idle",
        )

    def _recreate_at(self) -> float:
        if self._stale is None or self._stale.code is not Reason.GPU_FALLBACK or not self._row.recreated_at:
            return max(0.0, self._retry_at)
        ago_s = (self._world.utcnow() - self._row.recreated_at).total_seconds()
        return self._world.now() - ago_s + RECREATE_PAUSE_S

    async def _recreate(self) -> None:
        """Replace the container by a better one, unless that could not start, or somebody came meanwhile."""
        try:
            present = await self._world.engine.has_image(self._template.image)
        except EngineError:
            present = False
        if not present:
            self._retry_at = self._world.now() + backoff.CAP_S
            if self._stale:
                lacking = f"{self._stale.message}, once image {self._template.image} has been pulled"
                self._stale = replace(self._stale, message=lacking)
            return
        if not isinstance(next_action(self._situation()), Recreate) or self._stale is None:
            return
        self._row = replace(self._row, recreated_at=self._world.utcnow())
        self._stop_detail = f"to be recreated: {self._stale.message}"
        self._world.journal.record(
            "recreating", instance=self.id, reason=self._stale.code, detail=self._stale.message
        )
        self._intent = Operation.STOP

    # --- helpers ------------------------------------------------------------------------------------------------

    def _move(self, fact: Fact) -> None:
        self._phase = advance(self._phase, fact)

    @property
    def _adopting(self) -> bool:
        return self._container is not None and self._container.status in _ALIVE

    def _container_run(self) -> ContainerRun:
        return ContainerRun(self._world, self.id, self.spec.limits, self._on_container)

    def _on_container(self, facts: ContainerFacts | None) -> None:
        if self._container is not None and (facts is None or facts.id != self._container.id):
            self._world.gpus.forget_container(self._container.id)
        self._container = facts
        if facts is not None:
            self._world.gpus.note_container(facts.id, self.id)

    def _request(self) -> ContainerRequest:
        return container_request(
            self._template,
            manager_id=self._world.manager_id,
            instance_id=self.id,
            gpu=self._world.gpus.uuid_of(self.id) if self.is_gpu else None,
            loopback_port=self._row.loopback_port if self.reach is Reach.LOOPBACK else None,
        )

    def _ttl_remaining_s(self) -> float | None:
        return ttl_remaining_s(
            now=self._world.now(),
            ttl_s=self.ttl_s,
            pinned=self.pinned,
            in_flight=self._leases.in_flight,
            last_use=self._last_use,
        )

    def _shown(self) -> tuple[Phase, Explanation | None]:
        """Phase and reason as they are told: what cannot be known or used right now is `unavailable`."""
        if not self._engine_up:
            away = Explanation(Reason.ENGINE_UNAVAILABLE, self._engine_away().message)
            answers = self._phase in (Phase.READY, Phase.DRAINING) and self._health is not Health.UNHEALTHY
            busy = self._phase in (Phase.STARTING, Phase.STOPPING)
            return (self._phase if answers or busy else Phase.UNAVAILABLE), away
        if self.is_gpu and self._phase in (Phase.STOPPED, Phase.FAILED):
            missing = self._world.gpus.why_missing(self.id)
            if missing is not None:
                return Phase.UNAVAILABLE, Explanation(Reason.GPU_MISSING, missing)
        return self._phase, self._failure or self._health_issue or self._stale

    def _engine_away(self) -> EngineUnreachableError:
        error = EngineUnreachableError(f"the container engine at {self._world.engine.url} is not available")
        error.instance = self.id
        return error

    def _gpu_missing(self, message: str) -> UnavailableError:
        return UnavailableError(message, reason=Reason.GPU_MISSING, instance=self.id)

    async def _wait_in(self, waiters: set[asyncio.Future[None]]) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiters.add(waiter)
        try:
            await waiter
        finally:
            waiters.discard(waiter)

    def _current(self, row: InstanceRow) -> InstanceRow:
        return replace(
            row,
            target=self._target,
            operation=self._intent,
            last_used_at=self._last_used_at,
            usage=self._usage.stored(),
        )

    async def _save(self) -> None:
        row = self._current(self._row)
        if row != self._saved_row:
            await self._world.registry.save_instance(row)
            self._saved_row = row

    async def _save_quietly(self) -> None:
        """Store what has come of an operation. If that fails the next start of the daemon finds out itself."""
        try:
            await self._save()
        except RegistryUnwritableError as error:
            self._world.journal.record("state_not_stored", instance=self.id, detail=error.message)


def _settle(waiters: set[asyncio.Future[None]], error: ManagerError | None) -> None:
    for waiter in waiters:
        if waiter.done():
            continue
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)
    waiters.clear()


def _reason(error: ManagerError) -> Reason:
    return Reason(error.code) if error.code in set(Reason) else Reason.START_FAILED
