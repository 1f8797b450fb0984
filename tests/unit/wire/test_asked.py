"""The text that a request asks about, in every dialect."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.asked import text_asked
from manager.wire.body import reading
from manager.wire.routes import INFERENCE
from manager.wire.steps import STEP_BYTES, run

CHAT = INFERENCE[b"/api/chat"]


def asked(body: dict[str, Any] | bytes) -> str:
    raw = body if isinstance(body, bytes) else json.dumps({"model": "auto", **body}).encode()
    return run(text_asked(run(reading([raw], CHAT, 2**30)).fields))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 200_000}}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "why?"}, "why?"),
        ({"prompt": ["first", "last"]}, "last"),
        ({"input": "why?"}, "why?"),
        ({"input": [user([{"type": "input_text", "text": "why?"}])]}, "why?"),
        ({"input": [{"content": "no role is the user's"}]}, "no role is the user's"),
        ({"messages": [user("first"), {"role": "assistant", "content": "no"}, user("last")]}, "last"),
        ({"messages": [user("mine"), {"role": "tool", "content": "{}"}]}, "mine"),
        ({"messages": [user([{"text": "one"}, {"text": "two"}, IMAGE])]}, "one\ntwo"),
        ({"messages": [user([IMAGE, {"type": "text", "text": "below"}])]}, "below"),
        ({"messages": [user([{"text": "<hint>use the context</hint>\n"}, {"text": "why?"}])]}, "why?"),
        ({"messages": [user([{"text": "<hint>all there is</hint>"}])]}, "<hint>all there is</hint>"),
        ({"messages": [user([{"text": "<a>one</b>"}, {"text": "two"}])]}, "<a>one</b>\ntwo"),
        ({"messages": [user("mine"), "odd"]}, "odd"),
        ({"messages": [{"role": "system", "content": "alone"}]}, ""),
        ({"messages": []}, ""),
        ({"messages": [user(None)]}, ""),
        ({"messages": [{"role": "user"}]}, ""),
        ({"messages": [user([1, {"text": 2}, ["x"]])]}, ""),
        ({"messages": [{"role": 5, "content": "whose?"}]}, "whose?"),
        ({"messages": {"role": "user"}}, ""),
        ({"prompt": 5}, ""),
        ({"prompt": []}, ""),
        ({}, ""),
        (b'{"prompt": "half a pair \\ud800"}', ""),
        (b'{"messages": [1 2]}', ""),
    ],
)
def test_the_last_words_of_the_user_are_what_is_asked(body: Any, text: str) -> None:
    assert asked(body) == text


def test_a_long_text_is_read_at_both_ends() -> None:
    text = asked({"messages": [user("begin " + "x" * (2 * STEP_BYTES) + " end")]})
    assert text.startswith("begin ")
    assert text.endswith(" end")
    assert len(text) <= STEP_BYTES


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner),
)


@given(st.sampled_from(["messages", "input", "prompt"]), JSON)
def test_any_value_is_read_without_an_error(name: str, value: Any) -> None:
    assert isinstance(asked({name: value}), str)
