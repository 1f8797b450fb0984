"""Deadlines of a client connection: one phase at a time, each with a limit. No I/O and no clock here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Phase(Enum):
    """The phases of a connection: what it waits for."""

    HEAD = auto()
    """The client's first request, or the rest of a head that has begun."""
    BODY = auto()
    """The rest of a request body."""
    ANSWERING = auto()
    """Us. A quiet stream of events is in this phase, too."""
    SURPLUS = auto()
    """The rest of a body whose request has been answered."""
    UNREAD = auto()
    """A client that has to read what was written."""
    IDLE = auto()
    """The next request."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Limits of the phases in seconds. All of them are late by up to one tick.

    The limit of `IDLE` is uvicorn's keep-alive setting, that of `UNREAD` the gateway's idle time-out.
    `ANSWERING` has none: a request has deadlines of its own, and a stream of events may be quiet for days.

    Attributes:
        head_s: from the first byte of a head to its end; for the first head, from the connection on.
        body_s: for the next `LEAST_PROGRESS_BYTES` of a body, and for the whole rest of an answered request.
        probe_after_s: TCP asks whether the peer is still there once an answer has taken so long.
        tick_s: pause between two looks at a connection.
    """

    head_s: float = 60.0
    body_s: float = 60.0
    probe_after_s: float = 30.0
    tick_s: float = 1.0


# Less than this within a limit counts as nothing: a byte a minute would hold a connection for ever.
LEAST_PROGRESS_BYTES = 1024


class Stopwatch:
    """Measures how long a connection has been in its phase without progress.

    Attributes:
        since: the monotonic time of the first look that found the current phase and progress.
    """

    __slots__ = ("_phase", "_progress", "since")

    def __init__(self, now: float = 0.0) -> None:
        self._phase: Phase | None = None
        self._progress = (0, 0)
        self.since = now

    def age_s(self, phase: Phase, request: int, transferred: int, now: float) -> float:
        """Return the seconds since the first look that found this phase and this progress.

        Args:
            phase: of the connection at this look.
            request: number of the request that the phase belongs to.
            transferred: bytes moved so far that count in this phase.
            now: monotonic seconds.
        """
        progress = (request, transferred // LEAST_PROGRESS_BYTES)
        if phase is not self._phase or progress != self._progress:
            self._phase, self._progress, self.since = phase, progress, now
        return now - self.since
