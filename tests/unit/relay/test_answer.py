"""An answer is whole, or it shows that it is not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.errors import Reason
from manager.relay.answer import AnswerWriter, stamp
from manager.relay.upstream import AnswerHead
from manager.wire.routes import Dialect
from tests.support.exchanging import FakeFront
from tests.support.records import a_record

KIND = b"Content-Type: text/event-stream\r\n"


def writer(
    dialect: Dialect = Dialect.NATIVE, *, chunks: bool = True, keep_alive: bool = True
) -> AnswerWriter:
    return AnswerWriter(dialect, chunks=chunks, keep_alive=keep_alive)


def head(status: int = 200, length: int | None = None, *lines: bytes) -> AnswerHead:
    return AnswerHead(status, [KIND, *lines], length, b"text/event-stream")


def begun(**values: Any) -> tuple[AnswerWriter, FakeFront]:
    length, stream = values.pop("length", None), values.pop("stream", True)
    answer = writer(**values)
    answer.begin(head(length=length), b"", stream=stream)
    return answer, FakeFront()


def test_a_head_is_written_together_with_the_first_bytes() -> None:
    answer, client = begun()
    assert answer.is_unseen
    assert answer.write(client, b"one")
    assert not answer.is_unseen
    answer.write(client, b"two", last=True)
    assert client.written.count(b"HTTP/1.1") == 1
    assert client.written.endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")


def test_an_answer_without_a_body_is_its_head() -> None:
    answer, client = begun(length=0)
    assert answer.write(client, b"")
    assert not answer.write(client, b"")
    assert not answer.write(None, b"x")
    assert client.headers["content-length"] == "0"


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_that_may_have_no_body_is_framed_by_its_status(status: int) -> None:
    answer, client = writer(), FakeFront()
    answer.begin(head(status), b"", stream=True)
    answer.write(client, b"", last=True)
    assert client.written.endswith(b"\r\n\r\n")
    assert "transfer-encoding" not in client.headers
    assert answer.keep_alive


def test_a_stream_is_buffered_by_no_proxy_and_kept_by_no_cache() -> None:
    answer, client = writer(), FakeFront()
    answer.begin(head(200, None, b"cache-control: max-age=60\r\n"), b"X-Mine: 1\r\n", stream=True)
    answer.write(client, b"x")
    assert (client.headers["cache-control"], client.headers["x-mine"]) == ("no-cache", "1")
    assert client.head.lower().count("cache-control") == 1
    other, client = writer(), FakeFront()
    other.begin(head(200, None, b"cache-control: max-age=60\r\n"), b"", stream=False)
    other.write(client, b"x")
    assert client.headers["cache-control"] == "max-age=60"
    assert "x-accel-buffering" not in client.headers


def test_a_status_that_there_is_not_is_a_bad_gateway() -> None:
    answer, client = writer(), FakeFront()
    answer.begin(head(599), b"", stream=False)
    answer.write(client, b"x")
    assert client.head.startswith(("HTTP/1.1 599", "HTTP/1.1 502"))


def test_a_head_that_was_seen_is_not_taken_back() -> None:
    answer, client = begun()
    assert answer.retract()
    assert not answer.is_begun
    answer.begin(head(), b"", stream=True)
    answer.write(client, b"x")
    assert not answer.retract()


@pytest.mark.parametrize("dialect", Dialect)
def test_an_error_before_the_first_byte_is_an_answer_of_its_own(dialect: Dialect) -> None:
    answer, client = begun(dialect=dialect, length=10_000)
    told = answer.fail(
        client,
        503,
        "no room",
        stamp=b"X-Instance: a\r\n",
        headers={"Retry-After": "1"},
        request_id="42",
    )
    assert told
    assert (client.status, client.headers["x-instance"], client.headers["retry-after"]) == (503, "a", "1")
    assert "no room" in str(client.json())
    assert client.is_whole
    assert client.written.count(b"HTTP/1.1") == 1


def test_an_error_on_a_connection_that_ends_says_so() -> None:
    answer, client = writer(keep_alive=False), FakeFront()
    answer.fail(client, 400, "no")
    assert client.headers["connection"] == "close"


@pytest.mark.parametrize(("length", "stream"), [(100, True), (100, False), (None, False)])
def test_an_error_in_what_is_no_stream_breaks_it_off(length: int | None, *, stream: bool) -> None:
    """A11: what has a length would be filled up with the error."""
    answer, client = begun(length=length, stream=stream)
    answer.write(client, b"{")
    before = bytes(client.written)
    assert not answer.fail(client, 502, "it broke")
    assert (client.aborted, bytes(client.written), answer.keep_alive) == (1, before, False)


def test_an_error_in_a_stream_is_its_last_line() -> None:
    answer, client = begun()
    answer.write(client, b"{}\n")
    assert not answer.fail(client, 502, "it broke", tail=b"{}\n")
    assert client.body == b'{}\n{"error":"it broke"}\n'
    assert (client.is_whole, client.aborted, answer.keep_alive) == (True, 0, True)


def test_an_error_in_a_stream_to_http_1_0_ends_its_connection() -> None:
    answer, client = begun(chunks=False, keep_alive=True)
    answer.write(client, b"{}\n")
    answer.keep_alive = True
    answer.fail(client, 502, "it broke", tail=b"{}\n")
    assert client.body == b'{}\n{"error":"it broke"}\n'
    assert not answer.keep_alive


@pytest.mark.parametrize(
    ("dialect", "tail", "missing"),
    [
        (Dialect.NATIVE, b"", b""),
        (Dialect.NATIVE, b"{}\n", b""),
        (Dialect.NATIVE, b"{}\r\n", b""),
        (Dialect.NATIVE, b"{", b"\n"),
        (Dialect.OPENAI, b"", b""),
        (Dialect.OPENAI, b"data: {}\n\n", b""),
        (Dialect.OPENAI, b"data: {}\r\n\r\n", b""),
        (Dialect.OPENAI, b"data: {}\n", b"\n"),
        (Dialect.OPENAI, b"data: {}\r\n", b"\n"),
        (Dialect.OPENAI, b"data: {", b"\n\n"),
        (Dialect.ANTHROPIC, b"\n", b"\n"),
    ],
)
def test_what_a_stream_stands_in_is_ended_before_an_error(
    dialect: Dialect, tail: bytes, missing: bytes
) -> None:
    answer, client = begun(dialect=dialect)
    answer.write(client, tail or b"x")
    written = len(client.body)
    answer.fail(client, 502, "it broke", tail=tail)
    assert client.body[written:].startswith((missing + b"{", missing + b"data:", missing + b"event:"))


def test_a_comment_begins_a_stream_of_events_and_is_one_line() -> None:
    answer, client = writer(Dialect.OPENAI), FakeFront()
    assert answer.comment(client, b"", "waiting for a\r\ndata: {}\u2028")
    assert answer.comment(client, b"", "still")
    assert client.headers["content-type"] == "text/event-stream"
    assert client.body.startswith(b": waiting")
    assert (client.body.count(b"\n"), client.body.count(b"\r")) == (2, 0)


@pytest.mark.parametrize(("dialect", "chunks"), [(Dialect.NATIVE, True), (Dialect.OPENAI, False)])
def test_a_client_that_knows_no_comments_gets_none(dialect: Dialect, *, chunks: bool) -> None:
    answer, client = writer(dialect, chunks=chunks), FakeFront()
    assert not answer.comment(client, b"", "waiting")
    assert (client.written, answer.is_begun) == (b"", False)  # type: ignore[comparison-overlap]


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=20), st.booleans())
def test_whatever_the_pieces_the_body_is_what_was_written(pieces: list[bytes], chunks: bool) -> None:
    answer, client = begun(chunks=chunks)
    for piece in pieces:
        answer.write(client, piece)
    answer.write(client, b"", last=True)
    assert client.body == b"".join(pieces)
    assert client.is_whole
    assert answer.keep_alive is chunks, "without chunks the end of the connection is that of the answer"


def test_a_stamp_says_where_an_answer_is_from_and_why() -> None:
    record = a_record(request_id="42", queue_ms=12.7)
    begun = b"Vary: Origin\r\nX-Request-Id: 42\r\nX-Provider: local\r\nX-Queue-Ms: 12\r\n"
    assert stamp(record, b"Vary: Origin\r\n", None) == begun
    lines = stamp(record, b"", ("gpu0", "qwen3:8b")).split(b"\r\n")
    assert lines == [
        *(b"X-Request-Id: 42", b"X-Instance: gpu0", b"X-Model: qwen3:8b", b"X-Provider: local"),
        *(b"X-Queue-Ms: 12", b""),
    ]
    assert b"X-Model" not in stamp(record, b"", ("gpu0", ""))
    record.fallback, record.fallback_reason, record.start_ms = True, Reason.GPU_MISSING, 1500.5
    full = stamp(record, b"", ("cpu", "m"))
    assert full.endswith(b"X-Fallback-Reason: gpu_missing\r\nX-Start-Ms: 1500\r\n")
    record.fallback = False
    assert b"X-Fallback-Reason" not in stamp(record, b"", ("cpu", "m"))
