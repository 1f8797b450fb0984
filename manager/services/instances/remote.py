"""An instance whose server somebody else runs: leased, drained and shown, never started or stopped."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from manager.domain.instance import Phase, Target
from manager.domain.lifecycle import Fact, advance
from manager.errors import ConflictError, Reason, UnavailableError
from manager.services.instances.instance import Instance, View, drained_error
from manager.services.instances.server_key import ServerKey

if TYPE_CHECKING:
    from datetime import datetime

    from manager.domain.drained import Drained
    from manager.domain.instance import Explanation, InstanceSpec
    from manager.services.world import World


class RemoteInstance(Instance):
    """A server at a URL, with a key or without. Subclasses learn whether it is ready.

    Args:
        world: the collaborators of all instances.
        spec: the configured side of the instance.
        url: the base URL of the server.
        drained: the order to keep it out of service, None where there is none.
    """

    # The end of the messages that refuse a start and a stop: `{id} is …`.
    refusal_of_start: str
    refusal_of_stop: str

    def __init__(self, world: World, spec: InstanceSpec, url: str, drained: Drained | None) -> None:
        super().__init__(world, spec)
        self._drained = drained
        self._url = url
        self._phase = Phase.UNAVAILABLE
        self._ready_at: datetime | None = None
        self._last_used_at: datetime | None = None
        self._key = ServerKey(world, spec.key)

    def usable_endpoint(self) -> str | None:
        return self._url if self._phase is Phase.READY and self._drained is None else None

    def used(self) -> None:
        self._last_used_at = self._world.utcnow()

    async def start(self, *, explicit: bool = True) -> bool:
        if explicit:
            raise ConflictError(f"{self.id} is {self.refusal_of_start}", instance=self.id)
        if self._drained is not None:
            raise drained_error(self.id, self._drained, self._world.utcnow())
        message, retry_after_s = self._why_unavailable()
        raise UnavailableError(
            message, reason=Reason.INSTANCE_UNAVAILABLE, instance=self.id, retry_after_s=retry_after_s
        )

    async def stop(self, *, force: bool = False) -> bool:
        del force
        raise ConflictError(f"{self.id} is {self.refusal_of_stop}", instance=self.id)

    def view(self) -> View:
        return View(
            spec=self.spec,
            cards=(),
            endpoint=self._url,
            target=Target.RUNNING,
            phase=self._phase,
            health=self._health,
            explanation=self._explanation,
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
            models=self._models,
            available_models=self._available,
            drained=self._drained,
        )

    @abstractmethod
    def _why_unavailable(self) -> tuple[str, float]:
        """Return why it is not ready, and after how many seconds it may be."""

    @property
    def _explanation(self) -> Explanation | None:
        return self._health_issue

    def _move(self, fact: Fact) -> None:
        if fact is Fact.BECAME_READY:
            self._ready_at = self._world.utcnow()
        self._phase = advance(self._phase, fact)
        self._world.revision.advance()
