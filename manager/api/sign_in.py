"""The page on which a browser signs in with a key, and the session that follows.

The browser keeps the random id of a session in a cookie, never the key. No script can read the cookie, and
pages elsewhere cannot use it (`wire.access`).
"""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse

from manager.services.accounts.keyring import SESSION_S
from manager.wire.keys import SESSION_COOKIE, session_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manager.services.accounts.keyring import Keyring
    from manager.wire.head import Header

PATH = "/sign-in"
_HOME = "/ui"
# Pages of the daemon, to which a browser that has no session gets by signing in.
_PAGES = re.compile(r"/(?:docs|ui(?:/[\w./-]*)?)", re.ASCII)
_SEE_OTHER = 303
_UNAUTHORIZED = 401
_FORBIDDEN = 403
_WRONG = "This key is wrong, revoked or expired."
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'",
}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Sign in: Ollama Endpoint Manager</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 15vh auto; max-width: 24rem; padding: 0 1rem }}
label, input, button {{ display: block; width: 100%; box-sizing: border-box; font: inherit }}
input, button {{ padding: .5rem; margin: .25rem 0 1rem }}
p {{ min-height: 1.5em; color: #b00020 }}
</style>
</head>
<body>
<h1>Sign in</h1>
<form method="post" action="{path}">
<input type="hidden" name="next" value="{next}">
<label for="key">Key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button type="submit">Sign in</button>
</form>
<p role="alert">{problem}</p>
</body>
</html>
"""
_REFUSED = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Not with this key: Ollama Endpoint Manager</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 15vh auto; max-width: 32rem; padding: 0 1rem }}
p {{ overflow-wrap: anywhere }}
</style>
</head>
<body>
<h1>Not with this key</h1>
<p>{message}.</p>
<p><a href="{home}">To the pages that this key opens</a></p>
<p><a href="{path}?next={next}">Sign in with another key</a></p>
</body>
</html>
"""


def sign_in_router(keyring: Keyring) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get(PATH)
    async def show_form(request: Request) -> Response:
        after = _after([request.query_params.get("next", "")])
        return sign_in_page(after, status=200) if keyring.are_required else _to(after)

    @router.post(PATH)
    async def sign_in(request: Request) -> Response:
        form = parse_qs((await request.body()).decode("utf-8", "replace"), max_num_fields=10)
        after = _after(form.get("next", ()))
        if not keyring.are_required:
            return _to(after)
        session = keyring.sign_in(form.get("key", [""])[0].strip().encode())
        if session is None:
            return sign_in_page(after, problem=_WRONG)
        answer = _to(after)
        answer.set_cookie(SESSION_COOKIE, session, max_age=SESSION_S, **_cookie(request))
        return answer

    @router.post("/sign-out")
    async def sign_out(request: Request) -> Response:
        headers: list[Header] = request.scope["headers"]
        session = session_of(headers)
        if session is not None:
            keyring.sign_out(session)
        answer = _to(PATH)
        answer.delete_cookie(SESSION_COOKIE, **_cookie(request))
        return answer

    return router


def is_for_page(method: str, path: str, headers: Iterable[Header]) -> bool:
    """Return whether a request is one of a browser for a page of the daemon."""
    accepted = next((value for name, value in headers if name == b"accept"), b"")
    return method == "GET" and b"text/html" in accepted.lower() and _PAGES.fullmatch(path) is not None


def sign_in_page(after: str, *, problem: str = "", status: int = _UNAUTHORIZED) -> Response:
    """Return the form; `after` is the page that follows, `problem` why the last key opened nothing."""
    page = _PAGE.format(path=PATH, next=escape(after), problem=escape(problem))
    return Response(page, status, _HEADERS, "text/html; charset=utf-8")


def refused_page(path: str, message: str) -> Response:
    """Return what a browser shows where a key does not open the page at `path`."""
    page = _REFUSED.format(message=escape(message), home=_HOME, path=PATH, next=quote(path))
    return Response(page, _FORBIDDEN, _HEADERS, "text/html; charset=utf-8")


def _after(wanted: Iterable[str]) -> str:
    """Return the page that follows: one of the daemon, whatever a link says."""
    return next((path for path in wanted if _PAGES.fullmatch(path)), _HOME)


def _to(path: str) -> Response:
    return RedirectResponse(path, _SEE_OTHER, _HEADERS)


def _cookie(request: Request) -> dict[str, Any]:
    return {"httponly": True, "samesite": "strict", "secure": request.url.scheme == "https"}
