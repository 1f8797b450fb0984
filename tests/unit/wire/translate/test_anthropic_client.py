"""Requests of Anthropic clients in neutral terms; what cannot be said is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from manager.wire.errors import BadBodyError
from manager.wire.translate.anthropic_client import MessagesClient
from manager.wire.translate.codec import Untranslatable
from manager.wire.translate.hub import Conversation, Image, Message, Text, Tool, ToolCall

HI = {"role": "user", "content": "hi"}
PNG = "iVBORw0KGgo="
CACHED = {"cache_control": {"type": "ephemeral"}}


def read(**fields: Any) -> Conversation:
    return MessagesClient().read({"model": "m", "max_tokens": 4096, "messages": [HI], **fields}, stream=False)


def messages(*given: dict[str, Any], **fields: Any) -> tuple[Message, ...]:
    return read(messages=list(given), **fields).messages


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def image(**source: Any) -> dict[str, Any]:
    return {"type": "image", "source": source}


def test_a_plain_request() -> None:
    assert read() == Conversation(
        "m", (Message("user", (Text("hi"),)),), stream=False, max_tokens=4096, wants_usage=True
    )


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature": ({"temperature": 0.5}, {"temperature": 0.5}),
    "top_p": ({"top_p": 0.9}, {"top_p": 0.9}),
    "top_k": ({"top_k": 40}, {"top_k": 40}),
    "stop sequences": ({"stop_sequences": ["a", "b"]}, {"stop": ("a", "b")}),
    "user": ({"metadata": {"user_id": "u"}}, {"user": "u"}),
    "no user": ({"metadata": {"user_id": None}}, {"user": None}),
    "auto": ({"tool_choice": {"type": "auto"}}, {"tool_choice": "auto"}),
    "any": ({"tool_choice": {"type": "any"}}, {"tool_choice": "required"}),
    "none": ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
    "one tool": ({"tool_choice": {"type": "tool", "name": "get"}}, {"tool_choice": "tool:get"}),
    "one call": (
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        {"tool_choice": "auto", "parallel_calls": False},
    ),
    "many calls": (
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": False}},
        {"tool_choice": "auto", "parallel_calls": None},
    ),
    "schema": (
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {"schema": {"type": "object"}},
    ),
    "effort": ({"output_config": {"effort": "xhigh"}}, {"think": "max"}),
    "no thinking": ({"thinking": {"type": "disabled"}, "output_config": {"effort": "low"}}, {"think": False}),
    "adaptive": ({"thinking": {"type": "adaptive", "display": "summarized"}}, {"think": True}),
    "adaptive with effort": (
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
        {"think": "low"},
    ),
    "a small budget": ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"think": "low"}),
    "a medium budget": (
        {"max_tokens": 20_000, "thinking": {"type": "enabled", "budget_tokens": 4096}},
        {"max_tokens": 20_000, "think": "medium"},
    ),
    "a large budget": (
        {"max_tokens": 20_000, "thinking": {"type": "enabled", "budget_tokens": 16_384}},
        {"max_tokens": 20_000, "think": "high"},
    ),
    "a budget with effort": (
        {"thinking": {"type": "enabled", "budget_tokens": 2048}, "output_config": {"effort": "high"}},
        {"think": "high"},
    ),
    "hints": (
        {**CACHED, "service_tier": "auto", "diagnostics": {}, "user_profile_id": "p", "speed": "standard"},
        {},
    ),
    "an edit without effect": ({"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}, {}),
    "tools": (
        {
            "tools": [
                {
                    "name": "get",
                    "description": "d",
                    "input_schema": {"type": "object"},
                    "strict": True,
                    **CACHED,
                },
                {"type": "custom", "name": "put", "eager_input_streaming": True, "defer_loading": False},
            ]
        },
        {"tools": (Tool("get", "d", {"type": "object"}, is_strict=True), Tool("put", "", {}))},
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_is_read(case: str) -> None:
    given, expected = SETTINGS[case]
    conversation = read(**given)
    plain = read()

    for name in Conversation.__dataclass_fields__:
        assert getattr(conversation, name) == expected.get(name, getattr(plain, name)), name


def test_the_system_prompt_comes_first() -> None:
    system = [{"type": "text", "text": "a", **CACHED}, {"type": "text", "text": "b"}]

    assert messages(HI, system=system)[0] == Message("system", (Text("a"), Text("b")))
    assert messages(HI, system="a")[0] == Message("system", (Text("a"),))
    assert messages(HI, system=[])[0].role == "user"
    assert messages(HI, {"role": "system", "content": "a"})[1] == Message("system", (Text("a"),))


def test_texts_and_images_keep_their_order() -> None:
    blocks = (
        image(type="base64", media_type="image/png", data=PNG),
        {"type": "text", "text": "what", "citations": None},
        image(type="url", url="https://example.com/a.png"),
    )

    assert messages(user(*blocks)) == (
        Message(
            "user",
            (Image("image/png", data=PNG), Text("what"), Image("", url="https://example.com/a.png")),
        ),
    )


def test_a_turn_of_the_assistant_is_one_message() -> None:
    turn = {
        "role": "assistant",
        "content": [
            {"type": "redacted_thinking", "data": "x"},
            {"type": "thinking", "thinking": "first", "signature": "s"},
            {"type": "thinking", "thinking": "second", "signature": "t"},
            {"type": "text", "text": "let me see"},
            {
                "type": "tool_use",
                "id": "c1",
                "name": "get",
                "input": {"a": "ä"},
                "caller": {"type": "direct"},
            },
            {"type": "tool_use", "id": "c2", "name": "put", "input": {}, **CACHED},
        ],
    }

    assert messages(HI, turn)[1] == Message(
        "assistant",
        (Text("let me see"),),
        (ToolCall("c1", "get", '{"a":"ä"}'), ToolCall("c2", "put", "{}")),
        thinking="first\n\nsecond",
        signature="t",
    )


def test_results_of_tools_are_messages_before_what_the_user_says() -> None:
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "get", "input": {}}]}
    results = user(
        {"type": "tool_result", "tool_use_id": "c1", "content": "1"},
        {
            "type": "tool_result",
            "tool_use_id": "c2",
            "is_error": True,
            "content": [
                {"type": "text", "text": "2"},
                image(type="base64", media_type="image/gif", data="R0lG"),
            ],
        },
        {"type": "tool_result", "tool_use_id": "c3"},
        {"type": "text", "text": "go on"},
    )

    assert messages(HI, call, results)[2:] == (
        Message("tool", (Text("1"),), call_id="c1", tool_name="get"),
        Message("tool", (Text("2"), Image("image/gif", data="R0lG")), call_id="c2", is_error=True),
        Message("tool", (), call_id="c3"),
        Message("user", (Text("go on"),)),
    )


def test_results_alone_are_no_message_of_the_user() -> None:
    assert messages(HI, user({"type": "tool_result", "tool_use_id": "c", "content": "1"}))[1:] == (
        Message("tool", (Text("1"),), call_id="c"),
    )


MEDIA = "image/jpeg, image/png, image/gif, image/webp"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "max_tokens": ({"max_tokens": None}, "max_tokens is missing: a whole number of at least 1 is required"),
    "no tokens": ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, not 0"),
    "no messages": ({"messages": []}, "messages has no message"),
    "message": ({"messages": ["hi"]}, 'messages[0] must be an object, not "hi"'),
    "no role": (
        {"messages": [{"content": "a"}]},
        "messages[0].role must be user, assistant or system, not null",
    ),
    "role": (
        {"messages": [{"role": "tool", "content": "a"}]},
        'messages[0].role must be one of user, assistant, system, not "tool"',
    ),
    "content": ({"messages": [user()], "system": 1}, "system must be a string or a list of blocks, not 1"),
    "block": ({"messages": [user("a")]}, 'messages[0].content[0] must be an object, not "a"'),  # type: ignore[arg-type]
    "no type": ({"messages": [user({})]}, "messages[0].content[0].type is missing: a string is required"),
    "late result": (
        {"messages": [user({"type": "text", "text": "a"}, {"type": "tool_result", "tool_use_id": "c"})]},
        "messages[0].content[1].type: tool_result blocks must come before all others",
    ),
    "no source": (
        {"messages": [user({"type": "image"})]},
        "messages[0].content[0].source is missing: an object is required",
    ),
    "media type": (
        {"messages": [user(image(type="base64", media_type="image/bmp", data="Qk0="))]},
        f'messages[0].content[0].source.media_type must be one of {MEDIA}, not "image/bmp"',
    ),
    "no choice": (
        {"tool_choice": {"disable_parallel_tool_use": True}},
        "tool_choice.type must be auto, any, tool or none, not null",
    ),
    "no schema": (
        {"output_config": {"format": {"type": "json_schema"}}},
        "output_config.format.schema is missing: an object is required",
    ),
    "no budget": (
        {"thinking": {"type": "enabled"}},
        "thinking.budget_tokens must be a whole number from 1024 to below max_tokens, not null",
    ),
    "budget": (
        {"thinking": {"type": "enabled", "budget_tokens": 4096}},
        "thinking.budget_tokens must be a whole number from 1024 to below max_tokens, not 4096",
    ),
    "temperature": ({"temperature": 1.5}, "temperature must be a number from 0 to 1, not 1.5"),
}

CANNOT = " cannot be passed on to a server of another dialect: "
OF_ASSISTANT = "text, thinking, redacted_thinking, tool_use"
UNSAYABLE: dict[str, tuple[dict[str, Any], str]] = {
    "a tool of the server": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        f'tools[0].type: "web_search_20250305"{CANNOT}possible are tools with an input_schema',
    ),
    "a deferred tool": (
        {"tools": [{"name": "a", "defer_loading": True}]},
        f"tools[0].defer_loading: true{CANNOT}leave it out",
    ),
    "a document": (
        {"messages": [user({"type": "document", "source": {}})]},
        f'messages[0].content[0].type: "document"{CANNOT}possible are text, image, tool_result',
    ),
    "a document in a result": (
        {"messages": [user({"type": "tool_result", "tool_use_id": "c", "content": [{"type": "document"}]})]},
        f'messages[0].content[0].content[0].type: "document"{CANNOT}possible are text, image',
    ),
    "an image of the system": (
        {"system": [image(type="url", url="https://a")]},
        f'system[0].type: "image"{CANNOT}possible are text',
    ),
    "an image of the assistant": (
        {"messages": [{"role": "assistant", "content": [image(type="url", url="https://a")]}]},
        f'messages[0].content[0].type: "image"{CANNOT}possible are {OF_ASSISTANT}',
    ),
    "a kept image": (
        {"messages": [user(image(type="file", file_id="f"))]},
        f'messages[0].content[0].source.type: "file"{CANNOT}possible are base64, url',
    ),
    "citations": (
        {"messages": [user({"type": "text", "text": "a", "citations": [{}]})]},
        f"messages[0].content[0].citations: a list{CANNOT}leave it out",
    ),
    "thinking between tools": (
        {"thinking": {"type": "between_tools"}},
        f'thinking.type: "between_tools"{CANNOT}possible are enabled, disabled, adaptive',
    ),
    "another edit": (
        {"context_management": {"edits": [{"type": "compact_20260112"}]}},
        f'context_management.edits[0].type: "compact_20260112"{CANNOT}possible is clear_thinking_20251015',
    ),
    "speed": ({"speed": "fast"}, f'speed: "fast"{CANNOT}leave it out'),
    "container": ({"container": "c"}, f"container{CANNOT}leave it out"),
    "a new field of a block": (
        {"messages": [user({"type": "text", "text": "a", "mood": "good"})]},
        f"messages[0].content[0].mood{CANNOT}leave it out",
    ),
    "a new field of a message": (
        {"messages": [{**HI, "mood": "good"}]},
        f"messages[0].mood{CANNOT}leave it out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named(case: str) -> None:
    given, message = WRONG[case]

    with pytest.raises(BadBodyError) as raised:
        read(**given)

    assert str(raised.value) == message


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_no_other_server_takes_is_refused_by_its_name(case: str) -> None:
    given, message = UNSAYABLE[case]

    with pytest.raises(Untranslatable) as raised:
        read(**given)

    assert str(raised.value) == message


def test_arguments_that_nest_too_deep_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    turn = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "n", "input": deep}]}

    with pytest.raises(BadBodyError, match="nests too deep"):
        read(messages=[turn])
