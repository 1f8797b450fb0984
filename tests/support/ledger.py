"""A ledger over a real registry, with a clock that belongs to the test."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg

from manager.domain.budgets import Balance, Budget, Overdrawn, Period
from manager.services.accounts.ledger import Ledger, Reserved
from tests.support.attempts import Journal
from tests.support.records import a_record

if TYPE_CHECKING:
    from pathlib import Path

    from manager.adapters.registry import SqlRegistry
    from manager.services.ports import LedgerStore

USD = 1_000_000
NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
GLOBAL = Budget("global", Period.MONTH, soft_micro_usd=USD // 2, hard_micro_usd=USD)


class Books:
    """A ledger over a real registry, with a clock of its own."""

    def __init__(self, registry: SqlRegistry, path: Path, url: str | None = None) -> None:
        self.registry = registry
        self.path = path
        self.url = url
        self.now = NOW
        self.journal = Journal()
        self.limits: dict[str, int] = {}
        self.requests = 0
        self.store: LedgerStore = registry.ledger()
        self.ledger = self.opened()

    def opened(self, *budgets: Budget) -> Ledger:
        return Ledger(
            self.store,
            self.journal,
            budgets=budgets or (GLOBAL,),
            longest_request_s=3600,
            utcnow=lambda: self.now,
            key_limits=lambda: self.limits,
        )

    async def reserve(
        self, amount: int, *, project: str = "shop", key: str | None = None
    ) -> Reserved | Overdrawn:
        self.requests += 1
        record = a_record(project_id=project, request_id=f"r{self.requests}", role="thinking")
        return await self.ledger.reserve(record, key, instance="openai", model="gpt", amount=amount)

    async def crash(self) -> None:
        """Forget what is not written, as a process that is killed does."""
        await self.store.close()
        self.store = self.registry.ledger()
        self.ledger = self.opened(*self.ledger.budgets)

    async def global_balance(self) -> Balance:
        return (await self.ledger.balances())[0].balance

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        if self.url is not None:
            with psycopg.connect(self.url) as other:
                return other.execute(query.encode()).fetchall()
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(query).fetchall()

    def sum_of_rows(self) -> Balance:
        """The money by the rows alone."""
        ((spent,),) = self.rows("SELECT coalesce(sum(amount), 0) FROM ledger WHERE kind <> 'reserved'")
        ((reserved,),) = self.rows(
            "SELECT coalesce(sum(amount), 0) FROM ledger WHERE kind = 'reserved' AND reservation NOT IN "
            "(SELECT reservation FROM ledger WHERE kind <> 'reserved')"
        )
        return Balance(spent, reserved)
