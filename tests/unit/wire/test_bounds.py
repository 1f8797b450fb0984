"""Bounds of what a request can cost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manager.wire.body import read_body
from manager.wire.bounds import most_input_tokens, output_limit
from manager.wire.routes import INFERENCE

CHAT = INFERENCE[b"/v1/chat/completions"]


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 9, "max_completion_tokens": 7}, 7),
        ({"max_output_tokens": 3}, 3),
        ({"options": {"num_predict": 4}}, 4),
        ({"options": {"num_predict": -1}}, None),
        ({"options": {"num_ctx": 4}}, None),
        ({"options": [1]}, None),
        ({"max_tokens": "5"}, None),
        ({"max_tokens": 1.5}, None),
        ({"max_tokens": None}, None),
        ({"max_tokens": 0}, None),
        ({"max_tokens": -2, "options": {"num_predict": 8}}, 8),
    ],
)
def test_the_smallest_limit_that_makes_sense_counts(fields: dict[str, Any], limit: int | None) -> None:
    body = read_body(json.dumps({"model": "m", **fields}).encode(), CHAT)
    assert output_limit(body.fields) == limit
    assert body.most_output_tokens == limit


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_byte_is_one_token_at_most(kind: type[Any]) -> None:
    assert most_input_tokens(kind(b'{"prompt":"abc"}')) == 16


@pytest.mark.parametrize(
    ("more", "images"),
    [
        ({"messages": [{"content": "see https://a/b and http://c"}]}, 0),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": "HTTPS://a/b"}}]}]}, 1),
        ({"messages": [{"content": [{"image_url": "x"}, {"type": "image", "source": {}}]}]}, 2),
        ({"input": [{"content": [{"type": "input_image", "file_id": "f"}]}]}, 1),
        ({"messages": [{"content": "hi", "Images": ["a", "b", "c"]}]}, 3),
        ({"images": "none", "type": ["image"]}, 0),
    ],
)
def test_an_image_costs_more_than_its_letters(more: dict[str, Any], images: int) -> None:
    raw = json.dumps({"model": "m", **more}).encode()
    assert most_input_tokens(raw) == len(raw) + images * 50_000
    assert read_body(raw, CHAT).most_input_tokens == len(raw) + images * 50_000


def test_a_name_in_escapes_is_read_as_the_provider_reads_it() -> None:
    raw = b'{"model":"m","x":{"\\u0069mage_url":1}}'
    assert most_input_tokens(raw) == len(raw) + 50_000


@pytest.mark.parametrize("raw", [b'{"tools":[]}', b'{"Tools":[]}', b'{"functions":[]}'])
def test_a_provider_adds_words_around_tools(raw: bytes) -> None:
    assert most_input_tokens(raw) == len(raw) + 1000


@pytest.mark.parametrize("raw", [b"[1]", b'"a"', b"{"])
def test_what_is_no_request_is_counted_by_its_bytes(raw: bytes) -> None:
    assert most_input_tokens(raw) == len(raw)
