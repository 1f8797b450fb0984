"""Statuses say the same of a server and to a client, whichever way a request goes."""

from __future__ import annotations

import pytest

from manager.domain.judgement import Judgement
from manager.errors import Reason
from manager.wire.statuses import (
    REFUSED,
    judge,
    outcome_of,
    outcome_of_trouble,
    outcome_without_answer,
    retry_after_s,
    status_of,
)


@pytest.mark.parametrize(
    ("reason", "status", "outcome"),
    [
        (Reason.MODEL_MISSING, 404, "refused"),
        (Reason.ATTEMPT_TIMEOUT, 504, "timeout"),
        (Reason.START_TIMEOUT, 504, "timeout"),
        (Reason.UPSTREAM_UNREACHABLE, 502, "upstream_error"),
        (Reason.MODEL_LOAD_FAILED, 502, "upstream_error"),
        (Reason.VRAM_INSUFFICIENT, 503, "upstream_error"),
    ],
)
def test_a_reason_has_one_status_and_one_outcome(reason: Reason, status: int, outcome: str) -> None:
    assert status_of(reason) == status
    assert outcome_without_answer(status) == outcome


def test_a_request_that_no_server_has_answered_has_the_outcome_of_its_trouble() -> None:
    assert outcome_of_trouble(504, Reason.ATTEMPT_TIMEOUT, None) == "timeout"
    assert outcome_of_trouble(503, Reason.OVERLOADED, "overloaded") == "refused"
    assert outcome_of_trouble(503, Reason.CANCELLED, None) == "cut", "the operator has stopped the instance"


def test_what_a_refused_decision_says_outweighs_its_reason() -> None:
    assert {what: status_of(Reason.POLICY, what) for what in REFUSED} == dict(REFUSED)


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
def test_the_status_of_an_answer_says_something_of_its_server(
    status: int, reason: Reason | None, outcome: str
) -> None:
    assert judge(status).reason is reason
    assert outcome_of(status) == outcome


@pytest.mark.parametrize(
    "message",
    [
        'option "num_ctx" must be of type integer',
        "invalid format: expected json",
        "this model does not support images",
        "failed to decode image",
        "the input length exceeds the context length",
    ],
)
def test_an_internal_error_about_the_request_says_nothing_of_its_server(message: str) -> None:
    assert judge(500, message).reason is None


@pytest.mark.parametrize(
    "message",
    [
        "llama runner process has terminated: cudaMalloc failed: out of memory",
        "model failed to load, this may be due to resource limitations",
        "unable to load model: /root/.ollama/models/blobs/sha256-x",
        "timed out waiting for llama runner to start",
        "model requires more system memory (8 GiB) than is available",
    ],
)
def test_a_load_that_failed_may_be_worth_a_start_elsewhere(message: str) -> None:
    assert judge(500, message) == Judgement(Reason.MODEL_LOAD_FAILED)


def test_an_internal_error_without_a_known_meaning_starts_nobody() -> None:
    assert judge(500, "something went wrong") == Judgement(Reason.UPSTREAM_ERROR, may_start=False)
    assert judge(502, "bad gateway") == Judgement(Reason.UPSTREAM_ERROR)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([b"Content-Type: x\r\n", b"Retry-After: 7\r\n"], 7.0),
        ([b"retry-after:0\r\n"], 0.0),
        ([b"Retry-After: Fri, 31 Dec 1999 23:59:59 GMT\r\n"], None),
        ([b"Retry-After: -1\r\n"], None),
        ([b"X-Retry-After: 1\r\n"], None),
        ([], None),
    ],
)
def test_a_retry_after_is_taken_in_seconds(lines: list[bytes], expected: float | None) -> None:
    assert retry_after_s(lines) == expected
