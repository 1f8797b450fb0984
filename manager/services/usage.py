"""Use that no lease stands for: somebody talks to a container's endpoint directly."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from manager.domain.idle import UsageSample, was_used
from manager.errors import EngineError

if TYPE_CHECKING:
    from manager.domain.instance import ContainerFacts, Model
    from manager.services.world import World


class Watched(Protocol):
    """What the watch needs of an instance."""

    @property
    def ready_container(self) -> ContainerFacts | None: ...
    @property
    def sampling_interval_s(self) -> float: ...
    @property
    def models(self) -> tuple[Model, ...]: ...
    @property
    def own_bytes(self) -> int:
        """What our own probes have moved on the wire so far."""
        ...

    @property
    def probe_bytes(self) -> int:
        """What a probe that is under way may have moved already, 0 when none is."""
        ...

    @property
    def in_flight(self) -> int: ...
    def used(self) -> None: ...


class UsageWatch:
    """Takes samples of a ready container's counters and compares each with the one before.

    Samples may be far apart: the counters only grow, so nothing is missed, only dated late. Windows in
    which a lease was open are not judged: what it moved cannot be told from the rest.
    """

    def __init__(self, world: World, watched: Watched) -> None:
        self._world = world
        self._watched = watched
        self._last: UsageSample | None = None
        self._leased = False
        self._restarted = asyncio.Event()

    def restart(self, stored: UsageSample | None) -> None:
        """The container is a new one, or new to us.

        Args:
            stored: an earlier sample of the same container in wall-clock time, to go on from.
        """
        self._last = None
        if stored is not None:
            ago_s = self._world.utcnow().timestamp() - stored.at
            self._last = replace(stored, at=self._world.now() - ago_s)
        self._restarted.set()

    def leased(self) -> None:
        """A lease was open since the last sample."""
        self._leased = True

    def stored(self) -> UsageSample | None:
        """The last sample in wall-clock time, for whoever sweeps without this daemon."""
        if self._last is None:
            return None
        ago_s = self._world.now() - self._last.at
        return replace(self._last, at=round(self._world.utcnow().timestamp() - ago_s, 3))

    async def run(self) -> None:
        while True:
            self._restarted.clear()
            await self.sample()
            if self._watched.ready_container is None:
                await self._restarted.wait()
                continue
            try:
                async with asyncio.timeout(self._watched.sampling_interval_s):
                    await self._restarted.wait()
            except TimeoutError:
                pass

    async def sample(self) -> None:
        """Take one sample; tell the instance when somebody used it since the one before."""
        container = self._watched.ready_container
        if container is None:
            return
        probing = self._watched.probe_bytes
        try:
            counters = await self._world.engine.counters(container.id)
        except EngineError:
            return
        if self._watched.ready_container is not container:
            return
        sample = UsageSample(
            at=self._world.now(),
            network_bytes=counters.network_bytes,
            own_bytes=self._watched.own_bytes,
            cpu_s=counters.cpu_s,
            expirations=tuple((model.name, model.expires_at) for model in self._watched.models),
        )
        last, self._last = self._last, sample
        leased, self._leased = self._leased or self._watched.in_flight > 0, False
        if last is None or leased:
            return
        # A probe that was under way has moved bytes which are not counted as ours yet.
        allowance = max(probing, self._watched.probe_bytes)
        if was_used(last, replace(sample, own_bytes=sample.own_bytes + allowance)):
            self._watched.used()
