"""The ledger: reserves money before a paid request is sent, and closes each reservation exactly once."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, Protocol

import orjson
import structlog

from manager.domain.budgets import (
    Balance,
    Budget,
    Closing,
    Overdrawn,
    Reservation,
    State,
    concerned,
    day_of,
    key_budget,
    softly_exceeded,
    state_of,
)
from manager.domain.money import usd_text
from manager.errors import ManagerError, Reason, RegistryDoubtfulError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from datetime import datetime

    from manager.domain.record import RequestRecord
    from manager.services.ports import LedgerStore

_log = structlog.get_logger("ledger")

_RETRY_S = 2.0
_ANY_TIME_US = 2**63 - 1
_RECOVER_EVERY_S = 60.0
# The longest that a scrape of the metrics waits for the store.
_LOOK_S = 1.0
# Added to the longest time of a request, before a reservation of another process counts as left behind.
_SLACK_S = 60.0
# Limits that were reached and said so already; a limit more says so once again.
_MOST_TOLD = 10_000


class Journal(Protocol):
    """Takes events."""

    def record(
        self, kind: str, *, instance: str | None = None, reason: Reason | None = None, detail: str = ""
    ) -> None: ...


class Reserved(NamedTuple):
    """Money that is set aside, and the budgets whose soft limit is reached with it."""

    reservation: Reservation
    soft: tuple[Budget, ...]


class BudgetState(NamedTuple):
    """One budget, and the money of its current period."""

    budget: Budget
    balance: Balance
    state: State


class Ledger:
    """Owns the reservations that are not closed yet. Lives on the event loop.

    The store decides whether there is money, in one transaction with the reservation: no two requests get the
    same money. A closing is written in the background and tried again until it is stored. Until then its
    money stays reserved, so that a disk that is full stops paid requests and overspends nothing.

    What a crash leaves open is settled on all that was reserved: nobody knows what was spent of it.

    `last_seen` is what `look` has found last.

    Args:
        store: keeps the rows.
        journal: takes events.
        budgets: those of the configuration; can be replaced at any time.
        longest_request_s: a reservation older than that belongs to no request.
        utcnow: the wall clock.
        key_limits: the monthly limits of keys, in micro-dollars by name.
    """

    def __init__(
        self,
        store: LedgerStore,
        journal: Journal,
        *,
        budgets: tuple[Budget, ...],
        longest_request_s: float,
        utcnow: Callable[[], datetime],
        key_limits: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.budgets = budgets
        self._store = store
        self._journal = journal
        self._longest_s = longest_request_s + _SLACK_S
        self._utcnow = utcnow
        self._key_limits = key_limits
        self._unwritten: dict[str, Closing] = {}
        self._news = asyncio.Event()
        self._writing = asyncio.Lock()
        self._told: set[tuple[bool, str, str]] = set()
        self._trouble: str | None = None
        self._is_closed = False
        self._reservations = 0
        self.last_seen: tuple[BudgetState, ...] = ()

    @property
    def unwritten(self) -> int:
        """Closings that are not stored yet."""
        return len(self._unwritten)

    async def reserve(
        self, record: RequestRecord, key: str | None, *, instance: str, model: str, amount: int
    ) -> Reserved | Overdrawn:
        """Set money aside for one attempt. A caller that is cancelled leaves nothing reserved.

        Args:
            record: of the request.
            key: the name of the client's key; None without one.
            instance: the paid server.
            model: the paid model.
            amount: the most that the attempt can cost, in micro-dollars.

        Raises:
            UnavailableError: the ledger cannot be written, or another daemon goes on with it.
        """
        if self._is_closed:
            why = "the manager is being replaced; try again"
            raise UnavailableError(why, reason=Reason.CANCELLED, retry_after_s=1.0)
        now = self._utcnow()
        self._reservations += 1
        reservation = Reservation(
            id=f"{record.request_id}-{self._reservations}",
            amount=amount,
            day=day_of(now),
            at_us=_micros(now),
            request_id=record.request_id,
            project=record.project_id,
            key=key,
            role=record.role,
            instance=instance,
            model=model,
        )
        budgets = {one: one.since(now) for one in concerned(self._all(key), record.project_id, key)}
        reserving = asyncio.ensure_future(self._store.reserve(reservation, budgets))
        try:
            outcome = await asyncio.shield(reserving)
        except asyncio.CancelledError:
            reserving.add_done_callback(lambda done: self._release_left(reservation, done))
            raise
        except ManagerError as error:
            if isinstance(error, RegistryDoubtfulError):
                # Where it was stored after all, nothing will be spent of it.
                self.close_reservation(Closing(reservation.id, "released", 0))
            message = f"no paid request is sent: {error.message}"
            raise UnavailableError(message, reason=Reason.BUDGET_EXHAUSTED, retry_after_s=_RETRY_S) from error
        if isinstance(outcome, Overdrawn):
            self._tell(outcome.budget, now, outcome.message, is_hard=True)
            return outcome
        soft = softly_exceeded(outcome)
        for budget in soft:
            limit, used = usd_text(budget.soft_micro_usd or 0), usd_text(outcome[budget].committed)
            detail = f"{budget.scope}, {budget.period}: {used} of {limit} USD are spent or reserved"
            self._tell(budget, now, detail, is_hard=False)
        return Reserved(reservation, soft)

    def close_reservation(self, closing: Closing) -> None:
        """Close a reservation. Waits for nothing."""
        self._unwritten[closing.reservation] = closing
        self._news.set()

    async def balances(self) -> list[BudgetState]:
        """Return every budget, those of keys included, as it is stored now.

        Raises:
            RegistryUnwritableError: the store cannot be read.
        """
        now = self._utcnow()
        budgets = {budget: budget.since(now) for budget in self._all(None)}
        found = await self._store.balances(budgets)
        return [BudgetState(budget, found[budget], state_of(budget, found[budget])) for budget in budgets]

    async def look(self) -> None:
        """Take the balances into `last_seen`; none where the store does not tell them in time."""
        found: list[BudgetState] = []
        if self.budgets or self._key_limits():
            with suppress(TimeoutError, ManagerError):
                async with asyncio.timeout(_LOOK_S):
                    found = await self.balances()
        self.last_seen = tuple(found)

    async def recover(self, *, is_alone: bool) -> int:
        """Settle what a crash left open; return how many reservations that were.

        Args:
            is_alone: no other process has requests under way; else those stay that may still be.
        """
        now = self._utcnow()
        # The clock may have gone back since a reservation was made.
        before_us = _ANY_TIME_US if is_alone else _micros(now - timedelta(seconds=self._longest_s))
        count = await self._store.recover(_lost, before_us=before_us, at_us=_micros(now))
        if count:
            detail = f"{count} reservations of requests without an end were settled in full"
            self._journal.record("ledger_recovered", detail=detail)
        return count

    async def run(self) -> None:
        """Write closings, and settle what no process closes any more, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write_for_ever(), name="ledger")
            tasks.create_task(self._recover_for_ever(), name="ledger, what was left open")

    async def flush(self) -> bool:
        """Write the closings that wait; return whether all are stored."""
        async with self._writing:
            self._news.clear()
            for closing in tuple(self._unwritten.values()):
                try:
                    await self._store.close_reservation(closing, _micros(self._utcnow()))
                except ManagerError as error:
                    if self._trouble is None:
                        self._trouble = error.message
                        _log.warning("ledger_not_written", error=error.message)
                    return False
                self._unwritten.pop(closing.reservation, None)
            self._trouble = None
            return not self._unwritten

    async def close(self) -> None:
        """Write what waits. Nothing is reserved or written from now on; `hand_over` gives the rest away."""
        self._is_closed = True
        await self.flush()
        await self._store.close()

    def hand_over(self) -> bytes:
        """Return the closings that were not written, for `inherit` of the daemon that goes on."""
        closings, self._unwritten = tuple(self._unwritten.values()), {}
        return orjson.dumps([one._asdict() for one in closings])

    def inherit(self, encoded: bytes) -> None:
        """Take the closings of the daemon before this one."""
        with suppress(orjson.JSONDecodeError, TypeError):
            for values in orjson.loads(encoded):
                self.close_reservation(Closing(**values))

    def _all(self, key: str | None) -> Iterable[Budget]:
        """Return all budgets; of those that keys have themselves, that of `key`, or all where it is None."""
        limits = self._key_limits()
        names = limits if key is None else [key] if key in limits else []
        return dict.fromkeys([*self.budgets, *(key_budget(name, limits[name]) for name in names)])

    def _release_left(
        self, reservation: Reservation, done: asyncio.Future[dict[Budget, Balance] | Overdrawn]
    ) -> None:
        if not done.cancelled() and done.exception() is None and not isinstance(done.result(), Overdrawn):
            self.close_reservation(Closing(reservation.id, "released", 0))

    def _tell(self, budget: Budget, now: datetime, detail: str, *, is_hard: bool) -> None:
        """Record that a limit is reached, once a budget and period."""
        what = (is_hard, f"{budget.scope}/{budget.period}", budget.since(now))
        if what not in self._told:
            if len(self._told) >= _MOST_TOLD:
                self._told.clear()
            self._told.add(what)
            self._journal.record(
                "budget_hard" if is_hard else "budget_soft", reason=Reason.BUDGET_EXHAUSTED, detail=detail
            )

    async def _write_for_ever(self) -> None:
        while True:
            await self._news.wait()
            if not await self.flush():
                await asyncio.sleep(_RETRY_S)
                self._news.set()

    async def _recover_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_RECOVER_EVERY_S)
            with suppress(ManagerError):  # it is tried again
                await self.recover(is_alone=False)


def _lost(reservation: str, amount: int) -> Closing:
    return Closing(reservation, "recovered", amount)


def _micros(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000)
