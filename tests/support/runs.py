"""Async runs for tests."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from manager.domain.runs import Run, RunCaller, RunError, RunResult, RunStatus, result_file
from manager.domain.target import Target
from manager.services.runs.execution import Done
from manager.services.runs.runs import RunLimits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from manager.services.bodies import BodyBudget

NOW = datetime(2026, 11, 28, 12, 0, 0, tzinfo=UTC)
ANSWER = b"an answer"
LIMITS = RunLimits(
    concurrency=2,
    max_queued=6,
    max_body=100,
    max_result=100,
    max_stored=10_000,
    expires_s=50.0,
    retention_s=10_000.0,
)


def a_run(number: int = 1, **changes: Any) -> Run:
    """A run that was queued, unless `changes` say otherwise."""
    values: dict[str, Any] = {
        "number": number,
        "id": f"run_{number}",
        "status": RunStatus.QUEUED,
        "path": "/api/chat",
        "model": "tiny",
        "lane": None,
        "caller": RunCaller("default"),
        "idempotent": False,
        "expires_s": 60.0,
        "body_bytes": 10,
        "created_at": NOW,
    }
    return Run(**(values | changes))


@dataclass
class Execution:
    """Executes nothing: the test ends each execution. `sent_to` counts the requests that a server got."""

    files: Any
    stored: BodyBudget
    sent_to: dict[str, int]
    ends: dict[str, asyncio.Future[bool]] = field(default_factory=dict)

    async def execute(
        self,
        run: Run,
        *,
        most_result_bytes: int,
        sent: Callable[[Target, str], Awaitable[None]],
        is_cancelled: Callable[[], bool],
        **_more: Any,
    ) -> Done:
        slot = self.ends[run.id] = asyncio.get_running_loop().create_future()
        try:
            await sent(Target("a", "http://a"), "r")
            self.sent_to[run.id] = self.sent_to.get(run.id, 0) + 1
            is_good = await slot
            assert self.stored.take(len(ANSWER))
            await self.files.save(result_file(run.id), ANSWER)
        finally:
            del self.ends[run.id]
        error = None if is_good else RunError("upstream_error", "no")
        return Done(RunResult(200, "text/plain", len(ANSWER)), error, "a", "r")
