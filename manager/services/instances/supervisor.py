"""The supervisor of one container instance: its commands, its views, and the loop that acts on it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from manager.domain import backoff
from manager.domain.capacity import is_failing
from manager.domain.condition import (
    CardLost,
    CardReturned,
    Condition,
    ContainerChanged,
    LetGo,
    Listed,
    LookRequested,
    NothingToSweep,
    PinChanged,
    PutBackInService,
    ReplacementDue,
    StartRequested,
    StopRequested,
    TakenOutOfService,
    WantedAgain,
)
from manager.domain.container import LABEL_HASH, Reach, container_name
from manager.domain.image_override import with_image
from manager.domain.instance import ALIVE, Explanation, Health, Phase, Target
from manager.domain.reconcile import Bury, Look, Recreate, Situation, Start, Stop, Wait, next_action
from manager.domain.shown import shown
from manager.domain.start_progress import start_progress
from manager.errors import (
    CancelledByStopError,
    EngineError,
    EngineUnreachableError,
    ManagerError,
    Reason,
)
from manager.services.instances.condition import LiveCondition
from manager.services.instances.container_run import ContainerRun, Started, happens
from manager.services.instances.idle_clock import IdleClock
from manager.services.instances.instance import PROBE_BYTES, Effort, Instance, View
from manager.services.instances.looking import Looking
from manager.services.instances.replacing import Replacing
from manager.services.instances.staleness import Staleness
from manager.services.instances.starting import Starting
from manager.services.instances.stopping import Stopping
from manager.services.instances.storing import Overrides, Store
from manager.services.instances.usage import LEAST_WINDOW_S, UsageWatch
from manager.services.instances.workings import Workings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine
    from datetime import datetime

    from manager.domain.drained import Drained
    from manager.domain.image_override import ImageOverride
    from manager.domain.instance import ContainerFacts, InstanceSpec
    from manager.domain.registry import InstanceRow
    from manager.services.ports import Engine, EngineEvent
    from manager.services.world import World
    from manager.wire.details import Details

# On a busy machine the end of a start looks like use for a while: only an instance that shows use in each of
# so many looks is in use.
_LOOKS = 3
# How long callers keep waiting once the engine stops answering: one slow ping is no outage.
_ENGINE_GRACE_PROBES = 3
_ENGINE_GRACE_S = 5.0


class Supervisor(Instance):
    """Moves one container instance towards its target.

    Commands set the target and an intent and wait; `run` alone acts on them, so that one operation goes on
    at a time and any number of callers share one. An event of the engine only causes an inspection.

    Args:
        row: the row that an earlier run has stored.
        may_run: raises when no further instance may run; called before a start is begun.
        drained: the order to keep it out of service, None where there is none.
        image: the operator's choice of its image, None for the image of its template.
    """

    def __init__(
        self,
        world: World,
        spec: InstanceSpec,
        row: InstanceRow,
        *,
        may_run: Callable[[str], None],
        drained: Drained | None = None,
        image: ImageOverride | None = None,
    ) -> None:
        configured, spec = spec, with_image(spec, image)
        super().__init__(world, spec)
        if spec.template is None:
            raise ValueError(f"{spec.id} has no template")
        self._store = Store(world, spec, row, self._current_row)
        name = container_name(world.manager_id, spec.id)
        first = Condition(
            name=name,
            carcass_kept_s=spec.limits.resync_interval_s,
            target=row.target if drained is None else Target.STOPPED,
            pinned=self._store.pinned,
            drained=drained,
        )
        self._condition = LiveCondition(world, spec.id, first, self._forget_server)
        self._w = Workings(
            world=world,
            spec=spec,
            template=spec.template,
            name=name,
            condition=self._condition,
            run=ContainerRun(
                world, spec.id, spec.limits, lambda facts: self._condition.apply(ContainerChanged(facts))
            ),
            store=self._store,
            in_flight=lambda: self.in_flight,
        )
        self._clock = IdleClock(world, row.last_used_at)
        self._stale = Staleness(world, spec.id)
        self._usage = UsageWatch(world, self)
        self._starting = Starting(self._w, may_run, self._became_ready)
        self._stopping = Stopping(self._w, may_run, self._cut_leases)
        self.replacing = Replacing(
            self._w, self._starting, configured=configured, override=image, changed=self._service_changed
        )
        self._wake = asyncio.Event()
        self._looking = Looking(self._w, self._wake.set, self._pause_changed)
        self._ready_at: datetime | None = None
        self._operation: asyncio.Task[None] | None = None
        self._last_look = asyncio.Lock()
        self._engine_grace: asyncio.TimerHandle | None = None
        self._is_to_prewarm = False
        self._let_go_until = float("-inf")  # others were looked for just before

    # --- commands ---

    def begin_start(self, *, explicit: bool = True) -> bool:
        """Request a start, without waiting; False when the instance is ready already.

        An explicit start ignores the back-off of earlier failures.

        Raises:
            ManagerError: it cannot be started now; nothing was changed.
        """
        if self.usable_endpoint() is not None:
            return False
        self._starting.refuse(explicit=explicit)
        if self._condition.state.is_let_go and self._condition.state.is_ready:
            self._condition.apply(WantedAgain())
        self._condition.apply(StartRequested(explicit))
        self._wake.set()
        return True

    async def start(self, *, explicit: bool = True) -> bool:
        if not self.begin_start(explicit=explicit):
            return False
        await self._condition.starters.outcome()
        return True

    def begin_stop(self, *, force: bool = False, detail: str = "asked for") -> bool:
        """Request a stop, without waiting; False when the instance is stopped already.

        A start that goes on is cancelled, and its callers get `CancelledByStopError`.

        Raises:
            EngineUnreachableError: the engine is away; nothing was changed.
        """
        before = self._condition.state
        if before.phase is Phase.STOPPED and before.intent is None:
            return False
        if not self._w.engine_up:
            raise self._w.engine_away()
        self._condition.apply(StopRequested())
        cancelled = CancelledByStopError(f"the start of {self.id} was cancelled by a stop", instance=self.id)
        self._condition.starters.settle(cancelled)
        if self._condition.state.intent is None:
            return True  # the start had not begun
        if force:
            self._stopping.force()
        self._stop_requested(before, detail)
        return True

    def _stop_requested(self, before: Condition, detail: str) -> None:
        """Have a stop that was requested carried out; `before` is the condition before that."""
        self._interrupt()
        if not before.ends:
            self._stopping.detail = detail
            if self._operation is not None:
                if self._starting.is_fresh and before.phase is Phase.STARTING:
                    self._stopping.kill_at_once()
                self._operation.cancel()
        self._stopping.nudge()
        self._wake.set()

    async def stop(self, *, force: bool = False) -> bool:
        if not self.begin_stop(force=force):
            return False
        await self.stopped()
        return True

    async def stopped(self) -> None:
        """Wait until a requested stop has ended.

        Raises:
            ManagerError: it failed; it stays requested and is tried again.
        """
        if self.ends:
            await self._stopping.stoppers.outcome()

    # --- out of service ---

    def take_out(self, drained: Drained) -> None:
        before = self._condition.state
        self._condition.apply(TakenOutOfService(drained))
        self._condition.starters.settle(self._w.out_of_service(drained))
        self._interrupt()
        self._service_changed(before, drained.detail)

    def bring_back(self) -> None:
        before = self._condition.state
        self._condition.apply(PutBackInService())
        if before.phase is Phase.READY:
            self._clock.used()  # a whole TTL begins
        self._service_changed(before, "")
        self._is_to_prewarm = False
        super().bring_back()

    def _service_changed(self, before: Condition, detail: str) -> None:
        if self._condition.state.ends and not before.ends:
            self._stop_requested(before, detail)
        self._stopping.nudge()
        self._wake.set()

    async def out(self) -> None:
        drained = self.drained
        if drained is not None and drained.stops:
            await self.stopped()
        await super().out()

    @property
    def returns(self) -> bool:
        drained = self.drained
        return self._is_to_prewarm or (drained is not None and drained.ran and self.pinned)

    # --- stops by the daemon itself ---

    async def stop_if_idle(self) -> bool:
        """Stop the instance when its TTL has run out, after a last look at its use."""
        # One sweep at a time: the probe of another would look like use.
        async with self._last_look:
            if not self.idle:
                return False
            since = self.unused_since
            await self._look_for_use()
            # The look may take as long as a short TTL: a use that it found counts all the same. Nothing is
            # awaited from here on: no lease can be taken in between.
            if self.unused_since != since or not self.idle or not self._w.engine_up:
                return False
            if self._world.now() < self._let_go_until or not await self._is_alone():
                return False
            return self.begin_stop(detail=f"idle for {self.ttl_s:g} s")

    async def make_way(self, detail: str) -> bool:
        """Stop the instance although its TTL has not run out, unless it is used; whether it stopped.

        Raises:
            ManagerError: the stop failed.
        """
        async with self._last_look:
            looks = 1
            while not await self._rests():
                # The use may be over, or have been the start itself. Only current use blocks eviction.
                if looks == _LOOKS:
                    return False
                looks += 1
                await asyncio.sleep(LEAST_WINDOW_S)
            # As in `stop_if_idle`: no lease can be taken from here on.
            if not self._w.engine_up or not await self._is_alone():
                return False
            self.begin_stop(detail=detail)
        await self.stopped()
        return True

    async def _is_alone(self) -> bool:
        """Return whether no gateway uses it; no lease can be taken then, until the stop that follows.

        One that others use is let go: the last of them stops it, and a request here takes a share again.
        """
        was_let_go = self._condition.state.is_let_go
        self._condition.apply(LetGo())  # before anything is awaited: no lease is given from here on
        try:
            alone = await self._world.shares.alone(self.id)
        except ManagerError:
            self._condition.apply(LetGo(takes_back=not was_let_go))
            return False
        state = self._condition.state
        if not state.is_let_go or not state.is_ready:
            return False  # a request has wanted it again meanwhile, or it has ended
        if not alone:
            self._let_go_until = self._world.now() + self.spec.limits.resync_interval_s
            if not was_let_go:
                self._world.revision.advance()
                self._world.journal.record("let_go", instance=self.id, detail="other gateways use it")
        return alone

    async def _rests(self) -> bool:
        """Whether it is unused, and was since the last look."""
        since = self.unused_since
        # A request waits for this: after an open lease the pause between two looks is judged, nothing longer.
        await self.probe()
        is_judged = await self._usage.sample()
        return is_judged and since is not None and self.unused_since == since

    async def _look_for_use(self) -> None:
        """Take in the use by clients that talk to the endpoint directly."""
        await self.probe()
        await self._usage.look()

    async def logs(self, tail: int) -> tuple[str, ...]:
        """The last lines of the container, or the kept ones of the last container.

        Raises:
            EngineError: there is a container, but the engine does not return its log.
        """
        kept, container = self._w.run.kept_log, self._condition.state.container
        if container is not None:
            if not self._w.engine_up:
                raise self._w.engine_away()
            try:
                return await self._world.engine.logs(container.id, tail)
            except EngineError as error:
                # A container that is being removed has no log any more; its last lines were kept before.
                if isinstance(error, EngineUnreachableError) or not kept:
                    raise
        return kept[-tail:]

    async def follow_logs(self, tail: int) -> AsyncGenerator[str, None]:
        """The last lines of the container, then what it writes until it ends. Empty text may come first.

        Without a container: the kept lines of the last one.

        Raises:
            EngineError: as `logs`.
        """
        kept, container = self._w.run.kept_log, self._condition.state.container
        if container is not None:
            if not self._w.engine_up:
                raise self._w.engine_away()
            try:
                async with aclosing(self._world.engine.follow_logs(container.id, tail)) as pieces:
                    async for piece in pieces:
                        yield piece
            except EngineError as error:
                if isinstance(error, EngineUnreachableError) or not kept:
                    raise
            else:
                return
        yield "".join(f"{line}\n" for line in kept[-tail:])

    async def configure(self, overrides: Overrides) -> None:
        """Override the configured TTL or pin; kept across restarts. None takes an override back.

        Raises:
            RegistryUnwritableError: it could not be stored; nothing was changed.
        """
        await self._store.override(overrides)
        self._condition.apply(PinChanged(self._store.pinned))
        self._usage.resample()  # a shorter TTL needs samples closer together
        self._wake.set()
        self._world.journal.record(
            "configured", instance=self.id, detail=f"ttl_s={self.ttl_s:g} pinned={self.pinned}"
        )

    # --- what the fleet calls ---

    def use_image(self, override: ImageOverride | None) -> None:
        """Use another image from the next start on; None for that of the template."""
        self._take_over(self.replacing.choose(override))

    def reconfigure(self, spec: InstanceSpec) -> None:
        self._take_over(self.replacing.effective(spec))

    def _take_over(self, spec: InstanceSpec) -> None:
        super().reconfigure(spec)
        self._w.spec = self._store.spec = spec
        self._w.run.limits = spec.limits
        self._condition.apply(PinChanged(self._store.pinned))
        self._usage.resample()
        self._wake.set()

    def first_listing(self, facts: ContainerFacts | None) -> None:
        """Take in the first listing of the engine, together with the stored row."""
        mine = self._w.mine(facts)
        if self._world.resume_idle_clock and (mine is None or mine.status not in ALIVE):
            # A sweep starts nothing and finishes no start: the row is for the next daemon.
            self._store.is_dormant = True
            self._condition.apply(NothingToSweep())
            return
        unfinished = None if self._world.dry_run else self._store.row.operation
        self._condition.apply(Listed(mine, unfinished))
        self._wake.set()

    def prewarm(self) -> None:
        """Start with the daemon, unless an operation goes on already. The caller has seen to a place."""
        state = self._condition.state
        if self._store.is_dormant or state.intent or state.phase not in (Phase.STOPPED, Phase.FAILED):
            return
        if state.drained is not None:
            self._is_to_prewarm = True  # once it is back in service
            return
        self._condition.apply(StartRequested(explicit=False))
        self._wake.set()

    def compare(self, facts: ContainerFacts | None) -> None:
        """Have the container inspected when a listing differs from its last inspection."""
        self._looking.compare(self._w.mine(facts))

    def hint(self, event: EngineEvent) -> None:
        """Have the container inspected because of an event."""
        if self._looking.take_event(event):
            self._stopping.nudge()

    def engine_changed(self, *, up: bool) -> None:
        self._w.engine_up = up
        if self._engine_grace is not None:
            self._engine_grace.cancel()
            self._engine_grace = None
        if up:
            self._condition.apply(LookRequested())  # no event told what happened meanwhile
        else:
            grace_s = max(_ENGINE_GRACE_PROBES * self.spec.limits.probe_interval_s, _ENGINE_GRACE_S)
            loop = asyncio.get_running_loop()
            self._engine_grace = loop.call_later(grace_s, self._give_up_on_engine)
        self._wake.set()

    def _give_up_on_engine(self) -> None:
        self._condition.starters.settle(self._w.engine_away())
        self._stopping.stoppers.settle(self._w.engine_away())

    async def save_use(self) -> None:
        """Store the last use, for a clean-up that runs without this daemon."""
        await self._store.save_quietly()

    # --- what others read ---

    @property
    def engine(self) -> Engine:
        """The engine that runs its container, or its service."""
        return self._world.engine

    @property
    def reach(self) -> Reach | None:
        """The way to the container; set by the fleet."""
        return self._w.reach

    @reach.setter
    def reach(self, reach: Reach | None) -> None:
        self._w.reach = reach

    @property
    def starts_done(self) -> int:
        return self._starting.done

    @property
    def starts_failed(self) -> int:
        return self._starting.failed

    @property
    def ttl_s(self) -> float:
        return self._store.ttl_s

    @property
    def pinned(self) -> bool:
        return self._condition.state.pinned

    @property
    def occupies(self) -> bool:
        """Whether it counts against the number of instances that may run."""
        return self._condition.state.occupies

    @property
    def busy(self) -> bool:
        """Whether an operation was requested and has not ended."""
        return self._condition.state.intent is not None

    @property
    def idle(self) -> bool:
        return self._condition.state.is_ready and self._ttl_remaining_s() == 0

    @property
    def drained(self) -> Drained | None:
        return self._condition.state.drained

    @property
    def ends(self) -> bool:
        return self._condition.state.ends

    @property
    def why_unusable(self) -> Explanation | None:
        """The reason why no start can succeed; None when one may."""
        return self._starting.unusable()

    @property
    def why_failing(self) -> Explanation | None:
        """The reason of its last failure, as long as another one is likely; see `is_failing`."""
        state = self._condition.state
        retry = state.start_retry
        return state.failure if is_failing(retry.failures, retry.at, self._world.now()) else None

    @property
    def unused_since(self) -> float | None:
        """The monotonic time of the last use; None while it is used, pinned, kept warm, or does not run."""
        if not self._condition.state.is_ready or self.pinned or self.keeps_warm:
            return None
        return self._clock.unused_since(self.in_flight)

    @property
    def ready_container(self) -> ContainerFacts | None:
        state = self._condition.state
        return state.container if state.phase is Phase.READY else None

    @property
    def until_sample_s(self) -> float:
        """Often enough to date a use well within the TTL; more often would only cost."""
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
        state = self._condition.state
        return state.endpoint if state.phase in (Phase.READY, Phase.DRAINING) else None

    def usable_endpoint(self) -> str | None:
        return self._condition.state.usable_endpoint

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
        return self._condition.state.paused or super().is_silent

    async def has_gone(self) -> bool:
        return await self._looking.has_gone()

    async def effort(self) -> Effort | None:
        container = self.ready_container
        if container is None:
            return None
        try:
            counters = await self._world.engine.counters(container.id)
            await self._world.gpus.refresh()
        except ManagerError:
            return None
        held = self._world.gpus.held_bytes(self.id) if self.is_gpu else None
        return Effort(cpu_s=counters.cpu_s, vram_bytes=held or 0)

    def view(self) -> View:
        state = self._condition.state
        phase, explanation = shown(
            state.phase,
            self._health,
            engine_trouble=None if self._w.engine_up else self._w.engine_away().message,
            unusable=state.card_lost or self._starting.unusable(),
            explanations=(
                state.stop_trouble,
                state.failure,
                self._health_issue,
                self._stale.why,
                self._world.gpus.shortage(self.id),
            ),
            card_lost=state.card_lost is not None,
        )
        container = state.container
        return View(
            spec=self.spec,
            cards=self._world.gpus.cards_of(self.id) if self.is_gpu else (),
            endpoint=state.endpoint,
            target=state.target,
            phase=phase,
            health=self._health,
            explanation=explanation,
            in_flight=self.in_flight,
            pinned=self.pinned,
            ttl_s=self.ttl_s,
            ttl_remaining_s=self._ttl_remaining_s() if state.is_in_service else None,
            started_at=container.started_at if container and container.status in ALIVE else None,
            ready_at=self._ready_at,
            last_used_at=self._last_used_at(),
            last_seen_at=self._last_seen_at,
            starts=self._store.row.starts,
            container=container,
            template_hash=container.labels.get(LABEL_HASH) if container else None,
            models=self._models,
            available_models=self._available,
            drained=state.drained,
            keeps_warm=self.keeps_warm,
            image=self.replacing.in_force,
            start=start_progress(
                phase, container, self._starting.begun, start_timeout_s=self.spec.limits.start_timeout_s
            ),
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
                    await self._looking.once()
                case Start():
                    await self._operate(self._starting.once())
                case Stop():
                    await self._operate(self._stopping.once())
                case Recreate():
                    await self._recreate()
                case Bury():
                    await self._looking.bury()

    def _situation(self) -> Situation:
        state = self._condition.state
        retry = state.stop_retry if self.ends else state.start_retry
        recreate_at = self._stale.recreate_at(self._store.row.recreated_at)
        return Situation(
            now=self._world.now(),
            engine_up=self._w.engine_up and not self._store.is_dormant,
            target=state.target,
            phase=state.phase,
            intent=state.intent,
            retry_at=retry.at,
            look_at=state.look_at,
            bury_at=state.bury_at,
            recreate_at=None if self._world.resume_idle_clock or state.drained else recreate_at,
            unused_since=self._clock.unused_since(self.in_flight),
            quiet_s=self.spec.limits.resync_interval_s,
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

    async def _recreate(self) -> None:
        """Replace the container by a better one, unless that could not start or the instance is in use."""
        image = self._w.template.image
        try:
            present = await self._world.engine.has_image(image)
        except EngineError:
            present = False
        if not present:
            self._stale.postpone(image, backoff.CAP_S)
            return
        await self._look_for_use()
        why = self._stale.why
        if not isinstance(next_action(self._situation()), Recreate) or why is None:
            return
        if not await self._is_alone():
            self._stale.wait(self.spec.limits.resync_interval_s)  # the last user replaces it
            return
        self._store.note_recreation()
        self._stopping.detail = f"to be recreated: {why.message}"
        self._world.journal.record("recreating", instance=self.id, reason=why.code, detail=why.message)
        self._condition.apply(ReplacementDue())

    # --- what the parts call ---

    def _became_ready(self, started: Started) -> None:
        self._ready_at = self._world.utcnow()
        self._reset_health()
        self._to_probe.set()
        begun_at = started.container.started_at
        if started.adopted and self._world.resume_idle_clock:
            self._clock.resume(begun_at)
            usage = self._store.row.usage
            if usage is not None and begun_at is not None and usage.at < begun_at.timestamp():
                usage = None  # of an earlier run: the counters have begun anew
            self.own_bytes += usage.own_bytes if usage else 0
            self._usage.restart(usage)
        else:
            self._clock.used()
            self._usage.restart(None)
        self._stale.fresh(
            started.container,
            wanted_hash=self._w.request().labels[LABEL_HASH] if self.reach else None,
            on_gpu=self.is_gpu,
        )
        if self.is_gpu:
            self._stale.compare_cards(started.container, self._world.gpus.wanted_usable(self.id))
        self._world.journal.record(
            "adopted" if started.adopted else "ready",
            instance=self.id,
            reason=self._stale.why.code if self._stale.why else None,
            detail=started.endpoint,
        )

    def _forget_server(self) -> None:
        self._ready_at = None
        self._world.shares.over(self.id)
        self._clock.stop()
        self._stale.clear()
        self._reset_health()

    def _cut_leases(self) -> None:
        self._leases.cut(f"{self.id} was stopped")

    def _pause_changed(self, paused: bool) -> None:
        if paused:
            self._set_health(Health.UNHEALTHY, None)
        else:
            self._to_probe.set()

    # --- probes and leases ---

    async def probe(self, *, tags: bool = False) -> None:
        self._check_card()
        await super().probe(tags=tags)

    async def show(self, model: str) -> Details | None:
        try:
            return await super().show(model)
        finally:
            self._usage.leased()  # a server reads the model's file for it: that processor time is no use

    def _check_card(self) -> None:
        """Compare the state of its cards with the last reading; the fleet takes a reading every interval."""
        lost, container = self._condition.state.card_lost, self.ready_container
        if not self.is_gpu or container is None:
            return
        if self._stale.compare_cards(container, self._world.gpus.wanted_usable(self.id)):
            self._wake.set()
        missing = self._world.gpus.why_missing(self.id)
        if missing is not None:
            self._condition.apply(CardLost(missing))
        elif lost is not None:
            self._condition.apply(CardReturned())
            self._stale.card_was_lost(lost.message)
            self._wake.set()

    async def _probed(self) -> None:
        container = self.ready_container
        if not self.is_gpu or container is None or self._condition.state.card_lost is not None:
            return
        await self._world.gpus.learn(self.id, self._models)
        if await self._stale.prove_device(container, self._models) and self._stale.why is not None:
            why = self._stale.why
            self._world.journal.record("gpu_fallback", instance=self.id, reason=why.code, detail=why.message)
            self._wake.set()

    def _set_health(self, health: Health, issue: Explanation | None) -> None:
        if health is Health.UNHEALTHY:
            if self._condition.state.paused:
                how = f"{self._w.name} is paused; `docker unpause {self._w.name}` lets it go on"
                issue = Explanation(Reason.INSTANCE_UNHEALTHY, how)
            else:
                # The container may have ended, moved or been disconnected without an event.
                self._looking.soon()
        super()._set_health(health, issue)

    def _on_release(self) -> None:
        super()._on_release()
        self._usage.leased()
        self._stopping.nudge()
        if not self.in_flight:
            self._world.gpus.end_loads(self.id)
            self._wake.set()

    # --- helpers ---

    def _last_used_at(self) -> datetime | None:
        return self._world.utcnow() if self.in_flight else self._clock.last_used_at

    def _ttl_remaining_s(self) -> float | None:
        stays = self.pinned or self.keeps_warm
        return self._clock.remaining_s(self.ttl_s, pinned=stays, in_flight=self.in_flight)

    def _current_row(self, row: InstanceRow) -> InstanceRow:
        state = self._condition.state
        if not state.is_listed:
            return row  # operation and use of the earlier daemon: the first listing takes them up
        return replace(
            row,
            target=state.target,
            operation=state.intent,
            last_used_at=self._last_used_at(),
            usage=self._usage.stored(),
        )
