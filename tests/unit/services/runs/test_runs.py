"""Runs at the moments that no client can choose: between two steps, and when nothing can be stored."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from operator import eq
from typing import TYPE_CHECKING, Any, cast

import pytest

from manager.adapters.registry import open_registry
from manager.adapters.run_files import DirectoryFiles
from manager.domain.runs import Run, RunCaller, RunError, RunStatus
from manager.errors import RegistryUnwritableError, RunFilesError
from manager.services.bodies import BodyBudget
from manager.services.runs.execution import PostponedError
from manager.services.runs.runs import NewRun, Runs
from tests.support.inside import until
from tests.support.runs import LIMITS, NOW, Execution

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NEW = NewRun("/api/chat", "tiny", b"{}", RunCaller("p"))


class Refusing:
    """A registry that does not store runs of some statuses."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry
        self.refuses: set[RunStatus] = set()
        self.refused = 0

    async def save_run(self, run: Run) -> None:
        if run.status in self.refuses:
            self.refused += 1
            raise RegistryUnwritableError("the disk is full")
        await self._registry.save_run(run)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)


class Rig:
    """The service with a real registry and real files, and an execution that the test ends.

    `holds` is the step at which everything waits for `goes_on`.
    """

    def __init__(self, registry: Any, files: DirectoryFiles) -> None:
        self.registry = Refusing(registry)
        self.files = files
        self.stored = BodyBudget(LIMITS.max_stored)
        self.execution = Execution(files, self.stored, {})
        self.holds = ""
        self.is_held = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.runs = Runs(
            cast("Any", self.registry),
            files,
            cast("Any", self.execution),
            stored=self.stored,
            limits=LIMITS,
            utcnow=lambda: NOW,
            on_step=self.step,
        )

    async def step(self, _instance: str, step: str) -> None:
        if step == self.holds:
            self.is_held.set()
            await self.goes_on.wait()

    async def status(self, run: Run) -> RunStatus:
        return (await self.runs.find(run.id)).status

    async def sent(self, run: Run) -> None:
        """Wait until a server works on a run."""
        await until(lambda: run.id in self.execution.sent_to and run.id in self.execution.ends)

    async def ended(self, run: Run) -> Run:
        await until(lambda: run.id not in self.runs._begun and run.id not in self.runs._waiting)
        return await self.runs.find(run.id)


@asynccontextmanager
async def rig(home: Path) -> AsyncIterator[Rig]:
    registry = await open_registry(home / "registry.sqlite3")
    files = DirectoryFiles(home / "runs")
    found = Rig(registry, files)
    await found.runs.recover()
    running = asyncio.ensure_future(found.runs.run())
    yield found
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled(), running.exception()
    await registry.close()
    files.close()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manager.services.runs.runs._RETRY_S", 0.01)


async def test_a_pause_between_storing_and_sending_leaves_a_run_in_the_queue(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        one.holds = "running"
        run = await one.runs.submit(NEW)
        await one.is_held.wait()
        assert await one.status(run) is RunStatus.RUNNING
        await one.runs.drain(0, cut=asyncio.Event())
        found = await one.runs.find(run.id)
        assert (found.status, found.executions, found.started_at) == (RunStatus.QUEUED, 0, None)
        assert one.execution.sent_to == {}
        one.holds = ""
        one.runs.resume()
        await one.sent(run)
        one.execution.ends[run.id].set_result(True)
        assert (await one.ended(run)).status is RunStatus.SUCCEEDED


async def test_a_run_that_is_cancelled_between_storing_and_sending_is_never_sent(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        one.holds = "running"
        run = await one.runs.submit(NEW)
        await one.is_held.wait()
        assert (await one.runs.cancel(run.id)).status is RunStatus.CANCELLED
        assert one.execution.sent_to == {}
        assert await one.files.names() == frozenset()
        assert one.stored.held_bytes == 0


async def test_a_run_that_cannot_be_stored_as_sent_is_not_sent_until_it_can(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        one.registry.refuses = {RunStatus.RUNNING}
        run = await one.runs.submit(NEW)
        await until(lambda: one.registry.refused >= 2)
        assert await one.status(run) is RunStatus.QUEUED
        assert one.execution.sent_to == {}
        one.registry.refuses = set()
        await one.sent(run)
        one.execution.ends[run.id].set_result(True)
        found = await one.ended(run)
        assert (found.status, found.executions) == (RunStatus.SUCCEEDED, 1)


async def test_a_run_whose_server_could_not_be_reached_is_tried_again_and_holds_no_place_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []

    def pause_s(failures: int) -> float:
        pauses.append(failures)
        return 0.01 if failures < 3 else 1000

    monkeypatch.setattr("manager.services.runs.runs.pause_s", pause_s)
    async with rig(tmp_path) as one:
        one.runs.limits = replace(LIMITS, concurrency=1)
        run = await one.runs.submit(NEW)
        for number in (1, 2, 3):
            times = partial(one.execution.sent_to.get, run.id)
            await until(times, partial(eq, number))
            one.execution.ends[run.id].set_exception(PostponedError(RunError("overloaded", f"no {number}")))
        await until(lambda: pauses == [1, 2, 3])
        found = await one.runs.find(run.id)
        assert (found.status, found.executions, found.error) == (
            RunStatus.QUEUED,
            0,
            RunError("overloaded", "no 3"),
        )
        other = await one.runs.submit(NEW)
        await one.sent(other)
        one.execution.ends[other.id].set_result(True)
        assert (await one.ended(other)).status is RunStatus.SUCCEEDED
        assert (await one.runs.cancel(run.id)).status is RunStatus.CANCELLED
        assert (one.runs._failures, one.runs._resting) == ({}, {})
        assert len(await one.files.names()) == 1


async def test_a_run_that_is_cancelled_as_nothing_can_serve_it_is_over(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        one.holds = "settled"
        run = await one.runs.submit(NEW)
        await one.sent(run)
        begun = one.runs._begun[run.id]
        begun.is_cancelled = True
        one.execution.ends[run.id].set_exception(PostponedError(RunError("overloaded", "no")))
        await one.is_held.wait()
        one.goes_on.set()
        assert (await one.ended(run)).status is RunStatus.CANCELLED


async def test_a_run_whose_end_cannot_be_stored_ends_once_it_can(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        one.registry.refuses = {RunStatus.SUCCEEDED}
        run = await one.runs.submit(NEW)
        await one.sent(run)
        one.execution.ends[run.id].set_result(True)
        await until(lambda: one.registry.refused >= 2)
        assert await one.status(run) is RunStatus.RUNNING
        one.registry.refuses = set()
        assert (await one.ended(run)).status is RunStatus.SUCCEEDED


async def test_the_end_of_the_daemon_does_not_wait_for_a_registry_that_cannot_be_written(
    tmp_path: Path,
) -> None:
    async with asyncio.timeout(20), rig(tmp_path) as one:
        one.registry.refuses = {RunStatus.INTERRUPTED}
        run = await one.runs.submit(NEW)
        await one.sent(run)
    async with rig(tmp_path) as other:
        assert await other.status(run) is RunStatus.INTERRUPTED


@pytest.mark.parametrize(
    ("error", "code"),
    [(RunFilesError("the disk is full"), "run_files_failed"), (ZeroDivisionError(), "internal_error")],
)
async def test_an_execution_that_cannot_store_anything_fails_and_the_others_go_on(
    tmp_path: Path, error: Exception, code: str
) -> None:
    async with rig(tmp_path) as one:
        run = await one.runs.submit(NEW)
        await one.sent(run)
        one.execution.ends[run.id].set_exception(error)
        found = await one.ended(run)
        assert (found.status, found.result) == (RunStatus.FAILED, None)
        assert found.error is not None
        assert found.error.code == code
        assert await one.files.names() == frozenset()
        await one.sent(await one.runs.submit(NEW))


async def test_a_submission_that_cannot_be_stored_leaves_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        one.registry.refuses = {RunStatus.QUEUED}
        for _ in range(LIMITS.max_queued + 1):
            with pytest.raises(RegistryUnwritableError):
                await one.runs.submit(NEW)
        assert await one.files.names() == frozenset()
        assert one.stored.held_bytes == 0
        one.registry.refuses = set()
        await one.runs.submit(NEW)


async def test_a_client_that_leaves_while_its_run_is_stored_does_not_leave_half_of_one(
    tmp_path: Path,
) -> None:
    async with rig(tmp_path) as one:
        one.holds = "body"
        submitting = asyncio.ensure_future(one.runs.submit(NEW))
        await one.is_held.wait()
        submitting.cancel()
        await asyncio.wait({submitting})
        one.goes_on.set()
        await until(lambda: one.execution.sent_to)


async def test_a_cancel_that_cannot_be_stored_leaves_the_run_in_the_queue(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        one.runs.pause()
        one.registry.refuses = {RunStatus.CANCELLED}
        run = await one.runs.submit(NEW)
        with pytest.raises(RegistryUnwritableError):
            await one.runs.cancel(run.id)
        one.registry.refuses = set()
        one.runs.resume()
        await one.sent(run)


async def test_new_limits_hold_at_once(tmp_path: Path) -> None:
    async with rig(tmp_path) as one:
        runs = [await one.runs.submit(NEW) for _ in range(4)]
        for run in runs[: LIMITS.concurrency]:
            await one.sent(run)
        assert len(one.execution.ends) == LIMITS.concurrency
        one.runs.limits = replace(LIMITS, concurrency=4, max_stored=77)
        for run in runs:
            await one.sent(run)
        assert one.stored.most_bytes == 77


async def test_files_that_cannot_be_removed_cost_a_warning_and_go_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_names: str) -> None:
        raise RunFilesError("read-only")

    async with rig(tmp_path) as one:
        run = await one.runs.submit(NEW)
        await one.sent(run)
        with monkeypatch.context() as patched:
            patched.setattr(one.files, "remove", fails)
            assert (await one.runs.cancel(run.id)).status is RunStatus.CANCELLED
        assert await one.files.names() == {f"{run.id}.body"}
    async with rig(tmp_path) as other:
        assert await other.files.names() == frozenset()
