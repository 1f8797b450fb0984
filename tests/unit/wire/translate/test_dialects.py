"""Whole translations: clients of one dialect at servers of another, at every split of the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.target import Protocol
from manager.wire.routes import INFERENCE
from manager.wire.translate import refusal
from manager.wire.translate.hub import Usage
from tests.support.translating import answered, events_in, sent, stream_of

HI = [{"role": "user", "content": "hi"}]
AT_ANTHROPIC: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": HI},
    "/api/generate": {"prompt": "hi"},
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
}
AT_OPENAI: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": HI},
    "/api/generate": {"prompt": "hi"},
    "/v1/messages": {"messages": HI, "max_tokens": 4096},
    "/v1/responses": {"input": "hi"},
}
TOKENS = {"input_tokens": 10, "cache_read_input_tokens": 5, "output_tokens": 20}
USAGE = Usage(15, 20, 5)


def anthropic_answer(*, stream: bool) -> bytes:
    if not stream:
        content = [{"type": "text", "text": "Grüß dich"}]
        message = {"type": "message", "content": content, "stop_reason": "end_turn", "usage": TOKENS}
        return json.dumps(message).encode()
    deltas = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
        for text in ("Grüß", " ", "dich")
    ]
    return stream_of(
        {"type": "message_start", "message": {"usage": TOKENS}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *deltas,
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 20}},
        {"type": "message_stop"},
    )


def openai_answer(*, stream: bool) -> bytes:
    usage = {"prompt_tokens": 15, "completion_tokens": 20, "prompt_tokens_details": {"cached_tokens": 5}}
    if not stream:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "Grüß dich"},
            "finish_reason": "stop",
        }
        return json.dumps({"choices": [choice], "usage": usage}).encode()
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("Grüß", " ", "dich")
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    chunks.append({"choices": [], "usage": usage})
    return b"".join(b"data: %b\n\n" % json.dumps(chunk).encode() for chunk in chunks) + b"data: [DONE]\n\n"


CASES = [
    *((path, Protocol.ANTHROPIC, request) for path, request in AT_ANTHROPIC.items()),
    *((path, Protocol.OPENAI, request) for path, request in AT_OPENAI.items()),
]
ANSWERS = {Protocol.ANTHROPIC: anthropic_answer, Protocol.OPENAI: openai_answer}


def text_of(path: str, answer: bytes, *, stream: bool) -> str:
    """The text that a client of this path finds in an answer."""
    if path.startswith("/api/"):
        lines = [json.loads(line) for line in answer.splitlines()]
        return "".join(line.get("response") or line.get("message", {}).get("content", "") for line in lines)
    documents = [document for _, document in events_in(answer)] if stream else [json.loads(answer)]
    match path, stream:
        case "/v1/messages", True:
            return "".join(one["delta"].get("text", "") for one in documents if "delta" in one)
        case "/v1/messages", False:
            return "".join(block["text"] for block in documents[0]["content"])
        case "/v1/responses", True:
            return "".join(one["delta"] for one in documents if "delta" in one)
        case "/v1/responses", False:
            return str(documents[0]["output"][0]["content"][0]["text"])
    choices = [choice for one in documents for choice in one.get("choices", [])]
    said = [choice.get("delta") or choice.get("message") or choice for choice in choices]
    return "".join(one.get("content") or one.get("text") or "" for one in said)


@pytest.mark.parametrize(("path", "protocol", "request_"), CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_gets_the_answer_of_a_server_of_another_dialect(
    path: str, protocol: Protocol, request_: dict[str, Any], stream: bool
) -> None:
    translated, document = sent(path, protocol, {**request_, "stream": stream})
    answer = answered(translated, ANSWERS[protocol](stream=stream))

    assert document["model"] == "theirs"
    assert document["stream"] is stream
    assert text_of(path, answer, stream=stream) == "Grüß dich"
    assert translated.fault is None
    assert translated.usage == USAGE
    assert refusal(INFERENCE[path.encode()], protocol) is None


@pytest.mark.parametrize(("path", "protocol", "request_"), CASES)
@given(data=st.data())
def test_the_answer_is_the_same_at_every_split(
    path: str, protocol: Protocol, request_: dict[str, Any], data: st.DataObject
) -> None:
    stream = data.draw(st.booleans())
    raw = ANSWERS[protocol](stream=stream)
    cuts = data.draw(st.lists(st.integers(0, len(raw)), max_size=20))
    whole, _ = sent(path, protocol, {**request_, "stream": stream})
    pieces, _ = sent(path, protocol, {**request_, "stream": stream})

    assert answered(pieces, raw, cuts) == answered(whole, raw)
    assert pieces.usage == whole.usage


@pytest.mark.parametrize(("path", "protocol", "request_"), CASES)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_is_a_fault(
    path: str, protocol: Protocol, request_: dict[str, Any], stream: bool
) -> None:
    raw = ANSWERS[protocol](stream=stream)
    translated, _ = sent(path, protocol, {**request_, "stream": stream})
    answered(translated, raw[: len(raw) // 2])

    assert translated.fault is not None
    assert translated.feed(raw) == translated.end() == b""


@pytest.mark.parametrize("path", AT_ANTHROPIC)
def test_an_anthropic_server_that_is_overloaded_amid_a_stream_is_a_fault(path: str) -> None:
    translated, _ = sent(path, Protocol.ANTHROPIC, {**AT_ANTHROPIC[path], "stream": True})
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    answered(translated, stream_of({"type": "message_start", "message": {}}, error))

    assert translated.fault == "Overloaded"


def test_the_smaller_limit_of_an_answer_counts() -> None:
    request = {"messages": HI, "max_tokens": 100}
    at = ("/v1/chat/completions", Protocol.ANTHROPIC)

    assert sent(*at, request, max_tokens=50)[1]["max_tokens"] == 50
    assert sent(*at, request, max_tokens=500)[1]["max_tokens"] == 100
    assert sent(*at, {"messages": HI}, max_tokens=50)[1]["max_tokens"] == 50
    assert sent(*at, {"messages": HI})[1]["max_tokens"] == 4096


def test_calls_without_an_id_get_one() -> None:
    call = {"type": "function", "function": {"name": "get", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    raw = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
    translated, _ = sent("/v1/messages", Protocol.OPENAI, AT_OPENAI["/v1/messages"])
    answer = json.loads(answered(translated, raw))

    assert answer["content"] == [{"type": "tool_use", "id": "call_r1_0", "name": "get", "input": {}}]
    assert answer["stop_reason"] == "tool_use"


def test_calls_that_no_anthropic_client_can_read_are_a_fault() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "get", "arguments": "nonsense"}}
    choice = {"index": 0, "message": {"tool_calls": [call]}, "finish_reason": "tool_calls"}
    translated, _ = sent("/v1/messages", Protocol.OPENAI, AT_OPENAI["/v1/messages"])

    assert answered(translated, json.dumps({"choices": [choice]}).encode()) == b""
    assert translated.fault == "the arguments for the tool get are no JSON object"


def test_signed_thinking_comes_back_by_way_of_a_response() -> None:
    content = [{"type": "thinking", "thinking": "hmm", "signature": "sig"}, {"type": "text", "text": "a"}]
    raw = json.dumps({"type": "message", "content": content, "stop_reason": "end_turn"}).encode()
    first, _ = sent("/v1/responses", Protocol.ANTHROPIC, {"input": "hi"})
    output = json.loads(answered(first, raw))["output"]
    again = [{"role": "user", "content": "hi"}, *output, {"role": "user", "content": "go on"}]
    _, document = sent("/v1/responses", Protocol.ANTHROPIC, {"input": again})

    assert document["messages"][1] == {"role": "assistant", "content": content}


def test_a_strict_tool_stays_strict() -> None:
    tool = {"name": "get", "input_schema": {"type": "object"}, "strict": True}
    _, document = sent("/v1/messages", Protocol.OPENAI, {**AT_OPENAI["/v1/messages"], "tools": [tool]})

    assert document["tools"][0]["function"]["strict"] is True


def test_no_embeddings_come_from_an_anthropic_server() -> None:
    for path in (b"/api/embed", b"/api/embeddings", b"/v1/embeddings"):
        assert refusal(INFERENCE[path], Protocol.ANTHROPIC) is not None
