"""Heads of messages: what passes to the other side, and what never does."""

from __future__ import annotations

from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.head import (
    HOP_BY_HOP,
    STATUS_LINES,
    Header,
    ambiguity,
    forwarded,
    status_line,
    without_named,
)

WITHHELD = frozenset({b"x-instance", b"x-lane"})
# As a server must not see them: for the hop, for us, or for somebody else to forge.
NEVER = [
    b"Connection: close",
    b"Keep-Alive: timeout=5",
    b"Proxy-Authenticate: Basic",
    b"Proxy-Authorization: Basic eA==",
    b"Proxy-Connection: keep-alive",
    b"TE: trailers",
    b"Trailer: X-Sum",
    b"Transfer-Encoding: chunked",
    b"Upgrade: h2c",
    b"Accept-Encoding: gzip",
    b"Authorization: Bearer secret",
    b"Content-Length: 5",
    b"Cookie: a=b",
    b"Expect: 100-continue",
    b"Forwarded: for=192.0.2.1",
    b"Host: localhost",
    b"Origin: http://localhost",
    b"Referer: http://localhost/",
    b"Traceparent: 00-1-2-3",
    b"Tracestate: a=b",
    b"X-API-Key: secret",
    b"X-Forwarded-For: 192.0.2.1",
    b"X-Forwarded-Host: evil.example",
    b"X-Forwarded-Proto: https",
    b"X-Real-IP: 192.0.2.1",
    b"X-Request-Id: 1",
    b"X-Instance: gpu0",
    b"X-Lane: fast",
]

tokens = st.text("abcxyz-", min_size=1, max_size=6).map(str.encode)
names = tokens | st.sampled_from(sorted(HOP_BY_HOP | WITHHELD | {b"host", b"authorization", b"content-type"}))
headers = st.lists(
    st.tuples(names.filter(lambda name: name != b"connection"), st.binary(max_size=8))
    | st.tuples(st.just(b"connection"), st.lists(names).map(b", ".join)),
    max_size=8,
)


def header(line: bytes) -> Header:
    name, _, value = line.partition(b": ")
    return name.lower(), value


@pytest.mark.parametrize("line", NEVER)
def test_what_is_not_for_the_server_does_not_reach_it(line: bytes) -> None:
    around = [(b"accept", b"*/*"), header(line), (b"content-type", b"application/json")]
    assert forwarded(around, WITHHELD) == [b"accept: */*\r\n", b"content-type: application/json\r\n"]


def test_everything_else_passes_in_its_order_and_as_often_as_it_came() -> None:
    said = [(b"x-a", b"1"), (b"user-agent", b"curl"), (b"x-a", b"2"), (b"x-b", b"\xff \t"), (b"x-c", b"")]
    assert forwarded(said, WITHHELD) == [
        b"x-a: 1\r\n",
        b"user-agent: curl\r\n",
        b"x-a: 2\r\n",
        b"x-b: \xff \t\r\n",
        b"x-c: \r\n",
    ]


def test_what_connection_names_stays_too_wherever_it_stands() -> None:
    said = [
        (b"x-a", b"1"),
        (b"connection", b"close, X-A ,x-b"),
        (b"x-b", b"2"),
        (b"x-c", b"3"),
        (b"connection", b"X-C"),
        (b"x-ab", b"4"),
    ]
    assert forwarded(said, ()) == [b"x-ab: 4\r\n"]


def test_nobody_has_the_type_or_the_length_of_a_message_taken_away() -> None:
    said = [(b"connection", b"content-type, content-length"), (b"content-type", b"application/json")]
    assert forwarded(said, ()) == [b"content-type: application/json\r\n"]
    answer = [b"Content-Length: 5\r\n", b"X-A: 1\r\n", b"Content-Type: text/plain\r\n"]
    assert without_named(answer, b"Content-Length, x-a") == [answer[0], answer[2]]


@given(headers)
def test_a_head_is_forwarded_line_by_line_or_not_at_all(said: list[Header]) -> None:
    named = {token.strip() for name, value in said if name == b"connection" for token in value.split(b",")}
    barred = {header(line)[0] for line in NEVER} | (named - {b"content-type", b"content-length"})
    types = [one for one in said if one[0] == b"content-type"]
    barred_lines = {id(one) for one in types[1:]}
    expected = [b"%b: %b\r\n" % one for one in said if one[0] not in barred and id(one) not in barred_lines]
    assert forwarded(said, WITHHELD) == expected


# --- what can be understood in two ways -----------------------------------------------------------


def test_a_transfer_encoding_is_ambiguous_twice_even_in_the_same_words() -> None:
    line = (b"transfer-encoding", b"chunked")
    assert ambiguity([line, (b"accept", b"*/*")]) is None
    assert ambiguity([line, (b"accept", b"*/*"), line]) == "transfer-encoding is given more than once"


@pytest.mark.parametrize("name", [b"content-type", b"authorization", b"x-api-key", b"accept"])
@pytest.mark.parametrize("second", [b"a/b", b"c/d"])
def test_what_frames_nothing_may_be_repeated(name: bytes, second: bytes) -> None:
    assert ambiguity([(name, b"a/b"), (name, second)]) is None


def test_the_first_of_several_content_types_counts() -> None:
    said = [(b"content-type", b"a/b"), (b"x-a", b"1"), (b"content-type", b"c/d")]
    assert forwarded(said, ()) == [b"content-type: a/b\r\n", b"x-a: 1\r\n"]


def test_other_headers_may_be_repeated() -> None:
    assert ambiguity([(b"accept", b"a"), (b"accept", b"b"), (b"host", b"x")]) is None
    assert ambiguity([]) is None


@pytest.mark.parametrize(
    ("coding", "understood"),
    [
        (b"chunked", True),
        (b" Chunked ", True),
        (b"gzip, chunked", False),
        (b"chunked, chunked", False),
        (b"chunked,", False),
        (b"identity", False),
        (b"xchunked", False),
        (b"", False),
    ],
)
def test_only_chunked_is_understood_as_a_transfer_encoding(coding: bytes, understood: bool) -> None:
    assert (ambiguity([(b"transfer-encoding", coding)]) is None) is understood


# --- status lines ---------------------------------------------------------------------------------


def test_every_status_has_a_line_with_a_phrase_where_there_is_one() -> None:
    assert status_line(HTTPStatus.OK) == b"HTTP/1.1 200 OK\r\n"
    assert status_line(599) == b"HTTP/1.1 599 \r\n"
    assert sorted(STATUS_LINES) == list(range(100, 600))
    assert all(line.startswith(b"HTTP/1.1 %d " % status) for status, line in STATUS_LINES.items())
    assert all(line.count(b"\r\n") == 1 and line.endswith(b"\r\n") for line in STATUS_LINES.values())
