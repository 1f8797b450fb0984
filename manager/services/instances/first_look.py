"""The first look at the engine and the servers after a start, and what keeps the daemon from being usable."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from manager.errors import EngineUnreachableError
from manager.services.instances.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manager.services.instances.engine_link import EngineLink
    from manager.services.instances.fleet import Fleet
    from manager.services.world import World

# How long a request waits for the first look after the daemon's start.
MAX_STARTUP_WAIT_S = 15.0

_POLL_S = 0.02


class FirstLook:
    """Tells whether the engine and the servers were looked at since the daemon started.

    Args:
        world: the cards, the journal and the clock.
        fleet: the instances.
        links: the engines.
    """

    def __init__(self, world: World, fleet: Fleet, links: Sequence[EngineLink]) -> None:
        self._world = world
        self._fleet = fleet
        self._links = links
        self._is_known = False

    @property
    def is_known(self) -> bool:
        """Whether the engine and each external server have answered or failed once."""
        if not self._is_known:
            others = (one for one in self._fleet.instances() if not isinstance(one, Supervisor))
            engines = all(link.asked.is_set() for link in self._links if link.is_needed)
            self._is_known = engines and all(one.is_probed for one in others)
        return self._is_known

    async def known(self, *, within_s: float) -> None:
        """Wait until `is_known`, at most for `within_s`."""
        deadline = self._world.now() + within_s
        while not self.is_known and self._world.now() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)

    async def engine_asked(self, *, within_s: float = MAX_STARTUP_WAIT_S) -> None:
        """Wait until the engine has answered or failed once, at most for `within_s`.

        Operations that need the engine wait for this: before it, the engine counts as away.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                for link in self._links:
                    await link.asked.wait()

    async def settled(self, *, within_s: float) -> None:
        """Wait until the engine was listed and every container found was adopted, as far as that goes.

        Raises:
            EngineUnreachableError: the engine has not answered within `within_s`, and an instance needs it.
        """
        needed = [link for link in self._links if link.is_needed]
        if not needed:
            await self.engine_asked(within_s=within_s)
            return
        deadline = self._world.now() + within_s
        try:
            async with asyncio.timeout(within_s):
                for link in needed:
                    await link.came_up.wait()
        except TimeoutError:
            trouble = next(link.trouble for link in needed if not link.up)
            raise EngineUnreachableError(trouble) from None
        supervisors = self._fleet.supervisors()
        while any(one.busy for one in supervisors) and self._world.now() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)

    def why_not_ready(self) -> tuple[str, ...]:
        """Return what keeps the daemon from being usable; nothing when it is.

        The engine counts where an instance has a container, also one of a card that was found.
        """
        down = [link for link in self._links if link.is_needed and not link.up]
        reasons = [f"{link.name}: {link.trouble}" for link in down]
        if not self._world.gpus.snapshot.attempted:
            reasons.append("gpus: NVML has not been asked yet")
        if (trouble := self._world.journal.trouble) is not None:
            reasons.append(f"registry: {trouble}")
        return tuple(reasons)
