"""What callers say in headers never gets out of a header or a line of the log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.caller import HeaderNames, printable, shown


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
