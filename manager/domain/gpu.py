"""Graphics cards: what NVML says of them, which instance each belongs to, and whether a start fits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory on a card; `used_bytes` is None where the driver will not say."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card, or one MIG slice of a card, as NVML last described it. Memory in bytes, None = unknown."""

    uuid: str
    index: int
    pci_bus_id: str
    name: str
    vram_total_bytes: int | None
    vram_used_bytes: int | None
    vram_free_bytes: int | None
    processes: tuple[GpuProcess, ...] = ()


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


@dataclass(frozen=True, slots=True)
class Claim:
    """What a running or starting instance was admitted for, and what it is seen to hold already."""

    needed_bytes: int
    used_bytes: int


def missing_bytes(*, free_bytes: int | None, needed_bytes: int, claims: Iterable[Claim]) -> int:
    """How much memory a start lacks on its card; 0 when it fits, or when nothing is known.

    Foreign processes count because `free_bytes` is measured. What other instances were promised but have
    not allocated yet is set aside, so that two starts cannot both be let in by the same free memory.
    """
    if free_bytes is None:
        return 0
    promised = sum(max(0, claim.needed_bytes - claim.used_bytes) for claim in claims)
    return max(0, needed_bytes - (free_bytes - promised))
