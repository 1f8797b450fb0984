"""Scores: within their bounds, and never worse for more of a good signal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.scoring import (
    DEFAULT_WEIGHTS,
    NEUTRAL,
    NO_BENCHMARKS,
    Signals,
    Weights,
    family_of,
    of_benchmark,
    of_latency,
    of_queue,
    of_throughput,
    overlap,
    same_family,
    score,
    words_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

shares = st.floats(0, 1)
weights = st.builds(Weights, *[st.floats(0, 100)] * len(Weights._fields))
signals = st.builds(Signals, *[st.none() | shares] * len(Signals._fields))
names = st.sampled_from(Signals._fields)
amounts = st.floats(0, 1e12)


@given(signals, weights)
def test_a_score_is_between_0_and_1(found: Signals, by: Weights) -> None:
    assert 0 <= score(found, by) <= 1


@given(signals, weights, names, shares, shares)
def test_more_of_a_signal_never_lowers_a_score(
    found: Signals, by: Weights, name: str, one: float, other: float
) -> None:
    less, more = sorted((one, other))
    assert score(found._replace(**{name: less}), by) <= score(found._replace(**{name: more}), by)


@given(signals, weights, names)
def test_an_unknown_signal_counts_as_the_middle(found: Signals, by: Weights, name: str) -> None:
    unknown = score(found._replace(**{name: None}), by)
    assert unknown == score(found._replace(**{name: NEUTRAL}), by)
    assert score(found._replace(**{name: 0.0}), by) <= unknown <= score(found._replace(**{name: 1.0}), by)


@given(signals, weights, names, shares)
def test_a_signal_without_weight_changes_nothing(
    found: Signals, by: Weights, name: str, value: float
) -> None:
    by = by._replace(**{name: 0.0})
    assert score(found, by) == score(found._replace(**{name: value}), by)


def test_a_signal_counts_as_much_as_its_weight() -> None:
    worst = Signals(*[0.0] * len(Signals._fields))
    assert score(worst, DEFAULT_WEIGHTS) == 0
    assert score(worst._replace(loaded=1.0), DEFAULT_WEIGHTS) == pytest.approx(2 / 9)
    assert score(worst._replace(text=1.0), DEFAULT_WEIGHTS) == pytest.approx(1 / 9)
    assert score(Signals(*[1.0] * len(Signals._fields)), DEFAULT_WEIGHTS) == 1
    assert score(worst, Weights(*[0.0] * len(Weights._fields))) == NEUTRAL


@pytest.mark.parametrize(
    ("signal", "is_good"), [(of_latency, False), (of_throughput, True), (of_queue, False)]
)
@given(amounts, amounts)
def test_more_of_what_is_good_is_a_higher_signal_and_more_of_what_is_bad_a_lower_one(
    signal: Callable[[float], float], is_good: bool, one: float, other: float
) -> None:
    less, more = map(signal, sorted((one, other)))
    assert 0 <= less <= 1
    assert 0 <= more <= 1
    assert less <= more if is_good else less >= more


def test_signals_have_known_values() -> None:
    assert (of_latency(0.0), of_latency(1000.0), of_latency(-5.0)) == (1.0, 0.5, 1.0)
    assert (of_throughput(0.0), of_throughput(30.0), of_throughput(-5.0)) == (0.0, 0.5, 0.0)
    assert (of_queue(0), of_queue(1), of_queue(-1.5)) == (1.0, 0.5, 1.0)
    assert (of_benchmark(0.7), of_benchmark(1.5), of_benchmark(-1.0)) == (0.7, 1.0, 0.0)


def test_what_was_not_measured_is_unknown() -> None:
    assert of_latency(None) is of_throughput(None) is of_benchmark(None) is None
    assert of_benchmark(NO_BENCHMARKS.of("a", "m")) is None


def test_words_are_those_of_names() -> None:
    assert words_of("User/Qwen2.5-Coder:7b") == {"user", "qwen", "2.5", "coder", "7b"}
    assert words_of("gemma3:latest") == {"gemma", "3"}
    assert words_of("for 7billion") == {"for", "7", "billion"}
    assert words_of("Übersetze") == {"übersetze"}
    assert words_of("a" * 10_000) == {"a" * 4096}


def test_the_overlap_is_the_share_of_the_wanted_words() -> None:
    wanted = words_of("coder 7b review")
    assert overlap(wanted, ["qwen2.5-coder:7b"]) == pytest.approx(2 / 3)
    assert overlap(wanted, ["qwen2.5-coder:32b", "gemma:7b"]) == pytest.approx(2 / 3)
    assert overlap(wanted, []) == 0
    assert overlap(frozenset(), ["qwen2.5-coder:7b"]) is None


@given(st.frozensets(st.sampled_from("abcd")), st.lists(st.sampled_from(["a", "b c", "d", "x"])), st.text())
def test_more_names_never_lower_the_overlap(wanted: frozenset[str], few: list[str], name: str) -> None:
    less, more = overlap(wanted, few), overlap(wanted, [*few, name])
    assert (less is None) == (more is None) == (not wanted)
    assert less is None or more is None or 0 <= less <= more <= 1


def test_a_family_is_the_first_word_of_the_name() -> None:
    assert family_of("user/Qwen2.5-coder:7b") == family_of("qwen3") == "qwen"
    assert family_of("7:b") == ""
    assert same_family(frozenset({"qwen"}), "qwen3:8b") == 1
    assert same_family(frozenset({"qwen"}), "gemma3") == 0
    assert same_family(frozenset(), "gemma3") is None
