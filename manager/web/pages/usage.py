"""Usage: what requests have used over time, the money of budgets, and what keeps requests from a server."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, get_args

from manager.api.budgets import budget_json
from manager.api.llm import routing_stats
from manager.api.usage import read_usage
from manager.domain.budgets import Period
from manager.domain.usage import DAY_S, DIMENSIONS, Dimension
from manager.errors import ManagerError
from manager.web.page import Fragment, Page
from manager.web.paid import paid_servers
from manager.web.state import BAD, OFF, OK, WARN, State
from manager.web.usage_period import SPANS, usage_period
from manager.web.usage_view import shares, tiers_view, usage_view
from manager.web.words import unix_s

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import Request

    from manager.api.backend import Backend
    from manager.services.accounts.ledger import BudgetState
    from manager.web.page import Sections
    from manager.web.usage_period import UsagePeriod
    from manager.web.viewer import Viewer

_GROUPS: tuple[Dimension, ...] = tuple(name for name in DIMENSIONS if name not in ("day", "hour"))
_DEFAULT_GROUP: Dimension = "model"
_BREAKER = {
    "closed": State(OK, "breaker_closed"),
    "half_open": State(WARN, "breaker_half_open"),
    "open": State(WARN, "breaker_open"),
}
_BUDGET = {
    "ok": State(OK, "budget_ok"),
    "soft": State(WARN, "budget_soft"),
    "hard": State(BAD, "budget_hard"),
}


async def _context(backend: Backend, _viewer: Viewer, request: Request) -> Mapping[str, Any]:
    now = datetime.now(UTC)
    query = request.query_params
    period = usage_period(query, now)
    by: Dimension = next((one for one in get_args(Dimension) if one == query.get("by")), _DEFAULT_GROUP)
    if by not in _GROUPS:
        by = _DEFAULT_GROUP
    return {
        "period": period,
        "spans": SPANS,
        "by": by,
        "groups": _GROUPS,
        **await _usage(backend, period, by, now),
        **await _budgets(backend, now),
        "cloud": _cloud(backend),
    }


async def _usage(backend: Backend, period: UsagePeriod, by: Dimension, now: datetime) -> dict[str, Any]:
    bar: Dimension = "day" if period.step_s == DAY_S else "hour"
    # A period that has just begun has no second yet.
    ends = max(period.ends, period.begins + timedelta(seconds=1))
    try:
        found, _ = await read_usage(backend, period.begins, ends, [bar, by], now=now)
        roles, _ = await read_usage(backend, period.begins, ends, ["role"], now=now)
        stats = await routing_stats(backend, period.begins, ends, now=now)
    except ManagerError as error:
        return {"usage": None, "usage_problem": error.message, "roles": [], "tiers": None}
    # Percentiles of many groups take a while.
    view = await asyncio.to_thread(usage_view, found, period)
    rules = backend.model_settings.routing.auto
    tiers = tiers_view(stats, is_on=rules is not None and rules.is_on)
    return {"usage": view, "usage_problem": None, "roles": shares(roles), "tiers": tiers}


async def _budgets(backend: Backend, now: datetime) -> dict[str, Any]:
    try:
        states = await backend.ledger.balances()
    except ManagerError as error:
        return {"budgets": [], "budgets_problem": error.message}
    return {"budgets": [_budget(one, now) for one in states], "budgets_problem": None}


def _budget(one: BudgetState, now: datetime) -> dict[str, Any]:
    """Return the values of the API, and the parts of the bar; its whole is the largest of the numbers."""
    budget, balance = one.budget, one.balance
    soft, hard = budget.soft_micro_usd, budget.hard_micro_usd
    scale = max(balance.committed, hard or 0, soft or 0) or 1
    limit = soft if hard is None else hard
    state = _BUDGET[one.state]
    return {
        **budget_json(one),
        "kind": state.kind,
        "word": state.word,
        # Of a limit of nothing, all is used.
        "spent_share": 1.0 if limit == 0 else balance.spent / scale,
        "reserved_share": 0.0 if limit == 0 else balance.reserved / scale,
        "soft_place": None if soft is None else soft / scale,
        "hard_place": None if hard is None else hard / scale,
        "used_share": balance.committed / limit if limit else None,
        "left_usd": None if hard is None else max(0, hard - balance.committed) / 1_000_000,
        "ends_at": _period_end(budget.period, now).timestamp(),
    }


def _period_end(period: Period, now: datetime) -> datetime:
    today = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if period is Period.DAY:
        return today + timedelta(days=1)
    return (today.replace(day=1) + timedelta(days=32)).replace(day=1)


def _cloud(backend: Backend) -> dict[str, Any]:
    """Return the force-local switch, and which of its effects it has now (`usage.cloud` of the texts)."""
    settings = backend.model_settings
    fallback, sourced = settings.routing.fallback, settings.fallback["force_local"]
    servers = paid_servers(backend)
    roles = [role.name for role in settings.routing.roles.values() if role.paid_fallback]
    if not servers:
        effect = "none_there"
    elif fallback.force_local:
        effect = "forced"
    elif not fallback.enabled:
        effect = "disabled"
    elif not roles:
        effect = "no_role"
    else:
        effect = "used"
    return {
        "is_on": fallback.force_local,
        "kind": OK if fallback.force_local else OFF,
        "source": sourced.source,
        "effect": effect,
        "servers": servers,
        "roles": roles,
    }


def _fragments(sections: Sections, viewer: Viewer) -> Mapping[str, Fragment]:
    rows = [_breaker(one) for one in sections["instances"]]
    rows.sort(key=lambda one: one["kind"] == OK)
    context = {"breakers": rows, "may_reset": viewer.may("operator")}
    return {"breakers": Fragment("usage/breakers.html", context)}


def _breaker(instance: Mapping[str, Any]) -> dict[str, Any]:
    breaker = instance["breaker"]
    state = _BREAKER[breaker["state"]]
    return {
        "id": instance["id"],
        "kind": state.kind,
        "word": state.word,
        "failures": breaker["failures"],
        "reason": breaker["reason"],
        "retry_at": unix_s(breaker["retry_at"]) if breaker["state"] == "open" else None,
        "may_reset": breaker["state"] != "closed" or breaker["failures"] > 0,
    }


USAGE = Page("usage", "/ui/usage", fragments=_fragments, context=_context)
