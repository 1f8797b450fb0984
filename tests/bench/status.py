"""How quickly the daemon tells how things are, whatever goes on."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from typing import TYPE_CHECKING

from tests.bench.rig import INSTANCES, Client, MeasurementError, ids
from tests.bench.sampler import sampling
from tests.bench.table import Row, at_most, percentile
from tests.support.daemon import COMPUTE

if TYPE_CHECKING:
    from tests.bench.rig import Rig

_LIST = f"{COMPUTE}/instances"
_FLOOR = "/healthz"
_WORKERS = 4
_ROLLING_S = 20.0
_CALM_S = 5.0
_FROZEN_S = 12.0
_CALLS = 500


def list_latency(rig: Rig) -> list[Row]:
    """GET /instances with 64 instances: in peace, while they go up and down, and when all start at once."""
    calm = _sampled(rig, lambda: time.sleep(_CALM_S))
    rolling = _sampled(rig, lambda: _roll(rig))
    storm = _sampled(rig, lambda: rig.start(ids(INSTANCES)))
    ended = _sampled(rig, lambda: rig.stop(ids(INSTANCES)))
    rows = [_latency_row(f"list of {INSTANCES}, all stopped: p99", calm)]
    rows.append(_latency_row(f"list of {INSTANCES}, {_WORKERS} at a time going up and down: p99", rolling))
    rows.append(_latency_row(f"list of {INSTANCES}, all started at once: p99", storm))
    rows.append(_latency_row(f"list of {INSTANCES}, all stopped at once: p99", ended))
    return rows


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
        with sampling(rig.daemon.port, _LIST, seconds=_FROZEN_S) as found:
            time.sleep(_FROZEN_S)
    finally:
        rig.engine.resume()
    rig.daemon.wait_until_ready(60)
    rig.stop(ids(8))
    spent = found.milliseconds[_LIST]
    beside = f"p50 {statistics.median(spent):.1f} ms, {len(spent)} calls in {_FROZEN_S:g} s"
    return [at_most("list while the engine is frozen: the slowest", max(spent), 50, " ms", beside=beside)]


def _sampled(rig: Rig, meanwhile: object) -> dict[str, list[float]]:
    assert callable(meanwhile)
    with sampling(rig.daemon.port, _LIST, _FLOOR) as found:
        meanwhile()
    return found.milliseconds


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


def _latency_row(what: str, found: dict[str, list[float]]) -> Row:
    spent, floor = found[_LIST], found[_FLOOR]
    beside = (
        f"p50 {statistics.median(spent):.1f} ms, {len(spent)} calls; "
        f"{_FLOOR} beside it p50 {statistics.median(floor):.1f}, p99 {percentile(floor, 0.99):.1f} ms"
    )
    return at_most(what, percentile(spent, 0.99), 5, " ms", beside=beside)
