"""Requests of native clients as an OpenAI server gets them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manager.domain.roles import BodyChanges
from manager.wire.body import SMALL_BYTES, BadBodyError
from manager.wire.translate import Traits, Untranslatable
from tests.support.native_clients import asked, sent

HI = [{"role": "user", "content": "hi"}]
STRICT = Traits(extended=False, max_tokens_field="max_completion_tokens")
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
PNG = "iVBORw0KGgoAAAANSUhEUg=="


def chat(**fields: Any) -> dict[str, Any]:
    return sent("/api/chat", {"messages": HI, **fields})


def added(**fields: Any) -> dict[str, Any]:
    """What a field adds to a chat at the server."""
    plain = chat()
    return {name: value for name, value in chat(**fields).items() if plain.get(name) != value}


def test_a_chat_streams_and_asks_for_the_numbers_of_tokens() -> None:
    assert chat() == {"model": "served", "messages": HI, **USAGE}


def test_a_whole_answer_is_not_asked_for_as_a_stream() -> None:
    assert chat(stream=False) == {"model": "served", "messages": HI, "stream": False}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_predict": 7}, {"max_tokens": 7}),
        ({"num_predict": 7.9}, {"max_tokens": 7}),
        ({"num_predict": -1}, {}),
        ({"num_predict": -2}, {}),
        ({"num_predict": 0}, {}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"temperature": 0.5, "top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}),
        ({"top_k": 40, "min_p": 0.05}, {"top_k": 40, "min_p": 0.05}),
        ({"top_k": 0, "min_p": 0.0}, {}),
        ({"seed": 1}, {"seed": 1}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": -1}, {}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"stop": []}, {}),
        ({"stop": None, "seed": None}, {}),
        (
            {"frequency_penalty": 1, "presence_penalty": -0.5},
            {"frequency_penalty": 1, "presence_penalty": -0.5},
        ),
        ({"presence_penalty": 1, "repeat_last_n": -1}, {"presence_penalty": 1}),
    ],
)
def test_options_have_these_words_at_the_server(options: dict[str, Any], said: dict[str, Any]) -> None:
    assert added(options=options) == said


@pytest.mark.parametrize(
    "fields",
    [
        {"keep_alive": "5m"},
        {"keep_alive": 0},
        {"truncate": True},
        {"truncate": False},
        {"shift": False},
        {"logprobs": False, "top_logprobs": 3},
        {"_debug_render_only": False},
        {"format": ""},
        {"format": None},
        {"think": None},
        {"tools": []},
        {"options": None},
        {"options": {"num_ctx": 8192, "num_gpu": 0, "num_thread": 4, "use_mmap": False, "num_keep": 5}},
        {"options": {"repeat_penalty": 1.0, "typical_p": 1, "mirostat": 0, "mirostat_tau": 5.0, "tfs_z": 1}},
        {"options": {"repeat_last_n": 64, "penalize_newline": False}},
    ],
)
def test_what_cannot_change_an_answer_is_left_out(fields: dict[str, Any]) -> None:
    assert added(**fields) == {}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"logprobs": True}, "logprobs: true"),
        ({"_debug_render_only": True}, "_debug_render_only: true"),
        ({"options": {"repeat_penalty": 1.1}}, "options.repeat_penalty: 1.1"),
        ({"options": {"typical_p": 0.5}}, "options.typical_p: 0.5"),
        ({"options": {"tfs_z": 2}}, "options.tfs_z: 2"),
        ({"options": {"mirostat": 2}}, "options.mirostat: 2"),
        ({"options": {"penalize_newline": True}}, "options.penalize_newline: true"),
        ({"options": {"presence_penalty": 1, "repeat_last_n": 64}}, "options.repeat_last_n: 64"),
        ({"options": {"new_sampler": 1}}, "options.new_sampler"),
        ({"new_field": 1}, "new_field"),
        ({"messages": []}, "a chat without messages"),
        ({"messages": None}, "a chat without messages"),
        ({"tools": [{"type": "web_search", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"messages": [{"role": "system", "images": [PNG]}]}, "messages[0]: OpenAI's API takes images from"),
        ({"messages": [{"role": "user", "images": ["aaaa"]}]}, "messages[0]: an image must be PNG, JPEG"),
        ({"messages": [{"role": "user", "images": ["!"]}]}, "messages[0]: an image must be PNG, JPEG"),
        ({"messages": [{"role": "tool", "tool_name": "f", "content": "1"}]}, 'messages[0].tool_name: "f"'),
        ({"messages": [{"role": "tool", "tool_call_id": "7"}]}, 'messages[0].tool_call_id: "7"'),
    ],
)
def test_what_the_server_has_no_word_for_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(Untranslatable) as refused:
        chat(**fields)
    assert str(refused.value).startswith(named)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": "hi"}, 'messages must be a list, not "hi"'),
        ({"messages": ["hi"]}, 'messages[0] must be an object, not "hi"'),
        (
            {"messages": [{"role": "boss"}]},
            'messages[0].role must be system, user, assistant, tool, not "boss"',
        ),
        ({"messages": [{"content": "hi"}]}, 'messages[0].role must be system, user, assistant, tool, not ""'),
        (
            {"messages": [{"role": "user", "content": ["hi"]}]},
            "messages[0].content must be a string, not a list",
        ),
        ({"messages": [{"role": "user", "images": PNG}]}, "messages[0].images must be a list"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
                ]
            },
            'messages[0].tool_calls[0].function.arguments must be an object, not "{}"',
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function.name is missing",
        ),
        ({"tools": [{}]}, "tools[0].function.name is missing"),
        ({"format": "xml"}, 'format must be "json" or a JSON Schema, not "xml"'),
        ({"format": [1]}, 'format must be "json" or a JSON Schema, not a list'),
        ({"think": "hard"}, 'think must be true, false, "low", "medium", "high" or "max", not "hard"'),
        ({"think": {}}, "think must be true"),
        ({"options": []}, "options must be an object, not a list"),
        ({"options": {"temperature": "hot"}}, "options.temperature must be a number"),
        ({"options": {"temperature": -1}}, "options.temperature must be a number"),
        ({"options": {"seed": True}}, "options.seed must be a number"),
        ({"options": {"stop": "a"}}, 'options.stop must be a list, not "a"'),
        ({"logprobs": 1}, None),
    ],
)
def test_a_wrong_value_is_shown_with_its_place(fields: dict[str, Any], named: str | None) -> None:
    with pytest.raises(BadBodyError) as refused:
        chat(**fields)
    assert named is None or str(refused.value).startswith(named)


# --- formats, thinking, tools, images -------------------------------------------------------------


def test_json_and_schemas_are_response_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert added(format="json") == {"response_format": {"type": "json_object"}}
    assert added(format=schema) == {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        }
    }


def switches(*, on: bool) -> dict[str, Any]:
    return {"chat_template_kwargs": {"enable_thinking": on, "thinking": on}}


@pytest.mark.parametrize(
    ("think", "extended", "strict"),
    [
        (False, {"reasoning_effort": "none", **switches(on=False)}, "none"),
        (True, switches(on=True), "medium"),
        ("low", {"reasoning_effort": "low", **switches(on=True)}, "low"),
        ("medium", {"reasoning_effort": "medium", **switches(on=True)}, "medium"),
        ("high", {"reasoning_effort": "high", **switches(on=True)}, "high"),
        ("max", {"reasoning_effort": "max", **switches(on=True)}, "max"),
    ],
)
def test_thinking_is_an_effort_and_a_switch_of_the_template(
    think: Any, extended: dict[str, Any], strict: str
) -> None:
    assert added(think=think) == extended
    at_openai = sent("/api/chat", {"messages": HI, "think": think}, traits=STRICT)
    assert at_openai == {"model": "served", "messages": HI, **USAGE, "reasoning_effort": strict}


def test_strict_servers_get_their_word_for_the_limit_and_no_samplers_beyond_it() -> None:
    said = sent("/api/chat", {"messages": HI, "options": {"num_predict": 9, "top_k": 0}}, traits=STRICT)
    assert said == {"model": "served", "messages": HI, **USAGE, "max_completion_tokens": 9}
    for name in ("top_k", "min_p"):
        with pytest.raises(Untranslatable, match=f"{name}: OpenAI's API has no word for it"):
            sent("/api/chat", {"messages": HI, "options": {name: 1}}, traits=STRICT)


def test_earlier_thinking_goes_to_servers_that_read_it() -> None:
    messages = [*HI, {"role": "assistant", "content": "a", "thinking": "t"}, *HI]
    plain = {"role": "assistant", "content": "a"}
    said = chat(messages=messages)
    assert said["messages"][1] == {**plain, "reasoning": "t", "reasoning_content": "t"}
    assert sent("/api/chat", {"messages": messages}, traits=STRICT)["messages"][1] == plain


def test_tools_keep_their_schema() -> None:
    parameters = {"type": "object", "properties": {"B": {"type": "string"}, "a": {}}, "required": ["B"]}
    function = {"name": "f", "description": "does f", "parameters": parameters}
    assert added(tools=[{"type": "function", "function": function}]) == {
        "tools": [{"type": "function", "function": function}]
    }
    assert added(tools=[{"function": {"name": "g", "x": 1}, "y": 2}]) == {
        "tools": [{"type": "function", "function": {"name": "g", "parameters": {}}}]
    }


def called(name: str, arguments: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {**more, "function": {"name": name, "arguments": arguments}}


def test_results_of_tools_answer_calls_by_name_and_in_order() -> None:
    said = chat(
        messages=[
            *HI,
            {"role": "assistant", "tool_calls": [called("f", {"a": 1}), called("g"), called("f", {"a": 2})]},
            {"role": "tool", "tool_name": "g", "content": "of g"},
            {"role": "tool", "tool_name": "f", "content": "of the first f"},
            {"role": "tool", "content": "of the second f"},
            {"role": "assistant", "content": "so", "tool_calls": [called("f")]},
            {"role": "TOOL", "content": "again"},
        ]
    )["messages"]
    calls = said[1]["tool_calls"]
    assert [call["id"] for call in calls] == ["call_0", "call_1", "call_2"]
    assert calls[0] == {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    assert said[1]["content"] is None
    assert said[2] == {"role": "tool", "tool_call_id": "call_1", "content": "of g"}
    assert [one["tool_call_id"] for one in said if one["role"] == "tool"] == [
        "call_1",
        "call_0",
        "call_2",
        "call_3",
    ]
    assert said[5]["content"] == "so"


def test_ids_of_calls_that_the_client_knows_are_kept() -> None:
    said = chat(
        messages=[
            {"role": "assistant", "tool_calls": [called("f", id="call_0"), called("f"), called("f", id="x")]},
            {"role": "tool", "tool_call_id": "x"},
            {"role": "tool", "tool_name": "f", "content": "1"},
        ]
    )["messages"]
    assert [call["id"] for call in said[0]["tool_calls"]] == ["call_0", "call_1", "x"]
    assert [one["tool_call_id"] for one in said[1:]] == ["x", "call_0"]
    assert said[1]["content"] == ""


def test_calls_of_earlier_messages_get_no_results_any_more() -> None:
    calls = [{"role": "assistant", "tool_calls": [called(name)]} for name in ("f", "g")]
    with pytest.raises(Untranslatable, match=r'messages\[2\].tool_name: "f"'):
        chat(messages=[*calls, {"role": "tool", "tool_name": "f"}])


def test_a_call_gets_one_result() -> None:
    with pytest.raises(Untranslatable, match=r"messages\[2\].tool_name"):
        chat(
            messages=[
                {"role": "assistant", "tool_calls": [called("f")]},
                *[{"role": "tool", "tool_name": "f"}] * 2,
            ]
        )


def test_images_go_with_their_type() -> None:
    said = chat(
        messages=[{"role": "user", "content": "what?", "images": [PNG]}, {"role": "user", "images": [PNG]}]
    )
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    assert said["messages"][0]["content"] == [{"type": "text", "text": "what?"}, image]
    assert said["messages"][1]["content"] == [image]


def test_a_message_without_content_stays() -> None:
    said = chat(messages=[{"role": "user"}, {"role": "assistant", "content": None}])["messages"]
    assert said == [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]


# --- prompts --------------------------------------------------------------------------------------


def test_a_prompt_is_a_chat_of_one_message() -> None:
    assert sent("/api/generate", {"prompt": "hi"}) == {"model": "served", "messages": HI, **USAGE}
    said = sent(
        "/api/generate",
        {
            "prompt": "hi",
            "system": "be nice",
            "images": [PNG],
            "raw": False,
            "suffix": "",
            "template": "",
            "context": [],
        },
    )
    assert said["messages"][0] == {"role": "system", "content": "be nice"}
    assert [part["type"] for part in said["messages"][1]["content"]] == ["text", "image_url"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": ""}, "an empty prompt"),
        ({"prompt": None}, "an empty prompt"),
        ({"raw": True}, "raw: true"),
        ({"suffix": "x"}, 'suffix: "x"'),
        ({"template": "{{ .Prompt }}"}, "template: "),
        ({"context": [1, 2]}, "context cannot be passed on"),
        ({"messages": HI}, "messages cannot be passed on"),
    ],
)
def test_prompts_are_refused_where_the_server_has_no_word(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(Untranslatable) as refused:
        sent("/api/generate", {"prompt": "hi", **fields})
    assert str(refused.value).startswith(named)


# --- what comes before and after ------------------------------------------------------------------


def test_names_count_in_any_case_as_in_go() -> None:
    raw = {"Messages": [{"ROLE": "user", "Content": "hi"}], "Options": {"seed": 1}}
    assert sent("/api/chat", raw) == {"model": "served", "messages": HI, **USAGE, "seed": 1}


def test_options_that_come_twice_add_up() -> None:
    raw = b'{"options":{"seed":1},"messages":[{"role":"user","content":"hi"}],"options":{"top_p":0.5}}'
    said = asked("/api/chat", raw)[1]
    assert (said["seed"], said["top_p"]) == (1, 0.5)


def test_changes_of_roles_count_before_the_translation() -> None:
    changes = BodyChanges(
        defaults={"options": {"seed": 1}},
        overrides={"options": {"temperature": 0}},
        system="be nice",
        think=False,
    )
    said = sent("/api/chat", {"messages": HI, "options": {"temperature": 2}}, changes)
    assert said["messages"] == [{"role": "system", "content": "be nice"}, *HI]
    assert (said["seed"], said["temperature"], said["reasoning_effort"]) == (1, 0, "none")


@pytest.mark.parametrize("changes", [BodyChanges(), BodyChanges(system="be nice", system_mode="replace")])
def test_a_large_request_is_translated_like_a_small_one(changes: BodyChanges) -> None:
    messages = [{"role": "user", "content": "x" * SMALL_BYTES}]
    said = sent("/api/chat", {"messages": messages}, changes)["messages"]
    assert said[-1:] == messages
    assert len(said) == (1 if changes.empty else 2)


@pytest.mark.parametrize(("client", "limit", "said"), [(None, 5, 5), (3, 5, 3), (9, 5, 5), (9, None, 9)])
def test_the_smaller_limit_counts(client: int | None, limit: int | None, said: int) -> None:
    document = {"messages": HI, "options": {"num_predict": client}}
    assert sent("/api/chat", document, max_tokens=limit)["max_tokens"] == said


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":"m","format":{"a":0.5,"b":"\\ud800"},"messages":[{"role":"user","content":"\xff"}]}',
    ],
)
def test_what_go_reads_is_read_here(raw: bytes) -> None:
    through, said = asked("/api/chat", raw)
    assert said["messages"][0]["content"] in ("\ud800", "�")
    assert through.path == "/v1/chat/completions"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"m","messages":[tru]}',
        b'{"model":"m","options":{"temperature":1e999},"messages":[]}',
        b'{"model":"m","options":{"temperature":NaN},"messages":[]}',
        b'{"model":"m","format":{"a":1e999},"messages":[{"role":"user"}]}',
        b'{"model":"m","messages":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"model":"m","messages":[{"role":"user"}],"format":' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}",
    ],
)
def test_what_is_no_json_or_too_deep_is_refused(raw: bytes) -> None:
    with pytest.raises(BadBodyError):
        asked("/api/chat", raw)


def test_a_schema_of_usual_depth_is_no_problem() -> None:
    schema: dict[str, Any] = {}
    for _ in range(300):
        schema = {"a": schema}
    said = chat(format=schema)
    assert json.dumps(said["response_format"]["json_schema"]["schema"]) == json.dumps(schema)
