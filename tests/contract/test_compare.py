"""The comparison must be able to fail."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.contract.compare import Answer, differences

NDJSON = {"Content-Type": "application/x-ndjson", "Transfer-Encoding": "chunked"}
SSE = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}


def recorded(kind: str, body: Any, headers: dict[str, str], path: str = "/api/chat") -> dict[str, Any]:
    return {
        "name": "x",
        "request": {"method": "POST", "path": path},
        "status": 200,
        "headers": headers,
        kind: body,
    }


def json_answer(value: Any, **changes: str) -> Answer:
    body = json.dumps(value).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    return Answer(200, {**headers, **changes}, body)


RECORDED_JSON = recorded(
    "json",
    {
        "model": "a", "n": 3, "x": 1.5, "done": True, "none": None, "list": [1, 2],
        "vector": [0.1, "…3 numbers in all"], "long": "…trimmed",
    },
    {"Content-Type": "application/json", "Content-Length": "1"},
)  # fmt: skip
GOOD: dict[str, Any] = {
    "model": "a", "n": 7, "x": 2, "done": True, "none": None, "list": [3, 4],
    "vector": [1, 2.5, 3], "long": [1],
}  # fmt: skip


def test_other_values_of_the_same_types_are_accepted() -> None:
    assert differences(RECORDED_JSON, json_answer(GOOD)) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"n": "7"}, "$.n: text"),
        ({"n": 7.5}, "$.n: float"),
        ({"n": True}, "$.n: boolean"),
        ({"n": None}, "$.n: null"),
        ({"none": 1}, "$.none: integer"),
        ({"done": False}, "$.done: False"),
        ({"model": "b"}, "$.model: 'b'"),
        ({"list": [1]}, "$.list: 1 items"),
        ({"list": [1, "2"]}, "$.list[1]: text"),
        ({"vector": [1.0, 2.0]}, "$.vector: 2 items"),
        ({"vector": [1.0, 2.0, "3"]}, "1 no numbers"),
        ({"extra": 1}, "$.extra: not in the recording"),
    ],
)
def test_a_wrong_value_is_rejected(change: dict[str, Any], complaint: str) -> None:
    found = differences(RECORDED_JSON, json_answer({**GOOD, **change}))
    assert len(found) == 1
    assert complaint in found[0]


def test_a_missing_key_is_rejected_even_if_its_value_was_trimmed() -> None:
    assert differences(RECORDED_JSON, json_answer({key: GOOD[key] for key in GOOD if key != "long"})) == [
        "$.long: missing"
    ]


def test_a_wrong_status_is_rejected() -> None:
    answer = json_answer(GOOD)
    assert differences(RECORDED_JSON, Answer(500, answer.headers, answer.body)) == [
        "status: 500, recorded 200"
    ]


def test_a_wrong_content_type_is_rejected() -> None:
    (found,) = differences(
        RECORDED_JSON, json_answer(GOOD, **{"Content-Type": "application/json; charset=utf-8"})
    )
    assert found.startswith("header Content-Type")


def test_a_wrong_framing_is_rejected() -> None:
    answer = json_answer(GOOD)
    chunked = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    assert differences(RECORDED_JSON, Answer(200, chunked, answer.body)) == [
        "framing: chunked, recorded Content-Length"
    ]


def test_a_wrong_length_is_rejected() -> None:
    (found,) = differences(RECORDED_JSON, json_answer(GOOD, **{"Content-Length": "3"}))
    assert found.startswith("Content-Length: 3 for")


LINES = [{"text": "a", "done": False}, {"text": "b", "done": False}, {"text": "", "done": True, "count": 2}]


def lines_answer(lines: list[dict[str, Any]], end: str = "\n") -> list[str]:
    body = "\n".join(json.dumps(line) for line in lines) + end
    return differences(recorded("lines", LINES, NDJSON), Answer(200, NDJSON, body.encode()))


def test_a_stream_in_more_or_fewer_pieces_is_accepted() -> None:
    assert lines_answer([LINES[0], LINES[2]]) == []
    assert lines_answer([LINES[0]] * 9 + [LINES[2]]) == []


def test_a_stream_without_its_last_line_is_rejected() -> None:
    assert "the stream ends after 2 parts" in lines_answer(LINES[:2])[-1]


def test_a_stream_that_goes_on_after_its_end_is_rejected() -> None:
    assert lines_answer([*LINES, LINES[0]]) == [
        "part 3 is more than was recorded: {'text': 'a', 'done': False}"
    ]


def test_a_stream_whose_last_line_is_not_ended_is_rejected() -> None:
    assert "the last line has no end" in lines_answer(LINES, end="")[0]


def test_an_error_in_a_stream_is_rejected() -> None:
    assert any("error" in line for line in lines_answer([LINES[0], {"error": "x"}]))


EVENTS = ['event: go\ndata: {"type":"go","n":1}', 'event: end\ndata: {"type":"end"}', "data: [DONE]", ""]


def events_answer(events: list[str]) -> list[str]:
    return differences(recorded("sse", EVENTS, SSE), Answer(200, SSE, "\n\n".join(events).encode()))


def test_server_sent_events_are_told_apart() -> None:
    assert events_answer([EVENTS[0], *EVENTS]) == []
    assert events_answer(EVENTS[:-1]) != []  # no blank line at the end
    assert events_answer([*EVENTS[:2], ""]) != []  # no [DONE]
    assert events_answer([EVENTS[1], EVENTS[0], *EVENTS[2:]]) != []  # the wrong order
    assert events_answer([EVENTS[0].replace("event: go", "event: stop"), *EVENTS[1:]]) != []
    assert events_answer([EVENTS[0].replace("1", '"1"'), *EVENTS[1:]]) != []


def test_a_list_of_models_may_be_longer_but_not_empty_or_of_another_shape() -> None:
    recording = recorded(
        "json",
        {"models": [{"name": "a"}]},
        {"Content-Type": "application/json", "Content-Length": "1"},
        "/api/tags",
    )
    assert differences(recording, json_answer({"models": [{"name": "a"}, {"name": "b"}]})) == []
    assert differences(recording, json_answer({"models": []})) == ["$.models: 0 items, recorded 1"]
    assert differences(recording, json_answer({"models": [{"name": "a"}, {"id": 1}]})) != []
