"""Encoded bodies: which are decoded, and that they cost a bounded amount of time and memory."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.encoding import Encoding, encoding_of, gathered, zstd
from manager.wire.errors import BadBodyError, BodyTooLargeError, NoRoomError
from manager.wire.routes import INFERENCE
from manager.wire.steps import run

ZSTD = [(b"host", b"x"), (b"content-encoding", b"zstd")]


def decoded(parts: list[bytes], most_bytes: int = 10**9) -> bytes:
    return bytes(run(gathered(parts, Encoding.ZSTD, most_bytes)))


@pytest.mark.parametrize("path", INFERENCE)
def test_zstd_is_decoded_below_v1_as_the_server_does(path: bytes) -> None:
    route = INFERENCE[path]
    expected = Encoding.ZSTD if path.startswith(b"/v1/") else None
    assert encoding_of(route, ZSTD) is expected


@pytest.mark.parametrize("value", [b"gzip", b"ZSTD", b"zstd, gzip", b"identity", b"", b" zstd"])
def test_other_encodings_are_not_decoded(value: bytes) -> None:
    route = INFERENCE[b"/v1/responses"]
    assert encoding_of(route, [(b"content-encoding", value), (b"content-encoding", b"zstd")]) is None
    assert encoding_of(route, []) is None


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4), st.integers(1, 40))
def test_frames_are_decoded_however_they_are_cut(contents: list[bytes], size: int) -> None:
    encoded = b"".join(map(zstd.compress, contents))
    parts = [encoded[at : at + size] for at in range(0, len(encoded), size)]
    assert decoded(parts) == b"".join(contents)
    assert parts == []


@given(st.lists(st.binary(max_size=300), min_size=1))
def test_parts_are_joined_and_let_go_of(contents: list[bytes]) -> None:
    parts = list(contents)
    assert bytes(run(gathered(parts, None, 0))) == b"".join(contents)
    assert parts == []


def test_one_part_is_not_copied() -> None:
    part = b"x" * 100
    assert run(gathered([part], None, 0)) is part


def test_no_parts_are_an_empty_body() -> None:
    assert run(gathered([], None, 0)) == b""


def test_large_parts_are_joined_in_steps() -> None:
    assert len(list(gathered([b"x" * 2**16] * 100, None, 0))) == 100
    assert len(list(gathered([b"x"] * 2**17, None, 0))) == 2


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"{}",
        zstd.compress(b"x" * 100)[:-1],
        zstd.compress(b"x" * 100)[:-1] + b"\x00",
        zstd.compress(b"x") + b"rest",
        zstd.compress(b"x" * 2**25, options={zstd.CompressionParameter.window_log: 25})[:20],
    ],
)
def test_what_cannot_be_decoded_is_refused(encoded: bytes) -> None:
    with pytest.raises(BadBodyError, match=r"^failed to decompress zstd body$"):
        decoded([encoded])


def test_a_window_larger_than_the_server_takes_is_refused() -> None:
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 24}
    with pytest.raises(BadBodyError, match="failed to decompress"):
        decoded([zstd.compress(bytes(2**24 + 1), options=options)])
    options = {zstd.CompressionParameter.window_log: 23}
    assert len(decoded([zstd.compress(bytes(2**24 + 1), options=options)])) == 2**24 + 1


def test_a_bomb_is_stopped_at_the_limit() -> None:
    bomb = zstd.compress(bytes(2**30))
    assert len(bomb) < 2**17
    steps = gathered([bomb], Encoding.ZSTD, 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLargeError, match="at most 1048576 bytes"):
            run(steps)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20


def test_a_step_decodes_a_bounded_amount() -> None:
    assert len(list(gathered([zstd.compress(bytes(2**22))], Encoding.ZSTD, 2**22))) >= 2**22 // 2**16


def test_the_number_of_frames_is_bounded() -> None:
    assert decoded([zstd.compress(b"x") * 64]) == b"x" * 64
    with pytest.raises(BadBodyError, match="more than 64 frames"):
        decoded([zstd.compress(b"x") * 65])


def test_a_body_that_does_not_fit_beside_the_others_is_given_up_as_soon_as_it_does_not() -> None:
    """Each step asks first: many small bodies that decode to large ones are bounded together."""
    held: list[int] = []

    def holds(count: int) -> bool:
        if sum(held) + count > 2**20:
            return False
        held.append(count)
        return True

    with pytest.raises(NoRoomError):
        run(gathered([zstd.compress(bytes(2**24))], Encoding.ZSTD, 2**30, holds))
    assert 2**20 - 2**16 <= sum(held) <= 2**20
    held.clear()
    assert len(run(gathered([zstd.compress(bytes(2**19))], Encoding.ZSTD, 2**30, holds))) == sum(held)
