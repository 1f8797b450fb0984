"""Progress in lines, however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.progress import (
    MOST_LINE_BYTES,
    Lines,
    LineTooLongError,
    Progress,
    SuccessWatch,
    progress,
    read_progress,
)

BODY = '{"status":"über"}\n\r\n{"error":"no"}\n\n{"status": "success"}'.encode()
WHOLE = ['{"status":"über"}\n'.encode(), b'{"error":"no"}\n', b'{"status": "success"}\n']


@given(st.lists(st.integers(0, len(BODY))).map(sorted))
def test_lines_come_out_whole_wherever_they_are_cut(cuts: list[int]) -> None:
    lines, found = Lines(), []
    for start, end in zip([0, *cuts], [*cuts, len(BODY)], strict=True):
        found += lines.feed(BODY[start:end])
    assert lines.rest(100) == WHOLE[-1].strip()
    assert lines.rest(5) == b""
    assert found + lines.end() == WHOLE
    assert (lines.end(), lines.rest(100)) == ([], b"")


@pytest.mark.parametrize("last", [b"x", b"x\n", b"x\n{}\n"])
def test_a_line_without_an_end_is_given_up(last: bytes) -> None:
    lines = Lines()
    assert lines.feed(b"x" * MOST_LINE_BYTES) == []
    with pytest.raises(LineTooLongError):
        lines.feed(last)


def test_a_line_as_long_as_permitted_is_one() -> None:
    lines = Lines()
    assert [len(line) for line in lines.feed(b"x" * MOST_LINE_BYTES + b"\n")] == [MOST_LINE_BYTES + 1]


# --- success --------------------------------------------------------------------------------------

SUCCESSES = [
    b'{"status":"writing manifest"}\n{"status":"success"}\n',
    b'{"status":"working"}\n{ "status" : "success" }\r\n',
    b'{"status":"success"}',
    b'{"total":1,"status":"success"}\n\n',
]


@pytest.mark.parametrize("body", SUCCESSES)
def test_success_is_found_once_wherever_the_body_is_cut_and_before_a_reader_has_all_of_it(
    body: bytes,
) -> None:
    found_by = body.index(b"}", body.index(b"success")) + 1
    for cut in range(len(body) + 1):
        watch = SuccessWatch()
        seen = [watch.feed(body[:cut]), watch.feed(body[cut:])]
        assert seen.count(True) == 1, cut
        assert seen[0] is (cut >= found_by), cut
    watch = SuccessWatch()
    seen = [watch.feed(body[place : place + 1]) for place in range(len(body))]
    assert [place for place, found in enumerate(seen) if found] == [found_by - 1]


@pytest.mark.parametrize(
    "body",
    [
        b'{"status":"success soon"}\n',
        b'{"system":"say \\"status\\":\\"success\\""}\n',
        b'{"details":{"status":"success"}}\n',
        b'{"error":"no"}\n',
        b'["success"]\n',
        b'{"status":"success"',
        b'{"status":"success","x":"' + b"x" * 2000 + b'"}\n',
        b'{"status":"success","x":"' + b"x" * 2000 + b'"}',
    ],
)
def test_what_is_no_success_is_not_taken_for_it(body: bytes) -> None:
    assert SuccessWatch().feed(body) is False


def test_a_body_without_lines_is_no_progress() -> None:
    watch = SuccessWatch()
    assert watch.feed(b"x" * (MOST_LINE_BYTES + 1)) is False
    assert watch.feed(b'\n{"status":"success"}\n') is False


# --- what a line says -----------------------------------------------------------------------------


def test_a_line_is_read_field_by_field_and_what_is_odd_is_not_there() -> None:
    line = b'{"status":"pulling abc","digest":"abc","completed":1,"total":2,"more":3}\n'
    assert read_progress(line) == Progress("pulling abc", "abc", 1, 2)
    assert read_progress(b'{"error":"no such host"}\n') == Progress(error="no such host")
    for line in (b'{"error":{},"status":5,"digest":[],"total":"1"}', b"[]", b"no JSON", b""):
        assert read_progress(line) == Progress()


def test_lines_about_the_same_part_are_about_the_same() -> None:
    first = read_progress(b'{"status":"pulling abc","digest":"abc","completed":1}')
    again = read_progress(b'{"digest":"abc","status":"pulling abc","completed":2}')
    assert first.subject == again.subject
    assert first.subject != read_progress(b'{"status":"pulling def","digest":"def"}').subject
    assert read_progress(b'{"status":"x","digest":5}').subject == read_progress(progress("x")).subject


def test_a_download_is_a_layer_of_which_bytes_are_missing() -> None:
    assert read_progress(b'{"status":"pulling abc","total":100}').is_download
    assert read_progress(b'{"status":"pulling abc","total":100,"completed":99}').is_download
    assert not read_progress(b'{"status":"pulling abc","total":100,"completed":100}').is_download
    assert not read_progress(b'{"status":"verifying sha256 digest"}').is_download


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
    assert read_progress(line).in_words() == words
