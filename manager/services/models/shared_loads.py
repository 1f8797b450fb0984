"""Loads that several callers wait for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from manager.wire.loading import KeepAlive

# An instance, and the key of a model.
Place: TypeAlias = tuple[str, str]

# The interval at which a load without callers is compared with the requests that wait for it at the server.
_LOOK_S = 1.0


class SharedLoads:
    """Owns the loads under way, at most one for each model on each instance.

    A load is cancelled when its last caller is. While others wait for it at the server it goes on: the server
    may end the load with the request that began it, and would begin anew for them.

    Args:
        is_waited_for: whether others wait for the load of a place.
    """

    def __init__(self, is_waited_for: Callable[[Place], bool]) -> None:
        self._is_waited_for = is_waited_for
        self._loads: dict[Place, _Load] = {}

    async def join(
        self, place: Place, keep_alive: KeepAlive | None, begin: Callable[[], Coroutine[None, None, bool]]
    ) -> bool:
        """Return the outcome of the load under way, or else of a new one.

        Args:
            place: what is loaded, and where.
            keep_alive: a load under way with another value comes first, and the new one follows.
            begin: makes a new load.
        """
        while (load := self._loads.get(place)) is not None and load.keep_alive != keep_alive:
            async with load:
                await asyncio.wait({load.task})
        if load is None:
            load = self._loads[place] = _Load(self, place, keep_alive, begin())
        async with load:
            return await asyncio.shield(load.task)

    def leave(self, load: _Load) -> None:
        """A caller has left: cancel the load if nobody waits for it."""
        if load.callers or load.task.done():
            return
        if self._is_waited_for(load.place):
            asyncio.get_running_loop().call_later(_LOOK_S, self.leave, load)
            return
        self.ended(load)  # a caller that comes now begins another one
        load.task.cancel()

    def ended(self, load: _Load) -> None:
        """Forget a load."""
        if self._loads.get(load.place) is load:
            del self._loads[load.place]


class _Load:
    """One load. As a context it counts a caller."""

    def __init__(
        self,
        loads: SharedLoads,
        place: Place,
        keep_alive: KeepAlive | None,
        work: Coroutine[None, None, bool],
    ) -> None:
        self._loads = loads
        self.place = place
        self.keep_alive = keep_alive
        self.callers = 0
        self.task = asyncio.create_task(work, name=f"load {place[1]} on {place[0]}")
        self.task.add_done_callback(self._ended)

    async def __aenter__(self) -> None:
        self.callers += 1

    async def __aexit__(self, *_: object) -> None:
        self.callers -= 1
        self._loads.leave(self)

    def _ended(self, task: asyncio.Task[bool]) -> None:
        self._loads.ended(self)
        if not task.cancelled():
            task.exception()  # its callers may have left
