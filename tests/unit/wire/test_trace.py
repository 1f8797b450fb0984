from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.trace import is_sampled, read_traceparent, traceparent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def hexadecimal(length: int) -> st.SearchStrategy[str]:
    return st.integers(1, 16**length - 1).map(lambda number: f"{number:0{length}x}")


@given(hexadecimal(32), hexadecimal(16), st.booleans())
def test_what_is_written_is_read_again(trace: str, span: str, sampled: bool) -> None:
    read = read_traceparent(traceparent(trace, span, sampled=sampled))
    assert read == (trace, span, "01" if sampled else "00")
    assert is_sampled(read[2]) is sampled


def test_of_the_flags_only_the_last_bit_says_whether_it_is_recorded() -> None:
    assert [is_sampled(flags) for flags in ("00", "01", "02", "fe", "ff")] == [
        False,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("version", ["00", "01", "cc", "fe"])
def test_a_trace_of_any_version_is_read_and_later_ones_may_say_more(version: str) -> None:
    value = f"{version}-{TRACE}-{SPAN}-01"
    assert read_traceparent(f" {value} ".encode()) == (TRACE, SPAN, "01")
    assert (read_traceparent(f"{value}-more".encode()) is None) is (version == "00")


@pytest.mark.parametrize(
    "value",
    [
        "",
        "00",
        f"ff-{TRACE}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"01-{TRACE}-{SPAN}-01more",
        f"00-{TRACE}-{SPAN}-01\n00",
        f"00-{TRACE}-{SPAN[:-1]}g-01",
    ],
)
def test_what_is_no_trace_is_none(value: str) -> None:
    assert read_traceparent(value.encode()) is None
    assert read_traceparent(None) is None


@given(st.binary(max_size=80))
def test_nothing_a_caller_can_send_is_an_error(value: bytes) -> None:
    read_traceparent(value)
