"""The body of a submission: strict around the request, and exact about the request itself."""

from __future__ import annotations

import pytest

from manager.wire.body import SMALL_BYTES
from manager.wire.errors import BadBodyError
from manager.wire.runs import Submission, submission
from manager.wire.steps import run


def test_the_request_comes_out_byte_by_byte_as_it_came() -> None:
    inner = b'{ "model" :"tiny","n":1.0,"big":123456789012345678901234567890,"n":2}'
    raw = b' {"path":"/api/chat","body":' + inner + b',"idempotent":true,"lane":null} \n'
    assert run(submission(raw)) == Submission(inner, {"path": "/api/chat", "idempotent": True, "lane": None})


def test_a_submission_without_a_request_says_so() -> None:
    assert run(submission(b'{"path":"x"}')) == Submission(None, {"path": "x"})


def test_a_large_request_is_read_in_steps() -> None:
    inner = b'{"prompt":"' + b"x" * (4 * SMALL_BYTES) + b'"}'
    raw = b'{"body":' + inner + b"}"
    assert len(list(submission(raw))) >= 3
    assert run(submission(raw)) == Submission(inner, {})


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"", "expected a JSON object"),
        (b"[]", "expected a JSON object"),
        (b"7", "expected a JSON object"),
        (b'{"path":1', "it is not JSON"),
        (b'{"path":tru}', "it is not JSON"),
        (b'{"path":"\xff"}', "it is not JSON"),
        (b'{"path":' + b"[" * 60_000 + b"]" * 60_000 + b"}", "the field 'path' is longer than"),
        (b'{"path":' + b"[" * 30_000 + b"]" * 30_000 + b"}", "it is not JSON"),
        (b'{"path":1} {}', "there is more behind"),
        (b'{"path":1,"path":2}', "the field 'path' is given twice"),
        (b'{"body":1,"body":2}', "the field 'body' is given twice"),
        (b'{"path":"' + b"x" * SMALL_BYTES + b'"}', "the field 'path' is longer than"),
    ],
)
def test_anything_else_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(BadBodyError, match=f"^{why}"):
        run(submission(raw))
