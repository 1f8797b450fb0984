"""Usage adds up: no request is counted twice or lost, and percentiles are close to the truth."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from statistics import quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.usage import (
    BUCKETS,
    DAY_S,
    HOUR_S,
    LATENCY_BYTES,
    Group,
    Sample,
    Span,
    Sums,
    added,
    bucket_of,
    covered,
    percentile_ms,
    sample_of,
)
from tests.support.records import a_record

ENDED = datetime(2026, 11, 28, 10, 59, 59, 900_000, tzinfo=UTC)


def test_a_request_counts_in_the_hour_in_which_it_ended() -> None:
    sample = sample_of(a_record(ts=ENDED, duration_ms=200.0, model="Qwen3:8b", key="bot", cost_usd=0.000012))
    assert sample is not None
    assert sample.ended_s == int((ENDED + timedelta(milliseconds=200)).timestamp())
    assert sample.group == Group("default", "bot", "thinking", "qwen3:8b", "gpu0")
    sums = sample.sums
    assert (sums.requests, sums.ok, sums.fallbacks, sums.input_tokens, sums.output_tokens) == (
        1,
        1,
        0,
        12,
        34,
    )
    assert (sums.cost_micro_usd, sums.answered_us) == (12, 200_000)
    assert sums.percentile_ms(0.5) == pytest.approx(200, rel=0.1)


def test_a_request_that_failed_has_no_time_of_an_answer() -> None:
    sample = sample_of(
        a_record(
            outcome="timeout", fallback=True, model=None, role=None, effective_target=None, input_tokens=None
        )
    )
    assert sample is not None
    assert sample.group == Group("default", "", "", "", "")
    sums = sample.sums
    assert (sums.requests, sums.ok, sums.fallbacks, sums.input_tokens) == (1, 0, 1, 0)
    assert (sums.mean_ms, sums.percentile_ms(0.5)) == (None, None)


def test_a_request_that_manages_models_uses_none() -> None:
    assert sample_of(a_record(kind=None)) is None


@given(st.floats(0, 1e9))
def test_a_bucket_holds_the_time_that_is_counted_in_it(value_ms: float) -> None:
    bucket = bucket_of(value_ms)
    assert 0 <= bucket < BUCKETS
    assert value_ms <= 2 ** (bucket / 4) * (1 + 1e-9) or bucket == BUCKETS - 1
    assert bucket == 0 or value_ms > 2 ** ((bucket - 1) / 4) * (1 - 1e-9)


def latencies_of(values_ms: list[float]) -> int:
    return sum(1 << (32 * bucket_of(value)) for value in values_ms)


@given(st.lists(st.floats(1, 7e6), min_size=1, max_size=300), st.sampled_from([0.05, 0.5, 0.95, 1.0]))
def test_a_percentile_is_off_by_the_width_of_a_bucket_at_most(values_ms: list[float], share: float) -> None:
    found = percentile_ms(latencies_of(values_ms), share)
    assert found is not None
    ordered = sorted(values_ms)
    truth = ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]
    assert truth / 1.2 <= found <= truth * 1.2


def test_percentiles_of_many_times_are_close() -> None:
    values = [50 + 2 * number for number in range(1000)]
    cuts = quantiles(values, n=20)
    assert percentile_ms(latencies_of([float(one) for one in values]), 0.5) == pytest.approx(
        cuts[9], rel=0.05
    )
    assert percentile_ms(latencies_of([float(one) for one in values]), 0.95) == pytest.approx(
        cuts[18], rel=0.05
    )
    assert percentile_ms(latencies_of([0.2]), 0.5) == 1


def test_the_lanes_of_a_year_fit_their_bytes() -> None:
    assert (((1 << 32) - 1) << (32 * (BUCKETS - 1))).bit_length() == LATENCY_BYTES * 8


@given(
    st.lists(st.tuples(st.integers(0, 3 * DAY_S), st.sampled_from("ab")), max_size=50),
    st.sampled_from([HOUR_S, DAY_S]),
)
def test_sums_by_period_lose_nothing(samples: list[tuple[int, str]], seconds: int) -> None:
    found = added(
        [Sample(at, Group(name, "", "", "", ""), Sums(1, 1, 0, 5, 7, 9, 11, 1)) for at, name in samples],
        seconds,
    )
    assert sum(sums.requests for sums in found.values()) == len(samples)
    assert sum(sums.output_tokens for sums in found.values()) == 7 * len(samples)
    assert sum(sums.latencies for sums in found.values()) == len(samples)
    assert all(begins % seconds == 0 for begins, _ in found)


@given(st.integers(0, 12 * DAY_S), st.integers(0, 12 * DAY_S), st.integers(0, 12))
def test_hours_and_days_make_up_the_time_that_is_asked_for(begins: int, length: int, kept: int) -> None:
    ends, hours_since = begins + length, kept * DAY_S
    hours, days = covered(Span(begins, ends), hours_since=hours_since)
    seconds = [hour for span in hours for hour in range(span.begins, span.ends, HOUR_S)]
    seconds += list(range(days.begins, days.ends, HOUR_S))
    assert len(seconds) == len(set(seconds)), "an hour is counted once"
    assert all(hour >= hours_since for span in hours for hour in range(span.begins, span.ends, HOUR_S))
    assert days.begins % DAY_S == days.ends % DAY_S == 0
    if length:
        assert min(seconds) <= begins
        assert max(seconds) + HOUR_S >= ends
        assert sorted(seconds) == list(range(min(seconds), max(seconds) + 1, HOUR_S))
        assert begins - min(seconds) < (HOUR_S if begins >= hours_since else DAY_S)
        assert max(seconds) + HOUR_S - ends < (HOUR_S if ends >= hours_since else DAY_S)


@given(st.integers(0, 12 * DAY_S), st.integers(1, 12 * DAY_S), st.integers(0, 12))
def test_by_hour_no_day_is_read_and_no_hour_that_is_forgotten(begins: int, length: int, kept: int) -> None:
    ends, hours_since = begins + length, kept * DAY_S
    (hours,), days = covered(Span(begins, ends), hours_since=hours_since, needs_hours=True)
    assert days.begins == days.ends
    assert hours.begins % HOUR_S == hours.ends % HOUR_S == 0
    assert hours_since <= hours.begins <= hours.ends
    if ends <= hours_since:
        assert hours.begins == hours.ends
    else:
        assert 0 <= hours.ends - ends < HOUR_S
        assert hours.begins == hours_since or 0 <= begins - hours.begins < HOUR_S
