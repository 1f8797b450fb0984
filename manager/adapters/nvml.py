"""Graphics cards as NVML describes them, read in one thread of its own.

A driver can hang inside a call, sometimes for good, and Python cannot interrupt it. So NVML is loaded,
initialised and called in one daemon thread. Readers wait for that thread with a deadline; while a call is
overdue, no other one is queued behind it.

Every refusal is a `GpuQueryError` whose `details["nvml"]` is one of: driver_not_loaded, library_missing,
gpu_lost, reset_required, version_mismatch, not_supported, unknown, timeout, closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from manager.domain.gpu import Gpu, GpuProcess, unmeasured
from manager.errors import GpuQueryError

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

_LIBRARY: Final = "libnvidia-ml.so.1"

# A refused read is not tried again before this wait, which doubles up to the limit: a machine without a
# card is asked every few seconds, and initialising can fork nvidia-modprobe.
_FIRST_WAIT_S: Final = 1.0
_LONGEST_WAIT_S: Final = 60.0
# Slices that are made and removed again have a new UUID each time.
_MOST_SEEN: Final = 256

# nvmlReturn_t, https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceEnumvs.html
_UNINITIALIZED: Final = 1
_INVALID_ARGUMENT: Final = 2
_NOT_SUPPORTED: Final = 3
_NOT_FOUND: Final = 6
_DRIVER_NOT_LOADED: Final = 9
_LIBRARY_NOT_FOUND: Final = 12
_FUNCTION_NOT_FOUND: Final = 13
_GPU_IS_LOST: Final = 15
_RESET_REQUIRED: Final = 16
_VERSION_MISMATCH: Final = 18
_ARGUMENT_VERSION_MISMATCH: Final = 25

# These are about one card, which cannot be used any more.
_LOST: Final = {
    _GPU_IS_LOST: (
        "it has fallen off the bus (NVML error 15); look for `Xid 79` in the kernel log, check power and "
        "cooling, and reboot the host"
    ),
    _RESET_REQUIRED: (
        "it has to be reset (NVML error 16); stop everything that uses it and run `nvidia-smi --gpu-reset`, "
        "or reboot the host"
    ),
}
# These are about the driver as a whole, whichever card was asked.
_OF_THE_DRIVER: Final = frozenset(
    {_UNINITIALIZED, _DRIVER_NOT_LOADED, _LIBRARY_NOT_FOUND, _VERSION_MISMATCH},
)
# An older driver says one of these to a function or a structure version that it does not know.
_TOO_NEW: Final = frozenset(
    {_INVALID_ARGUMENT, _NOT_SUPPORTED, _FUNCTION_NOT_FOUND, _ARGUMENT_VERSION_MISMATCH},
)
_NO_SUCH_FEATURE: Final = frozenset({_NOT_SUPPORTED, _FUNCTION_NOT_FOUND})

_NAMES: Final = {
    _NOT_SUPPORTED: "not_supported",
    _FUNCTION_NOT_FOUND: "not_supported",
    _DRIVER_NOT_LOADED: "driver_not_loaded",
    _LIBRARY_NOT_FOUND: "library_missing",
    _GPU_IS_LOST: "gpu_lost",
    _RESET_REQUIRED: "reset_required",
    _VERSION_MISMATCH: "version_mismatch",
}
_MESSAGES: Final = {
    "not_supported": (
        "the NVIDIA driver does not support what was asked of it; "
        "update the driver, or use a card that NVML supports"
    ),
    "driver_not_loaded": (
        "the NVIDIA driver is not loaded; load it (`modprobe nvidia`) until `nvidia-smi` works on the host"
    ),
    "library_missing": (
        f"{_LIBRARY} could not be loaded; install the NVIDIA driver on the host, or, in a container, "
        "run it with the NVIDIA runtime and NVIDIA_DRIVER_CAPABILITIES=utility"
    ),
    "gpu_lost": (
        "a GPU has fallen off the bus; look for `Xid 79` in the kernel log, check power and cooling, "
        "and reboot the host"
    ),
    "reset_required": (
        "a GPU has to be reset; stop everything that uses it, this daemon too, and run "
        "`nvidia-smi --gpu-reset`, or reboot the host"
    ),
    "version_mismatch": (
        "the NVIDIA library and the loaded driver are of different versions, as after an update; "
        "reboot the host (or reload the driver), then restart this daemon"
    ),
    "unknown": "NVML failed and does not say why; see whether `nvidia-smi` works on the host",
    "timeout": (
        "the NVIDIA driver did not answer in time and may hang; see whether `nvidia-smi` answers, "
        "and reboot the host if it does not"
    ),
    "closed": "the reader of the graphics cards is closed",
}


class Nvml:
    """All cards of this host, as a `GpuReader`. Nothing is loaded before the first read.

    Reads that overlap share one answer. While one is overdue, every other fails at once; when it returns
    after all, its answer is dropped and the next read asks afresh.

    Args:
        timeout_s: how long a read may take, with loading and initialising.
        clock: monotonic seconds, for the wait between attempts after a refusal.
    """

    def __init__(self, *, timeout_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._driver = _Driver(clock)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._reading: Future[tuple[Gpu, ...]] | None = None
        self._overdue: Future[tuple[Gpu, ...]] | None = None
        self._closed = False

    async def read(self) -> tuple[Gpu, ...]:
        """All cards; where MIG is on, the slices in place of their card.

        A card that answers with an error is listed with unknown memory, if it could ever be identified, and
        as lost where the error says so. NVML lists cards as they were when it was initialised: while a card
        is lost, or missing, NVML is initialised again from time to time, and lists the card once it is back.
        The index of a slice is that of its card.

        Raises:
            GpuQueryError: no driver, no library, an error or no answer in time.
        """
        if self._closed:
            raise _refusal("closed")
        if self._reading is None or self._reading.done():
            self._reading = self._submit(self._driver.read)
        elif self._reading is self._overdue:
            raise _refusal("timeout", "an earlier read still hangs")
        reading = self._reading
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.wrap_future(reading)
        except TimeoutError as error:
            self._overdue = reading
            raise _refusal("timeout", f"waited {self._timeout_s:g} s") from error
        except GpuQueryError:
            raise
        except Exception as error:  # a driver that answers nonsense must not end the daemon
            raise _refusal("unknown", repr(error)) from error

    async def close(self) -> None:
        """Shut NVML down and end the thread, or leave both behind when they do not answer in time."""
        if self._closed:
            return
        self._closed = True
        if self._thread is None:
            return
        shut_down = self._submit(self._driver.shut_down)
        self._calls.put(None)
        hanging = self._overdue is not None and not self._overdue.done()
        if not hanging:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    await asyncio.wrap_future(shut_down)

    def _submit(self, call: Callable[[], _T]) -> Future[_T]:
        if self._thread is None:
            # A daemon thread, and no executor: the interpreter waits for an executor's threads when it exits.
            self._thread = threading.Thread(target=_serve, args=(self._calls,), name="nvml", daemon=True)
            self._thread.start()
        future: Future[_T] = Future()
        future.set_running_or_notify_cancel()  # a caller who gives up must not cancel it for the others

        def run() -> None:
            try:
                result = call()
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the caller
                future.set_exception(error)
            else:
                future.set_result(result)

        self._calls.put(run)
        return future


def _serve(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()


def _refusal(name: str, cause: str = "") -> GpuQueryError:
    message = _MESSAGES[name] + (f" ({cause})" if cause else "")
    return GpuQueryError(message, details={"nvml": name})


class _Driver:
    """NVML as it was initialised, with all that is remembered of it. Used by its one thread only."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._nvml: Any = None  # the module pynvml, once the library is known to load
        self._initialised = False
        self._known: dict[int, tuple[Gpu, ...]] = {}  # by index, which is stable until NVML is shut down
        self._seen: frozenset[str] = frozenset()  # every card that ever answered, by UUID
        self._renew_at: float | None = None  # when to initialise NVML again for a card that is missing
        self._renewal_wait_s = _FIRST_WAIT_S
        self._refused: tuple[str, str] | None = None
        self._wait_s = _FIRST_WAIT_S
        self._retry_at = 0.0

    def read(self) -> tuple[Gpu, ...]:
        if self._refused is not None and self._clock() < self._retry_at:
            raise _refusal(*self._refused)
        try:
            nvml = self._library()
        except OSError as error:
            raise self._refuse("library_missing", str(error)) from error
        if self._renew_at is not None and self._clock() >= self._renew_at:
            self.shut_down()
        try:
            if not self._initialised:
                nvml.nvmlInit()
                self._initialised = True
            gpus = self._cards(nvml)
        except nvml.NVMLError as error:
            self.shut_down()
            name = _NAMES.get(error.value, "unknown")
            raise self._refuse(name, f"NVML error {error.value}: {error}") from error
        self._refused = None
        self._wait_s = _FIRST_WAIT_S
        self._plan_renewal(gpus)
        return gpus

    def _plan_renewal(self, gpus: tuple[Gpu, ...]) -> None:
        """Initialise NVML again later where a card is missing that had answered before."""
        there = frozenset(gpu.uuid for gpu in gpus if gpu.lost is None)
        self._seen |= there
        if len(self._seen) > _MOST_SEEN:
            self._seen = there
        if self._seen == there:
            self._renew_at, self._renewal_wait_s = None, _FIRST_WAIT_S
        elif self._renew_at is None or self._clock() >= self._renew_at:
            self._renew_at = self._clock() + self._renewal_wait_s
            self._renewal_wait_s = min(self._renewal_wait_s * 2, _LONGEST_WAIT_S)

    def shut_down(self) -> None:
        self._known.clear()
        if self._initialised:
            self._initialised = False
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _library(self) -> Any:
        if self._nvml is None:
            # Tried by hand first: importing pynvml takes 18 MiB, which a host without a card should not pay.
            ctypes.CDLL(_LIBRARY)
            import pynvml  # noqa: PLC0415 - see above

            self._nvml = pynvml
        return self._nvml

    def _refuse(self, name: str, cause: str) -> GpuQueryError:
        self._refused = (name, cause)
        self._retry_at = self._clock() + self._wait_s
        self._wait_s = min(self._wait_s * 2, _LONGEST_WAIT_S)
        return _refusal(name, cause)

    def _cards(self, nvml: Any) -> tuple[Gpu, ...]:
        """All cards. One that cannot be asked hides no other: it is listed from memory, or left out.

        Raises:
            NVMLError: the driver as a whole failed, or no card at all could be identified.
        """
        gpus: list[Gpu] = []
        unidentified = None
        count = nvml.nvmlDeviceGetCount()
        self._known = {index: known for index, known in self._known.items() if index < count}
        for index in range(count):
            try:
                gpus += self._card(nvml, index)
            except nvml.NVMLError as error:
                if error.value in _OF_THE_DRIVER:
                    raise
                if index in self._known:
                    why = _LOST.get(error.value)
                    gpus += [replace(unmeasured(gpu), lost=why) for gpu in self._known[index]]
                else:
                    unidentified = error
        if unidentified is not None and not gpus:
            raise unidentified
        return tuple(gpus)

    def _card(self, nvml: Any, index: int) -> tuple[Gpu, ...]:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        card = _identified(nvml, handle, index)
        try:
            sliced = _is_sliced(nvml, handle)
        except nvml.NVMLError as error:
            # Whether it is sliced cannot be told now: it is what it was, or a whole card if it never was.
            if index in self._known or error.value in _OF_THE_DRIVER:
                raise
            return (_measured(nvml, handle, card),)
        found: tuple[Gpu, ...]
        if sliced:
            # A slice has no sensors of its own. The temperature of its card is its own, too; the power of the
            # card is that of all slices together.
            card = replace(card, temperature_c=_temperature(nvml, handle))
            found = tuple(
                _measured(nvml, part, _identified_slice(nvml, part, card)) for part in _slices(nvml, handle)
            )
        else:
            found = (_measured(nvml, handle, card),)
        self._known[index] = found
        return found


def _ask(nvml: Any, default: _T, function: Callable[..., _T], *arguments: object) -> _T:
    """The answer, or the default when the card or the driver has none.

    Raises:
        NVMLError: the driver as a whole failed.
    """
    try:
        return function(*arguments)
    except nvml.NVMLError as error:
        if error.value in _OF_THE_DRIVER:
            raise
        return default


def _identified(nvml: Any, handle: Any, index: int) -> Gpu:
    pci = _ask(nvml, None, nvml.nvmlDeviceGetPciInfo, handle)
    return Gpu(
        uuid=nvml.nvmlDeviceGetUUID(handle),
        index=index,
        pci_bus_id=pci.busId if pci is not None else "",
        name=_ask(nvml, "NVIDIA GPU", nvml.nvmlDeviceGetName, handle),
        vram_total_bytes=None,
        vram_used_bytes=None,
        vram_free_bytes=None,
    )


def _identified_slice(nvml: Any, handle: Any, card: Gpu) -> Gpu:
    """The card with the UUID and the name of one of its slices.

    Newer drivers name a slice "<card> MIG <profile>". For the others the profile is put together the way
    the driver does: slices of the processor, then its memory rounded up to full GiB.
    """
    name = _ask(nvml, "", nvml.nvmlDeviceGetName, handle)
    if " MIG " not in name:
        name = f"{card.name} MIG"
        attributes = _ask(nvml, None, nvml.nvmlDeviceGetAttributes, handle)
        if attributes is not None:
            gibibytes = -(-attributes.memorySizeMB // 1024)
            name += f" {attributes.gpuInstanceSliceCount}g.{gibibytes}gb"
    return replace(card, uuid=nvml.nvmlDeviceGetUUID(handle), name=name)


def _is_sliced(nvml: Any, handle: Any) -> bool:
    """Whether MIG is on; it is not where card or driver does not know it."""
    try:
        mode, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError as error:
        if error.value in _NO_SUCH_FEATURE:
            return False
        raise
    return bool(mode == nvml.NVML_DEVICE_MIG_ENABLE)


def _slices(nvml: Any, handle: Any) -> list[Any]:
    """The handles of the MIG devices of a card."""
    slices = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            slices.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
        except nvml.NVMLError as error:
            if error.value != _NOT_FOUND:  # the numbers of removed slices leave gaps
                raise
    return slices


def _measured(nvml: Any, handle: Any, gpu: Gpu) -> Gpu:
    """The card with its memory, processes and sensors, as far as it tells them.

    Raises:
        NVMLError: the driver as a whole failed.
    """
    try:
        memory = _memory(nvml, handle)
    except nvml.NVMLError as error:
        if error.value in _OF_THE_DRIVER:
            raise
        memory = None
        gpu = replace(gpu, lost=_LOST.get(error.value))
    processes = _processes(nvml, handle)
    return replace(
        gpu,
        vram_total_bytes=memory.total if memory is not None else None,
        vram_used_bytes=memory.used if memory is not None else None,
        vram_free_bytes=memory.free if memory is not None else None,
        processes=processes or (),
        lists_processes=processes is not None,
        utilisation_percent=_utilisation(nvml, handle),
        temperature_c=_temperature(nvml, handle) if gpu.temperature_c is None else gpu.temperature_c,
        power_watts=_watts(_ask(nvml, None, nvml.nvmlDeviceGetPowerUsage, handle)),
        power_limit_watts=_watts(_ask(nvml, None, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)),
    )


def _memory(nvml: Any, handle: Any) -> Any:
    """Since version 2 (driver 510) `used` leaves out what the driver reserves for itself."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError as error:
        if error.value not in _TOO_NEW:
            raise
        return nvml.nvmlDeviceGetMemoryInfo(handle)


def _utilisation(nvml: Any, handle: Any) -> int | None:
    rates = _ask(nvml, None, nvml.nvmlDeviceGetUtilizationRates, handle)
    return None if rates is None else rates.gpu


def _temperature(nvml: Any, handle: Any) -> int | None:
    """The older function is the one that most drivers have; NVML announces its end for CUDA 14."""
    chip = nvml.NVML_TEMPERATURE_GPU
    found: int | None = _ask(nvml, None, nvml.nvmlDeviceGetTemperature, handle, chip)
    return _ask(nvml, None, nvml.nvmlDeviceGetTemperatureV, handle, chip) if found is None else found


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...] | None:
    """Every process with memory on the card, once, in the order of the pids; None where it lists none ever.

    A process that both computes and draws is in two lists with the same figure: the larger one counts.
    """
    kinds = (
        (nvml.nvmlDeviceGetComputeRunningProcesses_v3, nvml.nvmlDeviceGetComputeRunningProcesses_v2),
        (nvml.nvmlDeviceGetGraphicsRunningProcesses_v3, nvml.nvmlDeviceGetGraphicsRunningProcesses_v2),
        (nvml.nvmlDeviceGetMPSComputeRunningProcesses_v3, nvml.nvmlDeviceGetMPSComputeRunningProcesses_v2),
    )
    used_bytes: dict[int, int | None] = {}
    lists_any = False
    for newer, older in kinds:
        found = _ask(nvml, None, newer, handle)
        if found is None:
            found = _ask(nvml, None, older, handle)
        lists_any = lists_any or found is not None
        for process in found or ():
            used = _known_bytes(nvml, process.usedGpuMemory)
            before = used_bytes.get(process.pid)
            used_bytes[process.pid] = used if before is None else max(before, used or 0)
    return tuple(GpuProcess(pid, used) for pid, used in sorted(used_bytes.items())) if lists_any else None


def _known_bytes(nvml: Any, used: int | None) -> int | None:
    return None if used == nvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value else used
