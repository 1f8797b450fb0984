"""Statuses of HTTP: what they say of a server, and which one tells a caller what went wrong."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from manager.domain.judgement import ABOUT_THE_REQUEST, Judgement
from manager.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from manager.domain.record import Outcome

UNAVAILABLE = 503
TOO_MANY_REQUESTS = 429
BAD_REQUEST = 400
INTERNAL_ERROR = 500

# Headers of a 503. The libraries of OpenAI and Anthropic repeat a request at any, unless the answer says no.
LATER: Mapping[str, str] = MappingProxyType({"Retry-After": "1"})
NO_RETRY: Mapping[str, str] = MappingProxyType({"X-Should-Retry": "false"})

# Of a request that no instance was asked for, by the reason.
REFUSED: Mapping[str, int] = MappingProxyType(
    {
        "unknown": 404,
        "unknown_lane": 400,
        "impossible": 400,
        "unavailable": 503,
        "contradiction": 422,
        "denied": 403,
        "forbidden": 403,
        "rate_limited": 429,
        "budget_exhausted": 402,
        "local_only": 403,
        "unsayable": 400,
        "async_only": 409,
        "queue_full": 429,
        "overloaded": 503,
        "policy": 422,
    }
)
_TOLD: Mapping[Reason, int] = MappingProxyType(
    {
        Reason.ATTEMPT_TIMEOUT: 504,
        Reason.START_TIMEOUT: 504,
        Reason.MODEL_MISSING: 404,
        Reason.HOST_DENIED: 403,
        Reason.UPSTREAM_UNREACHABLE: 502,
        Reason.UPSTREAM_ERROR: 502,
        Reason.INVALID_OUTPUT: 502,
        Reason.MODEL_LOAD_FAILED: 502,
    }
)
_FAILURES: Mapping[int, Judgement] = MappingProxyType(
    {
        404: Judgement(Reason.MODEL_MISSING),
        429: Judgement(Reason.OVERLOADED),
        503: Judgement(Reason.OVERLOADED),
    }
)
# Ollama answers 500 for some errors of the request (0.24 to 0.33: `server/routes.go` scheduleRunner and
# `api/types.go` FromMap for options, `llm/server.go` for formats and inputs).
_OF_REQUEST = re.compile(
    r"option \"|must be of type|invalid (?:format|option|image|duration)|unknown format|does not support"
    r"|unsupported image|decode image|input length exceeds|context length|prompt is too long|grammar"
)
# The words of a load that failed (`llm/server.go`, `server/sched.go`): another device may have room.
_OF_LOAD = re.compile(
    r"(?:unable|failed|error|time(?:d)? ?out)[a-z ]* (?:load|loading|start|starting|waiting)"
    r"|failed to load|runner process|cudamalloc|out of memory|more system memory|unable to allocate"
)


def status_of(reason: Reason, refused: str | None = None) -> int:
    """Return the status in which a client is told of a reason, in every dialect.

    Args:
        reason: why there is no answer.
        refused: what a decision without attempts says of the request; None where an attempt has failed.
    """
    return _TOLD.get(reason, UNAVAILABLE) if refused is None else REFUSED[refused]


def judge(status: int, message: str = "") -> Judgement:
    """Return what an answer of this status says of its server.

    Args:
        status: of HTTP.
        message: the error in the answer. An internal error (500) without a known meaning starts no instance:
            it is more likely the request's than the server's.
    """
    known = _FAILURES.get(status)
    if known is not None:
        return known
    if status < INTERNAL_ERROR:
        return ABOUT_THE_REQUEST
    words = message.lower()
    if _OF_REQUEST.search(words):
        return ABOUT_THE_REQUEST
    if _OF_LOAD.search(words):
        return Judgement(Reason.MODEL_LOAD_FAILED)
    return Judgement(Reason.UPSTREAM_ERROR, may_start=status != INTERNAL_ERROR)


def retry_after_s(lines: Iterable[bytes]) -> float | None:
    """Return the seconds of a Retry-After.

    Args:
        lines: of a head, `Name: value`.

    Returns:
        None where there is none, or where it is a date.
    """
    for line in lines:
        name, _, value = line.partition(b":")
        if name.lower() == b"retry-after" and value.strip().isdigit():
            return float(value)
    return None


def outcome_of(status: int) -> Literal["ok", "client_error", "upstream_error"]:
    """The outcome of a request that was answered with this status."""
    if status >= INTERNAL_ERROR:
        return "upstream_error"
    return "client_error" if status >= BAD_REQUEST else "ok"


def outcome_of_trouble(status: int, reason: Reason, refused: str | None) -> Outcome:
    """Return the outcome of a request that no server has answered.

    Args:
        status: for the client.
        reason: why; `cancelled` where the operator has stopped the instance.
        refused: the kind of refusal by the daemon itself; None where it is none.
    """
    if reason is Reason.CANCELLED:
        return "cut"
    return "refused" if refused is not None else outcome_without_answer(status)


def outcome_without_answer(status: int) -> Literal["refused", "timeout", "upstream_error"]:
    """The outcome of a request that no instance answered, and whose caller got this status."""
    if status in (_TOLD[Reason.MODEL_MISSING], _TOLD[Reason.HOST_DENIED]):
        return "refused"
    return "timeout" if status == _TOLD[Reason.ATTEMPT_TIMEOUT] else "upstream_error"
