"""Requests to OpenAI servers, and what is left of a meaning after the way there and back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import TypeAdapter, ValidationError

from manager.wire.translate import Traits, Untranslatable
from manager.wire.translate.chat_client import ChatClient
from manager.wire.translate.codec import DEFAULT_TRAITS
from manager.wire.translate.hub import (
    AnswerEvent,
    AnswerFacts,
    ArgumentsCame,
    CallBegan,
    Conversation,
    Ended,
    Failed,
    Image,
    Message,
    Stop,
    Text,
    TextCame,
    ThinkingCame,
    Tool,
    ToolCall,
    Usage,
)
from manager.wire.translate.media import media_type_of
from manager.wire.translate.native_answer import NativeAnswer
from manager.wire.translate.native_request import chat_of
from manager.wire.translate.openai_answer import OpenAIAnswer
from manager.wire.translate.openai_request import chat_request
from manager.wire.translate.schemas import closed

STRICT = Traits(extended=False, max_tokens_field="max_completion_tokens")
HI = (Message("user", (Text("hi"),)),)
PNG = "iVBORw0KGgoAAAANSUhEUg=="


def said(traits: Traits = DEFAULT_TRAITS, **fields: Any) -> dict[str, Any]:
    asked = replace(Conversation("m", HI, stream=False), **fields)
    return json.loads(json.dumps(chat_request(asked, traits)))  # type: ignore[no-any-return]


def test_images_at_an_address_stay_there() -> None:
    image = Image("", url="https://example.org/a.png")
    content = said(messages=(Message("user", (image,)),))["messages"][0]["content"]
    assert content == [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]


def test_the_type_that_a_client_names_counts() -> None:
    image = Image("image/heic", data="AAAA")
    content = said(messages=(Message("user", (image,)),))["messages"][0]["content"]
    assert content[0]["image_url"]["url"] == "data:image/heic;base64,AAAA"


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_images_come_from_the_user_only(role: Any) -> None:
    with pytest.raises(Untranslatable, match=rf"messages\[0\]: .* images from the user only, .* role {role}"):
        said(messages=(Message(role, (Image("", data=PNG),)),))


def test_a_tool_that_failed_says_so() -> None:
    failed = Message("tool", (Text("no file"),), call_id="a", tool_name="f", is_error=True)
    content = said(messages=(failed,))["messages"][0]
    assert content == {"role": "tool", "tool_call_id": "a", "content": "The tool failed: no file"}


def test_strict_tools_stay_strict() -> None:
    tools = (Tool("f", "", {"type": "object"}, is_strict=True), Tool("g", "does g", {}))
    assert [one["function"] for one in said(tools=tools)["tools"]] == [
        {"name": "f", "parameters": {"type": "object"}, "strict": True},
        {"name": "g", "parameters": {}, "description": "does g"},
    ]


@pytest.mark.parametrize(
    ("choice", "written"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ("tool:f", {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_the_choice_of_a_tool(choice: str, written: Any) -> None:
    assert said(tool_choice=choice, parallel_calls=False, user="u") == {
        **said(),
        "tool_choice": written,
        "parallel_tool_calls": False,
        "user": "u",
    }


@pytest.mark.parametrize(("stream", "wants"), [(True, True), (True, False), (False, True)])
def test_a_stream_ends_with_the_numbers_of_tokens_where_they_are_wanted(stream: bool, wants: bool) -> None:
    options = said(stream=stream, wants_usage=wants).get("stream_options")
    assert options == ({"include_usage": True} if stream and wants else None)


def test_an_answer_ends_once() -> None:
    for stream, data in ((True, b"data: %b\n\n" * 3), (False, b"%b")):
        answer = OpenAIAnswer(stream=stream)
        bodies = [b'{"choices":[{"delta":{},"finish_reason":"stop"}]}', b"[DONE]", b"x"]
        found = answer.feed(data % tuple(bodies[: data.count(b"%b")]))
        assert found + ([] if stream else answer.end()) == [Ended(Stop.END)]


def test_strict_servers_get_schemas_that_they_can_enforce() -> None:
    inner = {"type": "object", "properties": {"type": {"enum": [{"type": "object"}]}}}
    schema = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    written = {
        name: said(traits, schema=schema)["response_format"]
        for name, traits in (("l", DEFAULT_TRAITS), ("s", STRICT))
    }
    assert written["l"]["json_schema"] == {"name": "answer", "schema": schema, "strict": True}
    assert written["s"]["json_schema"]["schema"] == {
        **schema,
        "properties": {"a": {**inner, "additionalProperties": False}},
        "additionalProperties": False,
    }


def test_the_sequence_that_ended_an_answer_is_known_where_the_server_says_it() -> None:
    chunk = {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop", "stop_reason": "###"}]}
    events = OpenAIAnswer(stream=True).feed(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode())
    assert events == [TextCame("a"), Ended(Stop.STOP_SEQUENCE, None, "###")]


# The types of OpenAI's own library.
OPENAI_FIELDS = set(get_type_hints(CompletionCreateParamsNonStreaming))
OPENAI_REQUEST: TypeAdapter[Any] = TypeAdapter(CompletionCreateParamsNonStreaming)


def consume(value: Any) -> None:
    """Go through all of a value: its lists are checked when they are read."""
    if isinstance(value, dict):
        value = value.values()
    if isinstance(value, Iterable) and not isinstance(value, str):
        for one in value:
            consume(one)


def test_the_library_of_openai_takes_every_field() -> None:
    image = Message("user", (Text("what?"), Image("", data=PNG)))
    called = Message("assistant", (), (ToolCall("a", "f", "{}"),))
    written = said(
        STRICT,
        messages=(*HI, image, called, Message("tool", (Text("1"),), call_id="a")),
        tools=(Tool("f", "does f", {"type": "object"}, is_strict=True),),
        tool_choice="tool:f",
        parallel_calls=True,
        max_tokens=5,
        temperature=1.0,
        top_p=0.5,
        seed=1,
        stop=("a",),
        frequency_penalty=1.0,
        presence_penalty=1.0,
        schema={"type": "object"},
        think="max",
        user="u",
    )
    assert set(written) <= OPENAI_FIELDS
    consume(OPENAI_REQUEST.validate_python(written))
    with pytest.raises(ValidationError):
        consume(OPENAI_REQUEST.validate_python({**written, "messages": [{"role": "user", "content": [1]}]}))


# --- there and back -------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
names = st.from_regex(r"[a-z]{1,6}", fullmatch=True)
objects = st.dictionaries(words, st.none() | st.booleans() | st.integers(-9, 9) | words, max_size=3)


@st.composite
def native_chats(draw: st.DrawFn) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 4))):
        role = draw(st.sampled_from(["system", "user", "assistant"]))
        message: dict[str, Any] = {"role": role, "content": draw(words)}
        if role == "user" and draw(st.booleans()):
            message["images"] = [PNG]
        if role == "assistant" and draw(st.booleans()):
            message["thinking"] = draw(words)
        messages.append(message)
        if role == "assistant" and draw(st.booleans()):
            called = draw(st.lists(st.tuples(names, objects), min_size=1, max_size=3))
            message["tool_calls"] = [{"function": {"name": one, "arguments": given}} for one, given in called]
            results = [{"role": "tool", "tool_name": one, "content": draw(words)} for one, _ in called]
            messages += draw(st.permutations(results))
    options: dict[str, Any] = {
        "num_predict": draw(st.integers(-2, 9)),
        "temperature": draw(st.floats(0, 2)),
        "top_p": draw(st.floats(0, 1)),
        "top_k": draw(st.integers(0, 9)),
        "min_p": draw(st.floats(0, 1)),
        "seed": draw(st.integers(-1, 9)),
        "stop": draw(st.lists(words, max_size=2)),
        "presence_penalty": draw(st.floats(-2, 2)),
    }
    tool = {"name": draw(names), "description": draw(words), "parameters": draw(objects)}
    fields = {
        "options": {name: value for name, value in options.items() if draw(st.booleans())},
        "tools": [{"type": "function", "function": tool}],
        "format": draw(st.sampled_from(["json", {"type": "object"}])),
        "think": draw(st.sampled_from([False, "low", "medium", "high", "max"])),
    }
    return {"messages": messages, **{name: value for name, value in fields.items() if draw(st.booleans())}}


def meaning(asked: Conversation) -> Conversation:
    """The same request with each thing said in one way."""
    messages = tuple(
        replace(one, parts=tuple(_typed(part) if isinstance(part, Image) else part for part in one.parts))
        for one in asked.messages
    )
    return replace(
        asked, messages=messages, top_k=asked.top_k or None, min_p=asked.min_p or None, wants_usage=True
    )


def _typed(image: Image) -> Image:
    return image._replace(media_type=image.media_type or media_type_of(image.data or "") or "")


@given(native_chats(), st.booleans())
def test_a_native_chat_means_the_same_at_an_openai_server(document: dict[str, Any], stream: bool) -> None:
    asked = chat_of(document, stream=stream)
    written = json.loads(json.dumps(chat_request(asked, DEFAULT_TRAITS)))
    written.pop("chat_template_kwargs", None)  # which only says once more what `reasoning_effort` does
    assert meaning(ChatClient().read(written, stream=stream)) == meaning(asked)


@given(native_chats())
def test_a_strict_server_gets_no_field_beyond_openais_api(document: dict[str, Any]) -> None:
    asked = replace(chat_of(document, stream=False), top_k=None, min_p=None)
    written = json.dumps(chat_request(asked, STRICT))
    read = ChatClient().read(json.loads(written), stream=False)
    plain = tuple(replace(one, thinking="") for one in asked.messages)
    assert meaning(read) == meaning(replace(asked, messages=plain, schema=closed(asked.schema)))
    assert '"max_tokens"' not in written
    assert "reasoning_content" not in written
    assert set(json.loads(written)) <= OPENAI_FIELDS
    consume(OPENAI_REQUEST.validate_python(json.loads(written)))


@st.composite
def answers(draw: st.DrawFn) -> list[AnswerEvent]:
    events: list[AnswerEvent] = [ThinkingCame(one) for one in draw(st.lists(words, max_size=2))]
    events += [TextCame(one) for one in draw(st.lists(words, max_size=3))]
    called = draw(st.lists(st.tuples(names, objects), max_size=3))
    for number, (name, arguments) in enumerate(called):
        text = json.dumps(arguments)
        at = draw(st.integers(1, len(text)))
        events.append(CallBegan(number, f"id{number}", name))
        events += [ArgumentsCame(number, piece) for piece in (text[:at], text[at:]) if piece]
    stop = Stop.TOOL_CALLS if called else draw(st.sampled_from([Stop.END, Stop.LENGTH, Stop.REFUSED]))
    counts = draw(st.none() | st.builds(Usage, st.integers(5, 9), st.integers(0, 9), st.integers(0, 5)))
    return [*events, Ended(stop, counts)]


def written_by(events: list[AnswerEvent], *, stream: bool) -> bytes:
    client = ChatClient()
    client.begin(AnswerFacts("1", "m", 1, stream, wants_usage=True), lambda: 0)
    return b"".join(client.write(event) for event in events)


@given(answers(), st.lists(st.integers(0, 2000), max_size=4))
def test_the_events_of_a_stream_are_those_that_the_server_wrote(
    events: list[AnswerEvent], cuts: list[int]
) -> None:
    data = written_by(events, stream=True)
    answer = OpenAIAnswer(stream=True)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    found = [event for at, to in pairwise(places) for event in answer.feed(data[at:to])]
    assert found == events


@given(answers())
def test_a_whole_answer_and_a_stream_mean_the_same(events: list[AnswerEvent]) -> None:
    both: list[dict[str, Any]] = []
    for stream in (True, False):
        answer = OpenAIAnswer(stream=stream)
        data = written_by(events, stream=stream)
        found = answer.feed(data) + ([] if stream else answer.end())
        native = NativeAnswer(AnswerFacts("1", "m", 1, stream=False), lambda: 0, is_chat=True)
        both.append(json.loads(b"".join(native.write(event) for event in found)))
    assert both[0] == both[1]
    message = both[0]["message"]
    assert message["content"] == "".join(one.text for one in events if isinstance(one, TextCame))
    assert message.get("thinking", "") == "".join(one.text for one in events if isinstance(one, ThinkingCame))


def test_pieces_without_text_and_failures_are_no_lines() -> None:
    native = NativeAnswer(AnswerFacts("1", "m", 1, stream=True), lambda: 0, is_chat=True)
    assert native.write(ThinkingCame("", "signature")) == native.write(TextCame("")) == b""
    assert native.write(Failed("reported elsewhere")) == b""


def test_calls_of_other_clients_are_kept() -> None:
    call = ToolCall("a", "f", '{"x":1}')
    message = said(messages=(Message("assistant", (), (call,)),))["messages"][0]
    function = {"name": "f", "arguments": '{"x":1}'}
    assert message == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "type": "function", "function": function}],
    }
