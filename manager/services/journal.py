"""Events, in order: logged once, kept in the registry, followed live by subscribers."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from manager.domain.registry import Event
from manager.errors import RegistryUnwritableError
from manager.services.finishing import finish

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from datetime import datetime

    from manager.errors import Reason
    from manager.services.ports import Registry

_log = structlog.get_logger("events")

_IN_MEMORY = 1000
_PAGE = 500
_RETRY_S = 1.0
# The problems that are kept at hand, and how far back they are looked for at the beginning.
_PROBLEMS = 16
_PROBLEMS_WITHIN = 500
# How long it may stay unseen that the registry's files were deleted or replaced.
_LOOK_S = 2.0


class Journal:
    """Owns the numbering of events. `record` never blocks: storing happens in `run`, in batches.

    Attributes:
        problems: the last events with a reason, the oldest first; at most `_PROBLEMS`.
    """

    def __init__(self, registry: Registry, *, last_id: int, utcnow: Callable[[], datetime]) -> None:
        self._registry = registry
        self._last_id = last_id
        self._utcnow = utcnow
        self._recent: deque[Event] = deque(maxlen=_IN_MEMORY)
        self._unsaved: list[Event] = []
        self.problems: deque[Event] = deque(maxlen=_PROBLEMS)
        self._news = asyncio.Event()
        self._storing = asyncio.Lock()
        self.trouble: str | None = None
        self._is_retired = False

    async def load(self) -> None:
        """Read the last problems that earlier runs have stored."""
        events = await self._registry.events_after(self._last_id - _PROBLEMS_WITHIN, _PROBLEMS_WITHIN)
        self.problems.extend(event for event in events if event.reason is not None)

    async def retire(self) -> None:
        """Store what waits, and number nothing from now on: another daemon goes on with the events."""
        self._is_retired = True
        await self.flush()

    @property
    def last_id(self) -> int:
        return self._last_id

    def record(
        self, kind: str, *, instance: str | None = None, reason: Reason | None = None, detail: str = ""
    ) -> None:
        said = {"instance": instance, "reason": reason and reason.value, "detail": detail}
        log = _log.info if reason is None else _log.warning
        log(kind, **{key: value for key, value in said.items() if value})
        if self._is_retired:
            return
        self._last_id += 1
        event = Event(
            id=self._last_id, at=self._utcnow(), instance=instance, kind=kind, reason=reason, detail=detail
        )
        self._recent.append(event)
        if reason is not None:
            self.problems.append(event)
        self._unsaved.append(event)
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self, after_id: int) -> AsyncIterator[Event]:
        """Every event after `after_id`, stored ones first, then live ones, without an end."""
        after_id = min(after_id, self._last_id)  # an id of the future belongs to another registry
        while True:
            news = self._news
            in_memory_from = self._recent[0].id if self._recent else self._last_id + 1
            page: tuple[Event, ...] = ()
            if after_id < in_memory_from - 1:
                page = await self._registry.events_after(after_id, _PAGE)
            # What was dropped from the registry in the meantime is gone: go on with what there is.
            for event in page or tuple(event for event in self._recent if event.id > after_id):
                yield event
                after_id = event.id
            if after_id >= self._last_id or not (page or self._recent):
                await news.wait()

    async def run(self) -> None:
        """Store what was recorded, until cancelled; then store the rest."""
        try:
            while True:
                news = self._news
                await self.flush()
                await self._look()
                if self.trouble is not None:
                    await asyncio.sleep(_RETRY_S)
                elif not self._unsaved:
                    with suppress(TimeoutError):
                        # Not wait_for: until Python 3.12 it swallows a cancellation that comes with the news.
                        async with asyncio.timeout(_LOOK_S):
                            await news.wait()
        finally:
            await self.flush()

    async def _look(self) -> None:
        """Find out that nothing can be written before anything has to be."""
        if self._unsaved:
            return  # the last write says more
        try:
            await self._registry.check()
        except RegistryUnwritableError as error:
            if self.trouble != error.message:
                _log.warning("registry_unwritable", error=error.message)
            self.trouble = error.message
        else:
            self.trouble = None

    async def flush(self) -> None:
        """Store what waits. A cancelled flush still ends its write: no batch is lost or doubled."""
        async with self._storing:
            batch, self._unsaved = self._unsaved, []
            if batch:
                await finish(self._write(batch))

    async def _write(self, batch: list[Event]) -> None:
        try:
            await self._registry.append_events(batch)
            self.trouble = None
        except RegistryUnwritableError as error:
            # The events stay visible in memory, and are tried again; a full disk must not stop the daemon.
            self._unsaved = [*batch, *self._unsaved][-_IN_MEMORY:]
            self.trouble = error.message
            _log.warning("events_not_stored", count=len(batch), error=error.message)
