"""Requests that pass through whole, sent through aiohttp."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
from yarl import URL

from manager.adapters.http_client import plainly
from manager.errors import Reason, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from types import TracebackType
    from typing import Self

    from manager.services.ports import Question
    from manager.wire.head import Header

_OURS_TO_ADD = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_PIECE_BYTES = 256 * 1024


class AiohttpModelServer:
    """Implements `services.ports.ModelServer`; an async context manager around one client session.

    Args:
        connect_timeout_s: for a connection.
        patience_s: how long nothing may move, in either direction: a model may have to be read or written
            as a whole before there is anything to say. There is no limit for the whole.
    """

    def __init__(self, *, connect_timeout_s: float, patience_s: float) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._patience_s = patience_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            # A new connection each time: one that was kept may be closed by the server just as it is used,
            # and what is sent here must not be sent a second time.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
            auto_decompress=False,
            skip_auto_headers=_OURS_TO_ADD,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def ask(self, question: Question) -> AsyncIterator[_Answer]:
        response = await self._head_of_answer(question)
        try:
            yield _Answer(response, question.endpoint, self._patience_s)
        finally:
            response.close()

    async def _head_of_answer(self, question: Question) -> aiohttp.ClientResponse:
        if self._session is None:
            raise RuntimeError("used outside its context")
        headers = [(_text(name), _text(value)) for name, value in question.headers]
        waiting = _Waiting(self._patience_s)
        body: bytes | AsyncIterator[bytes] | None = question.body or None
        length = question.length
        if isinstance(body, bytes) and len(body) > _PIECE_BYTES:
            length = len(body)
            body = _cut(body)
        if body is not None and not isinstance(body, bytes):
            body = waiting.watched(body)
            if length is not None:
                headers.append(("Content-Length", str(length)))
        try:
            async with waiting:
                return await self._session.request(
                    question.method,
                    URL(f"{question.endpoint}{question.target}", encoded=True),
                    headers=headers,
                    data=body,
                    # Ollama redirects nobody; a server that does is not followed to wherever it likes.
                    allow_redirects=False,
                )
        except aiohttp.ConnectionTimeoutError as error:
            raise _unavailable(
                question.endpoint, f"could not be connected to within {self._connect_timeout_s:g} s", _LATE
            ) from error
        except TimeoutError as error:
            why = f"did not answer within {self._patience_s:g} s"
            raise _unavailable(question.endpoint, why, _LATE) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            why = f"cannot be reached ({plainly(error)})"
            raise _unavailable(question.endpoint, why, Reason.UPSTREAM_UNREACHABLE) from error


_LATE = Reason.ATTEMPT_TIMEOUT


class _Waiting:
    """Waits for the head of an answer; the time begins anew with each piece of the request that is sent."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._timeout = asyncio.timeout(patience_s)
        self._over = False

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        await self._timeout.__aexit__(kind, error, trace)

    async def watched(self, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for piece in pieces:
            yield piece
            if not self._over:  # a server may answer before it has read everything
                self._timeout.reschedule(asyncio.get_running_loop().time() + self._patience_s)


class _Answer:
    def __init__(self, response: aiohttp.ClientResponse, endpoint: str, patience_s: float) -> None:
        self._response = response
        self._endpoint = endpoint
        self._patience_s = patience_s

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> Sequence[Header]:
        return self._response.raw_headers

    @property
    def length(self) -> int | None:
        return self._response.content_length

    async def piece(self) -> bytes:
        try:
            async with asyncio.timeout(self._patience_s):
                return await self._response.content.readany()
        except TimeoutError as error:
            why = f"said nothing for {self._patience_s:g} s"
            raise _unavailable(self._endpoint, why, _LATE) from error
        except (aiohttp.ClientError, OSError) as error:
            why = f"broke off before its answer ended ({plainly(error)})"
            raise _unavailable(self._endpoint, why, Reason.UPSTREAM_ERROR) from error


async def _cut(body: bytes) -> AsyncIterator[bytes]:
    """A long body in pieces: sent as a whole it would hold the event loop up."""
    for start in range(0, len(body), _PIECE_BYTES):
        yield body[start : start + _PIECE_BYTES]


def _unavailable(endpoint: str, why: str, reason: Reason) -> UnavailableError:
    from manager.errors import AskFailedError
    return AskFailedError(f"{endpoint} {why}", reason=reason, begun="connect" not in why and "reached" not in why)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")

async def _cut(body: bytes) -> AsyncIterator[bytes]:
    """A long body in pieces: sent as a whole it would hold the event loop up."""
    for start in range(0, len(body), _PIECE_BYTES):
        yield body[start : start + _PIECE_BYTES]
