"""The record of one request: what it asked for, what answered, and how it ended."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from manager.domain.roles import RequestKind
    from manager.errors import Reason

# How a request ended. Every request ends in exactly one of these.
Outcome: TypeAlias = Literal[
    "ok", "client_error", "client_gone", "refused", "upstream_error", "timeout", "cut"
]

# The provider of all servers that cost nothing.
LOCAL = "local"
# A record names at most so many failed attempts; `attempts` counts all of them.
_MAX_FAILED_ATTEMPTS = 16


class FailedAttempt(NamedTuple):
    """One attempt that brought no answer."""

    target: str
    reason: Reason


@dataclass
class RequestRecord:
    """One request, as it is logged. Times are milliseconds, None where a phase was not reached.

    `sampled` says whether the trace is recorded. `endpoint` is that of the effective target. `kind` is None
    for requests that manage models. `attempts` counts every time that the request was put to an instance, or
    that an instance was prepared for it; `failed_attempts` names the first of those that brought no answer.
    `provider` is `LOCAL`, or the paid server that was asked. `fallback_from` is the instance or policy that
    was preferred, None without a fallback. `key` is the name of the client's key, None where none is needed.

    `load_ms` is how long the server has loaded the model, where it says so; it is a part of `ttfb_ms`.

    `task_type`, `tier`, `task_confidence` and `task_reasoning` are of a request that left the choice of a
    model to the daemon, `requested_model` is what it named, and `routing_ms` how long the choice took.

    `shadow_target` is the instance that a decision names which is only recorded, `shadow_refused` why it
    would refuse, and `disagreement` how it differs from the answer.

    The class has no slots: `begun` reads the defaults from the class.
    """

    ts: datetime
    request_id: str
    trace_id: str
    span_id: str
    parent_span_id: str | None
    project_id: str
    path: str
    sampled: bool = False
    kind: RequestKind | None = None
    lane: str | None = None
    intent: str | None = None
    local_only: bool = False
    role: str | None = None
    model: str | None = None
    requested_target: str | None = None
    effective_target: str | None = None
    provider: str = LOCAL
    endpoint: str | None = None
    policy: str | None = None
    fallback: bool = False
    fallback_reason: Reason | None = None
    fallback_from: str | None = None
    attempts: int = 0
    failed_attempts: tuple[FailedAttempt, ...] = ()
    status: int = 0
    outcome: Outcome = "ok"
    stream: bool = False
    queue_ms: float = 0.0
    start_ms: float | None = None
    load_ms: float | None = None
    ttfb_ms: float | None = None
    duration_ms: float = 0.0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float = 0.0
    key: str | None = None
    shadow_target: str | None = None
    shadow_refused: Reason | None = None
    disagreement: str | None = None
    requested_model: str | None = None
    task_type: str | None = None
    tier: str | None = None
    task_confidence: float | None = None
    task_reasoning: str | None = None
    routing_ms: float | None = None

    @classmethod
    def begun(
        cls,
        *,
        ts: datetime,
        request_id: str,
        trace_id: str,
        span_id: str,
        parent_span_id: str | None,
        project_id: str,
        path: str,
        sampled: bool,
        kind: RequestKind | None,
        lane: str | None,
        intent: str | None,
    ) -> Self:
        """Return a record with what is known at the beginning, in a third of the constructor's time."""
        record = cls.__new__(cls)
        record.ts = ts
        record.request_id = request_id
        record.trace_id = trace_id
        record.span_id = span_id
        record.parent_span_id = parent_span_id
        record.project_id = project_id
        record.path = path
        record.sampled = sampled
        record.kind = kind
        record.lane = lane
        record.intent = intent
        return record

    def attempt_failed(self, target: str, reason: Reason) -> None:
        """Note an attempt that brought no answer."""
        if len(self.failed_attempts) < _MAX_FAILED_ATTEMPTS:
            self.failed_attempts = (*self.failed_attempts, FailedAttempt(target, reason))

    def as_dict(self) -> dict[str, Any]:
        """Return every field, in order, as JSON can say it."""
        document = with_defaults(self.__dict__)
        if self.failed_attempts:
            document["failed_attempts"] = [attempt._asdict() for attempt in self.failed_attempts]
        return document


_UNSET: dict[str, Any] = {
    entry.name: None if entry.default is MISSING else entry.default for entry in fields(RequestRecord)
}


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return every field of a record, in order; those that `values` lacks have their default."""
    return {**_UNSET, **values}


def never(_trace_id: str) -> bool:
    """Sample no trace. The default while nothing records traces."""
    return False


Samples: TypeAlias = "Callable[[str], bool]"
