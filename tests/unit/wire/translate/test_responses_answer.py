"""Answers for clients of /v1/responses: whole responses and their events."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from manager.wire.routes import INFERENCE
from manager.wire.translate.hub import (
    ArgumentsCame,
    CallBegan,
    Ended,
    Stop,
    TextCame,
    ThinkingCame,
    Usage,
)
from manager.wire.translate.responses_client import ResponsesClient
from manager.wire.usage import is_ended
from tests.support.translating import CREATED_S, events_in, written

if TYPE_CHECKING:
    from manager.wire.translate.hub import AnswerEvent

EVENTS: list[AnswerEvent] = [
    ThinkingCame("hmm"),
    ThinkingCame("", "sig"),
    TextCame("Hel"),
    TextCame("lo"),
    CallBegan(0, "c1", "get"),
    ArgumentsCame(0, '{"a":'),
    ArgumentsCame(0, "1}"),
    CallBegan(1, "c2", "put"),
    Ended(Stop.TOOL_CALLS, Usage(15, 20, 5)),
]
TEXT = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
NO_TEXT = {**TEXT, "text": ""}
SUMMARY = {"type": "summary_text", "text": "hmm"}
THOUGHT: dict[str, Any] = {"id": "rs_r1_0", "type": "reasoning", "encrypted_content": "sig"}
SAID: dict[str, Any] = {"id": "msg_r1_1", "type": "message", "role": "assistant"}
CALLED: dict[str, Any] = {"id": "fc_r1_2", "type": "function_call", "call_id": "c1", "name": "get"}
OUTPUT = [
    {**THOUGHT, "status": "completed", "summary": [SUMMARY]},
    {**SAID, "status": "completed", "content": [TEXT]},
    {**CALLED, "status": "completed", "arguments": '{"a":1}'},
    {**CALLED, "id": "fc_r1_3", "call_id": "c2", "name": "put", "status": "completed", "arguments": "{}"},
]
PLAIN: dict[str, Any] = {
    "id": "resp_r1",
    "object": "response",
    "created_at": CREATED_S,
    "status": "completed",
    "background": False,
    "error": None,
    "incomplete_details": None,
    "model": "m",
    "output": OUTPUT,
    "previous_response_id": None,
    "store": False,
    "truncation": "disabled",
    "usage": {
        "input_tokens": 15,
        "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 35,
    },
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None},
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "user": None,
}


def asked(**fields: Any) -> ResponsesClient:
    client = ResponsesClient()
    client.read({"model": "m", "input": "hi", **fields}, stream=False)
    return client


def whole(*events: AnswerEvent, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(written(asked(**fields), events, stream=False))
    return found


def streamed(*events: AnswerEvent) -> list[dict[str, Any]]:
    found = events_in(written(asked(), events, stream=True))
    assert [name for name, _ in found] == [document["type"] for _, document in found]
    assert [document.pop("sequence_number") for _, document in found] == list(range(len(found)))
    return [document for _, document in found]


def test_a_whole_response() -> None:
    assert whole(*EVENTS) == PLAIN


def test_a_response_repeats_its_request() -> None:
    given: dict[str, Any] = {
        "instructions": "be brief",
        "metadata": {"a": "b"},
        "tools": [{"type": "function", "name": "get"}],
        "temperature": 0.5,
    }

    assert whole(*EVENTS, **given) == {**PLAIN, **given}


def test_the_events_of_a_response() -> None:
    opened = {**PLAIN, "status": "in_progress", "output": [], "usage": None}
    thought = {"item_id": "rs_r1_0", "output_index": 0}
    said = {"item_id": "msg_r1_1", "output_index": 1}
    called = {"item_id": "fc_r1_2", "output_index": 2}
    other = {"item_id": "fc_r1_3", "output_index": 3}
    expected: list[tuple[str, dict[str, Any]]] = [
        ("created", {"response": opened}),
        ("in_progress", {"response": opened}),
        (
            "output_item.added",
            {
                "output_index": 0,
                "item": {"id": "rs_r1_0", "type": "reasoning", "status": "in_progress", "summary": []},
            },
        ),
        ("reasoning_summary_part.added", {**thought, "summary_index": 0, "part": {**SUMMARY, "text": ""}}),
        ("reasoning_summary_text.delta", {**thought, "summary_index": 0, "delta": "hmm"}),
        ("reasoning_summary_text.done", {**thought, "summary_index": 0, "text": "hmm"}),
        ("reasoning_summary_part.done", {**thought, "summary_index": 0, "part": SUMMARY}),
        ("output_item.done", {"output_index": 0, "item": OUTPUT[0]}),
        ("output_item.added", {"output_index": 1, "item": {**SAID, "status": "in_progress", "content": []}}),
        ("content_part.added", {**said, "content_index": 0, "part": NO_TEXT}),
        ("output_text.delta", {**said, "content_index": 0, "delta": "Hel", "logprobs": []}),
        ("output_text.delta", {**said, "content_index": 0, "delta": "lo", "logprobs": []}),
        ("output_text.done", {**said, "content_index": 0, "text": "Hello", "logprobs": []}),
        ("content_part.done", {**said, "content_index": 0, "part": TEXT}),
        ("output_item.done", {"output_index": 1, "item": OUTPUT[1]}),
        (
            "output_item.added",
            {"output_index": 2, "item": {**CALLED, "status": "in_progress", "arguments": ""}},
        ),
        ("function_call_arguments.delta", {**called, "delta": '{"a":'}),
        ("function_call_arguments.delta", {**called, "delta": "1}"}),
        ("function_call_arguments.done", {**called, "name": "get", "arguments": '{"a":1}'}),
        ("output_item.done", {"output_index": 2, "item": OUTPUT[2]}),
        (
            "output_item.added",
            {"output_index": 3, "item": {**OUTPUT[3], "status": "in_progress", "arguments": ""}},
        ),
        ("function_call_arguments.done", {**other, "name": "put", "arguments": "{}"}),
        ("output_item.done", {"output_index": 3, "item": OUTPUT[3]}),
        ("completed", {"response": PLAIN}),
    ]

    assert streamed(*EVENTS) == [{"type": f"response.{name}", **fields} for name, fields in expected]


@pytest.mark.parametrize(
    ("stop", "reason"), [(Stop.LENGTH, "max_output_tokens"), (Stop.REFUSED, "content_filter")]
)
def test_a_response_that_was_cut_is_incomplete(stop: Stop, reason: str) -> None:
    response = whole(TextCame("a"), Ended(stop))

    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": reason})
    assert streamed(TextCame("a"), Ended(stop))[-1] == {"type": "response.incomplete", "response": response}


def test_an_empty_response() -> None:
    assert whole(Ended(Stop.END)) == {**PLAIN, "output": [], "usage": None}
    assert len(streamed(Ended(Stop.END))) == 3


def test_the_end_of_a_stream_is_found() -> None:
    assert is_ended(INFERENCE[b"/v1/responses"], written(asked(), EVENTS, stream=True))
