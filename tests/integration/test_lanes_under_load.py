"""No slot is lost: callers on real sockets, of whom a fifth leaves; servers die, settings change (A-10, U-8).

LOAD_REQUESTS says how many requests are sent (20,000 by default). `pytest -s` shows what came of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from tests.support.daemon import Daemon, free_port, wait_for
from tests.support.slotted import Slotted, SlottedCaller, request_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

REQUESTS = int(os.environ.get("LOAD_REQUESTS", "20000"))
CALLERS = 160
LEAVING = 0.2
WAIT_S = 3.0
MOST_GROWTH = 24 * 2**20
SETTINGS = "/api/settings/models"
INSTANCES = ("a", "b", "c")
QUEUE = {"length": 30, "wait_s": WAIT_S}
ROLES: dict[str, dict[str, Any]] = {
    "alert-fast": {"instances": [*INSTANCES], "reserved": 1, "weight": 4, "queue": QUEUE},
    "code-review": {"weight": 4, "queue": QUEUE},
    "embedding": {"weight": 2, "queue": QUEUE},
    "deep-rca": {"weight": 1, "concurrency": 4, "queue": QUEUE},
}
NO_ROLE = "tiny"
LANES = (*ROLES, NO_ROLE)
WAYS = ("half sent", "at any time", "at any time", "mid-stream")


@dataclass(slots=True)
class Load:
    """The load, and what came of it."""

    daemon: Daemon
    servers: dict[str, Slotted]
    left: int = REQUESTS
    statuses: Counter[int] = field(default_factory=Counter)
    left_when: Counter[str] = field(default_factory=Counter)
    waited_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    changes: Counter[str] = field(default_factory=Counter)
    resident: list[int] = field(default_factory=list)
    began: float = 0.0
    took_s: float = 0.0

    async def call(self, method: str, path: str, **options: Any) -> Any:
        return await asyncio.to_thread(self.daemon.call, method, path, **options)


def config(ports: dict[str, int], slots: dict[str, int]) -> dict[str, Any]:
    return {
        "gpus": "none",
        "instances": {
            id_: {
                "driver": "external",
                "url": f"http://127.0.0.1:{port}",
                "device": "cpu",
                "slots": slots[id_],
            }
            for id_, port in ports.items()
        },
        "roles": {name: {"model": "tiny", **role} for name, role in ROLES.items()},
        "lifecycle": {"probe_interval_s": 0.2},
        # Breakers open and close many times, and leave most of the time to the lanes.
        "breaker": {"failures": 3, "open_s": 0.1, "max_open_s": 0.2},
    }


# --- what happens meanwhile -----------------------------------------------------------------------


async def servers_die(load: Load, rng: random.Random) -> None:
    server = load.servers[rng.choice(INSTANCES)]
    server.down()
    await asyncio.sleep(rng.uniform(0.1, 1.0))
    await server.up()


async def connections_are_cut(load: Load, rng: random.Random) -> None:
    load.servers[rng.choice(INSTANCES)].cut()


async def lanes_change(load: Load, rng: random.Random) -> None:
    role = rng.choice([*ROLES])
    values = {"weight": rng.randint(1, 8), "concurrency": rng.choice([None, 3, 6, 12])}
    answer = await load.call("POST", SETTINGS, json={"roles": {role: values}})
    assert answer.status_code == 200, answer.text


async def slots_change(load: Load, rng: random.Random) -> None:
    """More slots count at once; fewer when the requests that use them have ended."""
    slots = {id_: rng.randint(2, 5) for id_ in INSTANCES}
    ports = {id_: server.port for id_, server in load.servers.items()}
    for id_, server in load.servers.items():
        server.allowed = max(slots[id_], server.allowed or 0)
    await asyncio.to_thread(load.daemon.configure, config(ports, slots))
    assert load.daemon.process is not None
    load.daemon.process.send_signal(signal.SIGHUP)
    await asyncio.to_thread(
        wait_for,
        lambda: {one["id"]: one for one in load.daemon.get("lanes")["instances"]},
        lambda found: all(slots[id_] == found[id_]["slots"] >= found[id_]["in_use"] for id_ in INSTANCES),
        within_s=20,
    )
    for id_, server in load.servers.items():
        server.allowed = slots[id_]


async def instances_are_drained(load: Load, rng: random.Random) -> None:
    """Requests that wait for the instance go elsewhere; those that have a slot there keep it."""
    path = f"instances/{rng.choice(INSTANCES)}"
    answer = await load.call(
        "POST", f"{path}/drain", json={"reason": "test", "stop": False}, params={"wait": "false"}
    )
    assert answer.ok, answer.text
    await asyncio.sleep(rng.uniform(0.1, 0.5))
    answer = await load.call("POST", f"{path}/resume")
    assert answer.ok, answer.text


# Each of them goes on by itself, as often as the seconds say.
DISTURBANCES: tuple[tuple[float, Callable[[Load, random.Random], Awaitable[None]]], ...] = (
    (2.0, servers_die),
    (1.5, connections_are_cut),
    (0.7, lanes_change),
    (1.5, slots_change),
    (1.2, instances_are_drained),
)


async def repeated(
    load: Load, every_s: float, what: Callable[[Load, random.Random], Awaitable[None]], ends: asyncio.Event
) -> None:
    rng = random.Random(what.__name__)
    while not ends.is_set():
        await what(load, rng)
        load.changes[what.__name__] += 1
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.5, 1.5) * every_s):
                await ends.wait()


# --- callers --------------------------------------------------------------------------------------


async def calls(load: Load, number: int) -> None:
    rng = random.Random(number)
    port = load.daemon.port
    caller = SlottedCaller()
    while load.left > 0:
        load.left -= 1
        if load.left == int(0.8 * REQUESTS):
            load.resident.append(resident(load))
        if not caller.is_open:
            caller = SlottedCaller()
            await caller.connect(port)
        lane = rng.choice(LANES)
        if rng.random() < LEAVING:
            way = rng.choice(WAYS)
            data = request_for(port, lane, stream=way == "mid-stream" or rng.random() < 0.5)
            load.left_when[await leaves(caller, data, way, rng)] += 1
            await caller.left()
            continue
        caller.send(request_for(port, lane, stream=rng.random() < 0.5))
        async with asyncio.timeout(60):
            whole = await caller.reply()
        load.statuses[caller.status if whole else -caller.status] += 1
        if whole:
            seconds = (caller.first_at or caller.ended_at) - caller.sent_at
            load.waited_s[lane] = max(load.waited_s[lane], seconds, (caller.queue_ms or 0) / 1000)
    if caller.is_open:
        caller.leave()
        await caller.left()


async def leaves(caller: SlottedCaller, data: bytes, way: str, rng: random.Random) -> str:
    """Send a request and leave; return when that was."""
    rudely = rng.random() < 0.5
    if way == "half sent":
        caller.send(data[: rng.randrange(1, len(data))])
        await asyncio.sleep(rng.uniform(0, 0.01))
        caller.leave(rudely=rudely)
        return way
    caller.send(data)
    if way == "mid-stream":
        async with asyncio.timeout(60):
            await caller.first_byte()
    else:
        await asyncio.sleep(rng.uniform(0, 0.15))
    when = "answered" if caller.is_whole else "mid-stream" if caller.has_body else "before the first byte"
    caller.leave(rudely=rudely)
    return when


def request_for(port: int, lane: str, *, stream: bool) -> bytes:
    if lane == "embedding":
        return request_of(port, "/api/embed", {"model": lane, "input": "why is the sky blue?"})
    messages = [{"role": "user", "content": "why is the sky blue?"}]
    return request_of(port, "/api/chat", {"model": lane, "stream": stream, "messages": messages})


# --- the whole ------------------------------------------------------------------------------------


def held(load: Load, file: Path) -> dict[str, int]:
    """Return what the daemon holds now."""
    process = load.daemon.process
    assert process is not None
    file.unlink(missing_ok=True)
    process.send_signal(signal.SIGUSR1)
    deadline = monotonic() + 10
    while not file.exists():
        assert monotonic() < deadline
    found: dict[str, int] = json.loads(file.read_text())
    return found


def resident(load: Load) -> int:
    assert load.daemon.process is not None
    pages = int(Path(f"/proc/{load.daemon.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_at_rest(found: dict[str, Any]) -> bool:
    return not any(one["in_flight"] or one["queued"] for one in found["lanes"]) and not any(
        one["in_use"] for one in found["instances"]
    )


async def run(load: Load, file: Path) -> None:
    for server in load.servers.values():
        await server.up()
    try:
        await runs(load, file)
    finally:
        for server in load.servers.values():
            server.down()
        await asyncio.sleep(0.1)


async def runs(load: Load, file: Path) -> None:
    rng = random.Random(0)
    await asyncio.to_thread(load.daemon.start, until_ready=False, watched=file)
    await asyncio.to_thread(load.daemon.wait_until_alive)
    await asyncio.to_thread(
        wait_for,
        lambda: {one["phase"] for one in load.daemon.get("instances")["instances"]},
        lambda phases: phases == {"ready"},
    )
    tasks_before = (await asyncio.to_thread(held, load, file))["tasks"]
    load.began = monotonic()
    ends = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        meanwhile = [tasks.create_task(repeated(load, s, what, ends)) for s, what in DISTURBANCES]
        callers = [tasks.create_task(calls(load, rng.randrange(2**32))) for _ in range(CALLERS)]
        await asyncio.wait(callers)
        ends.set()
        await asyncio.wait(meanwhile)
    load.took_s = monotonic() - load.began
    await asyncio.to_thread(wait_for, lambda: load.daemon.get("lanes"), is_at_rest, within_s=10)
    load.resident.append(resident(load))
    instances = (await asyncio.to_thread(load.daemon.get, "instances"))["instances"]
    assert {one["id"]: one["in_flight"] for one in instances} == dict.fromkeys(INSTANCES, 0)
    deadline = monotonic() + 5
    while True:
        after = await asyncio.to_thread(held, load, file)
        more_tasks = after.pop("tasks") - tasks_before
        if more_tasks <= 0 and not any(after.values()):
            return
        assert monotonic() < deadline, (more_tasks, after)
        await asyncio.sleep(0.1)


@pytest.mark.timeout(900)
def test_no_slot_is_lost_while_callers_leave_servers_die_and_settings_change(tmp_path: Path) -> None:
    ports = {id_: free_port() for id_ in INSTANCES}
    slots = dict.fromkeys(INSTANCES, 4)
    times = random.Random(1)
    servers = {
        id_: Slotted(port, lambda: times.uniform(0.002, 0.006), allowed=slots[id_])
        for id_, port in ports.items()
    }
    with Daemon(tmp_path, config(ports, slots), engine_url=f"unix://{tmp_path}/none.sock") as daemon:
        load = Load(daemon, servers)
        uvloop.run(run(load, tmp_path / "held.json"))
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log()
    growth = load.resident[-1] - load.resident[0]
    print(f"\n{REQUESTS} requests in {load.took_s:.0f} s; statuses (negative: cut) {dict(load.statuses)}")
    print(f"left: {dict(load.left_when)}; meanwhile: {dict(load.changes)}")
    print(f"longest wait: { {lane: round(s, 2) for lane, s in load.waited_s.items()} } s")
    print(f"resident: {[size // 2**20 for size in load.resident]} MiB")
    most = {id_: one.most for id_, one in servers.items()}
    over = [one.over for one in servers.values()]
    print(f"most at once: {most}; over: {over}")
    assert over == [[], [], []]
    assert max(load.waited_s[name] for name in ROLES) <= WAIT_S + 1
    assert growth <= MOST_GROWTH
    assert set(load.statuses) <= {200, 429, 502, 503, -200, 0}, load.statuses
    assert load.statuses[200] >= REQUESTS * (1 - LEAVING) / 2
    assert sum(load.left_when.values()) >= REQUESTS * LEAVING * 0.9
