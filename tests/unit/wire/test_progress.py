"""Progress in lines, however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.progress import (
    MOST_LINE_BYTES,
    Lines,
    LineTooLongError,
    error_of,
    in_words,
    progress,
    says_success,
    subject_of,
)

BODY = '{"status":"über"}\n\r\n{"error":"no"}\n\n{"status": "success"}'.encode()
WHOLE = ['{"status":"über"}\n'.encode(), b'{"error":"no"}\n', b'{"status": "success"}\n']


@given(st.lists(st.integers(0, len(BODY))).map(sorted))
def test_lines_come_out_whole_wherever_they_are_cut(cuts: list[int]) -> None:
    lines, found = Lines(), []
    for start, end in zip([0, *cuts], [*cuts, len(BODY)], strict=True):
        found += lines.feed(BODY[start:end])
    assert found + lines.end() == WHOLE
    assert lines.end() == []


def test_a_line_without_an_end_is_given_up() -> None:
    lines = Lines()
    assert lines.feed(b"x" * MOST_LINE_BYTES) == []
    with pytest.raises(LineTooLongError):
        lines.feed(b"x")


def test_success_is_told_from_everything_else() -> None:
    assert says_success(b'{"status":"success"}\n')
    assert says_success(b'{"status":"working"}\n{ "status" : "success" }')
    assert not says_success(b'{"status":"success soon"}')
    assert not says_success(b'{"system":"say \\"status\\":\\"success\\""}')


def test_an_error_is_what_a_line_says_it_is() -> None:
    assert error_of(b'{"error":"no such host"}\n') == "no such host"
    for line in (b'{"error":{}}', b'{"status":"error"}', b"[]", b"no JSON"):
        assert error_of(line) is None


def test_lines_about_the_same_part_are_about_the_same() -> None:
    first = b'{"status":"pulling abc","digest":"abc","completed":1}'
    assert subject_of(first) == subject_of(b'{"digest":"abc","status":"pulling abc","completed":2}')
    assert subject_of(first) != subject_of(b'{"status":"pulling def","digest":"def"}')
    assert subject_of(b'{"status":"x","digest":5}') == subject_of(progress("x"))
    assert subject_of(b"no JSON") == subject_of(b"[]")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"status":"pulling abc","completed":43,"total":100}', "pulling abc 43 %"),
        (b'{"status":"pulling abc","total":100}', "pulling abc"),
        (b'{"status":"pulling abc","completed":0,"total":0}', "pulling abc"),
        (b'{"status":"verifying"}', "verifying"),
        (b'{"error":"no"}', ""),
        (b"nonsense", ""),
    ],
)
def test_a_line_in_words_says_how_far_it_is_where_that_is_told(line: bytes, words: str) -> None:
    assert in_words(line) == words
