"""Async runs: their states, the one table of transitions, and what follows a restart of the daemon."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from manager.domain import backoff
from manager.errors import IllegalTransitionError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from manager.domain.keys import Grant

# An idempotent run is begun so many times at most: it may be the cause of what interrupts it.
MOST_EXECUTIONS = 5
_LONGEST_PAUSE_S = 60.0
_BODY, _RESULT = ".body", ".result"


class RunStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    EXPIRED = "expired"


class RunFact(Enum):
    """Something that has happened to a run."""

    SENT = "its request is sent to a server"
    SUCCEEDED = "its result is stored"
    FAILED = "it ended with an error"
    CANCELLED = "its owner has cancelled it"
    INTERRUPTED = "the daemon ended while a server worked on it"
    REQUEUED = "it may be executed again"
    WITHDRAWN = "its request was not sent after all"
    POSTPONED = "nothing could serve it"
    EXPIRED = "its result is not kept any longer"


# A run is queued until its request is sent: it waits for its turn, for a slot or for a start.
_TABLE: Mapping[tuple[RunStatus, RunFact], RunStatus] = MappingProxyType(
    {
        (RunStatus.QUEUED, RunFact.SENT): RunStatus.RUNNING,
        (RunStatus.QUEUED, RunFact.POSTPONED): RunStatus.QUEUED,
        (RunStatus.QUEUED, RunFact.FAILED): RunStatus.FAILED,
        (RunStatus.QUEUED, RunFact.CANCELLED): RunStatus.CANCELLED,
        (RunStatus.RUNNING, RunFact.SUCCEEDED): RunStatus.SUCCEEDED,
        (RunStatus.RUNNING, RunFact.FAILED): RunStatus.FAILED,
        (RunStatus.RUNNING, RunFact.CANCELLED): RunStatus.CANCELLED,
        (RunStatus.RUNNING, RunFact.INTERRUPTED): RunStatus.INTERRUPTED,
        (RunStatus.RUNNING, RunFact.WITHDRAWN): RunStatus.QUEUED,
        # Of idempotent runs only (`interrupted`).
        (RunStatus.INTERRUPTED, RunFact.REQUEUED): RunStatus.QUEUED,
        (RunStatus.SUCCEEDED, RunFact.EXPIRED): RunStatus.EXPIRED,
        (RunStatus.FAILED, RunFact.EXPIRED): RunStatus.EXPIRED,
    }
)
OPEN = frozenset({RunStatus.QUEUED, RunStatus.RUNNING})
WITH_RESULT = frozenset({RunStatus.SUCCEEDED, RunStatus.FAILED})


@dataclass(frozen=True, slots=True)
class RunCaller:
    """The client that submitted a run. `trace` is trace id, span id and flags, `key` the name of its key."""

    project: str
    intent: str | None = None
    instance: str | None = None
    local_only: bool = False
    trace: tuple[str, str, str] | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class RunResult:
    """The answer of a run, whose body is in a file."""

    status: int
    content_type: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RunError:
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Run:
    """One run as it is stored. Times are UTC.

    Attributes:
        number: grows with each run; the order of the queue.
        path: of the gateway's inference route.
        lane: the role whose rules hold; None where the model decides.
        expires_s: how long the result is kept after the end.
        executions: how many times its request was sent by a worker of the daemon.
        instance: the one that answered, or was asked last.
        request_id: of its record.
        error: why it has failed; of a queued one why nothing could serve it when that was tried last.
    """

    number: int
    id: str
    status: RunStatus
    path: str
    model: str
    lane: str | None
    caller: RunCaller
    idempotent: bool
    expires_s: float
    body_bytes: int
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    expires_at: datetime | None = None
    executions: int = 0
    instance: str | None = None
    request_id: str | None = None
    error: RunError | None = None
    result: RunResult | None = None

    @property
    def queue(self) -> str:
        """The name of the queue that it shares with others: of its lane, or else of its model."""
        return self.lane or self.model


def is_of(run: Run, grant: Grant) -> bool:
    """Return whether a key has submitted a run: that one, and no earlier key of its name."""
    return run.caller.key == grant.name and run.created_at >= grant.created_at


def advance(status: RunStatus, fact: RunFact) -> RunStatus:
    """Return the status after `fact`.

    Raises:
        IllegalTransitionError: the table has no such row.
    """
    try:
        return _TABLE[status, fact]
    except KeyError:
        raise IllegalTransitionError(status.value, f"{fact.value} ({fact.name})") from None


def is_final(run: Run) -> bool:
    """Return whether nothing but the expiry of its result follows."""
    return run.status not in OPEN


# --- what happens to a run ------------------------------------------------------------------------


def sent(run: Run, now: datetime, *, instance: str, request_id: str) -> Run:
    """Return the run whose request is about to be sent to an instance."""
    return replace(
        run,
        status=advance(run.status, RunFact.SENT),
        started_at=now,
        executions=run.executions + 1,
        instance=instance,
        request_id=request_id,
        error=None,
    )


def paid(run: Run, *, instance: str) -> Run:
    """Return the run whose request is about to be sent to a paid server: it is not executed again."""
    return replace(run, instance=instance, idempotent=False)


def withdrawn(run: Run) -> Run:
    """Return the run whose request was stored as sent, and was not sent."""
    status = advance(run.status, RunFact.WITHDRAWN)
    return replace(run, status=status, started_at=None, executions=run.executions - 1)


def postponed(run: Run, error: RunError) -> Run:
    """Return the run that nothing could serve for now: it is queued, whatever was tried."""
    if run.status is RunStatus.RUNNING:
        run = withdrawn(run)
    return replace(run, status=advance(run.status, RunFact.POSTPONED), error=error)


def pause_s(failures: int) -> float:
    """Return how long a run waits after so many tries in a row in which nothing could serve it."""
    return min(_LONGEST_PAUSE_S, backoff.delay_s(failures))


def ended(
    run: Run,
    now: datetime,
    *,
    result: RunResult | None,
    error: RunError | None,
    instance: str | None = None,
    request_id: str | None = None,
) -> Run:
    """Return the run with its answer; with an `error` it has failed."""
    fact = RunFact.SUCCEEDED if error is None else RunFact.FAILED
    expires_at = now + timedelta(seconds=run.expires_s)
    return _over(
        run,
        fact,
        now,
        result=result,
        error=error,
        expires_at=expires_at,
        instance=instance or run.instance,
        request_id=request_id or run.request_id,
    )


def cancelled(run: Run, now: datetime) -> Run:
    return _over(run, RunFact.CANCELLED, now, error=None)


def interrupted(run: Run, now: datetime) -> Run:
    """Return the run after an end of the daemon: queued again if it may be executed another time."""
    over = _over(
        run,
        RunFact.INTERRUPTED,
        now,
        error=RunError("interrupted", "the daemon ended while a server worked on it; it was not repeated"),
    )
    if not run.idempotent:
        return over
    if run.executions >= MOST_EXECUTIONS:
        message = f"the daemon ended in each of {run.executions} executions; it is not tried again"
        return replace(over, error=RunError("interrupted", message))
    status = advance(over.status, RunFact.REQUEUED)
    return replace(over, status=status, started_at=None, ended_at=None, error=None)


def expired(run: Run) -> Run:
    return replace(run, status=advance(run.status, RunFact.EXPIRED), result=None)


def _over(run: Run, fact: RunFact, now: datetime, **changes: Any) -> Run:
    return replace(run, status=advance(run.status, fact), ended_at=now, **changes)


# --- which one is next ----------------------------------------------------------------------------


def next_run(waiting: Iterable[Run], begun: Iterable[Run]) -> Run | None:
    """Return the run to begin: the oldest of the queue with the fewest that are begun; None without one.

    Args:
        waiting: those that nothing was done for.
        begun: those that execute or wait for a slot of their lane.
    """
    load = Counter(run.queue for run in begun)
    return min(waiting, key=lambda run: (load[run.queue], run.number), default=None)


# --- files and restarts ---------------------------------------------------------------------------


class Save(NamedTuple):
    """Store the new state of a run."""

    run: Run


class Remove(NamedTuple):
    """Remove a file."""

    file: str


def body_file(run_id: str) -> str:
    """Return the name of the file with the body of a run's request."""
    return f"{run_id}{_BODY}"


def result_file(run_id: str) -> str:
    """Return the name of the file with the body of a run's answer."""
    return f"{run_id}{_RESULT}"


def files_of(run: Run) -> frozenset[str]:
    """Return the names of the files that a run needs."""
    if run.status in OPEN:
        return frozenset({body_file(run.id)})
    if run.status in WITH_RESULT and run.result is not None:
        return frozenset({result_file(run.id)})
    return frozenset()


def recovery(runs: Iterable[Run], files: Collection[str], now: datetime) -> tuple[Save | Remove, ...]:
    """Return what a daemon does at its start, in order, with the runs and the files that it finds.

    A run that was queued stays so. One that was executed is interrupted, or queued again if it is idempotent.
    A run without its file cannot go on; a file without a run is removed. Doing it twice does nothing more.

    Args:
        runs: all that are stored.
        files: the names in the directory of runs.
        now: UTC.
    """
    saves: list[Save] = []
    needed: set[str] = set()
    for run in runs:
        found = _recovered(run, files, now)
        if found != run:
            saves.append(Save(found))
        needed |= files_of(found)
    return (*saves, *(Remove(file) for file in sorted(set(files) - needed)))


def _recovered(run: Run, files: Collection[str], now: datetime) -> Run:
    if run.status is RunStatus.RUNNING:
        run = interrupted(run, now)
    if run.status is RunStatus.QUEUED and body_file(run.id) not in files:
        error = RunError("body_lost", f"the body of its request is not in {body_file(run.id)} any more")
        return ended(run, now, result=None, error=error)
    if run.status in WITH_RESULT and (is_due(run, now) or not files_of(run) <= set(files)):
        return expired(run)
    return run


def is_due(run: Run, now: datetime) -> bool:
    """Return whether the result of a run has been kept for long enough."""
    return run.status in WITH_RESULT and run.expires_at is not None and run.expires_at <= now
