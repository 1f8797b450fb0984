"""Slots as requests see them: granted, queued, refused, given back (U-8, A-10)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.roles import RequestKind, Role, RoutingSettings
from manager.services.lanes.slots import Place, Refusal, Slots
from tests.support.attempts import Clock

if TYPE_CHECKING:
    from collections.abc import Callable


def role(name: str, **values: Any) -> Role:
    return Role(name, RequestKind.GENERATE, "tiny", **values)


class Rig:
    def __init__(self, *roles: Role, **slots: int | None) -> None:
        self.settings: Any = SimpleNamespace(version=0)
        self.clock = Clock()
        self.slots_of: dict[str, int | None] = slots
        self.holders: list[Any] = []
        self.slots = Slots(
            self.settings, lambda: dict(self.slots_of), lambda: list(self.holders), now=self.clock
        )
        self.set(*roles)

    def set(self, *roles: Role, **slots: int | None) -> None:
        self.settings.version += 1
        self.settings.routing = RoutingSettings({one.name: one for one in roles})
        self.slots_of |= slots
        self.slots.refresh()

    def enter(
        self, lane: str | None = None, *instances: str, choose: Callable[[], tuple[str, ...]] | None = None
    ) -> Place | Refusal:
        wanted = instances or ("a",)
        return self.slots.enter(lane, "p", wanted, choose or (lambda: wanted), since=self.clock())

    def place(self, lane: str | None = None, *instances: str, **how: Any) -> Place:
        found = self.enter(lane, *instances, **how)
        assert isinstance(found, Place)
        return found


def test_without_slots_and_limits_it_is_off_and_each_of_them_turns_it_on() -> None:
    rig = Rig(role("x"), a=None)
    assert not rig.slots.is_on
    rig.set(role("x"), a=1)
    assert rig.slots.is_on
    rig.set(role("x", concurrency=1), a=None)
    assert rig.slots.is_on
    rig.set(role("x"))
    assert not rig.slots.is_on


def test_requests_under_way_take_their_slots_when_the_first_limit_is_set() -> None:
    rig = Rig(a=None)
    held: list[Place] = []
    rig.holders = [
        SimpleNamespace(lane="x", holds="a", hold_slot=lambda: held.append(rig.slots.hold("x", "a", 0.0)))
        for _ in range(2)
    ]
    rig.set(role("x"))
    assert rig.slots.lanes() == (("x", 2, 0, None, None, 0),)
    assert rig.slots.instances() == (("a", None, 2, 0, 0),)
    rig.set(role("x"), a=1)
    assert rig.slots.instances() == (("a", 1, 2, 0, 0),)
    rig.set(role("x"), a=2)
    assert len(held) == 2  # only once
    for place in held:
        place.give_back()
        place.give_back()
    assert rig.slots.instances() == (("a", 2, 0, 0, 0),)


async def test_a_waiting_request_is_woken_by_a_slot() -> None:
    rig = Rig(a=1)
    first, second = rig.place(), rig.place()
    assert (first.instance, second.instance, second.ahead) == ("a", None, 0)
    waiting = asyncio.ensure_future(second.settled(within_s=None))
    await asyncio.sleep(0)
    first.give_back()
    assert await waiting == "granted"
    assert (second.instance, second.ahead) == ("a", None)
    assert await second.settled(within_s=0.0) == "granted"


async def test_a_slot_that_comes_before_the_request_waits_is_not_lost() -> None:
    rig = Rig(a=1)
    first, second = rig.place(), rig.place()
    first.give_back()
    assert await second.settled(within_s=None) == "granted"


async def test_a_request_waits_no_longer_than_its_time() -> None:
    rig = Rig(a=1)
    rig.place()
    second = rig.place()
    assert await second.settled(within_s=0.0) == "timeout"
    second.give_back()
    assert rig.slots.lanes()[-1] == ("*", 1, 0, None, None, 0)


async def test_a_slot_that_comes_with_the_end_of_the_time_counts() -> None:
    rig = Rig(a=1)
    first, second = rig.place(), rig.place()
    waiting = asyncio.ensure_future(second.settled(within_s=0.0))
    await asyncio.sleep(0)
    first.give_back()
    assert await waiting == "granted"


async def test_a_request_that_leaves_gives_its_place_or_its_slot_to_the_next() -> None:
    rig = Rig(a=1)
    first, second, third = rig.place(), rig.place(), rig.place()
    waiting = asyncio.ensure_future(second.settled(within_s=None))
    await asyncio.sleep(0)
    waiting.cancel()
    second.give_back()
    first.give_back()
    assert third.instance == "a"
    second.give_back()
    assert third.instance == "a"


def test_a_full_queue_says_when_to_come_again() -> None:
    rig = Rig(role("x", queue_length=1), a=1)
    rig.place("x")
    rig.place("x")
    rig.clock.advance(7.0)
    assert rig.enter("x") == Refusal("queue_full", "the queue of the role 'x' is full", 7.0)
    rig.clock.advance(1000.0)
    found = rig.enter("x")
    assert isinstance(found, Refusal)
    assert found.retry_after_s == 60.0


def test_a_queue_of_no_length_is_full_at_once() -> None:
    rig = Rig(role("x", queue_length=0), a=1)
    rig.place("x")
    assert rig.enter("x") == Refusal("queue_full", "the queue of the role 'x' is full", 1.0)


def test_slots_that_are_all_reserved_for_others_are_not_waited_for() -> None:
    rig = Rig(role("safe", reserved=1, instances=("a",)), a=1)
    message = "all slots of a are reserved for other roles than requests without a role"
    assert rig.enter(None) == Refusal("policy", message, None)


def test_the_time_in_the_queue_is_that_of_the_role() -> None:
    rig = Rig(role("x", queue_wait_s=3.0), a=1)
    assert (rig.slots.wait_s("x"), rig.slots.wait_s(None)) == (3.0, 60.0)


def test_the_load_of_lanes_and_instances() -> None:
    rig = Rig(role("x", concurrency=3, reserved=1, instances=("a",)), role("y"), a=2, b=None)
    rig.place("y")
    rig.place("y", "b")
    rig.place("y")
    rig.clock.advance(2.5)
    assert rig.slots.lanes() == (("x", 0, 0, None, 3, 1), ("y", 2, 1, 2.5, None, 0))
    assert rig.slots.instances() == (("a", 2, 1, 1, 1), ("b", None, 1, 0, 0))


async def test_a_change_of_settings_lets_waiting_requests_in() -> None:
    rig = Rig(a=1)
    rig.place()
    second = rig.place()
    rig.set(a=2)
    assert await second.settled(within_s=None) == "granted"


async def test_a_waiting_request_follows_the_fleet() -> None:
    rig = Rig(a=1, b=1)
    allowed: dict[str, tuple[str, ...]] = {"second": ("a",), "third": ("a",)}
    rig.place()
    second = rig.place(choose=lambda: allowed["second"])
    third = rig.place(choose=lambda: allowed["third"])
    waiting = asyncio.ensure_future(third.settled(within_s=None))
    allowed |= {"second": ("a", "b"), "third": ()}
    looked = asyncio.Event()

    def look() -> None:
        rig.slots.refresh()
        looked.set()

    running = asyncio.ensure_future(rig.slots.run(look))
    assert await second.settled(within_s=None) == "granted"
    assert second.instance == "b"
    assert await waiting == "changed"
    third.give_back()
    assert looked.is_set()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


def test_a_request_that_gets_its_slot_while_it_chooses_anew_keeps_it() -> None:
    rig = Rig(a=1, b=1)

    def choose() -> tuple[str, ...]:
        rig.set(a=2)
        return ("b",)

    rig.place()
    second = rig.place(choose=choose)
    list(rig.slots.choose_again())
    assert second.instance == "a"
    assert [one.in_use for one in rig.slots.instances()] == [2, 0]


async def test_a_request_that_could_never_have_a_slot_of_its_new_instances_is_decided_anew() -> None:
    rig = Rig(role("safe", reserved=1, instances=("a",)), a=1, b=1)
    rig.place(None, "b")
    allowed: tuple[str, ...] = ("b",)
    second = rig.place(None, "b", choose=lambda: allowed)
    waiting = asyncio.ensure_future(second.settled(within_s=None))
    await asyncio.sleep(0)
    allowed = ("a",)
    list(rig.slots.choose_again())
    assert await waiting == "changed"


async def test_many_waiting_requests_are_compared_in_slices() -> None:
    rig = Rig(role("x", queue_length=1000), a=1)
    rig.place("x")
    for _ in range(200):
        rig.place("x")
    assert len(list(rig.slots.choose_again())) == 3


async def test_nothing_is_looked_at_while_no_request_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manager.services.lanes.slots._RECHECK_S", 0.0)
    rig = Rig(a=1)
    looks = 0
    looked = asyncio.Event()
    first = rig.place()

    def look() -> None:
        nonlocal looks
        looks += 1
        looked.set()

    running = asyncio.ensure_future(rig.slots.run(look))
    for _ in range(10):
        await asyncio.sleep(0)
    assert looks == 0
    second = rig.place()
    await looked.wait()
    first.give_back()
    second.give_back()
    for _ in range(10):
        await asyncio.sleep(0)
    before = looks
    for _ in range(10):
        await asyncio.sleep(0)
    assert looks == before
    running.cancel()
