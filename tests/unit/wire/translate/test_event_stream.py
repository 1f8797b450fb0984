"""Server-sent events: the same however their bytes are split, and bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.translate.event_stream import EventStream, Sent

STREAM = (
    b"\xef\xbb\xbf: a comment\r\n\r\n"
    b'event: message\r\ndata: {"a":"\xc3\xa9\xf0\x9f\x98\x80"}\r\n\r\n'
    b"data:one\ndata: two\n\n"
    b"id: 7\rretry: 5\rdata: bare returns\r\r"
    b"data\n\n"
    b"\n\n: ping\n\n"
    b"data: [DONE]"
)
EVENTS = [
    Sent(b"message", '{"a":"é😀"}'.encode()),
    Sent(b"", b"one\ntwo"),
    Sent(b"", b"bare returns"),
    Sent(b"", b""),
    Sent(b"", b"[DONE]"),
]


def read(pieces: list[bytes], most_bytes: int = 1024) -> tuple[list[Sent], str | None]:
    stream = EventStream(most_bytes)
    found = [sent for piece in pieces for sent in stream.feed(piece)]
    return found + stream.end(), stream.fault


@pytest.mark.parametrize("at", range(len(STREAM) + 1))
def test_a_stream_in_two_pieces_gives_the_events_of_the_whole(at: int) -> None:
    assert read([STREAM[:at], STREAM[at:]]) == (EVENTS, None)


def test_a_stream_byte_by_byte_gives_the_events_of_the_whole() -> None:
    assert read([bytes([byte]) for byte in STREAM]) == (EVENTS, None)


@given(st.lists(st.binary(max_size=40)), st.integers(1, 30))
def test_no_split_changes_events_and_faults_of_any_bytes(pieces: list[bytes], most_bytes: int) -> None:
    whole = b"".join(pieces)
    assert read(pieces, most_bytes) == read([whole], most_bytes)


@given(st.lists(st.sampled_from([b"data:", b"\r", b"\n", b"x", b"event:", b" ", b":"])), st.integers(1, 30))
def test_no_split_changes_events_and_faults_of_such_lines(pieces: list[bytes], most_bytes: int) -> None:
    assert read(pieces, most_bytes) == read([b"".join(pieces)], most_bytes)


@pytest.mark.parametrize("long", [b"data: " + b"x" * 20, b"data: 12345\ndata: 12345\n", b"x" * 21 + b"\n\n"])
def test_an_event_beyond_the_bound_ends_the_reading(long: bytes) -> None:
    stream = EventStream(20)
    assert stream.feed(b"data: 1\n\n" + long) == [Sent(b"", b"1")]
    assert stream.fault == "the server sent an event of more than 20 bytes"
    assert stream.feed(b"\n\ndata: 2\n\n") == []
    assert not stream._rest


def test_many_events_are_no_large_event() -> None:
    assert len(read([b"data: 12345\n\n" * 100], 20)[0]) == 100
