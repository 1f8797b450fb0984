"""The table of async runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    DateTime,
    Float,
    Index,
    String,
    Table,
    Text,
    delete,
    func,
    select,
)

from manager.adapters.registry.dialects import Whole, upsert
from manager.adapters.registry.tables import aware, metadata, stored
from manager.domain.runs import OPEN, WITH_RESULT, Run, RunCaller, RunError, RunResult, RunStatus

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy import Connection, Row

    from manager.domain.keys import Grant

runs = Table(
    "runs",
    metadata,
    Column("number", Whole, primary_key=True),
    Column("id", String, nullable=False, unique=True),
    Column("status", String, nullable=False),
    Column("path", String, nullable=False),
    Column("model", Text, nullable=False),
    Column("lane", Text),
    Column("caller", JSON, nullable=False),
    Column("idempotent", Boolean, nullable=False),
    Column("expires_s", Float, nullable=False),
    Column("body_bytes", Whole, nullable=False),
    Column("created_at", DateTime, nullable=False),
    Column("started_at", DateTime),
    Column("ended_at", DateTime),
    Column("expires_at", DateTime),
    Column("executions", Whole, nullable=False),
    Column("instance", String),
    Column("request_id", String),
    Column("error", JSON(none_as_null=True)),
    Column("result", JSON(none_as_null=True)),
    Index("runs_by_status", "status", "number"),
)

# Runs that are removed in one transaction.
_AT_ONCE = 500
_OPEN = sorted(OPEN)
_WITH_RESULT = sorted(WITH_RESULT)


def save(connection: Connection, run: Run) -> None:
    connection.execute(upsert(connection, runs), _from_run(run))


def find(connection: Connection, run_id: str) -> Run | None:
    row = connection.execute(select(runs).where(runs.c.id == run_id)).first()
    return None if row is None else _to_run(row)


def newest(
    connection: Connection, status: RunStatus | None, limit: int | None, grant: Grant | None
) -> tuple[Run, ...]:
    statement = select(runs).order_by(runs.c.number.desc()).limit(limit)
    if status is not None:
        statement = statement.where(runs.c.status == status.value)
    if grant is not None:  # as `domain.runs.is_of`
        is_named = runs.c.caller["key"].as_string() == grant.name
        statement = statement.where(is_named & (runs.c.created_at >= stored(grant.created_at)))
    return tuple(map(_to_run, connection.execute(statement)))


def due(connection: Connection, now: datetime, limit: int) -> tuple[Run, ...]:
    is_due = runs.c.status.in_(_WITH_RESULT) & (runs.c.expires_at <= stored(now))
    return tuple(map(_to_run, connection.execute(select(runs).where(is_due).limit(limit))))


def next_expiry(connection: Connection) -> datetime | None:
    """Return the time at which the next result has been kept for long enough."""
    statement = select(func.min(runs.c.expires_at)).where(runs.c.status.in_(_WITH_RESULT))
    found: datetime | None = connection.execute(statement).scalar()
    return None if found is None else aware(found)


def forgettable(connection: Connection, ended_before: datetime, kept: int) -> tuple[Run, ...]:
    """Return some of the runs that need not be kept: they ended long ago, or there are too many."""
    has_ended = runs.c.status.not_in(_OPEN)
    old = select(runs).where(has_ended & (runs.c.ended_at < stored(ended_before))).limit(_AT_ONCE)
    beyond = select(runs).where(has_ended).order_by(runs.c.number.desc()).offset(kept).limit(_AT_ONCE)
    found = {row.id: _to_run(row) for part in (old, beyond) for row in connection.execute(part)}
    return tuple(found.values())


def forget(connection: Connection, ids: Sequence[str]) -> None:
    connection.execute(delete(runs).where(runs.c.id.in_(ids)))


def _from_run(run: Run) -> dict[str, Any]:
    caller, error, result = run.caller, run.error, run.result
    return {
        "number": run.number,
        "id": run.id,
        "status": run.status.value,
        "path": run.path,
        "model": run.model,
        "lane": run.lane,
        "caller": {
            "project": caller.project,
            "intent": caller.intent,
            "instance": caller.instance,
            "local_only": caller.local_only,
            "trace": caller.trace and list(caller.trace),
            "key": caller.key,
        },
        "idempotent": run.idempotent,
        "expires_s": run.expires_s,
        "body_bytes": run.body_bytes,
        "created_at": stored(run.created_at),
        "started_at": stored(run.started_at),
        "ended_at": stored(run.ended_at),
        "expires_at": stored(run.expires_at),
        "executions": run.executions,
        "instance": run.instance,
        "request_id": run.request_id,
        "error": error and {"code": error.code, "message": error.message},
        "result": result
        and {
            "status": result.status,
            "content_type": result.content_type,
            "size_bytes": result.size_bytes,
        },
    }


def _to_run(row: Row[Any]) -> Run:
    caller = row.caller
    return Run(
        number=row.number,
        id=row.id,
        status=RunStatus(row.status),
        path=row.path,
        model=row.model,
        lane=row.lane,
        caller=RunCaller(
            caller["project"],
            caller["intent"],
            caller["instance"],
            caller["local_only"],
            caller["trace"] and tuple(caller["trace"]),
            caller.get("key"),  # runs of earlier versions have none
        ),
        idempotent=row.idempotent,
        expires_s=row.expires_s,
        body_bytes=row.body_bytes,
        created_at=aware(row.created_at),
        started_at=row.started_at and aware(row.started_at),
        ended_at=row.ended_at and aware(row.ended_at),
        expires_at=row.expires_at and aware(row.expires_at),
        executions=row.executions,
        instance=row.instance,
        request_id=row.request_id,
        error=row.error and RunError(**row.error),
        result=row.result and RunResult(**row.result),
    )
