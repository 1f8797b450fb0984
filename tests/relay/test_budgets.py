"""No request is sent to a paid server without money for it, and every answer is paid once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.history import Filters
from manager.errors import Reason
from tests.relay.test_cloud import CHAT, OPENAI, TINY, WHOLE, broken, fronted, get, limit
from tests.support.inside import until
from tests.support.provider import INPUTS, OUTPUTS, Provider, is_cut, refuses, speaks

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.relaying import Front

# 1 USD for a million tokens that go in, 2 USD for a million that come out, 64 at most: see `fronted`.
COST = (INPUTS + 2 * OUTPUTS) / 1_000_000
BUDGETS = "/api/v1/budgets"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROVIDER_KEY", "sk-secret")


def budget(hard_usd: float, *, scope: str = "global", soft_usd: float | None = None) -> dict[str, Any]:
    return {"scope": scope, "period": "month", "hard_usd": hard_usd, "soft_usd": soft_usd}


async def spent(front: Front) -> tuple[float, float]:
    """The money of the first budget: spent and reserved."""
    (first, *_) = (await get(front, BUDGETS))["budgets"]
    return first["spent_usd"], first["reserved_usd"]


async def settled(front: Front) -> float:
    """The money that is spent, once nothing is reserved."""
    await front.daemon.backend.ledger.flush()
    money = await spent(front)
    assert money[1] == 0, money
    return money[0]


@pytest.mark.parametrize("path", [CHAT, OPENAI])
async def test_a_paid_answer_says_its_cost_and_is_settled_on_its_tokens(tmp_path: Path, path: str) -> None:
    provider = Provider()
    provider.answer = speaks
    async with fronted(tmp_path, provider, broken(), budgets=[budget(1)]) as front:
        reply = await front.ask({**WHOLE, **limit(path)}, path)
        assert (reply.status, reply.headers["x-provider"]) == (200, "paid")
        assert float(reply.headers["x-cost-usd"]) == pytest.approx(COST)
        assert await settled(front) == pytest.approx(COST)
        assert (await front.record()).cost_usd == pytest.approx(COST)
        assert "x-budget-soft" not in reply.headers


async def test_a_stream_is_settled_too_and_says_no_cost(tmp_path: Path) -> None:
    provider = Provider()
    provider.answer = speaks
    async with fronted(tmp_path, provider, broken(), budgets=[budget(1, soft_usd=0.000001)]) as front:
        reply = await front.ask(TINY)
        assert "x-cost-usd" not in reply.headers
        assert reply.headers["x-budget-soft"] == "global/month"
        assert await settled(front) == pytest.approx(COST)


async def test_past_a_hard_limit_a_client_is_told_402_and_nothing_is_sent(tmp_path: Path) -> None:
    provider = Provider()
    async with fronted(tmp_path, provider, broken(), budgets=[budget(0.00001)]) as front:
        for path, body in ((CHAT, TINY), (OPENAI, {**WHOLE, **limit(OPENAI)})):
            reply = await front.ask(body, path)
            assert reply.status == 402, reply.body
            assert b"budget global" in reply.body
        assert provider.seen == []
        assert await settled(front) == 0
        (shown,) = (await get(front, BUDGETS))["budgets"]
        assert (shown["scope"], shown["period"], shown["hard_usd"], shown["soft_usd"]) == (
            *("global", "month", 0.00001),
            None,
        )
        record = await front.record()
        assert (record.outcome, record.fallback_reason) == ("refused", Reason.BUDGET_EXHAUSTED)


async def test_an_error_of_the_provider_costs_nothing(tmp_path: Path) -> None:
    provider = Provider()
    provider.answer = refuses(429)
    async with fronted(tmp_path, provider, broken(), budgets=[budget(1)]) as front:
        await front.ask(WHOLE)
        assert len(provider.seen) == 1
        assert await settled(front) == 0


async def test_a_stream_that_is_cut_is_settled_on_what_was_seen(tmp_path: Path) -> None:
    provider = Provider()
    provider.answer = is_cut
    async with fronted(tmp_path, provider, broken(), budgets=[budget(1)]) as front:
        await front.ask(TINY)
        money = await settled(front)
        assert 0 < money < 0.001
        assert (await front.record()).cost_usd == pytest.approx(money)


async def test_the_limit_that_is_paid_for_is_sent_along(tmp_path: Path) -> None:
    provider = Provider()
    provider.answer = speaks
    async with fronted(tmp_path, provider, broken(), budgets=[budget(1)]) as front:
        for path, wanted, sent in ((OPENAI, 5, 5), (OPENAI, 1000, 64), (CHAT, None, 64)):
            body = WHOLE if wanted is None else {**WHOLE, "max_tokens": wanted}
            await front.ask(body, path)
            assert provider.seen[-1].json()["max_tokens"] == sent


async def test_200_requests_at_once_spend_no_more_than_there_is(tmp_path: Path) -> None:
    provider = Provider()
    provider.answer = speaks
    # Each may cost 64 tokens that come out and a hundred or so that go in, and costs less in the end.
    money = 0.005
    async with fronted(tmp_path, provider, broken(), budgets=[budget(money)]) as front:
        replies = await asyncio.gather(*(front.ask(WHOLE) for _ in range(200)))
        statuses = [reply.status for reply in replies]
        assert set(statuses) == {200, 402}
        total = await settled(front)
        assert total == pytest.approx(COST * statuses.count(200))
        assert total <= money
        assert len(provider.seen) == statuses.count(200)
        # What others had reserved and did not need is there for later requests, to the last one that fits.
        while (await front.ask(WHOLE)).status == 200:
            assert await settled(front) <= money
        assert await settled(front) > money - 0.0004
        await front.daemon.backend.history.flush()
        rows = await front.daemon.backend.history.store.last(Filters(), 1000)
        costs = [values.get("cost_usd", 0.0) for _, values in rows.items]
        assert sum(costs) == pytest.approx(await settled(front))


async def test_a_client_that_leaves_is_settled_and_leaves_no_money_reserved(tmp_path: Path) -> None:
    provider = Provider()
    asked = asyncio.Event()

    async def never_ends(talk: Any) -> None:
        await talk.begin("text/event-stream")
        asked.set()
        await talk.left()

    provider.answer = never_ends
    async with fronted(tmp_path, provider, broken(), budgets=[budget(1)]) as front:
        caller = await front.connect()
        await caller.send(TINY)
        await asked.wait()
        assert (await spent(front))[1] > 0
        caller.leave()
        await until(lambda: front.at_rest)
        assert await settled(front) > 0, "the provider may have read the request"
