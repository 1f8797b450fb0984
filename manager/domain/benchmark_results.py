"""Benchmarks as they are stored: their status, the latest figures of each model, and two side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from manager.domain.benchmarks import FIGURES, NO_FIGURE, figure, groups_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from manager.domain.benchmarks import Figure, Group, Sample, Target


class BenchmarkStatus(StrEnum):
    """The status of a benchmark. `interrupted`: the daemon ended while it ran."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"


OPEN: Final = frozenset({BenchmarkStatus.QUEUED, BenchmarkStatus.RUNNING})
_NEXT: Mapping[BenchmarkStatus, frozenset[BenchmarkStatus]] = MappingProxyType(
    {
        BenchmarkStatus.QUEUED: frozenset({BenchmarkStatus.RUNNING, BenchmarkStatus.CANCELLED}),
        BenchmarkStatus.RUNNING: frozenset(
            {
                BenchmarkStatus.SUCCEEDED,
                BenchmarkStatus.FAILED,
                BenchmarkStatus.CANCELLED,
                BenchmarkStatus.INTERRUPTED,
            }
        ),
    }
)
# The source of what this daemon has measured itself.
LOCAL: Final = "local"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark as it is stored. `number` orders them; `done` of `total` requests were measured.

    Attributes:
        source: LOCAL, or who has measured it.
        project: the one that its requests count for.
        workloads: the names of its workloads.
        targets: the models that it measures.
        repeat: how many times each prompt is asked.
        error: why it has failed.
        groups: its figures.
    """

    number: int
    id: str
    status: BenchmarkStatus
    source: str
    project: str
    workloads: tuple[str, ...]
    targets: tuple[Target, ...]
    repeat: int
    total: int
    created_at: datetime
    done: int = 0
    started_at: datetime | None = None
    ended_at: datetime | None = None
    error: str | None = None
    groups: tuple[Group, ...] = ()

    @property
    def is_open(self) -> bool:
        return self.status in OPEN

    def moved(self, status: BenchmarkStatus, at: datetime, error: str | None = None) -> Benchmark:
        """Return the benchmark in another status.

        Raises:
            ValueError: that status cannot follow.
        """
        if status not in _NEXT.get(self.status, ()):
            raise ValueError(f"a benchmark that is {self.status} does not become {status}")
        if status is BenchmarkStatus.RUNNING:
            return replace(self, status=status, started_at=at)
        return replace(self, status=status, ended_at=at, error=error)

    def measured(self, samples: Sequence[Sample]) -> Benchmark:
        """Return the benchmark with the figures of all samples so far."""
        return replace(self, done=len(samples), groups=groups_of(samples))

    def concerns(self, *, instance: str | None, model: str | None, workload: str | None) -> bool:
        """Return whether it measures this instance, model and workload; None is any."""
        pairs = {*self.targets, *(one.target for one in self.groups)}
        return (workload is None or workload in self.workloads) and any(
            instance in (None, one.instance) and model in (None, one.model) for one in pairs
        )


class Latest(NamedTuple):
    """The latest figures of a model on an instance, by workload."""

    target: Target
    score: float
    measured: tuple[tuple[Benchmark, Group], ...]


def latest(benchmarks: Iterable[Benchmark]) -> tuple[Latest, ...]:
    """Return the latest figures of each model on each instance, in the order of their names.

    The newest benchmark that has succeeded counts for each workload. A group without any answer says nothing
    of the model, and does not count. The score of a model is the mean of those of its workloads.
    """
    found: dict[Target, dict[str, tuple[Benchmark, Group]]] = {}
    for one in sorted(benchmarks, key=lambda one: one.number, reverse=True):
        if one.status is BenchmarkStatus.SUCCEEDED:
            for group in one.groups:
                if group.is_answered:
                    found.setdefault(group.target, {}).setdefault(group.workload, (one, group))
    return tuple(
        Latest(
            target,
            figure(group.score for _, group in by_workload.values()).mean or 0.0,
            tuple(one for _, one in sorted(by_workload.items())),
        )
        for target, by_workload in sorted(found.items())
    )


# --- two benchmarks side by side ---


class Compared(NamedTuple):
    """One figure of a group in two benchmarks; `difference` is the mean of `b` less that of `a`."""

    a: Figure
    b: Figure
    difference: float | None


class ComparedGroup(NamedTuple):
    """The figures of one workload on one instance with one model, by name, and the scores.

    Where `a` and `b` have measured different ones, `instance` and `model` name both: `cpu / gpu0`.
    """

    workload: str
    instance: str
    model: str
    figures: Mapping[str, Compared]
    score_a: float | None
    score_b: float | None


def compared(a: Sequence[Group], b: Sequence[Group]) -> tuple[ComparedGroup, ...]:
    """Return the groups of two benchmarks side by side, those of `a` first.

    Two groups belong together where workload, instance and model are the same. Where each benchmark has
    one group of a workload, these belong together too: that compares models and instances.
    """
    ones = {(one.workload, one.instance, one.model): one for one in a}
    others = {(one.workload, one.instance, one.model): one for one in b}
    pairs: list[tuple[Group | None, Group | None]] = []
    left = dict(others)
    for key, one in ones.items():
        other = left.pop(key, None)
        if other is None:
            other = _only(left.values(), ones.values(), key[0])
            if other is not None:
                del left[other.workload, other.instance, other.model]
        pairs.append((one, other))
    pairs += [(None, other) for other in left.values()]
    return tuple(_side_by_side(one, other) for one, other in pairs)


def _only(left: Iterable[Group], ones: Iterable[Group], workload: str) -> Group | None:
    """Return the group of a workload where both benchmarks have exactly one of it."""
    found = [one for one in left if one.workload == workload]
    is_alone = sum(one.workload == workload for one in ones) == 1
    return found[0] if is_alone and len(found) == 1 else None


def _side_by_side(a: Group | None, b: Group | None) -> ComparedGroup:
    groups = [group for group in (a, b) if group is not None]
    figures = {}
    for name in FIGURES:
        one: Figure = NO_FIGURE if a is None else getattr(a, name)
        other: Figure = NO_FIGURE if b is None else getattr(b, name)
        difference = None if one.mean is None or other.mean is None else other.mean - one.mean
        figures[name] = Compared(one, other, difference)
    return ComparedGroup(
        groups[0].workload,
        _both(group.instance for group in groups),
        _both(group.model for group in groups),
        figures,
        None if a is None else a.score,
        None if b is None else b.score,
    )


def _both(names: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(names))
