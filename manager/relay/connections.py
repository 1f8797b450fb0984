"""The limit of client connections. Beyond it the longest quiet ones are closed for new ones."""

from __future__ import annotations

import time
from enum import Enum, auto
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_log = structlog.get_logger("connections")

# A connection that has been quiet for less is not closed: its request may be on its way.
_LEAST_QUIET_S = 1.0
# Each time so large a share of the connections is closed, so that few of many openings look at them all.
_CLOSED_SHARE = 16
# The log says no more often that the limit is reached.
_LOG_EVERY_S = 10.0
_NO_LIMIT = 2**31


class Place(Enum):
    """Which requests a connection may carry."""

    ANY = auto()
    PRIVILEGED = auto()
    """Keyed requests, and those of `HEALTH`."""
    HEALTH = auto()
    """Requests that tell whether the daemon is alive and well."""


class Connection(Protocol):
    """A client connection as the limit sees it."""

    def quiet_since(self) -> float | None:
        """Monotonic seconds of the last byte received; None while a complete request is being answered."""

    def drop(self) -> None:
        """Close at once."""


class ConnectionLimit:
    """Counts the client connections, and makes room for new ones at the limit.

    The limit keeps descriptors free for upstream connections, files and the engine. At the limit a new
    connection takes the place of those that have been quiet longest. If all are busy it takes a spare place,
    half of which are for privileged requests, and the other half for those about health. If the spare places
    are taken as well, the quietest connection there is closed, else the new one.

    Args:
        most: connections that may carry any request.
        spare: places beyond them.
        now: monotonic seconds, as in `Connection.quiet_since`.

    Attributes:
        extra: the connections that have a spare place.
    """

    def __init__(
        self, most: int = _NO_LIMIT, spare: int = 0, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.most = most
        self.spare = spare
        self._now = now
        self._open: set[Connection] = set()
        self.extra: set[Connection] = set()
        self._closed = 0
        self._refused = 0
        self._logged_at: float | None = None

    def __len__(self) -> int:
        return len(self._open)

    def opened(self, connection: Connection) -> None:
        """Count a new connection. At the limit this drops others, or the new one."""
        if len(self._open) >= self.most and not self.close_quiet():
            if len(self._open) >= self.most + self.spare and not self._close_quiet_extra():
                self._refused += 1
                self._report()
                connection.drop()
                return
            self.extra.add(connection)
            self._report()
        self._open.add(connection)

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        self.extra.discard(connection)

    def place_of(self, connection: Connection) -> Place:
        """Which requests the connection may carry now; a spare place becomes an ordinary one in time."""
        if connection not in self.extra:
            return Place.ANY
        beyond = len(self._open) - self.most
        if beyond <= 0:
            self.extra.discard(connection)
            return Place.ANY
        return Place.PRIVILEGED if beyond <= self.spare // 2 else Place.HEALTH

    def refused(self) -> None:
        """Count a request that its connection may not carry."""
        self._refused += 1
        self._report()

    def close_quiet(self) -> int:
        """Close the connections that have been quiet longest; return how many, 0 if none was quiet."""
        latest = self._now() - _LEAST_QUIET_S
        quiet = [one for one in self._quiet(self._open) if one[0] <= latest]
        quiet.sort(key=itemgetter(0))
        victims = quiet[: len(self._open) // _CLOSED_SHARE + 1]
        for _, connection in victims:
            self._close(connection)
        return len(victims)

    def _close_quiet_extra(self) -> bool:
        quiet = self._quiet(self.extra)
        if quiet:
            self._close(min(quiet, key=itemgetter(0))[1])
        return bool(quiet)

    @staticmethod
    def _quiet(connections: Iterable[Connection]) -> list[tuple[float, Connection]]:
        found = ((connection.quiet_since(), connection) for connection in connections)
        return [(since, connection) for since, connection in found if since is not None]

    def _close(self, connection: Connection) -> None:
        self.closed(connection)
        self._closed += 1
        self._report()
        connection.drop()

    def _report(self) -> None:
        now = self._now()
        if self._logged_at is not None and now - self._logged_at < _LOG_EVERY_S:
            return
        self._logged_at = now
        _log.warning(
            "connections_exhausted",
            open=len(self._open),
            limit=self.most,
            closed_quiet=self._closed,
            refused=self._refused,
        )
        self._closed = self._refused = 0
