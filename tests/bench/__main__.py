"""`python -m tests.bench [NAME…]`: one table of figures, measured in one run on an engine of its own.

Without names everything is measured, but for what takes long. Figures beyond their target say so; only a
measurement that could not be made is a failure (exit 1), and the others are made all the same.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from typing import TYPE_CHECKING

from tests.bench.collecting import collections
from tests.bench.crash import crash_detection
from tests.bench.decide import decisions
from tests.bench.embeddings import a_million_embeddings, embeddings
from tests.bench.idle import RUNNING, idle_cost
from tests.bench.lanes import lanes_under_load
from tests.bench.live import live_channel, open_pages
from tests.bench.relay import relay_cost
from tests.bench.rig import INSTANCES, MeasurementError, open_rig
from tests.bench.starts import cold_first_reply, start_many, start_to_ready
from tests.bench.status import calls_that_change_nothing, frozen_engine, list_latency
from tests.bench.swarm import swarm_of_many
from tests.bench.table import Row, rendered
from tests.bench.tiers import tiers
from tests.support.engine import EngineError, private_engine_obstacles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.bench.rig import Rig

_MOST_TOLD = 160

# These bring their own surroundings, and no engine.
ALONE: dict[str, Callable[[], Iterable[Row]]] = {
    "collections": collections,
    "decide": decisions,
    "embeddings": embeddings,
    "lanes": lanes_under_load,
    "live": live_channel,
    "page": open_pages,
    "relay": relay_cost,
    "swarm": swarm_of_many,
    "tiers": tiers,
}
# These take long, and are measured only where they are named.
NAMED: dict[str, Callable[[], Iterable[Row]]] = {"embeddings-million": a_million_embeddings}
# Idle cost is that of as many instances as run; everything else is measured with many.
WITH_FEW: dict[str, Callable[[Rig], Iterable[Row]]] = {"idle": idle_cost}
WITH_MANY: dict[str, Callable[[Rig], Iterable[Row]]] = {
    "start": start_to_ready,
    "cold": cold_first_reply,
    "crash": crash_detection,
    "calls": calls_that_change_nothing,
    "frozen": frozen_engine,
    "list": list_latency,
    "many": start_many,
}


def main(wanted: list[str]) -> int:
    known = [*ALONE, *NAMED, *WITH_FEW, *WITH_MANY]
    unknown = set(wanted) - set(known)
    if unknown:
        print(f"no such part: {', '.join(sorted(unknown))}; there is: {', '.join(known)}", file=sys.stderr)
        return 2
    with_engine = not wanted or bool(set(wanted) - {*ALONE, *NAMED})
    obstacles = private_engine_obstacles() if with_engine else []
    if obstacles:
        print(f"nothing was measured: {'; '.join(obstacles)}", file=sys.stderr)
        return 1
    began = time.monotonic()
    rows: list[Row] = []
    try:
        for name, measure in ALONE.items():
            if not wanted or name in wanted:
                rows += _alone(name, measure)
        for name, measure in NAMED.items():
            if name in wanted:
                rows += _alone(name, measure)
        for parts, instances in ((WITH_FEW, RUNNING), (WITH_MANY, INSTANCES)):
            names = [name for name in parts if not wanted or name in wanted]
            rows += _measured({name: parts[name] for name in names}, instances)
    except (MeasurementError, EngineError, AssertionError) as error:
        print(f"could not measure: {error}", file=sys.stderr)
        return 1
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    spent_s = time.monotonic() - began
    print(rendered(rows))
    print(f"\n{os.cpu_count()} cores, Python {platform.python_version()}, load {load}, {spent_s:.0f} s")
    return int(any(row.verdict == "FAILED" for row in rows))


def _alone(name: str, measure: Callable[[], Iterable[Row]]) -> list[Row]:
    rows: list[Row] = []
    print(f"measuring: {name} …", file=sys.stderr, flush=True)
    try:
        rows.extend(measure())
    except MeasurementError as error:
        rows.append(Row(f"{name}: could not be measured", str(error)[:_MOST_TOLD], "", "FAILED"))
    return rows


def _measured(parts: dict[str, Callable[[Rig], Iterable[Row]]], instances: int) -> list[Row]:
    if not parts:
        return []
    rows: list[Row] = []
    with open_rig(instances) as rig:
        for name, measure in parts.items():
            print(f"measuring: {name} …", file=sys.stderr, flush=True)
            try:
                rows.extend(measure(rig))  # one by one: what a part has found before it failed is kept
            except MeasurementError as error:
                rows.append(Row(f"{name}: could not be measured", str(error)[:_MOST_TOLD], "", "FAILED"))
                rig.reset()
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
