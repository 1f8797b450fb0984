"""Quotas: the requests of each key in flight and a minute, and its tokens of a day."""

from __future__ import annotations

import math
from collections import deque
from datetime import UTC, datetime, time, timedelta
from typing import TYPE_CHECKING, NamedTuple

from manager.domain.usage import DAY_S, Span
from manager.services.ports import KeyUse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from datetime import date

    from manager.domain.keys import Grant
    from manager.domain.record import RequestRecord
    from manager.services.ports import RequestStore

# Keys whose use is kept in memory; more than there can be at the same time. At the bound the idle ones go.
MOST_USES = 2000
_MINUTE_S = 60
# Requests are counted by tenth of a second: a key takes the same memory however many it may send. A tenth
# counts until all of it is a minute ago, so that no minute has more requests than the limit.
_SLICES_A_SECOND = 10
_SLICES = _MINUTE_S * _SLICES_A_SECOND
_RETRY_S = 1.0


class Exceeded(NamedTuple):
    """The limit of a key that a request is beyond, in words, and when another one is worth a try."""

    message: str
    retry_after_s: float


class _Use:
    """The use of one key."""

    __slots__ = ("begun", "day", "in_flight", "is_told", "minute", "tokens")

    def __init__(self, day: date) -> None:
        self.in_flight = 0
        # Slices that are not over, each with its number of requests, and the sum of those.
        self.begun: deque[list[int]] = deque()
        self.minute = 0
        self.day = day
        self.tokens = 0
        # Its key has a limit that counts at all gateways.
        self.is_told = False

    def forget_before(self, slice_: int) -> None:
        """Forget the requests that began more than a minute ago."""
        while self.begun and self.begun[0][0] < slice_ - _SLICES:
            self.minute -= self.begun.popleft()[1]

    def count(self, slice_: int) -> None:
        if not self.begun or self.begun[-1][0] != slice_:
            self.begun.append([slice_, 0])
        self.begun[-1][1] += 1
        self.minute += 1


class Place:
    """One request in flight. `leave` counts once however often it is called."""

    __slots__ = ("_quotas", "_use")

    def __init__(self, quotas: Quotas, use: _Use) -> None:
        self._quotas = quotas
        self._use: _Use | None = use

    def leave(self, record: RequestRecord) -> None:
        """Count the request as ended, and the tokens of its record."""
        use, self._use = self._use, None
        if use is not None:
            use.in_flight -= 1
            self._quotas.spent(use, (record.input_tokens or 0) + (record.output_tokens or 0))


class Quotas:
    """Owns the use of keys. Lives on the event loop; nothing waits.

    Requests in flight and of the last minute are those of this process, and begin at zero. The tokens of the
    day are those of requests that have ended: what is in flight when the limit is reached comes to its end.

    Where gateways share a database, the minute and the day have the use at all of them, as it was told last
    (`own_uses`, `take_others`). Of a key that is used at several gateways at once, those can admit more than
    the limit: what the others have admitted since then. Requests in flight are those of this gateway alone.

    Args:
        now: seconds on a monotonic clock.
        utcnow: the wall clock, which tells the day.
    """

    def __init__(self, *, now: Callable[[], float], utcnow: Callable[[], datetime]) -> None:
        self._now = now
        self._utcnow = utcnow
        self._uses: dict[str, _Use] = {}
        self._others: dict[str, list[KeyUse]] = {}
        # By gateway and key: the number of its last row, and when it was seen first.
        self._seen: dict[tuple[str, str], tuple[int, float]] = {}
        self._told: dict[str, KeyUse] = {}
        self._taken_at = -math.inf

    async def load(self, store: RequestStore, names: Iterable[str]) -> None:
        """Read the tokens of the day from the history; once, before requests are served.

        Args:
            store: of the requests.
            names: the keys with a limit.

        Raises:
            UnavailableError: the history cannot be read.
        """
        limited = frozenset(names)
        if not limited:
            return
        now = self._utcnow()
        begins = int(_midnight(now).timestamp())
        found, _ = await store.usage(Span(begins, begins + DAY_S), ("key",), now_s=int(now.timestamp()))
        for (name,), sums in found.items():
            if name in limited:
                use = self._use(name)
                use.tokens, use.is_told = sums.input_tokens + sums.output_tokens, True

    def enter(self, grant: Grant) -> Place | Exceeded | None:
        """Begin a request; None where its key has no such limits. A refused one counts for nothing."""
        concurrency, rpm, most_tokens = grant.concurrency, grant.rpm, grant.tokens_per_day
        if concurrency is rpm is most_tokens is None:
            return None
        use, who = self._use(grant.name), f"the key {grant.name!r}"
        if concurrency is not None and use.in_flight >= concurrency:
            return Exceeded(f"{who} is at its concurrency of {concurrency}", _RETRY_S)
        others = self._others.get(grant.name, ())
        if most_tokens is not None:
            day = use.day.isoformat()
            tokens = use.tokens + sum(one.tokens for one in others if one.day == day)
            if tokens >= most_tokens:
                message = f"{who} has used {tokens} tokens today (UTC); its tokens_per_day are {most_tokens}"
                return Exceeded(message, self._to_midnight_s())
        use.is_told = use.is_told or rpm is not None or most_tokens is not None
        if rpm is not None:
            now = self._now()
            slice_ = math.floor(now * _SLICES_A_SECOND)
            use.forget_before(slice_)
            elsewhere = sum(one.minute for one in others) if now < self._taken_at + _MINUTE_S else 0
            if use.minute + elsewhere >= rpm:
                # When the use elsewhere ends is not known here.
                begun = use.begun[0][0] if use.begun else slice_ - _SLICES
                free_at = (begun + _SLICES + 1) / _SLICES_A_SECOND
                return Exceeded(f"{who} is at its rpm of {rpm}", max(1, math.ceil(free_at - now)))
            use.count(slice_)
        use.in_flight += 1
        return Place(self, use)

    def own_uses(self) -> dict[str, KeyUse]:
        """Return the use of keys at this gateway that the others are to know now.

        A minute that has requests is told each time: by that the others see that it is not of a gateway that
        has ended.
        """
        slice_ = math.floor(self._now() * _SLICES_A_SECOND)
        found: dict[str, KeyUse] = {}
        for name, use in self._uses.items():
            if use.is_told:
                self._begin_day(use)
                use.forget_before(slice_)
                found[name] = KeyUse(use.minute, use.day.isoformat(), use.tokens)
        return {name: one for name, one in found.items() if one.minute or self._told.get(name) != one}

    def was_told(self, uses: Mapping[str, KeyUse]) -> None:
        """Note that the others can know these."""
        self._told = {name: one for name, one in {**self._told, **uses}.items() if name in self._uses}

    def take_others(self, uses: Mapping[tuple[str, str], tuple[int, KeyUse]]) -> None:
        """Take over the use of keys at other gateways: by gateway and key, with a number that grows."""
        now = self._taken_at = self._now()
        seen = {at: (number, now) for at, (number, _) in uses.items()}
        self._seen = {
            at: self._seen[at] if at in self._seen and self._seen[at][0] == one[0] else one
            for at, one in seen.items()
        }
        others: dict[str, list[KeyUse]] = {}
        for at, (_, use) in uses.items():
            is_over = now - self._seen[at][1] > _MINUTE_S
            others.setdefault(at[1], []).append(use._replace(minute=0) if is_over else use)
        self._others = others

    def in_flight(self, name: str) -> int:
        """Return the requests of a key that have begun and not ended."""
        use = self._uses.get(name)
        return 0 if use is None else use.in_flight

    def spent(self, use: _Use, tokens: int) -> None:
        """Add the tokens of a request that has ended now."""
        self._begin_day(use)
        use.tokens += tokens

    def _use(self, name: str) -> _Use:
        use = self._uses.get(name)
        if use is None:
            if len(self._uses) >= MOST_USES:
                self._drop_idle()
            use = self._uses[name] = _Use(self._utcnow().date())
        else:
            self._begin_day(use)
        return use

    def _begin_day(self, use: _Use) -> None:
        today = self._utcnow().date()
        if use.day != today:
            use.day, use.tokens = today, 0

    def _drop_idle(self) -> None:
        slice_, today = math.floor(self._now() * _SLICES_A_SECOND), self._utcnow().date()
        idle = {name: use for name, use in self._uses.items() if not use.in_flight}
        for name, use in idle.items():
            use.forget_before(slice_)
            if not use.minute and (use.day != today or not use.tokens):
                del self._uses[name]
        for name in idle:  # names that were given to so many keys today that most of them are gone
            if len(self._uses) < MOST_USES:
                break
            self._uses.pop(name, None)

    def _to_midnight_s(self) -> float:
        now = self._utcnow()
        return max(1, math.ceil((_midnight(now) + timedelta(days=1) - now).total_seconds()))


def _midnight(now: datetime) -> datetime:
    return datetime.combine(now.astimezone(UTC).date(), time(), UTC)
