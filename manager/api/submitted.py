"""Requests whose bodies the control API reads itself, because they may be large."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.api.granted import grant_of
from manager.errors import InvalidRequestError, Reason, UnavailableError
from manager.services.routing.whole import Asking

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request

    from manager.api.backend import Backend
    from manager.services.bodies import BodyBudget
    from manager.services.requests import Origin


class HeldBody:
    """The body of one request in memory, counted with those of all other requests.

    Args:
        bodies: counts them.
    """

    def __init__(self, bodies: BodyBudget) -> None:
        self._bodies = bodies
        self._count = 0

    async def read(self, request: Request) -> bytes:
        """Return the whole body.

        Raises:
            UnavailableError: it does not fit beside those of the other requests.
        """
        parts = []
        async for piece in request.stream():
            if not self._bodies.take(len(piece)):
                message = "the bodies of all requests together reach gateway.max_buffered; try again later"
                raise UnavailableError(message, reason=Reason.OVERLOADED, retry_after_s=1)
            self._count += len(piece)
            parts.append(piece)
        return b"".join(parts)

    def give_back(self) -> None:
        self._bodies.give_back(self._count)
        self._count = 0


def refuse_other_types(request: Request) -> None:
    """Refuse a body that does not say that it is JSON.

    Raises:
        InvalidRequestError: it does not.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise invalid("body", "expected JSON, with the header `Content-Type: application/json`")


def origin_of(backend: Backend, request: Request) -> Origin:
    """Return the client of a request.

    Raises:
        InvalidRequestError: a header of it cannot be used.
    """
    origin = backend.passing.requests.origin(list(request.scope["headers"]), grant_of(request.scope))
    if origin.fault is not None:
        raise invalid("header", origin.fault)
    return origin


def asking_of(backend: Backend, request: Request, path: str) -> Asking:
    """Return the client of a request that has texts embedded; `path` is the route, as it is logged."""
    return Asking(origin_of(backend, request), grant_of(request.scope), path)


def invalid(field: str, message: str) -> InvalidRequestError:
    """Return the error for one wrong field."""
    return invalid_fields([(field, message)])


def invalid_fields(problems: Sequence[tuple[str, str]]) -> InvalidRequestError:
    """Return the error for wrong fields, of which the message tells the first one."""
    field, message = problems[0]
    fields = [{"field": field, "message": message} for field, message in problems]
    return InvalidRequestError(f"{field}: {message}", details={"fields": fields})
