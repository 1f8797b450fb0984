"""Five lanes at three times capacity, beside the protected lane alone, in the same run.

Servers answer after a fixed time, so that the capacity is known: slots by answers a second. Requests arrive
by chance, at a rate of their own, whatever becomes of those before.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import uvloop

from manager.domain.lanes import LaneRules, Lanes, Waiter
from tests.bench.rig import MeasurementError
from tests.bench.sampler import talking
from tests.bench.table import Row, at_most, percentile
from tests.support.daemon import Daemon, free_port, wait_for
from tests.support.slotted import SlottedCaller, request_of

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Mapping

_SERVICE_S = 0.1
_SLOTS = 4
_INSTANCES = ("a", "b", "c")
_QUEUE = 100
_PROTECTED = "alert-fast"
_PROTECTED_PER_S = 10.0
_OVER_CAPACITY = 3.0
# The lane of requests without a role has weight 1.
_WEIGHTS = {"code-review": 4, "embedding": 2, "deep-rca": 1, "tiny": 1}
_SHARED = (_SLOTS - 1) * len(_INSTANCES)
_ALONE_S, _FILLING_S, _LOADED_S = 25.0, 8.0, 40.0

_WAITING = 1000
_MANY = 16
_MOST_US = 20
_CALLS = 2000
_ROUNDS = 20


def lanes_under_load() -> Iterator[Row]:
    """The protected lane, the waits, the throughput and the shares; then the cost of the function itself."""
    yield from _pure()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ollama-manager-bench-")))
        ports = {id_: free_port() for id_ in _INSTANCES}
        servers = stack.enter_context(_servers([*ports.values()]))
        daemon = stack.enter_context(_daemon(home, ports))
        alone = uvloop.run(_load(daemon.port, {_PROTECTED: _PROTECTED_PER_S}, _ALONE_S))
        capacity = _SLOTS * len(_INSTANCES) / _SERVICE_S
        others = (_OVER_CAPACITY * capacity - _PROTECTED_PER_S) / len(_WEIGHTS)
        rates = {_PROTECTED: _PROTECTED_PER_S, **dict.fromkeys(_WEIGHTS, others)}
        loaded = uvloop.run(_load(daemon.port, rates, _LOADED_S, filling_s=_FILLING_S))
        found, _ = servers.communicate("", timeout=30)
    yield from _rows(alone, loaded)
    most = max(one["most"] for one in json.loads(found).values())
    yield at_most("  requests at one instance at once, of 4 slots", most, _SLOTS, "", digits=0)


@dataclass(slots=True)
class _Met:
    """The answers of a while: milliseconds by lane, and how many of each status."""

    spent_ms: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    queue_ms: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    statuses: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))

    def ok_per_s(self, lane: str) -> float:
        return self.statuses[lane][200] / _LOADED_S


def _rows(alone: _Met, loaded: _Met) -> Iterator[Row]:
    before, now = alone.spent_ms[_PROTECTED], loaded.spent_ms[_PROTECTED]
    beside = (
        f"{percentile(now, 0.95):.1f} and {percentile(before, 0.95):.1f} ms; p50 {median(now):.1f} and "
        f"{median(before):.1f} ms; {len(now)} requests"
    )
    ratio = percentile(now, 0.95) / percentile(before, 0.95)
    what = f"{_PROTECTED} at {_OVER_CAPACITY:g} x capacity, over alone: p95"
    yield at_most(what, ratio, 1.2, " x", digits=2, beside=beside)
    weights = sum(_WEIGHTS.values())
    shared_per_s = _SHARED / _SERVICE_S
    for lane, weight in _WEIGHTS.items():
        due_s = _QUEUE / (shared_per_s * weight / weights)
        longest_s = loaded.queue_ms[lane] / 1000
        what = f"  longest wait of {lane}, weight {weight}"
        beside = f"a full queue at its share takes {due_s:.1f} s"
        yield at_most(what, longest_s, 1.25 * due_s, " s", beside=beside)
    yield at_most(f"  longest wait of {_PROTECTED}", loaded.queue_ms[_PROTECTED] / 1000, 1.0, " s", digits=3)
    rate = sum(loaded.ok_per_s(lane) for lane in (*_WEIGHTS, _PROTECTED))
    share = rate / (shared_per_s + loaded.ok_per_s(_PROTECTED))
    figure = f"{share:.3f} of what the slots can do that are not reserved and idle  ({rate:.0f} requests/s)"
    yield Row("throughput meanwhile", figure, ">= 0.95", "ok" if share >= 0.95 else "OVER")
    total = sum(loaded.ok_per_s(lane) for lane in _WEIGHTS)
    for lane, weight in _WEIGHTS.items():
        of_due = loaded.ok_per_s(lane) / (total * weight / weights)
        figure = f"{of_due:.3f} x what its weight gives  ({loaded.ok_per_s(lane):.1f} requests/s)"
        yield Row(f"  share of {lane}", figure, "0.9 to 1.1 x", "ok" if 0.9 <= of_due <= 1.1 else "OVER")
    refused = sum(one[429] for one in loaded.statuses.values())
    yield Row("  refused at once, since a queue was full", f"{refused / _LOADED_S:.0f} requests/s")


# --- the load -------------------------------------------------------------------------------------


async def _load(port: int, rates: Mapping[str, float], seconds: float, *, filling_s: float = 1.0) -> _Met:
    """Send requests for so long; what was answered during the first seconds does not count."""
    met = _Met()
    idle: list[SlottedCaller] = []
    begins = time.monotonic() + filling_s
    ends = begins + seconds
    open_requests: set[asyncio.Task[None]] = set()

    async def one(lane: str, data: bytes) -> None:
        caller = idle.pop() if idle else SlottedCaller()
        if not caller.is_open:
            await caller.connect(port)
        caller.send(data)
        whole = await caller.reply()
        if begins <= caller.ended_at < ends:
            met.statuses[lane][caller.status if whole else 0] += 1
            if caller.status == 200:
                met.spent_ms[lane].append((caller.ended_at - caller.sent_at) * 1000)
                met.queue_ms[lane] = max(met.queue_ms[lane], caller.queue_ms or 0)
        idle.append(caller)

    async def arrivals(lane: str, rate: float) -> None:
        rng = random.Random(lane)
        data = _request(port, lane)
        due = time.monotonic()
        while due < ends:
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.ensure_future(one(lane, data))
            open_requests.add(task)
            task.add_done_callback(open_requests.discard)

    await asyncio.gather(*(arrivals(lane, rate) for lane, rate in rates.items()))
    await asyncio.gather(*open_requests)
    for caller in idle:
        caller.leave()
        await caller.left()
    bad = {status for lane in met.statuses.values() for status in lane} - {200, 429}
    if bad or set(met.statuses[_PROTECTED]) - {200}:
        raise MeasurementError(f"answers were errors: {dict(met.statuses)}")
    return met


def _request(port: int, lane: str) -> bytes:
    if lane == "embedding":
        return request_of(port, "/api/embed", {"model": lane, "input": "why is the sky blue?"})
    messages = [{"role": "user", "content": "why is the sky blue? " * 6}]
    return request_of(port, "/api/chat", {"model": lane, "stream": False, "messages": messages})


@contextmanager
def _servers(ports: list[int]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.support.slotted", str(_SERVICE_S), *map(str, ports)]
    with talking(command) as process:
        yield process


@contextmanager
def _daemon(home: Path, ports: Mapping[str, int]) -> Iterator[Daemon]:
    role: dict[str, Any] = {"model": "tiny", "queue": {"length": _QUEUE, "wait_s": 60}}
    config = {
        "gpus": "none",
        "log": {"format": "json"},
        "instances": {
            id_: {"driver": "external", "url": f"http://127.0.0.1:{port}", "device": "cpu", "slots": _SLOTS}
            for id_, port in ports.items()
        },
        "roles": {
            _PROTECTED: {**role, "instances": [*_INSTANCES], "reserved": 1, "weight": 8},
            **{name: {**role, "weight": weight} for name, weight in _WEIGHTS.items() if name != "tiny"},
        },
    }
    with Daemon(home, config, engine_url=f"unix://{home}/none.sock") as daemon:
        daemon.start(until_ready=False).wait_until_alive()
        wait_for(lambda: {one["phase"] for one in daemon.get("instances")["instances"]} == {"ready"})
        yield daemon


# --- the function ---------------------------------------------------------------------------------


def _pure() -> Iterator[Row]:
    ids = tuple(f"i{number:02}" for number in range(_MANY))
    weights = {_PROTECTED: 8, **_WEIGHTS}
    for what, count in ((f"each for one of {_MANY}", 1), (f"each for any of {_MANY}", _MANY)):
        leave_us, enter_us, cancel_us = _spent_us(ids, weights, count)
        many = f"{_WAITING} waiting requests, {what}"
        yield at_most(f"a slot becomes free and is given on: {many}", leave_us, _MOST_US, " µs")
        yield at_most(f"a request arrives and waits: {many}", enter_us, _MOST_US, " µs")
        yield at_most(f"a waiting request leaves: {many}", cancel_us, _MOST_US, " µs")


def _spent_us(ids: tuple[str, ...], weights: Mapping[str, int], count: int) -> tuple[float, float, float]:
    """Of a release, an arrival and a cancel; the least of many rounds, because other load only adds."""
    rng = random.Random(0)
    here = Lanes()
    rules = {lane: LaneRules(weight, queue_length=_WAITING) for lane, weight in weights.items()}
    here.configure(dict.fromkeys(ids, 4), rules)
    names = [*weights]
    arrived = 0

    def waiter() -> Waiter:
        nonlocal arrived
        arrived += 1
        return Waiter(names[arrived % len(names)], tuple(rng.sample(ids, count)), arrived / 100)

    def enter(one: Waiter) -> None:
        if here.enter(one, "p") == "granted":
            holding.append(one)
        else:
            waiting.append(one)

    holding: list[Waiter] = []
    waiting: list[Waiter] = []
    while len(waiting) < _WAITING:
        enter(waiter())
    rounds: list[tuple[float, float, float]] = []
    for _ in range(_ROUNDS):
        rng.shuffle(holding)
        arriving = [waiter() for _ in range(_CALLS)]
        spent = [0.0, 0.0, 0.0]

        def timed(which: int, call: Callable[[Waiter], Any], one: Waiter) -> Any:
            began = time.perf_counter()
            found = call(one)
            spent[which] += time.perf_counter() - began  # noqa: B023  (used within the round)
            return found

        gc.disable()
        for number, new in enumerate(arriving):
            if number % 4 == 3:  # one in four leaves the queue before its turn
                gone = next(one for one in waiting if one.is_waiting)
                timed(2, here.leave, gone)
            else:
                holding += timed(0, here.leave, holding.pop(0))
            if timed(1, lambda one: here.enter(one, "p"), new) == "granted":
                holding.append(new)
            else:
                waiting.append(new)
            waiting = [one for one in waiting if one.is_waiting] if number % 100 == 0 else waiting
        gc.enable()
        rounds.append((spent[0] / (_CALLS * 3 / 4), spent[1] / _CALLS, spent[2] / (_CALLS / 4)))
    leave_us, enter_us, cancel_us = (min(one) * 1e6 for one in zip(*rounds, strict=True))
    return leave_us, enter_us, cancel_us
