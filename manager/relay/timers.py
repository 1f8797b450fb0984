"""One coarse timer that checks the deadlines of many objects."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import structlog

if TYPE_CHECKING:
    import asyncio

_log = structlog.get_logger("relay")

TICK_S = 0.25


class Timed(Protocol):
    def check(self, now: float) -> None:
        """Called once a tick; `now` is monotonic."""


T = TypeVar("T", bound=Timed)


class Timers(Generic[T]):
    """One timer for all: a look at each costs less than to set and cancel a timer of its own.

    It ticks only while there is something to look at.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, tick_s: float = TICK_S) -> None:
        self._loop = loop
        self._tick_s = tick_s
        self.timed: set[T] = set()
        self._handle: asyncio.TimerHandle | None = None

    def add(self, timed: T) -> None:
        self.timed.add(timed)
        if self._handle is None:
            self._handle = self._loop.call_later(self._tick_s, self._tick)

    def discard(self, timed: T) -> None:
        self.timed.discard(timed)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _tick(self) -> None:
        now = monotonic()
        for timed in tuple(self.timed):
            try:
                timed.check(now)
            except Exception as error:  # noqa: BLE001  (a defect must not stop the others' deadlines)
                _log.error("deadline_failed", exc_info=error)
        self._handle = self._loop.call_later(self._tick_s, self._tick) if self.timed else None
