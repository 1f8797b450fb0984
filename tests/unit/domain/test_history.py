"""The stored form of a request has every field of the log, and its decision; each part has a bound."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from manager.domain.history import (
    MOST_ATTEMPTS,
    MOST_CHARACTERS,
    MOST_PASSED_OVER,
    Ended,
    Failure,
    Filters,
    decision_values,
    record_values,
)
from manager.domain.record import FailedAttempt, with_defaults
from manager.domain.roles import Policy, RequestKind
from manager.domain.routing import Attempt, Decision, PassedOver, Refused, RequestFacts
from manager.errors import Reason
from tests.support.records import a_record

if TYPE_CHECKING:
    from manager.domain.record import RequestRecord

FIRST = Attempt("gpu0", "qwen3:8b", "thinking", "loaded")
SECOND = Attempt("cpu", "qwen3:8b", "thinking", "running", Reason.ATTEMPT_TIMEOUT)


def ended(
    *made: Attempt,
    passed_over: tuple[PassedOver, ...] = (),
    failures: tuple[Failure, ...] = (),
    refused: Refused | None = None,
    message: str = "",
    **record: Any,
) -> Ended:
    decision = Decision(
        RequestFacts("thinking", RequestKind.GENERATE, "gpu0", "output"),
        "thinking",
        Policy.AUTO,
        None,
        (),
        passed_over,
        refused,
    )
    return Ended(a_record(**record), SimpleNamespace(decision=decision, made=made), failures, message)


def test_a_record_comes_back_with_every_field_of_the_log() -> None:
    record = a_record(failed_attempts=(FailedAttempt("gpu0", Reason.START_FAILED),), lane="output")
    assert with_defaults(record_values(record)) == record.as_dict()


def test_a_field_that_was_not_set_is_not_stored() -> None:
    record = a_record()
    begun = type(record).begun(
        **{
            name: getattr(record, name)
            for name in (
                "ts", "request_id", "trace_id", "span_id", "parent_span_id", "project_id", "path", "sampled",
                "kind", "lane", "intent",
            )
        }
    )  # fmt: skip
    assert "cost_usd" not in record_values(begun)
    assert with_defaults(record_values(begun)) == begun.as_dict()


def test_long_texts_are_cut() -> None:
    values = record_values(a_record(model="x" * 5000, lane="y" * MOST_CHARACTERS))
    assert values["model"] == "x" * MOST_CHARACTERS + "…"
    assert values["lane"] == "y" * MOST_CHARACTERS
    decision = decision_values(ended(FIRST, message="z" * 5000))
    assert decision["message"] == "z" * MOST_CHARACTERS + "…"


def test_each_attempt_has_its_outcome_in_order() -> None:
    values = decision_values(
        ended(
            FIRST,
            SECOND,
            failures=(
                Failure(
                    FIRST._replace(because="running", fallback=Reason.OVERLOADED),
                    Reason.ATTEMPT_TIMEOUT,
                    "gpu0 did not answer",
                ),
            ),
        )
    )
    assert values["asked"] == {
        "model": "thinking",
        "kind": "generate",
        "instance": "gpu0",
        "lane": "output",
    }
    assert values["attempts"] == [
        {
            "instance": "gpu0",
            "model": "qwen3:8b",
            "role": "thinking",
            "because": "loaded",
            "fallback": None,
            "outcome": "failed",
            "reason": Reason.ATTEMPT_TIMEOUT,
            "message": "gpu0 did not answer",
        },
        {
            "instance": "cpu",
            "model": "qwen3:8b",
            "role": "thinking",
            "because": "running",
            "fallback": Reason.ATTEMPT_TIMEOUT,
            "outcome": "ok",
            "reason": None,
            "message": "",
        },
    ]
    assert values["more_attempts"] == 0


def test_an_attempt_of_an_open_request_has_no_outcome_yet() -> None:
    values = decision_values(ended(FIRST), is_open=True)
    assert [one["outcome"] for one in values["attempts"]] == [None]


def test_the_passed_over_have_reasons_and_details() -> None:
    values = decision_values(
        ended(
            passed_over=(PassedOver("gpu1", "qwen3:8b", Reason.INSTANCE_UNAVAILABLE, "drained: update"),),
            refused=Refused("unavailable", Reason.INSTANCE_UNAVAILABLE, "gpu1 cannot be used now"),
        )
    )
    assert values["passed_over"] == [
        {
            "instance": "gpu1",
            "model": "qwen3:8b",
            "reason": Reason.INSTANCE_UNAVAILABLE,
            "detail": "drained: update",
        }
    ]
    assert values["refused"] == {
        "what": "unavailable",
        "reason": Reason.INSTANCE_UNAVAILABLE,
        "message": "gpu1 cannot be used now",
    }


def test_a_bounded_number_is_named_and_the_others_are_counted() -> None:
    made = tuple(Attempt(f"i{number}", "m", None, "running") for number in range(MOST_ATTEMPTS + 3))
    passed = tuple(PassedOver(f"i{n}", "m", Reason.POLICY, "") for n in range(MOST_PASSED_OVER + 5))
    values = decision_values(ended(*made, passed_over=passed))
    assert (len(values["attempts"]), values["more_attempts"]) == (MOST_ATTEMPTS, 3)
    assert (len(values["passed_over"]), values["more_passed_over"]) == (MOST_PASSED_OVER, 5)


@pytest.mark.parametrize("attempts", [None, SimpleNamespace(decision=None, made=())])
def test_a_request_without_a_decision_has_an_empty_one(attempts: Any) -> None:
    assert decision_values(Ended(a_record(), attempts, (), "too large")) == {
        "asked": None,
        "passed_over": [],
        "more_passed_over": 0,
        "refused": None,
        "attempts": [],
        "more_attempts": 0,
        "message": "too large",
    }


def of(**values: Any) -> RequestRecord:
    return a_record(project_id="lab", **values)


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        (Filters(), True),
        (Filters(project="lab", role="thinking", model="QWEN3:8b", instance="gpu0"), True),
        (Filters(project="other"), False),
        (Filters(role="output"), False),
        (Filters(model="qwen3"), False),
        (Filters(instance="cpu"), False),
        (Filters(outcome="ok"), False),
        (Filters(key="ci"), False),
    ],
)
def test_open_requests_are_filtered_as_stored_ones_are(filters: Filters, *, wanted: bool) -> None:
    assert filters.match(of()) is wanted
    assert Filters(model="tiny").match(of(model=None)) is False
    assert Filters(model="tiny:latest").match(of(model="tiny")) is True
    assert (Filters().wanted_model, Filters(model="tiny").wanted_model) == (None, "tiny:latest")
