"""What the live channel costs: the daemon's processor time with subscribers, over that without them.

The instances are external servers, so that nothing but the daemon is measured. A few of them change each
second: requests go to one after the other.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tests.bench.idle import resident_bytes
from tests.bench.rig import INSTANCES, Client, MeasurementError, ids
from tests.bench.sampler import talking
from tests.bench.table import Row, at_most
from tests.support.browser import browser, chromium, visit
from tests.support.daemon import COMPUTE, Daemon, free_port, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

_SUBSCRIBERS = 50
_REQUESTS_PER_S = 4
_WATCHED_S = 4.0
_ROUNDS = 12
_MODEL = "tiny"


_API = f"{COMPUTE}/live"
_PAGE = "/ui/live?page=overview"
_PAINTS = 7


def live_channel() -> Iterator[Row]:
    """One idle subscriber, then many while instances change; each beside the same time without them."""
    yield from _followed(_API, "subscriber")


def open_pages() -> Iterator[Row]:
    """As `live_channel`, for open overviews, whose list of requests changes; and their first paint."""
    yield from _followed(_PAGE, "page")
    yield from _first_paint()


def _followed(path: str, name: str) -> Iterator[Row]:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ollama-manager-bench-")))
        port = free_port()
        stack.enter_context(talking([sys.executable, "-m", "tests.bench.canned", str(port)]))
        daemon = stack.enter_context(_daemon(home, port))
        idle = [_pair(daemon, path, 1, changes=False) for _ in range(_ROUNDS)]
        many = [_pair(daemon, path, _SUBSCRIBERS, changes=True) for _ in range(_ROUNDS)]
    yield _row(f"an idle {name}, {INSTANCES} instances, of one core", idle, 0.5)
    yield _row(
        f"{_SUBSCRIBERS} {name}s, {INSTANCES} instances, {_REQUESTS_PER_S} requests/s, of one core",
        many,
        5,
    )
    last = many[-1][1]
    events_s = last.events / _SUBSCRIBERS / _WATCHED_S
    yield Row(
        f"  events to each {name}",
        f"{events_s:.1f} a second, {last.bytes / max(1, last.events) / 1024:.0f} KiB each",
    )
    before, now = (median(spent.milliseconds for spent in one) for one in zip(*many, strict=True))
    yield Row("  a request meanwhile, p50", f"{now:.2f} ms, without {name}s {before:.2f} ms")
    added = (last.resident - many[-1][0].resident) / 2**20
    yield Row("  resident memory they add", f"{added:.1f} MiB")


class _Spent:
    """The figures of a while: a share of one core, what subscribers got, and the median of the requests."""

    def __init__(self, share: float, readers: _Readers, milliseconds: float, resident: int) -> None:
        self.share = share
        self.events = readers.events
        self.bytes = readers.bytes
        self.milliseconds = milliseconds
        self.resident = resident


def _first_paint() -> Iterator[Row]:
    """The first paint of the overview, each time in a window of its own without a cache."""
    if chromium() is None:
        raise MeasurementError("there is no Chromium")
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ollama-manager-bench-")))
        port = free_port()
        stack.enter_context(talking([sys.executable, "-m", "tests.bench.canned", str(port)]))
        daemon, running = stack.enter_context(_daemon(home, port)), stack.enter_context(browser())
        paints = []
        for _ in range(_PAINTS):
            with visit(running) as visitor:
                visitor.page.goto(f"{daemon.url}/ui")
                paints.append(visitor.page.evaluate(_PAINTED))
    yield at_most(f"first paint of the overview, {INSTANCES} instances", median(paints), 300, " ms", digits=0)


# Milliseconds from the navigation on.
_PAINTED = """() => new Promise((found) => new PerformanceObserver((list) => {
  const paint = list.getEntriesByName("first-contentful-paint")[0];
  if (paint) found(paint.startTime);
}).observe({ type: "paint", buffered: true }))"""


def _pair(daemon: Daemon, path: str, subscribers: int, *, changes: bool) -> tuple[_Spent, _Spent]:
    """Return what a while costs without subscribers, and with them."""
    return _spent(daemon, path, 0, changes=changes), _spent(daemon, path, subscribers, changes=changes)


def _spent(daemon: Daemon, path: str, subscribers: int, *, changes: bool) -> _Spent:
    process = daemon.process
    if process is None:
        raise MeasurementError("the daemon does not run")
    with _reading(daemon.port, path, subscribers) as readers:
        before_s, began = _cpu_s(process.pid), time.monotonic()
        readers.bytes = readers.events = 0
        milliseconds = _change(daemon.port) if changes else [0.0]
        time.sleep(max(0.0, began + _WATCHED_S - time.monotonic()))
        share = (_cpu_s(process.pid) - before_s) / (time.monotonic() - began)
        return _Spent(share, readers, median(milliseconds), resident_bytes(process.pid))


def _cpu_s(pid: int) -> float:
    """Processor time of all threads (schedstat in proc(5)): clock ticks are too coarse for this."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def _change(port: int) -> list[float]:
    """Send requests to one instance after the other, at their rate; return how long each took."""
    spent = []
    began = time.monotonic()
    with Client(port) as client:
        for number in range(int(_WATCHED_S * _REQUESTS_PER_S)):
            time.sleep(max(0.0, began + number / _REQUESTS_PER_S - time.monotonic()))
            model = f"{_MODEL}@{ids(INSTANCES)[number % INSTANCES]}"
            sent = time.perf_counter()
            status, _ = client.post("/api/chat", {"model": model, "stream": False, "messages": []})
            spent.append((time.perf_counter() - sent) * 1e3)
            if status != 200:
                raise MeasurementError(f"a request was answered with {status}")
    return spent


def _row(what: str, pairs: list[tuple[_Spent, _Spent]], most: float) -> Row:
    """The median of the differences within each pair: what else the machine does changes in the meantime."""
    added = median((with_them.share - without.share) * 100 for without, with_them in pairs)
    without, with_them = (median(spent.share for spent in one) * 100 for one in zip(*pairs, strict=True))
    beside = f"{with_them:.2f} and without {without:.2f} %, {_ROUNDS} pairs of {_WATCHED_S:g} s"
    return at_most(what, added, most, " %", digits=2, beside=beside)


class _Readers:
    """Subscribers of the live channel in one thread; counts what they get."""

    def __init__(self) -> None:
        self.events = 0
        self.bytes = 0
        self.ends = False

    def read(self, sockets: list[socket.socket]) -> None:
        with selectors.DefaultSelector() as selector:
            for one in sockets:
                one.setblocking(False)
                selector.register(one, selectors.EVENT_READ)
            while not self.ends:
                for key, _ in selector.select(0.2):
                    data = key.fileobj.recv(2**20)  # type: ignore[union-attr]
                    self.bytes += len(data)
                    self.events += data.count(b"\n\n")


@contextmanager
def _reading(port: int, path: str, count: int) -> Iterator[_Readers]:
    """Follow the live channel with so many clients; all have had their first frame."""
    readers = _Readers()
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", port))))
            for _ in range(count)
        ]
        for one in sockets:
            one.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        thread = threading.Thread(target=readers.read, args=(sockets,))
        thread.start()
        try:
            wait_for(lambda: readers.events >= count)
            yield readers
        finally:
            readers.ends = True
            thread.join()


@contextmanager
def _daemon(home: Path, port: int) -> Iterator[Daemon]:
    config = {
        "gpus": "none",
        "log": {"format": "json"},
        "instances": {
            id_: {"driver": "external", "url": f"http://127.0.0.1:{port}"} for id_ in ids(INSTANCES)
        },
    }
    with Daemon(home, config, engine_url=f"unix://{home}/none.sock") as daemon:
        daemon.start(until_ready=False).wait_until_alive()
        wait_for(lambda: {one["phase"] for one in daemon.get("instances")["instances"]} == {"ready"})
        with Client(daemon.port) as client:  # its list of models is read by then
            wait_for(lambda: client.json("/api/tags")["models"])
        yield daemon
