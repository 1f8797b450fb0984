"""The live channel: the latest value of each section, for subscribers that follow its changes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from manager.errors import Reason, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

_RETRY_S = 10.0


class Section(NamedTuple):
    """One section as it is now.

    Attributes:
        key: is compared with the last one: the section has changed where they differ. Clocks stay out of it.
        build: returns the value, which JSON can say. It is called only for a frame that has the section.
    """

    key: object
    build: Callable[[], object]


class Frame(NamedTuple):
    """Sections at one moment.

    Attributes:
        revision: grows with each change of any section.
        sections: the values by name: all of them in a first frame, later the changed ones. Subscribers that
            read in the same tick share the values, and the frame where they miss the same changes.
    """

    revision: int
    sections: Mapping[str, object]


class _Latest:
    """A section since its last change. The value is built at most once a tick."""

    __slots__ = ("_build", "_tick", "_value", "key", "revision")

    def __init__(self, section: Section, revision: int) -> None:
        self.key = section.key
        self.revision = revision
        self._build = section.build
        self._tick: int | None = None
        self._value: object = None

    def renew(self, build: Callable[[], object]) -> None:
        """Take a newer value, which differs in its clocks at most."""
        self._build = build

    def value(self, tick: int) -> object:
        if self._tick != tick:
            self._value, self._tick = self._build(), tick
        return self._value


class Live:
    """Owns the latest value of each section, and compares at common ticks. Lives on the event loop.

    There is no task: the first subscriber that wakes in a tick reads, and the others share that reading.
    Without subscribers nothing is read. A subscriber has no queue: a slow one skips values, and continues
    with the latest.

    Args:
        read: returns every section, always the same ones. Errors reach the subscriber that reads.
        now: seconds on a monotonic clock.
        interval_s: the length of a tick, by which a change is late at most.
        most_subscribers: one more is refused.
    """

    def __init__(
        self,
        read: Callable[[], Mapping[str, Section]],
        *,
        now: Callable[[], float],
        interval_s: float = 0.5,
        most_subscribers: int = 256,
    ) -> None:
        self._read = read
        self._now = now
        self._interval_s = interval_s
        self._most_subscribers = most_subscribers
        self._latest: dict[str, _Latest] = {}
        self._revision = 0
        self._read_in: int | None = None
        # The frames of this tick, by the revision of the subscriber: one for each subscriber at most.
        self._frames: dict[int, Frame] = {}
        self.subscribers = 0

    def current(self) -> Frame:
        """Return all sections, as read in this tick."""
        return self._since(0, self._tick())

    async def follow(self, *, idle_s: float | None = None) -> AsyncGenerator[Frame, None]:
        """Yield a frame with all sections at once, then one with the changed sections, without an end.

        Close it to leave (`aclose`): a subscriber that is only forgotten leaves with the next collection.

        Args:
            idle_s: also yield a frame without sections where nothing has changed for so long.

        Raises:
            UnavailableError: there are `most_subscribers` already.
        """
        if self.subscribers >= self._most_subscribers:
            raise UnavailableError(
                f"{self.subscribers} clients follow the live channel; expected at most"
                f" {self._most_subscribers}",
                reason=Reason.OVERLOADED,
                retry_after_s=_RETRY_S,
            )
        self.subscribers += 1
        try:
            tick = self._tick()
            frame = self._since(0, tick)
            while True:
                yield frame
                yielded_at = self._now()
                while True:
                    tick = await self._next(tick)
                    frame = self._since(frame.revision, tick)
                    if frame.sections or (idle_s is not None and self._now() - yielded_at >= idle_s):
                        break
        finally:
            self.subscribers -= 1

    def _tick(self) -> int:
        return int(self._now() // self._interval_s)

    async def _next(self, tick: int) -> int:
        """Wait until the tick is over, and return the one that it is then."""
        left_s = (tick + 1) * self._interval_s - self._now()
        while left_s > 0:  # a timer may fire early
            await asyncio.sleep(left_s)
            left_s = (tick + 1) * self._interval_s - self._now()
        return max(tick + 1, self._tick())

    def _since(self, revision: int, tick: int) -> Frame:
        """Return the sections that have changed after a revision."""
        if self._read_in != tick:
            self._compare(self._read())
            self._read_in = tick
            self._frames.clear()
        frame = self._frames.get(revision)
        if frame is None:
            changed = [one for one in self._latest.items() if one[1].revision > revision]
            frame = Frame(self._revision, {name: latest.value(tick) for name, latest in changed})
            self._frames[revision] = frame
        return frame

    def _compare(self, sections: Mapping[str, Section]) -> None:
        revision = self._revision + 1
        for name, section in sections.items():
            latest = self._latest.get(name)
            if latest is None or latest.key != section.key:
                self._latest[name] = _Latest(section, revision)
                self._revision = revision
            else:
                latest.renew(section.build)
