"""Readings of cards on other machines, as Prometheus exporters tell them.

Two exporters are known, by the names of their metrics:

* NVIDIA's DCGM exporter. `DCGM_FI_DEV_FB_*` are MiB, `_GPU_UTIL` is percent, `_GPU_TEMP` is °C, and power is
  watts. Labels: `UUID`, `pci_bus_id`, `modelName`; with `GPU_I_ID` a sample is about a slice of the card.
* nvidia_gpu_exporter. `nvidia_smi_*_bytes` are bytes, `_ratio` is 0 to 1, temperature is °C, and power is
  watts. Its UUIDs lack the prefix `GPU-`, or `MIG-` in `mig_uuid`.

What an exporter sends is the text of another machine. A value that is missing, not a number, negative, or
larger than any card has is unknown, and so is one that two samples tell differently.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

from manager.domain.gpu import SLICE, Gpu, normal_pci

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_K = TypeVar("_K", str, tuple[str, str])
_T = TypeVar("_T")

_BEGINNING = re.compile(r"(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f-]*)?")

NODE: Final = "{node}"  # stands for the address of each node in the URL of exporters
NAME: Final = "NVIDIA GPU"  # of a card that no exporter has named yet

_MIB = 2**20
_CARD = "GPU-"
_MOST_CARDS = 512
_MOST_CHARACTERS = 128
# More than any card has: beyond these a number is no measurement. DCGM writes about 2^63 for "unknown".
_MOST_BYTES = 2**44
_MOST_PERCENT = 100
_MOST_CELSIUS = 200
_MOST_WATTS = 100_000
# Exporters round each figure down to a MiB, and read them one after the other.
_SLACK_BYTES = 64 * _MIB


@dataclass(frozen=True, slots=True)
class AdvertisedCard:
    """A card, or a slice, that a node of a cluster advertises.

    Attributes:
        uuid: as the node spells it.
        node_id: of the node in its cluster.
        hostname: of the node.
        address: the IP address at which the node is reached.
        lost: why the card cannot be used, None where it can, as far as is known.
    """

    uuid: str
    node_id: str
    hostname: str
    address: str
    lost: str | None = None


class Sample(NamedTuple):
    """One line of an exporter; a whole number may be an int of any size."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Exported:
    """The readings of one exporter.

    Attributes:
        cards: by `card_key`; processes are unknown, `index` is 0 and `host` None.
        collects: False where the exporter says that it could not read its cards.
    """

    cards: Mapping[str, Gpu]
    collects: bool = True


@dataclass(frozen=True, slots=True)
class _Measure:
    """A metric: `factor` makes bytes, percent, °C or watts of it; more than `most` is absurd."""

    of: str
    factor: int
    most: int


def _mib(of: str) -> _Measure:
    return _Measure(of, _MIB, _MOST_BYTES)


def _bytes(of: str) -> _Measure:
    return _Measure(of, 1, _MOST_BYTES)


_CELSIUS = _Measure("temperature", 1, _MOST_CELSIUS)
_WATTS = _Measure("power", 1, _MOST_WATTS)
_WATTS_LIMIT = _Measure("power_limit", 1, _MOST_WATTS)

# https://github.com/NVIDIA/dcgm-exporter, etc/default-counters.csv; FB_TOTAL and the limit of power are not
# among its defaults.
_DCGM: Final = {
    "DCGM_FI_DEV_FB_TOTAL": _mib("total"),
    "DCGM_FI_DEV_FB_USED": _mib("used"),
    "DCGM_FI_DEV_FB_FREE": _mib("free"),
    "DCGM_FI_DEV_FB_RESERVED": _mib("reserved"),
    "DCGM_FI_DEV_GPU_UTIL": _Measure("utilisation", 1, _MOST_PERCENT),
    "DCGM_FI_DEV_GPU_TEMP": _CELSIUS,
    "DCGM_FI_DEV_POWER_USAGE": _WATTS,
    "DCGM_FI_DEV_ENFORCED_POWER_LIMIT": _WATTS_LIMIT,
}
# https://github.com/utkuozdemir/nvidia_gpu_exporter, docs/METRICS.md
_SMI: Final = {
    "nvidia_smi_memory_total_bytes": _bytes("total"),
    "nvidia_smi_memory_used_bytes": _bytes("used"),
    "nvidia_smi_memory_free_bytes": _bytes("free"),
    "nvidia_smi_memory_reserved_bytes": _bytes("reserved"),
    "nvidia_smi_utilization_gpu_ratio": _Measure("utilisation", 100, _MOST_PERCENT),
    "nvidia_smi_temperature_gpu": _CELSIUS,
    "nvidia_smi_power_draw_watts": _WATTS,
    "nvidia_smi_enforced_power_limit_watts": _WATTS_LIMIT,
}
# Of an instance of a card, which one or several slices share. Only the NVML build of the exporter tells them.
_SMI_SLICE: Final = {
    "nvidia_smi_mig_memory_total_bytes": _bytes("total"),
    "nvidia_smi_mig_memory_used_bytes": _bytes("used"),
    "nvidia_smi_mig_memory_free_bytes": _bytes("free"),
    "nvidia_smi_mig_memory_reserved_bytes": _bytes("reserved"),
}
_SMI_INFO: Final = "nvidia_smi_gpu_info"
_SMI_SLICE_INFO: Final = "nvidia_smi_mig_info"
_SMI_COLLECTS: Final = "nvidia_smi_last_collect_success"

_OF_CARDS: Final = _DCGM | _SMI
METRICS: Final = frozenset({*_OF_CARDS, *_SMI_SLICE, _SMI_INFO, _SMI_SLICE_INFO, _SMI_COLLECTS})
"""The names of all metrics that are read; the others need not be parsed."""


def card_key(uuid: str) -> str:
    """The UUID of a card or a slice in one spelling: two that name the same card have the same key."""
    word = uuid.strip().lower()
    if word.startswith(SLICE.lower()):
        return SLICE + word.removeprefix(SLICE.lower())
    return _CARD + word.removeprefix(_CARD.lower())


def named(cards: Mapping[str, _T], uuid: str) -> _T | None:
    """Return what is known of the card that a node advertises, by `card_key`; None where nothing is.

    Many nodes advertise the beginning of a UUID, as guides to Swarm advise. It names a card where it has its
    first group of digits, `GPU-8c1f2d34`, and no second card begins with it.
    """
    key = card_key(uuid)
    if key in cards:
        return cards[key]
    if _BEGINNING.fullmatch(key) is None:
        return None
    found = [one for other, one in cards.items() if other.startswith(key)]
    return found[0] if len(found) == 1 else None


def why_no_exporter_url(url: str) -> str | None:
    """Return the reason why a text is not the URL of exporters; None when it is one.

    It is `http://` or `https://` with a path, and its host is a name, an address, or `{node}`. Credentials,
    a query and a fragment are refused.
    """
    if re.search(r"[\s\x00-\x1f\x7f\\]", url):
        return "a URL has no spaces and no backslashes"
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        return str(error)
    if parts.scheme not in {"http", "https"} or not has_host or not parts.path.strip("/"):
        return "expected http://HOST[:PORT]/PATH or https://HOST[:PORT]/PATH"
    if parts.username is not None or parts.query or parts.fragment:
        return "expected a URL without credentials, query and fragment"
    if re.search(r"[{}]", parts.path) or (parts.hostname != NODE and re.search(r"[{}]", parts.netloc)):
        return f"{NODE} stands for the whole host, once: http://{NODE}:9400/metrics"
    return None


def read_exporter(samples: Iterable[Sample]) -> Exported:
    """Return the readings in the samples of one exporter; those of any other metric are left out.

    Cards beyond the first `_MOST_CARDS` are left out too.
    """
    answer = _Answer()
    for sample in samples:
        answer.take(sample)
    return Exported(answer.readings(), answer.collects)


@dataclass(frozen=True, slots=True)
class _Slice:
    card: str
    part: str
    profile: str


@dataclass(slots=True)
class _Card:
    """The values of a card, or an instance of one, while its samples are read. None: told, and unknown."""

    values: dict[str, float | None] = field(default_factory=dict)
    name: str = ""
    pci_bus_id: str = ""

    def take(self, measure: _Measure, value: float) -> None:
        told = value * measure.factor
        known = told if 0 <= told <= measure.most else None
        if self.values.get(measure.of, known) != known:
            known = None
        self.values[measure.of] = known

    def identify(self, name: str | None, pci_bus_id: str | None) -> None:
        self.name = self.name or _clean(name or "")
        self.pci_bus_id = self.pci_bus_id or normal_pci((pci_bus_id or "")[:_MOST_CHARACTERS]) or ""

    def reading(self, uuid: str) -> Gpu:
        total, used, free = self._memory()
        return Gpu(
            uuid=uuid,
            index=0,
            pci_bus_id=self.pci_bus_id,
            name=self.name or NAME,
            vram_total_bytes=total,
            vram_used_bytes=used,
            vram_free_bytes=free,
            lists_processes=False,
            utilisation_percent=self._whole("utilisation"),
            temperature_c=self._whole("temperature"),
            power_watts=self._fraction("power"),
            power_limit_watts=self._fraction("power_limit"),
        )

    def _memory(self) -> tuple[int | None, int | None, int | None]:
        """Return what there is in all, what is used, and what is free, in bytes.

        By default DCGM tells no total: it is used, free and reserved together. Figures that exceed the total
        contradict it, and then none of them is known.
        """
        total, used, free = self._whole("total"), self._whole("used"), self._whole("free")
        reserved = self._whole("reserved")
        if total is None and used is not None and free is not None and reserved is not None:
            total = used + free + reserved
        if total is None:
            return None, used, free
        if total == 0 or (used or 0) + (free or 0) + (reserved or 0) > total + _SLACK_BYTES:
            return None, None, None
        return total, used, free

    def _whole(self, of: str) -> int | None:
        value = self.values.get(of)
        return None if value is None else round(value)

    def _fraction(self, of: str) -> float | None:
        value = self.values.get(of)
        return None if value is None else float(value)


class _Answer:
    """The samples of one exporter, by card, by instance of a card, and by slice.

    A slice is None where two samples place it differently.
    """

    def __init__(self) -> None:
        self.collects = True
        self._cards: dict[str, _Card] = {}
        self._parts: dict[tuple[str, str], _Card] = {}
        self._slices: dict[str, _Slice | None] = {}

    def take(self, sample: Sample) -> None:
        name, labels, value = sample
        uuid = labels.get("UUID") or labels.get("uuid") or ""
        if name == _SMI_COLLECTS:
            self.collects = self.collects and value != 0
        elif 0 < len(uuid) <= _MOST_CHARACTERS:
            key = card_key(uuid)
            if name in (_SMI_SLICE_INFO, *_SMI_SLICE):
                self._take_slice(key, sample)
            elif name in METRICS and "GPU_I_ID" not in labels:
                card = _at(self._cards, key)
                card.identify(labels.get("name") or labels.get("modelName"), labels.get("pci_bus_id"))
                if name != _SMI_INFO:
                    card.take(_OF_CARDS[name], value)

    def readings(self) -> dict[str, Gpu]:
        readings = {key: card.reading(key) for key, card in self._cards.items()}
        for key, one in self._slices.items():
            if one is not None:
                readings[key] = self._slice_reading(key, one)
        return readings

    def _take_slice(self, card: str, sample: Sample) -> None:
        name, labels, value = sample
        part = labels.get("gpu_instance_id", "")[:_MOST_CHARACTERS]
        if name != _SMI_SLICE_INFO:
            _at(self._parts, (card, part)).take(_SMI_SLICE[name], value)
            return
        uuid = labels.get("mig_uuid", "").strip().lower().removeprefix(SLICE.lower())
        key, found = SLICE + uuid, _Slice(card, part, _clean(labels.get("profile", "")))
        if 0 < len(uuid) <= _MOST_CHARACTERS and (key in self._slices or len(self._slices) < _MOST_CARDS):
            self._slices[key] = found if self._slices.get(key, found) == found else None

    def _slice_reading(self, key: str, one: _Slice) -> Gpu:
        """Return a slice with the memory of the instance that it is in.

        A slice has no sensors of its own. The temperature is that of its card.
        """
        card = self._cards.get(one.card, _Card())
        part = self._parts.get((one.card, one.part), _Card())
        values = part.values | {of: value for of, value in card.values.items() if of == _CELSIUS.of}
        return _Card(values, f"{card.name or NAME} MIG {one.profile}".rstrip(), card.pci_bus_id).reading(key)


def _at(cards: dict[_K, _Card], key: _K) -> _Card:
    """Return the card of a key; one that is forgotten at once where there are too many."""
    return cards.get(key) or (cards.setdefault(key, _Card()) if len(cards) < _MOST_CARDS else _Card())


def _clean(text: str) -> str:
    """Return a name for terminals and pages: of bounded length, without control characters."""
    return "".join(one for one in text[:_MOST_CHARACTERS] if one.isprintable()).strip()
