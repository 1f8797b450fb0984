"""`/api/v1/budgets`: the money of each budget in its current period."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse, Response

from manager.api.compute import NoQuery  # noqa: TC001  (FastAPI reads annotations at run time)
from manager.api.errors import refusals
from manager.domain.budgets import Period  # noqa: TC001
from manager.domain.money import in_usd

if TYPE_CHECKING:
    from manager.api.backend import Backend
    from manager.services.accounts.ledger import BudgetState


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetBody(_Shape):
    """One budget in its current period (UTC). A limit that is null is none.

    `reserved_usd` is the most that open requests may still cost. `state` is `hard` where nothing is left and
    `soft` where the soft limit is reached.
    """

    scope: str
    period: Period
    soft_usd: float | None
    hard_usd: float | None
    spent_usd: float
    reserved_usd: float
    state: Literal["ok", "soft", "hard"]


class BudgetsBody(_Shape):
    budgets: list[BudgetBody]


def budgets_router(backend: Backend) -> APIRouter:
    router = APIRouter(prefix="/api/v1/budgets", tags=["accounts"])

    @router.get("", response_model=BudgetsBody, responses=refusals(503))
    async def show_budgets(_query: Annotated[NoQuery, Query()]) -> Response:
        """The budgets of the configuration, and those that keys have themselves."""
        states = await backend.ledger.balances()
        return JSONResponse({"budgets": [budget_json(one) for one in states]})

    return router


def budget_json(one: BudgetState) -> dict[str, object]:
    """Return the values of a `BudgetBody`."""
    budget = one.budget
    soft, hard = budget.soft_micro_usd, budget.hard_micro_usd
    return {
        "scope": budget.scope,
        "period": budget.period,
        "soft_usd": None if soft is None else in_usd(soft),
        "hard_usd": None if hard is None else in_usd(hard),
        "spent_usd": in_usd(one.balance.spent),
        "reserved_usd": in_usd(one.balance.reserved),
        "state": one.state,
    }
