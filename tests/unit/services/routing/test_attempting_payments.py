"""A paid server is asked only with money that is reserved, and the money is given back or settled once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from manager.adapters.registry import open_registry
from manager.domain.budgets import Balance, Budget, Period
from manager.domain.judgement import ABOUT_THE_REQUEST, GOOD, Judgement
from manager.domain.money import Price
from manager.domain.roles import BodyChanges
from manager.domain.target import Target
from manager.errors import Reason
from manager.services.routing.attempting import Trouble, first_target
from manager.wire.body import read_body
from manager.wire.routes import INFERENCE
from tests.support.attempts import FACTS, Stage, attempt
from tests.support.ledger import USD, Books

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from manager.domain.record import Outcome
    from manager.services.routing.attempting import Attempting, Step

# A dollar for a thousand tokens, whichever way.
PRICE = Price(1000 * USD, 1000 * USD, max_output_tokens=500)
RAW = b'{"model":"tiny","max_tokens":100}'
BODY = read_body(RAW, INFERENCE[b"/v1/chat/completions"])
# Every byte is a token at most: 33 of them, and 100 that come out.
WORST = (len(RAW) + 100) * 1000


class Paid(Stage):
    """A local server `a`, and paid servers `x` and `y` that come after it."""

    def __init__(self, books: Books, *names: str) -> None:
        super().__init__(*(attempt(name, fallback=Reason.UPSTREAM_ERROR) for name in names))
        self.books = books
        self.routing = dataclasses.replace(self.routing, ledger=books.ledger)
        for name in ("x", "y"):
            self.placement.targets[name] = Target(
                name, f"https://{name}", prices={"tiny": PRICE}, repeatable=False
            )

    async def begun(self, body: Any = BODY, **values: Any) -> tuple[Attempting, Step]:
        one = self.request(project_id="shop", input_tokens=None, output_tokens=None, **values)
        return one, await first_target(one, one.enter(FACTS, body))

    async def money(self) -> Balance:
        await self.books.ledger.flush()
        return await self.books.global_balance()


@pytest.fixture
async def books(tmp_path: Path) -> AsyncIterator[Books]:
    path = tmp_path / "registry.sqlite3"
    registry = await open_registry(path)
    made = Books(registry, path)
    made.ledger.budgets = (Budget("global", Period.MONTH, hard_micro_usd=USD),)
    yield made
    await made.store.close()
    await registry.close()


async def test_the_most_that_a_request_can_cost_is_reserved_before_it_is_sent(books: Books) -> None:
    stage = Paid(books, "x")
    one, step = await stage.begun()
    assert isinstance(step, Target)
    assert step.instance == "x"
    assert one.payment is not None
    assert one.payment.output_limit == 100
    assert await stage.money() == Balance(0, WORST)
    one.sent()
    assert one.answered(GOOD) is None
    one.record.input_tokens, one.record.output_tokens = 20, 30
    one.close("ok")
    assert await stage.money() == Balance(50_000, 0)
    assert one.record.cost_usd == 0.05
    one.close("ok")
    assert one.record.cost_usd == 0.05


async def test_a_request_without_a_limit_gets_that_of_the_price_list(books: Books) -> None:
    stage = Paid(books, "x")
    raw = b'{"model":"tiny"}'
    one, _ = await stage.begun(read_body(raw, INFERENCE[b"/api/chat"]))
    assert one.payment is not None
    assert one.payment.output_limit == 500
    assert await stage.money() == Balance(0, (len(raw) + 500) * 1000)
    one.close("client_gone")


async def test_what_is_added_to_the_body_is_paid_too(books: Books) -> None:
    stage = Paid(books, "x")
    changes = stage.router.changes["tiny", None] = BodyChanges(system="be brief")
    one, _ = await stage.begun()
    assert (await stage.money()).reserved == WORST + changes.size * 1000
    one.close("client_gone")


@pytest.mark.parametrize("outcome", ["client_gone", "cut", "timeout"])
async def test_a_request_that_was_not_sent_costs_nothing(books: Books, outcome: Outcome) -> None:
    stage = Paid(books, "x")
    one, _ = await stage.begun()
    one.close(outcome)
    assert (await stage.money(), one.record.cost_usd) == (Balance(0, 0), 0)


@pytest.mark.parametrize("judgement", [Judgement(Reason.OVERLOADED), ABOUT_THE_REQUEST])
async def test_an_answer_with_an_error_costs_nothing(books: Books, judgement: Judgement) -> None:
    stage = Paid(books, "x", "y")
    one, _ = await stage.begun()
    one.sent()
    assert one.answered(judgement, "too many") is None, "no second paid server is asked"
    one.close("upstream_error")
    assert (await stage.money(), one.record.cost_usd) == (Balance(0, 0), 0)


async def test_a_stream_that_is_cut_is_settled_on_what_was_seen(books: Books) -> None:
    stage = Paid(books, "x", "y")
    one, _ = await stage.begun()
    one.sent()
    one.answered(GOOD)
    one.delivered()
    one.record.output_tokens = 7
    one.failed(Reason.UPSTREAM_ERROR, "x: closed", sent=True)
    one.close("upstream_error")
    inputs = -(-len(RAW) // 4)
    assert await stage.money() == Balance((inputs + 7) * 1000, 0)
    assert one.record.cost_usd == pytest.approx((inputs + 7) / 1000)


async def test_a_server_that_ran_out_of_time_may_have_made_the_whole_answer(books: Books) -> None:
    stage = Paid(books, "x", "y")
    one, _ = await stage.begun()
    one.sent()
    step = one.failed(Reason.ATTEMPT_TIMEOUT, "x did not answer", sent=True)
    assert isinstance(step, Trouble), "a paid request is sent once"
    one.close("timeout")
    assert await stage.money() == Balance(WORST, 0)


async def test_a_server_that_counts_more_than_it_was_allowed_gets_no_more(books: Books) -> None:
    stage = Paid(books, "x")
    one, _ = await stage.begun()
    one.sent()
    one.answered(GOOD)
    one.record.input_tokens, one.record.output_tokens = 10**12, 10**12
    one.close("ok")
    assert await stage.money() == Balance(WORST, 0)


async def test_without_money_nothing_is_sent_and_the_client_is_told_which_budget_it_was(
    books: Books,
) -> None:
    stage = Paid(books, "a", "x")
    books.ledger.budgets = (Budget("project:shop", Period.DAY, hard_micro_usd=WORST - 1),)
    one, step = await stage.begun()
    one.sent()
    step = await first_target(one, one.answered(Judgement(Reason.UPSTREAM_ERROR), "broken") or step)
    assert isinstance(step, Trouble)
    assert (step.reason, step.refused) == (Reason.BUDGET_EXHAUSTED, "budget_exhausted")
    assert "the budget project:shop of this day has a hard limit" in step.message
    one.close("refused")
    assert one.record.fallback_reason is Reason.BUDGET_EXHAUSTED
    assert stage.placement.held == {}
    assert [failure.reason for failure in one.seen.failures] == [
        Reason.UPSTREAM_ERROR,
        Reason.BUDGET_EXHAUSTED,
    ]
    assert (await stage.money()) == Balance(0, 0)


async def test_a_key_pays_from_its_own_limit(books: Books) -> None:
    stage = Paid(books, "x")
    books.limits["bot"] = WORST
    first, step = await stage.begun(key="bot")
    assert isinstance(step, Target)
    _, step = await stage.begun(key="bot")
    assert isinstance(step, Trouble)
    assert "key:bot" in step.message
    first.close("client_gone")


async def test_another_paid_server_may_be_asked_where_the_first_cannot_be_reached(books: Books) -> None:
    stage = Paid(books, "x", "y")
    one, _ = await stage.begun()
    step = await first_target(one, one.failed(Reason.UPSTREAM_UNREACHABLE, "x: refused", sent=False))
    assert isinstance(step, Target)
    assert step.instance == "y"
    assert await stage.money() == Balance(0, WORST)
    one.close("client_gone")


@pytest.mark.parametrize("what", ["price", "ledger", "body"])
async def test_a_model_without_a_price_is_never_asked(books: Books, what: str) -> None:
    stage = Paid(books, "x")
    if what == "price":
        stage.placement.targets["x"] = Target("x", "https://x", prices={"other": PRICE}, repeatable=False)
    elif what == "ledger":
        stage.routing = dataclasses.replace(stage.routing, ledger=None)
    one, step = await stage.begun(None if what == "body" else BODY)
    assert isinstance(step, Trouble)
    assert step.message == "x names no price for 'tiny' (budget_exhausted)"
    one.close("refused")


async def test_a_ledger_that_cannot_be_written_stops_paid_requests(books: Books) -> None:
    stage = Paid(books, "x")
    await books.ledger.close()
    one, step = await stage.begun()
    assert isinstance(step, Trouble)
    assert (step.refused, step.retry_after_s) == ("unavailable", 1.0)
    one.close("refused")


async def test_soft_limits_that_are_reached_are_named(books: Books) -> None:
    stage = Paid(books, "x")
    books.ledger.budgets = (Budget("project:shop", Period.DAY, soft_micro_usd=1),)
    one, _ = await stage.begun()
    assert one.payment is not None
    assert one.payment.soft == "project:shop/day"
    one.close("client_gone")


async def test_a_request_that_the_server_cannot_have_begun_costs_nothing(books: Books) -> None:
    stage = Paid(books, "x")
    one, _ = await stage.begun()
    one.sent()
    one.failed(Reason.UPSTREAM_UNREACHABLE, "x: closed", sent=False, stale=True)
    one.close("upstream_error")
    assert (await stage.money(), one.record.cost_usd) == (Balance(0, 0), 0)
