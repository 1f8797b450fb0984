"""The last use of each model, and what requests have used of it lately."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from manager.domain.models import model_key
from manager.domain.usage import HOUR_S, sample_of
from manager.errors import ManagerError

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.domain.history import Ended
    from manager.services.ports import RequestStore

# "Lately" is this many whole hours and the present one.
LATELY_HOURS = 24
_MOST_MODELS = 4096


class ModelUse(NamedTuple):
    """The use of one model; tokens are those that servers have counted.

    Attributes:
        last_s: the end of the last request, in Unix seconds: exact where this daemon saw it, else its hour.
        requests: those of the last `LATELY_HOURS`.
    """

    last_s: int
    requests: int
    input_tokens: int
    output_tokens: int


@dataclass(slots=True)
class _Kept:
    last_s: int = 0
    # By the beginning of each hour: requests, input tokens, output tokens.
    hours: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def add(self, at_s: int, requests: int, input_tokens: int, output_tokens: int) -> None:
        begins = at_s - at_s % HOUR_S
        before = self.hours.get(begins, (0, 0, 0))
        self.hours[begins] = (
            before[0] + requests,
            before[1] + input_tokens,
            before[2] + output_tokens,
        )
        self.last_s = max(self.last_s, at_s)


class ModelUses:
    """Owns the use of each model, of `_MOST_MODELS` at most. Only requests that went to an instance count.

    Args:
        add: takes each request that has ended, before it is counted here.
        now_s: the wall clock in Unix seconds.
    """

    def __init__(self, add: Callable[[Ended], None], *, now_s: Callable[[], float]) -> None:
        self._add = add
        self._now_s = now_s
        self._kept: dict[str, _Kept] = {}
        self.version = 0  # grows with each request

    async def seed(self, store: RequestStore) -> None:
        """Begin with what is stored. Without it nothing is known of earlier daemons."""
        with suppress(ManagerError):
            last, lately = await store.model_use(since_s=self._since_s())
            for model, begins in last:
                if (kept := self._of(model_key(model))) is not None:
                    kept.last_s = max(kept.last_s, begins)
            for begins, model, *counts in lately:
                if (kept := self._of(model_key(model))) is not None:
                    kept.add(begins, *counts)

    def keep(self, ended: Ended) -> None:
        """Take a request that has ended. Waits for nothing."""
        self._add(ended)
        record = ended.record
        if record.kind is None or not record.model or not record.effective_target:
            return
        sample = sample_of(record)
        kept = self._of(model_key(record.model))
        if sample is not None and kept is not None:
            kept.add(sample.ended_s, 1, sample.sums.input_tokens, sample.sums.output_tokens)
            self.version += 1

    def of(self, key: str) -> ModelUse | None:
        """Return the use of a model by its key; None where it is not known to have been used."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        since = self._since_s()
        if kept.hours and min(kept.hours) < since:
            kept.hours = {begins: counts for begins, counts in kept.hours.items() if begins >= since}
        counts = kept.hours.values()
        return ModelUse(
            kept.last_s,
            sum(one[0] for one in counts),
            sum(one[1] for one in counts),
            sum(one[2] for one in counts),
        )

    def _since_s(self) -> int:
        now = int(self._now_s())
        return now - now % HOUR_S - LATELY_HOURS * HOUR_S

    def _of(self, key: str) -> _Kept | None:
        kept = self._kept.get(key)
        if kept is None and len(self._kept) < _MOST_MODELS:
            kept = self._kept[key] = _Kept()
        return kept
