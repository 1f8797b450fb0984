"""Patterns of page origins: a star crosses no dot and ends no name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.origins import Origins, check_pattern

labels = st.text("abz09-_", min_size=1, max_size=4)


@pytest.mark.parametrize(
    "pattern",
    ["*", "null", "https://*", "https://*:8443", "app://*", "https://chat.example", "https://*.example.com",
     "https://app-*.example.com:*", "http://localhost:*", "http://[::1]:3000", "https://chat"],
)  # fmt: skip
def test_a_pattern_is_taken_as_it_is(pattern: str) -> None:
    assert check_pattern(pattern) == pattern


@pytest.mark.parametrize(
    "pattern",
    ["", "**", "https://chat.example*", "https://chat*", "https://chat.*", "https://*.*", "https://*chat",
     "https://chat.example.*:8443", "https://chat.example/", "https://chat.example/*", "chat.example", "://x",
     "https://", "https://a..b", "https://.a", "https://a:", "https://a:x", "https://a:8*", "https://a@b",
     "https://[::*]", "HTTPS://a", "https://a b", "https://a\n", "nullx"],
)  # fmt: skip
def test_anything_else_is_refused_and_what_is_allowed_is_named(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"expected SCHEME://HOST.*https://\*\.example\.com"):
        check_pattern(pattern)
    with pytest.raises(ValueError, match="expected SCHEME"):
        Origins((pattern,))


@given(st.lists(labels, min_size=1, max_size=4))
def test_a_star_is_exactly_one_label(below: list[str]) -> None:
    allows = Origins(("https://*.example.com",)).allow
    assert allows(f"https://{'.'.join(below)}.example.com".encode()) is (len(below) == 1)
    assert not allows(f"https://a.example.com.{'.'.join(below)}".encode())
    assert not allows(f"https://a.example.com{below[0]}".encode())
