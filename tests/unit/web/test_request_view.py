"""What a page shows of one request: its state, its stages, its speed."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from manager.domain.record import Outcome
from manager.errors import Reason
from manager.web.request_view import row, stages, tokens_per_s
from tests.support.records import a_record


def values(**changes: Any) -> dict[str, Any]:
    """The values of a `RequestBody`: streamed, 1500 ms in all, the first byte after 200 ms."""
    is_open = changes.pop("open", False)
    return {"open": is_open, **a_record(**changes).as_dict(), **({"outcome": None} if is_open else {})}


def shares(record: dict[str, Any]) -> list[tuple[str, float]]:
    return [(stage.name, round(stage.took_ms, 3)) for stage in stages(record)]


def test_the_time_of_a_request_is_divided_into_its_stages_in_order() -> None:
    record = values(
        queue_ms=100.0, start_ms=200.0, load_ms=300.0, ttfb_ms=700.0, duration_ms=1000.0, stream=True
    )
    assert shares(record) == [
        ("queue", 100), ("start", 200), ("load", 300), ("first", 100), ("stream", 300)
    ]  # fmt: skip
    begin = 0.0
    for stage in stages(record):
        assert stage.begin_ms == begin
        assert (stage.x, stage.width) == (begin, stage.took_ms), "thousandths of 1000 ms"
        begin += stage.took_ms


def test_stages_never_exceed_the_whole_whatever_was_measured() -> None:
    too_long = values(queue_ms=50.0, start_ms=5000.0, load_ms=9e9, ttfb_ms=20.0, duration_ms=100.0)
    assert shares(too_long) == [("queue", 50), ("start", 50)]
    load = values(queue_ms=10.0, start_ms=None, load_ms=9e9, ttfb_ms=60.0, duration_ms=100.0)
    assert shares(load) == [("queue", 10), ("load", 50), ("stream", 40)]
    assert stages(values(duration_ms=0.0)) == []


def test_a_request_without_an_answer_says_so_and_a_short_stage_is_still_seen() -> None:
    record = values(queue_ms=1.0, ttfb_ms=None, duration_ms=10_000.0, outcome="timeout")
    assert shares(record) == [("queue", 1), ("silence", 9999)]
    assert stages(record)[0].width == 4.0
    last = stages(values(queue_ms=0.0, ttfb_ms=9_999.0, duration_ms=10_000.0))[-1]
    assert (last.name, last.x, last.width) == ("stream", 996.0, 4.0)


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"output_tokens": 27, "ttfb_ms": 200.0, "duration_ms": 1500.0}, 20.0),
        (
            {
                "output_tokens": 30,
                "stream": False,
                "queue_ms": 300.0,
                "start_ms": 200.0,
                "duration_ms": 2000.0,
            },
            20.0,
        ),
        ({"output_tokens": None}, None),
        ({"output_tokens": 1}, None),
        ({"ttfb_ms": None}, None),
        ({"output_tokens": 5, "ttfb_ms": 1500.5}, None),
    ],
)
def test_the_speed_is_that_of_the_answer_and_unknown_where_nothing_tells_it(
    changes: dict[str, Any], rate: float | None
) -> None:
    assert tokens_per_s(values(**changes)) == (None if rate is None else pytest.approx(rate))


def test_every_outcome_has_a_kind_and_an_open_request_no_clocks() -> None:
    kinds = {outcome: row(values(outcome=outcome))["kind"] for outcome in get_args(Outcome)}
    assert kinds == {
        "ok": "ok", "client_error": "warn", "client_gone": "off", "refused": "bad", "upstream_error": "bad",
        "timeout": "bad", "cut": "warn",
    }  # fmt: skip
    first, later = (row(values(open=True, duration_ms=took)) for took in (1.0, 2.0))
    assert first == later
    assert (first["kind"], first["outcome"], first["took_ms"], first["rate"]) == ("work", "open", None, None)


def test_a_fallback_has_words_and_a_refusal_its_reason() -> None:
    fell = row(values(fallback=True, fallback_reason=Reason.INSTANCE_STOPPED, fallback_from="gpu0"))
    assert fell["fallback"] == {"code": "instance_stopped", "words": "gpu0 was stopped"}
    assert fell["reason"] is None
    refused = row(values(outcome="refused", fallback_reason=Reason.MODEL_MISSING))
    assert (refused["fallback"], refused["reason"]) == (None, "model_missing")


def test_only_a_paid_request_has_a_cost() -> None:
    assert row(values())["cost_usd"] is None
    paid = row(values(provider="openai", cost_usd=0.0))
    assert (paid["provider"], paid["cost_usd"]) == ("openai", 0.0)


def test_a_choice_says_what_was_asked_and_why_and_how_long_it_took() -> None:
    chosen = {
        "requested_model": "auto", "task_type": "chat", "tier": "fast", "task_confidence": 0.5,
        "task_reasoning": "it is short", "routing_ms": 0.345,
    }  # fmt: skip
    assert row(values(**chosen))["choice"] == {
        "requested": "auto", "task": "chat", "tier": "fast", "confidence": 0.5, "why": "it is short",
        "took": "0.34 ms",
    }  # fmt: skip
    refused = row(values(**{**chosen, "routing_ms": None}))["choice"]
    assert refused["took"] == "\N{EN DASH}"
    assert row(values())["choice"] is None
