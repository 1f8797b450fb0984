"""Answers are read the same however they are cut, skip what precedes them, and are bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.answer import (
    MOST_HEAD_BYTES,
    MOST_HEAD_LINES,
    MOST_INFORMATIONAL,
    AnswerReader,
    BadAnswerError,
)

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
TWO = OK + b"Content-Length: 2\r\n\r\nhi"


def read(*parts: bytes, is_head: bool = False, ends: bool = False) -> tuple[AnswerReader, bytes]:
    reader = AnswerReader()
    reader.begin(is_head=is_head)
    body = b""
    for part in parts:
        reader.feed(part)
        body += reader.take()
    if ends:
        reader.end()
    return reader, body


WHOLE = [
    (TWO, 200, b"hi", True),
    (CHUNKED + b"1\r\nh\r\n1\r\ni\r\n0\r\n\r\n", 200, b"hi", True),
    (CHUNKED + b"2;a=b\r\nhi\r\n0\r\nTrailer: x\r\nother: y\r\n\r\n", 200, b"hi", True),
    (OK + b"transfer-encoding:  Chunked \r\n\r\n0\r\n\r\n", 200, b"", True),
    (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi", 200, b"hi", True),
    (b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nhi", 200, b"hi", True),
    (b"HTTP/1.1 599 Own\r\nContent-Length: 0\r\n\r\n", 599, b"", True),
    (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
    (b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", 204, b"", True),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304, b"", True),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", 200, b"hi", False),
    (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi", 200, b"hi", True),
    (OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi", 200, b"hi", False),
    (b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + TWO, 200, b"hi", True),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + TWO, 200, b"hi", True),
    (b"HTTP/1.1 199 Own\r\n\r\n" * MOST_INFORMATIONAL + TWO, 200, b"hi", True),
]


@pytest.mark.parametrize(("raw", "status", "body", "keeps"), WHOLE)
def test_an_answer_is_the_same_however_it_is_cut(raw: bytes, status: int, body: bytes, keeps: bool) -> None:
    cuts = [(raw,), tuple(raw[at : at + 1] for at in range(len(raw)))]
    cuts += [(raw[:at], raw[at:]) for at in range(1, len(raw))]
    for cut in cuts:
        reader, found = read(*cut)
        assert (reader.status, found, reader.is_complete, reader.keeps) == (status, body, True, keeps)
        assert reader.is_touched
        reader.end()  # the end of the connection adds nothing


def test_only_the_headers_of_the_answer_itself_are_its_headers() -> None:
    raw = b"HTTP/1.1 103 Hints\r\nLink: x\r\nContent-Length: 7\r\n\r\n" + CHUNKED.replace(
        b"\r\n\r\n", b"\r\nA: b\r\n\r\n"
    )
    reader, _ = read(raw + b"0\r\nA: trailer\r\nB: trailer\r\n\r\n")
    assert reader.headers == [(b"Transfer-Encoding", b"chunked"), (b"A", b"b")]
    assert reader.length is None


def test_answers_follow_each_other_on_a_connection() -> None:
    reader = AnswerReader()
    for body in (b"hi", b"ho"):
        reader.begin()
        assert not reader.is_touched
        reader.feed(TWO[:-2] + body)
        assert (reader.take(), reader.is_complete, reader.keeps, reader.length) == (body, True, True, 2)


def test_the_same_head_is_not_parsed_again() -> None:
    head = OK + b"Content-Type: text/plain\r\nContent-Length: %d\r\nX-A: b\r\n\r\n"
    reader = AnswerReader()
    reader.feed(head % 2 + b"hi")
    assert reader.take() == b"hi"
    headers = reader.headers
    assert headers == [(b"Content-Type", b"text/plain"), (b"X-A", b"b")]
    for body in (b"", b"hello", b"x" * 70_000):
        reader.begin()
        reader.feed(head % len(body) + body)
        assert reader.headers is headers
        assert (reader.take(), reader.status, reader.length) == (body, 200, len(body))
        assert (reader.is_complete, reader.keeps) == (True, True)
    reader.feed(b"!")
    assert not reader.keeps


ALIKE = [
    *(raw for raw, _, _, keeps in WHOLE if keeps),
    *(
        OK + b"Content-Length: %b\r\n\r\nhi" % digits
        for digits in (b"2", b"02", b"1", b"3", b"2 ", b"+2", b"2" * 13)
    ),
    OK + b"Content-Length: 0\r\n\r\n",
    OK + b"content-length:2\r\n\r\nhi",
    OK + b"Content-Length: 2\r\nConnection: close\r\n\r\nhi",
    OK + b"Content-Length: 2\r\nX-A: " + b"a" * 2000 + b"\r\n\r\nhi",
    b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nhi",
]


@given(
    st.lists(st.tuples(st.sampled_from(ALIKE), st.integers(0, 300), st.booleans()), min_size=2, max_size=6)
)
def test_what_came_before_changes_no_answer(answers: list[tuple[bytes, int, bool]]) -> None:
    def outcome(reader: AnswerReader, raw: bytes, cut: int, is_head: bool) -> object:
        reader.begin(is_head=is_head)
        try:
            body = b""
            for part in filter(None, (raw[:cut], raw[cut:])):
                reader.feed(part)
                body += reader.take()
        except BadAnswerError as error:
            return str(error)
        return body, reader.status, reader.headers, reader.length, reader.is_complete, reader.keeps

    reader = AnswerReader()
    for raw, cut, is_head in answers:
        wanted = outcome(AnswerReader(), raw, cut, is_head)
        assert outcome(reader, raw, cut, is_head) == wanted
        if isinstance(wanted, str) or not reader.keeps:
            return  # such a connection is closed


@pytest.mark.parametrize("declared", [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b""])
def test_the_answer_to_a_head_request_has_no_body(declared: bytes) -> None:
    reader, body = read(OK + declared + b"\r\n", is_head=True)
    assert (body, reader.is_complete, reader.keeps) == (b"", True, False)
    assert reader.length == (5 if b"Length" in declared else None)
    # A body comes all the same: it belongs to nobody.
    reader, body = read(OK + declared + b"\r\nhello", b"and more", is_head=True)
    assert (body, reader.is_complete, reader.keeps) == (b"", True, False)


@pytest.mark.parametrize("more", [b"!", b"\r\nX", b"HTTP/1.1 200 OK\r\n", TWO, b"0\r\n\r\n"])
@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
def test_bytes_beyond_the_answer_reach_nobody_and_end_the_connection(more: bytes, close: bytes) -> None:
    raw = OK + close + b"Content-Length: 2\r\n\r\nhi"
    for cut in ((raw + more,), (raw, more)):
        reader, body = read(*cut)
        assert (body, reader.is_complete, reader.keeps) == (b"hi", True, False)


def test_a_body_without_framing_ends_with_its_connection() -> None:
    reader, body = read(OK + b"\r\n", b"any", b"thing")
    assert (body, reader.is_complete) == (b"anything", False)
    reader.end()
    assert (reader.is_complete, reader.keeps) == (True, False)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        TWO[:-1],
        CHUNKED + b"2\r\nhi\r\n",
        CHUNKED + b"2\r\nhi\r\n0\r\n",
    ],
)
def test_an_answer_that_ends_too_soon_is_broken(raw: bytes) -> None:
    with pytest.raises(BadAnswerError, match="the server closed the connection"):
        read(*([raw] if raw else []), ends=True)


CONTROLS = [byte for byte in (*range(0x20), 0x7F) if byte not in b"\t\r\n"]
NO_TOKEN = [byte for byte in range(256) if not (chr(byte).isalnum() and byte < 128)]
NO_TOKEN = [byte for byte in NO_TOKEN if byte not in b"!#$%&'*+-.^_`|~:\r\n"]

BAD = [
    *(b"HTTP/1.1 " + status + b" X\r\nContent-Length: 0\r\n\r\n" for status in (
        b"0", b"00", b"000", b"1", b"20", b"99", b"099", b"600", b"999", b"1000", b"-1", b"2OO", b"",
    )),
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nfree bytes",
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/0.9 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"ICY 200 OK\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    OK + b": x\r\n\r\n",
    OK + b"a : x\r\n\r\n",
    OK + b" a: x\r\n\r\n",
    OK + b"a\r\n\r\n",
    OK + b"a: x\r\n folded\r\n\r\n",
    *(OK + b"a" + bytes([byte]) + b"b: x\r\nContent-Length: 0\r\n\r\n" for byte in NO_TOKEN),
    *(OK + b"a: x" + bytes([byte]) + b"\r\nContent-Length: 0\r\n\r\n" for byte in CONTROLS),
    OK + b"a: x\rb: y\r\n\r\n",
    OK + b"a: x\nb: y\r\n\r\n",
    OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n",
    *(OK + b"Content-Length: " + value + b"\r\n\r\na" for value in (
        b"+1", b"-1", b"0x1", b"1 1", b"1,1", b"", b"9" * 30,
    )),
    *(OK + b"Transfer-Encoding: " + value + b"\r\n\r\n0\r\n\r\n" for value in (
        b"gzip", b"identity", b"gzip, chunked", b"chunked, gzip", b"",
    )),
    OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    CHUNKED + b"x\r\nhi\r\n",
    CHUNKED + b"2\r\nhi!\r\n0\r\n\r\n",
    CHUNKED + b"2\nhi\r\n0\r\n\r\n",
    CHUNKED + b"0\r\nbad name: x\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("raw", BAD)
def test_what_is_no_proper_answer_is_refused_however_it_is_cut(raw: bytes) -> None:
    for cut in ((raw,), tuple(raw[at : at + 1] for at in range(len(raw)))):
        with pytest.raises(BadAnswerError, match="no proper HTTP"):
            read(*cut)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"HTTP/1.1 102 Processing\r\n\r\n" * (MOST_INFORMATIONAL + 1), "informational responses"),
        (OK + b"a: b\r\n" * (MOST_HEAD_LINES + 2), "lines"),
        (OK + b"a: " + b"b" * MOST_HEAD_BYTES + b"\r\n", "bytes"),
        (OK + (b"a: " + b"b" * 1000 + b"\r\n") * 70, "bytes"),
        (b"HTTP/1.1 103 Hints\r\n" + b"a: b\r\n" * 200 + b"\r\n" + OK + b"a: b\r\n" * 58, "lines"),
        (CHUNKED + b"0\r\n" + b"a: b\r\n" * (MOST_HEAD_LINES + 2), "lines"),
        (CHUNKED + b"0\r\n" + (b"a: " + b"b" * 1000 + b"\r\n") * 70, "bytes"),
        (CHUNKED + b"2\r\nhi\r\n0\r\na: " + b"b" * 2 * MOST_HEAD_BYTES, "bytes"),
        (CHUNKED + b"2\r\nhi\r\n2;" + b"x" * 2 * MOST_HEAD_BYTES, "bytes"),
        (b"\r\n" * MOST_HEAD_BYTES, "bytes"),
    ],
)
def test_everything_beside_the_body_is_bounded(raw: bytes, why: str) -> None:
    with pytest.raises(BadAnswerError, match=why):
        read(*(raw[at : at + 1000] for at in range(0, len(raw), 1000)))


def test_a_body_has_no_bound_here_and_slow_pieces_of_it_none_either() -> None:
    pieces = [b"1\r\n", b"x", b"\r\n"] * 30_000
    reader, body = read(CHUNKED, *pieces, b"0\r\n\r\n")
    assert (len(body), reader.is_complete) == (30_000, True)


def test_a_head_that_arrives_at_once_is_bounded_too() -> None:
    head = OK + (b"a: " + b"b" * 1000 + b"\r\n") * 70 + b"Content-Length: 0\r\n\r\n"
    with pytest.raises(BadAnswerError, match="bytes"):
        read(head)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_nothing_a_server_can_send_is_another_error(noise: bytes, at: int) -> None:
    for raw in (noise, TWO[:at] + noise, CHUNKED[:at] + noise, CHUNKED + noise):
        try:
            reader, body = read(raw, noise)
        except BadAnswerError:
            continue
        assert not body or reader.status == 200
