"""Answers of OpenAI servers as native clients get them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ollama import ChatResponse, EmbedResponse, GenerateResponse

from manager.wire.translate.event_stream import MOST_EVENT_BYTES
from manager.wire.translate.hub import Usage
from manager.wire.translate.native_answer import stamp
from manager.wire.translate.openai_answer import MOST_CALL_BYTES, MOST_WHOLE_BYTES
from tests.contract.compare import load_recordings
from tests.support.native_clients import MS, answered, asked, chunk, stream_of

if TYPE_CHECKING:
    from manager.wire.translate import Translation

RECORDED = {one["name"]: one for one in load_recordings()}
HI = {"messages": [{"role": "user", "content": "hi"}]}
COUNTS = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}


def chatting(*, stream: bool = True) -> Translation:
    return asked("/api/chat", {**HI, "stream": stream})[0]


def prompting(*, stream: bool = True) -> Translation:
    return asked("/api/generate", {"prompt": "hi", "stream": stream})[0]


def lines(answer: bytes) -> list[dict[str, Any]]:
    assert answer.endswith(b"\n")
    return [json.loads(line) for line in answer.splitlines()]


def streamed(*chunks: dict[str, Any] | str, end: bytes = b"data: [DONE]\n\n") -> list[dict[str, Any]]:
    through = chatting()
    found = lines(answered(through, [stream_of(*chunks, end=end)]))
    assert through.fault is None
    return found


def messages(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one["message"] for one in found]


def fault_of(*chunks: dict[str, Any] | str, end: bytes = b"data: [DONE]\n\n") -> str | None:
    through = chatting()
    answered(through, [stream_of(*chunks, end=end)])
    return through.fault


def whole(message: Any, finish: str | None = "stop", **more: Any) -> bytes:
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return json.dumps({"object": "chat.completion", "choices": [choice], **more}).encode()


# --- the shapes of Ollama -------------------------------------------------------------------------


def shape(document: dict[str, Any]) -> list[str]:
    """The fields of a recorded answer without what only Ollama itself can tell."""
    return [name for name in document if name not in ("load_duration", "context")]


def of_events(name: str) -> bytes:
    return "\n\n".join(RECORDED[name]["sse"]).encode()


@pytest.mark.parametrize(
    ("recording", "through"), [("chat-stream", chatting), ("generate-stream", prompting)]
)
def test_a_stream_has_the_fields_of_a_recorded_one_in_their_order(recording: str, through: Any) -> None:
    found = lines(answered(through(), [of_events("v1-chat-stream-usage")]))
    recorded = RECORDED[recording]["lines"]
    assert [list(one) for one in found] == [shape(one) for one in recorded]
    assert [one["done"] for one in found] == [one["done"] for one in recorded]
    assert found[-1]["done_reason"] == recorded[-1]["done_reason"] == "length"


@pytest.mark.parametrize(("recording", "through"), [("chat", chatting), ("generate", prompting)])
def test_a_whole_answer_has_the_fields_of_a_recorded_one(recording: str, through: Any) -> None:
    answer = answered(through(stream=False), [json.dumps(RECORDED["v1-chat"]["json"]).encode()])
    recorded = shape(RECORDED[recording]["json"])
    # Nothing is seen of a whole answer before its end: all its time is that of the answer.
    assert list(json.loads(answer)) == [name for name in recorded if name != "prompt_eval_duration"]
    assert not answer.endswith(b"\n")


def test_the_library_of_ollama_reads_the_answers() -> None:
    tools = {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"a": 1}'}}]}
    stream = stream_of(chunk({"reasoning": "hm"}), chunk({"content": "a"}), chunk(tools, "tool_calls"))
    for one in lines(answered(chatting(), [stream])):
        ChatResponse.model_validate(one)
    answer = answered(chatting(stream=False), [whole({"content": "a", **tools, "reasoning_content": "hm"})])
    response = ChatResponse.model_validate_json(answer)
    assert response.message.tool_calls is not None
    assert (response.message.thinking, response.message.tool_calls[0].function.arguments) == ("hm", {"a": 1})
    for one in lines(answered(prompting(), [stream_of(chunk({"reasoning": "hm", "content": "a"}))])):
        GenerateResponse.model_validate(one)
    vectors = json.dumps({"data": [{"index": 0, "embedding": [3, 4]}]}).encode()
    read = EmbedResponse.model_validate_json(answered(asked("/api/embed", {"input": "a"})[0], [vectors]))
    assert read.embeddings == [[0.6, 0.8]]


def test_times_come_from_the_clock() -> None:
    through = chatting()
    stream = stream_of(chunk({"content": "a"}), chunk({"content": "b"}, "stop"), chunk(usage=COUNTS))
    first, second, last = lines(answered(through, [stream]))
    assert [one["created_at"] for one in (first, second)] == [
        "2026-11-21T08:32:31.003Z",
        "2026-11-21T08:32:31.004Z",
    ]
    assert last["total_duration"] == last["prompt_eval_duration"] + last["eval_duration"]
    assert (last["prompt_eval_duration"], last["eval_duration"]) == (MS, 3 * MS)
    assert (last["prompt_eval_count"], last["eval_count"]) == (7, 4)
    assert through.usage == Usage(7, 4)


@pytest.mark.parametrize(
    ("now_ns", "text"),
    [
        (0, "1970-01-01T00:00:00Z"),
        (1_795_249_951_118_527_130, "2026-11-21T08:32:31.11852713Z"),
        (1_795_249_951_000_000_001, "2026-11-21T08:32:31.000000001Z"),
    ],
)
def test_a_time_is_written_as_go_writes_it(now_ns: int, text: str) -> None:
    assert stamp(now_ns) == text


# --- what servers send ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thinking_comes_as_such(name: str) -> None:
    found = streamed(chunk({"role": "assistant", "content": "", name: "h"}), chunk({"content": "a"}, "stop"))
    assert messages(found) == [
        {"role": "assistant", "content": "", "thinking": "h"},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": ""},
    ]


def test_thinking_that_comes_under_both_names_comes_once() -> None:
    both = {"reasoning": "h", "reasoning_content": "h"}
    assert [one.get("thinking") for one in messages(streamed(chunk(both)))] == ["h", None]


def test_a_prompt_gets_its_thinking_too() -> None:
    answer = answered(prompting(stream=False), [whole({"content": "a", "reasoning": "h"})])
    assert {name: json.loads(answer)[name] for name in ("response", "thinking")} == {
        "response": "a",
        "thinking": "h",
    }


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("model_length", "length"),
        ("tool_calls", "stop"),
        ("function_call", "stop"),
        ("content_filter", "content_filter"),
        ("eos_token", "stop"),
        (None, "stop"),
    ],
)
def test_the_reasons_of_an_end(finish: str | None, reason: str) -> None:
    assert streamed(chunk({"content": "a"}, finish))[-1]["done_reason"] == reason
    answer = answered(chatting(stream=False), [whole({"content": "a"}, finish or "stop")])
    assert json.loads(answer)["done_reason"] == reason


@pytest.mark.parametrize("finish", ["abort", "error", "insufficient_system_resource"])
def test_some_reasons_are_failures(finish: str) -> None:
    assert (
        fault_of(chunk({"content": "a"}, finish)) == f"the server ended the answer with the reason {finish}"
    )


def test_a_refusal_is_text_and_a_reason() -> None:
    found = streamed(chunk({"refusal": "n"}), chunk({"refusal": "o"}), chunk({}, "stop"))
    assert "".join(one["content"] for one in messages(found)) == "no"
    assert found[-1]["done_reason"] == "content_filter"
    answer = json.loads(answered(chatting(stream=False), [whole({"content": None, "refusal": "no"})]))
    assert (answer["message"]["content"], answer["done_reason"]) == ("no", "content_filter")


def call(
    index: int | None = None, call_id: str | None = None, name: str | None = None, text: Any = None
) -> dict[str, Any]:
    found = {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": text}}
    return {key: value for key, value in found.items() if value is not None}


def calls_of(*deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = streamed(*(chunk({"tool_calls": delta}) for delta in deltas), chunk({}, "tool_calls"))
    assert [one["done"] for one in found] == [False, True]
    assert "tool_calls" not in found[1]["message"]
    return list(found[0]["message"]["tool_calls"])


def native(number: int, call_id: str, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "function": {"index": number, "name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    "deltas",
    [
        # OpenAI, vLLM and llama.cpp: the index says whose piece it is.
        [[call(0, "a", "f", "")], [call(0, text='{"x"')], [call(0, text=":1}")], [call(1, "b", "g", "{}")]],
        # Pieces of two calls take turns.
        [[call(0, "a", "f", ""), call(1, "b", "g", "")], [call(1, text="{}")], [call(0, text='{"x":1}')]],
        # The name and the id are repeated.
        [[call(0, "a", "f", '{"x"')], [call(0, "a", "f", ":1}")], [call(1, "b", "g", "{}")]],
        # Whole calls without an index, or with the same one.
        [[call(None, "a", "f", '{"x":1}'), call(None, "b", "g", "{}")]],
        [[call(0, "a", "f", '{"x":1}'), call(0, "b", "g", "{}")]],
        # Arguments as an object, and none at all.
        [[call(0, "a", "f", {"x": 1})], [call(1, "b", "g")]],
        [[call(None, "a", "f", '{"x":1}')], [call(None, "b", "g", " ")]],
    ],
)
def test_calls_come_in_one_piece_each(deltas: list[list[dict[str, Any]]]) -> None:
    assert calls_of(*deltas) == [native(0, "a", "f", {"x": 1}), native(1, "b", "g", {})]


def test_calls_without_ids_get_some() -> None:
    both = [call(None, "", "f", "{}"), call(None, None, "f", '{"x":1}')]
    assert calls_of(both) == [native(0, "call_r1_0", "f", {}), native(1, "call_r1_1", "f", {"x": 1})]
    # With an index the name alone begins no second call.
    assert calls_of([call(0, None, "f", '{"x"')], [call(0, None, "f", ":1}")]) == [
        native(0, "call_r1_0", "f", {"x": 1})
    ]


def test_a_whole_answer_has_its_calls_in_the_message() -> None:
    said = {"content": None, "tool_calls": [call(None, "a", "f", '{"x": 1}'), call(None, "b", "f", "{}")]}
    answer = json.loads(answered(chatting(stream=False), [whole(said, "tool_calls")]))
    assert answer["message"] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [native(0, "a", "f", {"x": 1}), native(1, "b", "f", {})],
    }


@pytest.mark.parametrize("text", ["{", "[]", "1", '"a"', "{} {}"])
def test_arguments_that_are_no_object_are_a_fault(text: str) -> None:
    fault = "the model called f with arguments that are no JSON object"
    assert fault_of(chunk({"tool_calls": [call(0, "a", "f", text)]}, "tool_calls")) == fault


def test_arguments_that_nest_too_deep_are_a_fault() -> None:
    text = '{"a":' * 1000 + "1" + "}" * 1000
    assert (
        fault_of(chunk({"tool_calls": [call(0, "a", "f", text)]}))
        == "the server sent an answer that nests too deep"
    )


def test_the_calls_of_an_answer_are_bounded() -> None:
    piece = "x" * (MOST_EVENT_BYTES // 2)
    pieces = [chunk({"tool_calls": [call(0, text=piece)]})] * (MOST_CALL_BYTES // len(piece))
    fault = fault_of(chunk({"tool_calls": [call(0, "a", "f")]}), *pieces)
    assert fault == f"the server sent calls of tools of more than {MOST_CALL_BYTES} bytes"
    many = [chunk({"tool_calls": [call(None, None, "f")] * 1000})] * (MOST_CALL_BYTES // 256 // 1000 + 1)
    assert fault_of(*many) == fault


@pytest.mark.parametrize(
    ("counts", "usage"),
    [
        (COUNTS, Usage(7, 4)),
        ({**COUNTS, "prompt_tokens_details": {"cached_tokens": 3}}, Usage(7, 4, 3)),
        ({**COUNTS, "prompt_tokens_details": {"cached_tokens": 9}}, Usage(7, 4, 7)),
        ({**COUNTS, "prompt_tokens_details": {"cached_tokens": "3"}}, Usage(7, 4)),
        ({**COUNTS, "prompt_tokens_details": None}, Usage(7, 4)),
        ({"prompt_tokens": 7}, Usage(7, 0)),
        ({"completion_tokens": 4}, Usage(0, 4)),
        ({"prompt_tokens": True, "completion_tokens": -1}, None),
        ({"prompt_tokens": 1.5, "completion_tokens": 2**60}, None),
        ([], None),
        (None, None),
    ],
)
def test_the_numbers_of_tokens(counts: Any, usage: Usage | None) -> None:
    through = chatting()
    answered(through, [stream_of(chunk({"content": "a"}, "stop"), chunk(usage=counts))])
    assert through.usage == usage
    through = chatting(stream=False)
    answered(through, [whole({"content": "a"}, usage=counts)])
    assert through.usage == usage


def test_the_last_numbers_count_where_every_chunk_has_some() -> None:
    through = chatting()
    first, last = ({"prompt_tokens": 7, "completion_tokens": count} for count in (1, 2))
    answered(
        through,
        [
            stream_of(
                chunk({"content": "a"}, usage=first), chunk({"content": "b"}, usage=last), chunk({}, "stop")
            )
        ],
    )
    assert through.usage == Usage(7, 2)


# --- ends and faults ------------------------------------------------------------------------------


def test_a_stream_may_end_without_the_mark_after_its_reason() -> None:
    assert streamed(chunk({"content": "a"}, "stop"), end=b"")[-1]["done"] is True


def test_what_follows_the_end_is_nothing() -> None:
    found = streamed(
        chunk({"content": "a"}, "stop"), end=b"data: [DONE]\n\ndata: {\ndata: [DONE]\n\ndata: x\n\n"
    )
    assert [one["done"] for one in found] == [False, True]
    through = chatting()
    through.feed(stream_of(chunk({"content": "a"})))
    assert (through.feed(b"data: x\n\n"), through.end(), through.fault) == (b"", b"", None)


def test_events_of_other_kinds_are_passed_over() -> None:
    other = [
        chunk(),
        {"type": "ping"},
        {"choices": None},
        {"choices": [{"index": 1, "delta": {"content": "no"}}]},
    ]
    assert [one["content"] for one in messages(streamed(*other, chunk({"content": "a"}, "stop")))] == [
        "a",
        "",
    ]
    assert streamed(" ", chunk({"content": "a"}))[0]["message"]["content"] == "a"
    assert len(streamed({"choices": [{"finish_reason": "stop"}]})) == 1


def test_the_mark_of_the_end_alone_is_no_answer() -> None:
    through = chatting()
    assert answered(through, [b"data: [DONE]\n\n"]) == b""
    assert through.fault == "the server ended the answer before its end"


@pytest.mark.parametrize("end", [b"", b'data: {"choices"', b": comment\n\n"])
def test_a_stream_that_is_cut_is_a_fault(end: bytes) -> None:
    through = chatting()
    answer = answered(through, [stream_of(chunk({"content": "a"}), end=end)])
    assert [one["done"] for one in lines(answer)] == [False]
    assert through.fault in (
        "the server ended the answer before its end",
        "the server sent an answer that is not of OpenAI's API",
    )


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        ({"error": {"message": "out of memory", "code": 500}}, "out of memory"),
        ({"error": "out of memory"}, "out of memory"),
        ({"object": "error", "message": "out of memory"}, "out of memory"),
        ({"error": {}}, "the server failed"),
        ({"error": 1}, "the server failed"),
    ],
)
def test_an_error_in_an_answer_is_its_fault(error: dict[str, Any], fault: str) -> None:
    assert fault_of(chunk({"content": "a"}), error) == fault
    through = chatting(stream=False)
    assert (answered(through, [json.dumps(error).encode()]), through.fault) == (b"", fault)


@pytest.mark.parametrize(
    "bad",
    [
        "x",
        "[]",
        "1",
        {"choices": {}},
        {"choices": [1]},
        {"choices": [{"delta": [1]}]},
        {"choices": [{"delta": {"content": 1}}]},
        {"choices": [{"delta": {"content": [{"type": "text", "text": "a"}]}}]},
        {"choices": [{"delta": {"reasoning": {}}}]},
        {"choices": [{"delta": {"tool_calls": {}}}]},
        {"choices": [{"delta": {"tool_calls": [1]}}]},
        {"choices": [{"delta": {"tool_calls": [{"function": [1]}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"function": {"name": 1}}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}}]},
        {"choices": [{"delta": {}, "finish_reason": 1}]},
    ],
)
def test_what_is_not_of_the_api_is_a_fault(bad: Any) -> None:
    through = chatting()
    answer = answered(through, [stream_of(chunk({"content": "a"}), bad, chunk({"content": "b"}))])
    assert [one["message"]["content"] for one in lines(answer)] == ["a"]
    assert through.fault == "the server sent an answer that is not of OpenAI's API"


def test_a_call_without_a_name_is_a_fault() -> None:
    assert (
        fault_of(chunk({"tool_calls": [{"index": 0}]}))
        == "the server sent the call of a tool without its name"
    )


def test_an_event_beyond_the_bound_is_a_fault() -> None:
    through = chatting()
    for piece in (stream_of(chunk({"content": "a"}), end=b""), b"data: " + b"x" * MOST_EVENT_BYTES, b"\n\n"):
        through.feed(piece)
    assert through.fault == f"the server sent an event of more than {MOST_EVENT_BYTES} bytes"
    assert through.end() == b""
    through = chatting()
    assert through.feed(b"data: " + b"x" * (MOST_EVENT_BYTES - 6)) == b""
    assert through.end() == b""
    assert through.fault == "the server sent an answer that is not of OpenAI's API"


def test_a_whole_answer_beyond_the_bound_is_a_fault() -> None:
    through = chatting(stream=False)
    half = b" " * (MOST_WHOLE_BYTES // 2)
    assert [through.feed(piece) for piece in (half, half, b" ", b" ")] == [b""] * 4
    assert through.fault == f"the server sent an answer of more than {MOST_WHOLE_BYTES} bytes"
    assert through.end() == b""


@pytest.mark.parametrize("body", [b"", b"{}", b'{"choices":[]}', b"<html>", b"data: [DONE]\n\n"])
def test_a_whole_answer_without_a_choice_is_a_fault(body: bytes) -> None:
    through = chatting(stream=False)
    assert answered(through, [body]) == b""
    assert through.fault is not None


# --- every split ----------------------------------------------------------------------------------


def short(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": delta, "finish_reason": finish}]}


FULL = stream_of(
    short({"reasoning": "häm"}),
    short({"content": "grüße 😀"}),
    short({"tool_calls": [call(0, "a", "f", '{"x":')]}),
    short({"tool_calls": [call(0, text='"é"}')]}, "tool_calls"),
    {"usage": COUNTS},
)
SPELLINGS = {
    "usual": FULL,
    "crlf": FULL.replace(b"\n", b"\r\n"),
    "no space": FULL.replace(b"data: ", b"data:"),
    "comments": FULL.replace(b"data: ", b": ping\n\n: again\ndata: "),
    "no last newline": FULL.rstrip(),
    "named": FULL.replace(b"data: ", b"event: message\nid: 1\ndata: "),
}


def without_times(answer: bytes) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in one.items() if name != "created_at" and "duration" not in name}
        for one in lines(answer)
    ]


WANTED = without_times(answered(chatting(), [FULL]))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_split_gives_the_same_answer(spelling: str) -> None:
    data = SPELLINGS[spelling]
    for at in range(len(data) + 1):
        assert without_times(answered(chatting(), [data[:at], data[at:]])) == WANTED
    through = chatting()
    assert without_times(answered(through, [bytes([one]) for one in data])) == WANTED
    assert through.usage == Usage(7, 4)
    assert [one["message"]["content"] for one in WANTED] == ["", "grüße 😀", "", ""]


NAMES = [
    *("choices", "delta", "message", "content", "tool_calls", "function", "name", "arguments", "index", "id"),
    *("finish_reason", "usage", "prompt_tokens", "error", "object", "reasoning", "refusal", "stop_reason"),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=3), st.booleans(), st.binary(max_size=20))
def test_garbage_ends_in_an_answer_or_a_fault(documents: list[Any], stream: bool, rubbish: bytes) -> None:
    through = chatting(stream=stream)
    bodies = [
        json.dumps({"choices": [{"delta": one}]} if at % 2 else one) for at, one in enumerate(documents)
    ]
    answer = answered(through, [stream_of(*bodies, end=rubbish) if stream else "".join(bodies).encode()])
    if through.fault is None:
        assert json.loads(answer.splitlines()[-1])["done"] is True


@given(st.lists(st.binary(max_size=30), max_size=6), st.booleans())
def test_bytes_that_are_no_answer_are_a_fault_at_every_split(pieces: list[bytes], stream: bool) -> None:
    once, through = chatting(stream=stream), chatting(stream=stream)
    assert answered(once, [b"".join(pieces)]) == answered(through, pieces) == b""
    assert once.fault == through.fault is not None
