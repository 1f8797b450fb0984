"""What the daemon costs while nothing happens."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.rig import ids
from tests.bench.table import Row, at_most

if TYPE_CHECKING:
    from tests.bench.rig import Rig

RUNNING = 8
_SETTLE_S = 3.0
_WATCHED_S = 30.0


def idle_cost(rig: Rig) -> list[Row]:
    """Processor time over half a minute and resident memory at its end, children included."""
    rig.start(ids(RUNNING))
    time.sleep(_SETTLE_S)
    before_s, began = cpu_s(rig.pid), time.monotonic()
    time.sleep(_WATCHED_S)
    share = (cpu_s(rig.pid) - before_s) / (time.monotonic() - began)
    resident = sum(resident_bytes(pid) for pid in _family(rig.pid))
    threads = len(list(Path(f"/proc/{rig.pid}/task").iterdir()))
    rig.stop(ids(RUNNING))
    return [
        at_most(
            f"idle CPU with {RUNNING} running instances, of one core",
            share * 100,
            1,
            " %",
            digits=2,
            beside=f"{share * 1e6 / RUNNING:.0f} us/s an instance over {_WATCHED_S:g} s",
        ),
        at_most("idle resident memory", resident / 2**20, 120, " MiB", beside=f"{threads} threads"),
    ]


def cpu_s(pid: int) -> float:
    """User and system time of a process, its threads and its children, dead and alive (proc(5), stat)."""
    ticks = 0
    for one in _family(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for child in task.read_text().split()
    ]
    return [pid, *(one for child in children for one in _family(child))]
