"""Requests of OpenAI clients in neutral terms; what cannot be said is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from manager.wire.errors import BadBodyError
from manager.wire.translate.chat_client import ChatClient, CompletionClient, image_of
from manager.wire.translate.codec import Untranslatable
from manager.wire.translate.hub import Conversation, Image, Message, Text, Tool, ToolCall

HI = {"role": "user", "content": "hi"}
FUNCTION: dict[str, Any] = {
    "name": "get",
    "description": "d",
    "parameters": {"type": "object"},
    "strict": True,
}


def read(*, stream: bool = False, **fields: Any) -> Conversation:
    return ChatClient().read({"model": "m", "messages": [HI], "stream": stream, **fields}, stream=stream)


def completion(*, stream: bool = False, **fields: Any) -> Conversation:
    return CompletionClient().read({"model": "m", "prompt": "hi", **fields}, stream=stream)


def messages(*given: dict[str, Any]) -> tuple[Message, ...]:
    return read(messages=list(given)).messages


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def test_a_plain_request() -> None:
    expected = Conversation("m", (Message("user", (Text("hi"),)),), stream=False, wants_usage=True)

    assert read() == expected
    assert read(stream=True) == Conversation("m", expected.messages, stream=True)
    assert completion() == Conversation(
        "m", expected.messages, stream=False, wants_usage=True, completes=True
    )


BOTH: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sampling": (
        {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": -1},
        {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": -1},
    ),
    "penalties": (
        {"frequency_penalty": -0.5, "presence_penalty": 2},
        {"frequency_penalty": -0.5, "presence_penalty": 2},
    ),
    "one stop": ({"stop": "a"}, {"stop": ("a",)}),
    "stops": ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
    "an empty stop": ({"stop": ""}, {}),
    "max_tokens": ({"max_tokens": 5}, {"max_tokens": 5}),
    "user": ({"user": "u"}, {"user": "u"}),
    "user for safety": ({"safety_identifier": "s"}, {"user": "s"}),
    "one answer": ({"n": 1, "logit_bias": {}, "logprobs": None}, {}),
    "hints": ({"metadata": {"a": "b"}, "store": True, "service_tier": "flex", "prompt_cache_key": "k"}, {}),
    "options of no stream": ({"stream_options": {"include_obfuscation": False}}, {}),
}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the newer limit": ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_tokens": 6}),
    "no thinking": ({"reasoning_effort": "none"}, {"think": False}),
    "minimal thinking": ({"reasoning_effort": "minimal"}, {"think": "low"}),
    "most thinking": ({"reasoning_effort": "xhigh"}, {"think": "max"}),
    "reasoning of Ollama": ({"reasoning": {"effort": "high"}, "reasoning_effort": "low"}, {"think": "high"}),
    "no effort": ({"reasoning": {}}, {"think": None}),
    "text": ({"response_format": {"type": "text"}}, {}),
    "json": ({"response_format": {"type": "json_object"}}, {"schema": {}}),
    "schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "array"}},
            }
        },
        {"schema": {"type": "array"}},
    ),
    "tools": (
        {"tools": [{"type": "function", "function": FUNCTION}, {"function": {"name": "put"}}]},
        {"tools": (Tool("get", "d", {"type": "object"}, is_strict=True), Tool("put", "", {}))},
    ),
    "auto": ({"tool_choice": "auto"}, {"tool_choice": "auto"}),
    "required": ({"tool_choice": "required"}, {"tool_choice": "required"}),
    "one tool": (
        {"tool_choice": {"type": "function", "function": {"name": "get"}}},
        {"tool_choice": "tool:get"},
    ),
    "one call": ({"parallel_tool_calls": False}, {"parallel_calls": False}),
    "neutral values": (
        {"modalities": ["text"], "verbosity": "medium", "logprobs": False, "top_logprobs": 0},
        {},
    ),
}


@pytest.mark.parametrize("case", [*BOTH, *SETTINGS])
def test_a_setting_of_a_chat_is_read(case: str) -> None:
    given, expected = {**BOTH, **SETTINGS}[case]
    check(read(**given), read(), expected)


@pytest.mark.parametrize("case", BOTH)
def test_a_setting_of_a_completion_is_read(case: str) -> None:
    given, expected = BOTH[case]
    check(completion(**given, best_of=1, echo=False, suffix=""), completion(), expected)


def check(found: Conversation, plain: Conversation, expected: dict[str, Any]) -> None:
    for name in Conversation.__dataclass_fields__:
        assert getattr(found, name) == expected.get(name, getattr(plain, name)), name


def test_a_stream_ends_with_the_usage_where_it_was_asked_for() -> None:
    assert read(stream=True, stream_options={"include_usage": True}).wants_usage
    assert not read(stream=True, stream_options={"include_usage": False}).wants_usage
    assert completion(stream=True, stream_options={"include_usage": True}).wants_usage


def test_the_roles() -> None:
    text = [{"type": "text", "text": "b"}]

    assert messages(
        {"role": "system", "content": "a"},
        {"role": "developer", "content": text},
        {"role": "user", "content": "c", "name": "bob"},
        {"role": "assistant", "content": text, "refusal": "no", "reasoning": "r", "annotations": []},
        {"role": "assistant", "reasoning_content": "s"},
    ) == (
        Message("system", (Text("a"),)),
        Message("system", (Text("b"),)),
        Message("user", (Text("c"),)),
        Message("assistant", (Text("b"), Text("no")), thinking="r"),
        Message("assistant", (), thinking="s"),
    )


def test_calls_and_their_results() -> None:
    call = {"id": "c1", "type": "function", "index": 0, "function": {"name": "get", "arguments": "{}"}}

    assert messages(
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "name": "put", "content": [{"type": "text", "text": "2"}]},
    ) == (
        Message("assistant", (), (ToolCall("c1", "get", "{}"),)),
        Message("tool", (Text("1"),), call_id="c1", tool_name="get"),
        Message("tool", (Text("2"),), call_id="c2", tool_name="put"),
    )


IMAGES = {
    "data:image/png;base64,iVBORw0KGgo=": Image("image/png", data="iVBORw0KGgo="),
    "data:image/svg+xml;charset=utf-8;base64,PA==": Image("image/svg+xml", data="PA=="),
    "data:;base64,iVBORw0KGgo=": Image("", data="iVBORw0KGgo="),
    "https://example.com/a.png": Image("", url="https://example.com/a.png"),
    "http://example.com/a.png": Image("", url="http://example.com/a.png"),
}


@pytest.mark.parametrize("url", IMAGES)
def test_images_come_by_url_or_in_it(url: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}

    assert messages(user({"type": "text", "text": "what"}, part))[0].parts == (Text("what"), IMAGES[url])


@pytest.mark.parametrize("url", ["file:///etc/passwd", "data:image/png,abc", "iVBORw0KGgo="])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(BadBodyError, match=r"^at must be an http, https or data URL"):
        image_of(url, "at")


def test_a_prompt_may_come_in_a_list_of_one() -> None:
    assert completion(prompt=["hi"]) == completion()


NOT_JSON_SCHEMA = "response_format.json_schema.schema is missing: an object is required"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages has no message"),
    "no role": (
        {"messages": [{"content": "a"}]},
        "messages[0].role must be system, developer, user, assistant or tool, not null",
    ),
    "content": (
        {"messages": [{"role": "user", "content": 1}]},
        "messages[0].content must be a string or a list of parts, not 1",
    ),
    "no id": (
        {"messages": [{"role": "tool", "content": "a"}]},
        "messages[0].tool_call_id is missing: a string is required",
    ),
    "no function": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]},
        "messages[0].tool_calls[0].function.name is missing: a string is required",
    ),
    "no url": (
        {"messages": [user({"type": "image_url"})]},
        "messages[0].content[0].image_url.url is missing: a string is required",
    ),
    "stop": ({"stop": [1]}, "stop must be a string or a list of strings, not a list"),
    "stop of another kind": ({"stop": 1}, "stop must be a string or a list of strings, not 1"),
    "tool without a name": (
        {"tools": [{"type": "function"}]},
        "tools[0].function.name is missing: a string is required",
    ),
    "choice": (
        {"tool_choice": "get"},
        'tool_choice must be auto, none, required or an object that names a function, not "get"',
    ),
    "choice without a name": (
        {"tool_choice": {}},
        "tool_choice.function.name is missing: a string is required",
    ),
    "no schema": ({"response_format": {"type": "json_schema"}}, NOT_JSON_SCHEMA),
    "an empty schema": ({"response_format": {"type": "json_schema", "json_schema": {}}}, NOT_JSON_SCHEMA),
    "effort": (
        {"reasoning_effort": "extreme"},
        'reasoning_effort must be one of none, minimal, low, medium, high, xhigh, max, not "extreme"',
    ),
}
CANNOT = " cannot be passed on to a server of another dialect: "
UNSAYABLE: dict[str, tuple[dict[str, Any], str]] = {
    "functions": ({"functions": []}, f"functions{CANNOT}use tools and tool_choice"),
    "function_call": ({"function_call": "auto"}, f"function_call{CANNOT}use tools and tool_choice"),
    "an old call": (
        {"messages": [{"role": "assistant", "function_call": {}}]},
        f"messages[0].function_call{CANNOT}use tool_calls",
    ),
    "an old result": (
        {"messages": [{"role": "function", "name": "a", "content": "a"}]},
        f'messages[0].role: "function"{CANNOT}use the role tool',
    ),
    "answers": ({"n": 2}, f"n: 2{CANNOT}leave it out"),
    "logprobs": ({"logprobs": True}, f"logprobs: true{CANNOT}leave it out"),
    "bias": ({"logit_bias": {"1": 5}}, f"logit_bias: an object{CANNOT}leave it out"),
    "audio": ({"modalities": ["text", "audio"]}, f"modalities: a list{CANNOT}leave it out"),
    "another tool": (
        {"tools": [{"type": "custom", "custom": {"name": "a"}}]},
        f'tools[0].type: "custom"{CANNOT}possible is function',
    ),
    "another choice": (
        {"tool_choice": {"type": "allowed_tools"}},
        f'tool_choice.type: "allowed_tools"{CANNOT}possible is function',
    ),
    "a sound": (
        {"messages": [user({"type": "input_audio", "input_audio": {}})]},
        f'messages[0].content[0].type: "input_audio"{CANNOT}possible are text, image_url',
    ),
    "an image of the system": (
        {"messages": [{"role": "system", "content": [{"type": "image_url"}]}]},
        f'messages[0].content[0].type: "image_url"{CANNOT}possible are text',
    ),
    "an option of streams": (
        {"stream_options": {"continuous_usage_stats": True}},
        f"stream_options.continuous_usage_stats{CANNOT}leave it out",
    ),
    "search": ({"web_search_options": {}}, f"web_search_options{CANNOT}leave it out"),
}
UNSAYABLE_OF_COMPLETIONS: dict[str, tuple[dict[str, Any], str]] = {
    "echo": ({"echo": True}, f"echo: true{CANNOT}leave it out"),
    "suffix": ({"suffix": "a"}, f'suffix: "a"{CANNOT}leave it out'),
    "best_of": ({"best_of": 2}, f"best_of: 2{CANNOT}leave it out"),
    "logprobs": ({"logprobs": 0}, f"logprobs{CANNOT}leave it out"),
    "tokens": ({"prompt": [1, 2]}, f"prompt: a list{CANNOT}send one string"),
    "a list of tokens": ({"prompt": [[1, 2]]}, f"prompt: a list{CANNOT}send one string"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named(case: str) -> None:
    given, message = WRONG[case]

    with pytest.raises(BadBodyError) as raised:
        read(**given)

    assert str(raised.value) == message


@pytest.mark.parametrize("prompt", [None, "", 1, [1]])
def test_a_completion_needs_a_prompt(prompt: Any) -> None:
    with pytest.raises(BadBodyError, match=r"^prompt must be a string, not "):
        completion(prompt=prompt)


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_no_other_server_takes_is_refused_by_its_name(case: str) -> None:
    given, message = UNSAYABLE[case]

    with pytest.raises(Untranslatable) as raised:
        read(**given)

    assert str(raised.value) == message


@pytest.mark.parametrize("case", UNSAYABLE_OF_COMPLETIONS)
def test_what_no_other_server_completes_is_refused_by_its_name(case: str) -> None:
    given, message = UNSAYABLE_OF_COMPLETIONS[case]

    with pytest.raises(Untranslatable) as raised:
        completion(**given)

    assert str(raised.value) == message
