"""No race, crash, cancelled caller or full disk overspends a budget or loses money."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from manager.adapters.registry import open_registry
from manager.adapters.registry.postgres import PostgresDatabase
from manager.domain.budgets import Balance, Budget, Closing, Overdrawn, Period
from manager.errors import Reason, RegistryUnwritableError, UnavailableError
from manager.services.accounts.ledger import Reserved
from tests.support.inside import until
from tests.support.ledger import GLOBAL, NOW, USD, Books

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from manager.services.ports import LedgerStore


@pytest.fixture(params=["file", "postgresql"])
async def books(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Books]:
    url = None if request.param == "file" else request.getfixturevalue("postgres").database()
    path = tmp_path / "registry.sqlite3"
    registry = await open_registry(path, shared=None if url is None else PostgresDatabase(url))
    made = Books(registry, path, url)
    yield made
    await made.store.close()
    await registry.close()


def settled(reserved: Reserved | Overdrawn, cost: int) -> Closing:
    assert isinstance(reserved, Reserved)
    return Closing(reserved.reservation.id, "settled", cost, 10, 20)


async def test_a_race_of_200_requests_spends_all_of_a_dollar_and_not_more(books: Books) -> None:
    worst, cost = 30_000, 10_000
    begun = asyncio.Semaphore(200)

    async def request() -> str:
        async with begun:
            reserved = await books.reserve(worst)
            if isinstance(reserved, Overdrawn):
                assert reserved.balance.committed + worst > USD, "refused while money was left"
                return "refused"
            books.ledger.close_reservation(settled(reserved, cost))
            return "sent"

    outcomes = await asyncio.gather(*(request() for _ in range(200)))
    await books.ledger.flush()
    balance = await books.global_balance()
    assert balance == Balance(cost * outcomes.count("sent"), 0) == books.sum_of_rows()
    assert outcomes.count("sent") >= USD // worst
    assert "refused" in outcomes
    # What was refused for the money that others had reserved goes now.
    while isinstance(reserved := await books.reserve(worst), Reserved):
        books.ledger.close_reservation(settled(reserved, cost))
        await books.ledger.flush()
        assert (await books.global_balance()).committed <= USD
    assert (await books.global_balance()).spent > USD - worst


async def test_money_is_reserved_settled_on_the_cost_and_released(books: Books) -> None:
    first, second = await books.reserve(400_000), await books.reserve(600_000)
    assert await books.global_balance() == Balance(0, USD)
    refused = await books.reserve(1)
    assert isinstance(refused, Overdrawn)
    assert "hard limit of 1 USD" in refused.message
    books.ledger.close_reservation(settled(first, 150_000))
    assert isinstance(second, Reserved)
    books.ledger.close_reservation(Closing(second.reservation.id, "released", 0))
    assert await books.ledger.flush()
    assert await books.global_balance() == Balance(150_000, 0)
    assert books.rows("SELECT kind, amount, input_tokens, role, project FROM ledger ORDER BY id") == [
        ("reserved", 400_000, None, "thinking", "shop"),
        ("reserved", 600_000, None, "thinking", "shop"),
        ("settled", 150_000, 10, "thinking", "shop"),
        ("released", 0, None, "thinking", "shop"),
    ]


async def test_a_reservation_is_closed_once_whatever_comes_later(books: Books) -> None:
    reserved = await books.reserve(400_000)
    for cost in (100_000, 300_000):
        books.ledger.close_reservation(settled(reserved, cost))
        await books.ledger.flush()
    books.ledger.close_reservation(Closing("nobody-1", "settled", 5))
    assert await books.ledger.flush()
    assert await books.global_balance() == Balance(100_000, 0)


async def test_projects_and_keys_have_budgets_of_their_own(books: Books) -> None:
    shop = Budget("project:shop", Period.DAY, hard_micro_usd=100)
    books.ledger.budgets = (GLOBAL, shop)
    books.limits = {"bot": 50, "idle": 7}
    assert isinstance(await books.reserve(100), Reserved)
    for project, key, amount, budget in (("shop", None, 1, shop), ("other", "bot", 51, None)):
        refused = await books.reserve(amount, project=project, key=key)
        assert isinstance(refused, Overdrawn)
        assert budget is None or refused.budget == budget
    assert isinstance(await books.reserve(50, project="other", key="bot"), Reserved)
    assert isinstance(await books.reserve(50, project="other"), Reserved)
    states = {one.budget.scope: (one.balance.reserved, one.state) for one in await books.ledger.balances()}
    assert states == {
        "global": (200, "ok"),
        "project:shop": (100, "hard"),
        "key:bot": (50, "hard"),
        "key:idle": (0, "ok"),
    }


async def test_a_new_period_begins_with_nothing_spent(books: Books) -> None:
    books.ledger.budgets = (Budget("global", Period.DAY, hard_micro_usd=100), GLOBAL)
    reserved = await books.reserve(100)
    books.now = NOW + timedelta(days=1)
    books.ledger.close_reservation(settled(reserved, 100))
    await books.ledger.flush()
    day, month = [one.balance for one in await books.ledger.balances()]
    assert (day, month) == (Balance(0, 0), Balance(100, 0)), "it counts for the day of its reservation"
    books.now = NOW + timedelta(days=3)
    assert await books.global_balance() == Balance(0, 0)


async def test_what_a_crash_leaves_open_counts_in_full(books: Books) -> None:
    lost, done = await books.reserve(300_000), await books.reserve(200_000)
    books.ledger.close_reservation(settled(done, 50_000))
    await books.ledger.flush()
    books.ledger.close_reservation(settled(lost, 1))  # never written
    await books.crash()
    assert await books.global_balance() == Balance(50_000, 300_000), "nothing is lost before it is looked at"
    books.now += timedelta(seconds=1)
    assert await books.ledger.recover(is_alone=True) == 1
    assert await books.ledger.recover(is_alone=True) == 0
    assert await books.global_balance() == Balance(350_000, 0) == books.sum_of_rows()
    assert books.journal.kinds.count("ledger_recovered") == 1


async def test_a_clock_that_went_back_leaves_nothing_reserved(books: Books) -> None:
    await books.reserve(USD // 4)
    await books.crash()
    books.now -= timedelta(days=400)
    assert await books.ledger.recover(is_alone=True) == 1
    books.now += timedelta(days=400)
    assert await books.global_balance() == Balance(USD // 4, 0)


async def test_requests_of_another_process_keep_their_money_as_long_as_they_may_last(books: Books) -> None:
    reserved = await books.reserve(300_000)
    await books.crash()
    books.now += timedelta(seconds=3600)
    assert await books.ledger.recover(is_alone=False) == 0
    books.ledger.inherit(b"no JSON")
    books.ledger.inherit(b'[{"wrong": 1}]')
    earlier = books.opened()
    earlier.close_reservation(settled(reserved, 70_000))
    books.ledger.inherit(earlier.hand_over())
    assert (earlier.unwritten, books.ledger.unwritten) == (0, 1)
    await books.ledger.flush()
    assert await books.global_balance() == Balance(70_000, 0)
    books.now += timedelta(seconds=3600)
    assert await books.ledger.recover(is_alone=False) == 0


async def test_a_look_for_what_was_left_open_waits_for_nobody_who_writes(books: Books) -> None:
    books.ledger.close_reservation(settled(await books.reserve(100_000), 7))
    await books.ledger.flush()
    with closing(sqlite3.connect(books.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert await books.ledger.recover(is_alone=True) == 0


async def test_what_is_left_open_is_found_whatever_was_closed_after_it(books: Books) -> None:
    await books.reserve(100_000)
    for number in range(3):
        books.ledger.close_reservation(settled(await books.reserve(1_000), 0))
        await books.ledger.flush()
        assert await books.ledger.recover(is_alone=False) == 0, number
    books.now += timedelta(hours=2)
    await books.reserve(5_000)
    assert await books.ledger.recover(is_alone=False) == 1
    books.now += timedelta(hours=2)
    assert await books.ledger.recover(is_alone=False) == 1


async def test_a_caller_that_leaves_while_money_is_reserved_leaves_none_reserved(books: Books) -> None:
    asking = asyncio.ensure_future(books.reserve(400_000))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    writing = asyncio.ensure_future(books.ledger.run())
    await until(lambda: books.rows("SELECT 1 FROM ledger WHERE kind = 'released'"))
    writing.cancel()
    await asyncio.wait({writing})
    assert await books.global_balance() == Balance(0, 0)


async def test_limits_that_are_reached_are_told_once_a_period(books: Books) -> None:
    assert isinstance(await books.reserve(400_000), Reserved)
    assert books.journal.kinds == []
    second = await books.reserve(200_000)
    assert isinstance(second, Reserved)
    assert second.soft == (GLOBAL,)
    for _ in range(2):
        await books.reserve(100_000)
        await books.reserve(USD)
    assert books.journal.kinds == ["budget_soft", "budget_hard"]
    assert books.journal.details[0] == "global, month: 0.6 of 0.5 USD are spent or reserved"
    books.now += timedelta(days=31)
    await books.reserve(USD + 1)
    assert books.journal.kinds == ["budget_soft", "budget_hard", "budget_hard"]


class FullDisk:
    """A store whose disk is full while `is_full`."""

    def __init__(self, store: LedgerStore) -> None:
        self._store = store
        self.is_full = True

    def __getattr__(self, name: str) -> Any:
        return self._refuse if self.is_full else getattr(self._store, name)

    async def _refuse(self, *_: object) -> None:
        raise RegistryUnwritableError("the disk is full")


async def test_a_disk_that_is_full_stops_paid_requests_and_loses_no_money(books: Books) -> None:
    reserved = await books.reserve(400_000)
    disk = FullDisk(books.store)
    books.store = disk
    books.ledger = books.opened()
    with pytest.raises(UnavailableError, match="no paid request is sent: the disk is full") as caught:
        await books.reserve(1)
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    books.ledger.close_reservation(settled(reserved, 10))
    assert not await books.ledger.flush()
    assert books.ledger.unwritten == 1
    disk.is_full = False
    assert await books.global_balance() == Balance(0, 400_000)
    assert await books.ledger.flush()
    assert await books.global_balance() == Balance(10, 0)


async def test_a_look_takes_the_balances_and_forgets_them_where_the_store_does_not_tell(books: Books) -> None:
    await books.ledger.look()
    seen = books.ledger.last_seen
    assert tuple(state.budget for state in seen) == books.ledger.budgets != ()
    await books.ledger.close()
    await books.ledger._store.close()
    await books.ledger.look()
    assert books.ledger.last_seen == ()


async def test_a_ledger_that_is_closed_reserves_nothing(books: Books) -> None:
    await books.ledger.close()
    with pytest.raises(UnavailableError, match="being replaced"):
        await books.reserve(1)
    with pytest.raises(RegistryUnwritableError):
        await books.ledger.balances()


class LedgerMachine(RuleBasedStateMachine):
    """Reservations, closings, crashes, periods and cancelled callers in any order."""

    reservations: Bundle[Reserved] = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._directory = tempfile.TemporaryDirectory()
        path = Path(self._directory.name, "registry.sqlite3")
        self.books = Books(self.run(open_registry(path)), path)

    def run(self, work: Any) -> Any:
        return self._runner.run(work)

    def teardown(self) -> None:
        self.run(self.books.store.close())
        self.run(self.books.registry.close())
        self._runner.close()
        self._directory.cleanup()

    @rule(target=reservations, amount=st.integers(0, 400_000))
    def reserve(self, amount: int) -> Any:
        before = self.run(self.books.global_balance())
        reserved = self.run(self.books.reserve(amount))
        assert isinstance(reserved, Overdrawn) == (before.committed + amount > USD)
        return reserved

    @rule(reserved=consumes(reservations), share=st.floats(0, 1), writes=st.booleans())
    def close(self, reserved: Any, share: float, *, writes: bool) -> None:
        if isinstance(reserved, Overdrawn):
            return
        amount = reserved.reservation.amount
        cost = int(amount * share)
        kind: Any = "settled" if cost else "released"
        self.books.ledger.close_reservation(Closing(reserved.reservation.id, kind, cost))
        if writes:
            self.run(self.books.ledger.flush())

    @rule(recovers=st.booleans())
    def crash(self, *, recovers: bool) -> None:
        self.run(self.books.crash())
        self.books.now += timedelta(seconds=1)
        if recovers:
            self.run(self.books.ledger.recover(is_alone=True))
            assert self.run(self.books.global_balance()).reserved == 0

    @rule()
    def next_day(self) -> None:
        self.books.now += timedelta(days=1)

    @invariant()
    def nothing_is_overspent_and_the_rows_add_up(self) -> None:
        balance = self.run(self.books.global_balance())
        assert balance.spent >= 0
        assert balance.reserved >= 0
        assert balance.committed <= USD
        if self.books.now.month == NOW.month:
            assert balance == self.books.sum_of_rows()


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
