"""Shares of instances between gateways, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from manager.adapters.postgres import AdvisoryLocks
from manager.errors import LockedError, ManagerError
from manager.services.instances.sharing import NoSharing, Sharing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.postgres import Postgres


HELD = """SELECT pid FROM pg_locks
    WHERE locktype = 'advisory' AND mode = 'ShareLock' AND granted"""
CUT = HELD.replace("SELECT pid", "SELECT pg_terminate_backend(pid)")


class Beneath:
    """Locks of one machine that exclude nothing."""

    @asynccontextmanager
    async def hold(self, instance_id: str) -> AsyncIterator[None]:
        yield


@asynccontextmanager
async def gateways(
    postgres: Postgres, count: int = 2, *, wait_s: float = 5.0
) -> AsyncIterator[list[Sharing]]:
    url = postgres.database()
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(2):
            session = AdvisoryLocks(url)
            stack.push_async_callback(session.close)
            sharing = Sharing(session, "m", beneath=Beneath(), wait_s=wait_s)
            running = asyncio.create_task(sharing.run())
            stack.push_async_callback(ended, running)
            made.append(sharing)
        yield made


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def comes_true(holds: Any) -> None:
    async with asyncio.timeout(10):
        while not await holds():  # noqa: ASYNC110  (asks a database)
            await asyncio.sleep(0.01)


async def test_a_gateway_is_alone_only_where_no_other_has_a_share(postgres: Postgres) -> None:
    async with gateways(postgres, wait_s=0.3) as (a, b):
        await a.take("x")
        await b.take("x")
        assert not await a.alone("x"), "the other has a share"
        assert await b.alone("x"), "the first has given its own up"
        assert await b.alone("x"), "asking again changes nothing"
        with pytest.raises(LockedError, match=r"another gateway stops x for longer than 0\.3 s"):
            await a.take("x")
        await a.take("y")


async def test_one_that_ends_is_waited_for(postgres: Postgres) -> None:
    async with gateways(postgres) as (a, b):
        assert await a.alone("x")
        taking = asyncio.create_task(b.take("x"))
        await asyncio.wait({taking}, timeout=0.3)
        assert not taking.done()
        a.over("x")
        async with asyncio.timeout(5):
            await taking


async def test_a_share_that_is_taken_again_at_once_is_not_given_back(postgres: Postgres) -> None:
    async with gateways(postgres) as (a, b):
        await a.take("x")
        a.over("x")
        await a.take("x")
        await a.take("y")
        a.over("y")
        await comes_true(lambda: b.alone("y"))  # what was over before that is settled by then
        assert not await b.alone("x")


async def test_the_one_who_was_alone_goes_on_with_a_share(postgres: Postgres) -> None:
    async with gateways(postgres) as (a, b):
        assert await a.alone("x")
        await a.take("x")
        await b.take("x")
        assert not await b.alone("x")


async def test_two_operations_on_one_instance_exclude_each_other(postgres: Postgres) -> None:
    async with gateways(postgres, wait_s=0.3) as (a, b):
        async with a.hold("x"):
            with pytest.raises(LockedError, match="another gateway starts or stops x"):
                async with b.hold("x"):
                    pytest.fail("it is held")
            async with b.hold("y"):
                pass
        async with b.hold("x"):
            pass


async def test_the_share_of_a_connection_that_was_cut_is_waited_for(postgres: Postgres) -> None:
    async with gateways(postgres) as (a, b):
        await a.take("x")
        assert not await b.alone("x")
        cut = await asyncio.to_thread(postgres.sql, "postgres", CUT)
        assert len(cut) == 1

        async def is_shared_again() -> bool:
            assert not await b.alone("x"), "the other uses it, and takes its share again"
            return bool(await asyncio.to_thread(postgres.sql, "postgres", HELD))

        await comes_true(is_shared_again)
        a.over("x")
        await comes_true(lambda: b.alone("x"))


async def test_shares_that_a_lost_database_has_taken_are_taken_again(postgres: Postgres) -> None:
    async with gateways(postgres) as (a, b):
        await a.take("x")
        postgres.kill()
        try:
            with pytest.raises(ManagerError):
                await b.take("x")
            with pytest.raises(ManagerError):
                await a.alone("x")
        finally:
            postgres.start()

        async def is_shared() -> bool:
            try:
                alone = await b.alone("x")
            except ManagerError:
                return False
            if alone:
                b.over("x")
            return not alone

        await comes_true(is_shared)


async def test_an_only_gateway_is_always_alone() -> None:
    sharing = NoSharing()
    await sharing.take("x")
    assert await sharing.alone("x")
    sharing.over("x")
