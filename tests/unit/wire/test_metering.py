"""Requests whose bytes pass: what a paid one gets beside them, and what is taken out of its answer."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.roles import BodyChanges
from manager.wire.body import SMALL_BYTES, read_body, reading
from manager.wire.errors import BadBodyError
from manager.wire.metering import Passing
from manager.wire.routes import INFERENCE, Route
from manager.wire.steps import run
from manager.wire.translate import Traits
from manager.wire.translate.hub import Usage

CHAT = INFERENCE[b"/v1/chat/completions"]
MESSAGES = INFERENCE[b"/v1/messages"]
COMPLETIONS, EMBEDDINGS = INFERENCE[b"/v1/completions"], INFERENCE[b"/v1/embeddings"]
NONE = BodyChanges()
WORD = b'data: {"choices":[{"delta":{"content":"a \\"usage\\" b"}}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
DONE = b"data: [DONE]\n\n"


def passing(
    body: dict[str, Any], route: Route = CHAT, *, most: int | None = 50, usage: bool = True
) -> tuple[Passing, dict[str, Any]]:
    one = Passing(route, Traits())
    raw = json.dumps({"model": "m", **body}).encode()
    sent = one.request(read_body(raw, route), "gpt", NONE, max_tokens=most, wants_usage=usage)
    return one, json.loads(sent)


@pytest.mark.parametrize(
    ("route", "given_", "name", "value"),
    [
        (CHAT, {}, "max_tokens", 50),
        (CHAT, {"max_tokens": 10}, "max_tokens", 10),
        (CHAT, {"max_tokens": 100}, "max_tokens", 50),
        (CHAT, {"max_completion_tokens": 100}, "max_completion_tokens", 50),
        (CHAT, {"max_tokens": None}, "max_tokens", 50),
        (CHAT, {"max_tokens": -1}, "max_tokens", 50),
        (CHAT, {"max_tokens": 9, "max_completion_tokens": -1}, "max_tokens", 9),
        (MESSAGES, {"max_tokens": 60}, "max_tokens", 50),
        (COMPLETIONS, {}, "max_tokens", 50),
    ],
)
def test_a_paid_answer_has_a_limit_and_no_higher_one(
    route: Route, given_: dict[str, Any], name: str, value: int
) -> None:
    _, sent = passing(given_, route)
    assert (sent["model"], sent[name]) == ("gpt", value)
    limits = {"max_tokens", "max_completion_tokens", "max_output_tokens"} & {*sent}
    assert limits == {name}


def test_vectors_have_no_limit_and_what_is_free_passes_as_it_came() -> None:
    _, sent = passing({"input": "x"}, EMBEDDINGS)
    assert sent == {"model": "gpt", "input": "x"}
    one = Passing(CHAT, Traits())
    raw = b'{"model":"gpt", "n": 3}'
    assert one.request(read_body(raw, CHAT), "gpt", NONE) == raw
    large = b'{"model":"m", "x": "%b"}' % (b"x" * SMALL_BYTES)
    assert one.request(run(reading([large], CHAT, 10**6)), "m", NONE) == large
    assert one.head(200) == (200, b"")
    assert one.path == CHAT.path


def test_a_large_body_is_changed_as_well() -> None:
    _, sent = passing({"messages": [{"role": "user", "content": "x" * SMALL_BYTES}]})
    assert sent["max_tokens"] == 50


@pytest.mark.parametrize(
    "field",
    [
        {"n": 2},
        {"best_of": 3},
        {"service_tier": "priority"},
        {"modalities": ["text", "audio"]},
        {"audio": {}},
    ],
)
def test_what_costs_more_than_the_tokens_of_one_answer_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(BadBodyError, match=next(iter(field))):
        passing(field)
    passing({"n": 1, "service_tier": "auto", "best_of": None})


def test_a_paid_body_is_written_anew_and_one_that_cannot_be_decoded_is_refused() -> None:
    """A field that is given twice has one value for us, and perhaps another one for the provider."""
    raw = b'{"model":"m","n":9,"N":1,"messages":[{"role":"user","content":"x","content":"y"}]}'
    sent = Passing(CHAT, Traits()).request(read_body(raw, CHAT), "gpt", NONE, max_tokens=5)
    assert json.loads(sent)["messages"] == [{"role": "user", "content": "y"}]
    assert (sent.count(b'"n"'), sent.count(b'"content"'), b'"N"' in sent) == (1, 1, False)
    deep = b'{"model":"m","messages":%b1%b}' % (b"[" * 5000, b"]" * 5000)
    with pytest.raises(BadBodyError, match="nests too deep"):
        Passing(CHAT, Traits()).request(read_body(deep, CHAT), "gpt", NONE, max_tokens=5)
    deep = b'{"model":"m","messages":%b1%b}' % (b"[" * 1000, b"]" * 1000)
    with pytest.raises(BadBodyError, match="nests too deep"):
        Passing(CHAT, Traits()).request(read_body(deep, CHAT), "gpt", NONE, max_tokens=5)
    nested: Any = "x"
    for _ in range(400):
        nested = [{"type": "tool_result", "content": nested}]
    passing({"messages": [{"role": "user", "content": nested}]}, MESSAGES)


def test_what_a_role_sets_is_bounded_too() -> None:
    changes = BodyChanges(overrides={"max_completion_tokens": 10**6, "max_tokens": 10**6})
    raw = b'{"model":"m"}'
    sent = Passing(CHAT, Traits()).request(read_body(raw, CHAT), "gpt", changes, max_tokens=5)
    assert json.loads(sent) == {"model": "gpt", "max_tokens": 5, "max_completion_tokens": 5}


def test_a_stream_is_asked_for_its_tokens() -> None:
    assert passing({"stream": True})[1]["stream_options"] == {"include_usage": True}
    mine = {"stream": True, "stream_options": {"include_usage": False, "x": 1}}
    assert passing(mine)[1]["stream_options"] == {"include_usage": True, "x": 1}
    assert "stream_options" not in passing({"stream": False})[1]
    assert "stream_options" not in passing({"stream": True}, MESSAGES)[1]
    assert "stream_options" not in passing({"stream": True}, usage=False)[1]


@given(cuts=st.lists(st.integers(0, 400), max_size=8), end=st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_the_tokens_are_taken_out_wherever_the_bytes_are_split(cuts: list[int], end: bytes) -> None:
    stream = (WORD + USAGE + DONE).replace(b"\n\n", end)
    one, _ = passing({"stream": True, "stream_options": "odd"})
    places = [0, *sorted(cuts), len(stream)]
    came = b"".join(one.feed(stream[a:b]) for a, b in pairwise(places))
    assert came + one.end() == (WORD + DONE).replace(b"\n\n", end)
    assert one.usage == Usage(3, 4)
    assert one.fault is None


def test_tokens_with_words_stay_and_so_does_what_cannot_be_read() -> None:
    last = b'data: {"choices":[{"delta":{}}],"usage":{"prompt_tokens":3,"completion_tokens":true}}\n\n'
    one, _ = passing({"stream": True})
    assert one.feed(last) == last
    assert one.usage == Usage(3, 0)
    for odd in (b'data: {"usage" is odd\n\n', b'data: ["usage"]\n\n'):
        assert one.feed(odd) == odd
    long = b"data: " + b"x" * 20_000
    assert one.feed(long) == long, "nothing is held without a bound"
    said = b'data: {"usage":"' + b"x" * 20_000
    assert one.feed(said) == b"", "it may have tokens in it"
    assert one.feed(b"x" * 2**20) == said + b"x" * 2**20
    assert one.feed(b"data: [DO") == b""
    assert one.end() == b"data: [DO"


def test_an_end_without_an_empty_line_is_understood() -> None:
    one, _ = passing({"stream": True})
    assert one.feed(USAGE.rstrip()) == b""
    assert one.end() == b""
    assert one.usage == Usage(3, 4)


def test_the_tokens_of_other_answers_are_read_at_their_end() -> None:
    one, _ = passing({})
    answer = b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}'
    assert one.feed(answer) == answer
    assert one.end() == b""
    assert one.usage == Usage(3, 4)
    empty, _ = passing({})
    assert empty.end() == b""
    assert empty.usage is None
    claude, _ = passing({"stream": True, "max_tokens": 5}, MESSAGES)
    start = b'event: message_start\ndata: {"message":{"usage":{"input_tokens":7,"cache_read_input_tokens":2,'
    claude.feed(start + b'"cache_creation_input_tokens":1,"output_tokens":1}}}\n\n')
    claude.feed(b"x" * 20_000)
    claude.feed(b'event: message_delta\ndata: {"usage":{"output_tokens":9}}\n\n')
    claude.end()
    assert claude.usage == Usage(10, 9)


def test_what_is_no_unicode_counts_as_nothing() -> None:
    raw = rb'{"model":"m","stream":true,"stream_options":"\ud800"}'
    one = Passing(CHAT, Traits())
    sent = one.request(read_body(raw, CHAT), "gpt", NONE, max_tokens=5, wants_usage=True)
    assert json.loads(sent)["stream_options"] == {"include_usage": True}


def test_an_error_is_told_in_the_servers_words() -> None:
    one, _ = passing({})
    assert one.error(500, b'{"error":{"message":"no"}}') == "no"
    assert one.error(500, b"<html>") == "the server answered with status 500"
