"""Async runs for tests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from manager.domain.runs import Run, RunCaller, RunStatus

NOW = datetime(2026, 11, 28, 12, 0, 0, tzinfo=UTC)


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
