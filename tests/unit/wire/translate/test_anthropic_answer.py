"""Answers for Anthropic clients: whole messages and their events."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from manager.wire.routes import INFERENCE
from manager.wire.translate.anthropic_client import MessagesClient
from manager.wire.translate.codec import UnsayableError
from manager.wire.translate.hub import (
    ArgumentsCame,
    CallBegan,
    Ended,
    Stop,
    TextCame,
    ThinkingCame,
    Usage,
)
from manager.wire.usage import is_ended
from tests.support.translating import events_in, written

if TYPE_CHECKING:
    from manager.wire.translate.hub import AnswerEvent

USAGE = Usage(15, 20, 5)
EVENTS: list[AnswerEvent] = [
    ThinkingCame("hmm"),
    ThinkingCame("", "sig"),
    TextCame("Hel"),
    TextCame("lo"),
    CallBegan(0, "c1", "get"),
    ArgumentsCame(0, '{"a":'),
    ArgumentsCame(0, "1}"),
    Ended(Stop.TOOL_CALLS, USAGE),
]
TOKENS = {
    "input_tokens": 10,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 5,
    "output_tokens": 20,
}
NONE = dict.fromkeys(TOKENS, 0)
HEAD: dict[str, Any] = {"id": "msg_r1", "type": "message", "role": "assistant", "model": "m"}


def whole(*events: AnswerEvent) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(written(MessagesClient(), events, stream=False))
    return found


def streamed(*events: AnswerEvent) -> list[dict[str, Any]]:
    found = events_in(written(MessagesClient(), events, stream=True))
    assert [name for name, _ in found] == [document["type"] for _, document in found]
    return [document for _, document in found]


def test_a_whole_message() -> None:
    assert whole(*EVENTS) == {
        **HEAD,
        "content": [
            {"type": "thinking", "thinking": "hmm", "signature": "sig"},
            {"type": "text", "text": "Hello"},
            {"type": "tool_use", "id": "c1", "name": "get", "input": {"a": 1}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": TOKENS,
    }


def test_the_events_of_a_message() -> None:
    assert streamed(*EVENTS) == [
        {
            "type": "message_start",
            "message": {**HEAD, "content": [], "stop_reason": None, "stop_sequence": None, "usage": NONE},
        },
        {"type": "ping"},
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "thinking", "thinking": "", "signature": ""},
        },
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hmm"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "sig"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "Hel"}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_stop", "index": 1},
        {
            "type": "content_block_start",
            "index": 2,
            "content_block": {"type": "tool_use", "id": "c1", "name": "get", "input": {}},
        },
        {
            "type": "content_block_delta",
            "index": 2,
            "delta": {"type": "input_json_delta", "partial_json": '{"a":'},
        },
        {
            "type": "content_block_delta",
            "index": 2,
            "delta": {"type": "input_json_delta", "partial_json": "1}"},
        },
        {"type": "content_block_stop", "index": 2},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": TOKENS,
        },
        {"type": "message_stop"},
    ]


STOPS = {
    Stop.END: "end_turn",
    Stop.LENGTH: "max_tokens",
    Stop.TOOL_CALLS: "tool_use",
    Stop.STOP_SEQUENCE: "stop_sequence",
    Stop.REFUSED: "refusal",
}


@pytest.mark.parametrize("stop", Stop)
def test_the_reason_of_the_end(stop: Stop) -> None:
    ended = Ended(stop, USAGE, "###" if stop is Stop.STOP_SEQUENCE else None)
    message, events = whole(TextCame("a"), ended), streamed(TextCame("a"), ended)

    assert message["stop_reason"] == events[-2]["delta"]["stop_reason"] == STOPS[stop]
    assert message["stop_sequence"] == events[-2]["delta"]["stop_sequence"] == ended.stop_sequence


def test_an_empty_answer_is_a_message_without_content() -> None:
    assert whole(Ended(Stop.END))["content"] == []
    assert [event["type"] for event in streamed(Ended(Stop.END))] == [
        "message_start",
        "ping",
        "message_delta",
        "message_stop",
    ]


def test_tokens_that_the_server_does_not_tell_are_none() -> None:
    assert whole(Ended(Stop.END))["usage"] == NONE
    assert whole(Ended(Stop.END, Usage(1, 1, 5)))["usage"]["input_tokens"] == 0


def test_arguments_that_are_no_object_break_a_whole_message() -> None:
    with pytest.raises(UnsayableError, match="the arguments for the tool get are no JSON object"):
        whole(CallBegan(0, "c1", "get"), ArgumentsCame(0, "nonsense"), Ended(Stop.END))


def test_the_end_of_a_stream_is_found() -> None:
    stream = written(MessagesClient(), EVENTS, stream=True)

    assert is_ended(INFERENCE[b"/v1/messages"], stream)
    assert not is_ended(INFERENCE[b"/v1/messages"], stream.removesuffix(b'"message_stop"}\n\n'))
