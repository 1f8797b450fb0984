"""Requests that ask for the processor, as Ollama reads their options."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manager.domain.roles import BodyChanges
from manager.wire.body import read_body
from manager.wire.offload import asks_for_cpu
from manager.wire.routes import INFERENCE

NONE = BodyChanges()
CPU = {"options": {"num_gpu": 0}}
GPU = {"options": {"num_gpu": 99}}


def asks(body: Any, changes: BodyChanges = NONE, path: bytes = b"/api/chat") -> bool:
    text = body if isinstance(body, str) else json.dumps({"model": "tiny", **body})
    route = INFERENCE[path]
    return asks_for_cpu(read_body(text.encode(), route).fields, route, changes)


@pytest.mark.parametrize("zero", ["0", "0.0", "-0"])
@pytest.mark.parametrize("path", [b"/api/chat", b"/api/generate", b"/api/embed"])
def test_no_layer_on_the_gpu_is_the_processor(path: bytes, zero: str) -> None:
    assert asks(f'{{"model":"tiny","options":{{"seed":1,"num_gpu":{zero}}}}}', path=path)
    assert asks(f'{{"model":"tiny","OPTIONS":{{"num_gpu":{zero}}}}}', path=path)


@pytest.mark.parametrize("value", ["1", "-1", "0.5", "null", "false", '"0"', "[]"])
def test_any_other_number_of_layers_is_not(value: str) -> None:
    assert not asks(f'{{"model":"tiny","options":{{"num_gpu":{value}}}}}')


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"options": None},
        {"options": {}},
        {"options": {"seed": 0}},
        {"options": "num_gpu"},
        {"options": ["num_gpu", 0]},
        {"options": {"num_gpu": 0, "stop": ["x" * 70_000]}},
        {"num_gpu": 0},
    ],
)
def test_a_request_without_readable_options_asks_for_nothing(body: dict[str, Any]) -> None:
    assert not asks(body)


def test_options_that_no_server_would_read_ask_for_nothing() -> None:
    route = INFERENCE[b"/api/chat"]
    assert not asks_for_cpu({"options": b'{"num_gpu":0,}'}, route, NONE)


def test_the_compatible_routes_have_no_options() -> None:
    assert not asks(CPU, path=b"/v1/chat/completions")


@pytest.mark.parametrize(
    ("body", "changes", "expected"),
    [
        ({}, BodyChanges(overrides=CPU), True),
        ({}, BodyChanges(defaults=CPU), True),
        (GPU, BodyChanges(overrides=CPU), True),
        (CPU, BodyChanges(overrides=GPU), False),
        (GPU, BodyChanges(defaults=CPU), False),
        (CPU, BodyChanges(defaults=GPU), True),
        (CPU, BodyChanges(overrides={"options": {"seed": 1}}), True),
        ({}, BodyChanges(defaults={"options": "odd"}), False),
    ],
)
def test_what_a_role_sets_counts_as_it_is_sent_on(
    body: dict[str, Any], changes: BodyChanges, expected: bool
) -> None:
    assert asks(body, changes) is expected
