"""What callers say in headers never gets out of a header or a line of the log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.caller import HeaderNames, flag_of, printable, shown


def test_the_usual_names_stay_here_whatever_the_own_ones_are() -> None:
    names = HeaderNames(lane=b"x-team-lane")
    assert {b"x-team-lane", b"x-lane", b"x-instance", b"x-local-only"} <= names.all


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, None), (b"", None), (b"  ", None), (b" fast ", "fast"), (b"x" * 300, "x" * 256)],
)
def test_a_value_is_text_or_nothing(value: bytes | None, text: str | None) -> None:
    assert shown(value) == text


@given(st.binary())
def test_whatever_is_said_is_shown_as_one_plain_line(value: bytes) -> None:
    text = shown(value)
    assert text is None or (text.isascii() and text.isprintable())


@given(st.text())
def test_printable_text_is_plain_and_as_long(text: str) -> None:
    plain = printable(text)
    assert plain == "" or (plain.isascii() and plain.isprintable())
    assert len(plain) == len(text)


@pytest.mark.parametrize(
    ("values", "means"),
    [
        ([], False),
        ([b""], False),
        ([b" Yes "], True),
        ([b"0"], False),
        ([b"false", b"true"], True),
        ([b"true", b"no"], True),
    ],
)
def test_a_flag_in_a_header_is_true_or_false(values: list[bytes], *, means: bool) -> None:
    assert flag_of(b"x-local-only", values) == (means, None)


@pytest.mark.parametrize("value", [b"maybe", b"2", b"true, true", b"tru", "\u212aes".encode(), b"\xff"])
@pytest.mark.parametrize("beside", [[], [b"true"], [b"false"]])
def test_a_flag_of_any_other_value_is_refused_with_what_is_allowed(value: bytes, beside: list[bytes]) -> None:
    is_true, fault = flag_of(b"x-local-only", [*beside, value])
    assert not is_true
    assert fault is not None
    assert fault.startswith("x-local-only is ")
    assert repr(shown(value)) in fault
    assert fault.endswith("; allowed are true and false")
