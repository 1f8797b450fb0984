from __future__ import annotations

import asyncio

import pytest

from manager.errors import ManagerError
from manager.services.waiters import Waiters


async def waiting(waiters: Waiters, count: int) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(waiters.outcome()) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_all_who_wait_get_the_outcome() -> None:
    waiters = Waiters()
    tasks = await waiting(waiters, 3)
    waiters.settle()
    assert await asyncio.gather(*tasks) == [None, None, None]


async def test_all_who_wait_get_the_error() -> None:
    waiters = Waiters()
    tasks = await waiting(waiters, 3)
    error = ManagerError("it did not work")
    waiters.settle(error)
    assert await asyncio.gather(*tasks, return_exceptions=True) == [error, error, error]


async def test_one_who_leaves_takes_nothing_from_the_others() -> None:
    waiters = Waiters()
    first, second = await waiting(waiters, 2)
    first.cancel()
    await asyncio.sleep(0)
    waiters.settle()
    await second
    assert first.cancelled()


async def test_one_who_leaves_at_the_moment_of_an_error_leaves_no_error_unread(
    recwarn: pytest.WarningsRecorder,
) -> None:
    unread: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unread.append(context))
    waiters = Waiters()
    (task,) = await waiting(waiters, 1)
    waiters.settle(ManagerError("it did not work"))
    task.cancel()
    with pytest.raises((asyncio.CancelledError, ManagerError)):
        await task
    del task
    assert unread == []


async def test_one_who_was_cancelled_but_has_not_left_yet_is_passed_over() -> None:
    waiters = Waiters()
    first, second = await waiting(waiters, 2)
    first.cancel()
    waiters.settle(ManagerError("it did not work"))
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(ManagerError):
        await second


async def test_an_outcome_is_for_those_who_wait_and_not_for_those_who_come_later() -> None:
    waiters = Waiters()
    waiters.settle(ManagerError("of the past"))
    (task,) = await waiting(waiters, 1)
    assert not task.done()
    waiters.settle()
    await task
