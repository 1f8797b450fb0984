"""The form to sign in, and the pages of refusals and failures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manager.web.pages import PAGES
from manager.web.policy import PageResponse
from manager.web.viewer import viewer_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.responses import Response

    from manager.domain.keys import Grant
    from manager.web.rendering import Renderer

_UNAUTHORIZED = 401


class PageDoors:
    """Implements `manager.api.doors.Doors`."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer

    async def sign_in(self, after: str, *, is_wrong: bool = False, status: int = _UNAUTHORIZED) -> Response:
        """See `Doors`."""
        return await self._page("doors/sign_in.html", {"after": after, "is_wrong": is_wrong}, status)

    async def refused(self, status: int, message: str, grant: Grant | None, *, is_known: bool) -> Response:
        """See `Doors`."""
        viewer = viewer_for(grant)
        pages = [one for one in PAGES if is_known and (one.scope is None or viewer.may(one.scope))]
        name = viewer.name if is_known else None
        context = {"status": status, "message": message, "pages": pages, "name": name}
        return await self._page("doors/refused.html", context, status)

    async def _page(self, template: str, context: Mapping[str, Any], status: int) -> Response:
        await self._renderer.prepare()
        return PageResponse(self._renderer.render(template, context), status)
