"""Statuses of HTTP: what they say of a server, and which one tells a caller what went wrong."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from manager.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

UNAVAILABLE = 503
BAD_REQUEST = 400
_SERVER_ERROR = 500

# Of a decision without attempts, by what it says of it.
REFUSED: Mapping[str, int] = MappingProxyType(
    {"unknown": 404, "unknown_lane": 400, "unavailable": 503, "contradiction": 422}
)
_TOLD: Mapping[Reason, int] = MappingProxyType(
    {
        Reason.ATTEMPT_TIMEOUT: 504,
        Reason.START_TIMEOUT: 504,
        Reason.MODEL_MISSING: 404,
        Reason.UPSTREAM_UNREACHABLE: 502,
        Reason.UPSTREAM_ERROR: 502,
    }
)
_FAILURES: Mapping[int, Reason] = MappingProxyType(
    {404: Reason.MODEL_MISSING, 429: Reason.OVERLOADED, 503: Reason.OVERLOADED}
)


def told_as(reason: Reason) -> int:
    """The status in which a caller is told that no instance answered, for that reason."""
    return _TOLD.get(reason, UNAVAILABLE)


def failure_of(status: int) -> Reason | None:
    """What an answer of this status says about the instance; None when it is about the request."""
    return _FAILURES.get(status) or (Reason.UPSTREAM_ERROR if status >= _SERVER_ERROR else None)


def outcome_of(status: int) -> Literal["ok", "client_error", "upstream_error"]:
    """How a request has ended that was answered with this status."""
    if status >= _SERVER_ERROR:
        return "upstream_error"
    return "client_error" if status >= BAD_REQUEST else "ok"


def outcome_without_answer(status: int) -> Literal["refused", "timeout", "upstream_error"]:
    """How a request has ended that no instance answered, and whose caller was told with this status."""
    if status == _TOLD[Reason.MODEL_MISSING]:
        return "refused"
    return "timeout" if status == _TOLD[Reason.ATTEMPT_TIMEOUT] else "upstream_error"
