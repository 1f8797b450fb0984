"""The section `budgets`: amounts are exact, and what makes no sense is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from manager.domain.budgets import Budget, Period
from manager.settings.budgets import BudgetSettings, repeated
from manager.settings.model import Settings


@pytest.mark.parametrize(
    ("values", "budget"),
    [
        (
            {"scope": "global", "period": "month", "soft_usd": 20, "hard_usd": 30},
            Budget("global", Period.MONTH, 20_000_000, 30_000_000),
        ),
        (
            {"scope": "project:a b", "period": "day", "hard_usd": 0.1},
            Budget("project:a b", Period.DAY, None, 100_000),
        ),
        ({"scope": "key:ci", "period": "day", "soft_usd": "0.000001"}, Budget("key:ci", Period.DAY, 1, None)),
        ({"scope": "key:ci", "period": "day", "hard_usd": 0}, Budget("key:ci", Period.DAY, None, 0)),
    ],
)
def test_a_budget_is_read_to_the_micro_dollar(values: dict[str, Any], budget: Budget) -> None:
    assert BudgetSettings(**values).budget == budget


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scope": "team:x", "period": "day", "hard_usd": 1}, "expected global, project:NAME or key:NAME"),
        ({"scope": "project:", "period": "day", "hard_usd": 1}, "expected global, project:NAME or key:NAME"),
        ({"scope": "project", "period": "day", "hard_usd": 1}, "expected global, project:NAME or key:NAME"),
        ({"scope": "global", "period": "year", "hard_usd": 1}, "'day' or 'month'"),
        ({"scope": "global", "period": "day"}, "a budget needs at least one of them"),
        ({"scope": "global", "period": "day", "soft_usd": 2, "hard_usd": 1}, "expected 1 or less"),
        ({"scope": "global", "period": "day", "hard_usd": -1}, "greater than or equal to 0"),
        ({"scope": "global", "period": "day", "hard_usd": 0.0000001}, "no more than 6 decimal places"),
        ({"scope": "global", "period": "day", "hard_usd": True}, "expected dollars"),
        ({"scope": "global", "period": "day", "hard_usd": float("inf")}, "finite"),
        ({"scope": "global", "period": "day", "hard_usd": 1, "max": 1}, "Extra inputs"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BudgetSettings(**values)


def test_one_scope_has_one_budget_for_each_period() -> None:
    day = {"scope": "global", "period": "day", "hard_usd": 1}
    month = {**day, "period": "month"}
    assert repeated((BudgetSettings(**day), BudgetSettings(**month))) == []
    with pytest.raises(
        ValidationError, match=r"budgets\.2\.scope: 'global' has a budget for each day already, at 0"
    ):
        Settings(budgets=(day, month, day))
