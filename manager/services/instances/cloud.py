"""A service that costs money for each request: never probed, listed, started or stopped."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from manager.domain.instance import Health, Phase, Target
from manager.domain.lifecycle import Fact, advance
from manager.domain.target import Target as Place
from manager.errors import ConflictError, Reason, UnavailableError
from manager.services.instances.instance import Instance, View, drained_error
from manager.services.instances.server_key import LOOK_S, ServerKey
from manager.wire.credentials import credentials

if TYPE_CHECKING:
    from datetime import datetime

    from manager.domain.drained import Drained
    from manager.domain.instance import InstanceSpec
    from manager.services.world import World


class CloudInstance(Instance):
    """A paid server. It counts as ready while there is a key for it; its breaker tells whether it answers.

    Args:
        world: the collaborators of all instances.
        spec: the configured side of the instance.
        drained: the order to keep it out of service, None where there is none.
    """

    def __init__(self, world: World, spec: InstanceSpec, *, drained: Drained | None = None) -> None:
        super().__init__(world, spec)
        self._drained = drained
        assert spec.url is not None, "configuration gives every cloud instance a url"  # noqa: S101
        self._url = spec.url
        self._key = ServerKey(world, spec.key)
        self._phase = Phase.UNAVAILABLE
        self._is_looked_at = False
        self._ready_at: datetime | None = None
        self._last_used_at: datetime | None = None

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
            self._phase = advance(self._phase, Fact.LOST)
        elif self._key.value is not None and self._phase is Phase.UNAVAILABLE:
            self._phase = advance(self._phase, Fact.BECAME_READY)
            self._ready_at = self._world.utcnow()
        if problem != self._health_issue:
            self._set_health(Health.UNKNOWN if problem is None else Health.UNHEALTHY, problem)

    @property
    def is_probed(self) -> bool:
        return self._is_looked_at

    @property
    def probed_endpoint(self) -> str | None:
        return None

    def usable_endpoint(self) -> str | None:
        return self._url if self._phase is Phase.READY and self._drained is None else None

    def reconfigure(self, spec: InstanceSpec) -> None:
        super().reconfigure(spec)
        self._place = None  # it holds the old prices

    def used(self) -> None:
        self._last_used_at = self._world.utcnow()

    async def start(self, *, explicit: bool = True) -> bool:
        if explicit:
            raise ConflictError(f"{self.id} is a paid service: it is never started", instance=self.id)
        if self._drained is not None:
            raise drained_error(self.id, self._drained, self._world.utcnow())
        problem = self._key.problem
        raise UnavailableError(
            f"{self.id}: {problem.message if problem else 'its key was not read yet'}",
            reason=Reason.INSTANCE_UNAVAILABLE,
            instance=self.id,
            retry_after_s=LOOK_S,
        )

    async def stop(self, *, force: bool = False) -> bool:
        del force
        raise ConflictError(f"{self.id} is a paid service: it is never stopped", instance=self.id)

    def view(self) -> View:
        return View(
            spec=self.spec,
            cards=(),
            endpoint=self._url,
            target=Target.RUNNING,
            phase=self._phase,
            health=self._health,
            explanation=self._key.problem,
            in_flight=self._leases.in_flight,
            pinned=False,
            ttl_s=0,
            ttl_remaining_s=None,
            started_at=None,
            ready_at=self._ready_at,
            last_used_at=self._world.utcnow() if self.in_flight else self._last_used_at,
            last_seen_at=self._last_seen_at,
            starts=0,
            container=None,
            template_hash=None,
            models=(),
            available_models=None,
            drained=self._drained,
        )

    def _place_at(self, endpoint: str) -> Place:
        spec = self.spec
        headers = credentials(spec.protocol, self._key.value)
        return Place(self.id, endpoint, headers, spec.protocol, prices=spec.prices, repeatable=False)
