"""Runs work that is cut into short steps on the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from manager.wire.steps import Steps

T = TypeVar("T")


async def in_steps(steps: Steps[T]) -> T:
    """Run all steps and return the result; other tasks have their turn between two of them."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        await asyncio.sleep(0)
