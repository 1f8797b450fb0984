"""Waiters for the outcome of one operation: each may leave, the others still get it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from manager.errors import ManagerError


class Waiters:
    def __init__(self) -> None:
        self._futures: set[asyncio.Future[None]] = set()

    async def outcome(self) -> None:
        """Wait for the next `settle`; raises the error it was given."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures.add(future)
        try:
            await future
        finally:
            self._futures.discard(future)

    def settle(self, error: ManagerError | None = None) -> None:
        for future in self._futures:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
        self._futures.clear()
