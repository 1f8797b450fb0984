"""A request that only unloads a model is told from every other one, as Ollama tells it."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from manager.wire.body import read_body
from manager.wire.routes import INFERENCE
from manager.wire.unload import unloaded, unloads

GENERATE, CHAT = INFERENCE[b"/api/generate"], INFERENCE[b"/api/chat"]


def asks(path: bytes, body: str) -> bool:
    route = INFERENCE[path]
    return unloads(read_body(body.encode(), route), route)


@pytest.mark.parametrize("zero", ["0", "-0", "0.0", "0e3", '"0"', '"0s"', '"-0m"', '"0h0m0s"', '"0.0ms"'])
def test_no_prompt_and_no_time_in_memory_is_an_unload(zero: str) -> None:
    assert asks(b"/api/generate", f'{{"model":"tiny","keep_alive": {zero} }}')
    assert asks(b"/api/generate", f'{{"model":"tiny","prompt":"","keep_alive":{zero}}}')
    assert asks(b"/api/chat", f'{{"model":"tiny","messages":[ ],"KEEP_ALIVE":{zero}}}')
    assert asks(b"/api/chat", f'{{"model":"tiny","messages":null,"keep_alive":{zero}}}')


@pytest.mark.parametrize(
    "time", ["1", "-1", "0.5", '"5m"', '"1s"', '"-1"', '""', "null", '"0x"', "[]", '"10s"']
)
def test_any_other_time_is_none(time: str) -> None:
    assert not asks(b"/api/generate", f'{{"model":"tiny","keep_alive":{time}}}')


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (b"/api/generate", '{"model":"tiny","prompt":"hi","keep_alive":0}'),
        (b"/api/chat", '{"model":"tiny","messages":[{"role":"user","content":"hi"}],"keep_alive":0}'),
        (b"/api/generate", '{"model":"tiny"}'),
        (b"/api/embed", '{"model":"tiny","keep_alive":0}'),
        (b"/v1/chat/completions", '{"model":"tiny","messages":[],"keep_alive":0}'),
    ],
)
def test_a_request_that_wants_an_answer_is_none(path: bytes, body: str) -> None:
    assert not asks(path, body)


def test_the_answer_is_that_of_a_server() -> None:
    at = datetime(2026, 3, 1, 12, tzinfo=UTC)
    said = {"model": "tiny", "created_at": "2026-03-01T12:00:00Z", "done": True, "done_reason": "unload"}
    assert json.loads(unloaded(GENERATE, "tiny", at)) == {**said, "response": ""}
    assert json.loads(unloaded(CHAT, "tiny", at)) == {**said, "message": {"role": "assistant", "content": ""}}
