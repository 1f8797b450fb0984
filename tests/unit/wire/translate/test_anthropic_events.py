"""Answers of an Anthropic server in neutral terms, in whatever pieces they come, and garbage."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.translate import anthropic_events as under_test
from manager.wire.translate.anthropic_client import MessagesClient
from manager.wire.translate.anthropic_events import MessagesEvents
from manager.wire.translate.hub import (
    ArgumentsCame,
    CallBegan,
    Ended,
    Failed,
    Stop,
    TextCame,
    ThinkingCame,
    Usage,
)
from tests.support.translating import stream_of, written

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manager.wire.translate.hub import AnswerEvent

TOKENS = {
    "input_tokens": 10,
    "cache_creation_input_tokens": 3,
    "cache_read_input_tokens": 5,
    "output_tokens": 1,
}
USAGE = Usage(input_tokens=18, output_tokens=20, cached_tokens=5)
START: dict[str, Any] = {
    "type": "message_start",
    "message": {"type": "message", "content": [], "usage": TOKENS},
}
STOP: dict[str, Any] = {"type": "message_stop"}
END: tuple[dict[str, Any], ...] = (
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 20}},
    STOP,
)


def begin(index: int, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def more(index: int, kind: str, **delta: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **delta}}


def over(index: int) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


STREAM = stream_of(
    START,
    {"type": "ping"},
    begin(0, type="thinking", thinking="", signature=""),
    more(0, "thinking_delta", thinking="hm"),
    more(0, "thinking_delta", thinking="m"),
    more(0, "signature_delta", signature="sig"),
    over(0),
    begin(1, type="redacted_thinking", data="x"),
    over(1),
    begin(2, type="text", text=""),
    more(2, "text_delta", text="Grüß"),
    more(2, "citations_delta", citation={}),
    more(2, "text_delta", text=" dich"),
    over(2),
    begin(3, type="server_tool_use", id="s", name="web_search", input={}),
    more(3, "input_json_delta", partial_json="{}"),
    over(3),
    begin(4, type="tool_use", id="c1", name="get", input={}),
    more(4, "input_json_delta", partial_json=""),
    more(4, "input_json_delta", partial_json='{"a":'),
    more(4, "input_json_delta", partial_json="1}"),
    over(4),
    {"type": "news", "of": "later versions"},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "tool_use", "stop_sequence": None},
        "usage": {"output_tokens": 20},
    },
    STOP,
)
EVENTS: list[AnswerEvent] = [
    ThinkingCame("hmm"),
    ThinkingCame("", "sig"),
    TextCame("Grüß dich"),
    CallBegan(0, "c1", "get"),
    ArgumentsCame(0, '{"a":1}'),
    Ended(Stop.TOOL_CALLS, USAGE),
]
MESSAGE: dict[str, Any] = {
    "type": "message",
    "content": [
        {"type": "thinking", "thinking": "hmm", "signature": "sig"},
        {"type": "text", "text": "Grüß dich"},
        {"type": "tool_use", "id": "c1", "name": "get", "input": {"a": 1}},
        {"type": "tool_use", "id": "c2", "name": "put", "input": {}},
        {"type": "server_tool_use", "id": "s"},
        "nonsense",
    ],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {**TOKENS, "output_tokens": 20},
}


def read(answer: bytes, *, stream: bool = True, cuts: Iterable[int] = ()) -> list[AnswerEvent]:
    reader = MessagesEvents()
    reader.expect(stream=stream)
    places = [0, *sorted(cuts), len(answer)]
    found = [event for begin, end in pairwise(places) for event in reader.feed(answer[begin:end])]
    found += reader.end()
    assert reader.feed(answer) == reader.end() == []  # nothing comes after the end
    return found


def joined(events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
    """The same events with pieces of one text in one, and without empty ones."""
    found: list[AnswerEvent] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, TextCame) and isinstance(last, TextCame):
            found[-1] = TextCame(last.text + event.text)
        elif isinstance(event, ArgumentsCame) and isinstance(last, ArgumentsCame):
            found[-1] = ArgumentsCame(event.number, last.text + event.text)
        elif isinstance(event, ThinkingCame) and isinstance(last, ThinkingCame) and not event.signature:
            found[-1] = ThinkingCame(last.text + event.text, last.signature)
        elif event not in (TextCame(""), ThinkingCame("")):
            found.append(event)
    return found


def test_a_stream() -> None:
    assert joined(read(STREAM)) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_a_stream_is_the_same_at_every_split(cuts: list[int]) -> None:
    assert read(STREAM, cuts=cuts) == read(STREAM)


def test_a_stream_byte_by_byte() -> None:
    assert read(STREAM, cuts=range(1, len(STREAM))) == read(STREAM)


def test_a_whole_message() -> None:
    expected = [
        ThinkingCame("hmm", "sig"),
        TextCame("Grüß dich"),
        CallBegan(0, "c1", "get"),
        ArgumentsCame(0, '{"a":1}'),
        CallBegan(1, "c2", "put"),
        ArgumentsCame(1, "{}"),
        Ended(Stop.TOOL_CALLS, USAGE),
    ]
    answer = json.dumps(MESSAGE).encode()

    assert read(answer, stream=False) == read(answer, stream=False, cuts=[1, 50]) == expected


STOPS: dict[str | None, Stop] = {
    "end_turn": Stop.END,
    "max_tokens": Stop.LENGTH,
    "model_context_window_exceeded": Stop.LENGTH,
    "tool_use": Stop.TOOL_CALLS,
    "stop_sequence": Stop.STOP_SEQUENCE,
    "refusal": Stop.REFUSED,
    "pause_turn": Stop.END,
    "something new": Stop.END,
    None: Stop.END,
}


@pytest.mark.parametrize("reason", STOPS)
def test_the_reason_of_the_end(reason: str | None) -> None:
    sequence = "###" if reason == "stop_sequence" else None
    end = {"stop_reason": reason, "stop_sequence": sequence}
    stream = stream_of({"type": "message_delta", "delta": end}, STOP)
    message = json.dumps({"type": "message", "content": [], **end}).encode()

    expected = [Ended(STOPS[reason], None, sequence)]
    assert read(stream) == read(message, stream=False) == expected


@pytest.mark.parametrize(
    ("tokens", "usage"),
    [
        ({"output_tokens": 2}, Usage(0, 2)),
        ({"input_tokens": 7, "output_tokens": 2, "cache_read_input_tokens": None}, Usage(7, 2)),
        ({"input_tokens": -1, "output_tokens": "2"}, None),
        ({"input_tokens": 2**60}, None),
        ([], None),
    ],
)
def test_tokens_are_what_the_server_tells(tokens: Any, usage: Usage | None) -> None:
    stream = stream_of({"type": "message_delta", "delta": {}, "usage": tokens}, STOP)

    assert read(stream) == [Ended(Stop.END, usage)]


def test_later_numbers_of_tokens_replace_earlier_ones() -> None:
    later = {"type": "message_delta", "delta": {}, "usage": {"input_tokens": 1, "output_tokens": 2}}

    assert read(stream_of(START, later, STOP)) == [Ended(Stop.END, Usage(9, 2, 5))]


def test_text_and_input_may_come_with_the_beginning_of_a_block() -> None:
    stream = stream_of(
        begin(0, type="text", text="a"), begin(1, type="tool_use", id="c", name="n", input={"a": 1}), STOP
    )

    assert read(stream) == [
        TextCame("a"),
        CallBegan(0, "c", "n"),
        ArgumentsCame(0, '{"a":1}'),
        Ended(Stop.END),
    ]


def test_a_change_of_the_message_may_have_no_reason() -> None:
    reason = {"type": "message_delta", "delta": {"stop_reason": "stop_sequence", "stop_sequence": "#"}}
    tokens = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 20}}

    assert read(stream_of(reason, tokens, STOP)) == [Ended(Stop.STOP_SEQUENCE, Usage(0, 20), "#")]


EARLY = "the server ended the stream early"
NO_EVENT = "the server sent an event that is no JSON object with a type"
BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", EARLY),
    "cut": (stream_of(START, begin(0, type="text", text="")), EARLY),
    "cut amid an event": (stream_of(START, *END)[:-20], EARLY),
    "overloaded": (
        stream_of(START, {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
        "Overloaded",
    ),
    "an error without words": (stream_of({"type": "error"}), "the server reported an error"),
    "no JSON": (b"data: nonsense\n\n", NO_EVENT),
    "no object": (b"data: []\n\n", NO_EVENT),
    "no type": (b"data: {}\n\n", NO_EVENT),
    "too large": (b"data: " + b"a" * 2_000_000, "the server sent an event of more than 1048576 bytes"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_stream_is_a_failure(case: str) -> None:
    answer, message = BROKEN[case]

    assert read(answer)[-1] == Failed(message)


NO_MESSAGE = "the server's answer is no message"
BROKEN_MESSAGES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", NO_MESSAGE),
    "no JSON": (b"nonsense", NO_MESSAGE),
    "another document": (b'{"type": "completion"}', NO_MESSAGE),
    "an error": (b'{"type": "error", "error": {"message": "oh"}}', "oh"),
}


@pytest.mark.parametrize("case", BROKEN_MESSAGES)
def test_a_broken_message_is_a_failure(case: str) -> None:
    answer, message = BROKEN_MESSAGES[case]

    assert read(answer, stream=False) == [Failed(message)]


def test_the_last_event_counts_without_the_empty_line_behind_it() -> None:
    assert read(stream_of(*END)[:-2]) == [Ended(Stop.END, Usage(0, 20))]


def test_nothing_counts_behind_the_end() -> None:
    assert read(stream_of(*END, begin(0, type="text", text="a"))) == [Ended(Stop.END, Usage(0, 20))]


def test_a_whole_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "MOST_ANSWER_BYTES", 10)

    assert read(b"a" * 11, stream=False) == [Failed("the server's answer has more than 10 bytes")]


@pytest.mark.parametrize("stream", [True, False])
def test_calls_are_bounded(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "MOST_CALLS", 1)
    calls = [{"type": "tool_use", "id": "c", "name": "n", "input": {}}] * 2
    message = {"type": "message", "content": calls}
    answer = stream_of(*(begin(at, **call) for at, call in enumerate(calls)), *END)
    found = read(answer if stream else json.dumps(message).encode(), stream=stream)

    assert [event for event in found if not isinstance(event, ArgumentsCame)] == [
        CallBegan(0, "c", "n"),
        Failed("the server sent more than 1 calls of tools"),
    ]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_NAMES = st.sampled_from(
    ["type", "index", "content_block", "delta", "message", "usage", "error", "text", "input", "content"]
)
_KINDS = st.sampled_from(
    [
        "message",
        "message_start",
        "content_block_start",
        "content_block_delta",
        "message_delta",
        "tool_use",
        "text",
        "text_delta",
        "input_json_delta",
        "error",
    ]
)
_NEAR = st.recursive(
    _JSON | _KINDS,
    lambda inner: st.dictionaries(_NAMES, inner, max_size=5) | st.lists(inner, max_size=3),
    max_leaves=12,
)


@given(st.lists(_NEAR, max_size=6), st.booleans())
def test_garbage_ends_in_one_end_or_failure(documents: list[Any], stream: bool) -> None:
    pieces = [b"data: %b\n\n" % json.dumps(document).encode() for document in documents]
    answer = b"".join(pieces) if stream else json.dumps(documents[0] if documents else None).encode()
    found = read(answer, stream=stream)

    assert [isinstance(event, Ended | Failed) for event in found] == [False] * (len(found) - 1) + [True]


@given(st.binary(max_size=60), st.booleans())
def test_bytes_without_sense_are_a_failure(answer: bytes, stream: bool) -> None:
    assert isinstance(read(answer, stream=stream)[-1], Failed)


_SAID = st.lists(
    st.one_of(
        st.text(min_size=1, max_size=4).map(TextCame),
        st.text(min_size=1, max_size=4).map(ThinkingCame),
        st.just(ThinkingCame("", "sig")),
    ),
    max_size=6,
)


@given(
    _SAID,
    st.lists(st.dictionaries(st.text(max_size=3), st.integers(-9, 9), max_size=2), max_size=3),
    st.booleans(),
)
def test_what_is_written_for_an_anthropic_client_reads_as_it_was(
    said: list[AnswerEvent], calls: list[dict[str, int]], stream: bool
) -> None:
    events = list(said)
    for number, arguments in enumerate(calls):
        text = json.dumps(arguments, separators=(",", ":"), ensure_ascii=False)
        events += [CallBegan(number, f"c{number}", "get"), ArgumentsCame(number, text)]
    events.append(Ended(Stop.TOOL_CALLS if calls else Stop.END, Usage(9, 2, 5)))
    found = read(written(MessagesClient(), events, stream=stream), stream=stream)

    assert apart(found) == apart(events)


def apart(events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
    """`joined`, with signatures apart from their texts: a whole message has both in one block."""
    found: list[AnswerEvent] = []
    for event in events:
        if isinstance(event, ThinkingCame) and event.signature and event.text:
            found += [ThinkingCame(event.text), ThinkingCame("", event.signature)]
        else:
            found.append(event)
    return joined(found)
