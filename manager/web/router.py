"""The routes of the page: each page, its live parts, and its static files."""

from __future__ import annotations

import re
import time
from contextlib import aclosing
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse, StreamingResponse

from manager.errors import InvalidRequestError
from manager.web.feed import CLOCKS_S, Feeds, changes
from manager.web.page import NO_FACTS
from manager.web.pages import PAGES
from manager.web.policy import PageResponse
from manager.web.static import PREFIX, static_files
from manager.web.viewer import viewer_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence

    from manager.api.backend import Backend
    from manager.services.live import Live
    from manager.web.feed import Feed
    from manager.web.page import Page
    from manager.web.rendering import Renderer
    from manager.wire.access import Access

    _Show = Callable[[Page, Request], Awaitable[Response]]

_SEE_OTHER = 303
_FOR_EVER = {
    "Cache-Control": "public, max-age=31536000, immutable",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}
# The end of a session is noticed within this time. A quiet page gets a comment every `CLOCKS_S`.
_WATCH_S = 1.0
_ALIVE = b": alive\n\n"
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def pages_router(backend: Backend, live: Live, renderer: Renderer, access: Access) -> APIRouter:
    """Return the routes.

    Args:
        backend: the running daemon.
        live: its live channel.
        renderer: of the templates.
        access: says how long a viewer may follow the live channel.
    """
    router = APIRouter(include_in_schema=False)
    feeds = Feeds(renderer, lambda page: NO_FACTS if page.facts is None else page.facts(backend))
    # The table of scopes has one for all of them.
    by_name = {page.name: page for page in PAGES if page.fragments is not None and page.scope == "read"}

    @router.get("/ui/live")
    async def follow(request: Request) -> Response:
        """The changed parts of a page, as server-sent events of HTML that htmx swaps in."""
        page = by_name.get(request.query_params.get("page", ""))
        if page is None:
            raise InvalidRequestError(f"page: expected one of {', '.join(by_name)}")
        await renderer.prepare()
        feed = feeds.of(page, viewer_of(request))
        permission = _Permission(access, request)
        lines = _lines(live, feed, request.query_params.get("ids"), permission)
        first = await anext(lines)  # what fails at once is an error status, not a stream

        async def stream() -> AsyncIterator[bytes]:
            async with aclosing(lines):
                yield first
                async for line in lines:
                    yield line

        return StreamingResponse(stream(), media_type="text/event-stream", headers=_STREAM_HEADERS)

    @router.get(f"{PREFIX}{{address:path}}")
    async def static(address: str, request: Request) -> Response:
        await renderer.prepare()
        found = static_files().get(address)
        if found is None:
            return Response(status_code=404)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers = {**_FOR_EVER, "Content-Encoding": "gzip"}
            return Response(found.gzipped, media_type=found.media_type, headers=headers)
        return Response(found.content, media_type=found.media_type, headers=_FOR_EVER)

    async def show(page: Page, request: Request) -> Response:
        viewer = viewer_of(request)
        await renderer.prepare()
        fragments = (
            feeds.of(page, viewer).at(live.current(), time.time()) if page.fragments is not None else {}
        )
        context: dict[str, Any] = {
            "page": page,
            "pages": [one for one in PAGES if one.scope is None or viewer.may(one.scope)],
            "viewer": viewer,
            "now": round(time.time(), 3),
            "fragments": {id_: one.html for id_, one in fragments.items()},
            "ids": _digest(fragments),
            **await page.context(backend, viewer, request),
        }
        return PageResponse(renderer.render(f"pages/{page.name}.html", context))

    for page in PAGES:
        router.add_api_route(page.path, _shown(page, show), methods=["GET"])
    return router


def _shown(page: Page, show: _Show) -> Callable[[Request], Awaitable[Response]]:
    async def shown(request: Request) -> Response:
        if page.path == "/ui" and not viewer_of(request).may("read"):
            return RedirectResponse("/ui/try", _SEE_OTHER)
        return await show(page, request)

    return shown


class _Permission:
    """Checks again and again that a request would still be served: its key or session may end meanwhile."""

    def __init__(self, access: Access, request: Request) -> None:
        self._access = access
        self._scope = request.scope
        self._checked = -1  # the key may have ended since the request was let in

    def holds(self) -> bool:
        if self._checked == self._access.version:
            return True
        version = self._access.version
        refusal = self._access.check("GET", self._scope["path"], self._scope["headers"]).refusal
        self._checked = version if refusal is None else -1
        return refusal is None


async def _lines(
    live: Live, feed: Feed, ids: str | None, permission: _Permission
) -> AsyncGenerator[bytes, None]:
    """Yield events: at first all parts, since some may have changed after the page was rendered.

    The stream ends with the permission.
    """
    seen: dict[str, int] = {}
    said_at = 0.0
    async with aclosing(live.follow(idle_s=_WATCH_S)) as frames:
        async for _ in frames:
            if not permission.holds():
                yield _OVER
                return
            now = time.time()
            fragments = feed.at(live.current(), now)
            changed = changes(seen, fragments)
            if ids is not None and ids != _digest(fragments):
                changed = None  # the page has other parts; from now on it has these
            ids = None
            event = _REFRESH if changed is None else _shared(feed.events, [*changed])
            if event is not _ALIVE or abs(now - said_at) >= CLOCKS_S:
                said_at = now
                yield event


# Parts have come or gone: the page is to be fetched again (`page.js`).
_REFRESH = b"event: refresh\ndata: -\n\n"
# The session has ended: the page leads to the form to sign in (`page.js`).
_OVER = b"event: over\ndata: -\n\n"
# `str.splitlines` has more ends of lines than server-sent events, and they may be part of a name.
_LINE_END = re.compile(r"\r\n|\r|\n")


def _shared(events: dict[tuple[str, ...], bytes], changed: Sequence[tuple[str, str]]) -> bytes:
    """Return one event with all changed parts, encoded once for all who miss them."""
    ids = tuple([id_ for id_, _ in changed])
    if ids not in events:
        events[ids] = _event(changed)
    return events[ids]


def _event(changed: Iterable[tuple[str, str]]) -> bytes:
    """Return one event with all changed parts; a comment where there are none."""
    parts = [
        f'<hx-partial hx-target="#{id_}" hx-swap="outerMorph">{html}</hx-partial>' for id_, html in changed
    ]
    if not parts:
        return _ALIVE
    lines = _LINE_END.split("\n".join(parts))
    return "".join([*(f"data: {line}\n" for line in lines), "\n"]).encode("utf-8", "replace")


def _digest(ids: Iterable[str]) -> str:
    return sha256("\n".join(ids).encode()).hexdigest()[:12]
