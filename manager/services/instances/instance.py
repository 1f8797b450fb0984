"""The base of all instances: leases, probes, and a view for everyone else."""

from __future__ import annotations

import asyncio
import zlib
from abc import ABC, abstractmethod
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manager.domain.drained import why_out
from manager.domain.instance import (
    DeviceKind,
    Driver,
    Explanation,
    Health,
    InstanceSpec,
    Model,
    Phase,
    Target,
)
from manager.domain.target import Target as Place
from manager.errors import ConflictError, DrainedError, OutOfDescriptorsError, Reason, UnavailableError
from manager.services.instances.container_run import happens
from manager.services.instances.leases import Lease, LeaseBook
from manager.services.waiters import Waiters
from manager.wire.ollama import name_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from datetime import datetime

    from manager.domain.drained import Drained
    from manager.domain.gpu import NamedCard
    from manager.domain.image_override import ImageInForce
    from manager.domain.instance import ContainerFacts
    from manager.domain.start_progress import StartProgress
    from manager.services.gpus import Gpus
    from manager.services.ports import ProbeAnswer
    from manager.services.world import World
    from manager.wire.details import Details
    from manager.wire.head import Header


# A connection attempt or a request that is repeated a few times, with what acknowledges it.
_UNANSWERED_BYTES = 1500
# About what one probe moves, as long as none has been measured.
PROBE_BYTES = 4096
# The most that one answer of `/api/show` moves.
_SHOWN_BYTES = 2**20

_GRACE_PROBES = 3
_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class View:
    """One instance as everyone else sees it: a copy that nothing can be changed through.

    `cards` are those of its `device`, in that order; none for the CPU and for an external instance.
    """

    spec: InstanceSpec
    cards: tuple[NamedCard, ...]
    endpoint: str | None
    target: Target
    phase: Phase
    health: Health
    explanation: Explanation | None
    in_flight: int
    pinned: bool
    ttl_s: float
    ttl_remaining_s: float | None
    started_at: datetime | None
    ready_at: datetime | None
    last_used_at: datetime | None
    last_seen_at: datetime | None
    starts: int
    container: ContainerFacts | None
    template_hash: str | None
    models: tuple[Model, ...]
    available_models: tuple[str, ...] | None
    drained: Drained | None = None
    keeps_warm: bool = False
    image: ImageInForce | None = None
    start: StartProgress | None = None


@dataclass(frozen=True, slots=True)
class Effort:
    """The effort of an instance: processor time, and bytes of GPU memory."""

    cpu_s: float
    vram_bytes: int


def drained_error(instance: str, drained: Drained, now: datetime) -> DrainedError:
    """The error for callers that want an instance which is out of service to run."""
    return DrainedError(why_out(instance, drained), instance=instance, retry_after_s=drained.left_s(now))


class Instance(ABC):
    """One configured instance. Lives on the event loop; all its state belongs to it alone.

    Attributes:
        listed: the models on its volume as its server last listed them, None while it never did.
        listed_at: the monotonic time of that.
        version: the version that its server last told, None while it never did.
        memory_reads: how often its server has listed the models in memory.
        keeps_warm: a role keeps a model in its memory, so that it is not stopped for being idle.
    """

    def __init__(self, world: World, spec: InstanceSpec) -> None:
        self.spec = spec
        self.id = spec.id
        self._world = world
        self._leases = LeaseBook(spec.id, self._on_release, world.in_flight)
        self._place: Place | None = None
        self._health = Health.UNKNOWN
        self._health_issue: Explanation | None = None
        self._models: tuple[Model, ...] = ()
        self._available: tuple[str, ...] | None = None
        self.listed: tuple[Mapping[str, Any], ...] | None = None
        self.listed_at = float("-inf")
        self.version: str | None = None
        self._last_seen_at: datetime | None = None
        self._answered_at = float("-inf")
        self.own_bytes = 0
        self.probe_bytes = 0
        self._last_probe_bytes = 0
        self._tags_due = 0.0
        self._probing = asyncio.Lock()
        self._to_probe = asyncio.Event()
        self._drained: Drained | None = None
        self._quiet = Waiters()
        self._interruptible: set[asyncio.Timeout] = set()
        self.memory_reads = 0
        self.keeps_warm = False
        self._beat = zlib.crc32(spec.id.encode()) / 2**32

    @property
    def gpus(self) -> Gpus:
        """Return the cards that instances of its kind are on."""
        return self._world.gpus

    @abstractmethod
    async def run(self) -> None:
        """Do everything the instance does by itself, until cancelled."""

    @abstractmethod
    def view(self) -> View: ...

    @abstractmethod
    async def start(self, *, explicit: bool = True) -> bool:
        """Have it running and ready; False when it already was."""

    @abstractmethod
    async def stop(self, *, force: bool = False) -> bool:
        """Have it stopped; False when it already was."""

    def reconfigure(self, spec: InstanceSpec) -> None:
        """Take over a new configuration; driver, template, device and URL are the same as before."""
        self.spec = spec

    @property
    @abstractmethod
    def probed_endpoint(self) -> str | None:
        """The address for probes; None while there is nothing to probe."""

    @abstractmethod
    def usable_endpoint(self) -> str | None:
        """The address for leases; None while none may be given."""

    @abstractmethod
    def used(self) -> None:
        """The instance has been used until just now."""

    # --- out of service ---

    @property
    def drained(self) -> Drained | None:
        """The operator's order to keep it out of service, None where there is none."""
        return self._drained

    @property
    def ends(self) -> bool:
        """Return whether a stop goes on, or was requested."""
        return False

    @property
    def returns(self) -> bool:
        """Return whether it is started again once it is back in service."""
        return False

    def take_out(self, drained: Drained) -> None:
        """Give no leases any more; open ones go on, but for loads."""
        self._drained = drained
        self._interrupt()
        self._world.revision.advance()

    def bring_back(self) -> None:
        """Give leases again."""
        self._drained = None
        self._world.revision.advance()
        self._quiet.settle(ConflictError(f"{self.id} was put back in service", instance=self.id))

    async def out(self) -> None:
        """Wait until the open leases have ended, and the container too where it is to be stopped.

        Raises:
            ManagerError: it was put back in service, or the stop failed.
        """
        if self.in_flight:
            await self._quiet.outcome()

    @asynccontextmanager
    async def until_out(self) -> AsyncIterator[None]:
        """Cancel the work in it when the instance is taken out of service, or its stop is requested.

        For work that nobody loses an answer with, such as a load.

        Raises:
            UnavailableError: that has happened, with reason `cancelled`.
        """
        try:
            async with asyncio.timeout(0 if self.usable_endpoint() is None else None) as limit:
                self._interruptible.add(limit)
                try:
                    yield
                finally:
                    self._interruptible.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            raise UnavailableError(
                f"{self.id} is being stopped, or was taken out of service: the load was cancelled",
                reason=Reason.CANCELLED,
                instance=self.id,
            ) from None

    def _interrupt(self) -> None:
        now = asyncio.get_running_loop().time() if self._interruptible else 0.0
        for limit in self._interruptible:
            limit.reschedule(now)

    @property
    def headers(self) -> tuple[Header, ...]:
        """The headers of our own requests to its server."""
        return ()

    # --- leases ---

    async def lease(self) -> Lease:
        """Start the instance if need be and take a lease on it, atomically with the idle check.

        Whoever cancels this does not stop a start that others wait for.

        Raises:
            ManagerError: as `start`.
        """
        while (endpoint := self.usable_endpoint()) is None:
            await self.start(explicit=False)
        return self._grant(endpoint)

    def take_room_for(self, model: str) -> bool:
        """Reserve memory for a model that is to be loaded; False where it lacks, or has to be measured."""
        del model
        return True

    async def make_room_for(self, model: str) -> None:  # noqa: B027  (there is room wherever there is no card)
        """As `take_room_for`, with a bounded wait.

        Raises:
            UnavailableError: it cannot, with reason `vram_insufficient`.
        """

    def expect_on_cpu(self, model: str) -> None:  # noqa: B027  (only a GPU instance is judged by that)
        """A request asks for a model to be computed by the processor."""

    def try_lease(self) -> Lease | None:
        """A lease on the instance as it is, without waiting; None where it would have to be started."""
        endpoint = self.usable_endpoint()
        if endpoint is None:
            return None
        return self._grant(endpoint)

    def lease_elsewhere(self) -> Lease:
        """Count a lease that the daemon before this one has given, whatever state the instance is in."""
        return self._leases.grant(Place(self.id, ""))

    def _grant(self, endpoint: str) -> Lease:
        place = self._place
        if place is None or place.endpoint != endpoint:
            place = self._place = self._place_at(endpoint)
        return self._leases.grant(place)

    def _place_at(self, endpoint: str) -> Place:
        """Return what a lease leads to."""
        return Place(self.id, endpoint)

    async def effort(self) -> Effort | None:
        """The effort of the instance, as far as it can be told from outside."""
        return None

    @property
    def is_silent(self) -> bool:
        """Whether probes have gone unanswered for so long that requests should go elsewhere.

        One that is missed says little: the machine may have been busy with what the instance does.
        """
        issue = self._health_issue
        if self.spec.driver is Driver.SWARM and issue and issue.code is Reason.UPSTREAM_UNREACHABLE:
            return True  # its host is gone; what a server does is no reason for that
        grace_s = max(_GRACE_PROBES * self.spec.limits.probe_interval_s, _GRACE_S)
        return self._health is Health.UNHEALTHY and self._world.now() - self._answered_at > grace_s

    @property
    def is_probed(self) -> bool:
        """Whether a probe was answered or has failed since the last reset."""
        return self._health is not Health.UNKNOWN

    async def has_gone(self) -> bool:
        """Whether the server turns out to be gone on a closer look."""
        return False

    def read_models_soon(self) -> None:
        """Have the next probe read the list of models: the known one has turned out wrong."""
        self._tags_due = 0.0

    async def probe(self, *, tags: bool = False) -> None:
        """Ask the server how it is. Touches health and models only, never phase or use.

        Args:
            tags: read the list of its models too, even if that is not due.
        """
        async with self._probing:
            if tags:
                self._tags_due = 0.0
            endpoint = self.probed_endpoint
            if endpoint is not None:
                await self._ask(endpoint)

    async def _ask(self, endpoint: str) -> None:
        now = self._world.now()
        tags = now >= self._tags_due
        self.probe_bytes = self._last_probe_bytes or PROBE_BYTES
        try:
            answer = await self._asked(endpoint, tags=tags)
        except OutOfDescriptorsError:
            return  # the process's own lack says nothing about the server
        except UnavailableError as error:
            # A question without an answer moves bytes too, and again when the system repeats it.
            self.own_bytes += self._last_probe_bytes + _UNANSWERED_BYTES
            if self.probed_endpoint == endpoint:
                self._set_health(Health.UNHEALTHY, Explanation(error.reason, error.message))
            return
        finally:
            self.probe_bytes = 0
        self.own_bytes += answer.wire_bytes
        self._last_probe_bytes = max(self._last_probe_bytes, answer.wire_bytes)
        if self.probed_endpoint != endpoint:
            return  # it went away meanwhile: the answer is of the past
        self._last_seen_at = self._world.utcnow()
        self._answered_at = now
        self.version = answer.version or self.version
        if answer.loaded is not None:
            if [model.name for model in answer.loaded] != [model.name for model in self._models]:
                self._world.revision.advance()
            self._models = answer.loaded
            self.memory_reads += 1
        if answer.available is not None:
            self._available = tuple(map(name_of, answer.available))
            self.listed = answer.available
            self.listed_at = now
            self._tags_due = now + self.spec.limits.resync_interval_s
        self._set_health(Health.HEALTHY, None)
        await self._probed()

    async def _asked(self, endpoint: str, *, tags: bool) -> ProbeAnswer:
        """Return the answer to one probe.

        Raises:
            UnavailableError, OutOfDescriptorsError: as `Upstream.probe`.
        """
        return await self._world.upstream.probe(
            endpoint, timeout_s=self.spec.limits.probe_interval_s, tags=tags
        )

    async def show(self, model: str) -> Details | None:
        """Ask the server what a model can do; None where it does not say. That is a probe, too: no use.

        Raises:
            UnavailableError: it did not answer.
        """
        async with self._probing:
            endpoint = self.usable_endpoint()
            if endpoint is None:
                return None
            self.probe_bytes = _SHOWN_BYTES
            try:
                answer = await self._world.upstream.show(
                    endpoint, model, timeout_s=self.spec.limits.probe_interval_s, headers=self.headers
                )
            except UnavailableError:
                self.own_bytes += _SHOWN_BYTES  # some of it may have come
                raise
            finally:
                self.probe_bytes = 0
            self.own_bytes += answer.wire_bytes
            return answer.details

    async def _probed(self) -> None:  # noqa: B027  (most instances have nothing more to look at)
        """Called after each probe that was answered."""

    async def _probe_forever(self) -> None:
        """Probe once as soon as there is something to probe, and then in every interval."""
        while True:
            self._to_probe.clear()  # before the probe: a request that comes during it is not lost
            await self.probe()
            if self.probed_endpoint is None:
                await self._to_probe.wait()
            else:
                await happens(self._to_probe, self._until_beat_s(self.spec.limits.probe_interval_s))

    def _until_beat_s(self, interval_s: float) -> float:
        """Seconds until about the next of the moments that come once in every interval.

        Each instance has its own: many that were started together are not asked together for ever after.
        """
        left_s = (self._beat * interval_s - self._world.now()) % interval_s
        return left_s if left_s > interval_s / 4 else left_s + interval_s

    def _set_health(self, health: Health, issue: Explanation | None) -> None:
        if health is not self._health and not (self._health is Health.UNKNOWN and issue is None):
            self._world.journal.record(
                health.value,
                instance=self.id,
                reason=issue.code if issue else None,
                detail=issue.message if issue else "",
            )
        if health is not self._health:
            self._world.revision.advance()
        self._health = health
        self._health_issue = issue

    def _reset_health(self) -> None:
        self._world.revision.advance()
        self._world.server_changed(self.id)
        self._health = Health.UNKNOWN
        self._health_issue = None
        self._models = ()
        self._tags_due = 0.0
        self._answered_at = self._world.now()

    def _on_release(self) -> None:
        # As long as there are leases it is in use; their end is what an idle time begins with.
        if not self._leases.in_flight:
            self.used()
            self._quiet.settle()

    @property
    def health(self) -> Health:
        """Return what the last probe has shown."""
        return self._health

    @property
    def models(self) -> tuple[Model, ...]:
        return self._models

    @property
    def available_models(self) -> tuple[str, ...] | None:
        """The names of the models on its volume as it last listed them, None while it never did."""
        return self._available

    @property
    def in_flight(self) -> int:
        return self._leases.in_flight

    @property
    def is_gpu(self) -> bool:
        return self.spec.device_kind is DeviceKind.GPU
