"""What a request must pass before any route sees it: the Host it names, the key it carries, its size."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from manager.api.errors import error_response

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BODY_BYTES = 2**20
_WITHOUT_KEY = ("/healthz",)
_TOO_LARGE = f"a body may have at most {MOST_BODY_BYTES} bytes"


class Gate:
    """ASGI middleware.

    A page in a browser can send requests to this machine: under a name of its own that resolves to it
    (hence the Host check), or across origins (hence the Origin check).

    Args:
        allowed_hosts: names without a port, IPv6 in brackets, in lower case.
        key: what an operator must present, None when none is configured.
    """

    def __init__(self, app: ASGIApp, *, allowed_hosts: Collection[str], key: str | None) -> None:
        self._app = app
        self._allowed_hosts = frozenset(allowed_hosts)
        self._key = key.encode() if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, _bounded(receive), send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> JSONResponse | None:
        host = headers.get(b"host", b"").decode("latin-1")
        if _name(host) not in self._allowed_hosts:
            return error_response(
                403, "host_not_allowed", f"Host {host!r} is not in server.allowed_hosts of the configuration"
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and _name(urlsplit(origin).netloc) not in self._allowed_hosts:
            return error_response(
                403, "origin_not_allowed", f"Origin {origin!r} is not in server.allowed_hosts"
            )
        if self._key is not None and path not in _WITHOUT_KEY and not self._has_key(headers):
            return error_response(
                401,
                "key_required",
                "present the operator key as `Authorization: Bearer …` or `X-API-Key: …`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MOST_BODY_BYTES:
            return _too_large()
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        if self._key is None:
            return True
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        presented = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        return hmac.compare_digest(presented, self._key)


def _name(host: str) -> str:
    """The host without its port, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].removesuffix(".")


def _too_large() -> JSONResponse:
    return error_response(413, "body_too_large", _TOO_LARGE)


def _bounded(receive: Receive) -> Receive:
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > MOST_BODY_BYTES:
                raise HTTPException(413, _TOO_LARGE)
        return message

    return bounded
