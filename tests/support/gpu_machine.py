"""Cards, processes and stored rows as a test sets them, with the real services on top."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from manager.domain.gpu import Gpu, GpuProcess
from manager.domain.instance import Model
from manager.errors import GpuQueryError, RegistryUnwritableError
from manager.services.gpus import Gpus

if TYPE_CHECKING:
    from manager.domain.registry import LearnedSize
    from manager.errors import Reason

GIB = 2**30
A = "GPU-a"
B = "GPU-b"
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def card(
    uuid: str = A, *, free: int | None = 10 * GIB, processes: tuple[GpuProcess, ...] = (), **more: Any
) -> Gpu:
    total = None if free is None else 24 * GIB
    used = None if free is None else 24 * GIB - free
    return Gpu(uuid, 0, "00000000:01:00.0", "Card", total, used, free, processes, **more)


def filled(*processes: tuple[int, int | None], uuid: str = A, driver: int = 0) -> Gpu:
    """A card of 24 GiB in use by these processes (pid, bytes), and by the driver itself."""
    free = 24 * GIB - driver - sum(used or 0 for _, used in processes)
    return card(uuid, free=free, processes=tuple(GpuProcess(pid, used) for pid, used in processes))


def model(
    name: str = "tiny:latest", *, digest: str = "sha", size: int = GIB, vram_bytes: int | None = None
) -> Model:
    return Model(name, digest, size, size if vram_bytes is None else vram_bytes, None)


class Machine:
    """A machine of which a test sets everything. It is reader, pids, registry, journal and clock at once."""

    def __init__(self) -> None:
        self.cards: tuple[Gpu, ...] = ()
        self.refusal: GpuQueryError | None = None
        self.containers: dict[int, str] = {}
        self.names: dict[int, str] = {}
        self.asked_pids: list[int] = []
        self.stored_bindings: dict[str, str] = {}
        self.stored_sizes: list[LearnedSize] = []
        self.events: list[tuple[str, str | None, str | None, str]] = []
        self.disk_full = False
        self.time = BEGIN

    def now(self) -> float:
        return self.time.timestamp()

    def advance(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)

    # GpuReader
    async def read(self) -> tuple[Gpu, ...]:
        if self.refusal is not None:
            raise self.refusal
        return self.cards

    # ContainerPids
    def container_of(self, pid: int) -> str | None:
        self.asked_pids.append(pid)
        return self.containers.get(pid)

    def name_of(self, pid: int) -> str | None:
        return self.names.get(pid)

    # Journal
    def record(
        self, kind: str, *, instance: str | None = None, reason: Reason | None = None, detail: str = ""
    ) -> None:
        self.events.append((kind, instance, reason, detail))

    # the part of Registry that is used
    async def bindings(self) -> dict[str, str]:
        return dict(self.stored_bindings)

    async def add_bindings(self, bindings: dict[str, str]) -> None:
        self._write()
        self.stored_bindings |= bindings

    async def learned_sizes(self) -> tuple[LearnedSize, ...]:
        return tuple(self.stored_sizes)

    async def save_learned_size(self, size: LearnedSize) -> None:
        self._write()
        self.stored_sizes.append(size)

    def _write(self) -> None:
        if self.disk_full:
            raise RegistryUnwritableError("the disk is full")

    async def gpus(
        self, *, auto: bool = False, place: str = "in this machine", **devices: str | tuple[str, ...]
    ) -> Gpus:
        selectors = {id_: (one,) if isinstance(one, str) else one for id_, one in devices.items()}
        gpus = Gpus(
            self,
            self,
            cast("Any", self),
            selectors=selectors,
            taken_ids=selectors,
            auto=auto,
            now=self.now,
            utcnow=lambda: self.time,
            journal=cast("Any", self),
            place=place,
        )
        await gpus.load()
        return gpus

    async def show(self, gpus: Gpus, *cards: Gpu) -> None:
        """Change the cards and have them read."""
        self.cards, self.refusal = cards, None
        await gpus.refresh()

    async def refuse(self, gpus: Gpus, name: str | None = None) -> None:
        """Have the driver refuse to be read."""
        self.refusal = GpuQueryError("the driver is gone", details={"nvml": name} if name else {})
        await gpus.refresh()
