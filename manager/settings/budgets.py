"""The section `budgets` of the configuration."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from manager.domain.budgets import GLOBAL, Budget, Period
from manager.domain.money import micro_usd
from manager.domain.template import Refusal
from manager.settings.section import Section, refuse

_SCOPES = "global, project:NAME or key:NAME"
_MOST_USD = 1_000_000_000
MOST_BUDGETS = 1000


def _scope(value: str) -> str:
    kind, separator, name = value.partition(":")
    if value == GLOBAL or (kind in ("project", "key") and separator and name.strip() == name and name):
        return value
    raise ValueError(f"expected {_SCOPES}")


def _no_flag(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected dollars")  # noqa: TRY004  (pydantic reports ValueError alone)
    return value


Usd = Annotated[
    Decimal,
    BeforeValidator(_no_flag),
    Field(ge=0, le=_MOST_USD, max_digits=16, decimal_places=6),
    PlainSerializer(float, when_used="json"),
]


class BudgetSettings(Section):
    """One budget; a limit that is None is none. Periods are days and months in UTC."""

    scope: Annotated[str, AfterValidator(_scope)]
    period: Period
    soft_usd: Usd | None = None
    hard_usd: Usd | None = None

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.soft_usd is None and self.hard_usd is None:
            message = "missing, and soft_usd too; a budget needs at least one of them"
            refuse([Refusal(key=("hard_usd",), message=message)])
        if self.soft_usd is not None and self.hard_usd is not None and self.soft_usd > self.hard_usd:
            message = f"{self.soft_usd}, more than hard_usd; expected {self.hard_usd} or less"
            refuse([Refusal(key=("soft_usd",), message=message)])
        return self

    @property
    def budget(self) -> Budget:
        return Budget(
            self.scope,
            self.period,
            None if self.soft_usd is None else micro_usd(self.soft_usd),
            None if self.hard_usd is None else micro_usd(self.hard_usd),
        )


def repeated(budgets: tuple[BudgetSettings, ...]) -> list[Refusal]:
    """Return a refusal of each budget that another one with the same scope and period precedes."""
    seen: dict[tuple[str, Period], int] = {}
    refusals = []
    for place, one in enumerate(budgets):
        first = seen.setdefault((one.scope, one.period), place)
        if first != place:
            message = f"{one.scope!r} has a budget for each {one.period} already, at {first}"
            refusals.append(Refusal(key=("budgets", place, "scope"), message=message))
    return refusals
