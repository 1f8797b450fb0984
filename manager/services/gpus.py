"""The cards: what is on them, which instance each belongs to, and whether one more start fits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from manager.domain.gpu import Claim, Gpu, bind_gpus, find_gpu, missing_bytes
from manager.domain.models import model_key
from manager.domain.registry import LearnedSize
from manager.errors import GpuQueryError, Reason, RegistryUnwritableError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from datetime import datetime

    from manager.domain.instance import Model
    from manager.services.ports import ContainerPids, GpuReader, Registry

_RECHECK_S = 0.25
# A measurement moves a little from load to load; only a real difference is worth a write.
_LEARN_TOLERANCE = 0.05
# What a driver keeps for itself after a process has gone may be a little more than before.
_GIVEN_BACK_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class GpuSnapshot:
    """The last reading. `error` says why there is none; `attempted` is False until the first try."""

    gpus: tuple[Gpu, ...] = ()
    error: GpuQueryError | None = None
    attempted: bool = False


@dataclass(frozen=True, slots=True)
class Holding:
    """What an instance's processes hold on its card; bytes are None where the driver will not say."""

    pids: frozenset[int]
    used_bytes: int | None


class Gpus:
    """Owns the readings, the bindings of instances to cards, the claims on their memory, what was learned.

    Args:
        selectors: GPU instances of the configuration -> `auto`, a UUID or a PCI bus id.
        taken_ids: every configured id; a card found by itself gets another one.
        auto: whether cards that no instance names get instances of their own.
    """

    def __init__(
        self,
        reader: GpuReader,
        pids: ContainerPids,
        registry: Registry,
        *,
        selectors: Mapping[str, str],
        taken_ids: Collection[str],
        auto: bool,
        now: Callable[[], float],
        utcnow: Callable[[], datetime],
    ) -> None:
        self._reader = reader
        self._pids = pids
        self._registry = registry
        self._selectors = dict(selectors)
        self._taken_ids = frozenset(taken_ids)
        self._auto = auto
        self._now = now
        self._utcnow = utcnow
        self._reading = asyncio.Lock()
        self._stored: dict[str, str] = {}
        self._explicit: dict[str, str] = {}
        self._claims: dict[str, int] = {}
        self._containers: dict[str, str] = {}
        self._learned: dict[tuple[str, str, str], LearnedSize] = {}
        self.snapshot = GpuSnapshot()

    async def load(self) -> None:
        """Read what earlier runs have stored, and the cards for the first time."""
        self._stored = await self._registry.bindings()
        self._learned = {(s.instance, s.model, s.digest): s for s in await self._registry.learned_sizes()}
        await self.refresh()

    async def refresh(self) -> None:
        """Take a new reading and bind cards that are new. A failed reading becomes the snapshot's error."""
        async with self._reading:
            try:
                gpus = await self._reader.read()
            except GpuQueryError as error:
                self.snapshot = GpuSnapshot(error=error, attempted=True)
                return
            await self._bind(gpus)
            self.snapshot = GpuSnapshot(gpus=gpus, attempted=True)

    def instance_ids(self) -> tuple[str, ...]:
        """The ids of the instances that cards were given to by themselves.

        A card that a configured instance has by now has no second instance of its own.
        """
        if not self._auto:
            return ()
        named = {self.uuid_of(instance) for instance in self._selectors}
        return tuple(
            sorted(
                (
                    id_
                    for id_, uuid in self._stored.items()
                    if id_ not in self._taken_ids and uuid not in named
                ),
                key=lambda id_: (len(id_), id_),  # gpu2 before gpu10
            )
        )

    def uuid_of(self, instance: str) -> str | None:
        """The UUID of the card an instance is bound to, None while it is bound to none."""
        selector = self._selectors.get(instance, "auto")
        if selector.startswith(("GPU-", "MIG-")):
            return selector
        return self._explicit.get(instance) if selector != "auto" else self._stored.get(instance)

    def gpu_of(self, instance: str) -> Gpu | None:
        uuid = self.uuid_of(instance)
        return find_gpu(self.snapshot.gpus, uuid) if uuid else None

    def why_missing(self, instance: str) -> str | None:
        """Why the instance's card cannot be used, None when it can, or when nobody can tell."""
        uuid = self.uuid_of(instance)
        error = self.snapshot.error
        if uuid is None:
            selector = self._selectors.get(instance, "auto")
            wanted = "no free GPU was found" if selector == "auto" else f"GPU {selector} was not found"
            return f"{wanted}: {error.message}" if error else wanted
        if error is None and self.snapshot.attempted and find_gpu(self.snapshot.gpus, uuid) is None:
            return f"GPU {uuid} is not in this machine (any more)"
        return None

    def note_container(self, container_id: str, instance: str) -> None:
        """Remember whose container it is, to tell whose the processes on a card are."""
        self._containers[container_id] = instance

    def forget_container(self, container_id: str) -> None:
        self._containers.pop(container_id, None)

    def instance_of(self, pid: int) -> str | None:
        container = self._pids.container_of(pid)
        return self._containers.get(container) if container else None

    def holding(self, instance: str) -> Holding:
        """What the instance's processes hold on its card, by the last reading."""
        gpu = self.gpu_of(instance)
        mine = [p for p in gpu.processes if self.instance_of(p.pid) == instance] if gpu else []
        known = [p.used_bytes for p in mine if p.used_bytes is not None]
        return Holding(
            pids=frozenset(p.pid for p in mine),
            used_bytes=sum(known) if len(known) == len(mine) else None,
        )

    def need_of(self, instance: str, limit: int | None) -> int:
        """Bytes a start must find free: the template's own figure, else what its last model really took."""
        if limit is not None:
            return limit
        sizes = [size for size in self._learned.values() if size.instance == instance]
        return max(sizes, key=lambda size: size.measured_at).vram_bytes if sizes else 0

    async def admit(self, instance: str, *, needed_bytes: int, wait_s: float) -> None:
        """Claim memory on the instance's card, waiting up to `wait_s` for it to become free.

        Raises:
            UnavailableError: it did not, with reason `vram_insufficient`.
        """
        if needed_bytes == 0:
            return
        await self._wait_for_room(
            instance, needed_bytes, lambda: self._lacking(instance, needed_bytes), wait_s
        )
        self.claim(instance, needed_bytes)

    def load_lacks(self, instance: str, model: str) -> int:
        """Bytes that are missing to load a model on an instance that runs; 0 where nobody can tell.

        What the instance holds itself is no obstacle: its server unloads models to make room for others.
        """
        needed = self._learned_need(instance, model)
        if needed == 0:
            return 0
        return self._lacking(instance, max(0, needed - (self.holding(instance).used_bytes or 0)))

    async def admit_load(self, instance: str, model: str, *, wait_s: float) -> None:
        """Wait up to `wait_s` until a model can be loaded on an instance that runs.

        Raises:
            UnavailableError: it cannot, with reason `vram_insufficient`.
        """
        needed = self._learned_need(instance, model)
        if needed:
            await self._wait_for_room(instance, needed, partial(self.load_lacks, instance, model), wait_s)

    def _learned_need(self, instance: str, model: str) -> int:
        key = model_key(model)
        sizes = [
            size
            for size in self._learned.values()
            if size.instance == instance and model_key(size.model) == key
        ]
        return max(sizes, key=lambda size: size.measured_at).vram_bytes if sizes else 0

    async def _wait_for_room(
        self, instance: str, needed_bytes: int, lacks: Callable[[], int], wait_s: float
    ) -> None:
        deadline = self._now() + wait_s
        while True:
            await self.refresh()
            lacking = lacks()
            if lacking == 0:
                return
            remaining = deadline - self._now()
            if remaining <= 0:
                gpu = self.gpu_of(instance)
                raise UnavailableError(
                    f"{instance} needs {needed_bytes} bytes of GPU memory, {lacking} more than are free",
                    reason=Reason.VRAM_INSUFFICIENT,
                    instance=instance,
                    details={
                        "needed_bytes": needed_bytes,
                        "lacking_bytes": lacking,
                        "vram_free_bytes": gpu.vram_free_bytes if gpu else None,
                    },
                    retry_after_s=10,
                )
            await asyncio.sleep(min(_RECHECK_S, remaining))

    def claim(self, instance: str, needed_bytes: int) -> None:
        """Set memory aside for an instance that runs already, whatever is free."""
        if needed_bytes:
            self._claims[instance] = needed_bytes

    def drop_claim(self, instance: str) -> None:
        self._claims.pop(instance, None)

    async def given_back(self, instance: str, held: Holding, used_before: int | None, wait_s: float) -> bool:
        """Wait until what a stopped instance held is really free; False when `wait_s` was not enough."""
        if not held.pids:
            return True
        deadline = self._now() + wait_s
        while True:
            await self.refresh()
            gpu = self.gpu_of(instance)
            if gpu is None or self._is_given_back(gpu, held, used_before):
                return True
            remaining = deadline - self._now()
            if remaining <= 0:
                return False
            await asyncio.sleep(min(_RECHECK_S, remaining))

    async def learn(self, instance: str, models: Sequence[Model]) -> None:
        """Remember what a model really takes: measurable when it is the only one in memory."""
        held = self.holding(instance)
        if len(models) != 1 or models[0].vram_bytes == 0 or not held.used_bytes:
            return
        model = models[0]
        known = self._learned.get((instance, model.name, model.digest))
        if known and abs(known.vram_bytes - held.used_bytes) <= _LEARN_TOLERANCE * known.vram_bytes:
            return
        size = LearnedSize(instance, model.name, model.digest, held.used_bytes, self._utcnow())
        self._learned[instance, model.name, model.digest] = size
        try:
            await self._registry.save_learned_size(size)
        except RegistryUnwritableError:
            return  # known in memory; the next different measurement is stored again

    async def _bind(self, gpus: tuple[Gpu, ...]) -> None:
        explicit = {i for i, selector in self._selectors.items() if selector != "auto"}
        bindings = {i: uuid for i, uuid in self._stored.items() if i not in explicit}
        added = bind_gpus(
            gpus,
            selectors=self._selectors,
            bindings=bindings,
            taken_ids=self._taken_ids,
            auto=self._auto,
        )
        bound = bindings | added
        left = {i: selector for i, selector in self._selectors.items() if i not in bound}
        if left:
            # Every card has an instance already: those that were found by themselves give way.
            configured = {i: uuid for i, uuid in bound.items() if i in self._selectors}
            added |= bind_gpus(
                gpus, selectors=left, bindings=configured, taken_ids=self._taken_ids, auto=False
            )
        self._explicit = {i: uuid for i, uuid in added.items() if i in explicit}
        new = {i: uuid for i, uuid in added.items() if i not in explicit}
        if new:
            # Stored first: a binding that is lost in a crash could come out differently next time.
            try:
                await self._registry.add_bindings(new)
            except RegistryUnwritableError:
                return  # a full disk ends nothing: the next reading binds again
            self._stored |= new

    def _lacking(self, instance: str, needed_bytes: int) -> int:
        uuid = self.uuid_of(instance)
        gpu = self.gpu_of(instance)
        others = [
            Claim(needed_bytes=claim, used_bytes=self.holding(other).used_bytes or 0)
            for other, claim in self._claims.items()
            if other != instance and self.uuid_of(other) == uuid
        ]
        free = gpu.vram_free_bytes if gpu else None
        return missing_bytes(free_bytes=free, needed_bytes=needed_bytes, claims=others)

    @staticmethod
    def _is_given_back(gpu: Gpu, held: Holding, used_before: int | None) -> bool:
        if held.pids & {process.pid for process in gpu.processes}:
            return False
        if used_before is None or gpu.vram_used_bytes is None or held.used_bytes is None:
            return True
        return gpu.vram_used_bytes <= used_before - _GIVEN_BACK_SHARE * held.used_bytes
