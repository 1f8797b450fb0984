"""The ledger of paid requests in the registry: rows are added and never changed.

A row reserves money, a second one closes the reservation. The sums by day are kept beside the rows, in the
same transactions, so that a budget is known without a look at all of them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sqlalchemy import Column, Index, Table, Text, text

from manager.adapters.registry.dialects import Whole
from manager.adapters.registry.tables import metadata, storable
from manager.domain.budgets import Balance, Overdrawn, overdrawn

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from manager.adapters.registry.own_connection import LedgerConnection, Session
    from manager.domain.budgets import Budget, Closing, Reservation

# A gateway without a session for so long has ended.
GONE_S = 30.0
_IS_RESERVED = text("kind = 'reserved'")
_IS_CLOSING = text("kind <> 'reserved'")

ledger = Table(
    "ledger",
    metadata,
    Column("id", Whole, primary_key=True),
    Column("reservation", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("at_us", Whole, nullable=False),
    Column("day", Text, nullable=False),
    Column("amount", Whole, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("key", Text),
    Column("role", Text),
    Column("instance", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("input_tokens", Whole),
    Column("output_tokens", Whole),
    Column("gateway", Text),
    Index("ledger_reserved_once", "reservation", unique=True, sqlite_where=_IS_RESERVED),
    Index("ledger_closed_once", "reservation", unique=True, sqlite_where=_IS_CLOSING),
    sqlite_autoincrement=True,
)

# `key` is empty for requests without one.
ledger_days = Table(
    "ledger_days",
    metadata,
    Column("day", Text, primary_key=True),
    Column("project", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("spent", Whole, nullable=False),
    Column("reserved", Whole, nullable=False),
)

_RESERVE = """INSERT INTO ledger
    (reservation, kind, at_us, day, amount, request_id, project, key, role, instance, model, gateway)
    VALUES (?, 'reserved', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
_CLOSE = """INSERT INTO ledger
    (reservation, kind, at_us, day, amount, request_id, project, key, role, instance, model,
     input_tokens, output_tokens)
    SELECT reservation, ?, ?, day, ?, request_id, project, key, role, instance, model, ?, ?
    FROM ledger WHERE reservation = ? AND kind = 'reserved' ON CONFLICT DO NOTHING"""
_RESERVED = "SELECT amount, day, project, key FROM ledger WHERE reservation = ? AND kind = 'reserved'"
_OPEN = """SELECT id, reservation, amount, at_us, gateway FROM ledger AS one
    WHERE id >= ? AND kind = 'reserved'
    AND NOT EXISTS (SELECT 1 FROM ledger WHERE reservation = one.reservation AND kind <> 'reserved')
    ORDER BY id"""
_NEXT = "SELECT coalesce(max(id), 0) + 1 FROM ledger"
_ADD = """INSERT INTO ledger_days (day, project, key, spent, reserved) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (day, project, key) DO UPDATE SET
    spent = ledger_days.spent + excluded.spent, reserved = ledger_days.reserved + excluded.reserved"""
# The cast is for PostgreSQL, whose sums of 64 bits have more of them.
_SUMS = """SELECT CAST(coalesce(sum(spent), 0) AS BIGINT), CAST(coalesce(sum(reserved), 0) AS BIGINT)
    FROM ledger_days WHERE day >= ?"""


class SqlLedger:
    """Implements `services.ports.LedgerStore`. All SQL runs in one thread, in the order of the calls.

    Every write is flushed to the disk before the call returns. Several processes may use one ledger.

    Args:
        own: its connection.
        gateway: the name of this gateway among those that share the ledger; None: it is the only one.
    """

    def __init__(self, own: LedgerConnection, gateway: str | None = None) -> None:
        self._own = own
        self._gateway = gateway
        # Other gateways that have reservations and no session, with the time since when.
        self._away: dict[str, float] = {}
        # No reservation with a smaller id is open.
        self._first_open = 0

    async def reserve(
        self, reservation: Reservation, budgets: Mapping[Budget, str]
    ) -> Overdrawn | dict[Budget, Balance]:
        def work() -> Overdrawn | dict[Budget, Balance]:
            with self._own.transaction() as connection:
                balances = _balances(connection, budgets)
                refused = overdrawn(balances, reservation.amount)
                if refused is not None:
                    return refused
                one = reservation
                connection.execute(
                    _RESERVE,
                    (
                        one.id,
                        one.at_us,
                        one.day,
                        one.amount,
                        one.request_id,
                        storable(one.project),
                        one.key,
                        one.role,
                        one.instance,
                        storable(one.model),
                        self._gateway,
                    ),
                )
                who = (one.day, storable(one.project), one.key or "")
                connection.execute(_ADD, (*who, 0, one.amount))
                return _balances(connection, budgets)

        return await self._own.call(work)

    async def close_reservation(self, closing: Closing, at_us: int) -> bool:
        def work() -> bool:
            with self._own.transaction() as connection:
                return _close(connection, closing, at_us)

        return await self._own.call(work)

    async def recover(self, make: Callable[[str, int], Closing], *, before_us: int, at_us: int) -> int:
        def work() -> int:
            rows = self._look_for_open()
            gone = self._gone({name for *_, name in rows if name is not None and name != self._gateway})
            found = [
                row[1:3] for row in rows if row[4] in gone or (self._is_own(row[4]) and row[3] < before_us)
            ]
            if not found:
                return 0
            with self._own.transaction() as connection:
                return sum(_close(connection, make(*row), at_us) for row in found)

        return await self._own.call(work)

    async def balances(self, budgets: Mapping[Budget, str]) -> dict[Budget, Balance]:
        return await self._own.call(lambda: _balances(self._own.open(), budgets), doing="read")

    async def close(self) -> None:
        """End after the calls that are under way; closing twice is no error."""
        await self._own.close()

    def _is_own(self, gateway: str | None) -> bool:
        return gateway is None or gateway == self._gateway

    def _gone(self, others: Collection[str]) -> frozenset[str]:
        """Return which of the other gateways have ended: they have had no session for a while.

        One that lives closes its reservations itself, however old they are. It has no session for a moment
        when the server is restarted.
        """
        if not others:
            self._away.clear()
            return frozenset()
        now, living = time.monotonic(), self._own.living(others)
        self._away = {one: self._away.get(one, now) for one in others if one not in living}
        return frozenset(one for one, since in self._away.items() if now - since >= GONE_S)

    def _look_for_open(self) -> list[tuple[int, str, int, int, str | None]]:
        """Return the reservations that are open; nobody who writes waits for it.

        A row is looked at once after it was closed: the first open one bounds the next look.
        """
        connection = self._own.open()
        (after_all,) = connection.execute(_NEXT).fetchone()
        found = connection.execute(_OPEN, (self._first_open,)).fetchall()
        self._first_open = min([after_all, *(row[0] for row in found)])
        return found


def _close(connection: Session, closing: Closing, at_us: int) -> bool:
    """Close a reservation; False where that was done before, or where there is none."""
    reserved = connection.execute(_RESERVED, (closing.reservation,)).fetchone()
    values = (closing.kind, at_us, closing.cost, closing.input_tokens, closing.output_tokens)
    if reserved is None or not connection.execute(_CLOSE, (*values, closing.reservation)).rowcount:
        return False
    amount, day, project, key = reserved
    connection.execute(_ADD, (day, project, key or "", closing.cost, -amount))
    return True


def _balances(connection: Session, budgets: Mapping[Budget, str]) -> dict[Budget, Balance]:
    found: dict[Budget, Balance] = {}
    for budget, since in budgets.items():
        statement, values = _SUMS, [since]
        for column, value in (("project", budget.project), ("key", budget.key)):
            if value is not None:
                statement += f" AND {column} = ?"
                values.append(storable(value))
        found[budget] = Balance(*connection.execute(statement, values).fetchone())
    return found
