"""50 hosts and 400 instances of Docker Swarm, on stand-ins: what the daemon costs, and what it takes.

The hosts, their engines and servers are one process (`tests.support.swarm_stand_in`) beside the daemon: the
daemon and its driver are measured, and neither Docker nor a network. Ratios compare the daemon with one
that has two instances, in the same run.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from manager.domain.roles import Policy, RequestKind, Role, RoutingSettings, Strategy
from manager.domain.routing import RequestFacts, decide
from tests.bench.decide import model_name, snapshot_of
from tests.bench.idle import cpu_s, resident_bytes
from tests.bench.rig import Client, MeasurementError
from tests.bench.swarm_rig import MODEL, swarm_rig
from tests.bench.table import Row, at_most, percentile
from tests.support.daemon import COMPUTE, ROOT, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bench.swarm_rig import SwarmRig

_HOSTS, _CARDS = 50, 7
_INSTANCES = _HOSTS * (_CARDS + 1)
_AT_ONCE = 100
_MOST_US = 100
_DECISIONS = 2000
_CALLS = 20
_WATCHED_S = 16.0
_REQUESTS = 4000
_CONNECTIONS = 16
_ROUNDS = 3
_PAGES = (
    f"{COMPUTE}/instances",
    "/v1/cluster/hosts",
    "/metrics",
    "/v1/models",
    "/ui",
    "/ui/instances",
)


def swarm_of_many() -> Iterator[Row]:
    """Measure a swarm beside one of two instances: three minutes."""
    yield from _decisions()
    with swarm_rig(1, 1) as few, swarm_rig(_HOSTS, _CARDS) as many:
        few.daemon.start()
        few.start(few.ids())
        yield from _first_start(many)
        half = many.ids()[: _INSTANCES // 2]
        many.start(half[: len(half) - _AT_ONCE])
        yield _starts(many, half[len(half) - _AT_ONCE :])
        yield from _answers(few, many, "half of them ready")
        many.start(many.ids())
        yield from _answers(few, many, "all ready")
        yield from _idle(few, many)
        yield from _requests(few, many)
        yield from _losses(many)
        yield from _adoption(many)


def _decisions() -> Iterator[Row]:
    """Each made anew; the daemon keeps them until something changes."""
    snapshot = snapshot_of(_INSTANCES)
    roles = (
        Role("output", RequestKind.GENERATE, model_name(1)),
        Role("thinking", RequestKind.GENERATE, model_name(2), "i01", Policy.PREFER_GPU),
        Role("spread", RequestKind.GENERATE, model_name(4), strategy=Strategy.LEAST_LOADED),
    )
    settings = RoutingSettings({role.name: role for role in roles})
    asked = [RequestFacts(one, RequestKind.GENERATE) for one in (model_name(0), *settings.roles)]
    spent = []
    for number in range(_DECISIONS):
        began = time.thread_time_ns()  # whatever else goes on
        decide(asked[number % len(asked)], settings, snapshot)
        spent.append((time.thread_time_ns() - began) / 1e3)
    what = f"decision, {_INSTANCES} instances with each model, half of them ready"
    yield at_most(f"{what}: p50", percentile(spent, 0.5), _MOST_US, " µs")
    yield at_most(f"{what}: p99", percentile(spent, 0.99), _MOST_US, " µs")


def _first_start(rig: SwarmRig) -> Iterator[Row]:
    began = time.monotonic()
    rig.daemon.start()
    ready_s = time.monotonic() - began
    rig.wait_for_phases({"stopped": _INSTANCES})
    spent_s = time.monotonic() - began
    yield Row(
        f"start of the daemon until {_INSTANCES} stopped instances are known",
        f"{spent_s:.1f} s  (it is ready after {ready_s:.1f} s)",
    )
    yield Row("resident memory then", f"{resident_bytes(rig.pid) / 2**20:.0f} MiB")


def _adoption(rig: SwarmRig) -> Iterator[Row]:
    rig.daemon.kill()
    began = time.monotonic()
    rig.daemon.start()
    rig.wait_for_phases({"ready": _INSTANCES})
    spent_s = time.monotonic() - began
    yield Row(
        f"start of the daemon until {_INSTANCES} running instances are taken over",
        f"{spent_s:.1f} s  ({cpu_s(rig.pid):.1f} s of CPU)",
    )


def _starts(rig: SwarmRig, ids: list[str]) -> Row:
    cpu_before_s, before, began = cpu_s(rig.pid), rig.calls(), time.monotonic()
    rig.start(ids)
    spent_s, cpu_spent_s, after = time.monotonic() - began, cpu_s(rig.pid) - cpu_before_s, rig.calls()
    mib = (after["bytes"] - before["bytes"]) / 2**20
    return Row(
        f"start of {len(ids)} instances at once until all are ready",
        f"{spent_s:.1f} s  (each {cpu_spent_s / len(ids) * 1e3:.1f} ms of CPU, "
        f"{mib / len(ids):.2f} MiB from Docker)",
    )


def _answers(few: SwarmRig, many: SwarmRig, when: str) -> Iterator[Row]:
    for path in _PAGES:
        found, with_few = _spent(many, path), _spent(few, path)
        p50, p99 = statistics.median(found.milliseconds), percentile(found.milliseconds, 0.99)
        beside = f"{p50:.0f} / {p99:.0f} ms, {found.size / 1024:.0f} KiB; with two {with_few.cpu_ms:.1f} ms"
        yield Row(f"GET {path}, {when}: CPU, p50 / p99", f"{found.cpu_ms:.1f} ms  ({beside})")


class _Spent(NamedTuple):
    """What so many calls took: each of them, and the mean of the daemon's processor time."""

    milliseconds: list[float]
    cpu_ms: float
    size: int


def _spent(rig: SwarmRig, path: str) -> _Spent:
    spent, size, before_s = [], 0, scheduled_s(rig.pid)
    with Client(rig.daemon.port) as client:
        for _ in range(_CALLS):
            began = time.perf_counter()
            status, body = client.get(path)
            spent.append((time.perf_counter() - began) * 1e3)
            size = len(body)
            if status != http.client.OK:
                raise MeasurementError(f"{path} was answered with {status}")
    return _Spent(spent, (scheduled_s(rig.pid) - before_s) / _CALLS * 1e3, size)


def scheduled_s(pid: int) -> float:
    """The processor time of all threads of a process, to the nanosecond."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((one / "schedstat").read_text().split()[0]) for one in threads) / 1e9


def _idle(few: SwarmRig, many: SwarmRig) -> Iterator[Row]:
    """Both at the same time: what else the machine does meets both."""
    before, calls, began = [cpu_s(one.pid) for one in (few, many)], many.calls(), time.monotonic()
    time.sleep(_WATCHED_S)  # it is what is measured
    lasted_s, after = time.monotonic() - began, many.calls()
    few_share, many_share = (
        (cpu_s(one.pid) - was) / lasted_s * 100 for one, was in zip((few, many), before, strict=True)
    )
    few_bytes, many_bytes = resident_bytes(few.pid), resident_bytes(many.pid)
    of_host = (many_share - few_share) / (_HOSTS - few.hosts)
    kib = (many_bytes - few_bytes) / (_HOSTS - few.hosts) / 1024
    yield Row(
        f"idle CPU with {_INSTANCES} ready instances, of one core",
        f"{many_share:.1f} %  ({few_share:.1f} % with two)",
    )
    yield Row("resident memory", f"{many_bytes / 2**20:.0f} MiB  ({few_bytes / 2**20:.0f} MiB with two)")
    yield Row(f"cost of one host of {_CARDS + 1} instances", f"{of_host:.2f} % of one core, {kib:.0f} KiB")
    mib = (after["bytes"] - calls["bytes"]) / 2**20
    made = sum(after[kind] - calls.get(kind, 0) for kind in after if kind != "bytes")
    yield Row("  of Docker's API", f"{made / lasted_s:.1f} calls and {mib / lasted_s:.2f} MiB a second")


def _requests(few: SwarmRig, many: SwarmRig) -> Iterator[Row]:
    """In turn, several times: the median of the ratios of the pairs."""
    rates = [(_rate(few), _rate(many)) for _ in range(_ROUNDS)]
    ratio = statistics.median(with_many / with_few for with_few, with_many in rates)
    few_rate, many_rate = (statistics.median(one) for one in zip(*rates, strict=True))
    yield Row(
        f"requests through the daemon, {_CONNECTIONS} connections",
        f"{ratio:.2f} x those with two instances  ({many_rate:.0f} and {few_rate:.0f} a second)",
    )


def _rate(rig: SwarmRig) -> float:
    arguments = ("requests", rig.daemon.port, _CONNECTIONS, _REQUESTS)
    command = [sys.executable, "-m", "tests.bench.load", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise MeasurementError(f"the load failed: {result.stderr.strip()[-200:]}")
    found: dict[str, Any] = json.loads(result.stdout)
    if found["bad"]:
        raise MeasurementError(f"{found['bad']} answers were errors")
    return _REQUESTS / float(found["took_s"])


def _losses(rig: SwarmRig) -> Iterator[Row]:
    """Three hosts are lost, each in another way."""
    ways: tuple[tuple[str, Callable[[int], None]], ...] = (
        ("servers end, and Swarm says nothing", lambda host: rig.change("lose", host)),
        ("servers fall silent, and Swarm says nothing", lambda host: rig.change("lose", host, silent="1")),
        ("engine is down, as Swarm says", lambda host: rig.change("down", host)),
    )
    for host, (what, lose) in enumerate(ways, 1):
        lost = set(rig.of_host(host))
        began = time.monotonic()
        lose(host)
        wait_for(lambda lost=lost: not lost & rig.running(MODEL), within_s=60)  # type: ignore[misc]
        spent_s = time.monotonic() - began
        yield Row(f"a host of {len(lost)} instances whose {what}: out of routing", f"{spent_s:.1f} s")
    for host, _ in enumerate(ways, 1):
        rig.change("mend", host)
    rig.start([id_ for host, _ in enumerate(ways, 1) for id_ in rig.of_host(host)])
    rig.wait_for_phases({"ready": rig.count})
