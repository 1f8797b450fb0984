"""Requests to an Anthropic server; what its API has no field for is refused by its name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.errors import BadBodyError
from manager.wire.translate.anthropic_client import MessagesClient
from manager.wire.translate.anthropic_server import MessagesServer
from manager.wire.translate.codec import DEFAULT_TRAITS, Traits, Untranslatable
from manager.wire.translate.hub import Conversation, Image, Message, Text, Tool, ToolCall

HI = Message("user", (Text("hi"),))
PLAIN = Conversation("claude-opus-4-6", (HI,), stream=False)
OLD = "claude-sonnet-4-5-20250929"
PNG = "iVBORw0KGgoAAAAA"
GET = Tool("get", "d", {"type": "object"})


def document(asked: Conversation, traits: Traits = DEFAULT_TRAITS) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(MessagesServer(traits).document(asked)))
    return found


def turns(*messages: Message) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document(replace(PLAIN, messages=messages))["messages"]
    return found


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def test_a_plain_request() -> None:
    assert document(PLAIN) == {
        "model": "claude-opus-4-6",
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": [text("hi")]}],
        "stream": False,
    }


BUDGET = {"type": "enabled", "budget_tokens": 8192}
ADAPTIVE = {"type": "adaptive", "display": "summarized"}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "limit": ({"max_tokens": 5}, {"max_tokens": 5}),
    "sampling": (
        {"temperature": 0, "top_p": 0.9, "top_k": 40},
        {"temperature": 0, "top_p": 0.9, "top_k": 40},
    ),
    "settings that are off": ({"min_p": 0, "frequency_penalty": 0, "presence_penalty": 0}, {}),
    "stop": ({"stop": ("a", "b")}, {"stop_sequences": ["a", "b"]}),
    "user": ({"user": "u"}, {"metadata": {"user_id": "u"}}),
    "stream": ({"stream": True, "wants_usage": True}, {"stream": True}),
    "tools": (
        {"tools": (GET, Tool("put", "", {}, is_strict=True))},
        {
            "tools": [
                {"name": "get", "description": "d", "input_schema": {"type": "object"}},
                {"name": "put", "input_schema": {"type": "object", "properties": {}}, "strict": True},
            ]
        },
    ),
    "auto without tools": ({"tool_choice": "auto"}, {}),
    "none without tools": ({"tool_choice": "none"}, {}),
    "one call without tools": ({"parallel_calls": False}, {}),
    "any without tools": ({"tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
    "thinking": ({"think": True}, {"thinking": ADAPTIVE}),
    "a degree of thinking": ({"think": "max"}, {"thinking": ADAPTIVE, "output_config": {"effort": "max"}}),
    "no thinking": ({"think": False}, {"thinking": {"type": "disabled"}}),
    "no thinking of an old model": ({"model": OLD, "think": False}, {"thinking": {"type": "disabled"}}),
    "thinking of an old model": (
        {"model": OLD, "think": True, "max_tokens": 30_000},
        {"thinking": BUDGET},
    ),
    "least thinking of an old model": (
        {"model": OLD, "think": "low", "max_tokens": 1025},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    ),
    "half of the limit": (
        {"model": OLD, "think": "high"},
        {"max_tokens": 4096, "thinking": {"type": "enabled", "budget_tokens": 2048}},
    ),
    "thinking of another maker's model": (
        {"model": "deepseek-chat", "think": True, "max_tokens": 30_000},
        {"thinking": BUDGET},
    ),
    "schema": (
        {"schema": {"type": "array"}},
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "array"}}}},
    ),
}
CHOICES: dict[str, tuple[str | None, bool | None, dict[str, Any] | None]] = {
    "nothing": (None, None, None),
    "many calls": (None, True, None),
    "one call": (None, False, {"type": "auto", "disable_parallel_tool_use": True}),
    "auto": ("auto", None, {"type": "auto"}),
    "any": ("required", False, {"type": "any", "disable_parallel_tool_use": True}),
    "none": ("none", False, {"type": "none"}),
    "one tool": ("tool:get", None, {"type": "tool", "name": "get"}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_is_written(case: str) -> None:
    given, expected = SETTINGS[case]
    asked = replace(PLAIN, **given)

    plain = replace(PLAIN, model=asked.model, max_tokens=asked.max_tokens)

    assert document(asked) == {**document(plain), **expected}


@pytest.mark.parametrize("case", CHOICES)
def test_a_choice_of_tools_is_written(case: str) -> None:
    choice, parallel, expected = CHOICES[case]
    asked = replace(PLAIN, tools=(GET,), tool_choice=choice, parallel_calls=parallel)

    assert document(asked).get("tool_choice") == expected


@pytest.mark.parametrize(
    ("model", "thinking"),
    [
        ("claude-3-7-sonnet-20250219", "enabled"),
        ("claude-3-7-sonnet-latest", "enabled"),
        ("claude-opus-4-20250514", "enabled"),
        ("claude-sonnet-4-0", "enabled"),
        ("claude-opus-4-1-20250805", "enabled"),
        ("claude-haiku-4-5@20251001", "enabled"),
        ("claude-opus-4-5", "enabled"),
        ("claude-opus-4-6", "adaptive"),
        ("claude-sonnet-4-6-20260217", "adaptive"),
        ("claude-opus-4-7", "adaptive"),
        ("claude-sonnet-5", "adaptive"),
        ("claude-fable-5-1", "adaptive"),
        ("claude-opus-5-5-20261001", "adaptive"),
    ],
)
def test_models_up_to_4_5_think_within_a_budget(model: str, thinking: str) -> None:
    assert document(replace(PLAIN, model=model, think=True))["thinking"]["type"] == thinking


def test_the_limit_of_the_server_counts_where_the_client_names_none() -> None:
    assert document(PLAIN, Traits(max_tokens=77))["max_tokens"] == 77


def test_system_prompts_come_first_wherever_they_were() -> None:
    later = Message("system", (Text("b"), Text("")))
    found = document(replace(PLAIN, messages=(Message("system", (Text("a"),)), HI, later)))

    assert found["system"] == [text("a"), text("b")]
    assert found["messages"] == [{"role": "user", "content": [text("hi")]}]


def test_messages_of_one_role_are_one_turn() -> None:
    assert turns(
        HI,
        Message("user", (Text(""), Text("there"))),
        Message("assistant", (Text("a"),)),
        Message("assistant", ()),
        Message("assistant", (Text("b"),)),
    ) == [
        {"role": "user", "content": [text("hi"), text("there")]},
        {"role": "assistant", "content": [text("a"), text("b")]},
    ]


def test_calls_and_their_results() -> None:
    calls = (ToolCall("functions.get:0", "get", '{"a":1}'), ToolCall("c2", "put", ""))

    assert turns(
        HI,
        Message("assistant", (Text("let me see"),), calls, thinking="hmm", signature="sig"),
        Message("tool", (Text("1"),), call_id="functions.get:0"),
        Message("tool", (Image("", data=PNG),), call_id="c2", is_error=True),
        Message("user", (Text("go on"),)),
    )[1:] == [
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hmm", "signature": "sig"},
                text("let me see"),
                {"type": "tool_use", "id": "functions_get_0", "name": "get", "input": {"a": 1}},
                {"type": "tool_use", "id": "c2", "name": "put", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "functions_get_0", "content": [text("1")]},
                {
                    "type": "tool_result",
                    "tool_use_id": "c2",
                    "content": [
                        {
                            "type": "image",
                            "source": {"type": "base64", "media_type": "image/png", "data": PNG},
                        }
                    ],
                    "is_error": True,
                },
                text("go on"),
            ],
        },
    ]


def test_thinking_without_a_signature_is_left_out() -> None:
    assert turns(HI, Message("assistant", (Text("a"),), thinking="hmm"))[1]["content"] == [text("a")]


def test_images_by_url_and_with_a_known_type() -> None:
    (turn,) = turns(Message("user", (Image("", url="https://a"), Image("image/webp", data="UklG"))))

    assert [block["source"] for block in turn["content"]] == [
        {"type": "url", "url": "https://a"},
        {"type": "base64", "media_type": "image/webp", "data": "UklG"},
    ]


def test_an_old_model_goes_on_after_calls_only_from_thinking_that_it_has_signed() -> None:
    call = Message("assistant", (), (ToolCall("c1", "get", "{}"),), thinking="hmm")
    result = Message("tool", (Text("1"),), call_id="c1")
    asked = replace(PLAIN, model=OLD, think=True, messages=(HI, call, result))

    assert "thinking" not in document(asked)
    assert "thinking" in document(replace(asked, messages=(HI, replace(call, signature="s"), result)))
    assert "thinking" in document(replace(asked, messages=(HI, call, result, HI)))
    assert "thinking" not in document(replace(asked, messages=(HI, result)))
    assert "thinking" in document(replace(asked, model="claude-opus-4-6"))


def test_objects_of_a_schema_have_no_other_properties() -> None:
    inner = {"type": "object", "properties": {"type": {"type": "string", "default": {"type": "object"}}}}
    schema = {
        "type": "object",
        "properties": {"a": inner, "b": {"anyOf": [{"type": "object"}, {"type": "null"}]}},
        "required": ["a"],
        "$defs": {"c": {"type": "object", "additionalProperties": {"type": "string"}}},
    }
    closed = document(replace(PLAIN, schema=schema))["output_config"]["format"]["schema"]

    assert closed == {
        "type": "object",
        "properties": {
            "a": {**inner, "additionalProperties": False},
            "b": {"anyOf": [{"type": "object", "additionalProperties": False}, {"type": "null"}]},
        },
        "required": ["a"],
        "$defs": {"c": {"type": "object", "additionalProperties": {"type": "string"}}},
        "additionalProperties": False,
    }


LEAVE = "an Anthropic server has no such setting: leave it out"
MEDIA = "an image must be one of image/gif, image/jpeg, image/png, image/webp for an Anthropic server"
UNSAYABLE: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": 1.5}, "temperature: an Anthropic server takes 0 to 1, not 1.5"),
    "min_p": ({"min_p": 0.1}, f"min_p: {LEAVE}"),
    "frequency_penalty": ({"frequency_penalty": 1}, f"frequency_penalty: {LEAVE}"),
    "presence_penalty": ({"presence_penalty": -1}, f"presence_penalty: {LEAVE}"),
    "seed": ({"seed": 0}, f"seed: {LEAVE}"),
    "json": ({"schema": {}}, "an Anthropic server makes JSON only after a JSON Schema: name one"),
    "stop": ({"stop": ("a", "\n")}, "stop: an Anthropic server takes no stop sequence of white space alone"),
    "thinking": (
        {"model": OLD, "think": "low", "max_tokens": 1024},
        "thinking takes at least 1024 tokens at this model: max_tokens must be larger, not 1024",
    ),
    "an image of the system": (
        {"messages": (Message("system", (Image("", url="http://a"),)), HI)},
        "an Anthropic server takes no image in a message of the role system",
    ),
    "an image of the assistant": (
        {"messages": (HI, Message("assistant", (Image("", url="http://a"),)))},
        "an Anthropic server takes no image in a message of the role assistant",
    ),
    "a type of image": (
        {"messages": (Message("user", (Image("image/bmp", data="Qk0="),)),)},
        f"{MEDIA}, not image/bmp",
    ),
    "no type of image": (
        {"messages": (Message("user", (Image("", data="AAAA"),)),)},
        f"{MEDIA}, not of an unknown type",
    ),
}


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_the_server_does_not_take_is_refused_by_its_name(case: str) -> None:
    given, message = UNSAYABLE[case]

    with pytest.raises(Untranslatable) as raised:
        document(replace(PLAIN, **given))

    assert str(raised.value) == message


@pytest.mark.parametrize("arguments", ["[]", "{", "1"])
def test_arguments_must_be_an_object(arguments: str) -> None:
    call = Message("assistant", (), (ToolCall("c1", "get", arguments),))

    with pytest.raises(BadBodyError, match="the arguments of the call c1 of get must be a JSON object"):
        turns(HI, call)


def test_a_request_without_content_is_refused() -> None:
    with pytest.raises(BadBodyError, match="messages has no message with content"):
        turns(Message("user", (Text(""),)), Message("system", (Text("a"),)))


_TEXT = st.text(min_size=1, max_size=5).map(Text)
_PART = st.one_of(_TEXT, st.just(Image("image/png", data=PNG)), st.just(Image("", url="https://a")))
_PARTS = st.lists(_PART, min_size=1, max_size=3).map(tuple)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Conversations as an Anthropic client can say them: turns follow each other, calls have results."""
    messages = [Message("system", tuple(draw(st.lists(_TEXT, min_size=1, max_size=2))))] * draw(st.booleans())
    for at in range(draw(st.integers(0, 3))):
        messages.append(Message("user", draw(_PARTS)))
        signed = draw(st.booleans())
        calls = tuple(ToolCall(f"c{at}_{n}", "get", '{"a":1}') for n in range(draw(st.integers(0, 2))))
        said = tuple(draw(st.lists(_TEXT, min_size=1, max_size=2)))
        thinking, signature = ("hmm", "sig") if signed else ("", "")
        messages.append(Message("assistant", said, calls, thinking=thinking, signature=signature))
        for call in calls:
            parts = tuple(draw(st.lists(_PART, max_size=2)))
            result = Message("tool", parts, call_id=call.id, tool_name=call.name)
            messages.append(replace(result, is_error=draw(st.booleans())))
        if calls:
            messages += [Message("user", draw(_PARTS)), Message("assistant", said)]
    return Conversation(
        "claude-opus-4-6",
        (*messages, Message("user", draw(_PARTS))),
        stream=draw(st.booleans()),
        tools=draw(st.sampled_from([(), (GET,)])),
        max_tokens=draw(st.integers(1, 9999)),
        temperature=draw(st.none() | st.floats(0, 1)),
        top_p=draw(st.none() | st.floats(0, 1)),
        top_k=draw(st.none() | st.integers(0, 99)),
        stop=tuple(draw(st.lists(st.sampled_from(["a", "b"]), max_size=2))),
        think=draw(st.sampled_from([None, False, True, "low", "medium", "high", "max"])),
        schema=draw(st.sampled_from([None, {"type": "array"}])),
        user=draw(st.none() | st.just("u")),
        wants_usage=True,
    )


@given(conversations())
def test_what_the_server_gets_is_what_an_anthropic_client_would_have_said(asked: Conversation) -> None:
    assert MessagesClient().read(document(asked), stream=asked.stream) == asked
