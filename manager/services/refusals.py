"""Refused requests: counted by reason, and logged at a bounded rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from manager.wire.access import REASONS
from manager.wire.caller import printable
from manager.wire.keys import without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable

_log = structlog.get_logger("access")

_WINDOW_S = 60.0
# At the bound the address that was seen first is forgotten: its next refusal is logged as a first one.
_MOST_ADDRESSES = 256
# Lines in one window, all addresses together; what is beyond it is counted in the metric only.
_MOST_LINES = 30
_MOST_PATH = 200
_OTHER = "other"


class Refusals:
    """Counts refused requests, and logs them at 1, 10, 100, … for each address and window of time.

    Args:
        now: a monotonic clock in seconds.
    """

    def __init__(self, *, now: Callable[[], float]) -> None:
        self._now = now
        self._counts = dict.fromkeys((*REASONS, _OTHER), 0)
        self._by_address: dict[str, int] = {}
        self._window_ends = now()
        self._lines = 0

    @property
    def counts(self) -> dict[str, int]:
        """Refusals since the daemon began, by reason; the reasons are a fixed set."""
        return dict(self._counts)

    def refused(self, reason: str, address: str, path: str) -> None:
        """Record one refusal.

        Args:
            reason: one of `manager.wire.access.REASONS`; anything else counts as `other`.
            address: of the client.
            path: without the query.
        """
        reason = reason if reason in self._counts else _OTHER
        self._counts[reason] += 1
        now = self._now()
        if now >= self._window_ends:
            self._window_ends = now + _WINDOW_S
            self._by_address.clear()
            self._lines = 0
        count = self._by_address.get(address, 0) + 1
        if count == 1 and len(self._by_address) >= _MOST_ADDRESSES:
            del self._by_address[next(iter(self._by_address))]
        self._by_address[address] = count
        if _is_power_of_ten(count):
            self._log(reason, address, path, count)

    def _log(self, reason: str, address: str, path: str, count: int) -> None:
        if self._lines > _MOST_LINES:
            return
        self._lines += 1
        if self._lines > _MOST_LINES:
            _log.warning("refusals_not_logged", within_s=_WINDOW_S, hint="the metrics count them all")
            return
        _log.warning(
            "refused",
            reason=reason,
            address=address,
            path=printable(without_secrets(path)[:_MOST_PATH]),
            refused_in_this_minute=count,
        )


def _is_power_of_ten(count: int) -> bool:
    return str(count).rstrip("0") == "1"
