from __future__ import annotations

from typing import Any

import pytest

from manager.web.speeds import tokens_per_s


def request(**values: Any) -> dict[str, Any]:
    usual = {
        "open": False, "stream": True, "output_tokens": 50, "ttfb_ms": 500.0, "duration_ms": 1500.0,
        "effective_target": "a",
    }  # fmt: skip
    return {**usual, **values}


def test_the_speed_is_that_of_the_last_streamed_answers_without_the_wait_for_the_first_token() -> None:
    assert tokens_per_s([request(), request(output_tokens=150), request(effective_target="b")]) == {
        "a": 100.0,
        "b": 50.0,
    }
    newest = [request(output_tokens=10) for _ in range(5)]
    assert tokens_per_s([*newest, request(output_tokens=1000)]) == {"a": 10.0}


@pytest.mark.parametrize(
    "values",
    [
        {"open": True},
        {"stream": False},
        {"output_tokens": None},
        {"output_tokens": 0},
        {"ttfb_ms": None},
        {"duration_ms": 505.0},
        {"effective_target": None},
    ],
)
def test_what_cannot_be_measured_is_unknown(values: dict[str, Any]) -> None:
    assert tokens_per_s([request(**values)]) == {}
