"""Graphics cards: what NVML reports, which instance each belongs to, and what still fits on one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory on a card; `used_bytes` is None where the driver will not say."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card, or one MIG slice of a card, as NVML last described it. Memory in bytes, None = unknown.

    Attributes:
        processes: those that hold memory on it.
        lists_processes: whether the driver lists them at all.
        lost: why the card cannot be used, None when it can.
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


@dataclass(frozen=True, slots=True)
class Holding:
    """The memory of an instance's processes on its card.

    Attributes:
        pids: its processes.
        used_bytes: None where the driver does not tell.
        unattributed_bytes: what is in use on the card and belongs to no listed process, None if unknown.
    """

    pids: frozenset[int] = frozenset()
    used_bytes: int | None = 0
    unattributed_bytes: int | None = None


def unmeasured(gpu: Gpu) -> Gpu:
    """The card as it was identified, with nothing known of its memory."""
    return replace(
        gpu,
        vram_total_bytes=None,
        vram_used_bytes=None,
        vram_free_bytes=None,
        processes=(),
        lists_processes=False,
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
    """The card that a UUID or a PCI bus id names."""
    pci = normal_pci(selector)
    for gpu in gpus:
        if gpu.uuid == selector or (pci is not None and normal_pci(gpu.pci_bus_id) == pci):
            return gpu
    return None


def bind_gpus(
    gpus: Sequence[Gpu],
    *,
    selectors: Mapping[str, str],
    bindings: Mapping[str, str],
    taken_ids: Collection[str],
    auto: bool,
) -> dict[str, str]:
    """The bindings that have to be added: instance id -> UUID. What is bound stays bound for good.

    Args:
        gpus: the cards that are there now.
        selectors: configured GPU instances -> `auto`, a UUID or a PCI bus id, in order of configuration.
        bindings: what was bound before, of any age.
        taken_ids: ids that a new card must not get (every configured id).
        auto: whether cards that nobody names get instances gpu0, gpu1, … of their own.

    Cards are taken in the order of their PCI bus id, because NVML's own order may change at a reboot.
    """
    present = sorted(gpus, key=lambda gpu: (normal_pci(gpu.pci_bus_id) or gpu.pci_bus_id, gpu.uuid))
    added: dict[str, str] = {}
    spoken_for = set(bindings.values())
    for instance_id, selector in selectors.items():
        if instance_id in bindings or selector == "auto":
            continue
        if (gpu := find_gpu(present, selector)) is not None:
            added[instance_id] = gpu.uuid
            spoken_for.add(gpu.uuid)
    for instance_id, selector in selectors.items():
        if selector != "auto" or instance_id in bindings:
            continue
        free = [gpu for gpu in present if gpu.uuid not in spoken_for]
        if free:
            added[instance_id] = free[0].uuid
            spoken_for.add(free[0].uuid)
    if auto:
        used = {*bindings, *selectors, *taken_ids}
        for gpu in present:
            if gpu.uuid in spoken_for:
                continue
            number = next(n for n in range(len(used) + 1) if f"gpu{n}" not in used)
            added[f"gpu{number}"] = gpu.uuid
            used.add(f"gpu{number}")
            spoken_for.add(gpu.uuid)
    return added


# --- what still fits ---


@dataclass(frozen=True, slots=True)
class Claim:
    """The memory that an instance may come to hold, and that it is seen to hold already."""

    needed_bytes: int
    used_bytes: int


def missing_bytes(*, free_bytes: int | None, needed_bytes: int, claims: Iterable[Claim]) -> int:
    """The memory that a start or a load lacks on its card; 0 when it fits, or when nothing is known.

    Foreign processes count because `free_bytes` is measured. What other instances were promised and have
    not allocated yet is set aside, so that the same free memory lets in only one of two.
    """
    if free_bytes is None:
        return 0
    return max(0, needed_bytes - (free_bytes - _outstanding(claims)))


@dataclass(frozen=True, slots=True)
class Load:
    """A load that was admitted: `bytes` more than the `held_bytes` that its instance held by then."""

    held_bytes: int
    bytes: int


def admitted_load(
    *, free_bytes: int | None, needed_bytes: int, held_bytes: int, claims: Iterable[Claim]
) -> Load:
    """The memory to reserve for a load on an instance that holds `held_bytes`.

    A server loads a model beside the others where there is room, and unloads those first where there is not.
    """
    room = needed_bytes if free_bytes is None else max(0, free_bytes - _outstanding(claims))
    return Load(held_bytes, max(0, needed_bytes - held_bytes, min(needed_bytes, room)))


def promised_bytes(claimed_bytes: int, loads: Iterable[Load]) -> int:
    """The memory that an instance may come to hold: its claim, or more while models are being loaded."""
    known = tuple(loads)
    if not known:
        return claimed_bytes
    loading = min(load.held_bytes for load in known) + sum(load.bytes for load in known)
    return max(claimed_bytes, loading)


def least_need(*, likely_bytes: int, free_bytes: int | None, used_bytes: int | None) -> int:
    """A lower bound for the memory of a model that was never measured on a card; 0 where there is none.

    Args:
        likely_bytes: what it took elsewhere, or the size of its file: the weights have to fit. A model that
            is too large for the card in any case has no bound, as Ollama splits it.
        free_bytes: on the card.
        used_bytes: on the card, by anyone.
    """
    if free_bytes is None or used_bytes is None:
        return 0
    return likely_bytes if likely_bytes <= _WHOLE_SHARE * (free_bytes + used_bytes) else 0


def _outstanding(claims: Iterable[Claim]) -> int:
    return sum(max(0, claim.needed_bytes - claim.used_bytes) for claim in claims)


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
    of_instances: dict[str, int | None] = {}
    found: list[tuple[str, int | None]] = []
    for holder in holders:
        if holder.instance is None:
            found.append((f"{holder.name or 'a process'} (pid {holder.pid})", holder.used_bytes))
            continue
        before = of_instances.get(holder.instance, 0)
        known = before is not None and holder.used_bytes is not None
        of_instances[holder.instance] = (before or 0) + (holder.used_bytes or 0) if known else None
    found += of_instances.items()
    found.sort(key=lambda one: -(one[1] or 0))
    words = [f"{label} {'unknown' if used is None else gib(used)}" for label, used in found]
    rest = len(words) - _MOST_HOLDERS
    return ", ".join([*words[:_MOST_HOLDERS], *([f"{rest} more"] if rest > 0 else [])])
