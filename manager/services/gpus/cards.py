"""The cards: the last reading, the instance that each belongs to, and those that are lost."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from manager.domain.gpu import Gpu, bind_gpus, find_gpu, unmeasured
from manager.errors import GpuQueryError, Reason, RegistryUnwritableError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from manager.services.gpus.processes import Processes
    from manager.services.journal import Journal
    from manager.services.ports import GpuReader, Registry

# `details["nvml"]` of refusals after which no card can be used. The others may pass: a driver that hangs for
# a moment, or one whose library was updated under containers that go on with the old one.
_NO_CARD_WORKS: Final = frozenset({"driver_not_loaded", "library_missing", "gpu_lost", "reset_required"})


@dataclass(frozen=True, slots=True)
class GpuSnapshot:
    """The last reading. Cards that are lost stay listed, with unknown memory.

    `error` says why the driver gave no reading; `attempted` is False until the first try.
    """

    gpus: tuple[Gpu, ...] = ()
    error: GpuQueryError | None = None
    attempted: bool = False


@dataclass(frozen=True, slots=True)
class GpuTrouble:
    """Problems of the driver or of cards."""

    code: str
    message: str


class Cards:
    """Owns the readings, the bindings of instances to cards, and the set of lost cards.

    A card is lost when it answers that it is, when it is missing from a reading, or when the driver has gone
    after the card had been seen. A card that was never seen, for want of a driver, is not lost: the engine
    may know better.

    Args:
        processes: identifies the processes on the cards of each reading.
        journal: gets `gpu_lost` and `gpu_back`; None records nothing.
        selectors: GPU instances of the configuration -> `auto`, a UUID or a PCI bus id.
        taken_ids: every configured id; a card without an instance is given another one.
        auto: whether cards that no instance names get instances of their own.
    """

    def __init__(
        self,
        reader: GpuReader,
        processes: Processes,
        registry: Registry,
        journal: Journal | None,
        *,
        selectors: Mapping[str, str],
        taken_ids: Collection[str],
        auto: bool,
    ) -> None:
        self._reader = reader
        self._processes = processes
        self._registry = registry
        self._journal = journal
        self._selectors = dict(selectors)
        self._taken_ids = frozenset(taken_ids)
        self._auto = auto
        self._reading = asyncio.Lock()
        self._stored: dict[str, str] = {}
        self._explicit: dict[str, str] = {}
        self._seen: dict[str, Gpu] = {}  # by UUID: those of the last reading, and those of instances
        self._lost: dict[str, str] = {}  # UUID -> why
        self.snapshot = GpuSnapshot()

    async def load(self) -> None:
        """Read the bindings that earlier runs have stored."""
        self._stored = await self._registry.bindings()

    async def refresh(self) -> None:
        """Take a new reading and bind cards that are new. A failed reading becomes the snapshot's error."""
        async with self._reading:
            try:
                gpus = await self._reader.read()
            except GpuQueryError as error:
                self._take_refusal(error)
                return
            await self._processes.identify(gpus)
            await self._bind(gpus)
            self._take(gpus)  # in one step with the bindings: readers see both or neither

    def instance_ids(self) -> tuple[str, ...]:
        """The ids of the instances of cards that no configured instance names.

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
        """The UUID of the card that an instance is bound to, None while it is bound to none."""
        selector = self._selectors.get(instance, "auto")
        if selector.startswith(("GPU-", "MIG-")):
            return selector
        return self._explicit.get(instance) if selector != "auto" else self._stored.get(instance)

    def gpu_of(self, instance: str) -> Gpu | None:
        uuid = self.uuid_of(instance)
        return find_gpu(self.snapshot.gpus, uuid) if uuid else None

    def why_missing(self, instance: str) -> str | None:
        """The reason why the instance's card cannot be used; None when it can, or nobody can tell."""
        uuid = self.uuid_of(instance)
        if uuid is not None:
            return self._lost.get(uuid)
        error = self.snapshot.error
        selector = self._selectors.get(instance, "auto")
        wanted = "no free GPU was found" if selector == "auto" else f"GPU {selector} was not found"
        return f"{wanted}: {error.message}" if error else wanted

    @property
    def trouble(self) -> GpuTrouble | None:
        """The error of the driver, else the cards that are lost."""
        error = self.snapshot.error
        if error is not None:
            return GpuTrouble(str(error.details.get("nvml", error.code)), error.message)
        if self._lost:
            return GpuTrouble("gpu_lost", "; ".join(dict.fromkeys(self._lost.values())))
        return None

    # --- helpers ---

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
            # Every card has an instance already: those without a configured one give way.
            configured = {i: uuid for i, uuid in bound.items() if i in self._selectors}
            added |= bind_gpus(
                gpus, selectors=left, bindings=configured, taken_ids=self._taken_ids, auto=False
            )
        # A slot whose card has gone keeps that card's UUID, until another one is in it.
        self._explicit |= {i: uuid for i, uuid in added.items() if i in explicit}
        new = {i: uuid for i, uuid in added.items() if i not in explicit}
        if new:
            # Stored first: a binding that is lost in a crash could come out differently next time.
            try:
                await self._registry.add_bindings(new)
            except RegistryUnwritableError:
                return  # a full disk ends nothing: the next reading binds again
            self._stored |= new

    def _take(self, gpus: tuple[Gpu, ...]) -> None:
        bound = self._bound()
        present = {gpu.uuid: gpu for gpu in gpus}
        lost = {gpu.uuid: f"GPU {gpu.uuid} is lost: {gpu.lost}" for gpu in gpus if gpu.lost is not None}
        for uuid in bound.keys() - present.keys():
            lost[uuid] = self._lost.get(uuid) or f"GPU {uuid} is not in this machine (any more)"
        seen = {uuid: gpu for uuid, gpu in self._seen.items() if uuid in bound} | present
        self._publish(GpuSnapshot(attempted=True), seen, lost)

    def _take_refusal(self, error: GpuQueryError) -> None:
        lost = dict(self._lost)
        if error.details.get("nvml") in _NO_CARD_WORKS:
            for uuid in self._seen:
                lost.setdefault(uuid, f"GPU {uuid} cannot be used: {error.message}")
        seen = {uuid: unmeasured(gpu) for uuid, gpu in self._seen.items()}
        self._publish(GpuSnapshot(error=error, attempted=True), seen, lost)

    def _publish(self, snapshot: GpuSnapshot, seen: dict[str, Gpu], lost: dict[str, str]) -> None:
        listed = [
            replace(unmeasured(gpu), lost=lost[uuid]) if uuid in lost else gpu for uuid, gpu in seen.items()
        ]
        self.snapshot = replace(snapshot, gpus=tuple(sorted(listed, key=lambda gpu: gpu.index)))
        before, self._lost, self._seen = self._lost, lost, seen
        for uuid in [uuid for uuid in lost if uuid not in before and uuid in seen]:
            self._record("gpu_lost", uuid, Reason.GPU_MISSING, lost[uuid])
        for uuid in [uuid for uuid in before if uuid not in lost and uuid in seen]:
            self._record("gpu_back", uuid, None, f"GPU {uuid} can be used again")

    def _record(self, kind: str, uuid: str, reason: Reason | None, detail: str) -> None:
        """Record an event for each instance of a card, or one without an instance where there is none."""
        if self._journal is not None:
            for instance in self._bound().get(uuid) or (None,):
                self._journal.record(kind, instance=instance, reason=reason, detail=detail)

    def _bound(self) -> dict[str, list[str]]:
        """The instances of each card that has any, by the UUID of the card."""
        bound: defaultdict[str, list[str]] = defaultdict(list)
        for instance in (*self._selectors, *self.instance_ids()):
            if (uuid := self.uuid_of(instance)) is not None:
                bound[uuid].append(instance)
        return bound
