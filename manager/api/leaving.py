"""Work for a caller, which ends when the caller leaves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect

from manager.services.routing.whole import CLIENT_LEFT

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from starlette.requests import Request

T = TypeVar("T")


async def while_there(caller: Request, work: Coroutine[None, None, T]) -> T:
    """Return the result of `work`, which is cancelled when the caller disconnects. The body has been read.

    The message of that cancellation is CLIENT_LEFT.

    Raises:
        ClientDisconnect: the caller has disconnected.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(caller))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel(CLIENT_LEFT if leaving.done() else None)
        leaving.cancel()
        await asyncio.wait({working, leaving})


async def _left(caller: Request) -> None:
    while (await caller.receive())["type"] != "http.disconnect":
        pass
