"""An instance that somebody else runs: probed, listed and leased, never started or stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.domain.instance import Explanation, Health, Phase
from manager.domain.lifecycle import Fact
from manager.domain.target import Protocol
from manager.domain.target import Target as Place
from manager.services.instances.remote import RemoteInstance
from manager.wire.credentials import credentials

if TYPE_CHECKING:
    from manager.domain.drained import Drained
    from manager.domain.instance import InstanceSpec
    from manager.services.ports import ProbeAnswer
    from manager.services.world import World
    from manager.wire.details import Details
    from manager.wire.head import Header


# One missed probe may be a busy server, or a busy machine.
_MISSED_PROBES = 3


class ExternalInstance(RemoteInstance):
    """A server at a URL that is probed.

    Args:
        world: the collaborators of all instances.
        spec: the configured side of the instance.
        drained: the order to keep it out of service, None where there is none.
    """

    refusal_of_start = "external: it is never started from here"
    refusal_of_stop = "external: it is never stopped from here"

    def __init__(self, world: World, spec: InstanceSpec, *, drained: Drained | None = None) -> None:
        assert spec.url is not None, "configuration gives every external instance a url"  # noqa: S101
        super().__init__(world, spec, spec.url.rstrip("/"), drained)
        self._missed = 0

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

    def _why_unavailable(self) -> tuple[str, float]:
        return f"{self.id} at {self._url} does not answer", self.spec.limits.probe_interval_s

    def _set_health(self, health: Health, issue: Explanation | None) -> None:
        """Take in the result of a probe. The server counts as gone after several missed ones in a row."""
        super()._set_health(health, issue)
        self._missed = 0 if health is Health.HEALTHY else self._missed + 1
        if health is Health.HEALTHY and self._phase is Phase.UNAVAILABLE:
            self._move(Fact.BECAME_READY)
        elif self._missed >= _MISSED_PROBES and self._phase is Phase.READY:
            self._models = ()
            self._move(Fact.LOST)
