"""The text that a request asks about, in every dialect."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.asked import MOST_ELEMENTS, MOST_LOOKED_AT, text_asked
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
        ({"messages": [user("mine"), user([{"type": "tool_result", "content": "{}"}])]}, "mine"),
        ({"messages": [user("mine"), user([{"type": "tool_result"}, {"text": "<hint>x</hint>"}])]}, "mine"),
        ({"messages": [user("mine"), user("<hint>x</hint>"), {"role": "tool", "content": "{}"}]}, "mine"),
        ({"messages": [user("<a>one</a>"), user("<b>two</b>"), user([IMAGE])]}, "<b>two</b>"),
        ({"messages": [user("mine"), user([{"text": ""}, {"text": " "}])]}, "mine"),
        ({"input": [user("mine"), {"type": "function_call_output", "output": "{}"}]}, "mine"),
        ({"input": [user("mine"), {"type": "reasoning", "content": [{"text": "hm"}]}]}, "mine"),
        ({"input": [{"type": "message", "content": "mine"}]}, "mine"),
        (b'{"prompt": "half a pair \\ud800"}', "half a pair \ufffd"),
        (b'{"prompt": "no escape \\x"}', ""),
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


def test_a_long_text_has_the_words_that_its_escapes_stand_for() -> None:
    text = asked({"messages": [user("first\nFür\n\U0001f600" + "x" * STEP_BYTES + '\t"summarize"')]})
    assert text.split()[:2] == ["first", "Für"]
    assert text.split()[-1] == "summarize"
    text.encode()


def test_lists_of_any_length_are_read_in_short_steps_and_little_memory() -> None:
    for body in (
        {"messages": [user("mine"), *[{}] * (MOST_LOOKED_AT + 1)]},
        {"messages": [*[1] * MOST_ELEMENTS, user("mine")]},
        {"messages": [user([*[{}] * MOST_ELEMENTS, {"text": "mine"}])]},
    ):
        assert asked(body) == ""
    fields = run(reading([json.dumps({"messages": [{}] * 5000}).encode()], CHAT, 2**30)).fields
    assert sum(1 for _ in text_asked(fields)) > MOST_LOOKED_AT
    assert asked({"messages": [{}] * 5000 + [user("mine")] + [{}] * (MOST_LOOKED_AT - 1)}) == "mine"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner),
)


@given(st.sampled_from(["messages", "input", "prompt"]), JSON)
def test_any_value_is_read_without_an_error(name: str, value: Any) -> None:
    assert isinstance(asked({name: value}), str)
