"""Outcomes of requests: one record each, counted, and written down in batches off their path."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manager.domain.money import in_usd, micro_usd
from manager.domain.roles import RequestKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from manager.domain.record import RequestRecord
    from manager.errors import Reason


# Pairs of a role and a project that are counted by themselves; clients choose the names of projects.
_MOST_USERS = 500
_OTHER = "other"
# Seconds, as Prometheus wants them; a cold load of a large model takes minutes.
BUCKETS_S: Sequence[float] = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(slots=True)
class Histogram:
    """Counts per bucket of `BUCKETS_S`, the last one for all beyond, and the sum of all values."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    total_s: float = 0.0

    def observe(self, value_s: float) -> None:
        self.counts[bisect_left(BUCKETS_S, value_s)] += 1
        self.total_s += value_s


@dataclass(slots=True)
class Used:
    """Tokens and cost of the requests of one role and project."""

    input_tokens: int = 0
    output_tokens: int = 0
    cost_micro_usd: int = 0

    @property
    def cost_usd(self) -> float:
        return in_usd(self.cost_micro_usd)


class Traffic:
    """Counts what ended and hands each record on.

    Args:
        write: takes records in order, soon after they ended.
        share_logged: of requests that ended well, how many are written, 0 to 1; all others always are.
        trace: takes the records of those whose trace is sampled, whether they are written or not.
    """

    def __init__(
        self,
        write: Callable[[RequestRecord], None],
        *,
        share_logged: float = 1.0,
        trace: Callable[[RequestRecord], None] | None = None,
    ) -> None:
        self._write = write
        self._trace = trace
        self.share_logged = share_logged
        self.requests: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self.fallbacks: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self.target_errors: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.durations: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.first_tokens: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.used: dict[tuple[str, str], Used] = {}

    def failed(self, instance: str, reason: Reason) -> None:
        """An attempt on an instance failed, whatever became of the request."""
        self.target_errors[instance, reason.value] += 1

    def ended(self, record: RequestRecord) -> None:
        record.queue_ms = _to_microseconds(record.queue_ms)
        record.duration_ms = _to_microseconds(record.duration_ms)
        if record.ttfb_ms is not None:
            record.ttfb_ms = _to_microseconds(record.ttfb_ms)
        if record.start_ms is not None:
            record.start_ms = _to_microseconds(record.start_ms)
        if record.load_ms is not None:
            record.load_ms = _to_microseconds(record.load_ms)
        target = record.effective_target or ""
        self.requests[target, record.role or "", record.outcome] += 1
        if record.fallback and record.fallback_reason is not None:
            self.fallbacks[record.fallback_from or "", target, record.fallback_reason.value] += 1
        if target:
            self.durations[target].observe(record.duration_ms / 1000)
            if record.ttfb_ms is not None and _has_first_token(record):
                self.first_tokens[target].observe(record.ttfb_ms / 1000)
        if record.output_tokens is not None or record.input_tokens is not None or record.cost_usd:
            self._use(record)
        if self._trace is not None and record.sampled:
            self._trace(record)
        if record.outcome != "ok" or random.random() < self.share_logged:  # noqa: S311  (a sample, no secret)
            self._write(record)

    def _use(self, record: RequestRecord) -> None:
        """Count tokens and cost; beyond the bound for all other roles and projects together."""
        user = (record.role or "", record.project_id)
        used = self.used.get(user)
        if used is None:
            if len(self.used) >= _MOST_USERS:
                user = (_OTHER, _OTHER)
            used = self.used.setdefault(user, Used())
        used.input_tokens += record.input_tokens or 0
        used.output_tokens += record.output_tokens or 0
        if record.cost_usd:
            used.cost_micro_usd += micro_usd(record.cost_usd)


def _has_first_token(record: RequestRecord) -> bool:
    """Whether the first byte was a token: of a stream that ended well, of no whole answer or vectors."""
    return record.stream and record.outcome == "ok" and record.kind is RequestKind.GENERATE


def _to_microseconds(value_ms: float) -> float:
    """Rounded to 0.001; `round` goes by way of the decimal digits, which takes four times as long."""
    return int(value_ms * 1000 + 0.5) / 1000
