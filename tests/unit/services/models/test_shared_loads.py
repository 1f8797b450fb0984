"""Loads that several callers wait for: who ends them, and who does not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from manager.errors import Reason, UnavailableError
from manager.services.models import shared_loads
from manager.services.models.shared_loads import SharedLoads

if TYPE_CHECKING:
    from manager.wire.loading import KeepAlive

PLACE = ("one", "tiny:latest")


class Server:
    """Loads until it is released, and counts."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.begun: list[KeepAlive | None] = []
        self.ended: list[str] = []
        self.is_broken = False
        self.is_waited_for = False
        self.loads = SharedLoads(lambda place: place == PLACE and self.is_waited_for)

    async def load(self, keep_alive: KeepAlive | None) -> bool:
        self.begun.append(keep_alive)
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        self.ended.append("done")
        if self.is_broken:
            raise UnavailableError("no room", reason=Reason.MODEL_LOAD_FAILED, instance="one")
        return True

    def caller(self, keep_alive: KeepAlive | None = None) -> asyncio.Task[bool]:
        return asyncio.create_task(self.loads.join(PLACE, keep_alive, lambda: self.load(keep_alive)))


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_callers_share_a_load_and_each_gets_its_outcome() -> None:
    server = Server()
    callers = [server.caller() for _ in range(3)]
    await settled()
    server.release.set()
    assert await asyncio.gather(*callers) == [True] * 3
    assert server.begun == [None]
    assert await server.caller()
    assert server.begun == [None, None], "a load that has ended is not shared"


async def test_the_last_caller_that_leaves_ends_the_load() -> None:
    server = Server()
    first, second = server.caller(), server.caller()
    await settled()
    first.cancel()
    await settled()
    assert server.ended == []
    second.cancel()
    await settled()
    assert server.ended == ["cancelled"]


async def test_who_comes_after_a_load_was_cancelled_begins_another_one() -> None:
    server = Server()
    first = server.caller()
    await settled()
    first.cancel()
    await asyncio.sleep(0)  # it leaves now; the load itself ends in the next round
    second = server.caller()
    await settled()
    server.release.set()
    assert await second
    assert len(server.begun) == 2


async def test_a_load_with_another_time_to_stay_follows_the_first() -> None:
    server = Server()
    first, second = server.caller(-1), server.caller("5m")
    await settled()
    assert server.begun == [-1]
    first.cancel()
    await settled()
    assert server.ended == [], "the second one waits for it"
    server.release.set()
    assert await second
    assert server.begun == [-1, "5m"]


async def test_a_failure_is_told_to_every_caller() -> None:
    server = Server()
    server.is_broken = True
    callers = [server.caller() for _ in range(2)]
    await settled()
    server.release.set()
    for caller in callers:
        with pytest.raises(UnavailableError, match="no room"):
            await caller


async def test_a_load_without_callers_goes_on_while_requests_wait_for_it_at_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_loads, "_LOOK_S", 0.0)
    server = Server()
    server.is_waited_for = True
    caller = server.caller()
    await settled()
    caller.cancel()
    await settled()
    assert server.ended == []
    server.is_waited_for = False
    await settled()
    assert server.ended == ["cancelled"]
