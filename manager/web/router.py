"""The routes of the page: each page, its live parts, and its static files."""

from __future__ import annotations

import time
from contextlib import aclosing
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from starlette.responses import HTMLResponse, RedirectResponse, StreamingResponse

from manager.errors import InvalidRequestError
from manager.web.feed import CLOCKS_S, Feeds, changes
from manager.web.page import NO_FACTS
from manager.web.pages import PAGES
from manager.web.rendering import Renderer
from manager.web.static import PREFIX, static_files
from manager.web.viewer import viewer_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable

    from manager.api.backend import Backend
    from manager.services.live import Live
    from manager.web.feed import Feed
    from manager.web.page import Page

_SEE_OTHER = 303
_FOR_EVER = {"Cache-Control": "public, max-age=31536000, immutable"}
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # No inline script and no inline style: what is injected into a page does nothing.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
}
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def pages_router(backend: Backend, live: Live) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    renderer = Renderer()
    feeds = Feeds(renderer, lambda page: NO_FACTS if page.facts is None else page.facts(backend))
    by_name = {page.name: page for page in PAGES}

    @router.get("/ui/live")
    async def follow(request: Request) -> Response:
        """The changed parts of a page, as server-sent events of HTML that htmx swaps in."""
        page = by_name.get(request.query_params.get("page", ""))
        if page is None:
            raise InvalidRequestError(f"page: expected one of {', '.join(by_name)}")
        await renderer.prepare()
        feed = feeds.of(page, viewer_of(request))
        lines = _lines(live, feed, request.query_params.get("ids"))
        first = await anext(lines)  # what fails at once is an error status, not a stream

        async def stream() -> AsyncIterator[bytes]:
            async with aclosing(lines):
                yield first
                async for line in lines:
                    yield line

        return StreamingResponse(stream(), media_type="text/event-stream", headers=_STREAM_HEADERS)

    @router.get(f"{PREFIX}{{address:path}}")
    async def static(address: str) -> Response:
        found = static_files().get(address)
        if found is None:
            return Response(status_code=404)
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
        return HTMLResponse(renderer.render(f"pages/{page.name}.html", context), headers=_HEADERS)

    for page in PAGES:
        router.add_api_route(page.path, _shown(page, show), methods=["GET"])
    return router


def _shown(page: Page, show: Any) -> Any:
    async def shown(request: Request) -> Response:
        if page.path == "/ui" and not viewer_of(request).may("read"):
            return RedirectResponse("/ui/try", _SEE_OTHER)
        answer: Response = await show(page, request)
        return answer

    return shown


async def _lines(live: Live, feed: Feed, ids: str | None) -> AsyncGenerator[bytes, None]:
    """Yield events: at first all parts, since some may have changed after the page was rendered."""
    seen: dict[str, int] = {}
    async with aclosing(live.follow(idle_s=CLOCKS_S)) as frames:
        async for _ in frames:
            fragments = feed.at(live.current(), time.time())
            changed = changes(seen, fragments)
            if ids is not None and ids != _digest(fragments):
                changed = None  # the page has other parts; from now on it has these
            ids = None
            yield _REFRESH if changed is None else _event(changed)


# Parts have come or gone: the page is to be fetched again (`page.js`).
_REFRESH = b"event: refresh\ndata: -\n\n"


def _event(changed: Iterable[tuple[str, str]]) -> bytes:
    """Return one event with all changed parts; a comment where there are none."""
    parts = [
        f'<hx-partial hx-target="#{id_}" hx-swap="outerMorph">{html}</hx-partial>' for id_, html in changed
    ]
    if not parts:
        return b": alive\n\n"
    lines = "\n".join(parts).splitlines()
    return "".join([*(f"data: {line}\n" for line in lines), "\n"]).encode()


def _digest(ids: Iterable[str]) -> str:
    return sha256("\n".join(ids).encode()).hexdigest()[:12]
