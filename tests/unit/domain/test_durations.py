"""Durations as operators write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.durations import duration_text, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("15m", 900),
        ("2h", 7200),
        ("30d", 2_592_000),
        ("45", 45),
        (" 1.5 H ", 5400),
        ("0", 0),
        ("1h30m", 5400),
        ("1d 2h 3m 4.5s", 93_784.5),
        ("1H5S", 3605),
    ],
)
def test_a_duration_is_numbers_with_units_or_a_number_of_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "m", "1w", "30m1h", "1h1h", "1h30", "1 2", "-5", "1e3", "nan", "inf", "9999999999", "٣s"]
)
def test_any_other_text_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(
        ValueError, match="expected seconds, or a duration such as 90s, 15m, 2h, 1h30m or 30d"
    ):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (1.5, "1.5s"), (60, "1m"), (5400, "90m"), (7200, "2h"), (86_400, "1d"), (90, "90s")],
)
def test_a_duration_is_shown_in_the_largest_exact_unit(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@given(st.integers(min_value=0, max_value=99_999))
def test_a_shown_duration_reads_back(seconds: int) -> None:
    assert parse_duration(duration_text(seconds)) == seconds
