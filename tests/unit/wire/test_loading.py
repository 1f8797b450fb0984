"""Requests that load a model and do nothing else."""

from __future__ import annotations

import json

import pytest

from manager.wire.loading import (
    FOREVER,
    LoadAnswer,
    duration_s,
    load_answer,
    load_request,
    only_embeds,
    unloads_at_once,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300),
        ("1h30m", 5400),
        ("-1s", -1),
        ("-1h1m", -3660),
        ("0", 0),
        ("-0", 0),
        ("1.5h", 5400),
        ("300ms", 0.3),
        (".5s", 0.5),
        ("+2h", 7200),
        ("10µs", 1e-5),
        ("3us7ns", 3.007e-6),
        ("9999999999h", 9_999_999_999 * 3600),
    ],
)
def test_a_duration_of_go_is_taken(text: str, seconds: float) -> None:
    assert duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "-1", "2d", "forever", "5m ", "m", "1" * 70 + "s", "\u0661s"])
def test_what_go_does_not_read_is_refused(text: str) -> None:
    assert duration_s(text) is None


@pytest.mark.parametrize(
    ("keep_alive", "none"), [(0, True), ("0s", True), ("0", True), ("5m", False), (-1, False)]
)
def test_a_time_of_zero_unloads(keep_alive: float | str, none: bool) -> None:
    assert unloads_at_once(keep_alive) is none


def test_a_load_has_no_prompt_and_no_stream() -> None:
    path, body = load_request("qwen3:8b", FOREVER, embeds=False)
    assert (path, json.loads(body)) == (
        "/api/generate",
        {"model": "qwen3:8b", "stream": False, "keep_alive": -1},
    )


def test_a_model_that_only_embeds_is_loaded_by_an_empty_input() -> None:
    path, body = load_request("bge-m3", None, embeds=True)
    assert (path, json.loads(body)) == ("/api/embed", {"model": "bge-m3", "input": []})


@pytest.mark.parametrize(
    ("status", "message", "embeds"),
    [
        (400, '"bge-m3" does not support generate', True),
        (400, '"bge-m3" does not support thinking', False),
        (200, '"bge-m3" does not support generate', False),
    ],
)
def test_a_refusal_tells_a_model_that_only_embeds(status: int, message: str, embeds: bool) -> None:
    assert only_embeds(LoadAnswer(status, message, is_confirmed=False)) is embeds
    assert not only_embeds(LoadAnswer(400, None, is_confirmed=False))


@pytest.mark.parametrize(
    ("body", "error", "is_confirmed"),
    [
        (b'{"model": "m", "done": true, "done_reason": "load"}', None, True),
        (b'{"embeddings": []}', None, True),
        (b'{"done_reason": "stop"}', None, False),
        (b'{"error": "no room"}', "no room", False),
        (b'{"done": false}\n{"error": "no room"}\n', "no room", False),
        (b'{"done_reason": "load"}\n{"error": "no room"}\n', "no room", False),
        (b'{"error":\n "no room"}', "no room", False),
        (b'{"status": "loading"}\n{"done_reason": "load"}\n', None, True),
        (b"[1]", None, False),
        (b"hello", None, False),
        (b"", None, False),
    ],
)
def test_an_answer_to_a_load_is_read_in_all_its_lines(
    body: bytes, error: str | None, is_confirmed: bool
) -> None:
    assert load_answer(200, body) == (200, error, is_confirmed)
