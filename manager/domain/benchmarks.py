"""Benchmarks: workloads, the checks of their answers, figures with their spread, and scores."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Bounds of what one benchmark measures.
MOST_REQUESTS: Final = 1000
MOST_GROUPS: Final = 64
MOST_REPEATS: Final = 50
# The time to the first token that halves a score.
HALF_LATENCY_S: Final = 5.0
_THINKING = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_MS = 1000


# --- workloads ---


class CheckKind(StrEnum):
    """The kinds of checks. Texts are compared without regard to case and to runs of white space."""

    CONTAINS = "contains"
    ANY_OF = "any_of"
    EQUALS = "equals"
    REGEX = "regex"
    MAX_WORDS = "max_words"
    JSON = "json"


CheckValue: TypeAlias = str | int | bool | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """One check of an answer.

    `value` is a text of `contains` and `equals`, texts of `any_of`, a pattern of `regex`, a number of
    `max_words`, and of `json` true, or the keys that the object has to have.
    """

    kind: CheckKind
    value: CheckValue


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question of a workload. An answer has the quality 1 where it passes all checks."""

    name: str
    text: str
    checks: tuple[Check, ...]
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Questions of one kind, and the parameters with which they are asked."""

    name: str
    prompts: tuple[Prompt, ...]
    description: str = ""
    temperature: float = 0.0
    max_tokens: int = 256


def passes(check: Check, answer: str) -> bool:
    """Return whether an answer passes a check. A leading `<think>` block is no part of it."""
    text = without_thinking(answer)
    value: Any = check.value
    match check.kind:
        case CheckKind.CONTAINS:
            return bool(_plain(value) in _plain(text))
        case CheckKind.ANY_OF:
            plain = _plain(text)
            return any(_plain(one) in plain for one in value)
        case CheckKind.EQUALS:
            return _plain(value) == _plain(text)
        case CheckKind.REGEX:
            return re.search(value, text) is not None
        case CheckKind.MAX_WORDS:
            return bool(len(text.split()) <= value)
    return _is_json(text, () if value is True else value)


def quality(checks: Sequence[Check], answer: str) -> float:
    """Return the share of the checks that an answer passes, from 0 to 1; 1 where there is none."""
    return sum(passes(check, answer) for check in checks) / len(checks) if checks else 1.0


def without_thinking(answer: str) -> str:
    """Return an answer without the block of thoughts that some models write in front of it."""
    return _THINKING.sub("", answer, count=1) if answer.lstrip().startswith("<think>") else answer


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _is_json(text: str, keys: Sequence[str]) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return not keys or (isinstance(value, dict) and all(key in value for key in keys))


# --- what is measured ---


class Target(NamedTuple):
    """A model on an instance; the model as its key (`domain.models.model_key`)."""

    instance: str
    model: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One request that was measured. Times in milliseconds; None is not known.

    Attributes:
        ok: whether there is a whole answer.
        ttft_ms: from sending the request to the first piece of its answer.
        duration_ms: from sending the request to the end of its answer.
        tokens_per_s: output tokens by the time that the server took to make them.
        quality: the share of the checks that the answer passes; None without an answer.
        error: why there is no answer.
    """

    workload: str
    prompt: str
    instance: str
    model: str
    ok: bool
    ttft_ms: float | None = None
    duration_ms: float | None = None
    tokens_per_s: float | None = None
    output_tokens: int | None = None
    quality: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with its spread over `count` samples. `stddev` is that of a sample, None under two of them.

    `p50` and `p95` are interpolated between the two nearest values.
    """

    count: int
    mean: float | None
    p50: float | None
    p95: float | None
    stddev: float | None


NO_FIGURE: Final = Figure(0, None, None, None, None)


def figure(values: Iterable[float]) -> Figure:
    """Return the figure of some values, in any order."""
    found = sorted(values)
    count = len(found)
    if not count:
        return NO_FIGURE
    mean = min(max(math.fsum(found) / count, found[0]), found[-1])
    stddev = None
    if count > 1:
        stddev = math.sqrt(math.fsum((one - mean) ** 2 for one in found) / (count - 1))
    return Figure(count, mean, _quantile(found, 0.5), _quantile(found, 0.95), stddev)


def _quantile(found: Sequence[float], share: float) -> float:
    at = share * (len(found) - 1)
    low = math.floor(at)
    high = min(low + 1, len(found) - 1)
    return found[low] + (found[high] - found[low]) * (at - low)


# The figures of a group, in the order in which they are shown.
FIGURES: Final = ("ttft_ms", "tokens_per_s", "success", "quality")


@dataclass(frozen=True, slots=True)
class Group:
    """The figures of one workload on one instance with one model. `score` is `score_of` them."""

    workload: str
    instance: str
    model: str
    ttft_ms: Figure
    tokens_per_s: Figure
    success: Figure
    quality: Figure

    @property
    def target(self) -> Target:
        return Target(self.instance, self.model)

    @property
    def is_answered(self) -> bool:
        return self.quality.count > 0

    @property
    def score(self) -> float:
        return score_of(self.quality.mean or 0.0, self.success.mean or 0.0, (self.ttft_ms.p50 or 0.0) / _MS)


def score_of(quality: float, success: float, latency_s: float) -> float:
    """Return quality x success / (1 + latency / HALF_LATENCY_S), from 0 to 1.

    Args:
        quality: the mean share of checks that the answers pass.
        success: the share of requests that were answered.
        latency_s: the median time to the first token.
    """
    return quality * success / (1.0 + latency_s / HALF_LATENCY_S)


def groups_of(samples: Iterable[Sample]) -> tuple[Group, ...]:
    """Return the figures of samples by workload, instance and model, in the order of the first of each."""
    found: dict[tuple[str, str, str], list[Sample]] = {}
    for sample in samples:
        found.setdefault((sample.workload, sample.instance, sample.model), []).append(sample)
    return tuple(_group(key, some) for key, some in found.items())


def _group(key: tuple[str, str, str], samples: Sequence[Sample]) -> Group:
    answered = [one for one in samples if one.ok]
    return Group(
        *key,
        ttft_ms=figure(one.ttft_ms for one in answered if one.ttft_ms is not None),
        tokens_per_s=figure(one.tokens_per_s for one in answered if one.tokens_per_s is not None),
        success=figure(float(one.ok) for one in samples),
        quality=figure(one.quality for one in answered if one.quality is not None),
    )
