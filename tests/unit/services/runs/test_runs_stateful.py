"""Runs under any sequence of clients' calls, ends of executions, deaths and restarts of the daemon.

The service, the registry and the files are the real ones. The execution is in the hands of the test. A death
is one of the process: nothing is stored after it, in the middle of any step.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from manager.adapters.registry import open_registry
from manager.adapters.run_files import DirectoryFiles
from manager.domain.runs import (
    MOST_EXECUTIONS,
    OPEN,
    Run,
    RunCaller,
    RunStatus,
    files_of,
)
from manager.errors import ManagerError, RegistryUnwritableError, RunFilesError, RunStateError
from manager.services.bodies import BodyBudget
from manager.services.runs.runs import NewRun, Runs
from tests.support.runs import ANSWER, LIMITS, NOW, Execution

if TYPE_CHECKING:
    from collections.abc import Awaitable

STEPS = ("body", "stored", "running", "settled", "ended", "cancelled")


class Died(Exception):  # noqa: N818  (the end of the process)
    """The process is gone."""


@dataclass
class Life:
    """What dies together."""

    dead: bool = False
    dies_at: str | None = None
    calls: int = 0

    async def step(self, _instance: str, step: str) -> None:
        if self.dies_at == step:
            self.dead = True
        if self.dead:
            raise Died

    def guard(self, error: type[ManagerError]) -> None:
        if self.dead:
            raise error("the process is dead")


class Mortal:
    """Passes calls on while its process lives, and counts those that go on."""

    def __init__(self, life: Life, inner: Any, error: type[ManagerError]) -> None:
        self._life = life
        self._inner = inner
        self._error = error

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            self._life.guard(self._error)
            self._life.calls += 1
            try:
                return await getattr(self._inner, name)(*arguments)
            finally:
                self._life.calls -= 1

        return call


class Machine(RuleBasedStateMachine):
    """One state directory through the lives of several daemons."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.now = NOW
        self.sent_to: dict[str, int] = {}
        self.accepted: dict[str, bool] = {}  # id -> idempotent
        self.seen: dict[str, RunStatus] = {}

    def teardown(self) -> None:
        self.runner.run(self._end())
        self.runner.close()
        shutil.rmtree(self.home)

    # --- lives ---

    @initialize()
    def begin(self) -> None:
        self.runner.run(self._begin())

    async def _begin(self) -> None:
        self.life = Life()
        self.registry = await open_registry(self.home / "registry.sqlite3")
        self.files = DirectoryFiles(self.home / "runs")
        stored = BodyBudget(LIMITS.max_stored)
        files = Mortal(self.life, self.files, RunFilesError)
        self.execution = Execution(files, stored, self.sent_to)
        self.runs = Runs(
            cast("Any", Mortal(self.life, self.registry, RegistryUnwritableError)),
            cast("Any", files),
            cast("Any", self.execution),
            stored=stored,
            limits=LIMITS,
            utcnow=lambda: self.now,
            on_step=self.life.step,
        )
        self.stored = stored
        await self.runs.recover()
        self.running = asyncio.ensure_future(self.runs.run())
        await self._settled()

    async def _end(self) -> None:
        self.running.cancel()
        await asyncio.wait({self.running})
        self.running.exception() if not self.running.cancelled() else None
        await self.registry.close()
        self.files.close()

    async def _settled(self) -> None:
        """Wait until nothing goes on but executions."""
        quiet = 0
        while quiet < 20:
            await asyncio.sleep(0.0002 if self.life.calls else 0)
            quiet = 0 if self.life.calls else quiet + 1

    async def _restart_if_dead(self) -> None:
        if self.life.dead:
            await self._end()
            await self._begin()

    async def _do(self, work: Awaitable[Any]) -> Any:
        """Do something as a client; None where it is refused, or where the daemon dies of it."""
        try:
            return await work
        except (Died, ManagerError):
            return None
        finally:
            await self._settled()
            await self._restart_if_dead()

    # --- rules ---

    @rule(step=st.sampled_from(STEPS))
    def arm(self, step: str) -> None:
        self.life.dies_at = step

    @rule()
    def disarm(self) -> None:
        self.life.dies_at = None

    @rule(is_idempotent=st.booleans(), model=st.sampled_from(["x", "y"]))
    def submit(self, is_idempotent: bool, model: str) -> None:
        new = NewRun("/api/chat", model, b"{}", RunCaller("p"), idempotent=is_idempotent)

        async def work() -> Run | None:
            run = await self.runs.submit(new)
            self.accepted[run.id] = is_idempotent
            return run

        self.runner.run(self._do(work()))

    # What is drawn depends on no state: threads decide how far the runs are.

    @rule(number=st.integers(0, 7), is_good=st.booleans())
    def finish(self, number: int, is_good: bool) -> None:
        begun = [run_id for run_id, end in self.execution.ends.items() if not end.done()]
        if not begun:
            return
        run_id = begun[number % len(begun)]

        async def work() -> None:
            self.execution.ends[run_id].set_result(is_good)

        self.runner.run(self._do(work()))

    @rule(number=st.integers(0, 15))
    def cancel(self, number: int) -> None:
        if not self.accepted:
            return
        run_id = [*self.accepted][number % len(self.accepted)]
        before = self._run(run_id).status

        async def work() -> Run | None:
            try:
                async with asyncio.timeout(5):
                    return await self.runs.cancel(run_id)
            except RunStateError:
                assert before not in OPEN
                raise

        run = self.runner.run(self._do(work()))
        assert run is None or run.status is RunStatus.CANCELLED

    @rule()
    def die(self) -> None:
        async def work() -> None:
            self.life.dead = True

        self.runner.run(self._do(work()))

    @rule()
    def end_in_order(self) -> None:
        async def work() -> None:
            self.life.dies_at = None
            await self.runs.drain(0.001, cut=asyncio.Event())
            await self._end()
            await self._begin()

        self.runner.run(work())

    @rule(seconds=st.sampled_from([1, 60]))
    def wait(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

        async def work() -> None:
            self.runs.limits = LIMITS  # has the clock looked at

        self.runner.run(self._do(work()))

    # --- facts ---

    def _run(self, run_id: str) -> Run:
        run = self.runner.run(self.registry.run(run_id))
        assert run is not None, "an accepted run is lost"
        return run

    @invariant()
    def facts(self) -> None:
        if not hasattr(self, "registry"):
            return
        found = {run.id: run for run in self.runner.run(self.registry.runs(None, None))}
        names = self.runner.run(self.files.names())
        assert set(self.accepted) <= set(found)
        for run_id, run in found.items():
            is_idempotent = run.idempotent
            most = MOST_EXECUTIONS if is_idempotent else 1
            assert self.sent_to.get(run_id, 0) <= run.executions <= most
            before = self.seen.get(run_id)
            if before is not None and before not in OPEN:
                assert run.status in (before, RunStatus.EXPIRED)
            self.seen[run_id] = run.status
            assert files_of(run) <= names
            is_here = run_id in self.runs._waiting or run_id in self.runs._begun
            assert is_here == (run.status in OPEN)
            if run.status is RunStatus.RUNNING:
                assert run_id in self.execution.ends
        needed = {name for run in found.values() for name in files_of(run)}
        assert names == needed
        assert self.stored.held_bytes == sum(
            2 if run.status in OPEN else len(ANSWER) for run in found.values() if files_of(run)
        )
        waiting = [run for run in found.values() if run.status is RunStatus.QUEUED]
        begun = [run for run in found.values() if run.status is RunStatus.RUNNING]
        assert len(begun) == min(LIMITS.concurrency, len(waiting) + len(begun)), "one waits for nothing"


Machine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestRuns = pytest.mark.timeout(280)(Machine.TestCase)
