"""The history of the cards: the last hour by 5 seconds, the last day by minutes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import structlog

from manager.domain.gpu_history import CardMinute, Window, mean, sample_of
from manager.errors import RegistryUnwritableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from manager.domain.gpu_history import Columns, Sample
    from manager.services.gpus.gpus import Gpus
    from manager.services.ports import Registry

_log = structlog.get_logger("gpu_history")

_MINUTE_S: Final = 60
STEP_S: Final = 5
# A reading that is older than that is no sample of this step.
_FRESH_S: Final = 4.0
_HOUR_S: Final = 3600
_DAY_S: Final = 24 * _HOUR_S
# Slices that are made and removed again have a new UUID each time.
MOST_CARDS: Final = 64
# Steps of one minute, and some more where the clock is set back.
_MOST_SAMPLES: Final = 24
# Minutes go to the registry together. Those that it does not take are kept for an hour.
_BATCH: Final = 5
_MOST_WAITING: Final = 60
_STORED_S: Final = 26 * _HOUR_S


class Span(StrEnum):
    """The time that a history goes back."""

    HOUR = "1h"
    DAY = "24h"

    @property
    def seconds(self) -> int:
        return _HOUR_S if self is Span.HOUR else _DAY_S

    @property
    def step_s(self) -> int:
        return STEP_S if self is Span.HOUR else _MINUTE_S


@dataclass(frozen=True, slots=True)
class CardHistory:
    """The samples of one card; `total_bytes` is the memory that it had last, None if unknown."""

    uuid: str
    name: str
    total_bytes: int | None
    columns: Columns


def _window(span: Span) -> Window:
    return Window(span.step_s, span.seconds // span.step_s)


@dataclass(slots=True)
class _Card:
    name: str
    total_bytes: int | None = None
    seen_s: float = 0.0
    windows: dict[Span, Window] = field(default_factory=lambda: {span: _window(span) for span in Span})
    samples: list[Sample] = field(default_factory=list)  # of this minute


class GpuHistory:
    """Owns the samples of the cards. Lives on the event loop.

    A sample is taken every `STEP_S` seconds. Nothing is filled in where the cards could not be read. At the
    end of a minute the mean of its samples is one sample of the day; the registry gets five of them at a
    time, so that a crash loses as much. The samples of the last hour end with the process.

    At most `MOST_CARDS` cards are remembered, of 0.15 MB each, and 0.5 MB with very many processes.

    Args:
        gpus: the cards.
        registry: keeps the minutes of the last 26 hours.
        now: monotonic seconds.
        utcnow: the wall clock.
    """

    def __init__(
        self, gpus: Gpus, registry: Registry, *, now: Callable[[], float], utcnow: Callable[[], datetime]
    ) -> None:
        self._gpus = gpus
        self._registry = registry
        self._now = now
        self._utcnow = utcnow
        self._cards: dict[str, _Card] = {}
        self._minute: int | None = None
        self._waiting: dict[int, tuple[CardMinute, ...]] = {}
        self._taken = {Span.HOUR: 0, Span.DAY: 0}
        self._trouble: str | None = None

    async def load(self) -> None:
        """Read the minutes of the last day that earlier runs have stored."""
        now_s = int(self._utcnow().timestamp())
        for begins, cards in (await self._registry.gpu_minutes(now_s - _DAY_S)).items():
            if begins <= now_s:
                self._take_minute(begins, cards)

    async def run(self) -> None:
        """Take samples until cancelled."""
        while True:
            await asyncio.sleep(STEP_S - self._utcnow().timestamp() % STEP_S)
            if self._now() - self._gpus.read_at > _FRESH_S:  # the cards are watched at longer intervals
                await self._gpus.refresh()
            self.take()
            if len(self._waiting) >= _BATCH:
                await self.flush()

    def take(self) -> None:
        """Take a sample of each card from the last reading."""
        at_s = self._utcnow().timestamp()
        minute = int(at_s // _MINUTE_S)
        if self._minute is not None and minute != self._minute:
            self._end_minute(self._minute)
        self._minute = minute
        for gpu in self._gpus.snapshot.gpus:
            sample = sample_of(gpu, self._gpus.holders(gpu))
            if sample is None:
                continue
            card = self._card(gpu.uuid, gpu.name, at_s)
            if card is None:
                continue
            card.total_bytes = card.total_bytes if gpu.vram_total_bytes is None else gpu.vram_total_bytes
            card.windows[Span.HOUR].add(at_s, sample)
            if len(card.samples) < _MOST_SAMPLES:
                card.samples.append(sample)
        self._taken[Span.HOUR] += 1

    def version(self, span: Span) -> int:
        """Return a number that grows with each sample."""
        return self._taken[span]

    def cards(self, span: Span, uuid: str | None = None) -> list[CardHistory]:
        """Return copies of what is known of the cards that were read in a span, or of one.

        The cards come in the order of the last reading; those that are not in it come last.
        """
        until_s = self._utcnow().timestamp() - span.step_s  # the step that has begun may have no sample yet
        present = [gpu.uuid for gpu in self._gpus.snapshot.gpus if gpu.uuid in self._cards]
        order = [uuid] if uuid is not None else dict.fromkeys([*present, *self._cards])
        found = []
        for one in order:
            card = self._cards.get(one)
            columns = None if card is None else card.windows[span].columns(until_s)
            if card is not None and columns is not None:
                found.append(CardHistory(one, card.name, card.total_bytes, columns))
        return found

    def has(self, uuid: str) -> bool:
        """Return whether a card is there, or was within the last day."""
        return uuid in self._cards or self._gpus.gpu(uuid) is not None

    async def flush(self) -> None:
        """Store the minutes that wait. Those that cannot be stored are kept, and tried again."""
        batch = dict(self._waiting)
        if not batch:
            return
        before_s = int(self._utcnow().timestamp()) - _STORED_S
        try:
            await self._registry.save_gpu_minutes(batch, before_s)
        except RegistryUnwritableError as error:
            if self._trouble is None:
                self._trouble = error.message
                _log.warning("gpu_history_not_stored", error=error.message)
            return
        self._trouble = None
        for begins, cards in batch.items():
            if self._waiting.get(begins) is cards:
                del self._waiting[begins]

    async def close(self) -> None:
        """Store what was read, the begun minute too."""
        if self._minute is not None:
            self._end_minute(self._minute)
            self._minute = None
        await self.flush()

    # --- helpers ---

    def _end_minute(self, minute: int) -> None:
        begins, cards = minute * _MINUTE_S, []
        for uuid, card in self._cards.items():
            if card.samples:
                cards.append(CardMinute(uuid, card.name, card.total_bytes, mean(card.samples)))
                card.samples = []
        self._take_minute(begins, cards)
        if cards:
            self._waiting[begins] = tuple(cards)
        while len(self._waiting) > _MOST_WAITING:
            del self._waiting[next(iter(self._waiting))]

    def _take_minute(self, begins: int, cards: list[CardMinute] | tuple[CardMinute, ...]) -> None:
        for one in cards:
            card = self._card(one.uuid, one.name, begins)
            if card is not None:
                card.total_bytes = card.total_bytes if one.total_bytes is None else one.total_bytes
                card.windows[Span.DAY].add(begins, one.sample)
        self._taken[Span.DAY] += 1
        for uuid in [uuid for uuid, card in self._cards.items() if begins - card.seen_s > _DAY_S]:
            del self._cards[uuid]

    def _card(self, uuid: str, name: str, at_s: float) -> _Card | None:
        """Return what is known of a card; None where as many others were read at the same time."""
        card = self._cards.get(uuid)
        if card is None:
            if len(self._cards) >= MOST_CARDS:
                oldest = min(self._cards, key=lambda one: self._cards[one].seen_s)
                if self._cards[oldest].seen_s >= at_s:
                    return None
                del self._cards[oldest]
            card = self._cards[uuid] = _Card(name)
        card.name, card.seen_s = name, max(card.seen_s, at_s)
        return card
