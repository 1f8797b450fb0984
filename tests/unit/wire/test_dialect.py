"""Errors in the form of each dialect: of the errors that a real server was seen to answer, and others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.dialect import error_body, error_document, error_in_stream, message_of
from manager.wire.routes import Dialect, dialect_of
from tests.contract.compare import Answer, differences, load_recordings

# Progress of a pull is passed on as the server tells it, its failure too.
PASSED_ON = "pull-unreachable-nostream"
ERRORS = [
    recording
    for recording in load_recordings()
    if recording["status"] >= 400 and "error" in recording.get("json", {}) and recording["name"] != PASSED_ON
]
TELLING = "something went wrong"


def body_of(recording: dict[str, Any]) -> bytes:
    return json.dumps(recording["json"]).encode()


def test_errors_of_every_dialect_were_recorded() -> None:
    found = {dialect_of(recording["request"]["path"]) for recording in ERRORS}
    assert found == set(Dialect)
    assert len(ERRORS) >= 15


@pytest.mark.parametrize("recording", ERRORS, ids=lambda recording: recording["name"])
def test_an_error_looks_as_a_real_server_s(recording: dict[str, Any]) -> None:
    message = message_of(body_of(recording))
    assert message is not None
    dialect = dialect_of(recording["request"]["path"])
    body, kind = error_body(dialect, recording["status"], message, "0a1b")
    headers = {"Content-Type": kind.decode(), "Content-Length": str(len(body))}
    assert differences(recording, Answer(recording["status"], headers, body)) == []


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "authentication_error", "authentication_error"),
        (403, "permission_error", "permission_error"),
        (404, "not_found_error", "not_found_error"),
        (408, "api_error", "api_error"),
        (413, "invalid_request_error", "invalid_request_error"),
        (422, "invalid_request_error", "invalid_request_error"),
        (429, "rate_limit_error", "rate_limit_error"),
        (500, "api_error", "api_error"),
        (502, "api_error", "api_error"),
        (503, "api_error", "overloaded_error"),
        (504, "api_error", "api_error"),
    ],
)
def test_the_status_is_told_in_the_words_of_the_dialect(status: int, openai: str, anthropic: str) -> None:
    assert error_document(Dialect.NATIVE, status, TELLING) == {"error": TELLING}
    assert error_document(Dialect.OPENAI, status, TELLING) == {
        "error": {
            "message": TELLING,
            "type": openai,
            "param": None,
            "code": "rate_limit_exceeded" if status == 429 else None,
        }
    }
    assert error_document(Dialect.ANTHROPIC, status, TELLING, "0a1b") == {
        "type": "error",
        "error": {"type": anthropic, "message": TELLING},
        "request_id": "req_0a1b",
    }


def test_an_error_without_a_request_has_no_id_of_one() -> None:
    """R13: clients show the id. `req_` alone, as for a path that does not exist, names nothing."""
    assert "request_id" not in error_document(Dialect.ANTHROPIC, 404, TELLING)
    assert b"request_id" not in error_in_stream(Dialect.ANTHROPIC, 500, TELLING)


def test_a_stream_ends_with_an_error_as_its_dialect_has_it() -> None:
    native, openai, anthropic = (error_in_stream(dialect, 502, TELLING) for dialect in Dialect)
    assert native.endswith(b"}\n")
    assert native.count(b"\n") == 1
    assert openai.startswith(b"data: {")
    assert anthropic.startswith(b"event: error\ndata: {")
    for event in (openai, anthropic):
        assert event.endswith(b"}\n\n")
        assert b"\n\n" not in event[:-2]
    for event in (native, openai, anthropic):
        assert message_of(event.rpartition(b"data: ")[2]) == TELLING


@given(st.sampled_from(Dialect), st.sampled_from([400, 404, 503]), st.text())
def test_whatever_is_told_stays_in_its_line_and_is_found_again(
    dialect: Dialect, status: int, message: str
) -> None:
    body, _ = error_body(dialect, status, message)
    assert message_of(body) == message
    assert error_in_stream(dialect, status, message).strip().count(b"\n") == (dialect is Dialect.ANTHROPIC)


@pytest.mark.parametrize(
    "body",
    [b"", b"404 page not found", b"null", b"[]", b'"error"', b"{}", b'{"error": null}', b'{"error": 5}',
     b'{"error": {}}', b'{"error": {"message": 5}}', b'{"error": ["x"]}', b"\xff", b"<html>"],
)  # fmt: skip
def test_what_is_no_error_of_any_dialect_has_no_message(body: bytes) -> None:
    assert message_of(body) is None


def test_money_that_is_used_up_has_the_name_of_each_dialect() -> None:
    openai = error_document(Dialect.OPENAI, 402, "no money")["error"]
    assert (openai["type"], openai["code"]) == ("insufficient_quota", "insufficient_quota")
    assert error_document(Dialect.ANTHROPIC, 402, "no money")["error"]["type"] == "billing_error"
    assert error_document(Dialect.NATIVE, 402, "no money") == {"error": "no money"}
