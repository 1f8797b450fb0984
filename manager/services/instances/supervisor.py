"""The owner of one Docker instance: everything that happens to it happens here, one thing at a time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict

from manager.domain import backoff
from manager.domain.capacity import is_failing
from manager.domain.container import (
    LABEL_DEVICE,
    LABEL_HASH,
    Reach,
    container_name,
    container_request,
    is_ours,
)
from manager.domain.instance import ALIVE, Explanation, Health, Phase, Target
from manager.domain.lifecycle import Fact
from manager.domain.reconcile import Bury, Look, Recreate, Situation, Start, Stop, Wait, next_action
from manager.domain.registry import Operation
from manager.domain.shown import shown
from manager.errors import (
    BackingOffError,
    CancelledByStopError,
    EngineError,
    EngineUnreachableError,
    LimitReachedError,
    ManagerError,
    Reason,
    RegistryUnwritableError,
    StartFailedError,
    UnavailableError,
)
from manager.services.instances.condition import Condition, Retry
from manager.services.instances.container_run import ContainerRun, Started, Watch, happens
from manager.services.instances.idle_clock import IdleClock
from manager.services.instances.instance import PROBE_BYTES, Effort, Instance, View
from manager.services.instances.staleness import Staleness
from manager.services.instances.usage import UsageWatch
from manager.services.waiters import Waiters

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from datetime import datetime

    from manager.domain.container import ContainerRequest
    from manager.domain.instance import ContainerFacts, InstanceSpec
    from manager.domain.registry import InstanceRow
    from manager.services.ports import EngineEvent
    from manager.services.world import World

# How long somebody waits to hear from the engine whether a container that refuses connections has ended.
_LOOK_S = 10.0
_LOOK_POLL_S = 0.02
# Whoever streams from an instance shows within this time.
_GLANCE_S = 0.5


class Overrides(TypedDict, total=False):
    """What is set above the configuration of an instance; None where nothing is any more."""

    ttl_s: float | None
    pinned: bool | None


class Supervisor(Instance):
    """Moves one container-backed instance towards its target.

    Requests set the target and an intent and wait; `run` alone acts on them, so that one operation goes on
    at a time and N callers share one. What the engine tells is only ever a reason to look.

    Args:
        row: what an earlier run has stored.
        may_run: raises when no further instance may run; called before a start is begun.
    """

    def __init__(
        self, world: World, spec: InstanceSpec, row: InstanceRow, *, may_run: Callable[[str], None]
    ) -> None:
        super().__init__(world, spec)
        if spec.template is None:
            raise ValueError(f"{spec.id} has no template")
        self._template = spec.template
        self._name = container_name(world.manager_id, spec.id)
        self._may_run = may_run
        self._row = row
        self._saved_row: InstanceRow | None = None
        self._is = Condition(
            world=world,
            id=spec.id,
            name=self._name,
            target=row.target,
            pinned=spec.pinned if row.pinned is None else row.pinned,
            carcass_kept_s=spec.limits.resync_interval_s,
        )
        self._clock = IdleClock(world, row.last_used_at)
        self._stale = Staleness(world, spec.id)
        self._usage = UsageWatch(world, self)
        self._run = ContainerRun(world, spec.id, spec.limits, self._is.set_container)
        self._engine_up = False
        self._dormant = False
        self._ready_at: datetime | None = None

        self._operation: asyncio.Task[None] | None = None
        self._start_is_fresh = False
        self._force = False
        self._kill_at_once = False
        self._stop_detail = "begun before a restart"
        self._stop_retry = Retry()
        self._stop_trouble: Explanation | None = None
        self._stoppers = Waiters()
        self._last_look = asyncio.Lock()
        self._wake = asyncio.Event()
        self._drain_news = asyncio.Event()

        self.reach: Reach | None = Reach.ADDRESS
        self.starts_done = 0
        self.starts_failed = 0

    # --- what requests call ---

    def begin_start(self, *, explicit: bool = True) -> bool:
        """Ask for the instance to run, without waiting; False when it already does.

        An explicit start ignores the back-off of earlier failures.

        Raises:
            ManagerError: it cannot be started now; nothing was changed.
        """
        if self.usable_endpoint() is not None:
            return False
        self._refuse_start(explicit=explicit)
        self._is.target = Target.RUNNING
        if explicit:
            self._is.start_retry.at = self._stop_retry.at = 0.0
        if self._is.intent is None:
            self._is.intent = Operation.START
        self._wake.set()
        return True

    async def start(self, *, explicit: bool = True) -> bool:
        if not self.begin_start(explicit=explicit):
            return False
        await self._is.starters.outcome()
        return True

    def begin_stop(self, *, force: bool = False, detail: str = "asked for") -> bool:
        """Ask for the instance to be stopped, without waiting; False when it already is.

        A start that is going on is cancelled, and those who wait for it are told so.

        Raises:
            EngineUnreachableError: the engine is away; nothing was changed.
        """
        if self._is.phase is Phase.STOPPED and self._is.intent is None:
            return False
        if not self._engine_up:
            raise self._engine_away()
        self._is.target = Target.STOPPED
        cancelled = CancelledByStopError(f"the start of {self.id} was cancelled by a stop", instance=self.id)
        self._is.starters.settle(cancelled)
        if self._is.phase is Phase.STOPPED:
            self._is.intent = None  # a start that was asked for and not begun: there is nothing to stop
            return True
        self._force = self._force or force
        if self._is.intent is not Operation.STOP:
            self._is.intent = Operation.STOP
            self._stop_detail = detail
            self._stop_retry = Retry()
            if self._operation is not None:
                # Nobody can have work in a container that was never ready: it need not be asked to end.
                self._kill_at_once = self._start_is_fresh and self._is.phase is Phase.STARTING
                self._operation.cancel()
        self._stop_retry.at = 0.0
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
        if self._is.intent is Operation.STOP:
            await self._stoppers.outcome()

    async def stop_if_idle(self) -> bool:
        """Stop the instance when its TTL has run out, after one last look at whether somebody uses it."""
        # One sweep at a time: the probe of another would look like somebody's use.
        async with self._last_look:
            if not self.idle:
                return False
            await self._look_for_use()
            # From here to the end nothing is awaited: no lease can be taken in between.
            if not self.idle or not self._engine_up:
                return False
            return self.begin_stop(detail=f"idle for {self.ttl_s:g} s")

    async def make_way(self, detail: str) -> bool:
        """Stop the instance although its TTL has not run out, unless somebody uses it; whether it stopped.

        Raises:
            ManagerError: the stop failed.
        """
        async with self._last_look:
            if not await self._rests():
                # What was seen may be over, or be what it takes to start: it is the present that counts.
                await asyncio.sleep(_GLANCE_S)
                if not await self._rests():
                    return False
            # As in `stop_if_idle`: no lease can be taken from here on.
            if not self._engine_up:
                return False
            self.begin_stop(detail=detail)
        await self.stopped()
        return True

    async def _rests(self) -> bool:
        """Whether nobody uses it, and nobody has since it was looked at last."""
        since = self.unused_since
        await self._look_for_use()
        return since is not None and self.unused_since == since

    async def _look_for_use(self) -> None:
        """Take in what somebody who talks to the endpoint directly has done by now."""
        await self.probe()
        await self._usage.sample()

    async def logs(self, tail: int) -> tuple[str, ...]:
        """The last lines of the container, or of the one that was, as far as they were kept.

        Raises:
            EngineError: there is a container, but the engine does not give them.
        """
        if self._is.container is not None:
            if not self._engine_up:
                raise self._engine_away()
            try:
                return await self._world.engine.logs(self._is.container.id, tail)
            except EngineError as error:
                # One that is being removed has no log any more; its last lines were kept before.
                if isinstance(error, EngineUnreachableError) or not self._run.kept_log:
                    raise
        return self._run.kept_log[-tail:]

    async def configure(self, overrides: Overrides) -> None:
        """Override the configured TTL or pin; kept across restarts. None takes an override back.

        Raises:
            RegistryUnwritableError: it could not be stored; nothing was changed.
        """
        before = self._row
        self._override(overrides.get("ttl_s", before.ttl_s), overrides.get("pinned", before.pinned))
        try:
            await self._save()
        except RegistryUnwritableError:
            self._override(before.ttl_s, before.pinned)
            raise
        if not self.pinned and self._is.phase is Phase.FAILED and self._is.intent is None:
            self._is.target = Target.STOPPED  # only a pinned instance is started again by itself
        self._world.journal.record(
            "configured", instance=self.id, detail=f"ttl_s={self.ttl_s:g} pinned={self.pinned}"
        )

    # --- what the fleet calls ---

    def reconfigure(self, spec: InstanceSpec) -> None:
        super().reconfigure(spec)
        self._run.limits = spec.limits
        self._override(self._row.ttl_s, self._row.pinned)
        self._wake.set()

    def first_listing(self, facts: ContainerFacts | None) -> None:
        """Take in what the engine listed at the daemon's start, together with what was stored before."""
        mine = self._mine(facts)
        if self._world.resume_idle_clock and (mine is None or mine.status not in ALIVE):
            # A sweep starts nothing, and finishes no start: what was stored is for the next daemon.
            self._dormant = True
            self._is.move(Fact.FOUND_ABSENT)
            return
        self._is.first_listing(mine, self._row.operation)
        self._wake.set()

    def prewarm(self) -> None:
        """Start with the daemon, unless an operation is under way. The caller has seen to a place."""
        if not self._dormant and self._is.intent is None and self._is.phase in (Phase.STOPPED, Phase.FAILED):
            self._is.target = Target.RUNNING
            self._is.intent = Operation.START
            self._wake.set()

    def compare(self, facts: ContainerFacts | None) -> None:
        """Look again when a listing differs from what is known here."""
        if self._is.differs(self._mine(facts)):
            self._is.look()
            self._wake.set()

    def hint(self, event: EngineEvent) -> None:
        """Take in what the engine's event stream says."""
        was = self._is.phase
        due = self._is.hint(event, operating=self._operation is not None)
        if self._is.phase is not was:
            self._gone()
        if due:
            self._drain_news.set()
            self._wake.set()

    def engine_changed(self, *, up: bool) -> None:
        self._engine_up = up
        if up:
            self._is.look()  # whatever happened meanwhile was told to nobody
        else:
            self._is.starters.settle(self._engine_away())
            self._stoppers.settle(self._engine_away())
        self._wake.set()

    async def save_use(self) -> None:
        """Store the last use, for a clean-up that runs without this daemon."""
        await self._save_quietly()

    # --- what everyone may read ---

    @property
    def ttl_s(self) -> float:
        return self.spec.limits.ttl_s if self._row.ttl_s is None else self._row.ttl_s

    @property
    def pinned(self) -> bool:
        return self._is.pinned

    @property
    def occupies(self) -> bool:
        """Whether it counts against the number of instances that may run."""
        return self._is.intent is Operation.START or self._is.phase in (
            Phase.STARTING,
            Phase.READY,
            Phase.DRAINING,
            Phase.STOPPING,
        )

    @property
    def busy(self) -> bool:
        """Whether an operation was asked for and has not ended."""
        return self._is.intent is not None

    @property
    def idle(self) -> bool:
        return self.usable_endpoint() is not None and self._ttl_remaining_s() == 0

    @property
    def ends(self) -> bool:
        """Whether a stop goes on, or is asked for."""
        return self._is.intent is Operation.STOP

    @property
    def unused_since(self) -> float | None:
        """The monotonic time of the last use; None while it is used, pinned, or does not run."""
        if self.usable_endpoint() is None or self.pinned:
            return None
        return self._clock.quiet_at(0.0, self.in_flight)

    @property
    def why_unusable(self) -> Explanation | None:
        """Why no start can succeed, None when one may."""
        return self._unusable()

    @property
    def why_failing(self) -> Explanation | None:
        """Why its last start or run failed, as long as another failure is likely; see `is_failing`."""
        retry = self._is.start_retry
        return self._is.failure if is_failing(retry.failures, retry.at, self._world.now()) else None

    @property
    def ready_container(self) -> ContainerFacts | None:
        return self._is.container if self._is.phase is Phase.READY else None

    @property
    def until_sample_s(self) -> float:
        """Often enough to date a use well within the TTL; asking more often would only cost."""
        limits = self.spec.limits
        wanted = self.ttl_s / 4 if self.ttl_s > 0 else limits.resync_interval_s
        interval_s = min(limits.resync_interval_s, max(limits.probe_interval_s / 4, wanted))
        return self._until_beat_s(interval_s)

    @property
    def coming_probe_bytes(self) -> int:
        probes = self.spec.limits.resync_interval_s / self.spec.limits.probe_interval_s + 2
        return int(probes * max(PROBE_BYTES, self._last_probe_bytes))

    @property
    def probed_endpoint(self) -> str | None:
        return self._is.endpoint if self._is.phase in (Phase.READY, Phase.DRAINING) else None

    def usable_endpoint(self) -> str | None:
        return self._is.endpoint if self._is.phase is Phase.READY and self._is.intent is None else None

    def used(self) -> None:
        self._clock.used()

    def take_room_for(self, model: str) -> bool:
        return not self.is_gpu or self._world.gpus.take_room(self.id, model, self.listed)

    async def make_room_for(self, model: str) -> None:
        if self.is_gpu:
            wait_s = self.spec.limits.vram_wait_s
            await self._world.gpus.admit_load(self.id, model, self.listed, wait_s=wait_s)

    def expect_on_cpu(self, model: str) -> None:
        self._stale.expect_on_cpu(model)

    @property
    def is_silent(self) -> bool:
        return self._is.watch.paused or super().is_silent

    async def has_gone(self) -> bool:
        self._is.look()
        self._wake.set()
        deadline = self._world.now() + _LOOK_S
        while (there := self.usable_endpoint() is not None) and self._world.now() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_POLL_S)
        return not there

    async def effort(self) -> Effort | None:
        container = self.ready_container
        if container is None:
            return None
        try:
            counters = await self._world.engine.counters(container.id)
            await self._world.gpus.refresh()
        except ManagerError:
            return None
        held = self._world.gpus.holding(self.id).used_bytes if self.is_gpu else None
        return Effort(cpu_s=counters.cpu_s, vram_bytes=held or 0)

    def view(self) -> View:
        phase, explanation = shown(
            self._is.phase,
            self._health,
            engine_trouble=None if self._engine_up else self._engine_away().message,
            unusable=self._unusable(),
            explanations=(
                self._stop_trouble,
                self._is.failure,
                self._health_issue,
                self._stale.why,
                self._world.gpus.shortage(self.id),
            ),
        )
        container = self._is.container
        return View(
            spec=self.spec,
            gpu_uuid=self._world.gpus.uuid_of(self.id) if self.is_gpu else None,
            endpoint=self._is.endpoint,
            target=self._is.target,
            phase=phase,
            health=self._health,
            explanation=explanation,
            in_flight=self.in_flight,
            pinned=self.pinned,
            ttl_s=self.ttl_s,
            ttl_remaining_s=self._ttl_remaining_s() if self._is.phase is Phase.READY else None,
            started_at=container.started_at if container and container.status in ALIVE else None,
            ready_at=self._ready_at,
            last_used_at=self._last_used_at(),
            last_seen_at=self._last_seen_at,
            starts=self._row.starts,
            container=container,
            template_hash=container.labels.get(LABEL_HASH) if container else None,
            models=self._models,
            available_models=self._available,
        )

    # --- the loop ---

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
                case Start() if self._may_start():
                    await self._operate(self._start_once())
                case Start():
                    self._is.start_retry.failed(self._world.now())
                case Stop():
                    await self._operate(self._stop_once())
                case Recreate():
                    await self._recreate()
                case Bury():
                    await self._bury()

    def _may_start(self) -> bool:
        """Whether a start goes ahead: one that was asked for does, a restart by itself only within limits."""
        if self._is.intent is Operation.START:
            return True
        try:
            self._may_run(self.id)
        except LimitReachedError as error:
            self._world.journal.record("restart_refused", instance=self.id, detail=error.message)
            return False
        self._is.intent = Operation.START
        return True

    def _situation(self) -> Situation:
        stopping = self._is.intent is Operation.STOP
        return Situation(
            now=self._world.now(),
            engine_up=self._engine_up and not self._dormant,
            target=self._is.target,
            phase=self._is.phase,
            intent=self._is.intent,
            retry_at=self._stop_retry.at if stopping else self._is.start_retry.at,
            look_at=self._is.look_at,
            bury_at=self._is.bury_at,
            recreate_at=None
            if self._world.resume_idle_clock
            else self._stale.recreate_at(self._row.recreated_at),
            quiet_at=self._clock.quiet_at(self.spec.limits.resync_interval_s, self.in_flight),
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

    # --- start ---

    async def _start_once(self) -> None:
        if self._is.intent is not Operation.START:
            return  # it was taken back before this began
        self._is.watch = Watch()
        self._is.failure = None
        self._is.bury_at = None
        self._start_is_fresh = not self._is.alive
        if self._is.phase is not Phase.STARTING:
            self._is.move(Fact.START_BEGUN)
        self._world.journal.record("starting" if self._start_is_fresh else "adopting", instance=self.id)
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
        need = self._world.gpus.need_of(self.id, self._template.limits.vram) if self.is_gpu else 0
        if not self._start_is_fresh:
            self._world.gpus.claim(self.id, need)
        else:
            self._refuse_unusable()
            if self.is_gpu:
                wait_s = self.spec.limits.vram_wait_s
                await self._world.gpus.admit(self.id, needed_bytes=need, wait_s=wait_s)
                self._refuse_unusable()  # admission takes new readings: the card may have gone meanwhile
        return await self._run.up(
            self._request(),
            known=self._is.container,
            by_name=self.reach is Reach.NAME,
            ready_path=self._template.ready.path,
            watch=self._is.watch,
        )

    def _became_ready(self, started: Started) -> None:
        self._is.move(Fact.BECAME_READY)
        if self._is.intent is Operation.START:  # a stop may have been asked for in the very last moment
            self._is.intent = None
        self._is.endpoint = started.endpoint
        self._is.ready_since = self._world.now()
        self._is.start_retry.at = 0.0
        self._ready_at = self._world.utcnow()
        self._reset_health()
        self._to_probe.set()
        if started.adopted and self._world.resume_idle_clock:
            begun_at = started.container.started_at
            self._clock.resume(begun_at)
            usage = self._row.usage
            if usage is not None and begun_at is not None and usage.at < begun_at.timestamp():
                usage = None  # of an earlier run: the counters have begun anew
            self.own_bytes += usage.own_bytes if usage else 0
            self._usage.restart(usage)
        else:
            self._clock.used()
            self._usage.restart(None)
        if not started.adopted:
            self._row = replace(self._row, starts=self._row.starts + 1)
            self.starts_done += 1
        self._stale.fresh(
            started.container,
            wanted_hash=self._request().labels[LABEL_HASH] if self.reach else None,
            on_gpu=self.is_gpu,
        )
        self._world.journal.record(
            "adopted" if started.adopted else "ready",
            instance=self.id,
            reason=self._stale.why.code if self._stale.why else None,
            detail=started.endpoint,
        )
        self._is.starters.settle()

    def _start_failed(self, error: ManagerError) -> None:
        tail = error.log_tail if isinstance(error, StartFailedError) else ()
        failure = self._is.failure = Explanation(_reason(error), error.message, tail)
        self._is.start_retry.failed(self._world.now())
        self._is.endpoint = None
        self._is.move(Fact.START_FAILED)
        if self._is.intent is Operation.START:
            self._is.intent = None
            if not self.pinned:
                self._is.target = Target.STOPPED
        if self._is.container is not None:  # it could not be taken over: see again what it does
            self._is.look(backoff.delay_s(self._is.start_retry.failures))
        self.starts_failed += 1
        self._world.gpus.drop_claim(self.id)
        self._world.journal.record(
            "start_failed", instance=self.id, reason=failure.code, detail=error.message
        )
        error.instance = error.instance or self.id
        self._is.starters.settle(error)

    def _refuse_start(self, *, explicit: bool) -> None:
        if not self._engine_up or (self._is.phase is Phase.UNAVAILABLE and self._is.intent is None):
            raise self._engine_away()
        if self._is.intent is Operation.START:
            return  # it goes on already: one more caller waits for its outcome
        self._refuse_unusable()
        retry, failure = self._is.start_retry, self._is.failure
        wait_s = retry.at - self._world.now()
        if not explicit and failure is not None and wait_s > 0:
            raise BackingOffError(
                f"{self.id} failed to start and is left alone for {wait_s:.0f} s: {failure.message}",
                reason=failure.code,
                instance=self.id,
                log_tail=failure.log_tail,
                retry_after_s=wait_s,
            )
        if not self.occupies:
            self._may_run(self.id)

    def _refuse_unusable(self) -> None:
        why = self._unusable()
        if why is not None:
            raise UnavailableError(why.message, reason=why.code, instance=self.id)

    def _unusable(self) -> Explanation | None:
        """Why it could not be started whatever is tried, None when it could."""
        missing = self._world.gpus.why_missing(self.id) if self.is_gpu else None
        if missing is not None:
            return Explanation(Reason.GPU_MISSING, missing)
        if self.reach is None:
            return Explanation(
                Reason.INSTANCE_UNAVAILABLE,
                f"the engine at {self._world.engine.url} is on another machine, whose containers are not "
                f"reached by themselves: set `reach: network` in the template {self.spec.template_name!r} "
                "if their addresses are routed to here, or run the daemon in a container beside them",
            )
        return None

    # --- stop ---

    async def _stop_once(self) -> None:
        try:
            # A stop goes on even if it cannot be stored: at worst the next daemon adopts what is left.
            await self._save_quietly()
            await self._world.on_step(self.id, "stored")
            await self._drain()
            if self._is.phase is not Phase.STOPPING:
                self._is.move(Fact.STOP_BEGUN)
            self._world.journal.record("stopping", instance=self.id, detail=self._stop_detail)
            held = self._world.gpus.holding(self.id)
            gpu = self._world.gpus.gpu_of(self.id) if self.is_gpu else None
            async with self._world.locks.hold(self.id):
                await self._run.down(self._name, self._is.watch, at_once=self._kill_at_once)
            self._is.run_ended()
            if gpu is not None:
                wait_s = self.spec.limits.vram_wait_s
                if not await self._world.gpus.given_back(self.id, held, wait_s):
                    self._world.journal.record("vram_not_given_back", instance=self.id, detail=gpu.uuid)
        except ManagerError as error:
            self._stop_failed(error)
        else:
            self._ended()
        await self._save_quietly()

    async def _drain(self) -> None:
        """Let the open leases come to their end, for a bounded time; new ones wait until after the stop."""
        if self._is.phase is not Phase.READY or self.in_flight == 0 or self._force:
            return
        self._is.move(Fact.DRAIN_BEGUN)
        self._world.journal.record("draining", instance=self.id, detail=f"{self.in_flight} open leases")
        deadline = self._world.now() + self.spec.limits.drain_timeout_s
        ended = self._is.watch.ended
        while self.in_flight and not self._force and not ended.is_set():
            self._drain_news.clear()
            left_s = deadline - self._world.now()
            if left_s <= 0 or not await happens(self._drain_news, left_s):
                break
        if ended.is_set():
            self._is.move(Fact.DIED)
        await self._world.on_step(self.id, "drained")

    def _ended(self) -> None:
        self._is.move(Fact.REMOVED)
        self._is.intent = None
        if self._is.target is Target.RUNNING:
            self._start_after_stop()
        self._is.bury_at = None
        self._force = False
        self._kill_at_once = False
        self._stop_trouble = None
        self._gone()
        self._world.gpus.drop_claim(self.id)
        self._world.journal.record("stopped", instance=self.id, detail=self._stop_detail)
        self._stoppers.settle()

    def _start_after_stop(self) -> None:
        """Begin the start that was asked for during the stop, unless its place has gone to another."""
        try:
            if not self.pinned:
                self._may_run(self.id)
        except LimitReachedError as error:
            self._is.target = Target.STOPPED
            self._is.starters.settle(error)
        else:
            self._is.intent = Operation.START

    def _stop_failed(self, error: ManagerError) -> None:
        """The stop stays asked for and is tried again. Those who wait are told why it did not work yet.

        So are those who wait to start afterwards: nobody knows how long that will be.
        """
        self._stop_retry.failed(self._world.now())
        self._stop_trouble = Explanation(_reason(error), f"it could not be stopped yet: {error.message}")
        self._world.journal.record(
            "stop_failed", instance=self.id, reason=self._stop_trouble.code, detail=error.message
        )
        error.instance = error.instance or self.id
        self._stoppers.settle(error)
        self._is.starters.settle(error)

    def _gone(self) -> None:
        """The server is not there any more: nothing that was known of it holds."""
        self._is.run_ended()
        self._ready_at = None
        self._clock.stop()
        self._stale.clear()
        self._reset_health()

    # --- what happens without us ---

    async def _look(self) -> None:
        """Ask the engine for the truth and take it in."""
        self._is.look_at = None
        try:
            facts = self._mine(await self._world.engine.inspect(self._name))
            if self._is.intent is not None:
                return  # an operation was asked for meanwhile: it looks for itself
            was = self._is.phase
            self._is.take_in(facts)
            if self._is.phase is not was:
                self._gone()
            if self._is.phase is Phase.FAILED and facts is not None:
                self._is.explain_death(facts, await self._run.log_tail(facts.id))
            if facts is not None and facts.status == "paused":
                self._set_health(Health.UNHEALTHY, None)
        except EngineUnreachableError:
            self._is.look(self.spec.limits.probe_interval_s)  # by then it is known whether it is away
        except EngineError as error:
            self._world.journal.record("look_failed", instance=self.id, detail=error.message)
        await self._save_quietly()

    async def _bury(self) -> None:
        """Remove a container that ended, unless somebody started it again."""
        self._is.bury_at = None
        try:
            async with self._world.locks.hold(self.id):
                facts = self._mine(await self._world.engine.inspect(self._name))
                if facts is not None and facts.status in ALIVE:
                    self._is.look()
                    return
                await self._run.down(self._name, self._is.watch, at_once=True)
        except ManagerError as error:
            self._world.journal.record("removal_failed", instance=self.id, detail=error.message)
            self._is.bury_at = self._world.now() + self.spec.limits.resync_interval_s

    def _set_health(self, health: Health, issue: Explanation | None) -> None:
        if health is Health.UNHEALTHY and self._is.watch.paused:
            how = f"{self._name} is paused; `docker unpause {self._name}` lets it go on"
            issue = Explanation(Reason.INSTANCE_UNHEALTHY, how)
        super()._set_health(health, issue)

    def _on_release(self) -> None:
        super()._on_release()
        self._usage.leased()
        if not self.in_flight:
            self._world.gpus.end_loads(self.id)
        self._drain_news.set()

    # --- better containers ---

    async def _probed(self) -> None:
        container = self.ready_container
        if not self.is_gpu or container is None:
            return
        await self._world.gpus.learn(self.id, self._models)
        if await self._stale.prove_device(container, self._models) and self._stale.why is not None:
            self._world.journal.record(
                "gpu_fallback",
                instance=self.id,
                reason=self._stale.why.code,
                detail=self._stale.why.message,
            )
            self._wake.set()

    async def _recreate(self) -> None:
        """Replace the container by a better one, unless that could not start, or somebody came meanwhile."""
        try:
            present = await self._world.engine.has_image(self._template.image)
        except EngineError:
            present = False
        if not present:
            self._stale.postpone(self._template.image, backoff.CAP_S)
            return
        # One last look at whether somebody uses it, as before an idle stop.
        await self._look_for_use()
        why = self._stale.why
        if not isinstance(next_action(self._situation()), Recreate) or why is None:
            return
        self._row = replace(self._row, recreated_at=self._world.utcnow())
        self._stop_detail = f"to be recreated: {why.message}"
        self._world.journal.record("recreating", instance=self.id, reason=why.code, detail=why.message)
        self._is.intent = Operation.STOP

    # --- helpers ---

    def _request(self) -> ContainerRequest:
        return container_request(
            self._template,
            manager_id=self._world.manager_id,
            instance_id=self.id,
            gpu=self._gpu() if self.is_gpu else None,
            loopback_port=self._row.loopback_port if self.reach is Reach.LOOPBACK else None,
        )

    def _gpu(self) -> str | None:
        """The UUID of its card; while nobody can tell, that of the card its container was made for."""
        made_for = self._is.container.labels.get(LABEL_DEVICE) if self._is.container else None
        return self._world.gpus.uuid_of(self.id) or made_for

    def _mine(self, facts: ContainerFacts | None) -> ContainerFacts | None:
        """`facts`, unless they are of a stranger that merely has the name."""
        ours = facts is not None and is_ours(facts, manager_id=self._world.manager_id, instance_id=self.id)
        return facts if ours else None

    def _last_used_at(self) -> datetime | None:
        return self._world.utcnow() if self.in_flight else self._clock.last_used_at

    def _ttl_remaining_s(self) -> float | None:
        return self._clock.remaining_s(self.ttl_s, pinned=self.pinned, in_flight=self.in_flight)

    def _engine_away(self) -> EngineUnreachableError:
        error = EngineUnreachableError(f"the container engine at {self._world.engine.url} is not available")
        error.instance = self.id
        return error

    def _override(self, ttl_s: float | None, pinned: bool | None) -> None:
        self._row = replace(self._row, ttl_s=ttl_s, pinned=pinned)
        self._is.pinned = self.spec.pinned if pinned is None else pinned

    async def _save(self) -> None:
        if self._dormant:
            return
        row = replace(
            self._row,
            target=self._is.target,
            operation=self._is.intent,
            last_used_at=self._last_used_at(),
            usage=self._usage.stored(),
        )
        if row != self._saved_row:
            await self._world.registry.save_instance(row)
            self._saved_row = row

    async def _save_quietly(self) -> None:
        """Store what has come of an operation; if that fails, the next daemon finds out by itself."""
        try:
            await self._save()
        except RegistryUnwritableError as error:
            self._world.journal.record("state_not_stored", instance=self.id, detail=error.message)


def _reason(error: ManagerError) -> Reason:
    return Reason(error.code) if error.code in set(Reason) else Reason.START_FAILED
