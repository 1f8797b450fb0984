"""The cards: the last reading, the instance that each belongs to, and those that are lost."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from manager.domain.gpu import (
    ALL,
    AUTO,
    Gpu,
    NamedCard,
    bind_gpus,
    cards_in_slots,
    in_bus_order,
    is_uuid,
    unknown_memory,
    unmeasured,
    why_not_together,
)
from manager.errors import GpuQueryError, Reason, RegistryUnwritableError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from manager.services.gpus.processes import Processes
    from manager.services.journal import Journal
    from manager.services.ports import GpuReader, Registry

# `details["nvml"]` of refusals after which no card can be used. The others may pass: a driver that hangs for
# a moment, or one whose library was updated under containers that go on with the old one.
_NO_CARD_WORKS: Final = frozenset({"driver_not_loaded", "library_missing", "gpu_lost", "reset_required"})
# Slices that are made and removed again have a new UUID each time: the oldest are forgotten.
_MOST_GONE: Final = 256


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

    An instance with `device: all` has every card that was seen since the daemon began, and a lost one stays
    among them: it never gets fewer cards silently. While its container runs, it has the cards that this one
    was made with.

    Args:
        processes: identifies the processes on the cards of each reading.
        journal: gets `gpu_lost` and `gpu_back`; None records nothing.
        selectors: GPU instances of the configuration -> `auto`, or `all`, or one or several cards, each by
            UUID or PCI bus id.
        taken_ids: every configured id; a card without an instance is given another one.
        auto: whether cards that no instance names get instances of their own.
        place: says of a card that is missing where it is not.
    """

    def __init__(
        self,
        reader: GpuReader,
        processes: Processes,
        registry: Registry,
        journal: Journal | None,
        *,
        selectors: Mapping[str, tuple[str, ...]],
        taken_ids: Collection[str],
        auto: bool,
        place: str = "in this machine",
    ) -> None:
        self._place = place
        self._reader = reader
        self._processes = processes
        self._registry = registry
        self._journal = journal
        self._selectors = dict(selectors)
        self._taken_ids = frozenset(taken_ids)
        # With `all`, each card has an instance.
        self._auto = auto and (ALL,) not in self._selectors.values()
        self._reading = asyncio.Lock()
        self._stored: dict[str, str] = {}
        self._slots: dict[str, str] = {}  # by the name of the slot: the card that was last in it
        self._given: dict[str, tuple[str, ...]] = {}  # by instance with `all`: the cards of its container
        self._seen: dict[str, Gpu] = {}  # by UUID: those of the last reading, and those of instances
        self._lost: dict[str, str] = {}  # UUID -> why
        self._all: tuple[NamedCard, ...] = ()
        self._by_uuid: dict[str, Gpu] = {}
        self.snapshot = GpuSnapshot()

    async def load(self) -> None:
        """Read the bindings that earlier runs have stored."""
        stored = await self._registry.bindings()
        # Those of the nodes of a swarm are not of this machine.
        self._stored = {id_: uuid for id_, uuid in stored.items() if ":" not in id_}

    def name_cards(self, instance: str, uuids: tuple[str, ...]) -> None:
        """Give cards to an instance that no configuration names."""
        self._selectors[instance] = uuids

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
        named = {uuid for instance in self._selectors for uuid in self.uuids_of(instance)}
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

    def cards_of(self, instance: str) -> tuple[NamedCard, ...]:
        """Return the cards of an instance, those that were never seen too, in the order of its `device`.

        There are none where any card would do and none was found.
        """
        given = self._given.get(instance)
        if given is None:
            return self._wanted(instance)
        return tuple(NamedCard(uuid, uuid) for uuid in given)

    def uuids_of(self, instance: str) -> tuple[str, ...]:
        """Return the UUIDs of the instance's cards, as far as they are known, each once."""
        return tuple(dict.fromkeys([card.uuid for card in self.cards_of(instance) if card.uuid is not None]))

    def wanted_uuids(self, instance: str) -> tuple[str, ...]:
        """Return the UUIDs for a new container of the instance; none while one of them is not known."""
        uuids = [card.uuid for card in self._wanted(instance)]
        known = [uuid for uuid in uuids if uuid is not None]
        return tuple(known) if len(known) == len(uuids) else ()

    def wanted_usable(self, instance: str) -> tuple[str, ...]:
        """Return `wanted_uuids`; none where one of the cards is lost, or they do not go together."""
        uuids = self.wanted_uuids(instance)
        is_usable = not self._lost.keys() & set(uuids) and why_not_together(self._wanted(instance)) is None
        return uuids if is_usable else ()

    def note_given(self, instance: str, uuids: tuple[str, ...]) -> None:
        """Take in the cards of the container of an instance that runs; none when it runs no more."""
        if self._selectors.get(instance) == (ALL,) and uuids:
            self._given[instance] = uuids
        else:
            self._given.pop(instance, None)

    def gpu(self, uuid: str) -> Gpu | None:
        """Return the last reading of a card."""
        return self._by_uuid.get(uuid)

    def gpus_of(self, instance: str) -> tuple[Gpu, ...]:
        """Return the last readings of the instance's cards, without those that were never seen."""
        found = map(self.gpu, self.uuids_of(instance))
        return tuple([gpu for gpu in found if gpu is not None])

    def why_missing(self, instance: str) -> str | None:
        """Return the reason why a card of the instance cannot be used; None if all can, or it is unknown."""
        cards = self.cards_of(instance)
        error = self.snapshot.error
        whys = [self._lost[card.uuid] for card in cards if card.uuid is not None and card.uuid in self._lost]
        unknown = [f"GPU {card.selector} was not found" for card in cards if card.uuid is None]
        if not cards:
            is_auto = self._selectors.get(instance, (AUTO,)) == (AUTO,)
            unknown = ["no free GPU was found" if is_auto else "no GPU was found"]
        whys += [f"{why}: {error.message}" if error else why for why in unknown]
        return "; ".join(dict.fromkeys(whys)) or why_not_together(cards)

    @property
    def trouble(self) -> GpuTrouble | None:
        """The error of the driver, else the cards that are lost, else those whose memory is not told."""
        error = self.snapshot.error
        if error is not None:
            return GpuTrouble(str(error.details.get("nvml", error.code)), error.message)
        if self._lost:
            return GpuTrouble("gpu_lost", "; ".join(dict.fromkeys(self._lost.values())))
        unknown = unknown_memory(self.snapshot.gpus)
        return None if unknown is None else GpuTrouble("vram_unknown", unknown)

    # --- helpers ---

    def _wanted(self, instance: str) -> tuple[NamedCard, ...]:
        """Return the cards that the configuration gives to an instance."""
        selectors = self._selectors.get(instance, (AUTO,))
        if selectors == (AUTO,):
            uuid = self._stored.get(instance)
            return () if uuid is None else (NamedCard(AUTO, uuid),)
        if selectors == (ALL,):
            return self._all
        return tuple([NamedCard(one, one if is_uuid(one) else self._slots.get(one)) for one in selectors])

    async def _bind(self, gpus: tuple[Gpu, ...]) -> None:
        # A slot whose card has gone keeps that card's UUID, until another one is in it.
        named = dict.fromkeys(one for selectors in self._selectors.values() for one in selectors)
        self._slots |= cards_in_slots(gpus, named)
        uuids = {one if is_uuid(one) else self._slots.get(one, one) for one in named}
        automatic = [i for i, selectors in self._selectors.items() if selectors == (AUTO,)]
        bindings = {i: uuid for i, uuid in self._stored.items() if i in automatic or i not in self._selectors}
        added = bind_gpus(
            gpus,
            automatic=automatic,
            named=uuids,
            bindings=bindings,
            taken_ids=self._taken_ids,
            auto=self._auto,
        )
        left = [i for i in automatic if i not in bindings | added]
        if left:
            # Every card has an instance already: those without a configured one give way.
            configured = {i: uuid for i, uuid in (bindings | added).items() if i in automatic}
            added |= bind_gpus(
                gpus,
                automatic=left,
                named=uuids,
                bindings=configured,
                taken_ids=self._taken_ids,
                auto=False,
            )
        if added:
            # Stored first: a binding that is lost in a crash could come out differently next time.
            try:
                await self._registry.add_bindings(added)
            except RegistryUnwritableError:
                return  # a full disk ends nothing: the next reading binds again
            self._stored |= added

    def _take(self, gpus: tuple[Gpu, ...]) -> None:
        bound = self._bound()
        present = {gpu.uuid: gpu for gpu in gpus}
        lost = {gpu.uuid: f"GPU {gpu.uuid} is lost: {gpu.lost}" for gpu in gpus if gpu.lost is not None}
        for uuid in bound.keys() - present.keys():
            lost[uuid] = self._lost.get(uuid) or self._why_gone(uuid)
        gone = [uuid for uuid in self._seen if uuid in bound and uuid not in present][-_MOST_GONE:]
        seen = {uuid: self._seen[uuid] for uuid in gone} | present
        self._publish(GpuSnapshot(attempted=True), seen, lost)

    def _why_gone(self, uuid: str) -> str:
        known = self._seen.get(uuid)
        if known is not None and known.host is not None:
            return f"GPU {uuid} is not advertised by {known.host} (any more)"
        return f"GPU {uuid} is not {self._place} (any more)"

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
        self.snapshot = replace(
            snapshot, gpus=tuple(sorted(listed, key=lambda gpu: (gpu.host or "", gpu.index)))
        )
        self._by_uuid = {gpu.uuid: gpu for gpu in listed}
        self._all = tuple([NamedCard(gpu.uuid, gpu.uuid) for gpu in in_bus_order(listed)])
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
            wanted = [card.uuid for card in self._wanted(instance)]
            for uuid in dict.fromkeys([*self.uuids_of(instance), *wanted]):
                if uuid is not None:
                    bound[uuid].append(instance)
        return bound
