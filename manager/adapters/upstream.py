"""Probes of the servers in instances, over HTTP."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from manager.adapters.http_client import HttpClient, plainly
from manager.descriptors import lacks_descriptors
from manager.errors import OutOfDescriptorsError, Reason, UnavailableError
from manager.services.ports import ProbeAnswer, ShowAnswer
from manager.wire.details import read_show
from manager.wire.ollama import read_available, read_loaded, read_version
from manager.wire.openai_models import named_models, read_models

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from manager.adapters.http_client import Answer
    from manager.wire.head import Header

# An answer beyond this is not one of Ollama's status routes: thousands of models fit.
_MOST_BYTES = 8 * 2**20
# An answer of `/api/show` has the licences and the names of all tensors: up to hundreds of kilobytes.
_MOST_SHOWN_BYTES = 2**20
# `/health` of vLLM and llama.cpp: 503 while the model is loaded, 500 once the engine is dead. Other servers
# have no such route, and say so in several ways.
_UNHEALTHY = (500, 502, 503, 504)
_REFUSED = (401, 403)
_VERSION = re.compile(r"v[0-9][a-z0-9]*")
# Containers get new addresses: beyond this the servers that were known first are gone.
_MOST_SERVERS = 1024

# Around each request and answer go at least four TCP segments with Ethernet, IP and TCP headers of 66 bytes
# together, and about as many again when the connection has to be made and ended.
_SEGMENT_BYTES = 66
_SEGMENTS_PER_REQUEST = 6
_SEGMENTS_PER_CONNECTION = 8


class HttpUpstream:
    """Implements `services.ports.Upstream`; leaving its context closes the kept connections.

    Args:
        tls: returns the TLS context that the process shares.
        own_tls: the same for servers that have their own, by scheme, host and port.
    """

    def __init__(
        self,
        tls: Callable[[], Awaitable[ssl.SSLContext]],
        own_tls: Mapping[str, Callable[[], Awaitable[ssl.SSLContext]]] = MappingProxyType({}),
    ) -> None:
        self._tls = tls
        self._own_tls = own_tls
        self._servers: dict[str, HttpClient] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers.values():
            server.close()

    async def answers(self, url: str, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                # To the end of its body: headers alone may come from a server that has stalled.
                return _is_success(await self._asked(url))
        except (OSError, ValueError, OutOfDescriptorsError):
            return False

    async def probe(
        self, endpoint: str, *, timeout_s: float, tags: bool, headers: Sequence[Header] = ()
    ) -> ProbeAnswer:
        async with self._deadline(endpoint, timeout_s):
            return await self._probe(endpoint, headers, tags=tags)

    async def probe_openai(
        self,
        endpoint: str,
        *,
        timeout_s: float,
        models: bool,
        names: Sequence[str] | None,
        headers: Sequence[Header],
    ) -> ProbeAnswer:
        async with self._deadline(endpoint, timeout_s):
            health = await self._asked(f"{_root(endpoint)}/health", headers=headers)
            wire_bytes = health.http_bytes
            available = None if names is None else named_models(names)
            if health.status in _UNHEALTHY:
                raise _unhealthy(f"{endpoint}: /health answers with status {health.status}")
            if not _is_success(health) or (models and names is None):
                answer = await self._asked(f"{endpoint}/models", headers=headers)
                wire_bytes += answer.http_bytes
                found = _models_in(answer, endpoint, is_needed=names is None)
                available = found if names is None else available
        wire_bytes += 2 * (_SEGMENTS_PER_REQUEST + _SEGMENTS_PER_CONNECTION) * _SEGMENT_BYTES
        return ProbeAnswer(version=None, loaded=None, available=available, wire_bytes=wire_bytes)

    async def show(
        self, endpoint: str, model: str, *, timeout_s: float, headers: Sequence[Header] = ()
    ) -> ShowAnswer:
        body = orjson.dumps({"model": model})
        async with self._deadline(endpoint, timeout_s):
            answer = await self._asked(
                f"{endpoint}/api/show", body, most_bytes=_MOST_SHOWN_BYTES, headers=headers
            )
        wire_bytes = answer.http_bytes + (_SEGMENTS_PER_REQUEST + _SEGMENTS_PER_CONNECTION) * _SEGMENT_BYTES
        return ShowAnswer(read_show(answer.body) if _is_success(answer) else None, wire_bytes)

    async def _probe(self, endpoint: str, headers: Sequence[Header], *, tags: bool) -> ProbeAnswer:
        body, wire_bytes = await self._get(f"{endpoint}/api/ps", headers)
        loaded = read_loaded(body)
        version = available = None
        if tags or loaded is None:
            body, size = await self._get(f"{endpoint}/api/version", headers)
            wire_bytes += size
            version = read_version(body)
            if version is None:
                raise UnavailableError(
                    f"{endpoint}/api/version is not answered the way Ollama does",
                    reason=Reason.INSTANCE_UNHEALTHY,
                )
        if tags:
            body, size = await self._get(f"{endpoint}/api/tags", headers)
            available = read_available(body)
            wire_bytes += size
        wire_bytes += _SEGMENTS_PER_CONNECTION * _SEGMENT_BYTES
        return ProbeAnswer(version=version, loaded=loaded, available=available, wire_bytes=wire_bytes)

    async def _get(self, url: str, headers: Sequence[Header]) -> tuple[Any, int]:
        """The JSON at `url` (None when it is none), and about how many bytes that moved both ways."""
        answer = await self._asked(url, headers=headers)
        wire_bytes = answer.http_bytes + _SEGMENTS_PER_REQUEST * _SEGMENT_BYTES
        if not _is_success(answer):
            return None, wire_bytes
        return _json(answer), wire_bytes

    @asynccontextmanager
    async def _deadline(self, endpoint: str, timeout_s: float) -> AsyncIterator[None]:
        """Limit what is done in it, and translate its errors."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as error:
            server = self._servers.get(_origin(endpoint))
            if server is not None and server.is_unacknowledged:
                why = f"its host has acknowledged nothing for {timeout_s:g} s"
                raise UnavailableError(
                    f"{endpoint} cannot be reached ({why})", reason=Reason.UPSTREAM_UNREACHABLE
                ) from error
            raise UnavailableError(
                f"{endpoint} did not answer within {timeout_s:g} s", reason=Reason.INSTANCE_UNHEALTHY
            ) from error
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and lacks_descriptors(error):
                raise OutOfDescriptorsError from error
            raise UnavailableError(
                f"{endpoint} cannot be reached ({plainly(error)})", reason=Reason.UPSTREAM_UNREACHABLE
            ) from error

    async def _asked(
        self,
        url: str,
        body: bytes | None = None,
        *,
        most_bytes: int | None = None,
        headers: Sequence[Header] = (),
    ) -> Answer:
        parts = urlsplit(url)
        origin = _origin(url)
        server = self._servers.get(origin)
        if server is None:
            if len(self._servers) >= _MOST_SERVERS:
                self._servers.pop(next(iter(self._servers))).close()
            tls = self._own_tls.get(origin, self._tls)
            server = self._servers[origin] = HttpClient(origin, most_bytes=_MOST_BYTES, tls=tls)
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        method = "GET" if body is None else "POST"
        return await server.ask(method, path, body, most_bytes=most_bytes, headers=headers)


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _root(endpoint: str) -> str:
    """Return the base URL of an API without its version: `/health` stands beside that."""
    head, _, last = endpoint.rpartition("/")
    return head if _VERSION.fullmatch(last) else endpoint


def _models_in(answer: Answer, endpoint: str, *, is_needed: bool) -> tuple[Mapping[str, Any], ...] | None:
    """Return the models in an answer of `/models`.

    Raises:
        UnavailableError: it says that the server cannot be used, or has no list where one is needed.
    """
    status = answer.status
    if status in _REFUSED:
        raise UnavailableError(
            f"{endpoint} refuses the key for it, or its lack (status {status})",
            reason=Reason.INSTANCE_UNAVAILABLE,
        )
    if 300 <= status < 400:  # noqa: PLR2004
        raise _unhealthy(
            f"{endpoint}/models answers with a redirect (status {status}), which is not followed"
        )
    if status >= 500:  # noqa: PLR2004
        raise _unhealthy(f"{endpoint}/models answers with status {status}")
    found = read_models(_json(answer)) if _is_success(answer) else None
    if found is None and is_needed:
        raise _unhealthy(
            f"{endpoint}/models is no list of models (status {status}); "
            "name them in `models` of the instance where its server has none"
        )
    return found


def _json(answer: Answer) -> Any:
    """Return what an answer says; None when it is no JSON."""
    try:
        return orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return None


def _unhealthy(message: str) -> UnavailableError:
    return UnavailableError(message, reason=Reason.INSTANCE_UNHEALTHY)


def _is_success(answer: Answer) -> bool:
    return 200 <= answer.status < 300  # noqa: PLR2004
