"""Logs that are followed: streams of text that end with the container or with their client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.responses import StreamingResponse

from manager.errors import Reason, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from starlette.types import Receive, Scope, Send

# Each takes a thread and a connection to the engine.
MOST = 32
_RETRY_S = 10.0


class LogFollowers:
    """The clients that follow a log; one more than `MOST` is refused."""

    def __init__(self) -> None:
        self._count = 0

    async def answer(self, pieces: AsyncGenerator[str, None]) -> StreamingResponse:
        """Begin an answer that streams `pieces`.

        Raises:
            UnavailableError: too many clients follow logs already, or there is no log to follow.
        """
        if self._count >= MOST:
            raise UnavailableError(
                f"{MOST} clients follow logs already; expected at most {MOST}",
                reason=Reason.OVERLOADED,
                retry_after_s=_RETRY_S,
            )
        self._count += 1
        try:
            first = await anext(pieces)  # what fails at once is an error status, not a stream
        except BaseException:
            await self._end(pieces)
            raise
        return _Answer(self, first, pieces)

    async def _end(self, pieces: AsyncGenerator[str, None]) -> None:
        self._count -= 1
        await pieces.aclose()


class _Answer(StreamingResponse):
    """Closes its source when it has ended, however that is."""

    def __init__(self, followers: LogFollowers, first: str, pieces: AsyncGenerator[str, None]) -> None:
        super().__init__(
            _joined(first, pieces),
            media_type="text/plain",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._followers = followers
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._followers._end(self._pieces)  # noqa: SLF001  (the same file)


async def _joined(first: str, pieces: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    if first:
        yield first
    async for piece in pieces:
        yield piece
