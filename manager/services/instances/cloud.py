"""A service that costs money for each request: never probed, listed, started or stopped."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from manager.domain.instance import Health, Phase
from manager.domain.lifecycle import Fact
from manager.domain.target import Target as Place
from manager.services.instances.remote import RemoteInstance
from manager.services.instances.server_key import LOOK_S
from manager.wire.credentials import credentials

if TYPE_CHECKING:
    from manager.domain.drained import Drained
    from manager.domain.instance import Explanation, InstanceSpec
    from manager.services.world import World


class CloudInstance(RemoteInstance):
    """A paid server. It counts as ready while there is a key for it; its breaker tells whether it answers.

    Args:
        world: the collaborators of all instances.
        spec: the configured side of the instance.
        drained: the order to keep it out of service, None where there is none.
    """

    refusal_of_start = "a paid service: it is never started"
    refusal_of_stop = "a paid service: it is never stopped"

    def __init__(self, world: World, spec: InstanceSpec, *, drained: Drained | None = None) -> None:
        assert spec.url is not None, "configuration gives every cloud instance a url"  # noqa: S101
        super().__init__(world, spec, spec.url, drained)
        self._is_looked_at = False

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Read the key again if that is due."""
        if await self._key.look():
            self._place = None  # it holds the old one
            self._world.revision.advance()
        self._is_looked_at = True
        problem = self._key.problem
        if problem is not None and self._phase is Phase.READY:
            self._move(Fact.LOST)
        elif self._key.value is not None and self._phase is Phase.UNAVAILABLE:
            self._move(Fact.BECAME_READY)
        if problem != self._health_issue:
            self._set_health(Health.UNKNOWN if problem is None else Health.UNHEALTHY, problem)

    @property
    def is_probed(self) -> bool:
        return self._is_looked_at

    @property
    def probed_endpoint(self) -> str | None:
        return None

    def reconfigure(self, spec: InstanceSpec) -> None:
        super().reconfigure(spec)
        self._place = None  # it holds the old prices

    def _why_unavailable(self) -> tuple[str, float]:
        problem = self._key.problem
        return f"{self.id}: {problem.message if problem else 'its key was not read yet'}", LOOK_S

    @property
    def _explanation(self) -> Explanation | None:
        return self._key.problem

    def _place_at(self, endpoint: str) -> Place:
        spec = self.spec
        headers = credentials(spec.protocol, self._key.value)
        return Place(self.id, endpoint, headers, spec.protocol, prices=spec.prices, repeatable=False)
