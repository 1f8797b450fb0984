"""The time that an address of the page of usage names."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest

from manager.domain.usage import DAY_S, HOUR_S
from manager.web.usage_period import MOST_DAYS, usage_period

NOW = datetime(2026, 11, 28, 22, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("span", "first", "bars", "step_s"),
    [
        ("today", date(2026, 11, 28), 23, HOUR_S),
        ("7d", date(2026, 11, 22), 7, DAY_S),
        ("30d", date(2026, 10, 30), 30, DAY_S),
    ],
)
def test_a_span_is_whole_days_until_now(span: str, first: date, bars: int, step_s: int) -> None:
    found = usage_period({"span": span}, NOW)
    assert (found.span, found.first, found.last, found.step_s) == (span, first, NOW.date(), step_s)
    assert (found.ends, len(found.bars), found.problem) == (NOW, bars, None)
    assert found.bars[0] == int(found.begins.timestamp())


@pytest.mark.parametrize("query", [{}, {"span": "year"}, {"span": "<b>"}, {"from": "2026-01-01"}])
def test_without_a_span_that_there_is_seven_days_are_shown(query: dict[str, str]) -> None:
    found = usage_period(query, NOW)
    assert (found.span, found.first, found.problem) == ("7d", date(2026, 11, 22), None)


def test_both_days_of_a_custom_time_are_part_of_it() -> None:
    found = usage_period({"span": "custom", "from": "2026-11-01", "to": "2026-11-03"}, NOW)
    assert (found.begins, found.ends) == (
        datetime(2026, 11, 1, tzinfo=UTC),
        datetime(2026, 11, 4, tzinfo=UTC),
    )
    assert (len(found.bars), found.step_s) == (3, DAY_S)
    two_days = usage_period({"span": "custom", "from": "2026-11-01", "to": "2026-11-02"}, NOW)
    assert (len(two_days.bars), two_days.step_s) == (48, HOUR_S)


def test_a_custom_time_ends_now_at_the_latest() -> None:
    for last in ("", "2027-05-01"):
        found = usage_period({"span": "custom", "from": "2026-11-28", "to": last}, NOW)
        assert (found.last, found.ends) == (NOW.date(), NOW)


@pytest.mark.parametrize(
    ("first", "last", "problem"),
    [
        ("", "2026-11-03", "date"),
        ("yesterday", "", "date"),
        ("2026-11-03", "x", "date"),
        ("2026-11-03", "2026-11-02", "order"),
        ("2027-01-01", "", "order"),
        ("2020-01-01", "2026-01-01", "length"),
        ("0001-01-01", "", "length"),
    ],
)
def test_dates_that_cannot_be_are_named_and_seven_days_shown(first: str, last: str, problem: str) -> None:
    found = usage_period({"span": "custom", "from": first, "to": last}, NOW)
    assert (found.span, found.problem, found.first) == ("custom", problem, date(2026, 11, 22))


def test_as_many_days_as_can_be_shown_are() -> None:
    found = usage_period({"span": "custom", "from": "2025-10-25", "to": "2026-11-28"}, NOW)
    assert (found.problem, len(found.bars)) == (None, MOST_DAYS)
