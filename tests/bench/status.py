"""How quickly the daemon tells how things are, whatever goes on."""

from __future__ import annotations

import itertools
import statistics
import sys
import threading
import time
from typing import TYPE_CHECKING

from tests.bench.rig import INSTANCES, Client, MeasurementError, ids
from tests.bench.sampler import sampling, talking
from tests.bench.table import Row, at_most, percentile
from tests.support.daemon import COMPUTE, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bench.rig import Rig

_LIST = f"{COMPUTE}/instances"
_WORKERS = 1
_ROLLING_S = 20.0
_CALM_S = 5.0
_FROZEN_S = 12.0
_CALLS = 500


def list_latency(rig: Rig) -> Iterator[Row]:
    """GET /instances with 64 instances: in peace, while they go up and down, and when all do so at once."""
    every = ids(INSTANCES)
    yield _list_row(rig, "all stopped", lambda: time.sleep(_CALM_S))
    yield _list_row(rig, "one after the other started and stopped", lambda: _roll(rig))
    yield _list_row(rig, "all started at once", lambda: rig.start(every))
    yield _list_row(rig, "all running", lambda: time.sleep(_CALM_S))
    yield _list_row(rig, "all stopped at once", lambda: rig.stop(every))


def calls_that_change_nothing(rig: Rig) -> list[Row]:
    """What the control API costs by itself: a start of what runs, one instance, the metrics of all."""
    rig.start(["i00"])
    rows = []
    with Client(rig.daemon.port) as client:
        for what, method, path in (
            ("start of an instance that is ready", "POST", f"{_LIST}/i00/start"),
            ("one instance", "GET", f"{_LIST}/i00"),
            (f"/metrics of {INSTANCES} instances", "GET", "/metrics"),
        ):
            spent = []
            for _ in range(_CALLS):
                began = time.perf_counter()
                status, _body = client.post(path) if method == "POST" else client.get(path)
                spent.append((time.perf_counter() - began) * 1e3)
                if status != 200:
                    raise MeasurementError(f"{path} was answered with {status}")
            p50, p99 = statistics.median(spent), percentile(spent, 0.99)
            rows.append(Row(f"{what}: p50 / p99", f"{p50:.2f} / {p99:.2f} ms"))
    rig.stop(["i00"])
    return rows


def frozen_engine(rig: Rig) -> list[Row]:
    """The list while the engine accepts connections and answers nothing, from before it is noticed."""
    rig.start(ids(8))
    rig.engine.pause()
    try:
        with sampling(f"{rig.daemon.port}{_LIST}", seconds=_FROZEN_S) as found:
            time.sleep(_FROZEN_S)
    finally:
        rig.engine.resume()
    rig.daemon.wait_until_ready(60)
    rig.stop(ids(8))
    (spent,) = found.milliseconds.values()
    beside = f"p50 {statistics.median(spent):.1f} ms, {len(spent)} calls in {_FROZEN_S:g} s"
    return [at_most("list while the engine is frozen: the slowest", max(spent), 50, " ms", beside=beside)]


def _list_row(rig: Rig, what: str, meanwhile: Callable[[], object]) -> Row:
    """The list's latency while something is done, beside that of a bare responder with as many bytes."""
    with Client(rig.daemon.port) as client:
        size = len(client.get(_LIST)[1])
    port = free_port()
    listing, bare = f"{rig.daemon.port}{_LIST}", f"{port}/"
    with (
        talking([sys.executable, "-m", "tests.bench.responder", str(port), str(size)]),
        sampling(listing, bare) as found,
    ):
        meanwhile()
    spent, floor = found.milliseconds[listing], found.milliseconds[bare]
    beside = (
        f"p50 {statistics.median(spent):.1f}, {len(spent)} calls; a bare responder beside it: "
        f"p50 {statistics.median(floor):.1f}, p99 {percentile(floor, 0.99):.1f} ms"
    )
    return at_most(f"list of {INSTANCES}, {what}: p99", percentile(spent, 0.99), 5, " ms", beside=beside)


def _roll(rig: Rig) -> None:
    """A few workers start and stop one instance after the other, going round all of them."""
    deadline = time.monotonic() + _ROLLING_S
    shares = [ids(INSTANCES)[worker::_WORKERS] for worker in range(_WORKERS)]
    failed: list[BaseException] = []

    def work(share: list[str]) -> None:
        try:
            for instance in itertools.cycle(share):
                rig.start([instance])
                rig.stop([instance])
                if time.monotonic() > deadline:
                    return
        except MeasurementError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
