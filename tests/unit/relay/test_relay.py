"""What all requests share: the timer of their deadlines, the loads they wait for, and their common end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from manager.relay.loads import LoadWaits
from manager.relay.timers import Timers
from tests.support.attempts import attempt
from tests.support.exchanging import LAST, Bench, bench_of

if TYPE_CHECKING:
    from collections.abc import Callable

LOAD = ("a", "tiny:latest")


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return bench_of(monkeypatch, attempt("a"))


# --- the timer ---


class Loop:
    """An event loop whose timers go off when the test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, after_s: float, call: Callable[[], None]) -> Any:
        entry = (after_s, call)
        self.calls.append(entry)

        class Handle:
            @staticmethod
            def cancel() -> None:
                self.calls.remove(entry)

        return Handle()

    def tick(self) -> None:
        (_, call) = self.calls.pop()
        call()


class Timed:
    def __init__(self, does: Callable[[], object] = list) -> None:
        self.checks: list[float] = []
        self._does = does

    def check(self, now: float) -> None:
        self.checks.append(now)
        self._does()


def timers_on(loop: Loop) -> Timers[Timed]:
    return Timers(cast("Any", loop), 0.25)


def test_one_timer_looks_at_all_and_only_while_there_is_something_to_look_at() -> None:
    loop = Loop()
    timers = timers_on(loop)
    assert loop.calls == []
    one, other = Timed(), Timed()
    timers.add(one)
    timers.add(other)
    assert [after for after, _ in loop.calls] == [0.25]
    loop.tick()
    assert (len(one.checks), one.checks) == (1, other.checks)
    timers.discard(one)
    loop.tick()
    assert (len(one.checks), len(other.checks)) == (1, 2)
    timers.discard(other)
    loop.tick()
    assert loop.calls == []
    timers.add(one)
    assert len(loop.calls) == 1, "it begins anew"


def test_a_defect_in_one_check_does_not_stop_the_deadlines_of_others() -> None:
    loop = Loop()
    timers = timers_on(loop)
    broken, other = Timed(lambda: 1 // 0), Timed()
    timers.add(broken)
    timers.add(other)
    with capture_logs() as logs:
        loop.tick()
        loop.tick()
    assert (len(broken.checks), len(other.checks)) == (2, 2)
    assert [line["event"] for line in logs] == ["deadline_failed"] * 2


def test_what_ends_during_a_tick_does_not_disturb_it() -> None:
    loop = Loop()
    timers = timers_on(loop)
    for _ in range(5):
        timed = Timed(timers.timed.clear)
        timers.add(timed)
    loop.tick()
    assert loop.calls == []


def test_a_timer_that_is_closed_looks_at_nothing_more() -> None:
    loop = Loop()
    timers = timers_on(loop)
    timers.close()
    timers.add(Timed())
    timers.close()
    timers.close()
    assert loop.calls == []


# --- loads ---


class Waiting:
    def __init__(self, loads: LoadWaits) -> None:
        self.is_left = False
        self.given_up = 0
        self._loads = loads
        loads.add(self, LOAD)

    def give_up(self) -> None:
        self.given_up += 1
        self._loads.remove(self, LOAD)


def test_others_wait_for_a_load_only_while_their_clients_are_there() -> None:
    loads = LoadWaits()
    one, other = Waiting(loads), Waiting(loads)
    assert loads.others_wait(one, LOAD)
    assert not loads.others_wait(one, ("b", "tiny:latest"))
    other.is_left = True
    assert not loads.others_wait(one, LOAD)
    assert loads.others_wait(other, LOAD)


def test_the_last_client_that_leaves_ends_all_that_left_before() -> None:
    loads = LoadWaits()
    left = [Waiting(loads) for _ in range(3)]
    for one in left:
        one.is_left = True
    stays = Waiting(loads)
    loads.remove(left.pop(), LOAD)
    assert [one.given_up for one in left] == [0, 0]
    loads.remove(stays, LOAD)
    assert [one.given_up for one in left] == [1, 1]
    assert not loads._waiting
    loads.remove(stays, LOAD)
    assert not loads._waiting, "to ask adds nothing"


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["leaves", "ends"])), max_size=30))
def test_no_request_waits_on_when_no_client_is_left_to_wait(moves: list[tuple[int, str]]) -> None:
    loads = LoadWaits()
    requests = [Waiting(loads) for _ in range(6)]
    gone: set[int] = set()
    for number, move in moves:
        one = requests[number]
        if number in gone or one.given_up:
            continue
        if move == "leaves":
            one.is_left = True
            if loads.others_wait(one, LOAD):
                continue
        gone.add(number)
        loads.remove(one, LOAD)
        waiting = loads._waiting.get(LOAD, set())
        assert not waiting or any(not other.is_left for other in waiting)
    assert all(one.given_up <= 1 for one in requests)


# --- tasks, drain and close ---


async def test_a_task_that_fails_is_logged_and_forgotten(bench: Bench) -> None:
    async def fails() -> None:
        raise ZeroDivisionError

    with capture_logs() as logs:
        bench.relay.spawn(fails())
        assert bench.relay.open_tasks == 1
        await bench.settle()
    assert ([line["event"] for line in logs], bench.relay.open_tasks) == (["request_failed"], 0)


async def test_a_drain_of_nothing_is_over_at_once(bench: Bench) -> None:
    await bench.relay.drain(1000, cut=asyncio.Event())


async def test_a_drain_waits_for_what_is_under_way(bench: Bench) -> None:
    servers = [bench.kept() for _ in range(2)]
    clients = [bench.ask({"model": "tiny"})[1] for _ in range(2)]
    draining = asyncio.ensure_future(bench.relay.drain(1000, cut=asyncio.Event()))
    await bench.settle()
    for server in servers:
        assert not draining.done()
        server.whole(200, LAST)
        await bench.settle()
    await draining
    assert [client.status for client in clients] == [200, 200]
    assert bench.at_rest()


@pytest.mark.parametrize("why", ["it takes too long", "it is to be cut"])
async def test_what_does_not_end_in_a_drain_is_cut(bench: Bench, why: str) -> None:
    _, client = bench.ask()
    await bench.settle()
    cut = asyncio.Event()
    if why == "it is to be cut":
        cut.set()
    await bench.relay.drain(0 if why == "it takes too long" else 1000, cut=cut)
    assert client.json() == {"error": "cut off: the manager is being stopped"}
    assert client.headers["retry-after"] == "1"
    assert bench.at_rest()
    assert bench.record.outcome == "cut"


async def test_a_close_cuts_what_came_meanwhile_and_ends_connections_and_tasks(bench: Bench) -> None:
    _, client = bench.ask()
    stuck = bench.relay.spawn(cast("Any", asyncio.Event().wait()))
    await bench.relay.close()
    assert client.json() == {"error": "cut off: the manager has been stopped"}
    assert stuck.cancelled()
    assert bench.pools.closed
    assert bench.at_rest()
    await bench.relay.close()


async def test_connections_are_counted_and_the_idle_ones_can_be_closed(bench: Bench) -> None:
    bench.kept()
    bench.kept()
    exchange, _ = bench.ask()
    assert bench.relay.upstream_connections == 2
    assert bench.relay.close_idle() == 1
    assert bench.relay.upstream_connections == 1
    exchange.caller_left()
