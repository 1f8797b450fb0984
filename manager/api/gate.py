"""What a request must pass before any route sees it: who may ask, and how much they may send."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from manager.api.answers import answer_error
from manager.api.errors import error_response
from manager.wire.access import for_pages, permission
from manager.wire.ollama_routes import spoken_at

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from manager.wire.access import Access
    from manager.wire.head import Header
    from manager.wire.routes import Dialect

MOST_BODY_BYTES = 2**20
_MOST_DIGITS = 18
_TOO_LARGE = f"a body may have at most {MOST_BODY_BYTES} bytes"


class Gate:
    """ASGI middleware. Bodies for models are bounded by whoever takes them, all others here."""

    def __init__(self, app: ASGIApp, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        dialect = spoken_at(scope["path"])
        if dialect is not None:
            await self._for_models(dialect, scope, receive, send)
            return
        refusal = self._access.refusal(scope["path"], scope["headers"])
        if refusal is not None:
            answer = error_response(
                refusal.status, refusal.code, refusal.message, headers=dict(refusal.headers)
            )
            await answer(scope, receive, send)
            return
        lengths = (value for name, value in scope["headers"] if name == b"content-length")
        if any(_is_too_large(length.decode("latin-1")) for length in lengths):
            await error_response(413, "body_too_large", _TOO_LARGE)(scope, receive, send)
            return
        await self._app(scope, _bounded(receive), send)

    async def _for_models(self, dialect: Dialect, scope: Scope, receive: Receive, send: Send) -> None:
        """What is Ollama's: pages may ask for it too, and read the answers."""
        headers = scope["headers"]
        granted = permission(headers) if scope["method"] == "OPTIONS" else None
        refusal = self._access.refusal(scope["path"], headers, asks_first=granted is not None)
        send = _with(send, for_pages(headers, refusal))
        if refusal is not None:
            await answer_error(send, dialect, refusal.status, refusal.message, refusal.headers)
        elif granted is not None:
            await send({"type": "http.response.start", "status": 204, "headers": granted})
            await send({"type": "http.response.body"})
        else:
            await self._app(scope, receive, send)


def _with(send: Send, headers: list[Header]) -> Send:
    """`send` that adds these headers to the answer."""
    if not headers:
        return send

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await send(message)

    return sending


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
