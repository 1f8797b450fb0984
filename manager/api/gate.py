"""The checks of every request before any route: its path, who may send it, and the size of its body."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException

from manager.api.answers import answer_error
from manager.api.doors import InWords, are_for_people
from manager.api.errors import error_response
from manager.api.granted import CUT, grant_of, keep_grant
from manager.wire.access import ambiguous, for_pages, permission
from manager.wire.head import ambiguity
from manager.wire.keys import without_path_key
from manager.wire.ollama_routes import spoken_at
from manager.wire.paths import decoded, normalised

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from manager.api.doors import Doors
    from manager.api.granted import OpenByKey
    from manager.wire.access import Access, Refusal
    from manager.wire.head import Header
    from manager.wire.routes import Dialect

MOST_BODY_BYTES = 2**20
_MOST_DIGITS = 18
_UNAUTHORIZED = 401
_UNAVAILABLE = 503
_STOPPED = "cut off: the manager is being stopped"
# A page of the daemon in a frame of another page could be clicked without being seen.
_UNFRAMED: tuple[Header, ...] = (
    (b"Content-Security-Policy", b"frame-ancestors 'none'"),
    (b"X-Frame-Options", b"DENY"),
    # Not `no-referrer`: a form would then be sent with the origin `null`.
    (b"Referrer-Policy", b"same-origin"),
)


class Gate:
    """ASGI middleware: every route gets a path in its normal form, and only requests that may be served.

    Bodies of requests to models are bounded where they are read, all others here.

    Args:
        app: the routes.
        access: the check.
        used: takes the name of the key of each request.
        open_requests: those to the control API.
        doors: the pages that people get in the place of errors.
        refused: is called with reason, address and path of each refused request.
        most_bytes: returns how large the bodies of a path may be; None is `MOST_BODY_BYTES`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        refused: Callable[[str, str, str], None],
        used: set[str],
        open_requests: OpenByKey,
        doors: Doors,
        most_bytes: Callable[[str], int | None] = lambda _path: None,
    ) -> None:
        self._app = app
        self._access = access
        self._refused = refused
        self._used = used
        self._open = open_requests
        self._doors = doors
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope, said = _without_key(_with_normal_path(scope)), _Said(_unframed(send))
        in_words = None
        if are_for_people(scope["path"], scope["headers"]):
            scope = {**scope, "state": {**scope.get("state", {})}}  # the key of the request goes there
            in_words = InWords(said, self._doors, scope, receive, needs_key=self._access.wants_key)
        answering = in_words or said
        try:
            await self._serve(scope, receive, answering)
        except asyncio.CancelledError as cancelled:
            # The server cancels what outlasts the drain, and would call it a failure of the application.
            if not said.has_started:
                await _answer_cut(scope, receive, answering, is_revoked=cancelled.args == (CUT,))
        except Exception:
            if in_words is not None and not said.has_started:
                await in_words.failed()
            raise

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        dialect = spoken_at(scope["path"])
        if dialect is not None:
            await self._for_models(dialect, scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            answer = error_response(
                refusal.status, refusal.code, refusal.message, headers=dict(refusal.headers)
            )
            await answer(scope, receive, send)
            return
        larger = self._most_bytes(scope["path"])
        most = MOST_BODY_BYTES if larger is None else larger
        lengths = (value for name, value in scope["headers"] if name == b"content-length")
        if any(_is_too_large(length.decode("latin-1"), most) for length in lengths):
            await error_response(413, "body_too_large", _too_large(most))(scope, receive, send)
            return
        with self._open.serving(grant_of(scope)):
            await self._app(scope, _bounded(receive, most), send)

    async def _for_models(self, dialect: Dialect, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve Ollama's routes, which pages of other origins may use as well."""
        headers = scope["headers"]
        granted = permission(headers) if scope["method"] == "OPTIONS" else None
        refusal = self._refusal(scope, preflight=granted is not None)
        send = _with(send, for_pages(headers, refusal))
        if refusal is not None:
            await answer_error(send, dialect, refusal.status, refusal.message, refusal.headers)
        elif granted is not None:
            await send({"type": "http.response.start", "status": 204, "headers": granted})
            await send({"type": "http.response.body"})
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, *, preflight: bool = False) -> Refusal | None:
        path, headers = scope["path"], scope["headers"]
        why = ambiguity(headers)
        if why:
            refusal: Refusal | None = ambiguous(why)
        else:
            needs_host = scope.get("http_version") != "1.0"
            refusal, grant = self._access.check(
                scope["method"], path, headers, preflight=preflight, needs_host=needs_host
            )
            keep_grant(scope, grant)
            if grant is not None:
                self._used.add(grant.name)
        if refusal is not None:
            client = scope.get("client")
            self._refused(refusal.reason, client[0] if client else "", path)
        return refusal


class _Said:
    """A `send` that tells whether an answer has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_started = False

    async def __call__(self, message: Message) -> None:
        self.has_started = True
        await self._send(message)


async def _answer_cut(scope: Scope, receive: Receive, send: Send, *, is_revoked: bool) -> None:
    if is_revoked:
        await error_response(_UNAUTHORIZED, "unauthorized", CUT)(scope, receive, send)
        return
    dialect, headers = spoken_at(scope["path"]), {"Connection": "close", "Retry-After": "1"}
    if dialect is not None:
        await answer_error(send, dialect, _UNAVAILABLE, _STOPPED, headers)
    else:
        await error_response(_UNAVAILABLE, "stopping", _STOPPED, headers=headers)(scope, receive, send)


def _with_normal_path(scope: Scope) -> Scope:
    """Return the scope with its path in the normal form: access checks and routing see the same one."""
    raw: bytes = scope["raw_path"]
    if not raw.startswith(b"/"):
        return scope
    path = normalised(raw)
    return {**scope, "raw_path": path, "path": decoded(path)}


def _without_key(scope: Scope) -> Scope:
    """Return the scope without a key in its path, which is one of its headers then (`wire.keys.PATH_KEY`)."""
    path, keys = without_path_key(scope["raw_path"])
    if not keys:
        return scope
    return {**scope, "raw_path": path, "path": decoded(path), "headers": [*scope["headers"], *keys]}


def _unframed(send: Send) -> Send:
    """Return a `send` that forbids other pages to show an HTML page in a frame."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = message.get("headers", ())
            if any(
                name.lower() == b"content-type" and value.startswith(b"text/html") for name, value in headers
            ):
                message = {**message, "headers": [*headers, *_UNFRAMED]}
        await send(message)

    return sending


def _with(send: Send, headers: list[Header]) -> Send:
    """Return a `send` that adds these headers to the answer."""
    if not headers:
        return send

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await send(message)

    return sending


def _too_large(most_bytes: int) -> str:
    return f"a body may have at most {most_bytes} bytes"


def _is_too_large(length: str, most_bytes: int) -> bool:
    return (
        not length.isascii() or not length.isdigit() or len(length) > _MOST_DIGITS or int(length) > most_bytes
    )


def _bounded(receive: Receive, most_bytes: int) -> Receive:
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            if seen > most_bytes:
                raise HTTPException(413, _too_large(most_bytes))
        return message

    return bounded
