"""Graphics cards: what NVML reports, which instance each belongs to, and what still fits on one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from datetime import datetime

_GIB = 2**30
# Measurements of one load differ a little; a smaller difference is no news.
_TOLERANCE = 0.05
# A smaller measurement replaces a larger one after this time: the larger one may have had a larger context.
_REMEMBERED_S = 7 * 24 * 3600.0
# After a process has ended the driver may keep a little of its memory.
_KEPT_SHARE = 0.1
# A model beyond this share of a card is split between the card and the processor.
_WHOLE_SHARE = 0.9
_MOST_HOLDERS = 5

# Words of `device` beside the names of cards: a free card, and all cards together.
AUTO = "auto"
ALL = "all"
SLICE = "MIG-"  # what the UUID of a slice of a card begins with
_UUIDS = ("GPU-", SLICE)


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory on a card; `used_bytes` is None where the driver will not say."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card, or one MIG slice of a card, as NVML last described it. Memory in bytes, None = unknown.

    The sensors move all the time and decide nothing: cards that differ in them alone are equal.

    Attributes:
        processes: those that hold memory on it.
        lists_processes: whether the driver lists them at all.
        lost: why the card cannot be used, None when it can.
        host: the name of the other machine that it is in; None: it is in the daemon's own.
        why_unknown: why its memory is unknown, where more can be said than that the driver does not tell.
        utilisation_percent: the share of the last sampling period in which a kernel ran, 0 to 100.
        temperature_c: of the chip; that of a slice is its card's.
        power_watts: what the whole board draws.
        power_limit_watts: what it may draw.
    """

    uuid: str
    index: int
    pci_bus_id: str
    name: str
    vram_total_bytes: int | None
    vram_used_bytes: int | None
    vram_free_bytes: int | None
    processes: tuple[GpuProcess, ...] = ()
    lists_processes: bool = True
    lost: str | None = None
    host: str | None = None
    why_unknown: str | None = None
    utilisation_percent: int | None = field(default=None, compare=False)
    temperature_c: int | None = field(default=None, compare=False)
    power_watts: float | None = field(default=None, compare=False)
    power_limit_watts: float | None = field(default=None, compare=False)

    @property
    def sensors(self) -> tuple[float | None, ...]:
        """The readings that `==` leaves out."""
        return self.utilisation_percent, self.temperature_c, self.power_watts, self.power_limit_watts


@dataclass(frozen=True, slots=True)
class NamedCard:
    """A card of an instance: its name in `device`, and its UUID, None while that is not known."""

    selector: str
    uuid: str | None


@dataclass(frozen=True, slots=True)
class Holding:
    """The memory of an instance's processes on one card.

    Attributes:
        pids: its processes.
        used_bytes: None where the driver does not tell.
        unattributed_bytes: what is in use on the card and belongs to no listed process, None if unknown.
    """

    pids: frozenset[int] = frozenset()
    used_bytes: int | None = 0
    unattributed_bytes: int | None = None


def unmeasured(gpu: Gpu) -> Gpu:
    """The card as it was identified, with nothing known of its memory and its sensors."""
    return replace(
        gpu,
        vram_total_bytes=None,
        vram_used_bytes=None,
        vram_free_bytes=None,
        processes=(),
        lists_processes=False,
        why_unknown=None,
        utilisation_percent=None,
        temperature_c=None,
        power_watts=None,
        power_limit_watts=None,
    )


_PCI = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-9a-f]{2})\.([0-7])", re.IGNORECASE)


def normal_pci(text: str) -> str | None:
    """A PCI bus id in one spelling, `00000000:01:00.0`; None when `text` is not one."""
    match = _PCI.fullmatch(text.strip())
    if match is None:
        return None
    domain = int(match[1] or "0", 16)
    return f"{domain:08x}:{match[2]}:{match[3]}.{match[4]}".lower()


def find_gpu(gpus: Iterable[Gpu], selector: str) -> Gpu | None:
    """The card that a UUID or a PCI bus id names; a PCI bus id names no card of another machine."""
    pci = normal_pci(selector)
    for gpu in gpus:
        is_in_slot = pci is not None and gpu.host is None and normal_pci(gpu.pci_bus_id) == pci
        if is_in_slot or gpu.uuid == selector:
            return gpu
    return None


def is_uuid(selector: str) -> bool:
    """Return whether a selector is the UUID of a card or a slice."""
    return selector.startswith(_UUIDS)


def in_bus_order(gpus: Iterable[Gpu]) -> list[Gpu]:
    """Return the cards in the order of their PCI bus ids: NVML's own order may change at a reboot.

    Those of other machines come after the daemon's own, by machine.
    """
    return sorted(
        gpus, key=lambda gpu: (gpu.host or "", normal_pci(gpu.pci_bus_id) or gpu.pci_bus_id, gpu.uuid)
    )


def cards_in_slots(gpus: Sequence[Gpu], selectors: Iterable[str]) -> dict[str, str]:
    """Return the UUID of the card in each slot that a selector names and that is not empty."""
    present = in_bus_order(gpus)
    found = {
        selector: find_gpu(present, selector)
        for selector in selectors
        if not is_uuid(selector) and selector not in (AUTO, ALL)
    }
    return {selector: gpu.uuid for selector, gpu in found.items() if gpu is not None}


def bind_gpus(
    gpus: Sequence[Gpu],
    *,
    automatic: Iterable[str],
    named: Collection[str],
    bindings: Mapping[str, str],
    taken_ids: Collection[str],
    auto: bool,
) -> dict[str, str]:
    """Return the bindings that have to be added: instance id -> UUID. What is bound stays bound for good.

    Args:
        gpus: the cards that are there now.
        automatic: the configured instances with `device: auto`, in order of configuration.
        named: the UUIDs of cards that instances name, alone or among others; nobody else gets one of them.
        bindings: what was bound before, of any age.
        taken_ids: ids that a new card must not get (every configured id).
        auto: whether cards that nobody names get instances gpu0, gpu1, … of their own.
    """
    present = in_bus_order(gpus)
    added: dict[str, str] = {}
    spoken_for = {*bindings.values(), *named}
    for instance_id in automatic:
        if instance_id in bindings:
            continue
        free = [gpu for gpu in present if gpu.uuid not in spoken_for]
        if free:
            added[instance_id] = free[0].uuid
            spoken_for.add(free[0].uuid)
    if auto:
        used = {*bindings, *added, *taken_ids}
        for gpu in present:
            if gpu.uuid in spoken_for:
                continue
            number = next(n for n in range(len(used) + 1) if f"gpu{n}" not in used)
            added[f"gpu{number}"] = gpu.uuid
            used.add(f"gpu{number}")
            spoken_for.add(gpu.uuid)
    return added


def why_not_together(cards: Sequence[NamedCard]) -> str | None:
    """Return the reason why one instance cannot have these cards together; None when it can.

    A program of CUDA uses one slice, and no whole card beside it (MIG User Guide, "Device Enumeration").
    """
    names: dict[str, str] = {}
    for card in cards:
        if card.uuid is None:
            continue
        if card.uuid in names:
            return (
                f"`device` names GPU {card.uuid} twice, as {names[card.uuid]} and as {card.selector}; "
                "name each card once"
            )
        names[card.uuid] = card.selector
    sliced = [uuid for uuid in names if uuid.startswith(SLICE)]
    if sliced and len(cards) > 1:
        return (
            f"{sliced[0]} is a slice of a card (MIG), and a program uses one slice alone or whole cards; "
            "name whole cards in `device`, or one slice"
        )
    return None


def unknown_memory(gpus: Iterable[Gpu]) -> str | None:
    """Return the cards whose memory is unknown for a reason that is known, by host; None where none is."""
    uuids: dict[tuple[str | None, str], list[str]] = {}
    for gpu in gpus:
        if gpu.why_unknown is not None:
            uuids.setdefault((gpu.host, gpu.why_unknown), []).append(gpu.uuid)
    parts = [
        f"the memory of {found[0] if len(found) == 1 else f'{len(found)} cards'}"
        f"{f' on {host}' if host else ''} is unknown: {why}"
        for (host, why), found in uuids.items()
    ]
    rest = len(parts) - _MOST_HOLDERS
    return "; ".join([*parts[:_MOST_HOLDERS], *([f"{rest} more"] if rest > 0 else [])]) or None


# --- what still fits ---


def room_bytes(free_bytes: int | None, reserved_bytes: int) -> int | None:
    """Return the memory of a card that may still be taken; negative where more was promised than is free.

    Foreign processes count because `free_bytes` is measured, None where it is unknown. What other instances
    were promised and have not allocated yet is set aside, so that the same free memory lets in only one of
    two.
    """
    return None if free_bytes is None else free_bytes - reserved_bytes


def unlisted_room_bytes(
    gpu: Gpu, *, outstanding_bytes: int, promised_bytes: int, held_bytes: int
) -> int | None:
    """Return the most that may still be taken of a card whose processes are not listed; None if unknown.

    What is known of such a card may be older than what its servers tell. So it is also at most what the card
    has in all, less everything that was promised or is held: memory that was free in the last reading lets in
    only one of two. Where only the total is known, that bound alone remains, and more may be in use.

    Args:
        gpu: the card.
        outstanding_bytes: what others were promised and are known not to hold yet.
        promised_bytes: what others were promised or hold, whichever is more.
        held_bytes: what the instance itself holds, as far as it is known.
    """
    rooms = []
    if gpu.vram_free_bytes is not None:
        rooms.append(gpu.vram_free_bytes - outstanding_bytes)
    if gpu.vram_total_bytes is not None:
        rooms.append(gpu.vram_total_bytes - promised_bytes - held_bytes)
    return min(rooms, default=None)


def missing_bytes(needed_bytes: int, rooms: Collection[int | None]) -> int:
    """Return the memory that a start or a load lacks on its cards; 0 when it fits, or one room is unknown.

    Ollama divides a model by what is free on each card, so that the sum decides. What was promised beyond
    one card is no debt of the others.
    """
    known = [room for room in rooms if room is not None]
    if len(known) != len(rooms) or not known:
        return 0
    return max(0, needed_bytes - (sum(room for room in known if room > 0) or max(known)))


def outstanding_bytes(promised: Mapping[str, int], used: Mapping[str, int]) -> dict[str, int]:
    """Return the memory of each card that an instance was promised and does not hold yet.

    A server that has placed a model otherwise than it was promised takes the rest of it nowhere.

    Args:
        promised: by UUID, what it may come to hold.
        used: by UUID, what it is seen to hold.
    """
    rest = max(0, sum(promised.values()) - sum(used.values()))
    return {uuid: min(rest, max(0, most - used.get(uuid, 0))) for uuid, most in promised.items()}


def divide(total_bytes: int, rooms: Mapping[str, int | None], likely: Mapping[str, int]) -> dict[str, int]:
    """Return the share of each card in the memory of a model, as its server is expected to divide it.

    Each card gets what the model took there before, as far as there is room; what is left is divided by the
    room that is left. The shares add up to `total_bytes`. None exceeds its room unless all of it together
    does not fit: then the card with the most room gets the rest.

    Args:
        total_bytes: of the model.
        rooms: the room on each card by UUID, at least one; None where it is unknown.
        likely: what the model took on each card before; empty where that is unknown.
    """
    known = sum(likely.get(uuid, 0) for uuid in rooms)
    left = {uuid: total_bytes if room is None else max(0, room) for uuid, room in rooms.items()}
    shares = dict.fromkeys(rooms, 0)

    def give(uuid: str, wanted_bytes: int) -> None:
        given = min(wanted_bytes, left[uuid])
        shares[uuid] += given
        left[uuid] -= given

    for uuid in rooms:
        give(uuid, likely.get(uuid, 0) * min(total_bytes, known) // known if known else 0)
    rest, room = total_bytes - sum(shares.values()), sum(left.values())
    for uuid, part in list(left.items()):
        give(uuid, rest * part // room if room else 0)
    for uuid in rooms:  # what was lost in rounding
        give(uuid, total_bytes - sum(shares.values()))
    shares[max(left, key=lambda uuid: rooms[uuid] or 0)] += total_bytes - sum(shares.values())
    return shares


@dataclass(frozen=True, slots=True)
class Load:
    """A load that was admitted: `bytes` of a card beside the `held_bytes` that its instance held by then."""

    held_bytes: int
    bytes: int


def admitted_load(*, room_bytes: int | None, needed_bytes: int, held_bytes: int) -> Load:
    """Return the memory of a card to reserve for a load on an instance that holds `held_bytes` of it.

    A server loads a model beside the others where there is room, and unloads those first where there is not.
    """
    room = needed_bytes if room_bytes is None else max(0, room_bytes)
    return Load(held_bytes, max(0, needed_bytes - held_bytes, min(needed_bytes, room)))


def promised_bytes(claimed_bytes: int, loads: Iterable[Load]) -> int:
    """The memory of a card that an instance may come to hold: its claim, or more while models are loaded."""
    known = tuple(loads)
    if not known:
        return claimed_bytes
    loading = min(load.held_bytes for load in known) + sum(load.bytes for load in known)
    return max(claimed_bytes, loading)


def least_need(*, likely_bytes: int, free_bytes: int | None, used_bytes: int | None) -> int:
    """A lower bound for the memory of a model that was never measured on these cards; 0 where there is none.

    Args:
        likely_bytes: what it took elsewhere, or the size of its file: the weights have to fit. A model that
            is too large for the cards in any case has no bound, as Ollama gives the rest to the processor.
        free_bytes: on all cards of the instance together.
        used_bytes: on all of them, by anyone.
    """
    if free_bytes is None or used_bytes is None:
        return 0
    return likely_bytes if likely_bytes <= _WHOLE_SHARE * (free_bytes + used_bytes) else 0


# --- what is measured ---


def agree(one_bytes: int, other_bytes: int) -> bool:
    """Whether two measurements differ by no more than measurements of the same do."""
    return abs(one_bytes - other_bytes) <= _TOLERANCE * max(one_bytes, other_bytes)


def is_news(measured_bytes: int, now: datetime, known_bytes: int | None, known_at: datetime | None) -> bool:
    """Whether a measurement replaces what is known of a model: the largest one of the last days counts."""
    if known_bytes is None or known_at is None:
        return True
    if agree(measured_bytes, known_bytes):
        return False
    return measured_bytes > known_bytes or (now - known_at).total_seconds() > _REMEMBERED_S


def unattributed_bytes(gpu: Gpu) -> int | None:
    """The memory in use on a card that belongs to no listed process; None where that cannot be told."""
    if gpu.vram_used_bytes is None:
        return None
    listed = 0
    for process in gpu.processes:
        if process.used_bytes is None:
            return None
        listed += process.used_bytes
    return gpu.vram_used_bytes - listed


def is_given_back(gpu: Gpu, held: Holding) -> bool:
    """Whether what an instance held on a card is free again.

    Its processes must be gone, and their memory must not have become memory of nobody: a driver may need a
    moment to free it. Memory that other processes take meanwhile is listed as theirs, and does not count.
    """
    if held.pids & {process.pid for process in gpu.processes}:
        return False
    left, before = unattributed_bytes(gpu), held.unattributed_bytes
    if left is None or before is None or not held.used_bytes:
        return True
    return left - before <= _KEPT_SHARE * held.used_bytes


# --- words ---


@dataclass(frozen=True, slots=True)
class Holder:
    """Somebody who holds memory on a card: an instance, or a process that belongs to none."""

    pid: int
    name: str | None
    instance: str | None
    used_bytes: int | None


def gib(count: int) -> str:
    """Bytes in GiB, as people read them."""
    return f"{count / _GIB:.1f} GiB"


def held_by(holders: Iterable[Holder]) -> str:
    """The holders of memory, those with the most first: `gpu1 4.0 GiB, python3 (pid 77) 2.5 GiB`."""
    by_label: dict[str, int | None] = {}
    for holder in holders:
        label = holder.instance or f"{holder.name or 'a process'} (pid {holder.pid})"
        before = by_label.get(label, 0)
        known = before is not None and holder.used_bytes is not None
        by_label[label] = (before or 0) + (holder.used_bytes or 0) if known else None
    found = sorted(by_label.items(), key=lambda one: -(one[1] or 0))
    words = [f"{label} {'unknown' if used is None else gib(used)}" for label, used in found]
    rest = len(words) - _MOST_HOLDERS
    return ", ".join([*words[:_MOST_HOLDERS], *([f"{rest} more"] if rest > 0 else [])])
