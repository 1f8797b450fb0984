"""The live channel as the command line follows it: the latest sections, read in a thread of its own."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from manager.cli.client import Daemon, DaemonUnreachableError, RefusalError
from manager.cli.failures import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from manager.cli.locate import Endpoint

_RETRY_S = 1.0
# Refusals that pass: too many clients follow, or the daemon is being stopped.
_PASSING = (429, 503)
_LOST = "its live channel ended"


def passes(refusal: RefusalError) -> bool:
    """Return whether a refusal ends by itself."""
    return refusal.status in _PASSING


@dataclass(frozen=True, slots=True)
class Seen:
    """The last that was seen of a daemon.

    Attributes:
        sections: the latest value of each section of the live channel.
        at: the monotonic time of each of them, from which its clocks run.
        trouble: why the daemon cannot be followed now, None while it is.
        since: the monotonic time since when.
    """

    sections: Mapping[str, Any] = field(default_factory=dict)
    at: Mapping[str, float] = field(default_factory=dict)
    trouble: str | None = None
    since: float = 0.0


class Feed:
    """Follows the live channel of a daemon. A connection that is lost is made again, until the process ends.

    Args:
        locate: finds the daemon; asked again after it went away, as it may come back elsewhere.
        notify: called from the thread after each change of `seen`.
    """

    def __init__(self, locate: Callable[[], Endpoint], notify: Callable[[], None]) -> None:
        self._locate = locate
        self._notify = notify
        self._seen = Seen()
        self._failure: CommandError | None = None
        self._ended = threading.Event()

    def begin(self) -> None:
        """Connect, and follow from now on.

        Raises:
            DaemonUnreachableError, RefusalError: it cannot be followed.
        """
        frames = Daemon(self._locate()).live()
        first = next((frame for frame in frames if frame is not None), None)
        if first is None:
            raise DaemonUnreachableError(f"the daemon cannot be followed: {_LOST}")
        self._take(first)
        threading.Thread(target=self._follow, args=(frames,), name="live", daemon=True).start()

    def end(self) -> None:
        """Connect no more. A connection that stands is read until it ends."""
        self._ended.set()

    @property
    def seen(self) -> Seen:
        """The last that was seen.

        Raises:
            RefusalError: the daemon refuses, such as a key that was revoked.
        """
        if self._failure is not None:
            raise self._failure
        return self._seen

    def _follow(self, frames: Iterator[dict[str, Any] | None]) -> None:
        while True:
            try:
                for frame in frames:
                    if frame is not None:
                        self._take(frame)
                self._lose(_LOST)
            except RefusalError as error:
                if not passes(error):
                    self._failure = error
                    self._notify()
                    return
                self._lose(error.message)
            except CommandError as error:
                self._lose(error.message)
            except Exception as error:  # noqa: BLE001  (a thread of its own: the command must not hang)
                self._lose(f"{type(error).__name__}: {error}")
            if self._ended.wait(_RETRY_S):
                return
            frames = self._again()

    def _again(self) -> Iterator[dict[str, Any] | None]:
        """Yield from a new connection, whose errors are those of the iterator."""
        yield from Daemon(self._locate()).live()

    def _take(self, frame: dict[str, Any]) -> None:
        now = time.monotonic()
        changed = {name: value for name, value in frame.items() if name != "revision"}
        seen = self._seen
        self._seen = Seen({**seen.sections, **changed}, {**seen.at, **dict.fromkeys(changed, now)})
        self._notify()

    def _lose(self, why: str) -> None:
        seen = self._seen
        since = time.monotonic() if seen.trouble is None else seen.since
        self._seen = replace(seen, trouble=why, since=since)
        self._notify()
