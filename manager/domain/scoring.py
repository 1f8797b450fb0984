"""Scores of instances for a request: a weighted mean of signals, each from 0 (worst) to 1 (best)."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

from manager.domain.models import DEFAULT_TAG

if TYPE_CHECKING:
    from collections.abc import Iterable

# The value of a signal that is not known: it speaks neither for an instance nor against it.
NEUTRAL = 0.5
# Half of the best value: a first token after a second, and 30 tokens/s, which is faster than people read.
_HALF_LATENCY_MS = 1000.0
_HALF_TOKENS_PER_S = 30.0
# `qwen2.5-coder:7b` is `qwen`, `2.5`, `coder`, `7b`.
_WORD = re.compile(r"[^\W\d_]+|[0-9]+(?:\.[0-9]+)*(?:[bkm](?![^\W\d_]))?")
_LETTERS = re.compile(r"[^\W\d_]+")
# Words beyond it are not compared.
_MOST_CHARACTERS = 4096


class Weights(NamedTuple):
    """The share of each signal; a weight of 0 leaves its signal out."""

    text: float = 1.0
    family: float = 1.0
    loaded: float = 2.0
    latency: float = 1.0
    throughput: float = 1.0
    queue: float = 2.0
    benchmark: float = 1.0


DEFAULT_WEIGHTS = Weights()


class Signals(NamedTuple):
    """The signals of one model on one instance, each from 0 to 1; None where it is not known.

    Attributes:
        text: the share of the wanted words that are in the names of the instance's models.
        family: 1 where the model is of the wanted family.
        loaded: 1 where the model is in memory.
        latency: higher for a shorter time to the first token.
        throughput: higher for more tokens a second.
        queue: higher for fewer requests in flight.
        benchmark: as it was measured.
    """

    text: float | None = None
    family: float | None = None
    loaded: float | None = None
    latency: float | None = None
    throughput: float | None = None
    queue: float | None = None
    benchmark: float | None = None


class Benchmarks(Protocol):
    """The results of benchmarks, from 0 (worst) to 1 (best)."""

    def of(self, instance: str, key: str) -> float | None:
        """Return the result of a model (`model_key`) on an instance; None where there is none."""


class NoBenchmarks:
    """Nothing was measured."""

    def of(self, instance: str, key: str) -> float | None:  # noqa: ARG002  (as in `Benchmarks`)
        return None


NO_BENCHMARKS = NoBenchmarks()


def score(signals: Signals, weights: Weights) -> float:
    """Return the weighted mean of the signals, from 0 to 1; an unknown one counts as `NEUTRAL`.

    More of a signal never lowers it. Without any weight it is `NEUTRAL`.
    """
    total = sum(weights)
    if not total:
        return NEUTRAL
    # `fsum` rounds once, so that a higher signal cannot lose by rounding.
    shares = (
        weight / total * (NEUTRAL if signal is None else signal)
        for signal, weight in zip(signals, weights, strict=True)
    )
    return min(max(math.fsum(shares), 0.0), 1.0)


def overlap(wanted: frozenset[str], names: Iterable[str]) -> float | None:
    """Return the share of the wanted words that are in some of the names; None where none is wanted."""
    if not wanted:
        return None
    found: set[str] = set()
    for name in names:
        found |= wanted & words_of(name)
    return len(found) / len(wanted)


def same_family(wanted: frozenset[str], model: str) -> float | None:
    """Return 1 where the family of a model is one of those wanted, else 0; None where none is wanted."""
    return float(family_of(model) in wanted) if wanted else None


def of_latency(value_ms: float | None) -> float | None:
    """Return the signal of a time to the first token."""
    return None if value_ms is None else _HALF_LATENCY_MS / (_HALF_LATENCY_MS + max(value_ms, 0.0))


def of_throughput(tokens_per_s: float | None) -> float | None:
    """Return the signal of a speed."""
    if tokens_per_s is None:
        return None
    return 1.0 - _HALF_TOKENS_PER_S / (_HALF_TOKENS_PER_S + max(tokens_per_s, 0.0))


def of_queue(in_flight: float) -> float:
    """Return the signal of requests in flight."""
    return 1.0 / (1.0 + max(in_flight, 0.0))


def of_benchmark(result: float | None) -> float | None:
    """Return the signal of a benchmark."""
    return None if result is None else min(max(result, 0.0), 1.0)


@lru_cache(maxsize=4096)
def words_of(text: str) -> frozenset[str]:
    """Return the words of a name or a text, in small letters; the tag `latest` is none."""
    return frozenset(_WORD.findall(text[:_MOST_CHARACTERS].lower())) - {DEFAULT_TAG}


@lru_cache(maxsize=4096)
def family_of(model: str) -> str:
    """Return the family of a model, `qwen` for `user/Qwen2.5-coder:7b`; empty where its name has no word."""
    name = model.lower().rpartition("/")[2].partition(":")[0]
    match = _LETTERS.search(name)
    return match[0] if match else ""
