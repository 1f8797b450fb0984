"""The page on which a browser signs in with a key, and the session that follows.

The browser keeps the random id of a session in a cookie, never the key. No script can read the cookie, and
pages elsewhere cannot use it (`wire.access`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse

from manager.api.doors import page_after
from manager.services.accounts.keyring import SESSION_S
from manager.wire.keys import session_cookie, session_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from manager.api.doors import Doors
    from manager.services.accounts.keyring import Keyring
    from manager.wire.head import Header

PATH = "/sign-in"
_SEE_OTHER = 303
_MOST_FIELDS = 10


def sign_in_router(keyring: Keyring, doors: Doors, refused: Callable[[str, str, str], None]) -> APIRouter:
    """Return the routes.

    Nothing slows guesses down: a key has 256 random bits, and every route of the API takes guesses as well.

    Args:
        keyring: the keys and the sessions.
        doors: makes the form.
        refused: is called with reason, address and path of each wrong key.
    """
    router = APIRouter(include_in_schema=False)

    @router.get(PATH)
    async def show_form(request: Request) -> Response:
        after = page_after([request.query_params.get("next", "")])
        return await doors.sign_in(after, status=200) if keyring.are_required else _to(after)

    @router.post(PATH)
    async def sign_in(request: Request) -> Response:
        form = _fields(await request.body())
        after = page_after(form.get("next", ()))
        if not keyring.are_required:
            return _to(after)
        session = keyring.sign_in(form.get("key", [""])[0].strip().encode())
        if session is None:
            refused("key_wrong", request.client.host if request.client else "", PATH)
            return await doors.sign_in(after, is_wrong=True)
        _end_session(keyring, request)
        answer = _to(after)
        answer.set_cookie(_name(request), session, max_age=SESSION_S, **_cookie(request))
        return answer

    @router.post("/sign-out")
    async def sign_out(request: Request) -> Response:
        _end_session(keyring, request)
        answer = _to(PATH)
        answer.delete_cookie(_name(request), **_cookie(request))
        return answer

    return router


def _fields(body: bytes) -> dict[str, list[str]]:
    """Return the fields of a form; none where it has more than a form of ours."""
    try:
        return parse_qs(body.decode("utf-8", "replace"), max_num_fields=_MOST_FIELDS)
    except ValueError:
        return {}


def _end_session(keyring: Keyring, request: Request) -> None:
    headers: list[Header] = request.scope["headers"]
    session = session_of(headers)
    if session is not None:
        keyring.sign_out(session)


def _to(path: str) -> Response:
    return RedirectResponse(path, _SEE_OTHER, {"Cache-Control": "no-store"})


def _name(request: Request) -> str:
    return session_cookie(request.headers.get("host", "").encode("latin-1"))


def _cookie(request: Request) -> dict[str, Any]:
    return {"httponly": True, "samesite": "strict", "secure": request.url.scheme == "https"}
