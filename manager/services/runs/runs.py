"""Async runs: takes them, stores them, has them executed, and lets their results expire."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import structlog

from manager.domain.runs import (
    OPEN,
    WITH_RESULT,
    Remove,
    Run,
    RunError,
    RunStatus,
    Save,
    body_file,
    cancelled,
    ended,
    expired,
    files_of,
    interrupted,
    is_final,
    is_of,
    next_run,
    paid,
    pause_s,
    postponed,
    recovery,
    result_file,
    sent,
    withdrawn,
)
from manager.errors import (
    RegistryUnwritableError,
    RunFilesError,
    RunsFullError,
    RunStateError,
    UnavailableError,
    UnknownRunError,
)
from manager.services.finishing import finish
from manager.services.runs.execution import PostponedError
from manager.services.world import no_step

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
    from datetime import datetime

    from manager.domain.keys import Grant
    from manager.domain.runs import RunCaller
    from manager.domain.target import Target
    from manager.services.bodies import BodyBudget
    from manager.services.open_requests import OpenRequest
    from manager.services.ports import Registry, RunFiles
    from manager.services.routing.attempting import Attempting
    from manager.services.runs.ensemble import Executions
    from manager.services.runs.execution import Done, Execution

_log = structlog.get_logger("runs")

# Runs that have ended are kept up to this number; beyond it the oldest are forgotten.
KEPT_RUNS = 10_000
# Results that expire in one go.
_AT_ONCE = 100
# Expiry is looked at so often at least: the clock of the machine may be set.
_LOOK_EVERY_S = 60.0
_RETRY_S = 1.0
_FULL_RETRY_S = 30.0
_ENDED_RETRY_S = 1.0
# The instance that `World.on_step` is called with.
_STEP = "run"


@dataclass(frozen=True, slots=True)
class RunLimits:
    """As `runs` in the configuration: counts, bytes and seconds."""

    concurrency: int
    max_queued: int
    max_body: int
    max_result: int
    max_stored: int
    expires_s: float
    retention_s: float


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run as it is submitted, checked."""

    path: str
    model: str
    body: bytes
    caller: RunCaller
    lane: str | None = None
    idempotent: bool = False
    expires_s: float | None = None


@dataclass(slots=True, eq=False)
class _Begun:
    """A run that a worker has taken. Implements `services.open_requests.OpenRequest`.

    Attributes:
        run: its state as it is stored.
        attempting: the life of its request.
        is_sent: whether a server was asked.
        is_cancelled: whether it is to end as cancelled once `stop` is set.
        stop: ends its execution.
        over: set once its end is stored.
    """

    run: Run
    attempting: Attempting | None = None
    is_sent: bool = False
    is_cancelled: bool = False
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def cancel(self, why: str) -> None:
        """Cancel the run, because the operator ends its request."""
        _log.info("run_cancelled", run=self.run.id, why=why)
        self.is_cancelled = True
        self.stop.set()


class Runs:
    """All runs. `recover` comes first, `run` executes what is queued. Lives on the event loop.

    A run is stored before anything is answered or done for it, and each change is stored before it counts.

    Args:
        registry: has the runs.
        files: have the bodies and the results.
        execution: executes one.
        stored: counts the bytes of all files.
        limits: in force; may be replaced.
        utcnow: the wall clock.
        on_step: see `World`; the instance is `run`.
    """

    def __init__(
        self,
        registry: Registry,
        files: RunFiles,
        execution: Execution | Executions,
        *,
        stored: BodyBudget,
        limits: RunLimits,
        utcnow: Callable[[], datetime],
        on_step: Callable[[str, str], Awaitable[None]] = no_step,
    ) -> None:
        self._registry = registry
        self._files = files
        self._execution = execution
        self._stored = stored
        self._limits = limits
        self._utcnow = utcnow
        self._on_step = on_step
        self._number = 0
        self._waiting: dict[str, Run] = {}
        self._begun: dict[str, _Begun] = {}
        # Of runs that wait although it is their turn: nothing could serve them, so many times in a row.
        self._failures: dict[str, int] = {}
        self._resting: dict[str, asyncio.TimerHandle] = {}
        self._submitting = 0
        self._cancelling: dict[str, asyncio.Task[Run]] = {}
        self._is_paused = False
        self._is_ending = False
        self._news = asyncio.Event()
        self._expiry_changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Run]] = set()

    @property
    def limits(self) -> RunLimits:
        return self._limits

    @limits.setter
    def limits(self, limits: RunLimits) -> None:
        self._limits = limits
        self._stored.most_bytes = limits.max_stored
        self._news.set()
        self._expiry_changed.set()

    @property
    def is_executing(self) -> bool:
        """Return whether the request of a run has been sent, and its end is not stored."""
        return any(begun.run.status is RunStatus.RUNNING for begun in self._begun.values())

    def open(self) -> Iterable[OpenRequest]:
        """Return the requests of runs that are under way."""
        return self._begun.values()

    # --- what clients ask for ---

    async def submit(self, new: NewRun) -> Run:
        """Store a run; it is executed some time later, whatever becomes of this process.

        Raises:
            RunsFullError: too many have not ended, or their files take all the room.
            RunFilesError, RegistryUnwritableError: it could not be stored.
        """
        limits = self._limits
        if len(self._waiting) + len(self._begun) + self._submitting >= limits.max_queued:
            message = f"{limits.max_queued} runs have not ended, which is runs.max_queued; try again later"
            raise RunsFullError(message, retry_after_s=_FULL_RETRY_S)
        if not self._stored.take(len(new.body)):
            message = "the files of all runs reach runs.max_stored; try again when results have expired"
            raise RunsFullError(message, retry_after_s=_FULL_RETRY_S)
        self._submitting += 1
        # A client that leaves does not leave half of a run.
        return await asyncio.shield(self._spawn(self._submit(new)))

    async def find(self, run_id: str, grant: Grant | None = None) -> Run:
        """Return a run as it is stored.

        Args:
            run_id: of the run.
            grant: the key that must have submitted it; None: any.

        Raises:
            UnknownRunError: there is none.
        """
        run = await self._registry.run(run_id)
        if run is None or (grant is not None and not is_of(run, grant)):
            raise UnknownRunError(f"there is no run {run_id!r}; ended runs are forgotten after a while")
        return run

    async def newest(
        self, status: RunStatus | None, limit: int, grant: Grant | None = None
    ) -> tuple[Run, ...]:
        return await self._registry.runs(status, limit, grant)

    async def result(self, run_id: str, grant: Grant | None = None) -> tuple[Run, AsyncIterator[bytes]]:
        """Return a run that has ended with its answer, and the body of that in pieces.

        Raises:
            UnknownRunError, RunStateError: there is no such run, or it has no result.
        """
        run = await self.find(run_id, grant)
        if run.status in OPEN:
            message = f"{run.id} is {run.status.value}: it has no result yet"
            raise RunStateError("run_not_ended", message, retry_after_s=_ENDED_RETRY_S)
        if run.status is RunStatus.EXPIRED:
            raise RunStateError("run_expired", f"the result of {run.id} was kept until {run.expires_at}")
        if run.result is None:
            raise RunStateError("run_without_result", f"{run.id} is {run.status.value}: it has no result")
        return run, self._files.pieces(result_file(run.id))

    async def cancel(self, run_id: str, grant: Grant | None = None) -> Run:
        """End a run. What it holds is given back before this returns. Cancelling it twice is no error.

        Raises:
            UnknownRunError, RunStateError: there is no such run, or it has ended in another way.
        """
        if grant is not None:
            await self.find(run_id, grant)
        begun = self._begun.get(run_id)
        if begun is not None:
            begun.is_cancelled = True
            begun.stop.set()
            await begun.over.wait()
        elif (run := self._waiting.pop(run_id, None)) is not None:
            self._forget_failures(run_id)
            self._cancelling[run_id] = self._spawn(self._cancel_waiting(run))
        if run_id in self._cancelling:
            return await asyncio.shield(self._cancelling[run_id])
        run = await self.find(run_id)
        if run.status in OPEN:
            raise RunStateError("run_busy", f"{run.id} is being stored; try again", retry_after_s=1.0)
        if run.status is not RunStatus.CANCELLED:
            raise RunStateError(
                "run_ended", f"{run.id} is {run.status.value}: it cannot be cancelled any more"
            )
        return run

    # --- what the daemon does ---

    async def recover(self) -> None:
        """Take up what an earlier daemon has left; call it once, before everything else.

        Raises:
            RunFilesError, RegistryUnwritableError: the state cannot be read or written.
        """
        found = await self._registry.runs(None, None)
        for action in recovery(found, await self._files.names(), self._utcnow()):
            if isinstance(action, Save):
                run = action.run
                _log.info("run_recovered", run=run.id, status=run.status.value, executions=run.executions)
                await self._registry.save_run(run)
            elif isinstance(action, Remove):
                await self._files.remove(action.file)
        for run in reversed(await self._registry.runs(None, None)):
            self._number = max(self._number, run.number)
            self._stored.held_bytes += _bytes_of(run)
            if run.status is RunStatus.QUEUED:
                self._waiting[run.id] = run

    async def run(self) -> None:
        """Execute runs, and let results expire, until cancelled; what executes then is interrupted."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._expire())
            try:
                while True:
                    self._news.clear()
                    while (run := self._next()) is not None:
                        begun = self._begun[run.id] = _Begun(self._waiting.pop(run.id))
                        tasks.create_task(self._work(begun))
                    await self._news.wait()
            finally:
                self._is_ending = True

    def pause(self) -> None:
        """Begin no run from now on. Those that only wait for a slot wait in the queue again."""
        self._is_paused = True
        for begun in self._begun.values():
            if begun.run.status is RunStatus.QUEUED:
                begun.stop.set()

    def resume(self) -> None:
        """Begin runs again after a `pause`."""
        self._is_paused = False
        self._news.set()

    async def drain(self, timeout_s: float, *, cut: asyncio.Event) -> None:
        """Let runs that execute come to their end, for so long or until `cut` is set; interrupt the rest."""
        self.pause()
        begun = tuple(self._begun.values())
        if not begun:
            return
        overs = [asyncio.ensure_future(one.over.wait()) for one in begun]
        cutting = asyncio.ensure_future(cut.wait())
        ends = asyncio.ensure_future(asyncio.wait(overs))
        await asyncio.wait({ends, cutting}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        cutting.cancel()
        for one in begun:
            one.stop.set()
        await ends

    # --- helpers ---

    def _spawn(self, work: Coroutine[None, None, Run]) -> asyncio.Task[Run]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _submit(self, new: NewRun) -> Run:
        self._number += 1
        run = Run(
            number=self._number,
            id=f"run_{secrets.token_hex(8)}",
            status=RunStatus.QUEUED,
            path=new.path,
            model=new.model,
            lane=new.lane,
            caller=new.caller,
            idempotent=new.idempotent,
            expires_s=self._limits.expires_s if new.expires_s is None else new.expires_s,
            body_bytes=len(new.body),
            created_at=self._utcnow(),
        )
        try:
            await self._files.save(body_file(run.id), new.body)
            await self._on_step(_STEP, "body")
            await self._registry.save_run(run)
        except BaseException:
            await self._drop(run)
            raise
        finally:
            self._submitting -= 1
        self._waiting[run.id] = run
        await self._on_step(_STEP, "stored")
        self._news.set()
        return run

    async def _cancel_waiting(self, run: Run) -> Run:
        over = cancelled(run, self._utcnow())
        try:
            await self._registry.save_run(over)
        except BaseException:
            self._waiting[run.id] = run
            raise
        finally:
            del self._cancelling[run.id]
        await self._on_step(_STEP, "cancelled")
        await self._drop(run)
        return over

    def _next(self) -> Run | None:
        if self._is_paused or len(self._begun) >= self._limits.concurrency:
            return None
        waiting = (run for run in self._waiting.values() if run.id not in self._resting)
        return next_run(waiting, (begun.run for begun in self._begun.values()))

    async def _work(self, begun: _Begun) -> None:
        """Execute a run and store what becomes of it, whatever ends it."""
        executing = asyncio.ensure_future(self._execute(begun))
        stopping = asyncio.ensure_future(begun.stop.wait())
        try:
            await asyncio.wait({executing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            executing.cancel()
            stopping.cancel()
            await asyncio.wait({executing, stopping})
            await finish(self._settle(begun, executing))

    async def _execute(self, begun: _Begun) -> Done:
        def begun_with(attempting: Attempting) -> None:
            begun.attempting = attempting

        async def store_as_sent(target: Target, request_id: str) -> None:
            run = begun.run
            if run.status is RunStatus.QUEUED:
                run = sent(run, self._utcnow(), instance=target.instance, request_id=request_id)
            if target.paid:
                run = paid(run, instance=target.instance)
            await self._registry.save_run(run)
            begun.run = run

        async def about_to_send(target: Target, request_id: str) -> None:
            await finish(store_as_sent(target, request_id))
            await self._on_step(_STEP, "running")
            begun.is_sent = True

        try:
            return await self._execution.execute(
                begun.run,
                most_result_bytes=self._limits.max_result,
                sent=about_to_send,
                begun=begun_with,
                is_cancelled=lambda: begun.is_cancelled,
            )
        except RegistryUnwritableError:
            await asyncio.sleep(_RETRY_S)  # it is begun again after that
            raise

    async def _settle(self, begun: _Begun, executing: asyncio.Future[Done]) -> None:
        before = begun.run
        after = self._outcome(begun, executing)
        try:
            if after != before:
                await self._on_step(_STEP, "settled")
                await self._store(after)
                begun.run = after
                await self._on_step(_STEP, "ended")
                if is_final(after):
                    self._expiry_changed.set()
                    await self._tidy(before, after)
        finally:
            del self._begun[before.id]
            if begun.run.status is RunStatus.QUEUED:
                self._waiting[before.id] = begun.run
            if begun.run.status is RunStatus.QUEUED and _is_postponed(executing):
                self._rest(before.id)
            else:
                self._forget_failures(before.id)
            begun.over.set()
            self._news.set()

    def _rest(self, run_id: str) -> None:
        """Leave a run alone for a while."""
        failures = self._failures[run_id] = self._failures.get(run_id, 0) + 1
        loop = asyncio.get_running_loop()
        self._resting[run_id] = loop.call_later(pause_s(failures), self._rested, run_id)

    def _rested(self, run_id: str) -> None:
        del self._resting[run_id]
        self._news.set()

    def _forget_failures(self, run_id: str) -> None:
        self._failures.pop(run_id, None)
        timer = self._resting.pop(run_id, None)
        if timer is not None:
            timer.cancel()

    def _outcome(self, begun: _Begun, executing: asyncio.Future[Done]) -> Run:
        """Return the run after its execution has ended, in whatever way."""
        run, now = begun.run, self._utcnow()
        is_over = executing.cancelled() or _is_postponed(executing)
        if is_over and begun.is_cancelled:
            return cancelled(run, now)
        if executing.cancelled():
            if run.status is not RunStatus.QUEUED:
                run = interrupted(run, now) if begun.is_sent else withdrawn(run)
            return run
        error = executing.exception()
        if error is None:
            done = executing.result()
            return ended(run, now, **done._asdict())
        if isinstance(error, PostponedError):
            return postponed(run, error.error)
        if isinstance(error, RegistryUnwritableError) and run.status is RunStatus.QUEUED:
            return run  # nothing was sent
        _log.error("run_failed", run=run.id, path=run.path, exc_info=error)
        code = error.code if isinstance(error, RunFilesError) else "internal_error"
        return ended(run, now, result=None, error=RunError(code, "the manager failed; its log says more"))

    async def _store(self, run: Run) -> None:
        """Store how a run has ended; where that is not possible it is tried again while the daemon lives.

        Otherwise the next daemon finds a run that was executed, and interrupts it.
        """
        while True:
            try:
                await self._registry.save_run(run)
            except RegistryUnwritableError as error:
                _log.error("run_not_stored", run=run.id, status=run.status.value, problem=error.message)
                if self._is_ending:
                    return
                await asyncio.sleep(_RETRY_S)
            else:
                return

    async def _tidy(self, before: Run, after: Run) -> None:
        """Remove the files that a run does not need any more."""
        gone = {body_file(after.id), result_file(after.id)} - files_of(after)
        try:
            await self._files.remove(*gone)
        except RunFilesError as error:
            _log.warning("run_files_left", run=after.id, problem=error.message)  # the next start removes them
        self._stored.give_back(_bytes_of(before))

    async def _drop(self, run: Run) -> None:
        """Remove the body of a run that is not to be executed."""
        try:
            await self._files.remove(body_file(run.id))
        except RunFilesError as error:
            _log.warning("run_files_left", run=run.id, problem=error.message)
        self._stored.give_back(run.body_bytes)

    async def _expire(self) -> None:
        while True:
            self._expiry_changed.clear()
            try:
                await self._expire_due()
                upcoming = await self._registry.next_run_expiry()
            except UnavailableError as error:
                _log.warning("runs_not_expired", problem=error.message)
                upcoming = None
            wait_s = _LOOK_EVERY_S
            if upcoming is not None:
                wait_s = min(wait_s, max(0.0, (upcoming - self._utcnow()).total_seconds()) + 0.001)
            try:
                async with asyncio.timeout(wait_s):
                    await self._expiry_changed.wait()
            except TimeoutError:
                pass

    async def _expire_due(self) -> None:
        now = self._utcnow()
        while due := await self._registry.due_runs(now, _AT_ONCE):
            for run in due:
                await self._registry.save_run(over := expired(run))
                await self._tidy(run, over)
        before = now - timedelta(seconds=self._limits.retention_s)
        while forgotten := await self._registry.forget_runs(before, KEPT_RUNS):
            for run in forgotten:
                if run.status in WITH_RESULT:
                    await self._files.remove(*files_of(run))
                    self._stored.give_back(_bytes_of(run))


def _is_postponed(executing: asyncio.Future[Done]) -> bool:
    return not executing.cancelled() and isinstance(executing.exception(), PostponedError)


def _bytes_of(run: Run) -> int:
    """Return the size of the files that a run needs."""
    if run.status in OPEN:
        return run.body_bytes
    return run.result.size_bytes if run.status in WITH_RESULT and run.result is not None else 0
