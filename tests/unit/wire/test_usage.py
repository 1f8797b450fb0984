"""What the end of an answer says, of answers as real servers gave them and in whatever pieces they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manager.wire.routes import INFERENCE, Dialect, Route
from manager.wire.usage import TAIL_BYTES, fault_of, is_ended, load_ms, token_counts

RECORDINGS = Path(__file__).parents[2] / "contract" / "recordings"
CHAT, GENERATE = INFERENCE[b"/api/chat"], INFERENCE[b"/api/generate"]
V1_CHAT, V1_RESPONSES = INFERENCE[b"/v1/chat/completions"], INFERENCE[b"/v1/responses"]
V1_MESSAGES = INFERENCE[b"/v1/messages"]

NOTHING = (None, None)
COUNTS: dict[str, tuple[int | None, int | None]] = {
    "07-generate-load": NOTHING,
    "09-generate": (7, 4),
    "10-generate-stream": (7, 4),
    "11-chat": (7, 4),
    "12-chat-stream": (7, 4),
    "13-chat-load": NOTHING,
    "26-embed": (3, None),
    "28-embed-empty": NOTHING,
    "32-embeddings": NOTHING,
    "50-v1-chat": (7, 4),
    "51-v1-chat-stream": NOTHING,
    "52-v1-chat-stream-usage": (7, 4),
    "56-v1-completions": (7, 4),
    "57-v1-completions-stream": NOTHING,
    "58-v1-embeddings": (3, None),
    "61-v1-responses": (7, 4),
    "62-v1-messages": (7, 4),
    "63-v1-messages-stream": (7, 4),
    "65-generate-unload": NOTHING,
}


def recorded(name: str) -> tuple[Route, bytes]:
    """The route of a recording, and its answer put together again."""
    recording = json.loads((RECORDINGS / f"{name}.json").read_text(encoding="utf-8"))
    route = INFERENCE[recording["request"]["path"].encode()]
    if "sse" in recording:
        return route, "".join(f"{event}\n\n" for event in recording["sse"] if event).encode()
    if "lines" in recording:
        return route, b"".join(compact(line) + b"\n" for line in recording["lines"])
    return route, compact(recording["json"])


def compact(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def kept(pieces: list[bytes]) -> bytes:
    """What is left of an answer that came in pieces, when only a tail of it is kept."""
    tail = bytearray()
    for piece in pieces:
        tail += piece
        if len(tail) > 4 * TAIL_BYTES:
            del tail[:-TAIL_BYTES]
    return bytes(tail)


def event(document: Any, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + compact(document) + b"\n\n"


STREAMS = [name for name in COUNTS if "stream" in name]
# Where what marks the end begins.
ENDS = {CHAT: b'"done":true', GENERATE: b'"done":true', V1_MESSAGES: b'{"type":"message_stop"'}


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_tokens_are_counted_as_a_real_server_tells_them(name: str) -> None:
    route, body = recorded(name)
    assert token_counts(route.dialect, body) == COUNTS[name]
    assert token_counts(route.dialect, bytearray(body)) == COUNTS[name]


@pytest.mark.parametrize("name", ["10-generate-stream", "52-v1-chat-stream-usage", "63-v1-messages-stream"])
@given(data=st.data())
@settings(max_examples=30)
def test_the_counts_and_the_end_are_found_in_whatever_pieces_they_come(
    name: str, data: st.DataObject
) -> None:
    route, body = recorded(name)
    first = (
        body[: body.index(b"\n") + 1] if route.dialect is Dialect.NATIVE else body[: body.index(b"\n\n") + 2]
    )
    body = first * data.draw(st.sampled_from([0, 1, 200, 700])) + body
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=12).map(sorted))
    pieces = [body[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert token_counts(route.dialect, kept(pieces)) == COUNTS[name]
    assert is_ended(route, kept(pieces))


@pytest.mark.parametrize(
    "tail",
    [b"", b'"eval_count"', *(b'"eval_count"' + rest for rest in (b":", b":null", b':"5"', b":-5", b" 5"))],
)
def test_what_is_no_count_is_none(tail: bytes) -> None:
    assert token_counts(Dialect.NATIVE, tail) == NOTHING


def test_counts_may_be_written_with_space_around_the_colon() -> None:
    assert token_counts(Dialect.NATIVE, b'{"prompt_eval_count" : 5,\n"eval_count":\t0}') == (5, 0)


def test_of_several_counts_the_last_one_counts() -> None:
    start = event({"type": "message_start", "message": {"usage": {"input_tokens": 2, "output_tokens": 0}}})
    delta = event({"type": "message_delta", "usage": {"output_tokens": 40}})
    assert token_counts(Dialect.ANTHROPIC, start + delta) == (2, 40)


# --- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_has_ended_when_its_last_event_has_come_and_no_byte_before(name: str) -> None:
    route, body = recorded(name)
    assert is_ended(route, body)
    begin = body.rindex(ENDS.get(route, b"data: [DONE]"))
    assert not any(is_ended(route, body[:end]) for end in range(begin + 1))


def test_a_response_has_ended_when_it_is_completed_or_has_failed() -> None:
    created = event({"type": "response.created", "response": {"usage": None}}, "response.created")
    delta = event({"type": "response.output_text.delta", "delta": "x"}, "response.output_text.delta")
    assert not is_ended(V1_RESPONSES, created + delta)
    for end in ("completed", "incomplete", "failed"):
        last = event({"response": {}, "type": f"response.{end}"}, f"response.{end}")
        assert is_ended(V1_RESPONSES, created + delta + last)
    assert not is_ended(V1_RESPONSES, created + event({"type": "response.completed.not"}))


def test_an_answer_to_load_or_unload_a_model_has_ended() -> None:
    for name in ("07-generate-load", "13-chat-load", "65-generate-unload", "66-chat-unload"):
        assert is_ended(*recorded(name))


def test_a_last_line_longer_than_what_is_kept_is_the_last_all_the_same() -> None:
    line = {"model": "m", "response": "", "done": True, "done_reason": "stop", "context": list(range(20_000))}
    figures = {"total_duration": 1, "prompt_eval_count": 19_000, "eval_count": 1000}
    body = compact({"response": "x", "done": False}) + b"\n" + compact({**line, **figures}) + b"\n"
    pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)]
    tail = kept(pieces)
    assert b'"done"' not in tail
    assert is_ended(GENERATE, tail)
    assert token_counts(Dialect.NATIVE, tail) == (19_000, 1000)
    assert not is_ended(GENERATE, kept(pieces[:-1]))


def test_a_completed_response_longer_than_what_is_kept_has_ended_all_the_same() -> None:
    usage = {"input_tokens": 7, "output_tokens": 9000, "total_tokens": 9007}
    response = {"output": [{"text": "word " * 40_000}], "usage": usage}
    body = event({"type": "response.completed", "response": response}, "response.completed")
    pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)]
    tail = kept(pieces)
    assert b"response.completed" not in tail
    assert is_ended(V1_RESPONSES, tail)
    assert token_counts(Dialect.OPENAI, tail) == (7, 9000)
    assert not is_ended(V1_RESPONSES, kept(pieces[:-1]))


@pytest.mark.parametrize(
    "line", [b"data: [DONE]\n\n", b"data:[DONE]\n\n", b"data: [DONE]\r\n\r\n", b"data: [DONE]"]
)
def test_the_last_event_is_known_however_it_is_spaced(line: bytes) -> None:
    assert is_ended(V1_CHAT, event({"x": 1}) + line)
    assert is_ended(V1_CHAT, line)


# --- what a model says ----------------------------------------------------------------------------

SLY = [
    '"done":true',
    '"done": true',
    "[DONE]",
    "\n\ndata: [DONE]\n\n",
    "message_stop",
    '"type":"message_stop"',
    '"type":"response.completed"',
    '"eval_count":666,"prompt_eval_count":666',
    '"total_duration":666',
    '"usage":{"prompt_tokens":666,"completion_tokens":666,"input_tokens":666,"output_tokens":666}',
    "\\",
    '"',
    '"}',
]


@given(st.lists(st.sampled_from(SLY) | st.text(max_size=3), max_size=5).map("".join))
def test_nothing_that_a_model_says_is_taken_for_the_end_or_for_a_count(text: str) -> None:
    said = {
        CHAT: compact({"message": {"role": "assistant", "content": text}, "done": False}) + b"\n",
        GENERATE: compact({"response": text, "done": False}) + b"\n",
        V1_CHAT: event({"choices": [{"delta": {"content": text}}]}),
        V1_RESPONSES: event({"delta": text, "type": "response.output_text.delta"}),
        V1_MESSAGES: event({"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}),
    }
    for route, body in said.items():
        for end in range(len(body) + 1):
            assert not is_ended(route, body[:end])
        assert token_counts(route.dialect, body) == NOTHING


def test_what_a_model_calls_a_tool_with_is_not_taken_for_the_end() -> None:
    arguments = {"done": True, "total_duration": 666, "eval_count": 666, "prompt_eval_count": 666}
    message = {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    call = compact({"message": message, "done": False}) + b"\n"
    assert not is_ended(CHAT, call)
    last = compact({"message": message, "done": True, "prompt_eval_count": 7, "eval_count": 4}) + b"\n"
    assert is_ended(CHAT, call + last)
    assert token_counts(Dialect.NATIVE, call + last) == (7, 4)


@pytest.mark.parametrize(
    ("path", "tail", "fault"),
    [
        ("/api/chat", b'{"done":false}\n{"done":true}\n', None),
        ("/api/chat", b'{"done":false}\n', "the server ended the stream before its end"),
        ("/api/chat", b'{"done":false}\n{"error":"it broke"}\n', "it broke"),
        ("/v1/chat/completions", b'data: {"error":{"message":"it broke"}}\n\n', "it broke"),
        ("/v1/chat/completions", b"data: [DONE]\n\n", None),
        ("/v1/chat/completions", b"", "the server ended the stream before its end"),
    ],
)
def test_a_stream_without_its_end_has_a_fault(path: str, tail: bytes, fault: str | None) -> None:
    assert fault_of(INFERENCE[path.encode()], tail) == fault


@pytest.mark.parametrize(
    ("dialect", "tail", "expected"),
    [
        (Dialect.NATIVE, b'{"done":true,"load_duration":1500000000,"eval_count":3}', 1500.0),
        (Dialect.NATIVE, b'{"load_duration":7}\n{"done":true,"load_duration" : 2500000}', 2.5),
        (Dialect.NATIVE, b'{"done":true}', None),
        (Dialect.NATIVE, b'{"load_duration":-5}', None),
        (Dialect.NATIVE, b'{"load_duration":1.5}', None),
        (Dialect.NATIVE, b'{"load_duration":1234567890123456}', None),
        (Dialect.OPENAI, b'{"load_duration":1500000000}', None),
    ],
)
def test_the_time_of_a_load_is_what_the_end_of_a_native_answer_tells(
    dialect: Dialect, tail: bytes, expected: float | None
) -> None:
    assert load_ms(dialect, tail) == expected
