from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.latency import LEAST_VALUES, Latency, is_slow, with_speed, with_value


def after(*values_ms: float, begin: Latency | None = None, every_s: float = 1.0) -> Latency:
    latency = begin
    for value_ms in values_ms:
        latency = with_value(latency, value_ms, every_s if latency is None else latency.at + every_s)
    assert latency is not None
    return latency


def usual(value_ms: float = 100.0, count: int = 100) -> Latency:
    return after(*[value_ms] * count)


def test_the_first_values_count_alike_and_later_ones_move_what_is_usual_by_a_three_hundredth() -> None:
    assert after(100, 300).usual_ms == 200
    assert after(100, 300, 500).usual_ms == 300
    assert after(500, begin=usual(count=19)).usual_ms == pytest.approx(120)
    assert after(301, begin=usual(count=20)).usual_ms == pytest.approx(100 + 201 * 2 / 601)


def test_recent_values_count_for_an_eighth_each() -> None:
    assert after(100, 180).recent_ms == 110
    assert after(100, 180, 30).recent_ms == 100


def test_a_model_is_slow_once_its_recent_times_are_twice_the_usual_ones() -> None:
    for value_ms, expected in ((400, 4), (100_000, 4), (250, 10)):
        latency, slow_after = usual(), 0
        while not is_slow(latency, latency.at):
            latency, slow_after = after(value_ms, begin=latency), slow_after + 1
        assert slow_after == expected, "a few long prompts do not make it slow"
        assert latency.recent_ms > 2 * latency.usual_ms
    while is_slow(latency, latency.at):
        latency = after(100, begin=latency)
    assert latency.recent_ms <= 2 * latency.usual_ms


def test_twice_and_no_more_is_not_slow() -> None:
    assert not is_slow(Latency(100, 200, 1000, 0), 0)
    assert is_slow(Latency(100, 200.1, 1000, 0), 0)


def test_a_few_values_are_no_measure_of_what_is_usual() -> None:
    assert not is_slow(Latency(100, 900, LEAST_VALUES - 1, 0), 0)
    assert is_slow(Latency(100, 900, LEAST_VALUES, 0), 0)


def test_a_difference_that_nobody_notices_is_none() -> None:
    assert not is_slow(Latency(5, 55, 1000, 0), 0)
    assert is_slow(Latency(5, 55.1, 1000, 0), 0)
    fast = after(*[1000] * 4, begin=usual(1))
    assert is_slow(fast, fast.at)


def test_slowness_is_forgotten_when_nothing_comes_so_that_the_instance_is_tried_again() -> None:
    slow = Latency(100, 900, 1000, 50)
    assert is_slow(slow, 60)
    assert not is_slow(slow, 60.1)
    again = with_value(slow, 100, 61)
    assert again.recent_ms == pytest.approx(100)
    assert with_value(slow, 900, 59).recent_ms > 800


def test_a_server_whose_tokens_take_long_is_given_longer() -> None:
    slow = Latency(2_000, 20_000, 1000, 0)
    assert is_slow(slow, 100)
    assert not is_slow(slow, 100.1)


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=200))
def test_both_means_stay_among_the_values(values_ms: list[float]) -> None:
    latency = after(*values_ms)
    assert latency.seen == len(values_ms)
    for mean in (latency.usual_ms, latency.recent_ms):
        assert min(values_ms) - 1e-6 <= mean <= max(values_ms) + 1e-6


def test_what_is_expected_counts_in_place_of_what_is_usual() -> None:
    latency = after(400, 400, 400, 400)
    assert not is_slow(latency, latency.at)
    assert is_slow(latency, latency.at, 100)
    assert not is_slow(latency, latency.at, 200)
    assert not is_slow(after(400, 400, 400), 0, 100), "three values are too few"
    assert not is_slow(after(90, 90, 90, 90), 4, 40), "nobody notices 50 ms"


def test_a_speed_is_counted_from_the_first_token_and_follows_within_eight_values() -> None:
    assert with_speed(None, 101, 2.0) == 50.0
    assert with_speed(50.0, 101, 1.0) == 56.25
    assert with_speed(None, 7, 1.0) is with_speed(None, 100, 0.001) is None
    assert with_speed(50.0, 7, 1.0) == 50.0
