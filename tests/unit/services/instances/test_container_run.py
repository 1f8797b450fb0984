from __future__ import annotations

import asyncio
import gc

import pytest

from manager.domain.condition import explain_end
from manager.domain.instance import ContainerFacts, Explanation
from manager.errors import EngineUnreachableError, Reason
from manager.services.finishing import finish


@pytest.mark.parametrize(
    ("exit_code", "text"),
    [
        (137, "x was ended from outside, by SIGKILL (exit code 137)"),
        (143, "x was ended from outside, by SIGTERM (exit code 143)"),
        (1, "x ended by itself with exit code 1"),
        (0, "x ended by itself with exit code 0"),
    ],
)
def test_an_end_from_outside_is_told_from_one_by_itself(exit_code: int, text: str) -> None:
    why = explain_end("x", ContainerFacts("c", "x", "i", "exited", exit_code=exit_code))
    assert why.code is Reason.CONTAINER_EXITED
    assert why.message.startswith(text)


def test_a_container_that_is_gone_was_removed() -> None:
    assert explain_end("x", None) == Explanation(Reason.CONTAINER_EXITED, "x was removed")


def test_a_child_that_ran_out_of_memory_is_the_reason_whatever_the_exit_code() -> None:
    facts = ContainerFacts("c", "x", "i", "exited", exit_code=137, out_of_memory=True)
    assert explain_end("x", facts).code is Reason.OUT_OF_MEMORY


# --- calls that are not left half done ---


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
