"""Which budget a request is paid from, and when there is no money for it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from manager.domain.budgets import (
    Balance,
    Budget,
    Period,
    concerned,
    day_of,
    key_budget,
    overdrawn,
    softly_exceeded,
    state_of,
)

NOW = datetime(2026, 11, 28, 23, 59, tzinfo=UTC)
DAY, MONTH = Period.DAY, Period.MONTH
GLOBAL = Budget("global", MONTH, soft_micro_usd=20, hard_micro_usd=30)
SOFT = Budget("project:shop", DAY, soft_micro_usd=5)
KEY = key_budget("bot", 7)


def test_a_request_is_paid_from_the_budgets_of_all_of_its_project_and_of_its_key() -> None:
    budgets = (GLOBAL, SOFT, KEY, Budget("project:other", DAY, hard_micro_usd=1))
    assert concerned(budgets, "shop", "bot") == (GLOBAL, SOFT, KEY)
    assert concerned(budgets, "shop", None) == (GLOBAL, SOFT)
    assert concerned(budgets, "bot", "shop") == (GLOBAL,), "a project is not a key of the same name"


def test_a_scope_names_a_project_or_a_key() -> None:
    assert (GLOBAL.project, GLOBAL.key) == (None, None)
    assert (SOFT.project, SOFT.key) == ("shop", None)
    assert (KEY.project, KEY.key, KEY.scope, KEY.hard_micro_usd) == (None, "bot", "key:bot", 7)


def test_a_period_begins_with_its_first_day() -> None:
    assert (SOFT.since(NOW), GLOBAL.since(NOW)) == ("2026-11-28", "2026-11-01")
    assert day_of(NOW) == "2026-11-28"


@pytest.mark.parametrize(
    ("balance", "amount", "refused"),
    [
        (Balance(), 30, False),
        (Balance(), 31, True),
        (Balance(10, 10), 10, False),
        (Balance(10, 10), 11, True),
        (Balance(0, 30), 0, False),
        (Balance(31, 0), 0, True),
    ],
)
def test_spent_and_reserved_money_never_exceed_a_hard_limit(
    balance: Balance, amount: int, *, refused: bool
) -> None:
    found = overdrawn({SOFT: Balance(10**9, 0), GLOBAL: balance}, amount)
    assert (found is not None) is refused


def test_a_refusal_names_budget_limit_and_amounts() -> None:
    found = overdrawn({Budget("global", DAY, hard_micro_usd=1_000_000): Balance(250_000, 500_000)}, 300_000)
    assert found is not None
    assert found.message == (
        "the budget global of this day has a hard limit of 1 USD: 0.25 USD are spent, 0.5 USD are reserved, "
        "and this request may cost up to 0.3 USD"
    )


@pytest.mark.parametrize(
    ("budget", "balance", "state"),
    [
        (GLOBAL, Balance(19, 0), "ok"),
        (GLOBAL, Balance(10, 10), "soft"),
        (GLOBAL, Balance(29, 1), "hard"),
        (SOFT, Balance(4, 0), "ok"),
        (SOFT, Balance(10**9, 0), "soft"),
        (KEY, Balance(6, 0), "ok"),
        (KEY, Balance(7, 0), "hard"),
    ],
)
def test_the_state_tells_how_far_a_budget_is_used(budget: Budget, balance: Balance, state: str) -> None:
    assert state_of(budget, balance) == state
    is_soft = budget.soft_micro_usd is not None and state != "ok"
    assert softly_exceeded({budget: balance}) == ((budget,) if is_soft else ())
