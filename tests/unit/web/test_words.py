"""Numbers as people read them."""

from __future__ import annotations

import pytest

from manager.web import words


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "\N{EN DASH}"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (7.94 * 2**30, "7.9 GiB"),
        (139 * 2**30, "139 GiB"),
        (3 * 2**60, "3072 PiB"),
    ],
)
def test_sizes_are_in_the_largest_unit(count: float | None, text: str) -> None:
    assert words.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "\N{EN DASH}"),
        (-1, "0.0 s"),
        (0.44, "0.4 s"),
        (45.4, "45 s"),
        (845, "14 min 05 s"),
        (7500, "2 h 05 min"),
        (3 * 86_400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations_have_one_or_two_units(seconds: float | None, text: str) -> None:
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "\N{EN DASH}"), (0.4, "0 ms"), (999, "999 ms"), (1500, "1.5 s")]
)
def test_milliseconds_become_seconds(value: float | None, text: str) -> None:
    assert words.milliseconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "\N{EN DASH}"), (0, "$0.00"), (0.000012, "$0.000012"), (0.05, "$0.05"), (1234.5, "$1,234.50")],
)
def test_small_amounts_of_money_keep_their_digits(value: float | None, text: str) -> None:
    assert words.usd(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, words.UNKNOWN),
        (0, "0 %"),
        (0.0004, "< 0.1 %"),
        (0.0006, "0.1 %"),
        (0.0991, "9.9 %"),
        (1, "100 %"),
    ],
)
def test_a_small_share_is_not_zero(share: float | None, text: str) -> None:
    assert words.percent(share) == text


def test_thousands_are_apart() -> None:
    assert words.count(1_234_567) == "1\u202f234\u202f567"
    assert words.count(None) == words.UNKNOWN


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0"), (900.0, "15m"), (7200, "2h"), (86_400, "1d"), (90, "90s"), (1.5, "1.5s")],
)
def test_a_duration_as_settings_have_it(seconds: float, text: str) -> None:
    assert words.seconds_text(seconds) == text


def test_a_time_of_the_api_in_unix_seconds() -> None:
    assert words.unix_s("1970-01-01T00:01:00.500Z") == 60.5
    assert words.unix_s(None) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "\N{EN DASH}"), (0.0, "0.00 ms"), (9.994, "9.99 ms"), (10.4, "10 ms"), (2000.0, "2.0 s")],
)
def test_short_times_keep_their_decimals(value: float | None, text: str) -> None:
    assert words.short_time(value) == text
