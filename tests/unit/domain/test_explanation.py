"""A sentence says what was asked for, where it went and why, what it waited for, and how it ended."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from manager.domain.explanation import (
    REASON_WORDS,
    decision_sentence,
    duration_words,
    fallback_words,
    passed_over_words,
    request_sentence,
    why,
)
from manager.domain.record import Outcome
from manager.errors import Reason
from tests.support.records import a_record


def record(**values: Any) -> dict[str, Any]:
    plain = {"effective_target": "cpu", "model": "qwen3:8b", "role": "thinking", "queue_ms": 0.0}
    return a_record(**{**plain, **values}).as_dict()


def attempt(
    instance: str, outcome: str | None = "ok", reason: str | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "instance": instance,
        "model": "qwen3:8b",
        "outcome": outcome,
        "reason": reason,
        "message": "",
        "fallback": None,
        **more,
    }


def over(instance: str, reason: str, detail: str = "") -> dict[str, Any]:
    return {"instance": instance, "model": "qwen3:8b", "reason": reason, "detail": detail}


def decision(
    *attempts: dict[str, Any],
    asked: str | None = "qwen3:8b",
    instance: str | None = None,
    passed_over: tuple[dict[str, Any], ...] = (),
    refused: str = "",
    message: str = "",
    runs_only: bool = False,
    passes_to_raw: bool = False,
) -> dict[str, Any]:
    return {
        "role": "deep" if runs_only else None,
        "runs_only": runs_only,
        "passes_to_raw": passes_to_raw,
        "asked": asked and {"model": asked, "kind": "generate", "instance": instance, "lane": None},
        "attempts": list(attempts),
        "passed_over": list(passed_over),
        "refused": {"what": "unknown", "reason": "model_missing", "message": refused} if refused else None,
        "message": message,
    }


def test_the_sentence_of_the_issue() -> None:
    sentence = request_sentence(
        record(
            fallback=True,
            fallback_reason=Reason.INSTANCE_UNAVAILABLE,
            fallback_from="gpu1",
            queue_ms=1200.0,
        ),
        decision(
            attempt("cpu"),
            asked="thinking",
            passed_over=(
                over("gpu1", "instance_unavailable", "drained: driver update"),
                over("gpu2", "instance_unavailable"),
            ),
        ),
    )
    assert sentence == (
        "asked for thinking, went to cpu with qwen3:8b, since gpu1 was drained (driver update); "
        "waited 1.2 s in the queue; answered in 1.5 s (34 tokens)"
    )


def test_every_reason_has_words_with_the_place_of_the_instance() -> None:
    assert {reason.value for reason in Reason} == set(REASON_WORDS)
    assert all(words.count("{}") >= 1 for words in REASON_WORDS.values())


@pytest.mark.parametrize("reason", REASON_WORDS)
def test_every_reason_is_said_of_its_instance(reason: str) -> None:
    said = why("gpu1", reason)
    assert "gpu1" in said
    assert "{" not in said
    assert reason not in said or " " not in reason
    assert why("gpu1", reason, "since noon") == f"{said} (since noon)"
    sentence = request_sentence(
        record(fallback=True, fallback_reason=reason, fallback_from="gpu1"),
        decision(attempt("cpu"), passed_over=(over("gpu1", reason),)),
    )
    assert sentence.startswith(f"asked for qwen3:8b, went to cpu, since {said}; ")


def test_a_reason_of_a_later_version_is_named_as_it_is() -> None:
    assert why("gpu1", "too_hot") == "gpu1: too_hot"


@pytest.mark.parametrize(
    ("detail", "said"),
    [
        ("drained", "gpu1 was drained"),
        ("drained: new card", "gpu1 was drained (new card)"),
        ("the probe failed", "gpu1 was unavailable (the probe failed)"),
    ],
)
def test_a_detail_adds_to_the_reason(detail: str, said: str) -> None:
    assert passed_over_words(over("gpu1", "instance_unavailable", detail)) == said


@pytest.mark.parametrize(
    ("reason", "since"),
    [
        ("gpu_missing", "there was no GPU"),
        ("instance_unavailable", "gpu1 was unavailable"),
    ],
)
def test_a_fallback_without_a_candidate_names_what_was_preferred(reason: str, since: str) -> None:
    sentence = request_sentence(
        record(fallback=True, fallback_reason=reason, fallback_from="gpu1"), decision(attempt("cpu"))
    )
    assert f"went to cpu, since {since};" in sentence
    unknown = request_sentence(
        record(fallback=True, fallback_reason="overloaded", fallback_from=None), decision(attempt("cpu"))
    )
    assert "since what it asked for was overloaded;" in unknown


def test_a_paid_answer_where_nothing_local_was_preferred_names_no_policy_as_an_instance() -> None:
    sentence = request_sentence(
        record(fallback=True, fallback_reason="model_missing", fallback_from="auto"), decision(attempt("cpu"))
    )
    assert "went to cpu, since nothing preferred could answer (model_missing);" in sentence


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("gpu0 did not answer within 60 s", "gpu0 did not answer within 60 s"),
        ("gpu0: the connection broke", "gpu0: the connection broke"),
        ("out of memory", "gpu0 could not load the model (out of memory)"),
        ("", "gpu0 could not load the model"),
    ],
)
def test_failed_attempts_come_before_the_answer(message: str, said: str) -> None:
    failed = attempt("gpu0", "failed", "model_load_failed", message=message)
    sentence = request_sentence(record(), decision(failed, attempt("cpu")))
    assert sentence.startswith(f"asked for qwen3:8b, went to cpu, since {said}; ")


def test_candidates_out_of_service_are_named_without_a_fallback_too() -> None:
    sentence = request_sentence(
        record(),
        decision(attempt("cpu"), passed_over=(over("gpu1", "breaker_open"), over("nas", "policy"))),
    )
    assert sentence == (
        "asked for qwen3:8b, went to cpu; gpu1 had failed several times and was passed over; "
        "answered in 1.5 s (34 tokens)"
    )


def test_a_message_of_a_failed_attempt_is_not_repeated_at_the_end() -> None:
    failed = attempt("paid", "failed", "budget_exhausted", message="0.3 USD are spent")
    values = record(outcome="refused", status=402, effective_target="paid")
    said = request_sentence(values, decision(failed, message="0.3 USD are spent"))
    assert said.endswith("(0.3 USD are spent); refused with status 402")
    assert request_sentence(values, decision(failed, message="other")).endswith("status 402: other")


def test_no_answer_names_the_attempts_that_failed() -> None:
    failed = [attempt(f"gpu{n}", "failed", "start_failed") for n in range(5)]
    sentence = request_sentence(
        record(outcome="upstream_error", status=503, output_tokens=None),
        decision(*failed, message="gpu0 did not start"),
    )
    assert sentence == (
        "asked for qwen3:8b, found no answer: gpu0 could not be started, gpu1 could not be started, "
        "gpu2 could not be started and 2 more; failed with status 503: gpu0 did not start"
    )


@pytest.mark.parametrize(
    ("name", "pin", "lane", "said"),
    [
        ("tiny@gpu0", None, None, "asked for tiny on gpu0"),
        ("tiny", "gpu0", "output", "asked for tiny on gpu0 in the lane output"),
        ("output", None, "output", "asked for output"),
    ],
)
def test_pins_and_lanes_are_named(name: str, pin: str | None, lane: str | None, said: str) -> None:
    sentence = request_sentence(
        record(model="tiny", lane=lane, effective_target=None), decision(asked=name, instance=pin)
    )
    assert sentence.startswith(f"{said}; ")


def test_a_request_without_a_model_names_its_path() -> None:
    sentence = request_sentence(
        record(model=None, effective_target=None, outcome="client_error", status=400),
        decision(asked=None, message="model is required"),
    )
    assert sentence == "asked /api/chat; answered with status 400: model is required"


def test_a_request_that_manages_models_names_its_model() -> None:
    sentence = request_sentence(record(model="tiny", path="/api/pull"), decision(attempt("cpu"), asked=None))
    assert sentence.startswith("asked for tiny, went to cpu; ")


@pytest.mark.parametrize("outcome", get_args(Outcome))
def test_every_outcome_has_an_ending(outcome: str) -> None:
    ending = request_sentence(record(outcome=outcome, status=504), decision(attempt("cpu"))).split("; ")[-1]
    assert (
        ending
        == {
            "ok": "answered in 1.5 s (34 tokens)",
            "client_error": "answered with status 504",
            "client_gone": "the client left after 1.5 s",
            "refused": "refused with status 504",
            "upstream_error": "failed with status 504",
            "timeout": "ran out of time after 1.5 s",
            "cut": "cut off after 1.5 s",
        }[outcome]
    )


def test_other_endings() -> None:
    assert request_sentence(record(output_tokens=None), decision(attempt("cpu"))).endswith(
        "; answered in 1.5 s"
    )
    cancelled = record(outcome="cut", fallback_reason="cancelled")
    assert request_sentence(cancelled, decision(attempt("cpu"), message="by the operator")).endswith(
        "; cancelled after 1.5 s: by the operator"
    )
    assert request_sentence(
        record(outcome="refused", status=404), decision(refused="no such model")
    ).endswith("refused with status 404: no such model")
    gone = record(outcome="client_gone")
    assert request_sentence(gone, decision(message="unheard")).endswith("; the client left after 1.5 s")
    assert request_sentence(record(), decision(attempt("cpu", None)), is_open=True).endswith(
        "; open for 1.5 s"
    )
    queued = record(effective_target=None)
    waits = "a slot, 2 ahead in the queue"
    assert request_sentence(queued, decision(), is_open=True, waits_for=waits) == (
        "asked for qwen3:8b; open for 1.5 s, waits for a slot, 2 ahead in the queue"
    )


def test_a_start_and_the_queue_are_told_where_they_took_long() -> None:
    sentence = request_sentence(record(start_ms=65_000.0, queue_ms=49.0), decision(attempt("cpu")))
    assert "; waited 1 min 5 s for a start; answered" in sentence
    assert "in the queue" not in sentence
    assert "; waited 50 ms in the queue; " in request_sentence(record(queue_ms=50.0), decision())


@pytest.mark.parametrize(
    ("milliseconds", "words"),
    [(0.4, "0 ms"), (12.0, "12 ms"), (1234.0, "1.2 s"), (59_900.0, "59.9 s"), (125_000.0, "2 min 5 s")],
)
def test_durations(milliseconds: float, words: str) -> None:
    assert duration_words(milliseconds) == words


def test_where_a_request_would_go() -> None:
    assert decision_sentence(decision(attempt("gpu0")), "qwen3:8b") == "qwen3:8b would go to gpu0"
    assert (
        decision_sentence(
            decision(
                attempt("cpu", fallback="instance_unavailable"),
                attempt("nas"),
                passed_over=(over("gpu1", "instance_unavailable", "drained"),),
            ),
            "thinking",
        )
        == "thinking would go to cpu with qwen3:8b, since gpu1 was drained, then to nas"
    )


def test_where_no_request_would_go() -> None:
    refused = decision_sentence(decision(refused="model 'nix' not found"), "nix")
    assert refused == "nix would be refused: model 'nix' not found"
    assert decision_sentence(decision(), "nix") == "nix would be refused: no instance is left"


def test_a_role_that_takes_runs_only_is_said_to_do_so() -> None:
    begin = "deep takes runs only (POST /api/v1/runs); a run would"
    assert decision_sentence(decision(attempt("gpu0"), runs_only=True), "qwen3:8b") == f"{begin} go to gpu0"
    refused = decision(refused="no instance", runs_only=True)
    assert decision_sentence(refused, "deep") == f"{begin} be refused: no instance"


def test_a_request_that_passes_to_the_raw_server_is_said_to_do_so() -> None:
    passed = decision_sentence(decision(attempt("gpu0"), passes_to_raw=True), "qwen3:8b")
    assert passed == "qwen3:8b passes to rollout.raw_url; managed, qwen3:8b would go to gpu0"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shadow_target": "gpu0"}, "managed it would go to gpu0; answered"),
        ({"shadow_target": "gpu0", "disagreement": "model"}, "would go to gpu0 - disagreement: model;"),
        ({"shadow_refused": "policy"}, "managed it would be refused (policy); answered"),
        ({}, "went to raw; answered"),
    ],
)
def test_what_a_recorded_decision_would_have_done_is_said(values: dict[str, Any], words: str) -> None:
    assert words in request_sentence(record(effective_target="raw", **values), decision(attempt("raw")))


@pytest.mark.parametrize(
    ("reason", "preferred", "words"),
    [
        ("instance_stopped", "gpu0", "gpu0 was stopped"),
        ("gpu_missing", "prefer_gpu", "there was no GPU"),
        ("overloaded", "prefer_gpu", "nothing preferred could answer (overloaded)"),
        ("breaker_open", None, "what it asked for had failed several times and was passed over"),
    ],
)
def test_a_fallback_has_its_words_without_the_candidates(
    reason: str, preferred: str | None, words: str
) -> None:
    assert fallback_words(reason, preferred) == words


def test_a_choice_of_the_daemon_is_a_part_of_the_sentence() -> None:
    values = record(task_type="chat", tier="fast", task_reasoning="it is short (2 characters)")
    sentence = request_sentence(values, decision(attempt("cpu")))
    assert "qwen3:8b (task chat, tier fast: it is short (2 characters))" in sentence
    classified = {"task_type": "chat", "tier": "fast", "reasoning": "so"}
    asked = decision_sentence({**decision(attempt("cpu")), "classification": classified}, "auto")
    assert asked.startswith("auto (task chat, tier fast: so) would go to cpu")
