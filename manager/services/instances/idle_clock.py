"""When an instance was last used, on the monotonic clock for decisions and in UTC for people and restarts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.domain.idle import ttl_remaining_s

if TYPE_CHECKING:
    from datetime import datetime

    from manager.services.world import World


class IdleClock:
    """Runs from the last use; stands still (None) while there is nothing that could be idle."""

    def __init__(self, world: World, last_used_at: datetime | None) -> None:
        self._world = world
        self._last_use: float | None = None
        self.last_used_at = last_used_at

    def used(self) -> None:
        self._last_use = self._world.now()
        self.last_used_at = self._world.utcnow()

    def stop(self) -> None:
        self._last_use = None

    def resume(self, started_at: datetime | None) -> None:
        """Go on from the stored last use; with nothing stored the clock starts now.

        Args:
            started_at: when the container was started, which may have been after its instance's last use.
        """
        if self.last_used_at is None:
            self.used()
            return
        if started_at is not None:
            self.last_used_at = max(self.last_used_at, started_at)
        ago_s = (self._world.utcnow() - self.last_used_at).total_seconds()
        self._last_use = self._world.now() - max(0.0, ago_s)

    def remaining_s(self, ttl_s: float, *, pinned: bool, in_flight: int) -> float | None:
        """As `domain.idle.ttl_remaining_s`."""
        return ttl_remaining_s(
            now=self._world.now(), ttl_s=ttl_s, pinned=pinned, in_flight=in_flight, last_use=self._last_use
        )

    def unused_since(self, in_flight: int) -> float | None:
        """The time of the last use, None while it is in use or the clock stands still."""
        return None if in_flight else self._last_use
