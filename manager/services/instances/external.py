"""An instance that somebody else runs: probed, listed and leased, never started or stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.domain.instance import Explanation, Health, Phase, Target
from manager.domain.lifecycle import Fact, advance
from manager.domain.target import Protocol
from manager.domain.target import Target as Place
from manager.errors import ConflictError, Reason, UnavailableError
from manager.services.instances.instance import Instance, View, drained_error
from manager.services.instances.server_key import ServerKey
from manager.wire.credentials import credentials

if TYPE_CHECKING:
    from datetime import datetime

    from manager.domain.drained import Drained
    from manager.domain.instance import InstanceSpec
    from manager.services.ports import ProbeAnswer
    from manager.services.world import World
    from manager.wire.details import Details
    from manager.wire.head import Header


# One missed probe may be a busy server, or a busy machine.
_MISSED_PROBES = 3


class ExternalInstance(Instance):
    """A server at a URL.

    Args:
        world: the collaborators of all instances.
        spec: the configured side of the instance.
        drained: the order to keep it out of service, None where there is none.
    """

    def __init__(self, world: World, spec: InstanceSpec, *, drained: Drained | None = None) -> None:
        super().__init__(world, spec)
        self._drained = drained
        assert spec.url is not None, "configuration gives every external instance a url"  # noqa: S101
        self._url = spec.url.rstrip("/")
        self._phase = Phase.UNAVAILABLE
        self._ready_at: datetime | None = None
        self._last_used_at: datetime | None = None
        self._missed = 0
        self._key = ServerKey(world, spec.key)

    async def run(self) -> None:
        await self._probe_forever()

    def reconfigure(self, spec: InstanceSpec) -> None:
        super().reconfigure(spec)
        self.read_models_soon()

    async def show(self, model: str) -> Details | None:
        if self.spec.protocol is not Protocol.OLLAMA:
            return None  # it has no call for that
        return await super().show(model)

    async def _ask(self, endpoint: str) -> None:
        if await self._key.look():
            self._place = None  # it holds the old one
            self.read_models_soon()
        if self._key.problem is not None:
            self._set_health(Health.UNHEALTHY, self._key.problem)
        else:
            await super()._ask(endpoint)

    async def _asked(self, endpoint: str, *, tags: bool) -> ProbeAnswer:
        upstream, timeout_s = self._world.upstream, self.spec.limits.probe_interval_s
        if self.spec.protocol is Protocol.OLLAMA:
            return await upstream.probe(endpoint, timeout_s=timeout_s, tags=tags, headers=self.headers)
        return await upstream.probe_openai(
            endpoint,
            timeout_s=timeout_s,
            models=tags,
            names=self.spec.model_names,
            headers=self.headers,
        )

    @property
    def headers(self) -> tuple[Header, ...]:
        return credentials(self.spec.protocol, self._key.value)

    def _place_at(self, endpoint: str) -> Place:
        return Place(self.id, endpoint, self.headers, self.spec.protocol)

    @property
    def probed_endpoint(self) -> str | None:
        return self._url

    def usable_endpoint(self) -> str | None:
        return self._url if self._phase is Phase.READY and self._drained is None else None

    def used(self) -> None:
        self._last_used_at = self._world.utcnow()

    async def start(self, *, explicit: bool = True) -> bool:
        if explicit:
            raise ConflictError(f"{self.id} is external: it is never started from here", instance=self.id)
        if self._drained is not None:
            raise drained_error(self.id, self._drained, self._world.utcnow())
        raise UnavailableError(
            f"{self.id} at {self._url} does not answer",
            reason=Reason.INSTANCE_UNAVAILABLE,
            instance=self.id,
            retry_after_s=self.spec.limits.probe_interval_s,
        )

    async def stop(self, *, force: bool = False) -> bool:
        del force
        raise ConflictError(f"{self.id} is external: it is never stopped from here", instance=self.id)

    def view(self) -> View:
        return View(
            spec=self.spec,
            cards=(),
            endpoint=self._url,
            target=Target.RUNNING,
            phase=self._phase,
            health=self._health,
            explanation=self._health_issue,
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

    def _set_health(self, health: Health, issue: Explanation | None) -> None:
        """Take in the result of a probe. The server counts as gone after several missed ones in a row."""
        super()._set_health(health, issue)
        self._missed = 0 if health is Health.HEALTHY else self._missed + 1
        if health is Health.HEALTHY and self._phase is Phase.UNAVAILABLE:
            self._ready_at = self._world.utcnow()
            self._move(Fact.BECAME_READY)
        elif self._missed >= _MISSED_PROBES and self._phase is Phase.READY:
            self._models = ()
            self._move(Fact.LOST)

    def _move(self, fact: Fact) -> None:
        self._phase = advance(self._phase, fact)
        self._world.revision.advance()
