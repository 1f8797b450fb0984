"""Usage: what requests have used, added up by hour and day. Pure.

The times of requests are counted in buckets, so that percentiles of any group of hours can be told. All
buckets are the lanes of one large integer: two groups are added with one addition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias, get_args

from manager.domain.models import DEFAULT_TAG, model_key
from manager.domain.money import micro_usd

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from manager.domain.record import RequestRecord

Dimension: TypeAlias = Literal["project", "key", "role", "model", "instance", "day", "hour"]
DIMENSIONS: Final[tuple[Dimension, ...]] = get_args(Dimension)

HOUR_S: Final = 3600
DAY_S: Final = 86_400
# The group of all requests beyond the bound of groups in one hour or day.
OTHER: Final = "other"

# The upper edges of the buckets are 1 ms and each power of 2^(1/4) of it, so that a percentile is off by 9 %
# at most. The last bucket takes all beyond two hours.
_STEPS_A_DOUBLING: Final = 4
BUCKETS: Final = 93
# No bucket of a year gets 2^32 requests.
_LANE_BITS: Final = 32
_LANE: Final = (1 << _LANE_BITS) - 1
LATENCY_BYTES: Final = BUCKETS * _LANE_BITS // 8


class Group(NamedTuple):
    """The values that usage is added up by. Empty texts stand for none."""

    project: str
    key: str
    role: str
    model: str
    instance: str


@dataclass(slots=True)
class Sums:
    """The sums of some requests. `latencies` counts the times of those that were answered, by bucket."""

    requests: int = 0
    ok: int = 0
    fallbacks: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_micro_usd: int = 0
    answered_us: int = 0
    latencies: int = 0

    def add(self, other: Sums) -> None:
        self.requests += other.requests
        self.ok += other.ok
        self.fallbacks += other.fallbacks
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.cost_micro_usd += other.cost_micro_usd
        self.answered_us += other.answered_us
        self.latencies += other.latencies

    @property
    def mean_ms(self) -> float | None:
        """The mean time of the requests that were answered; None where none was."""
        return self.answered_us / self.ok / 1000 if self.ok else None

    def percentile_ms(self, share: float) -> float | None:
        """Return the time within which a share of the answered requests came to their end."""
        return percentile_ms(self.latencies, share)


def sums_of(counts: Sequence[int], latencies: int) -> Sums:
    """Return sums from all numbers but the latencies, in the order of the fields."""
    requests, ok, fallbacks, input_tokens, output_tokens, cost_micro_usd, answered_us = counts
    return Sums(requests, ok, fallbacks, input_tokens, output_tokens, cost_micro_usd, answered_us, latencies)


class Sample(NamedTuple):
    """The usage of one request."""

    ended_s: int
    group: Group
    sums: Sums


def sample_of(record: RequestRecord) -> Sample | None:
    """Return what a request has used; None for one that manages models."""
    if record.kind is None:
        return None
    is_ok = record.outcome == "ok"
    return Sample(
        int(record.ts.timestamp() + record.duration_ms / 1000),
        Group(
            record.project_id,
            record.key or "",
            record.role or "",
            # One name of each model: those of other servers than Ollama have no tags.
            "" if record.model is None else model_key(record.model).removesuffix(f":{DEFAULT_TAG}"),
            record.effective_target or "",
        ),
        Sums(
            1,
            int(is_ok),
            int(record.fallback),
            record.input_tokens or 0,
            record.output_tokens or 0,
            micro_usd(record.cost_usd) if record.cost_usd else 0,
            int(record.duration_ms * 1000) if is_ok else 0,
            1 << (_LANE_BITS * bucket_of(record.duration_ms)) if is_ok else 0,
        ),
    )


def bucket_of(value_ms: float) -> int:
    """Return the bucket of a time."""
    if value_ms <= 1:
        return 0
    return min(BUCKETS - 1, math.ceil(_STEPS_A_DOUBLING * math.log2(value_ms)))


def percentile_ms(latencies: int, share: float) -> float | None:
    """Return a percentile of counted times, between the edges of its bucket; None where nothing is counted.

    Args:
        latencies: the lanes.
        share: of the requests, 0 to 1.
    """
    counts = [(latencies >> (_LANE_BITS * bucket)) & _LANE for bucket in range(BUCKETS)]
    total = sum(counts)
    if not total:
        return None
    wanted = share * total
    bucket = 0
    while wanted > counts[bucket] and any(counts[bucket + 1 :]):
        wanted -= counts[bucket]
        bucket += 1
    upper = 2 ** (bucket / _STEPS_A_DOUBLING)
    if not bucket:
        return upper
    lower = 2 ** ((bucket - 1) / _STEPS_A_DOUBLING)
    return float(lower * (upper / lower) ** (wanted / counts[bucket] if counts[bucket] else 1.0))


def added(samples: Iterable[Sample], seconds: int) -> dict[tuple[int, Group], Sums]:
    """Return the sums of samples by time and group.

    Args:
        samples: in any order.
        seconds: the length of a period, `HOUR_S` or `DAY_S`; a period is named by its first second.
    """
    sums: dict[tuple[int, Group], Sums] = {}
    for sample in samples:
        place = (sample.ended_s // seconds * seconds, sample.group)
        sums.setdefault(place, Sums()).add(sample.sums)
    return sums


class Span(NamedTuple):
    """Seconds since the epoch: from the first one, to before the last one."""

    begins: int
    ends: int


def covered(wanted: Span, *, hours_since: int, needs_hours: bool = False) -> tuple[tuple[Span, ...], Span]:
    """Return the hours and the days whose sums make up a time, without an hour counted twice.

    The time is widened to whole hours; where the hours are forgotten, to whole days.

    Args:
        wanted: the time.
        hours_since: the first second whose hours are kept; the begin of a day.
        needs_hours: return no days; the time begins with the first hour that is kept.
    """
    begins, ends = _down(wanted.begins, HOUR_S), _up(wanted.ends, HOUR_S)
    if needs_hours:
        begins, ends = max(begins, hours_since), max(ends, hours_since)
        return (Span(begins, ends),), Span(begins, begins)
    if begins < hours_since:
        begins = _down(begins, DAY_S)
    if ends < hours_since:
        ends = _up(ends, DAY_S)
    first_day, last_day = _up(begins, DAY_S), _down(ends, DAY_S)
    if first_day >= last_day:
        return (Span(begins, max(begins, ends)),), Span(first_day, first_day)
    edges = (Span(begins, first_day), Span(last_day, ends))
    return tuple(edge for edge in edges if edge.begins < edge.ends), Span(first_day, last_day)


def _down(second: int, seconds: int) -> int:
    return second // seconds * seconds


def _up(second: int, seconds: int) -> int:
    return -(-second // seconds) * seconds
