"""Every page of HTML: its headers, and how its text is encoded."""

from __future__ import annotations

from starlette.responses import HTMLResponse

PAGE_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # No inline script and no inline style: what is injected into a page does nothing.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
}


class PageResponse(HTMLResponse):
    r"""A page with `PAGE_HEADERS`.

    JSON of other programs may hold half a character (`\ud83d`), which UTF-8 has no bytes for: a question
    mark stands in its place.
    """

    def __init__(self, content: str, status_code: int = 200) -> None:
        super().__init__(content.encode("utf-8", "replace"), status_code, PAGE_HEADERS)
