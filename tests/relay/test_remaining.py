"""Open requests of a replaced daemon: they count in the new one, which lists and cancels them."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.gated import Gated, gateway_before
from tests.support.inside import until
from tests.support.replacing import Replaceable, processes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    import requests

    from tests.support.gateway import Gateway
    from tests.support.nursery import Process

__all__ = ["processes"]

SLOTS = 2
TINY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


class Rig:
    """Two daemons, one after the other, in front of one server with two slots."""

    def __init__(self, gateway: Gateway, server: Gated, processes: list[Process]) -> None:
        self.gateway = gateway
        self.server = server
        self._processes = processes

    def ask(self, **headers: str) -> asyncio.Task[requests.Response]:
        call = asyncio.to_thread(self.gateway.call, "POST", "/api/chat", json=TINY, headers=headers)
        return asyncio.ensure_future(call)

    async def replace(self) -> Process:
        old = await asyncio.to_thread(Replaceable(self.gateway, self._processes).replace)
        await asyncio.to_thread(self.gateway.wait_until_alive)
        return old

    async def get(self, path: str) -> Any:
        return await asyncio.to_thread(self.gateway.get, path)

    async def slots(self) -> dict[str, Any]:
        """The use of the slots of the instance, and the queue of requests without a role."""
        found = await self.get("lanes")
        lanes = {one["name"]: one for one in found["lanes"]}
        return {
            "in_use": found["instances"][0]["in_use"],
            "queued": lanes["*"]["queued"] if "*" in lanes else 0,
        }

    async def until_slots(self, **wanted: int) -> None:
        await until_read(self.slots, lambda found: found == wanted)

    async def opened(self) -> list[dict[str, Any]]:
        return [one for one in (await self.get("requests"))["requests"] if one["open"]]


@asynccontextmanager
async def rig_of(tmp_path: Path, processes: list[Process], **config: Any) -> AsyncIterator[Rig]:
    server = Gated()
    async with server.serving(), gateway_before(tmp_path, {"a": server}, slots=SLOTS, **config) as gateway:
        yield Rig(gateway, server, processes)


async def ended_well(*answers: asyncio.Task[requests.Response]) -> None:
    async with asyncio.timeout(30):
        for answer in await asyncio.gather(*answers):
            assert answer.status_code == 200, answer.text
            assert json.loads(answer.text.splitlines()[-1])["done"] is True


async def test_slots_of_the_old_daemon_are_in_use_in_the_new_one_and_its_queue_comes_first(
    tmp_path: Path, processes: list[Process]
) -> None:
    async with rig_of(tmp_path, processes) as rig:
        old_ones = [rig.ask(), rig.ask()]
        await until(lambda: rig.server.at_once == SLOTS)
        queued = [rig.ask(), rig.ask()]
        await rig.until_slots(in_use=2, queued=2)
        old = await rig.replace()
        await rig.until_slots(in_use=2, queued=2)
        assert (await asyncio.to_thread(rig.gateway.instance, "a"))["in_flight"] == SLOTS
        new_ones = [rig.ask(), rig.ask()]
        await rig.until_slots(in_use=2, queued=4)
        assert rig.server.at_once == SLOTS
        for _ in old_ones:
            rig.server.open.release()
        await ended_well(*old_ones)
        await rig.until_slots(in_use=2, queued=2)
        for _ in queued:
            rig.server.open.release()
        await ended_well(*queued)  # they have waited longer than those of the new daemon
        assert not any(one.done() for one in new_ones)
        await until(lambda: rig.server.at_once == SLOTS)
        assert await asyncio.to_thread(old.wait, 30) == 0
        for _ in new_ones:
            rig.server.open.release()
        await ended_well(*new_ones)
        await rig.until_slots(in_use=0, queued=0)
        assert rig.server.most == SLOTS
        assert (await asyncio.to_thread(rig.gateway.instance, "a"))["in_flight"] == 0
        assert "Traceback" not in rig.gateway.log()


async def test_slots_are_never_exceeded_under_load_through_replacements(
    tmp_path: Path, processes: list[Process]
) -> None:
    async with rig_of(tmp_path, processes) as rig:
        rig.server.takes_s = 0.1
        answered, is_over = 0, False

        async def keep_asking() -> None:
            nonlocal answered
            while not is_over:
                await ended_well(rig.ask())
                answered += 1

        asking = [asyncio.ensure_future(keep_asking()) for _ in range(10)]
        old = []
        for _ in range(3):
            count = answered
            await until(lambda count=count: answered > count + 20)  # type: ignore[misc]
            old.append(await rig.replace())
        count = answered
        await until(lambda: answered > count + 20)
        is_over = True
        await asyncio.gather(*asking)
        for process in old:
            assert await asyncio.to_thread(process.wait, 30) == 0
        assert rig.server.most == SLOTS
        await rig.until_slots(in_use=0, queued=0)


async def test_a_request_of_the_old_daemon_is_listed_shown_and_cancelled(
    tmp_path: Path, processes: list[Process]
) -> None:
    async with rig_of(tmp_path, processes) as rig:
        stays, goes = rig.ask(), rig.ask(**{"X-Project-ID": "goes"})
        await until(lambda: rig.server.at_once == SLOTS)
        await rig.replace()
        opened = await rig.opened()
        assert len(opened) == SLOTS
        (wanted,) = (await rig.get("requests?project=goes"))["requests"]
        assert wanted["open"]
        assert wanted["effective_target"] == "a"
        id_ = wanted["request_id"]
        assert wanted | {"duration_ms": 0} in [one | {"duration_ms": 0} for one in opened]
        shown = await rig.get(f"requests/{id_}")
        assert shown["open"]
        assert shown["decision"]["attempts"][0]["instance"] == "a"
        assert shown["summary"]
        cancelled = await asyncio.to_thread(rig.gateway.call, "DELETE", f"requests/{id_}")
        assert (cancelled.status_code, cancelled.json()["cancelled"]) == (200, True)
        answer = await goes
        assert "the operator has cancelled the request" in answer.text
        await until(lambda: rig.server.at_once == 1)
        await rig.until_slots(in_use=1, queued=0)
        assert [one["project_id"] for one in await rig.opened()] != ["goes"]
        assert not stays.done()
        unknown = await asyncio.to_thread(rig.gateway.call, "DELETE", "requests/unknown")
        assert unknown.status_code == 404
        rig.server.open.release()
        await ended_well(stays)


async def test_a_daemon_that_is_not_replaced_after_all_counts_the_slots_of_its_own_open_requests(
    tmp_path: Path, processes: list[Process]
) -> None:
    async with rig_of(tmp_path, processes) as rig:
        earlier = [rig.ask() for _ in range(SLOTS + 1)]
        await until(lambda: rig.server.at_once == SLOTS)
        old = rig.gateway.process
        assert old is not None
        rig.gateway.start(arguments=("--replace",), until_ready=False)
        new = rig.gateway.process
        assert new is not None
        await until(lambda: '"replaced"' in rig.gateway.log())
        new.kill()
        new.wait()
        rig.gateway.process = old
        await until(lambda: '"not_replaced"' in rig.gateway.log())
        await rig.until_slots(in_use=2, queued=1)
        assert len(await rig.opened()) == SLOTS + 1
        later = rig.ask()
        await rig.until_slots(in_use=2, queued=2)
        for _ in range(SLOTS + 2):
            rig.server.open.release()
        await ended_well(*earlier, later)
        assert rig.server.most == SLOTS


@pytest.mark.parametrize("lane", ["*", "x"])
async def test_a_kill_of_the_old_daemon_gives_its_slots_back(
    tmp_path: Path, processes: list[Process], lane: str
) -> None:
    roles = {"x": {"model": "tiny", "concurrency": SLOTS}} if lane == "x" else {}
    async with rig_of(tmp_path, processes, roles=roles) as rig:
        model = {**TINY, "model": "x"} if lane == "x" else TINY

        def ask() -> asyncio.Task[requests.Response]:
            return asyncio.ensure_future(asyncio.to_thread(rig.gateway.call, "POST", "/api/chat", json=model))

        cut = [ask() for _ in range(SLOTS + 1)]
        await until(lambda: rig.server.at_once == SLOTS)
        old = await rig.replace()
        new_one = ask()
        await until_queued(rig, lane, SLOTS)
        began = time.monotonic()
        old.kill()
        await until(lambda: rig.server.at_once == 1)
        assert time.monotonic() - began < 5
        await asyncio.gather(*cut, return_exceptions=True)
        await until_queued(rig, lane, 0)
        assert await rig.opened() != []
        assert rig.server.most == SLOTS
        rig.server.open.release()
        await ended_well(new_one)


async def until_queued(rig: Rig, lane: str, count: int) -> None:
    def is_wanted(found: Any) -> bool:
        return any(one["name"] == lane and one["queued"] == count for one in found["lanes"])

    await until_read(lambda: rig.get("lanes"), is_wanted)


async def until_read(read: Callable[[], Awaitable[Any]], holds: Callable[[Any], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds(found := await read()):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)
