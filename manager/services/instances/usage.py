"""Use that no lease stands for: somebody talks to a container's endpoint directly."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from manager.domain.idle import UsageSample, was_used
from manager.errors import EngineError
from manager.services.ports import ContainerCounters

if TYPE_CHECKING:
    from manager.domain.instance import ContainerFacts, Model
    from manager.services.world import World


# A window without leases says something when it is at least this long: a stream shows within that time.
LEAST_WINDOW_S = 1.0


class Watched(Protocol):
    """The instance, as the watch sees it."""

    @property
    def ready_container(self) -> ContainerFacts | None: ...
    @property
    def ttl_s(self) -> float: ...
    @property
    def until_sample_s(self) -> float:
        """Seconds until the next sample is to be taken."""
        ...

    @property
    def models(self) -> tuple[Model, ...]: ...
    @property
    def own_bytes(self) -> int:
        """The bytes that our own probes have moved on the wire so far."""
        ...

    @property
    def probe_bytes(self) -> int:
        """The bytes that a probe under way may have moved already; 0 when none is."""
        ...

    @property
    def coming_probe_bytes(self) -> int:
        """The bytes that our probes may move until the state is stored again."""
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
        self._unwatched = False
        self._judged_from: float | None = None
        self._restarted = asyncio.Event()

    def restart(self, stored: UsageSample | None) -> None:
        """The container is a new one, or new to us.

        Args:
            stored: an earlier sample of the same container in wall-clock time, to go on from. Without one
                whatever is done before the first sample counts as use, since nobody can tell.
        """
        self._last = None
        self._judged_from = None
        self._unwatched = stored is None
        if stored is not None:
            ago_s = self._world.utcnow().timestamp() - stored.at
            self._last = replace(stored, at=self._world.now() - ago_s)
        self._restarted.set()

    def resample(self) -> None:
        """Take a sample now: the interval between two of them has changed."""
        self._restarted.set()

    async def look(self) -> None:
        """Take in the use up to now.

        A window in which a lease was open is not judged. Where no window of some length was judged since, a
        direct user would go unseen: wait for such a window.
        """
        await self.sample()
        since, now = self._judged_from, self._world.now()
        ttl_s = self._watched.ttl_s
        least_s = min(LEAST_WINDOW_S, ttl_s) if ttl_s > 0 else LEAST_WINDOW_S
        if self._watched.ready_container is None or self._watched.in_flight:
            return
        if since is None or now - since < least_s:
            await asyncio.sleep(least_s - (0.0 if since is None else now - since))
            await self.sample()

    def leased(self) -> None:
        """A lease was open since the last sample."""
        self._leased = True

    def stored(self) -> UsageSample | None:
        """The last sample in wall-clock time, for whoever sweeps without this daemon.

        Its bytes are those that there will be if nobody but us talks to the server until this is stored
        again: a daemon that dies before that must not look like a user.
        """
        if self._last is None:
            return None
        ago_s = self._world.now() - self._last.at
        since = self._watched.own_bytes - self._last.own_bytes + self._watched.coming_probe_bytes
        return replace(
            self._last,
            at=round(self._world.utcnow().timestamp() - ago_s, 3),
            network_bytes=self._last.network_bytes + since,
            own_bytes=self._last.own_bytes + since,
        )

    async def run(self) -> None:
        while True:
            self._restarted.clear()
            await self.sample()
            if self._watched.ready_container is None:
                await self._restarted.wait()
                continue
            try:
                async with asyncio.timeout(self._watched.until_sample_s):
                    await self._restarted.wait()
            except TimeoutError:
                pass

    async def sample(self) -> bool:
        """Take one sample; tell the instance when somebody used it since the one before.

        Returns:
            Whether the time since the sample before could be judged: no lease was open in it.
        """
        container = self._watched.ready_container
        if container is None:
            return False
        probing = self._watched.probe_bytes
        try:
            counters = await self._world.engine.counters(container.id)
        except EngineError:
            counters = None
        if self._watched.ready_container is not container:
            return False
        last, self._last = self._last, self._sample(counters)
        sample = self._last
        leased, self._leased = self._leased or self._watched.in_flight > 0, False
        unwatched, self._unwatched = self._unwatched, False
        if unwatched and not leased:
            self._watched.used()
        if last is None or leased or self._judged_from is None:
            self._judged_from = sample.at
        if last is None or leased:
            return False
        # A probe that was under way has moved bytes which are not counted as ours yet.
        allowance = max(probing, self._watched.probe_bytes)
        if was_used(last, replace(sample, own_bytes=sample.own_bytes + allowance)):
            self._watched.used()
        return True

    def _sample(self, counters: ContainerCounters | None) -> UsageSample:
        """The sample now. Counters that the engine does not tell stand still: the next ones catch up."""
        last = self._last
        own_bytes = self._watched.own_bytes
        if counters is None:
            counters = ContainerCounters(last.network_bytes, last.cpu_s) if last else ContainerCounters(0, 0)
            own_bytes = last.own_bytes if last else own_bytes
        return UsageSample(
            at=self._world.now(),
            network_bytes=counters.network_bytes,
            own_bytes=own_bytes,
            cpu_s=counters.cpu_s,
            expirations=tuple((model.name, model.expires_at) for model in self._watched.models),
        )
