"""The cards, for instances: whether theirs is there, what they hold, and whether more fits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from manager.domain.gpu import Holder, Holding, gib, held_by, is_given_back, least_need, unattributed_bytes
from manager.domain.instance import Explanation
from manager.domain.models import model_key
from manager.errors import Reason, UnavailableError
from manager.services.gpus.admission import Admission, total
from manager.services.gpus.cards import Cards
from manager.services.gpus.learning import Learned
from manager.services.gpus.processes import Processes
from manager.wire.ollama import name_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from datetime import datetime
    from typing import Any

    from manager.domain.gpu import Gpu
    from manager.domain.instance import Model
    from manager.services.gpus.cards import GpuSnapshot, GpuTrouble
    from manager.services.journal import Journal
    from manager.services.ports import ContainerPids, GpuReader, Registry

_RECHECK_S = 0.25
# A reading older than this lets no load in: memory may have been taken since.
_FRESH_S = 0.25


@dataclass(frozen=True, slots=True)
class Need:
    """The memory of a model on cards. Only `measured` is all of it; the others are less than it takes.

    `basis` is `measured` on the instance itself, what its `server` says of it, which leaves out the memory of
    its process, the least that was measured `elsewhere`, or its `file`.
    """

    bytes: int
    basis: Literal["measured", "server", "elsewhere", "file"]


@dataclass(frozen=True, slots=True)
class Room:
    """The memory for a load on an instance: what it holds, which its server frees, and what its cards have.

    `rooms` are those of its cards: what is free, less what others were promised; None where it is unknown.
    """

    held_bytes: int
    rooms: tuple[int | None, ...]

    @property
    def bytes(self) -> int | None:
        """All of it together; None where it is unknown."""
        known = [room for room in self.rooms if room is not None]
        if not known or len(known) != len(self.rooms):
            return None
        return self.held_bytes + max(0, sum(room for room in known if room > 0))

    def fits(self, need: Need) -> bool | None:
        """Return whether a model fits whole; None where that is unknown."""
        room = self.bytes
        if room is None:
            return None
        if need.bytes > room:
            return False
        return True if need.basis == "measured" else None


class Gpus:
    """The cards, the processes on them, the promises of their memory, and the learned sizes.

    Args:
        selectors: GPU instances of the configuration -> their cards, as `Cards` takes them.
        taken_ids: every configured id; a card without an instance is given another one.
        auto: whether cards that no instance names get instances of their own.
        journal: gets the events of cards; None records nothing.
        place: as in `Cards`.
    """

    def __init__(
        self,
        reader: GpuReader,
        pids: ContainerPids,
        registry: Registry,
        *,
        selectors: Mapping[str, tuple[str, ...]],
        taken_ids: Collection[str],
        auto: bool,
        now: Callable[[], float],
        utcnow: Callable[[], datetime],
        journal: Journal | None = None,
        place: str = "in this machine",
    ) -> None:
        self._now = now
        self._processes = Processes(pids)
        self._cards = Cards(
            reader,
            self._processes,
            registry,
            journal,
            selectors=selectors,
            taken_ids=taken_ids,
            auto=auto,
            place=place,
        )
        self._learned = Learned(registry, utcnow=utcnow)
        self._told: dict[str, int] = {}  # by instance: what its server last said that its models take
        self._admission = Admission(self._cards, held=self.held, now=now, holders=self._told.keys)
        self._read_at = float("-inf")
        self._shortages: dict[str, tuple[int, Explanation]] = {}  # by instance: bytes needed, and the words
        self.name_cards = self._cards.name_cards
        self.instance_ids = self._cards.instance_ids
        self.cards_of = self._cards.cards_of
        self.uuids_of = self._cards.uuids_of
        self.wanted_uuids = self._cards.wanted_uuids
        self.wanted_usable = self._cards.wanted_usable
        self.note_given = self._cards.note_given
        self.gpu = self._cards.gpu
        self.why_missing = self._cards.why_missing
        self.reserved = self._admission.reserved
        self.note_container = self._processes.note_container
        self.forget_container = self._processes.forget_container
        self.instance_of = self._processes.instance_of

    async def load(self) -> None:
        """Read what earlier runs have stored, and the cards for the first time."""
        await self._cards.load()
        await self._learned.load()
        await self.refresh()

    async def refresh(self) -> None:
        """Take a new reading. A failed one becomes the snapshot's error."""
        await self._cards.refresh()
        self._read_at = self._now()
        self._admission.look()
        for instance, (needed, _) in list(self._shortages.items()):
            if self._lacks(instance, needed) == 0:
                del self._shortages[instance]

    @property
    def snapshot(self) -> GpuSnapshot:
        return self._cards.snapshot

    @property
    def read_at(self) -> float:
        """The monotonic time of the last reading, in seconds."""
        return self._read_at

    @property
    def trouble(self) -> GpuTrouble | None:
        """The error of the driver, else the cards that are lost, else those whose memory is not told."""
        return self._cards.trouble

    # --- what is held ---

    def holdings(self, instance: str) -> dict[str, Holding]:
        """Return the memory of the instance's processes on each of its cards, by the last reading."""
        return {gpu.uuid: self._holding(instance, gpu) for gpu in self._cards.gpus_of(instance)}

    def held(self, instance: str) -> dict[str, int | None]:
        """Return the bytes that the instance holds on each of its cards; None where that is unknown."""
        return {uuid: one.used_bytes for uuid, one in self.holdings(instance).items()}

    def held_bytes(self, instance: str) -> int | None:
        """Return the bytes that the instance holds on all its cards; None where that is unknown."""
        return total(self.held(instance))

    def _holding(self, instance: str, gpu: Gpu) -> Holding:
        if not gpu.lists_processes:
            return Holding(
                used_bytes=self._told_on_its_card(instance), unattributed_bytes=unattributed_bytes(gpu)
            )
        mine = [process for process in gpu.processes if self.instance_of(process.pid) == instance]
        known = [process.used_bytes for process in mine if process.used_bytes is not None]
        return Holding(
            pids=frozenset(process.pid for process in mine),
            used_bytes=sum(known) if len(known) == len(mine) else None,
            unattributed_bytes=unattributed_bytes(gpu),
        )

    def _told_on_its_card(self, instance: str) -> int | None:
        """Return what the server says that its models take; None where it is divided among several cards."""
        return self._told.get(instance) if len(self.uuids_of(instance)) == 1 else None

    def holds_memory(self, instance: str) -> bool | None:
        """Return whether a process of the instance holds memory on one of its cards, by the last reading.

        None where that cannot be told: the driver lists no processes, a card cannot be asked, or the
        processes of containers are not seen from the daemon's pid namespace.
        """
        uuids, gpus = self._cards.uuids_of(instance), self._cards.gpus_of(instance)
        if self.snapshot.error is not None:
            return None
        if any(self.instance_of(process.pid) == instance for gpu in gpus for process in gpu.processes):
            return True
        tell = bool(uuids) and len(gpus) == len(uuids) and all(gpu.lists_processes for gpu in gpus)
        tell = tell and self._processes.are_visible and self._processes.has_container(instance)
        return False if tell else None

    @property
    def holders_version(self) -> int:
        """Grows whenever `holders` may say something else of the same reading."""
        return self._processes.version

    def holders(self, gpu: Gpu) -> tuple[Holder, ...]:
        """The processes that hold memory on a card, with their names and instances."""
        return tuple(
            Holder(
                process.pid,
                self._processes.name_of(process.pid),
                self.instance_of(process.pid),
                process.used_bytes,
            )
            for process in gpu.processes
        )

    async def given_back(self, held: Mapping[str, Holding], wait_s: float) -> tuple[str, ...]:
        """Wait until what a stopped instance held is free again.

        Args:
            held: the `holdings` of the instance before it was stopped.
            wait_s: how long to wait.

        Returns:
            The UUIDs of the cards on which it was not free again within `wait_s`.
        """
        left = {uuid: one for uuid, one in held.items() if one.pids}
        deadline = self._now() + wait_s
        while left:
            await self.refresh()
            left = {
                uuid: one
                for uuid, one in left.items()
                if (gpu := self.gpu(uuid)) is not None and not is_given_back(gpu, one)
            }
            remaining = deadline - self._now()
            if remaining <= 0:
                break
            if left:
                await asyncio.sleep(min(_RECHECK_S, remaining))
        return tuple(left)

    async def learn(self, instance: str, models: Sequence[Model]) -> None:
        """Take in the models that an instance has in memory, after each probe.

        Where the processes on its card are not listed, what its server says of its models counts as what it
        holds: the memory of its process beside them is missing there.
        """
        self._told[instance] = sum(model.vram_bytes for model in models)
        if not await self._learned.measure(instance, models, self.held(instance)):
            return
        for model in models:
            self._admission.stands_still(instance, model_key(model.name))

    # --- starts ---

    def need_of(self, instance: str, limit: int | None) -> int:
        """Bytes that a start must find free: the template's own figure, else what its last model took.

        On an instance over several cards they are those of all its cards together.
        """
        if limit is not None:
            return limit
        learned = self._learned.of_start(instance, self.uuids_of(instance))
        return learned.vram_bytes if learned else 0

    def claim(self, instance: str, needed_bytes: int) -> None:
        """Set memory aside for an instance, whatever is free, until it ends."""
        learned = self._learned.of_start(instance, self.uuids_of(instance))
        self._admission.claim(instance, needed_bytes, learned.by_card if learned else {})

    async def admit(self, instance: str, *, needed_bytes: int, wait_s: float) -> None:
        """Claim memory on the instance's cards, waiting up to `wait_s` for it to become free.

        Raises:
            UnavailableError: it did not, with reason `vram_insufficient`.
        """
        if needed_bytes == 0:
            return
        lacks = partial(self._admission.lacking, instance, needed_bytes)
        lacking = await self._room(lacks, wait_s)
        if lacking:
            raise self._refusal(instance, f"{instance} needs", needed_bytes, lacking)
        self.claim(instance, needed_bytes)

    def drop_claim(self, instance: str) -> None:
        """The instance has ended: nothing is set aside for it."""
        self._told.pop(instance, None)
        self._admission.drop(instance)
        self._learned.forget_measurement(instance)
        self._shortages.pop(instance, None)

    # --- loads ---

    def take_room(self, instance: str, model: str, listed: Sequence[Mapping[str, Any]] | None = None) -> bool:
        """Reserve memory for a model that is to be loaded; False, and nothing reserved, where it lacks.

        False also where the last reading is too old to tell. What the instance holds itself is no obstacle:
        its server unloads models to make room for others.

        Args:
            instance: an instance that runs.
            model: the name of the model.
            listed: the models that its server has listed, which tell digest and size.
        """
        needed, likely = self._need_of_load(instance, model, listed)
        if needed and (self._now() - self._read_at > _FRESH_S or self._lacks(instance, needed)):
            return False
        self._reserve(instance, model, needed, likely)
        return True

    async def admit_load(
        self,
        instance: str,
        model: str,
        listed: Sequence[Mapping[str, Any]] | None = None,
        *,
        wait_s: float,
    ) -> None:
        """As `take_room`, waiting up to `wait_s` for memory to become free.

        Raises:
            UnavailableError: it did not, with reason `vram_insufficient`; the instance says so, too, until
                the model would fit.
        """
        needed, likely = self._need_of_load(instance, model, listed)
        if needed == 0:
            return
        lacking = await self._room(partial(self._lacks, instance, needed), wait_s)
        if lacking:
            refusal = self._refusal(instance, f"{model} on {instance} needs", needed, lacking)
            self._shortages[instance] = needed, Explanation(refusal.reason, refusal.message)
            raise refusal
        self._reserve(instance, model, needed, likely)

    def end_loads(self, instance: str) -> None:
        """No request is open at the instance: no load goes on there."""
        self._admission.end_loads(instance)

    def shortage(self, instance: str) -> Explanation | None:
        """The reason why the last load on an instance was refused, while it still holds."""
        known = self._shortages.get(instance)
        return known[1] if known else None

    # --- what would fit ---

    @property
    def learned_version(self) -> int:
        """Grows whenever `need` may say something else of the same model."""
        return self._learned.version

    def need(self, instance: str, model: str, entry: Mapping[str, Any]) -> Need | None:
        """Return the memory that a model takes on the cards of an instance, as far as that is known.

        Args:
            instance: the instance.
            model: the name of the model.
            entry: what its server lists of it.
        """
        digest, size = _digest_and_size(entry)
        known = self._learned.here(instance, model, digest, self.uuids_of(instance))
        if known is not None:
            return Need(known.vram_bytes, "measured" if self.measures(instance) else "server")
        if elsewhere := self._learned.elsewhere(digest):
            return Need(elsewhere, "elsewhere")
        return Need(size, "file") if size > 0 else None

    def measures(self, instance: str) -> bool:
        """Return whether what an instance holds is measured; else its server's word is taken for it."""
        return all(gpu.lists_processes for gpu in self._cards.gpus_of(instance))

    def room(self, instance: str) -> Room:
        """Return the memory that a load on an instance may take now; unknown where no reading tells it."""
        return self._room_of(instance, None)

    def rooms(self, instances: Iterable[str]) -> dict[str, Room]:
        """Return `room` of each of these instances."""
        sharers = self._admission.sharers()
        return {one: self._room_of(one, sharers) for one in instances}

    # --- helpers ---

    def _room_of(self, instance: str, sharers: Mapping[str, Sequence[str]] | None) -> Room:
        rooms = self._admission.rooms(instance, sharers)
        read = {gpu.uuid for gpu in self._cards.gpus_of(instance) if gpu.vram_free_bytes is not None}
        return Room(
            self.held_bytes(instance) or 0,
            tuple([room if uuid in read else None for uuid, room in rooms.items()]),
        )

    def _need_of_load(
        self, instance: str, model: str, listed: Sequence[Mapping[str, Any]] | None
    ) -> tuple[int, Mapping[str, int]]:
        """Return the bytes that a load needs in all, and those of each card as far as they were measured."""
        key = model_key(model)
        entry = next((one for one in listed or () if model_key(name_of(one)) == key), {})
        digest, size = _digest_and_size(entry)
        known = self._learned.here(instance, model, digest, self.uuids_of(instance))
        if known is not None:
            return known.vram_bytes, known.by_card
        gpus = self._cards.gpus_of(instance)
        likely = self._learned.elsewhere(digest) or size
        free = total({gpu.uuid: gpu.vram_free_bytes for gpu in gpus})
        used = total({gpu.uuid: gpu.vram_used_bytes for gpu in gpus})
        return least_need(likely_bytes=likely, free_bytes=free, used_bytes=used), {}

    def _lacks(self, instance: str, needed_bytes: int) -> int:
        more = needed_bytes - (self.held_bytes(instance) or 0)
        return self._admission.lacking(instance, more) if more > 0 else 0

    def _reserve(self, instance: str, model: str, needed_bytes: int, likely: Mapping[str, int]) -> None:
        self._shortages.pop(instance, None)
        if needed_bytes:
            self._admission.reserve(instance, model_key(model), needed_bytes, likely)

    async def _room(self, lacks: Callable[[], int], wait_s: float) -> int:
        """Wait up to `wait_s` until nothing is lacking. Return what is lacking then; it was just measured."""
        deadline = self._now() + wait_s
        while True:
            await self.refresh()
            lacking = lacks()
            remaining = deadline - self._now()
            if lacking == 0 or remaining <= 0:
                return lacking
            await asyncio.sleep(min(_RECHECK_S, remaining))

    def _refusal(self, instance: str, who_needs: str, needed: int, lacking: int) -> UnavailableError:
        gpus = self._cards.gpus_of(instance)
        holders = [holder for gpu in gpus for holder in self.holders(gpu)]
        reserved = self._admission.reserved_for_others(instance)
        reserved_bytes = sum(reserved[gpu.uuid] for gpu in gpus)
        words = [f"{who_needs} {gib(needed)} of GPU memory, {gib(lacking)} more than are free"]
        if len(gpus) > 1:
            free = [f"{gpu.uuid} {gib(gpu.vram_free_bytes or 0)}" for gpu in gpus]
            words.append(f"free on its cards: {', '.join(free)}")
        if holders:
            words.append(f"held by {held_by(holders)}")
        if reserved_bytes:
            words.append(f"{gib(reserved_bytes)} are reserved for other instances")
        return UnavailableError(
            "; ".join(words),
            reason=Reason.VRAM_INSUFFICIENT,
            instance=instance,
            details={
                "needed_bytes": needed,
                "lacking_bytes": lacking,
                "reserved_bytes": reserved_bytes,
                "vram_free_bytes": total({gpu.uuid: gpu.vram_free_bytes for gpu in gpus}) if gpus else None,
                "cards": [
                    {
                        "uuid": gpu.uuid,
                        "vram_free_bytes": gpu.vram_free_bytes,
                        "reserved_bytes": reserved[gpu.uuid],
                    }
                    for gpu in gpus
                ],
                "holders": [
                    {"pid": it.pid, "name": it.name, "instance": it.instance, "used_bytes": it.used_bytes}
                    for it in holders
                ],
            },
            retry_after_s=10,
        )


def _digest_and_size(entry: Mapping[str, Any]) -> tuple[str | None, int]:
    """Return what a server lists of a model; the size is 0 where it does not say it."""
    digest, size = entry.get("digest"), entry.get("size")
    return digest if isinstance(digest, str) else None, size if isinstance(size, int) else 0
