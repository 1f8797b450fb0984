"""Requests that the daemon makes itself, while they are under way."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from manager.errors import NotAnsweredError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from manager.services.open_requests import OpenRequest
    from manager.services.routing.attempting import Attempting

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Open:
    """A request that is under way. Implements `services.open_requests.OpenRequest`."""

    attempting: Attempting | None
    task: asyncio.Task[Any] | None
    is_cancelled: bool = False

    def cancel(self, why: str) -> None:  # noqa: ARG002  (the client gets the message of all cancelled ones)
        self.is_cancelled = True
        if self.attempting is not None:
            self.attempting.cancelled()
        if self.task is not None:
            self.task.cancel()


def _nothing(_error: asyncio.CancelledError) -> None:
    """Note nothing."""


class OwnRequests:
    """Owns the tasks of such requests, so that an operator finds and cancels them."""

    def __init__(self) -> None:
        self._open: set[_Open] = set()

    def open(self) -> Iterable[OpenRequest]:
        """Return the requests that are under way."""
        return self._open

    async def do(
        self,
        attempting: Attempting,
        work: Coroutine[Any, Any, T],
        *,
        cancelled: Callable[[asyncio.CancelledError], None] = _nothing,
        error: type[NotAnsweredError] = NotAnsweredError,
    ) -> T:
        """Do the work of a request; cancelling this ends it first.

        Args:
            attempting: its life.
            work: has it answered.
            cancelled: called where this is cancelled, before the work is.
            error: raised where the operator has cancelled the request.
        """
        task = asyncio.ensure_future(work)
        entry = _Open(attempting, task)
        self._open.add(entry)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as why:
            if not task.done():
                cancelled(why)
            raise
        finally:
            self._open.discard(entry)
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if entry.is_cancelled and task.cancelled():
            raise error("the operator has cancelled the request", reason=Reason.CANCELLED, refused=None)
        return task.result()
