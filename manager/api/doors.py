"""Pages in the place of a page: the form to sign in, and what a refusal or a failure means in words."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Protocol

from manager.api.granted import grant_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.responses import Response
    from starlette.types import Message, Receive, Scope, Send

    from manager.domain.keys import Grant
    from manager.wire.head import Header

HOME = "/ui"
# Pages of the daemon, and what a link to one may add.
_PAGES = re.compile(r"/(?:docs|ui(?:/[\w-][\w.-]*)*/?)(?:\?[\w.~%&=+:@/-]{0,1000})?", re.ASCII)
_FOR_PEOPLE = re.compile(r"/(?:docs|ui(?:/.*)?|sign-in|sign-out)", re.DOTALL)
_UNAUTHORIZED = 401
_ERROR = 400
# An error of the daemon is shorter.
_MOST_ERROR_BYTES = 64 * 1024
_KEPT = frozenset({b"allow", b"retry-after", b"www-authenticate", b"connection"})


class Doors(Protocol):
    """Makes the pages; `manager.web.doors` implements it."""

    async def sign_in(self, after: str, *, is_wrong: bool = False, status: int = _UNAUTHORIZED) -> Response:
        """Return the form.

        Args:
            after: the page that follows.
            is_wrong: whether the last key opened nothing.
            status: of the answer.
        """
        ...

    async def refused(self, status: int, message: str, grant: Grant | None, *, is_known: bool) -> Response:
        """Return what an error means.

        Args:
            status: of the answer.
            message: of the error; hostile text may be in it.
            grant: the key of the request.
            is_known: whether the request has a key, or needs none.
        """
        ...


def are_for_people(path: str, headers: Iterable[Header]) -> bool:
    """Return whether errors at a path are shown to a person in a browser."""
    accepted = next((value for name, value in headers if name == b"accept"), b"")
    return b"text/html" in accepted.lower() and _FOR_PEOPLE.fullmatch(path) is not None


def page_after(wanted: Iterable[str]) -> str:
    """Return the page that follows the form: the first one that is of the daemon, whatever a link says."""
    return next((address for address in wanted if _PAGES.fullmatch(address)), HOME)


def address_of(scope: Scope) -> str:
    """Return path and query of a request, as far as they are ASCII."""
    query = scope.get("query_string", b"").decode("latin-1")
    return f"{scope['path']}?{query}" if query else str(scope["path"])


class InWords:
    """A `send` that puts a page in the place of an error that programs would read."""

    def __init__(self, send: Send, doors: Doors, scope: Scope, receive: Receive, *, needs_key: bool) -> None:
        self._send = send
        self._needs_key = needs_key
        self._doors = doors
        self._scope = scope
        self._receive = receive
        self._error: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            is_error = message["status"] >= _ERROR and not _is_html(message)
            self._error, self._body = (message if is_error else None), b""
            if is_error:
                return
        elif self._error is not None:
            self._body += message.get("body", b"")[: _MOST_ERROR_BYTES - len(self._body)]
            if not message.get("more_body", False):
                await self._answer(self._error)
            return
        await self._send(message)

    async def failed(self) -> None:
        """Answer for a defect."""
        await self._answer({"status": 500, "headers": ()})

    async def _answer(self, error: Message) -> None:
        status, self._error = error["status"], None
        grant = grant_of(self._scope)
        if status == _UNAUTHORIZED:
            is_page = self._scope["method"] in ("GET", "HEAD")
            answer = await self._doors.sign_in(page_after([address_of(self._scope)] if is_page else ()))
        else:
            is_known = grant is not None or not self._needs_key
            answer = await self._doors.refused(status, _words(self._body), grant, is_known=is_known)
        kept = [line for line in error["headers"] if line[0].lower() in _KEPT]
        answer.raw_headers.extend(kept)
        await answer(self._scope, self._receive, self._send)


def _is_html(message: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/html")
        for name, value in message.get("headers", ())
    )


def _words(body: bytes) -> str:
    """Return the message of an error in the shape of the control API; empty where it has none."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, TypeError, KeyError):
        return ""
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""
