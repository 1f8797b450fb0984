"""Two daemons share slots over a stream, and each goes on alone when the other one ends or is silent."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from manager import remaining
from manager.domain.history import Filters
from manager.domain.roles import RequestKind, Role, RoutingSettings
from manager.errors import UnknownInstanceError
from manager.remaining import Elsewhere, Remaining
from manager.services.lanes.slots import Place, Slots
from tests.support.inside import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import pytest


def slots_of(*, queue: int = 100) -> Slots:
    """One instance with one slot, and a role."""
    role = Role("x", RequestKind.GENERATE, "tiny", queue_length=queue)
    settings: Any = SimpleNamespace(version=0, routing=RoutingSettings({"x": role}))
    slots = Slots(settings, lambda: {"a": 1}, tuple, now=asyncio.get_running_loop().time)
    slots.refresh()
    return slots


class Open:
    """Open requests: those that have a place, and one that is listed, shown and cancelled."""

    def __init__(self, places: list[Place]) -> None:
        self._places = places

    def __iter__(self) -> Iterator[Any]:
        for place in self._places:
            yield None, SimpleNamespace(place=place, record=SimpleNamespace(project_id="p"))

    def listed_here(self, filters: Filters) -> Iterator[dict[str, Any]]:
        yield {"request_id": "1", "project": filters.project}

    def shown_here(self, id_: str) -> dict[str, Any] | None:
        return {"request_id": id_} if self.cancel_here(id_) else None

    def cancel_here(self, id_: str) -> bool:
        return id_ == "1"


class Old:
    """The old daemon, with a request that has the slot and one that waits."""

    def __init__(self) -> None:
        self.slots = slots_of()
        self.first, self.second = self.enter(), self.enter()
        self.in_flight = {"a": 1, "b": 0}
        requests: Any = Open([self.second, self.first])
        self.remaining = Remaining(self.slots, requests, self.in_flight)

    def enter(self) -> Place:
        place = self.slots.enter("x", "p", ("a",), lambda: ("a",), since=0.0)
        assert isinstance(place, Place)
        return place


class New:
    """The new daemon; `leases` are those that it counts for the old one."""

    def __init__(self, line: socket.socket | None, *, queue: int = 100) -> None:
        self.slots = slots_of(queue=queue)
        self.elsewhere = Elsewhere(line)
        self.leases: list[str] = []

    async def begin(self) -> None:
        await self.elsewhere.begin(self.slots, self._lease)

    def _lease(self, instance: str) -> Any:
        if instance != "a":
            raise UnknownInstanceError(instance)
        self.leases.append(instance)
        return SimpleNamespace(release=lambda: self.leases.remove(instance))

    @property
    def in_use(self) -> int:
        return self.slots.instances()[0].in_use

    @property
    def queued(self) -> int:
        return next(one.queued for one in self.slots.lanes() if one.name == "x")


@asynccontextmanager
async def both(*, queue: int = 100) -> AsyncIterator[tuple[Old, New]]:
    old = Old()
    new = New(old.remaining.begin(), queue=queue)
    try:
        await new.begin()
        yield old, new
    finally:
        old.remaining.close()
        new.elsewhere.close()
        await until(lambda: all(task is asyncio.current_task() for task in asyncio.all_tasks()))


async def test_the_new_daemon_gives_the_slots_of_both() -> None:
    async with both() as (old, new):
        assert (new.in_use, new.queued) == (1, 1)
        await old.remaining.confirmed()
        own = new.slots.enter("x", "p", ("a",), lambda: ("a",), since=1e9)
        assert isinstance(own, Place)
        waits = asyncio.ensure_future(old.second.settled(within_s=10))
        old.first.give_back()
        assert await waits == "granted"
        assert old.second.instance == "a"
        assert own.instance is None
        old.second.give_back()
        old.second.give_back()
        await until(lambda: own.instance == "a")
        assert new.in_use == 1
        third = old.enter()
        assert third.instance is None, "the slot is the new daemon's to give"
        await until(lambda: new.queued == 1)
        third.give_back()
        await until(lambda: new.queued == 0)


async def test_a_slot_that_the_old_daemon_takes_without_asking_is_counted() -> None:
    async with both() as (old, new):
        assert old.slots.take("x", "a", tuple, 0.0) is None
        held = old.slots.hold("x", "a", 0.0)
        await until(lambda: new.in_use == 2)
        held.give_back()
        await until(lambda: new.in_use == 1)


async def test_leases_are_counted_as_they_change() -> None:
    async with both() as (old, new):
        assert new.leases == ["a"]
        old.in_flight.update(a=3, b=1)
        await until(lambda: len(new.leases) == 3)
        old.in_flight["a"] = 0
        await until(lambda: new.leases == [])
        old.in_flight["a"] = 1
        await until(lambda: new.leases == ["a"])
        old.remaining.close()
        await until(lambda: new.leases == [])
        assert not new.elsewhere.is_open


async def test_requests_of_the_old_daemon_are_listed_shown_and_cancelled() -> None:
    async with both() as (_, new):
        wanted = Filters(project="mine")
        assert await new.elsewhere.listed(wanted) == [{"request_id": "1", "project": "mine"}]
        assert await new.elsewhere.shown("1") == {"request_id": "1"}
        assert await new.elsewhere.shown("2") is None
        assert await new.elsewhere.cancel("1")
        assert not await new.elsewhere.cancel("2")


async def test_an_end_of_the_old_daemon_gives_everything_back() -> None:
    async with both() as (old, new):
        asked = asyncio.ensure_future(new.elsewhere.shown("1"))
        await asyncio.sleep(0)
        old.remaining.close()
        await until(lambda: not new.elsewhere.is_open)
        assert await asked in (None, {"request_id": "1"})
        await until(lambda: new.in_use == new.queued == 0)
        assert await new.elsewhere.listed(Filters()) == []
        old.first.give_back()
        assert old.second.instance == "a", "it gives its slots again"


async def test_an_end_of_the_new_daemon_has_the_old_one_give_its_slots_again() -> None:
    async with both() as (old, new):
        old.first.give_back()
        await until(lambda: old.second.instance == "a")
        third = old.enter()
        await until(lambda: new.queued == 1)
        new.elsewhere.close()
        waits = asyncio.ensure_future(third.settled(within_s=10))
        await until(lambda: third.waiter.is_waiting)
        old.second.give_back()
        assert await waits == "granted"


async def test_a_request_that_may_not_wait_in_the_new_daemon_is_refused_there() -> None:
    async with both(queue=0) as (old, _):
        assert await old.second.settled(within_s=10) == "refused"
        old.second.give_back()


async def test_a_new_daemon_of_an_older_version_says_no_hello(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remaining, "_HELLO_WITHIN_S", 0.05)
    old = Old()
    with old.remaining.begin():
        old.first.give_back()
        assert old.second.instance is None
        await old.remaining.confirmed()
        assert old.second.instance == "a"


async def test_an_old_daemon_that_is_silent_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remaining, "_KNOWN_WITHIN_S", 0.05)
    monkeypatch.setattr(remaining, "_ANSWERS_WITHIN_S", 0.05)
    here, there = socket.socketpair()
    new = New(there)
    with here:
        await new.begin()
        assert await new.elsewhere.listed(Filters()) == []
        asked = [asyncio.ensure_future(new.elsewhere.cancel("1")) for _ in range(100)]
        await asyncio.sleep(0)
        assert sum(one.done() for one in asked) == 100 - 64, "no more are asked"
        assert not any(await asyncio.gather(*asked))
    await until(lambda: not new.elsewhere.is_open)


async def test_nonsense_ends_the_stream() -> None:
    here, there = socket.socketpair()
    new = New(there)
    with here:
        here.sendall(b'{"holds":[1,"x","a",0]}\nnonsense\n')
        await new.begin()
        await until(lambda: not new.elsewhere.is_open)
        assert new.in_use == 0


async def test_where_no_daemon_is_replaced_nothing_is_asked() -> None:
    new = New(None)
    await new.begin()
    assert not new.elsewhere.is_open
    assert await new.elsewhere.listed(Filters()) == []
    new.elsewhere.close()
