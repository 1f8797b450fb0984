"""Calls that a cancelled caller does not leave half done."""

from __future__ import annotations

import asyncio
import gc

import pytest

from manager.errors import EngineUnreachableError
from manager.services.finishing import finish


async def test_a_call_goes_on_when_its_caller_is_cancelled() -> None:
    begun, gate, ended = asyncio.Event(), asyncio.Event(), False

    async def call() -> None:
        nonlocal ended
        begun.set()
        await gate.wait()
        ended = True

    caller = asyncio.ensure_future(finish(call()))
    await begun.wait()
    caller.cancel()
    await asyncio.sleep(0)
    assert not caller.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended


async def test_an_error_of_a_call_whose_caller_was_cancelled_is_no_defect_of_the_loop() -> None:
    begun, gate = asyncio.Event(), asyncio.Event()
    defects: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: defects.append(context))

    async def call() -> None:
        begun.set()
        await gate.wait()
        raise EngineUnreachableError("it has gone")

    caller = asyncio.ensure_future(finish(call()))
    await begun.wait()
    caller.cancel()
    await asyncio.sleep(0)
    gate.set()
    await asyncio.wait({caller})
    assert caller.cancelled()
    del caller
    gc.collect()  # a task whose error nobody has taken reports it at its end
    assert defects == []
