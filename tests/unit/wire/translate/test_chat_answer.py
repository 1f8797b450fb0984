"""Answers for OpenAI clients of chats and completions, whole and as streams."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from manager.wire.routes import INFERENCE
from manager.wire.translate.chat_client import ChatClient, CompletionClient
from manager.wire.translate.hub import (
    AnswerFacts,
    ArgumentsCame,
    CallBegan,
    Ended,
    Stop,
    TextCame,
    ThinkingCame,
    Usage,
)
from manager.wire.usage import is_ended
from tests.support.translating import CREATED_S, clock, events_in, written

if TYPE_CHECKING:
    from manager.wire.translate.hub import AnswerEvent

EVENTS: list[AnswerEvent] = [
    ThinkingCame("hmm"),
    ThinkingCame("", "sig"),
    TextCame("Hel"),
    TextCame("lo"),
    TextCame(""),
    CallBegan(0, "c1", "get"),
    ArgumentsCame(0, ""),
    ArgumentsCame(0, '{"a":'),
    ArgumentsCame(0, "1}"),
    Ended(Stop.TOOL_CALLS, Usage(15, 20, 5)),
]
USAGE = {
    "prompt_tokens": 15,
    "completion_tokens": 20,
    "total_tokens": 35,
    "prompt_tokens_details": {"cached_tokens": 5},
}
HEAD = {"id": "chatcmpl-r1", "created": CREATED_S, "model": "m"}


def whole(*events: AnswerEvent) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(written(ChatClient(), events, stream=False))
    return found


def choice(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish}


def called(**function: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "function": function}]}


def test_a_whole_chat() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"a":1}'}}
    message = {"role": "assistant", "content": "Hello", "reasoning": "hmm", "tool_calls": [call]}

    assert whole(*EVENTS) == {
        **HEAD,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}],
        "usage": USAGE,
    }


def test_the_stream_of_a_chat() -> None:
    stream = written(ChatClient(), EVENTS, stream=True)
    found = [document for _, document in events_in(stream)]
    began = {"index": 0, "id": "c1", "type": "function", "function": {"name": "get", "arguments": ""}}

    for document in found[:-1]:
        assert document == {**document, **HEAD, "object": "chat.completion.chunk"}
    assert [document["choices"] for document in found[:-2]] == [
        [choice({"role": "assistant", "content": ""})],
        [choice({"reasoning": "hmm"})],
        [choice({"content": "Hel"})],
        [choice({"content": "lo"})],
        [choice({"tool_calls": [began]})],
        [choice(called(arguments='{"a":'))],
        [choice(called(arguments="1}"))],
        [choice({}, "tool_calls")],
    ]
    assert all(document["usage"] is None for document in found[:-2])
    assert (found[-2]["choices"], found[-2]["usage"]) == ([], USAGE)
    assert stream.endswith(b"\n\ndata: [DONE]\n\n")
    assert is_ended(INFERENCE[b"/v1/chat/completions"], stream)


def test_a_stream_tells_its_tokens_only_where_it_is_asked_for_them() -> None:
    client = ChatClient()
    client.begin(AnswerFacts("r1", "m", CREATED_S, stream=True), clock)
    found = events_in(client.write(EVENTS[-1]))

    assert [document.get("choices") for _, document in found] == [
        [choice({"role": "assistant", "content": ""})],
        [choice({}, "tool_calls")],
        None,
    ]
    assert all("usage" not in document for _, document in found)


def test_tokens_that_the_server_does_not_tell_are_left_out() -> None:
    assert "usage" not in whole(Ended(Stop.END))
    found = events_in(written(ChatClient(), [Ended(Stop.END)], stream=True))
    assert [document.get("choices") for _, document in found][1:] == [[choice({}, "stop")], None]


FINISHES = {
    Stop.END: "stop",
    Stop.LENGTH: "length",
    Stop.TOOL_CALLS: "tool_calls",
    Stop.STOP_SEQUENCE: "stop",
    Stop.REFUSED: "content_filter",
}


@pytest.mark.parametrize("stop", Stop)
def test_the_reason_of_the_end(stop: Stop) -> None:
    stream = events_in(written(ChatClient(), [TextCame("a"), Ended(stop)], stream=True))

    assert whole(TextCame("a"), Ended(stop))["choices"][0]["finish_reason"] == FINISHES[stop]
    assert stream[-2][1]["choices"] == [choice({}, FINISHES[stop])]


def test_an_end_after_a_call_is_for_the_call() -> None:
    events: list[AnswerEvent] = [CallBegan(0, "c1", "get"), Ended(Stop.END)]
    stream = events_in(written(ChatClient(), events, stream=True))

    assert stream[-2][1]["choices"] == [choice({}, "tool_calls")]
    (found,) = whole(*events)["choices"]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] is None
    assert found["message"]["tool_calls"][0]["function"]["arguments"] == "{}"


def test_a_whole_answer_without_text_has_an_empty_one() -> None:
    assert whole(Ended(Stop.END))["choices"][0]["message"] == {"role": "assistant", "content": ""}


def test_a_whole_completion() -> None:
    events: list[AnswerEvent] = [
        ThinkingCame("hmm"),
        TextCame("Hel"),
        TextCame("lo"),
        Ended(Stop.LENGTH, Usage(15, 20, 5)),
    ]

    assert json.loads(written(CompletionClient(), events, stream=False)) == {
        "id": "cmpl-r1",
        "object": "text_completion",
        "created": CREATED_S,
        "model": "m",
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "length"}],
        "usage": USAGE,
    }


def test_the_stream_of_a_completion() -> None:
    events: list[AnswerEvent] = [
        ThinkingCame("hmm"),
        TextCame("a"),
        TextCame(""),
        Ended(Stop.END, Usage(15, 20, 5)),
    ]
    found = [document for _, document in events_in(written(CompletionClient(), events, stream=True))]

    assert [document.get("choices") for document in found] == [
        [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}],
        [],
        None,
    ]
    assert found[2]["usage"] == USAGE
    assert {document.get("object") for document in found} == {"text_completion", None}
