"""Statuses say the same of a server and to a caller, whichever way a request goes."""

from __future__ import annotations

import pytest

from manager.errors import Reason
from manager.wire.statuses import failure_of, outcome_of, outcome_without_answer, told_as


@pytest.mark.parametrize(
    ("reason", "status", "outcome"),
    [
        (Reason.MODEL_MISSING, 404, "refused"),
        (Reason.ATTEMPT_TIMEOUT, 504, "timeout"),
        (Reason.START_TIMEOUT, 504, "timeout"),
        (Reason.UPSTREAM_UNREACHABLE, 502, "upstream_error"),
        (Reason.VRAM_INSUFFICIENT, 503, "upstream_error"),
    ],
)
def test_why_nobody_answered_is_told_with_a_status(reason: Reason, status: int, outcome: str) -> None:
    assert told_as(reason) == status
    assert outcome_without_answer(status) == outcome


@pytest.mark.parametrize(
    ("status", "reason", "outcome"),
    [
        (200, None, "ok"),
        (399, None, "ok"),
        (400, None, "client_error"),
        (404, Reason.MODEL_MISSING, "client_error"),
        (429, Reason.OVERLOADED, "client_error"),
        (500, Reason.UPSTREAM_ERROR, "upstream_error"),
        (503, Reason.OVERLOADED, "upstream_error"),
    ],
)
def test_an_answer_says_something_of_its_server(status: int, reason: Reason | None, outcome: str) -> None:
    assert failure_of(status) is reason
    assert outcome_of(status) == outcome
