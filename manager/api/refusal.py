"""Refusals and failures of requests, and their answers to the caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from manager.errors import InvalidRequestError, ManagerError, UnknownInstanceError
from manager.services.models.pull import PullFailedError
from manager.services.routing.placement import reason_of
from manager.wire.body import BadBodyError
from manager.wire.statuses import outcome_without_answer, status_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manager.domain.record import Outcome

_log = structlog.get_logger("gateway")


class CallerGoneError(Exception):
    """The caller has left."""


class RefusedError(Exception):
    """The request is not passed on; the message is for the caller.

    `headers` stand in the answer in the place of Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        outcome: Outcome = "client_error",
        *,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.outcome = outcome
        self.retry_after_s = retry_after_s
        self.headers = headers


def refusal_of(error: Exception, path: str) -> RefusedError:
    """The answer to a caller about an error."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, BadBodyError | InvalidRequestError):
        return RefusedError(400, str(error))
    if isinstance(error, UnknownInstanceError):
        return RefusedError(404, error.message, "refused")
    if isinstance(error, PullFailedError):
        # Ollama's own word for a download that fails is 500, whatever it was.
        return RefusedError(error.status or 500, error.message, "upstream_error")
    if isinstance(error, ManagerError):
        status = status_of(reason_of(error))
        return RefusedError(status, error.message, outcome_without_answer(status))
    _log.error("request_failed", path=path, exc_info=error)
    return RefusedError(500, "the manager failed; its log says more", "refused")
