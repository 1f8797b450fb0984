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


def test_an_address_may_lead_to_an_image() -> None:
    raw = b'{"model":"m","image_url":{"url":"https://a/b"}}'
    assert most_input_tokens(raw) == len(raw) + 50_000
    assert read_body(raw, CHAT).most_input_tokens == len(raw) + 50_000
