"""How long a start takes, beside what Docker alone takes for it."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

from tests.bench.rig import INSTANCES, Client, MeasurementError, bare_run, ids
from tests.bench.table import Row, at_most
from tests.support.daemon import COMPUTE

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.bench.rig import Rig

_PAIRS = 11
_COUNTS = (1, 8, 16, 32, INSTANCES)
_MOST_GROWTH = 1.25
_CHAT = {"messages": [{"role": "user", "content": "hi"}], "stream": False, "options": {"num_predict": 1}}


def start_to_ready(rig: Rig) -> list[Row]:
    def managed(client: Client) -> None:
        _asked(client, f"{COMPUTE}/instances/i00/start")

    return [_beside_docker(rig, "start to ready, over docker run -d + poll", 1.10, lambda: None, managed)]


def cold_first_reply(rig: Rig) -> list[Row]:
    def bare() -> None:
        with Client(11434, rig.bare_address) as client:
            _asked(client, "/api/chat", {**_CHAT, "model": "tiny"})

    def managed(client: Client) -> None:
        _asked(client, "/api/chat", {**_CHAT, "model": "tiny@i00"})

    what = "cold first reply, over docker run -d + poll + request"
    return [_beside_docker(rig, what, 1.15, bare, managed)]


def _asked(client: Client, path: str, body: dict[str, Any] | None = None) -> None:
    status, answer = client.post(path, body)
    if status != 200:
        raise MeasurementError(f"{path} was answered with {status}: {answer.decode()}")


def _beside_docker(
    rig: Rig, what: str, limit: float, bare_too: Callable[[], None], managed_one: Callable[[Client], None]
) -> Row:
    """Pairs, one of each kind after the other and in turns first, so that both meet the same machine.

    Args:
        rig: what is measured.
        what: the figure's name.
        limit: the ratio that is to be kept.
        bare_too: what is done by hand once the container answers.
        managed_one: what has the daemon start it.
    """
    bare: list[float] = []
    managed: list[float] = []

    def once_bare() -> None:
        def by_hand() -> None:
            bare_run(rig, "bare")
            bare_too()

        bare.append(_timed(by_hand))
        rig.docker.containers.get("bare").remove(force=True)

    def once_managed(client: Client) -> None:
        managed.append(_timed(lambda: managed_one(client)))
        rig.stop(["i00"])

    with Client(rig.daemon.port) as client:
        once_bare()  # the first of each pays for what is read from disk
        once_managed(client)
        bare.clear()
        managed.clear()
        for number in range(_PAIRS):
            if number % 2:
                once_bare()
                once_managed(client)
            else:
                once_managed(client)
                once_bare()
    ratio = statistics.median(managed) / statistics.median(bare)
    pairs = statistics.median(one / other for one, other in zip(managed, bare, strict=True))
    beside = (
        f"{statistics.median(managed) * 1e3:.0f} / {statistics.median(bare) * 1e3:.0f} ms, "
        f"{_PAIRS} pairs, median of the pairs' ratios {pairs:.2f}"
    )
    return at_most(what, ratio, limit, " x", digits=2, beside=beside)


def start_many(rig: Rig) -> list[Row]:
    """All of a number of instances at once; what one of them costs should not depend on the number."""
    each_s: dict[int, float] = {}
    for count in _COUNTS:
        wanted = ids(count)
        each_s[count] = _timed(lambda wanted=wanted: rig.start(wanted)) / count  # type: ignore[misc]
        rig.stop(wanted)
    bare_s = _bare_many(rig)
    shown = ", ".join(f"{count}: {each * 1e3:.0f}" for count, each in each_s.items())
    growth = each_s[INSTANCES] / each_s[8]
    ratio = each_s[INSTANCES] / bare_s
    return [
        Row("start cost an instance, ms, so many at once", shown),
        at_most(f"  {INSTANCES} at once over 8 at once, an instance", growth, _MOST_GROWTH, " x", digits=2),
        Row(
            f"  {INSTANCES} at once, over as many docker run -d at once",
            f"{ratio:.2f} x  ({bare_s * 1e3:.0f} ms an instance)",
        ),
    ]


def _bare_many(rig: Rig) -> float:
    first = IPv4Address(rig.bare_address) - INSTANCES
    names = [f"bare{number:02}" for number in range(INSTANCES)]

    def run_all() -> None:
        with ThreadPoolExecutor(INSTANCES) as pool:
            list(pool.map(lambda n: bare_run(rig, names[n], str(first + n)), range(INSTANCES)))

    spent_s = _timed(run_all)
    for name in names:
        rig.docker.containers.get(name).remove(force=True)
    return spent_s / INSTANCES


def _timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
