"""Secrets in what a server sends back."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.target import Protocol
from manager.wire.credentials import credentials, secrets_in
from manager.wire.mask import Mask

KEY = b"sk-sk-sk-secret-0123"
SAID = b"sk-a " + KEY + b" sk-sk-b " + KEY + KEY + b" sk-sk-sk-secret-012"


@given(cuts=st.lists(st.integers(0, len(SAID)), max_size=8))
def test_a_secret_is_hidden_wherever_it_is_split(cuts: list[int]) -> None:
    mask = Mask((KEY,))
    places = [0, *sorted(cuts), len(SAID)]
    pieces = [mask.feed(SAID[one:other]) for one, other in pairwise(places)]
    assert b"".join(pieces) + mask.end() == SAID.replace(KEY, b"*" * len(KEY))


def test_what_cannot_be_a_secret_is_not_held_back() -> None:
    mask = Mask((KEY, b"another-secret-0123"))
    assert mask.feed(b"data: sk-s\n\n") == b"data: sk-s\n\n"
    assert mask.feed(b"a sk-") == b"a "
    assert mask.feed(b"x") == b"sk-x"
    assert mask.end() == b""


def test_a_short_word_is_no_secret() -> None:
    mask = Mask((b"none",))
    assert mask.feed(b"none") == b"none"
    assert mask.text("none") == "none"


def test_texts_are_hidden_too() -> None:
    assert Mask((KEY,)).text(f"Bearer {KEY.decode()}!") == f"Bearer {'*' * len(KEY)}!"


@pytest.mark.parametrize("protocol", Protocol)
def test_the_secret_of_a_request_is_the_key_alone(protocol: Protocol) -> None:
    assert secrets_in(credentials(protocol, "the-key")) == (b"the-key",)
    assert secrets_in(credentials(protocol, None)) == ()
