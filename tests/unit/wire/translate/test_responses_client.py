"""Requests to /v1/responses in neutral terms; what cannot be said is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from manager.wire.errors import BadBodyError
from manager.wire.translate.codec import Untranslatable
from manager.wire.translate.hub import Conversation, Image, Message, Text, Tool, ToolCall
from manager.wire.translate.responses_client import ResponsesClient


def read(**fields: Any) -> Conversation:
    return ResponsesClient().read({"model": "m", "input": "hi", "stream": False, **fields}, stream=False)


def items(*given: Any) -> tuple[Message, ...]:
    return read(input=list(given)).messages


def test_a_plain_request() -> None:
    assert read() == Conversation("m", (Message("user", (Text("hi"),)),), stream=False, wants_usage=True)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sampling": ({"temperature": 1.5, "top_p": 0.9}, {"temperature": 1.5, "top_p": 0.9}),
    "limit": ({"max_output_tokens": 5}, {"max_tokens": 5}),
    "user": ({"user": "u"}, {"user": "u"}),
    "user for safety": ({"safety_identifier": "s"}, {"user": "s"}),
    "effort": ({"reasoning": {"effort": "low", "summary": "auto"}}, {"think": "low"}),
    "text": ({"text": {"format": {"type": "text"}, "verbosity": "medium"}}, {}),
    "no format": ({"text": {}}, {}),
    "json": ({"text": {"format": {"type": "json_object"}}}, {"schema": {}}),
    "schema": (
        {
            "text": {
                "format": {"type": "json_schema", "name": "a", "strict": True, "schema": {"type": "array"}}
            }
        },
        {"schema": {"type": "array"}},
    ),
    "tools": (
        {
            "tools": [
                {
                    "type": "function",
                    "name": "get",
                    "description": "d",
                    "parameters": {"type": "object"},
                    "strict": True,
                },
                {"type": "function", "name": "put", "parameters": None, "strict": None},
            ]
        },
        {"tools": (Tool("get", "d", {"type": "object"}, is_strict=True), Tool("put", "", {}))},
    ),
    "auto": ({"tool_choice": "auto"}, {"tool_choice": "auto"}),
    "one tool": ({"tool_choice": {"type": "function", "name": "get"}}, {"tool_choice": "tool:get"}),
    "one call": ({"parallel_tool_calls": False}, {"parallel_calls": False}),
    "hints": (
        {
            "store": True,
            "metadata": {},
            "include": ["reasoning.encrypted_content"],
            "stream_options": {"include_obfuscation": False},
            "truncation": "disabled",
            "background": False,
        },
        {},
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting_is_read(case: str) -> None:
    given, expected = SETTINGS[case]
    conversation = read(**given)
    plain = read()

    for name in Conversation.__dataclass_fields__:
        assert getattr(conversation, name) == expected.get(name, getattr(plain, name)), name


def test_instructions_come_first() -> None:
    assert read(instructions="be brief").messages[0] == Message("system", (Text("be brief"),))


def test_messages_with_texts_and_images() -> None:
    parts = [
        {"type": "input_text", "text": "what"},
        {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo=", "detail": "auto"},
    ]

    assert items(
        {"type": "message", "role": "developer", "content": "a"},
        {"role": "system", "content": [{"type": "input_text", "text": "b"}]},
        {"role": "user", "content": parts},
        {"role": "user"},
    ) == (
        Message("system", (Text("a"),)),
        Message("system", (Text("b"),)),
        Message("user", (Text("what"), Image("image/png", data="iVBORw0KGgo="))),
        Message("user", ()),
    )


def test_the_items_of_one_turn_are_one_message_of_the_assistant() -> None:
    text = {"type": "output_text", "text": "let me see", "annotations": [], "logprobs": []}

    assert items(
        {"role": "user", "content": "hi"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [{"type": "summary_text", "text": "h"}, {"type": "summary_text", "text": "m"}],
            "encrypted_content": "sig",
            "status": "completed",
        },
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [text]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "get", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "put", "arguments": '{"a":1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c3", "output": [{"type": "input_text", "text": "3"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "all of it"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"type": "reasoning", "summary": [], "encrypted_content": "s2"},
    ) == (
        Message("user", (Text("hi"),)),
        Message(
            "assistant",
            (Text("let me see"),),
            (ToolCall("c1", "get", "{}"), ToolCall("c2", "put", '{"a":1}')),
            thinking="hm",
            signature="sig",
        ),
        Message("tool", (Text("1"),), call_id="c1", tool_name="get"),
        Message("tool", (Text("3"),), call_id="c3"),
        Message("assistant", (Text("no"),), thinking="all of it"),
        Message("assistant", (), signature="s2"),
    )


CANNOT = " cannot be passed on to a server of another dialect: "
NO_SCHEMA = "text.format.schema is missing: an object is required"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input": None}, "input must be a string or a list of items, not null"),
    "empty input": ({"input": ""}, 'input must be a string or a list of items, not ""'),
    "no items": ({"input": []}, "input must be a string or a list of items, not a list"),
    "an item": ({"input": ["hi"]}, 'input[0] must be an object, not "hi"'),
    "no role": (
        {"input": [{"content": "a"}]},
        "input[0].role must be one of user, assistant, system, developer, not null",
    ),
    "content": (
        {"input": [{"role": "user", "content": 1}]},
        "input[0].content must be a string or a list of parts, not 1",
    ),
    "choice": (
        {"tool_choice": "get"},
        'tool_choice must be auto, none, required or an object that names a function, not "get"',
    ),
    "no schema": ({"text": {"format": {"type": "json_schema"}}}, NO_SCHEMA),
}
ITEMS = "message, function_call, function_call_output, reasoning"
UNSAYABLE: dict[str, tuple[dict[str, Any], str]] = {
    "earlier": ({"previous_response_id": "r"}, f"previous_response_id{CANNOT}leave it out"),
    "conversation": ({"conversation": "c"}, f"conversation{CANNOT}leave it out"),
    "background": ({"background": True}, f"background: true{CANNOT}leave it out"),
    "truncation": ({"truncation": "auto"}, f'truncation: "auto"{CANNOT}leave it out'),
    "include": (
        {"include": ["reasoning.encrypted_content", "message.output_text.logprobs"]},
        f'include[1]: "message.output_text.logprobs"{CANNOT}possible is reasoning.encrypted_content',
    ),
    "verbosity": ({"text": {"verbosity": "low"}}, f'text.verbosity: "low"{CANNOT}leave it out'),
    "a tool of the server": (
        {"tools": [{"type": "web_search"}]},
        f'tools[0].type: "web_search"{CANNOT}possible is function',
    ),
    "another choice": (
        {"tool_choice": {"type": "web_search"}},
        f'tool_choice.type: "web_search"{CANNOT}possible is function',
    ),
    "another item": (
        {"input": [{"type": "item_reference", "id": "i"}]},
        f'input[0].type: "item_reference"{CANNOT}possible are {ITEMS}',
    ),
    "a file": (
        {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
        f'input[0].content[0].type: "input_file"{CANNOT}possible are input_text, output_text, input_image',
    ),
    "an image of the system": (
        {"input": [{"role": "system", "content": [{"type": "input_image"}]}]},
        f'input[0].content[0].type: "input_image"{CANNOT}possible are input_text, output_text',
    ),
    "a kept image": (
        {
            "input": [
                {
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": "http://a", "file_id": "f"}],
                }
            ]
        },
        f"input[0].content[0].file_id{CANNOT}leave it out",
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
