"""One download of a model, and the clients that wait for it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, Self

from manager.domain.download import Download, Layer
from manager.errors import ManagerError, Reason, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from manager.services.routing.placement import Prepared
    from manager.wire.management import ManagementBody
    from manager.wire.progress import Progress

# The last lines of a pull, and the last line about each subject: a late or slow client gets them.
_MOST_LINES = 256
_MOST_SUBJECTS = 256


class PullFailedError(UnavailableError):
    """The model could not be pulled. `status` is what the server answered instead of progress, if it did."""

    def __init__(self, message: str, *, instance: str | None = None, status: int | None = None) -> None:
        super().__init__(message, reason=Reason.MODEL_MISSING, instance=instance)
        self.status = status


@dataclass(frozen=True, slots=True)
class PullView:
    """A pull as it is now.

    Attributes:
        id: of this daemon's pulls.
        instance: the one that pulls; None while the pull waits for its turn.
        state: `waiting` for other work on the volume, or for its instance.
        status: what the server does, in its words.
        bytes_per_s: the speed of the last seconds; None where there is none.
        left_s: until the known layers are here.
        clients: those that wait for it.
        is_kept: it goes on without clients.
        error: why it has failed.
    """

    id: int
    model: str
    volume: str
    instance: str | None
    state: Literal["waiting", "pulling", "done", "failed", "cancelled"]
    status: str
    layers: tuple[Layer, ...]
    completed_bytes: int
    total_bytes: int
    bytes_per_s: float | None
    left_s: float | None
    clients: int
    is_kept: bool
    error: str | None


class Pull:
    """One download, and all clients that wait for it.

    Lines are kept once for all waiters, in `_MOST_LINES` places; a line costs the same whatever came before
    it and however many clients wait.
    """

    def __init__(self, volume: str, body: ManagementBody, number: int = 0) -> None:
        self.number = number
        self.volume = volume
        self.body = body
        self.instance: str | None = None
        self.is_kept = False
        self.is_cancelled = False
        self.download = Download()
        self.status = ""
        self.prepared: Prepared | None = None
        self.error: ManagerError | None = None
        self.ended = False
        self.ended_at = 0.0
        self.waiting: set[Waiter] = set()
        self.count = 0
        self._recent: deque[bytes] = deque(maxlen=_MOST_LINES)
        # The subjects with the newest lines, in the order of those lines.
        self._latest: dict[tuple[str | None, str | None], bytes] = {}
        self._news = asyncio.Event()

    @property
    def is_wanted(self) -> bool:
        """Return whether the pull should go on."""
        return not self.ended and (self.is_kept or bool(self.waiting))

    def tell(self, line: bytes, subject: tuple[str | None, str | None]) -> None:
        """Hand a line to all waiters.

        Args:
            line: as the server sent it.
            subject: what it is about.
        """
        self._latest.pop(subject, None)
        if len(self._latest) >= _MOST_SUBJECTS:
            del self._latest[next(iter(self._latest))]
        self._latest[subject] = line
        self._recent.append(line)
        self.count += 1
        self._wake()

    def see(self, step: Progress, now: float) -> None:
        """Take in what a line says of the progress."""
        self.status = step.status or self.status
        if step.digest is not None and step.total is not None:
            self.download.take(Layer(step.digest, step.completed or 0, step.total), now)

    def end(self, error: ManagerError | None, now: float = 0.0) -> None:
        if self.ended:
            return
        self.error, self.ended_at = error, now
        self.ended = True
        self._wake()

    def lines_since(self, place: int) -> list[bytes]:
        """The lines after the first `place`, or the last about each subject where those are not kept."""
        missed = self.count - place
        if missed > len(self._recent):
            return self.summary()
        return list(islice(self._recent, len(self._recent) - missed, None))

    def summary(self) -> list[bytes]:
        """The last line about each subject, for clients that come later."""
        return list(self._latest.values())

    def view(self, now: float) -> PullView:
        """Return the pull as it is now; `now` is on the clock of `see`."""
        under_way = not self.ended
        return PullView(
            self.number,
            self.body.model,
            self.volume,
            self.instance,
            self._state(),
            self.status,
            self.download.layers,
            self.download.completed_bytes,
            self.download.total_bytes,
            self.download.bytes_per_s(now) if under_way else None,
            self.download.left_s(now) if under_way else None,
            len(self.waiting),
            self.is_kept,
            self.error.message if self.error is not None and not self.is_cancelled else None,
        )

    def _state(self) -> Literal["waiting", "pulling", "done", "failed", "cancelled"]:
        if self.is_cancelled:
            return "cancelled"
        if self.ended:
            return "done" if self.error is None else "failed"
        return "waiting" if self.instance is None else "pulling"

    async def news(self) -> None:
        """Wait for the next line, or the end."""
        await self._news.wait()

    def _wake(self) -> None:
        # Present waiters hold the old event; later ones wait for the next line.
        news, self._news = self._news, asyncio.Event()
        news.set()


class Waiter:
    """A client of a pull: an async iterator over its lines, and a context manager.

    A client that falls behind gets the last line about each subject in place of those it missed. The last
    waiter to leave ends the pull. Iterating raises the error in which the pull ended.
    """

    def __init__(self, pull: Pull, left: Callable[[Pull], None]) -> None:
        self._pull = pull
        self._left = left
        self._lines = deque(pull.summary())
        self._place = pull.count

    @property
    def prepared(self) -> Prepared | None:
        """The lease that it is done under, None while it waits for its turn."""
        return self._pull.prepared

    def __enter__(self) -> Self:
        self._pull.waiting.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pull.waiting.discard(self)
        self._left(self._pull)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._lines:
            if self._place < self._pull.count:
                self._lines.extend(self._pull.lines_since(self._place))
                self._place = self._pull.count
            elif not self._pull.ended:
                await self._pull.news()
            elif self._pull.error is not None:
                raise self._pull.error
            else:
                raise StopAsyncIteration
        return self._lines.popleft()
