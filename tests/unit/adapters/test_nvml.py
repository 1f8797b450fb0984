"""The NVML adapter, through the real ctypes path, in a process that loads the stand-in library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.nvml.standin import Age, Card, Process, Sensors, Slice, build, environment, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[3]
READER = ROOT / "tests" / "nvml" / "reader.py"
GIB = 2**30
AMPERE = "NVIDIA A100-SXM4-40GB"
SENSORS = ("utilisation_percent", "temperature_c", "power_watts", "power_limit_watts")
UNKNOWN = dict.fromkeys(SENSORS)


class Machine:
    """A machine with the stand-in, and at most one process that reads its cards."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.library = library
        self.state = folder / "machine"
        self.calls_file = folder / "calls"
        self.process: subprocess.Popen[str] | None = None

    def cards(self, *cards: Card, **knobs: Any) -> None:
        write(self.state, cards, **knobs)

    def ask(self, *command: str | float) -> dict[str, Any]:
        process = self.process or self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(" ".join(map(str, command)) + "\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        return answer

    def read(self) -> list[dict[str, Any]]:
        answer = self.ask("read")
        assert "gpus" in answer, answer
        gpus: list[dict[str, Any]] = answer["gpus"]
        return gpus

    def refusal(self) -> str:
        refused: str = self.ask("read")["refused"]
        return refused

    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def start(self, timeout_s: float = 60.0) -> subprocess.Popen[str]:
        variables = environment(self.library, self.state, calls=self.calls_file)
        self.process = subprocess.Popen(
            [sys.executable, READER, str(timeout_s)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self.process

    def leave(self) -> int | None:
        """End of input: the process ends by itself. Returns its exit status."""
        if self.process is None:
            return None
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Age], Path]:
    folder = tmp_path_factory.mktemp("nvml")
    return lambda age: build(folder, age)


@pytest.fixture
def machine(libraries: Callable[[Age], Path], tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(libraries(Age.CURRENT), tmp_path)
    yield machine
    machine.leave()


def memory(gpu: dict[str, Any]) -> tuple[int | None, int | None, int | None]:
    return gpu["vram_total_bytes"], gpu["vram_used_bytes"], gpu["vram_free_bytes"]


def uuids(gpus: list[dict[str, Any]]) -> list[str]:
    return [gpu["uuid"] for gpu in gpus]


def sensors(gpu: dict[str, Any]) -> list[float | None]:
    return [gpu[name] for name in SENSORS]


# What a card says


def test_a_card_is_read_with_identity_memory_and_processes(machine: Machine) -> None:
    machine.cards(
        Card("GPU-a", "00000000:01:00.0", "NVIDIA H200", 140 * GIB),
        Card(
            "GPU-b",
            "00000000:81:00.0",
            "NVIDIA RTX 6000",
            48 * GIB,
            vram_used=3 * GIB,
            processes=(Process(77, GIB),),
        ),
    )
    assert machine.read() == [
        {
            "uuid": "GPU-a",
            "index": 0,
            "pci_bus_id": "00000000:01:00.0",
            "name": "NVIDIA H200",
            "vram_total_bytes": 140 * GIB,
            "vram_used_bytes": 0,
            "vram_free_bytes": 140 * GIB,
            "processes": [],
            "lists_processes": True,
            "lost": None,
            "host": None,
            "why_unknown": None,
            **UNKNOWN,
        },
        {
            "uuid": "GPU-b",
            "index": 1,
            "pci_bus_id": "00000000:81:00.0",
            "name": "NVIDIA RTX 6000",
            "vram_total_bytes": 48 * GIB,
            "vram_used_bytes": 3 * GIB,
            "vram_free_bytes": 45 * GIB,
            "processes": [{"pid": 77, "used_bytes": GIB}],
            "lists_processes": True,
            "lost": None,
            "host": None,
            "why_unknown": None,
            **UNKNOWN,
        },
    ]


def test_the_sensors_of_a_card_are_read_in_percent_degrees_and_watts(machine: Machine) -> None:
    machine.cards(Card("GPU-a", sensors=Sensors(97, 61, 412_500, 700_000)), Card("GPU-b"))
    assert [sensors(gpu) for gpu in machine.read()] == [[97, 61, 412.5, 700.0], [None] * 4]


@pytest.mark.parametrize("place", range(len(SENSORS)))
def test_a_sensor_that_a_card_does_not_have_is_unknown_and_hides_no_other(
    machine: Machine, place: int
) -> None:
    values: list[int | None] = [0, 30, 9000, 70_000]
    values[place] = None
    machine.cards(Card("GPU-a", vram_used=GIB, sensors=Sensors(*values)))
    (gpu,) = machine.read()
    expected: list[float | None] = [0, 30, 9.0, 70.0]
    expected[place] = None
    assert sensors(gpu) == expected
    assert gpu["vram_used_bytes"] == GIB
    assert gpu["lost"] is None


@pytest.mark.parametrize("age", [Age.COMING, Age.OLD])
def test_the_temperature_is_read_through_the_function_that_the_driver_has(
    libraries: Callable[[Age], Path], tmp_path: Path, age: Age
) -> None:
    machine = Machine(libraries(age), tmp_path)
    machine.cards(Card("GPU-a", sensors=Sensors(5, 44, 60_000, 70_000)))
    (gpu,) = machine.read()
    machine.leave()
    assert sensors(gpu) == [5, 44, 60.0, 70.0]


def test_a_slice_has_the_temperature_of_its_card_and_nothing_of_its_power(machine: Machine) -> None:
    part = Slice("MIG-1", f"{AMPERE} MIG 1g.5gb", 5 * GIB)
    own = replace(part, uuid="MIG-2", sensors=Sensors(utilisation=40))
    machine.cards(Card("GPU-a", mig=(part, own), sensors=Sensors(90, 55, 300_000, 400_000)))
    assert [sensors(gpu) for gpu in machine.read()] == [[None, 55, None, None], [40, 55, None, None]]


def test_the_sensors_of_a_lost_card_are_unknown(machine: Machine) -> None:
    machine.cards(Card("GPU-a", sensors=Sensors(5, 44, 60_000, 70_000)))
    machine.read()
    machine.cards(Card("GPU-a", error=15, sensors=Sensors(5, 44, 60_000, 70_000)))
    (gpu,) = machine.read()
    assert sensors(gpu) == [None] * 4


def test_a_machine_with_a_driver_and_no_card_has_no_cards(machine: Machine) -> None:
    machine.cards()
    assert machine.read() == []


def test_reserved_memory_is_neither_used_nor_free(machine: Machine) -> None:
    machine.cards(Card("GPU-a", vram_total=100, vram_used=10, reserved=5))
    assert memory(machine.read()[0]) == (100, 10, 85)


@pytest.mark.parametrize("error", [3, 25])
def test_version_1_of_the_memory_is_read_where_version_2_is_refused(machine: Machine, error: int) -> None:
    machine.cards(Card("GPU-a", vram_total=100, vram_used=10, reserved=5, memory_v2_error=error))
    assert memory(machine.read()[0]) == (100, 15, 85)


def test_a_process_in_several_lists_counts_once(machine: Machine) -> None:
    processes = (
        Process(9, 10, "compute"),
        Process(9, 10, "graphics"),
        Process(8, 20, "graphics"),
        Process(7, 30, "mps"),
    )
    machine.cards(Card("GPU-a", processes=processes))
    assert machine.read()[0]["processes"] == [
        {"pid": 7, "used_bytes": 30},
        {"pid": 8, "used_bytes": 20},
        {"pid": 9, "used_bytes": 10},
    ]


def test_memory_of_a_process_that_the_driver_will_not_tell_is_unknown(machine: Machine) -> None:
    processes = (
        Process(1, None),
        Process(2, None, "compute"),
        Process(2, 5, "graphics"),
        Process(3, 6, "compute"),
        Process(3, None, "mps"),
        Process(4, None, "compute"),
        Process(4, None, "graphics"),
        Process(5, 0),
    )
    machine.cards(Card("GPU-a", processes=processes))
    assert {it["pid"]: it["used_bytes"] for it in machine.read()[0]["processes"]} == {
        1: None,
        2: 5,
        3: 6,
        4: None,
        5: 0,
    }


# Older drivers


def test_an_old_driver_is_read_through_the_functions_that_it_has(
    libraries: Callable[[Age], Path], machine: Machine
) -> None:
    machine.library = libraries(Age.OLD)
    processes = (Process(9, 10), Process(8, 20, "graphics"), Process(7, None, "mps"))
    machine.cards(Card("GPU-a", vram_total=100, vram_used=10, reserved=5, processes=processes))
    (gpu,) = machine.read()
    assert memory(gpu) == (100, 15, 85)
    assert [it["pid"] for it in gpu["processes"]] == [7, 8, 9]


def test_a_library_with_next_to_no_functions_still_gives_uuid_and_memory(
    libraries: Callable[[Age], Path], machine: Machine
) -> None:
    machine.library = libraries(Age.MINIMAL)
    machine.cards(Card("GPU-a", vram_total=100, vram_used=10))
    (gpu,) = machine.read()
    assert gpu["uuid"] == "GPU-a"
    assert memory(gpu) == (100, 10, 90)
    assert gpu["processes"] == []


# MIG

HALF = Slice("MIG-1", f"{AMPERE} MIG 3g.20gb", 20 * GIB, GIB, processes=(Process(5, GIB),))
SEVENTH = Slice("MIG-2", f"{AMPERE} MIG 1g.5gb", 5 * GIB)
SLICED = Card("GPU-a", "00000000:41:00.0", AMPERE, 40 * GIB, mig=(HALF, SEVENTH))


def test_slices_are_reported_in_place_of_their_card(machine: Machine) -> None:
    machine.cards(Card("GPU-b"), SLICED)
    whole, half, seventh = machine.read()
    assert whole["uuid"] == "GPU-b"
    assert half == {
        "uuid": "MIG-1",
        "index": 1,
        "pci_bus_id": "00000000:41:00.0",
        "name": "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "vram_total_bytes": 20 * GIB,
        "vram_used_bytes": GIB,
        "vram_free_bytes": 19 * GIB,
        "processes": [{"pid": 5, "used_bytes": GIB}],
        "lists_processes": True,
        "lost": None,
        "host": None,
        "why_unknown": None,
        **UNKNOWN,
    }
    assert (seventh["uuid"], seventh["index"], seventh["vram_total_bytes"]) == ("MIG-2", 1, 5 * GIB)


def test_a_card_with_mig_on_and_no_slices_offers_nothing(machine: Machine) -> None:
    machine.cards(Card("GPU-a", mig=()), Card("GPU-b"))
    assert uuids(machine.read()) == ["GPU-b"]


def test_a_card_with_mig_off_is_a_whole_card(machine: Machine) -> None:
    machine.cards(Card("GPU-a", mig_off=True))
    assert uuids(machine.read()) == ["GPU-a"]


def test_slices_that_come_and_go_are_seen_without_a_restart(machine: Machine) -> None:
    machine.cards(Card("GPU-a", mig_off=True))
    assert uuids(machine.read()) == ["GPU-a"]
    machine.cards(Card("GPU-a", mig=(HALF,)))
    assert uuids(machine.read()) == ["MIG-1"]


def test_the_profile_is_derived_where_the_driver_does_not_name_slices(machine: Machine) -> None:
    told = Slice("MIG-1", processor_slices=3, memory_mb=20096)
    untold = Slice("MIG-2")
    same_as_card = Slice("MIG-3", AMPERE, processor_slices=1, memory_mb=4864)
    machine.cards(Card("GPU-a", name=AMPERE, mig=(told, untold, same_as_card)))
    assert [gpu["name"] for gpu in machine.read()] == [
        f"{AMPERE} MIG 3g.20gb",
        f"{AMPERE} MIG",
        f"{AMPERE} MIG 1g.5gb",
    ]


# One bad card


@pytest.mark.parametrize("error", [15, 16, 999])
def test_a_bad_card_has_unknown_memory_and_hides_no_other(machine: Machine, error: int) -> None:
    bad = Card("GPU-b", vram_used=GIB, processes=(Process(1, GIB),), error=error)
    machine.cards(Card("GPU-a"), bad, Card("GPU-c"))
    gpus = machine.read()
    assert uuids(gpus) == ["GPU-a", "GPU-b", "GPU-c"]
    assert memory(gpus[1]) == (None, None, None)
    assert gpus[1]["processes"] == []
    assert memory(gpus[0])[1] == memory(gpus[2])[1] == 0


@pytest.mark.parametrize("error", [15, 16, 999])
def test_a_card_that_cannot_be_opened_any_more_is_told_from_memory(machine: Machine, error: int) -> None:
    machine.cards(Card("GPU-a", "00000000:41:00.0", "NVIDIA H200", vram_used=GIB), Card("GPU-b"))
    machine.read()
    machine.cards(Card("GPU-a", handle_error=error), Card("GPU-b"))
    lost, fine = machine.read()
    assert (lost["uuid"], lost["index"], lost["name"]) == ("GPU-a", 0, "NVIDIA H200")
    assert lost["pci_bus_id"] == "00000000:41:00.0"
    assert memory(lost) == (None, None, None)
    assert fine["vram_used_bytes"] == 0


def test_a_lost_sliced_card_keeps_its_slices_with_unknown_memory(machine: Machine) -> None:
    machine.cards(SLICED, Card("GPU-b"))
    machine.read()
    machine.cards(Card("GPU-a", error=15, mig=(HALF, SEVENTH)), Card("GPU-b"))
    gpus = machine.read()
    assert uuids(gpus) == ["MIG-1", "MIG-2", "GPU-b"]
    assert memory(gpus[0]) == memory(gpus[1]) == (None, None, None)


def test_a_bad_card_that_recovers_is_measured_again(machine: Machine) -> None:
    machine.cards(Card("GPU-a", error=15))
    assert memory(machine.read()[0]) == (None, None, None)
    machine.cards(Card("GPU-a", vram_total=100, vram_used=1))
    assert memory(machine.read()[0]) == (100, 1, 99)


def test_a_card_that_could_never_be_opened_is_left_out(machine: Machine) -> None:
    machine.cards(Card("GPU-a", handle_error=15), Card("GPU-b"))
    assert uuids(machine.read()) == ["GPU-b"]


def test_when_no_card_could_ever_be_opened_the_error_is_told(machine: Machine) -> None:
    machine.cards(Card("GPU-a", handle_error=15))
    assert machine.refusal() == "gpu_lost"


def test_a_slice_that_cannot_be_opened_any_more_does_not_turn_the_rest_into_a_whole_card(
    machine: Machine,
) -> None:
    machine.cards(SLICED)
    machine.read()
    machine.cards(replace(SLICED, mig=(HALF, replace(SEVENTH, handle_error=999))), Card("GPU-b"))
    assert uuids(machine.read()) == ["MIG-1", "MIG-2", "GPU-b"]


def test_a_sliced_card_whose_slices_could_never_be_opened_is_left_out(machine: Machine) -> None:
    machine.cards(replace(SLICED, mig=(replace(HALF, handle_error=999),)), Card("GPU-b"))
    assert uuids(machine.read()) == ["GPU-b"]


@pytest.mark.parametrize("age", [Age.CURRENT, Age.OLD])
@pytest.mark.parametrize("card", [Card("GPU-a", error=9), Card("GPU-a", handle_error=9)])
def test_a_driver_that_goes_away_under_a_card_is_not_taken_for_a_bad_card(
    libraries: Callable[[Age], Path], machine: Machine, card: Card, age: Age
) -> None:
    machine.library = libraries(age)
    machine.cards(card, Card("GPU-b"))
    assert machine.refusal() == "driver_not_loaded"


# A card that is lost, and comes back


@pytest.mark.parametrize(("error", "why"), [(15, "Xid 79"), (16, "--gpu-reset"), (999, None)])
@pytest.mark.parametrize("where", ["handle_error", "error"])
def test_a_card_is_lost_where_its_error_says_so(
    machine: Machine, where: str, error: int, why: str | None
) -> None:
    machine.cards(Card("GPU-a"), Card("GPU-b"))
    assert [gpu["lost"] for gpu in machine.read()] == [None, None]
    machine.cards(replace(Card("GPU-a"), **{where: error}), Card("GPU-b"))  # type: ignore[arg-type]
    bad, fine = machine.read()
    assert bad["uuid"] == "GPU-a"
    assert (bad["lost"] is None) == (why is None)
    assert why is None or why in bad["lost"]
    assert not bad["lists_processes"]
    assert (fine["lost"], fine["lists_processes"]) == (None, True)


@pytest.mark.parametrize("age", [Age.CURRENT, Age.OLD, Age.MINIMAL])
def test_a_card_that_is_lost_from_the_first_reading_on_is_lost(
    libraries: Callable[[Age], Path], machine: Machine, age: Age
) -> None:
    machine.library = libraries(age)
    machine.cards(Card("GPU-a", error=15))
    (gpu,) = machine.read()
    assert "Xid 79" in gpu["lost"]


def test_the_slices_of_a_lost_card_are_lost(machine: Machine) -> None:
    machine.cards(SLICED)
    machine.read()
    machine.cards(replace(SLICED, error=15))
    assert all("Xid 79" in gpu["lost"] for gpu in machine.read())


def test_a_library_that_lists_no_processes_does_not_claim_that_there_are_none(
    libraries: Callable[[Age], Path], machine: Machine
) -> None:
    machine.library = libraries(Age.MINIMAL)
    machine.cards(Card("GPU-a"))
    assert not machine.read()[0]["lists_processes"]


def test_a_card_that_was_taken_out_is_lost_then_left_out_and_comes_back(machine: Machine) -> None:
    both = (Card("GPU-a"), Card("GPU-b"))
    machine.cards(*both, at_init=True)
    machine.read()
    machine.cards(both[1], at_init=True)
    lost, fine = machine.read()
    assert (lost["uuid"], fine["uuid"], fine["lost"]) == ("GPU-a", "GPU-b", None)
    assert "Xid 79" in lost["lost"]
    machine.ask("advance", 1)
    assert uuids(machine.read()) == ["GPU-b"]  # NVML was initialised again and lists it no more
    machine.cards(*both, at_init=True)
    assert uuids(machine.read()) == ["GPU-b"]
    machine.ask("advance", 2)
    assert [(gpu["uuid"], gpu["lost"]) for gpu in machine.read()] == [("GPU-a", None), ("GPU-b", None)]


def test_nvml_is_initialised_again_for_a_missing_card_less_and_less_often_and_then_no_more(
    machine: Machine,
) -> None:
    both = (Card("GPU-a"), Card("GPU-b"))
    machine.cards(*both)
    machine.read()
    machine.cards(both[0])
    machine.read()
    waits_s: list[int] = []
    while len(waits_s) < 8:
        before, waited_s = machine.calls().count("nvmlInitWithFlags"), 0
        while machine.calls().count("nvmlInitWithFlags") == before:
            machine.ask("advance", 1)
            waited_s += 1
            machine.read()
        waits_s.append(waited_s)
    assert waits_s == [1, 2, 4, 8, 16, 32, 60, 60]
    machine.cards(*both)
    machine.read()
    before = machine.calls().count("nvmlInitWithFlags")
    for _ in range(3):
        machine.ask("advance", 60)
        machine.read()
    assert machine.calls().count("nvmlInitWithFlags") == before


def test_a_card_that_moves_to_another_index_is_not_taken_for_the_one_that_is_gone(machine: Machine) -> None:
    machine.cards(Card("GPU-a"), Card("GPU-b"))
    machine.read()
    machine.cards(Card("GPU-b"))
    assert uuids(machine.read()) == ["GPU-b"]
    machine.cards(Card("GPU-b"), Card("GPU-c", handle_error=15))
    assert uuids(machine.read()) == ["GPU-b"]  # what had that index before is forgotten


def test_slices_that_come_and_go_for_ever_are_not_remembered_for_ever(machine: Machine) -> None:
    machine.cards(Card("GPU-a"))
    machine.read()
    for first in range(0, 300, 8):
        part = tuple(Slice(f"MIG-{number}") for number in range(first, first + 8))
        machine.cards(Card("GPU-a", mig=part))
        machine.read()
    machine.cards(Card("GPU-a", mig=part))
    machine.read()
    assert machine.ask("seen")["seen"] <= 256


# No driver, no library


@pytest.mark.parametrize(
    ("error", "name", "remedy"),
    [
        (3, "not_supported", "update the driver"),
        (9, "driver_not_loaded", "modprobe nvidia"),
        (12, "library_missing", "install the NVIDIA driver"),
        (13, "not_supported", "update the driver"),
        (15, "gpu_lost", "reboot the host"),
        (16, "reset_required", "--gpu-reset"),
        (18, "version_mismatch", "restart this daemon"),
        (999, "unknown", "nvidia-smi"),
        (4, "unknown", "NVML error 4: Insufficient Permissions"),
        (12345, "unknown", "NVML error 12345"),
    ],
)
@pytest.mark.parametrize("where", ["init", "count"])
def test_an_nvml_error_has_a_name_and_a_remedy(
    machine: Machine, where: str, error: int, name: str, remedy: str
) -> None:
    if where == "init":
        machine.cards(Card("GPU-a"), init_error=error)
    else:
        machine.cards(Card("GPU-a"), count_error=error)
    answer = machine.ask("read")
    assert answer["refused"] == name
    assert answer["code"] == "gpu_query_failed"
    assert remedy in answer["message"]
    assert f"NVML error {error}" in answer["message"]


def test_a_missing_library_is_refused_without_importing_pynvml(machine: Machine, tmp_path: Path) -> None:
    machine.library = tmp_path / "libnvidia-ml.so.1"
    answer = machine.ask("read")
    assert answer["refused"] == "library_missing"
    assert "libnvidia-ml.so.1: cannot open shared object file" in answer["message"]
    assert machine.ask("imported") == {"pynvml": False}


def test_an_empty_library_file_is_a_missing_library(machine: Machine, tmp_path: Path) -> None:
    machine.library = tmp_path / "libnvidia-ml.so.1"
    machine.library.touch()  # what container toolkits leave behind in an image
    answer = machine.ask("read")
    assert answer["refused"] == "library_missing"
    assert "file too short" in answer["message"]


def test_a_library_that_appears_is_found_after_the_wait_and_not_looked_for_before(
    machine: Machine, tmp_path: Path
) -> None:
    built, machine.library = machine.library, tmp_path / "libnvidia-ml.so.1"
    machine.cards(Card("GPU-a"))
    assert machine.refusal() == "library_missing"
    shutil.copy(built, machine.library)
    machine.ask("advance", 0.9)
    assert machine.refusal() == "library_missing"
    machine.ask("advance", 0.2)
    assert uuids(machine.read()) == ["GPU-a"]


def test_a_driver_that_is_loaded_later_is_found(machine: Machine) -> None:
    machine.cards(init_error=9)
    assert machine.refusal() == "driver_not_loaded"
    machine.cards(Card("GPU-a"))
    machine.ask("advance", 1)
    assert uuids(machine.read()) == ["GPU-a"]


def test_attempts_without_a_driver_thin_out_to_one_a_minute(machine: Machine) -> None:
    machine.cards(init_error=9)
    waits_s: list[int] = []
    while len(waits_s) < 9:
        assert machine.refusal() == "driver_not_loaded"
        attempts = len(machine.calls())
        waited_s = 0
        while len(machine.calls()) == attempts:
            machine.ask("advance", 1)
            waited_s += 1
            assert machine.refusal() == "driver_not_loaded"
        waits_s.append(waited_s)
        assert set(machine.calls()) == {"nvmlInitWithFlags"}
    assert waits_s == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_good_read_resets_the_wait(machine: Machine) -> None:
    machine.cards(init_error=9)
    machine.refusal()
    machine.ask("advance", 1)
    machine.refusal()
    machine.ask("advance", 2)
    machine.cards(Card("GPU-a"))
    machine.read()
    machine.cards(count_error=9)
    machine.refusal()
    machine.ask("advance", 1)
    machine.cards(Card("GPU-a"))
    assert uuids(machine.read()) == ["GPU-a"]


def test_nvml_is_initialised_once(machine: Machine) -> None:
    machine.cards(Card("GPU-a"))
    for _ in range(3):
        machine.read()
    assert machine.calls().count("nvmlInitWithFlags") == 1


def test_a_driver_that_failed_is_shut_down_and_initialised_again(machine: Machine) -> None:
    machine.cards(Card("GPU-a"))
    machine.read()
    machine.cards(Card("GPU-a"), count_error=999)
    assert machine.refusal() == "unknown"
    assert machine.calls()[-1] == "nvmlShutdown"
    machine.ask("advance", 1)
    machine.cards(Card("GPU-b"))
    assert uuids(machine.read()) == ["GPU-b"]
    assert machine.calls().count("nvmlInitWithFlags") == 2


# A hanging driver


def test_a_read_that_hangs_is_refused_at_its_deadline(machine: Machine) -> None:
    machine.cards(Card("GPU-a"), hang_s=3600)
    machine.start(timeout_s=0.05)
    answer = machine.ask("read")
    assert answer["refused"] == "timeout"
    assert "waited 0.05 s" in answer["message"]


def test_while_one_read_hangs_others_fail_without_waiting_or_calling(machine: Machine) -> None:
    machine.cards(Card("GPU-a"), hang_s=3600)
    machine.start(timeout_s=0.05)
    machine.ask("read")
    for _ in range(3):
        answer = machine.ask("read_at_once")
        assert answer["refused"] == "timeout"
        assert "an earlier read still hangs" in answer["message"]
    assert len(machine.calls()) <= 1


def test_reading_goes_on_when_the_hang_ends(machine: Machine) -> None:
    machine.cards(Card("GPU-a"), hang_s=3600)
    machine.start(timeout_s=0.2)
    assert machine.refusal() == "timeout"
    machine.cards(Card("GPU-b"))
    assert uuids(machine.ask("read_until_answered")["gpus"]) == ["GPU-b"]
    assert machine.calls().count("nvmlInitWithFlags") == 1


def test_reads_that_overlap_share_one_answer(machine: Machine) -> None:
    machine.cards(Card("GPU-a"))
    answer = machine.ask("read_twice")
    assert answer["same"]
    assert uuids(answer["gpus"]) == ["GPU-a"]
    assert machine.calls().count("nvmlDeviceGetCount_v2") == 1


def test_a_caller_who_gives_up_spoils_nothing_for_the_next(machine: Machine) -> None:
    machine.cards(Card("GPU-a"))
    assert machine.ask("read_and_give_up") == {"cancelled": True}
    assert uuids(machine.read()) == ["GPU-a"]


# Closing


def test_closing_shuts_nvml_down(machine: Machine) -> None:
    machine.cards(Card("GPU-a"))
    machine.read()
    machine.ask("close")
    assert machine.calls()[-1] == "nvmlShutdown"
    machine.ask("close")
    assert machine.calls().count("nvmlShutdown") == 1


def test_closing_before_the_first_read_loads_nothing(machine: Machine) -> None:
    machine.ask("close")
    assert machine.ask("imported") == {"pynvml": False}


def test_closing_without_a_driver_is_no_error(machine: Machine) -> None:
    machine.cards(init_error=9)
    machine.refusal()
    assert machine.ask("close") == {}


def test_a_closed_reader_says_so(machine: Machine) -> None:
    machine.ask("close")
    assert machine.refusal() == "closed"


def test_closing_does_not_wait_for_a_hanging_read_and_the_process_can_end(machine: Machine) -> None:
    machine.cards(Card("GPU-a"), hang_s=3600)
    machine.start(timeout_s=0.05)
    machine.ask("read")
    assert machine.ask("close_at_once") == {}
    assert machine.leave() == 0


def test_closing_waits_no_longer_than_its_deadline(machine: Machine) -> None:
    machine.cards(Card("GPU-a"), hang_s=3600)
    machine.start(timeout_s=0.05)
    assert machine.ask("read_and_give_up") == {"cancelled": True}
    assert machine.ask("close") == {}
    assert machine.leave() == 0
