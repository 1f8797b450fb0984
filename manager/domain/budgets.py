"""Budgets: how much may be spent on paid models, by whom and in which period. Pure.

Money is reserved before a request is sent, and the reservation is closed exactly once afterwards: settled on
what the request has cost, or released. Spent and reserved money together never exceed a hard limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeAlias

from manager.domain.money import usd_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

GLOBAL: Final = "global"
_PROJECT: Final = "project:"
_KEY: Final = "key:"

State: TypeAlias = Literal["ok", "soft", "hard"]


class Period(StrEnum):
    """The time that a budget is for, in UTC."""

    DAY = "day"
    MONTH = "month"


@dataclass(frozen=True, slots=True)
class Budget:
    """One budget. `scope` is `global`, `project:NAME` or `key:NAME`.

    Limits are micro-dollars; None is no limit.
    """

    scope: str
    period: Period
    soft_micro_usd: int | None = None
    hard_micro_usd: int | None = None

    @property
    def project(self) -> str | None:
        """The project that it is for; None where it is for none alone."""
        return self.scope.removeprefix(_PROJECT) if self.scope.startswith(_PROJECT) else None

    @property
    def key(self) -> str | None:
        """The key that it is for; None where it is for none alone."""
        return self.scope.removeprefix(_KEY) if self.scope.startswith(_KEY) else None

    def concerns(self, project: str, key: str | None) -> bool:
        """Return whether requests of a project with a key are paid from it."""
        return self.scope == GLOBAL or self.project == project or (key is not None and self.key == key)

    def since(self, now: datetime) -> str:
        """Return the first day of the current period, as `day_of` writes it."""
        return day_of(now if self.period is Period.DAY else now.replace(day=1))


def key_budget(name: str, micro_usd_per_month: int) -> Budget:
    """Return the budget of a key that has a limit of its own."""
    return Budget(_KEY + name, Period.MONTH, hard_micro_usd=micro_usd_per_month)


def day_of(now: datetime) -> str:
    """Return a day in UTC as `2026-01-31`: later days are greater texts."""
    return now.strftime("%Y-%m-%d")


class Balance(NamedTuple):
    """The money of one budget in its current period, in micro-dollars."""

    spent: int = 0
    reserved: int = 0

    @property
    def committed(self) -> int:
        """All that is spent, or may yet be."""
        return self.spent + self.reserved


class Overdrawn(NamedTuple):
    """A hard limit that a reservation would exceed."""

    budget: Budget
    balance: Balance
    amount: int

    @property
    def message(self) -> str:
        budget, balance = self.budget, self.balance
        return (
            f"the budget {budget.scope} of this {budget.period} has a hard limit of "
            f"{usd_text(budget.hard_micro_usd or 0)} USD: {usd_text(balance.spent)} USD are spent, "
            f"{usd_text(balance.reserved)} USD are reserved, and this request may cost up to "
            f"{usd_text(self.amount)} USD"
        )


def overdrawn(balances: Mapping[Budget, Balance], amount: int) -> Overdrawn | None:
    """Return the first budget that has not so much money left; None where all have."""
    for budget, balance in balances.items():
        if budget.hard_micro_usd is not None and balance.committed + amount > budget.hard_micro_usd:
            return Overdrawn(budget, balance, amount)
    return None


def state_of(budget: Budget, balance: Balance) -> State:
    """Return `hard` where nothing is left, `soft` where the soft limit is reached."""
    if budget.hard_micro_usd is not None and balance.committed >= budget.hard_micro_usd:
        return "hard"
    if budget.soft_micro_usd is not None and balance.committed >= budget.soft_micro_usd:
        return "soft"
    return "ok"


def softly_exceeded(balances: Mapping[Budget, Balance]) -> tuple[Budget, ...]:
    """Return the budgets whose soft limit is reached."""
    return tuple(
        budget
        for budget, balance in balances.items()
        if budget.soft_micro_usd is not None and balance.committed >= budget.soft_micro_usd
    )


def concerned(budgets: Iterable[Budget], project: str, key: str | None) -> tuple[Budget, ...]:
    """Return the budgets that a request is paid from."""
    return tuple(budget for budget in budgets if budget.concerns(project, key))


@dataclass(frozen=True, slots=True)
class Reservation:
    """Money set aside for one attempt. `day` is the one whose budgets it is taken from."""

    id: str
    amount: int
    day: str
    at_us: int
    request_id: str
    project: str
    key: str | None
    role: str | None
    instance: str
    model: str


class Closing(NamedTuple):
    """The end of a reservation: what the attempt has cost, in micro-dollars and tokens.

    `kind` is `settled`, `released` where nothing was spent, or `recovered` where a crash left it open: what
    was spent is not known then, and all of it counts.
    """

    reservation: str
    kind: Literal["settled", "released", "recovered"]
    cost: int
    input_tokens: int | None = None
    output_tokens: int | None = None
