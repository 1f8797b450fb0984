"""Numbers as people read them."""

from __future__ import annotations

import pytest

from manager.web import words


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, words.UNKNOWN),
        (0, "0 %"),
        (0.0004, "< 0.1 %"),
        (0.0006, "0.1 %"),
        (0.0991, "9.9 %"),
        (1, "100 %"),
    ],
)
def test_a_small_share_is_not_zero(share: float | None, text: str) -> None:
    assert words.percent(share) == text
