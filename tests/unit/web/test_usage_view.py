"""Figures, groups and charts of sums: nothing is lost, and unknown is not zero."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.usage import Sums, bucket_of
from manager.web.usage_period import usage_period
from manager.web.usage_view import MOST_COLOURED, MOST_ROWS, shares, tiers_view, usage_view

if TYPE_CHECKING:
    from manager.web.usage_view import Chart

    Found = dict[tuple[str, ...], Sums]

NOW = datetime(2026, 11, 28, 22, 30, tzinfo=UTC)
WEEK = usage_period({"span": "7d"}, NOW)


def sums(requests: int, ok: int | None = None, fallbacks: int = 0, cost_micro_usd: int = 0) -> Sums:
    answered = requests if ok is None else ok
    latencies = answered << (32 * bucket_of(100.0))
    return Sums(requests, answered, fallbacks, 10, 20, cost_micro_usd, answered * 100_000, latencies)


def chart(view: dict[str, Any], name: str) -> Chart:
    found: Chart = next(one for one in view["charts"] if one.name == name)
    return found


def test_every_bar_of_the_time_is_there_and_has_its_day() -> None:
    view = usage_view({("2026-11-23", "tiny"): sums(3), ("2026-11-28", "tiny"): sums(4)}, WEEK)
    requests = chart(view, "requests")
    assert [row.label for row in requests.rows] == [f"2026-11-{day}" for day in range(22, 29)]
    assert [row.values for row in requests.rows] == [[0], [3], [0], [0], [0], [0], [4]]
    assert view["total"]["requests"] == 7


def test_an_hour_is_its_own_bar() -> None:
    today = usage_period({"span": "today"}, NOW)
    view = usage_view({("2026-11-28T05:00:00Z", "tiny"): sums(3)}, today)
    rows = chart(view, "requests").rows
    assert (len(rows), rows[5].label, rows[5].values) == (23, "2026-11-28 05:00", [3])


def test_a_bar_without_answers_has_no_time_and_no_rate() -> None:
    view = usage_view({("2026-11-23", "tiny"): sums(2, ok=0), ("2026-11-24", "tiny"): sums(4, 4, 1)}, WEEK)
    latency, fallbacks = chart(view, "latency"), chart(view, "fallbacks")
    assert [row.values for row in latency.rows[:2]] == [[None] * 3, [None] * 3]
    assert latency.rows[2].values[0] == pytest.approx(100)
    assert [row.values for row in fallbacks.rows[:3]] == [[None], [0], [0.25]]


def test_groups_beyond_the_colours_are_one_and_nothing_is_lost() -> None:
    found: Found = {("2026-11-25", f"m{number}"): sums(100 - number) for number in range(MOST_COLOURED + 3)}
    requests = chart(usage_view(found, WEEK), "requests")
    assert [column.name for column in requests.columns] == [f"m{number}" for number in range(5)] + [None]
    assert requests.columns[-1].key == "others"
    expected = sum(one.requests for one in found.values())
    assert sum(column.total or 0 for column in requests.columns) == expected
    assert sum(value or 0 for row in requests.rows for value in row.values) == expected


def test_a_chart_has_only_groups_with_something_of_it_in_their_own_colours() -> None:
    view = usage_view(
        {("2026-11-25", "free"): sums(9), ("2026-11-25", "paid"): sums(1, cost_micro_usd=1700)}, WEEK
    )
    (paid,) = chart(view, "cost").columns
    assert (paid.name, paid.fill, paid.total) == ("paid", "2", 0.0017)
    assert [column.fill for column in chart(view, "requests").columns] == ["1", "2"]
    assert not chart(view, "cost").is_empty
    assert chart(view, "fallbacks").is_empty


def test_the_groups_with_the_most_requests_come_first_and_the_rest_is_counted() -> None:
    found: Found = {("2026-11-25", f"m{number:03}"): sums(number + 1) for number in range(MOST_ROWS + 7)}
    view = usage_view(found, WEEK)
    assert view["rows"][0]["name"] == f"m{MOST_ROWS + 6:03}"
    assert (len(view["rows"]), view["more"]) == (MOST_ROWS, 7)


def test_without_requests_there_are_no_shares() -> None:
    view = usage_view({}, WEEK)
    assert view["rows"] == []
    assert (view["total"]["ok_share"], view["total"]["fallback_share"]) == (None, None)
    assert shares({}) == []


def test_shares_add_up_to_all() -> None:
    parts = shares({(f"role{number}",): sums(10 - number) for number in range(8)})
    assert len(parts) == MOST_COLOURED + 1
    assert parts[-1]["name"] is None
    assert sum(part["share"] for part in parts) == pytest.approx(1)


def stats(requests: int, seconds: float | None = None, models: int = 1) -> dict[str, Any]:
    def numbers(count: int) -> dict[str, Any]:
        return {"requests": count, "ok": count, "fallbacks": count // 4, "share": 1.0}

    return {
        "total": numbers(requests),
        "by_tier": [{"tier": tier, **numbers(count)} for tier, count in (("fast", requests), ("medium", 0))],
        "by_model": [{"model": f"m{number}", **numbers(requests)} for number in range(models)],
        "saved": {"requests": requests, "seconds": seconds},
    }


def test_tiers_have_rates_of_their_own_and_unknown_is_not_zero() -> None:
    view = tiers_view(stats(8, models=MOST_ROWS + 1), is_on=False)
    assert view is not None
    fast, medium = view["tiers"]
    assert (fast["fill"], fast["ok_share"], fast["fallback_share"]) == ("1", 1.0, 0.25)
    assert (medium["fill"], medium["ok_share"], medium["fallback_share"]) == ("2", None, None)
    assert (view["total"]["fallback_share"], len(view["models"])) == (0.25, MOST_ROWS)


def test_tiers_are_shown_where_they_have_requests_or_may_get_some() -> None:
    assert tiers_view(stats(0), is_on=False) is None
    assert tiers_view(stats(0), is_on=True) is not None
    assert tiers_view(stats(1), is_on=False) is not None


@pytest.mark.parametrize(
    ("seconds", "shown", "is_loss"), [(None, None, False), (2.5, 2.5, False), (-2.5, 2.5, True)]
)
def test_time_that_is_lost_is_not_called_saved(
    seconds: float | None, shown: float | None, *, is_loss: bool
) -> None:
    view = tiers_view(stats(4, seconds), is_on=False)
    assert view is not None
    assert view["saved"] == {"requests": 4, "seconds": shown, "is_loss": is_loss}
