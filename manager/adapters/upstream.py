"""Probes over HTTP through aiohttp."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import aiohttp

from manager.errors import Reason, UnavailableError
from manager.services.ports import ProbeAnswer
from manager.wire.ollama import read_available, read_loaded, read_version

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

# An answer beyond this is not one of Ollama's status routes: thousands of models fit.
_MOST_BYTES = 8 * 2**20

# Around each request and answer go at least four TCP segments with Ethernet, IP and TCP headers of 66 bytes
# together, and about as many again when the connection has to be made and ended.
_SEGMENT_BYTES = 66
_SEGMENTS_PER_REQUEST = 6
_SEGMENTS_PER_CONNECTION = 8
_HEAD_BYTES = 200


class AiohttpUpstream:
    """Implements `services.ports.Upstream`; an async context manager around one client session."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, limit_per_host=2, keepalive_timeout=60),
            # The deadline is set for each probe; the default of five minutes in all would be another one.
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"User-Agent": "ollama-manager"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def answers(self, url: str, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s), self._client.get(url, allow_redirects=False) as answer:
                await _body(answer)  # headers alone may come from a server that has stalled
                return _is_success(answer)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return False

    async def probe(self, endpoint: str, *, timeout_s: float, models: bool, tags: bool) -> ProbeAnswer:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._probe(endpoint, models=models, tags=tags)
        except TimeoutError as error:
            raise UnavailableError(
                f"{endpoint} did not answer within {timeout_s:g} s", reason=Reason.INSTANCE_UNHEALTHY
            ) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UnavailableError(
                f"{endpoint} cannot be reached ({plainly(error)})", reason=Reason.UPSTREAM_UNREACHABLE
            ) from error

    async def _probe(self, endpoint: str, *, models: bool, tags: bool) -> ProbeAnswer:
        version_body, wire_bytes = await self._get(f"{endpoint}/api/version")
        version = read_version(version_body)
        if version is None:
            raise UnavailableError(
                f"{endpoint}/api/version is not answered the way Ollama does",
                reason=Reason.INSTANCE_UNHEALTHY,
            )
        loaded = available = None
        if models:
            body, size = await self._get(f"{endpoint}/api/ps")
            loaded = read_loaded(body)
            wire_bytes += size
        if tags:
            body, size = await self._get(f"{endpoint}/api/tags")
            available = read_available(body)
            wire_bytes += size
        wire_bytes += _SEGMENTS_PER_CONNECTION * _SEGMENT_BYTES
        return ProbeAnswer(version=version, loaded=loaded, available=available, wire_bytes=wire_bytes)

    async def _get(self, url: str) -> tuple[Any, int]:
        """The JSON at `url` (None when it is none), and about how many bytes that moved both ways."""
        # Ollama redirects nobody; a server that does is not asked to be followed to wherever it likes.
        async with self._client.get(url, allow_redirects=False) as answer:
            raw = await _body(answer)
            wire_bytes = len(raw) + len(url) + 2 * _HEAD_BYTES + _SEGMENTS_PER_REQUEST * _SEGMENT_BYTES
            if not _is_success(answer):
                return None, wire_bytes
            try:
                return json.loads(raw), wire_bytes
            except (ValueError, RecursionError):  # not JSON, or nested beyond all measure
                return None, wire_bytes

    @property
    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("used outside its context")
        return self._session


def plainly(error: Exception) -> str:
    """What the system said, without the library's frame around it."""
    system = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    return getattr(system, "strerror", None) or str(system) or type(system).__name__


def _is_success(answer: aiohttp.ClientResponse) -> bool:
    return 200 <= answer.status < 300  # noqa: PLR2004


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    """The whole body, which may come in any number of pieces.

    Raises:
        ValueError: it is longer than any that is expected.
    """
    body = bytearray()
    async for piece in answer.content.iter_any():
        body += piece
        if len(body) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
    return bytes(body)
