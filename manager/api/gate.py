"""What a request must pass before any route sees it: who may ask, and how much they may send."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from manager.api.answers import answer_error
from manager.api.errors import error_response
from manager.wire.ollama_routes import spoken_at

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from manager.wire.access import Access

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
        refusal = self._access.refusal(scope["path"], scope["headers"])
        dialect = spoken_at(scope["path"])
        if dialect is not None:
            if refusal is None:
                await self._app(scope, receive, send)
            else:
                await answer_error(send, dialect, refusal.status, refusal.message, refusal.headers)
            return
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
