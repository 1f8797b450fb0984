"""The history of requests: takes each one that has ended, and writes them in batches off the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import structlog

from manager.domain.history import Filters
from manager.errors import ManagerError
from manager.services.finishing import finish

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from datetime import datetime

    from manager.domain.history import Ended
    from manager.services.ports import RequestStore

_log = structlog.get_logger("history")

BATCH = 500
EVERY_S = 1.0
# Requests that wait to be written. Beyond it a request is counted and forgotten.
MOST_WAITING = 10_000
# The last requests that ended, for the live channel.
MOST_RECENT = 50
# Batches of the daemon before this one.
MOST_INHERITED = 2 * MOST_WAITING // BATCH
_RETRY_S = 2.0
_PRUNE_EVERY_S = 60.0
_PRUNE_STEP = 500
# SQLite's lock is not fair: without a pause other writers could wait until they give up.
_PRUNE_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Retention:
    """The bounds of what is kept: days, and rows. No days: no request is kept, only what all have used."""

    retention_days: int
    max_rows: int
    usage_days: int = 400


class History:
    """Owns the requests that have ended and are not stored yet. Lives on the event loop.

    A request is lost, and counted in `dropped`, where `MOST_WAITING` others wait: the disk is full, the
    registry cannot be written, or more requests end than can be written. No request waits for the history.
    A process that is killed loses what ended since the last batch, which is `EVERY_S` old at most and then
    being written. A daemon that was replaced gives what ends afterwards to the next one.

    Args:
        store: keeps the requests.
        retention: can be replaced at any time.
        utcnow: the wall clock.

    Attributes:
        recent: the requests that ended last, oldest first; those of an earlier daemon as stored (`seed`).
    """

    def __init__(self, store: RequestStore, *, retention: Retention, utcnow: Callable[[], datetime]) -> None:
        self.store = store
        self.retention = retention
        self._utcnow = utcnow
        self._waiting: deque[Ended] = deque()
        self._inherited: deque[bytes] = deque()
        self.recent: deque[Ended | Mapping[str, Any]] = deque(maxlen=MOST_RECENT)
        self._news = asyncio.Event()
        self._full = asyncio.Event()
        self._writing = asyncio.Lock()
        self._trouble: str | None = None
        self._is_closed = False
        self._dropped_before = 0
        self.stored = 0
        self.dropped = 0

    @property
    def waiting(self) -> int:
        """Requests that are not written yet."""
        return len(self._waiting)

    def add(self, ended: Ended) -> None:
        """Take a request that has ended. Waits for nothing."""
        self.recent.append(ended)
        waiting = self._waiting
        count = len(waiting)
        if count >= MOST_WAITING:
            self._drop()
            return
        waiting.append(ended)
        if not count:
            self._news.set()
        elif count == BATCH - 1:
            self._full.set()

    async def seed(self) -> None:
        """Have `recent` begin with the requests that are stored. Without them it begins empty."""
        with suppress(ManagerError):  # the first batch says so
            page = await self.store.last(Filters(), MOST_RECENT)
            self.recent.extendleft(values for _, values in page.items)

    async def run(self) -> None:
        """Write what has ended, and forget what is too old, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write_for_ever(), name="history")
            tasks.create_task(self._prune_for_ever(), name="history, what is too old")

    async def _write_for_ever(self) -> None:
        while True:
            await self._news.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    await self._full.wait()
            await self.flush()
            if self._trouble is not None:
                await asyncio.sleep(_RETRY_S)

    async def flush(self) -> None:
        """Write what waits now. A batch that cannot be written stays, and is tried again.

        A cancelled flush still ends the write of its batch: no request is lost or doubled.
        """
        async with self._writing:
            if self._is_closed:
                return
            self._news.clear()
            self._full.clear()
            left = len(self._waiting)
            keeps = bool(self.retention.retention_days)
            while self._inherited and await self._written(
                self.store.add_encoded(self._inherited[0], keeps=keeps)
            ):
                self._inherited.popleft()
            while left > 0 and (batch := tuple(islice(self._waiting, BATCH))):
                left -= len(batch)
                if not await self._written(self.store.add(batch, keeps=keeps), batch):
                    break
            if self._waiting or self._inherited:
                self._news.set()
            if len(self._waiting) >= BATCH:
                self._full.set()

    async def close(self) -> None:
        """Write what waits; nothing is written from now on. What ends later is for `hand_over`."""
        await self.flush()
        if self._waiting and not self._is_closed:
            _log.warning("requests_not_stored", count=len(self._waiting), error=self._trouble)
        self._is_closed = True

    async def hand_over(self, take: Callable[[bytes], bool]) -> None:
        """Give what was not written to the daemon that goes on; what it does not take is lost and counted."""
        await self.close()
        lost = 0
        while self._inherited:
            take(self._inherited.popleft())
        while self._waiting:
            batch = tuple(self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting))))
            if not take(await self.store.encoded(batch)):
                self.dropped += len(batch)
                lost += len(batch)
        if lost:
            _log.warning("requests_not_stored", count=lost, error="the daemon ends")

    def inherit(self, encoded: bytes) -> None:
        """Take a batch that the daemon before this one could not write. It has no more than are taken."""
        if len(self._inherited) < MOST_INHERITED:
            self._inherited.append(encoded)
            self._news.set()

    def _drop(self) -> None:
        self.dropped += 1
        if self._trouble is None:
            self._say_trouble("more requests end than can be written")

    async def _written(self, write: Coroutine[None, None, None], batch: Sequence[Ended] = ()) -> bool:
        """Write; return whether that was possible. A cancelled write comes to its end first."""
        return await finish(self._write(write, batch))

    async def _write(self, write: Coroutine[None, None, None], batch: Sequence[Ended]) -> bool:
        try:
            await write
        except ManagerError as error:
            if self._trouble is None:
                self._say_trouble(error.message)
            return False
        except Exception as error:  # noqa: BLE001  (a defect: the others are stored, and the daemon goes on)
            _log.error("requests_not_stored", count=len(batch), exc_info=error)
            self.dropped += len(batch)
            self._forget(batch)
            return True
        self.stored += len(batch)
        self._forget(batch)
        if self._trouble is not None:
            self._trouble = None
            _log.info("requests_stored_again", lost=self.dropped - self._dropped_before)
        return True

    def _forget(self, batch: Sequence[Ended]) -> None:
        for _ in batch:
            self._waiting.popleft()

    def _say_trouble(self, why: str) -> None:
        """Log once, until requests are stored again."""
        self._trouble = why
        self._dropped_before = self.dropped
        _log.warning(
            "requests_not_stored", error=why, hint=f"beyond {MOST_WAITING} of them the history has a gap"
        )

    async def _prune_for_ever(self) -> None:
        while True:
            await self.prune()
            await asyncio.sleep(_PRUNE_EVERY_S)

    async def prune(self) -> None:
        """Forget what is too old or too much, in small steps: writes of others go in between."""
        kept, now = self.retention, self._utcnow()
        before = now - timedelta(days=kept.retention_days)
        with suppress(ManagerError):  # the next batch says so, or the next look
            more = True
            while more:
                more = await self.store.prune(before, most_rows=kept.max_rows, at_most=_PRUNE_STEP)
                await asyncio.sleep(_PRUNE_PAUSE_S if more else 0)
            await self.store.forget_usage(now_s=int(now.timestamp()), days=kept.usage_days)
