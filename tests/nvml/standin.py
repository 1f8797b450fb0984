"""A machine with graphics cards for tests: builds the stand-in for NVML and writes what it is to say.

The library is found by a process started with `environment(…)`; the file that describes the machine is
read again at every NVML call, so `write` changes the machine under a running process:

    library = build(directory)
    write(state, [Card("GPU-1", vram_total=GIB)])
    subprocess.run(command, env={**os.environ, **environment(library, state)})

Codes of errors are NVML's own (`nvmlReturn_t`), 0 is none; memory is in bytes.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import astuple, dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SOURCE = Path(__file__).with_name("nvml.c")
_NOT_AVAILABLE = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE, what a driver says instead of a process' memory


class Age(IntEnum):
    """Which functions the library has."""

    COMING = -1  # the older function for the temperature is gone
    CURRENT = 0
    OLD = 1  # no MIG, no version 2 of the memory, no version 3 of the processes
    MINIMAL = 2  # init, count, handle, UUID and version 1 of the memory, nothing else


@dataclass(frozen=True, slots=True)
class Process:
    """A process of the host on a card; `used` is None where the driver will not say."""

    pid: int
    used: int | None
    kind: Literal["compute", "graphics", "mps"] = "compute"


@dataclass(frozen=True, slots=True)
class Sensors:
    """What a card measures of itself; None where it does not support that."""

    utilisation: int | None = None
    temperature: int | None = None
    power_mw: int | None = None
    power_limit_mw: int | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A MIG device.

    Attributes:
        name: None where the driver is one that does not name slices.
        memory_mb: the memory among its attributes; with 0 the driver does not know them.
        handle_error: it cannot be opened.
    """

    uuid: str
    name: str | None = None
    vram_total: int = 0
    vram_used: int = 0
    reserved: int = 0
    processor_slices: int = 1
    memory_mb: int = 0
    processes: tuple[Process, ...] = ()
    handle_error: int = 0
    sensors: Sensors = Sensors()


@dataclass(frozen=True, slots=True)
class Card:
    """A card; its index is its place in the list given to `write`.

    Attributes:
        reserved: what the driver keeps; part of `used` in version 1 of the memory only.
        handle_error: the card cannot be opened at all.
        error: every question fails except those for UUID, name and PCI bus id.
        memory_v2_error: only version 2 of the memory fails.
        mig: slices where MIG is on (there may be none of them), None where it is not.
        mig_off: the card knows MIG, but it is off.
    """

    uuid: str
    pci_bus_id: str = "00000000:01:00.0"
    name: str = "NVIDIA Stand-in"
    vram_total: int = 24 * 2**30
    vram_used: int = 0
    reserved: int = 0
    processes: tuple[Process, ...] = ()
    handle_error: int = 0
    error: int = 0
    memory_v2_error: int = 0
    mig: tuple[Slice, ...] | None = None
    mig_off: bool = False
    sensors: Sensors = Sensors()


def build(directory: Path, age: Age = Age.CURRENT) -> Path:
    """Compile the library into a directory of its own for its age, once. Returns the library's path."""
    folder = directory / age.name.lower()
    library = folder / "libnvidia-ml.so.1"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f"{library.name}.{os.getpid()}"
        flags = [
            "-std=gnu11",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
        ]
        define = f"-DNVML_STANDIN_AGE={age.value}"
        subprocess.run(
            ["cc", *flags, define, f"-Wl,-soname,{library.name}", "-o", fresh, _SOURCE],
            check=True,
        )
        fresh.replace(library)
    return library


def environment(library: Path, state: Path, *, calls: Path | None = None) -> dict[str, str]:
    """What a process needs in its environment to find this library and its machine.

    Args:
        library: what `build` returned.
        state: what `write` wrote; it must be there at the first NVML call.
        calls: gets a line with the function's name for every NVML call.
    """
    variables = {"LD_LIBRARY_PATH": str(library.parent), "NVML_STANDIN": str(state)}
    if calls is not None:
        variables["NVML_STANDIN_CALLS"] = str(calls)
    return variables


def write(
    path: Path,
    cards: Iterable[Card],
    *,
    init_error: int = 0,
    count_error: int = 0,
    hang_s: float = 0.0,
    at_init: bool = False,
) -> None:
    """Replace the machine's description, in one step.

    Args:
        path: the file that the environment names.
        cards: in the order of their indexes.
        init_error: what nvmlInit fails with: 9 for a driver that is not loaded, 18 for a mismatch, …
        count_error: what counting the cards fails with, the first question after nvmlInit.
        hang_s: how long every call hangs; one that hangs already ends when this is written anew as 0.
        at_init: the driver lists the cards as they were at nvmlInit: one that was taken out since answers
            GPU_IS_LOST, one that was put in is not listed before the next nvmlInit.
    """
    lines = [
        f"init {init_error}",
        f"count {count_error}",
        f"hang_ms {round(hang_s * 1000)}",
        f"at_init {at_init:d}",
    ]
    for card in cards:
        lines += _card_lines(card)
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text("\n".join([*lines, "end", ""]), encoding="utf-8")
    fresh.replace(path)


def _card_lines(card: Card) -> Iterator[str]:
    mig = 1 if card.mig is not None else 0 if card.mig_off else -1
    numbers = (card.vram_total, card.vram_used, card.reserved)
    knobs = (card.handle_error, card.error, card.memory_v2_error, mig)
    yield _line("card", _word(card.uuid), _word(card.pci_bus_id), *numbers, *knobs, card.name)
    yield _sensors_line(card.sensors)
    yield from _process_lines(card.processes)
    for part in card.mig or ():
        numbers = (part.vram_total, part.vram_used, part.reserved)
        attributes = (part.handle_error, part.processor_slices, part.memory_mb)
        yield _line("slice", _word(part.uuid), *numbers, *attributes, part.name or "-")
        yield _sensors_line(part.sensors)
        yield from _process_lines(part.processes)


def _sensors_line(sensors: Sensors) -> str:
    return _line("sensors", *(-1 if value is None else value for value in astuple(sensors)))


def _process_lines(processes: Iterable[Process]) -> Iterator[str]:
    for process in processes:
        used = _NOT_AVAILABLE if process.used is None else process.used
        yield _line("process", process.kind[0], process.pid, used)


def _line(*fields: object) -> str:
    line = " ".join(map(str, fields))
    if not line.isprintable():
        message = f"not one line: {line!r}"
        raise ValueError(message)
    return line


def _word(text: str) -> str:
    if not text or text.split() != [text]:
        message = f"not one word: {text!r}"
        raise ValueError(message)
    return text
