"""The opening of a conversation: one hash for all of its requests, and others for others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.body import read_body, reading
from manager.wire.opening import opening_of
from manager.wire.routes import INFERENCE
from manager.wire.steps import run

CHAT = INFERENCE[b"/api/chat"]
SYSTEM = {"role": "system", "content": "You are a pirate."}
ASKED = {"role": "user", "content": "Where is the gold?"}
MORE = [{"role": "assistant", "content": "Arr."}, {"role": "user", "content": "And the rum?"}]
LONG = "words and words " * 20_000


def opening(**body: Any) -> int | None:
    raw = json.dumps({"model": "tiny", **body}).encode()
    return opening_of(run(reading([raw], CHAT, 2**30)).fields)


@pytest.mark.parametrize("first", [[SYSTEM, ASKED], [ASKED], [{**SYSTEM, "role": "developer"}, ASKED]])
def test_every_turn_of_a_conversation_has_the_same_opening(first: list[Any]) -> None:
    assert (
        opening(messages=first) == opening(messages=[*first, *MORE]) == opening(messages=first, stream=True)
    )


def test_another_question_and_other_instructions_make_another_conversation() -> None:
    other = {**ASKED, "content": "Where is the rum?"}
    found = {
        opening(messages=[SYSTEM, ASKED]),
        opening(messages=[SYSTEM, other]),
        opening(messages=[ASKED]),
        opening(messages=[SYSTEM]),
        opening(messages=[ASKED], system="Be short."),
        opening(messages=[ASKED], system="Be long."),
    }
    assert len(found) == 6


def test_a_conversation_of_any_length_has_the_opening_of_its_first_turn() -> None:
    long = [SYSTEM, ASKED, {"role": "assistant", "content": LONG}, *MORE]
    assert opening(messages=long) == opening(messages=[SYSTEM, ASKED])
    assert opening(messages=[ASKED, {"role": "assistant", "content": LONG}]) == opening(messages=[ASKED])


def test_an_opening_that_is_too_long_to_be_read_whole_is_told_by_its_begin() -> None:
    first = [{"role": "user", "content": LONG}]
    assert opening(messages=first) == opening(messages=[*first, *MORE])
    assert opening(messages=first) != opening(messages=[{"role": "user", "content": "other " + LONG}])


def test_the_words_of_openai_and_anthropic_are_read_as_well() -> None:
    assert opening(input=[ASKED], instructions="Be short.") == opening(
        input=[ASKED, *MORE], instructions="Be short."
    )
    assert opening(input="Where is the gold?") != opening(input="Where is the rum?")


def test_a_prompt_is_told_by_its_begin() -> None:
    assert opening(prompt=LONG) == opening(prompt=LONG + "more")
    assert opening(prompt="a", system="Be short.") != opening(prompt="a")
    assert opening(system="Be short.") is not None


@pytest.mark.parametrize("messages", [[], None, {}, "", [None, None], ["a"], [[]], [{"role": 7}]])
def test_odd_messages_are_no_error(messages: Any) -> None:
    opening(messages=messages)


@pytest.mark.parametrize("spaces", [0, 5000, 70_000])
def test_instructions_alone_are_an_opening_too(spaces: int) -> None:
    raw = b'[{"role":"system","content":"Be short."}' + b" " * spaces + b"]"
    assert opening_of({"messages": raw}) == opening_of({"messages": raw.replace(b" " * 5000, b"")})


def test_a_request_without_either_is_part_of_no_conversation() -> None:
    assert opening() is None
    assert opening_of(read_body(b'{"model":"tiny","options":{}}', CHAT).fields) is None


@pytest.mark.parametrize(
    "raw", [b"[1,", b"[1 2]", b"[", b"[1]x", b"[" + b"1," * 70_000, b"[" + b" " * 70_000 + b"]"]
)
def test_what_is_no_json_is_no_error(raw: bytes) -> None:
    opening_of({"messages": raw})
    opening_of({"messages": raw.ljust(70_000, b" ")})


@given(st.dictionaries(st.sampled_from(["messages", "input", "prompt", "system"]), st.binary(max_size=40)))
def test_nothing_is_an_error(fields: dict[str, bytes]) -> None:
    opening_of(dict(fields))


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize("depth", [10, 900, 1_100, 1_900, 5_000, 50_000])
def test_messages_of_any_depth_have_an_opening(depth: int) -> None:
    deep = nested(depth)
    for element in (deep, b'{"role":"user","content":' + deep + b"}", b'{"x":' + deep + b',"role":"user"}'):
        first = opening_of({"messages": b"[" + element + b"]"})
        assert first is not None
        assert first != opening_of({"messages": b"[0," + element + b"]"})
    assert opening_of({"messages": b"[" + deep}) is not None
