"""How soon a container that is killed behind the daemon's back is known to be gone."""

from __future__ import annotations

import json
import queue
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import requests

from tests.bench.rig import MANAGER_ID, Client, MeasurementError
from tests.bench.table import Row, at_most
from tests.support.daemon import COMPUTE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bench.rig import Rig

_ROUNDS = 15
_LIMIT_S = 20.0
_INSTANCE = "i00"

Seen = tuple[float, Any]


def crash_detection(rig: Rig) -> list[Row]:
    """From the call of `docker kill` to the event; the engine's own event is timed beside it."""
    seen_us: list[float] = []
    seen_engine: list[float] = []
    with (
        requests.get(f"{rig.daemon.url}{COMPUTE}/events", stream=True, timeout=_LIMIT_S) as answer,
        Client(rig.daemon.port) as client,
    ):
        ours = _collect(lambda: _data_lines(answer))
        stream = rig.engine.client().events(decode=True, filters={"event": "die"})
        engines = _collect(lambda: iter(stream))
        container_name = f"{MANAGER_ID}-ollama-{_INSTANCE}"
        for _ in range(_ROUNDS):
            rig.start([_INSTANCE])
            container = rig.docker.containers.get(container_name)
            began = time.perf_counter()
            container.kill()
            at, _event = _next(ours, lambda event: event["kind"] == "container_ended")
            seen_us.append((at - began) * 1e3)
            phase = client.json(f"{COMPUTE}/instances/{_INSTANCE}")["phase"]
            if phase != "failed":
                raise MeasurementError(f"the event came, but the phase is {phase}")
            at, _event = _next(
                engines, lambda event: event["Actor"]["Attributes"].get("name") == container_name
            )
            seen_engine.append((at - began) * 1e3)
        stream.close()
        rig.stop([_INSTANCE])
    median, most = statistics.median(seen_us), max(seen_us)
    engines_own = statistics.median(seen_engine)
    beside = f"the slowest of {_ROUNDS}: {most:.0f} ms; median of the engine's own event {engines_own:.0f} ms"
    return [at_most("docker kill to phase failed: median", median, 200, " ms", digits=0, beside=beside)]


def _collect(items: Callable[[], Iterator[Any]]) -> queue.SimpleQueue[Seen]:
    """Read in a thread, so that the time is that of the arrival."""
    found: queue.SimpleQueue[Seen] = queue.SimpleQueue()

    def read() -> None:
        try:
            for item in items():
                found.put((time.perf_counter(), item))
        except Exception as error:  # noqa: BLE001  (the stream was closed; whoever waits runs into its limit)
            found.put((time.perf_counter(), {"kind": f"stream ended: {error}", "Actor": {"Attributes": {}}}))

    threading.Thread(target=read, daemon=True).start()
    return found


def _data_lines(answer: requests.Response) -> Iterator[Any]:
    for line in answer.iter_lines(chunk_size=1):
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def _next(found: queue.SimpleQueue[Seen], wanted: Callable[[Any], bool]) -> Seen:
    deadline = time.monotonic() + _LIMIT_S
    while True:
        try:
            at, item = found.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise MeasurementError("the event never came") from None
        if wanted(item):
            return at, item
