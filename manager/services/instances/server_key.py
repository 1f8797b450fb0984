"""The key for the server of one instance: read at the start, and again all the time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.domain.instance import Explanation
from manager.errors import UnavailableError

if TYPE_CHECKING:
    from manager.domain.instance import KeySource
    from manager.services.world import World

# The least time between two looks at the place of a key. A probe in between uses the last key.
LOOK_S = 2.0


class ServerKey:
    """Owns a key in memory; nothing else does. None of its texts has the key in it.

    Args:
        world: reads keys.
        source: the place of the key; None: the server needs none.

    Attributes:
        value: the key; None where there is none.
        problem: why there is none; None where the server needs none, or it is known.
    """

    def __init__(self, world: World, source: KeySource | None) -> None:
        self._world = world
        self._source = source
        self._looked_at = float("-inf")
        self.value: str | None = None
        self.problem: Explanation | None = None

    def __repr__(self) -> str:
        return f"ServerKey({self._source})"

    async def look(self) -> bool:
        """Read the key again if that is due; return whether it, or its problem, has changed."""
        source, now = self._source, self._world.now()
        if source is None or now - self._looked_at < LOOK_S:
            return False
        self._looked_at = now
        before = self.value, self.problem
        try:
            self.value, self.problem = await self._world.read_key(source), None
        except UnavailableError as error:
            self.value, self.problem = None, Explanation(error.reason, error.message)
        return before != (self.value, self.problem)
