"""What a request must pass before any route sees it: the Host it names, the key it carries, its size."""

from __future__ import annotations

import hmac
import re
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from manager.api.errors import error_response

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.responses import JSONResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BODY_BYTES = 2**20
WITHOUT_KEY = ("/healthz",)
# A name or a bracketed address, perhaps with the dot of the root, perhaps with a port.
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\s\[\]:@/]+?)\.?(?::[0-9]{1,5})?")
_MOST_DIGITS = 18
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
        refusal = self._refusal(scope["path"], scope["headers"])
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, _bounded(receive), send)

    def _refusal(self, path: str, headers: list[tuple[bytes, bytes]]) -> JSONResponse | None:
        hosts = _values(headers, b"host")
        # The parser lets a missing and a doubled Host pass.
        if len(hosts) != 1 or not self._allows(hosts[0]):
            return error_response(
                403,
                "host_not_allowed",
                f"Host {', '.join(hosts)!r} is not in server.allowed_hosts of the configuration",
            )
        for origin in _values(headers, b"origin"):
            scheme, separator, name = origin.partition("://")
            if scheme not in ("http", "https") or not separator or not self._allows(name):
                return error_response(
                    403, "origin_not_allowed", f"Origin {origin!r} is not in server.allowed_hosts"
                )
        if self._key is not None and path not in WITHOUT_KEY and not self._has_key(headers):
            return error_response(
                401,
                "key_required",
                "present the operator key as `Authorization: Bearer …` or `X-API-Key: …`",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if any(_is_too_large(length) for length in _values(headers, b"content-length")):
            return error_response(413, "body_too_large", _TOO_LARGE)
        return None

    def _allows(self, host: str) -> bool:
        match = _HOST.fullmatch(host.strip().lower())
        return match is not None and match["name"] in self._allowed_hosts

    def _has_key(self, headers: list[tuple[bytes, bytes]]) -> bool:
        if self._key is None:
            return True
        presented = next((value for name, value in headers if name == b"x-api-key"), b"")
        for name, value in headers:
            scheme, _, bearer = value.partition(b" ")
            if name == b"authorization" and scheme.lower() == b"bearer":
                presented = bearer.strip()
        # Its time must not tell how much of a guess was right.
        return hmac.compare_digest(presented, self._key)


def _values(headers: list[tuple[bytes, bytes]], wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in headers if name == wanted]


def _is_too_large(length: str) -> bool:
    return (
        not length.isascii()
        or not length.isdigit()
        or len(length) > _MOST_DIGITS
        or int(length) > MOST_BODY_BYTES
    )


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
