"""What is counted of requests, and which of them are handed on."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, get_args

import pytest

from manager.domain.record import Outcome
from manager.errors import Reason
from manager.services import traffic as traffic_module
from manager.services.traffic import BUCKETS_S, Histogram, Traffic
from tests.support.records import a_record

if TYPE_CHECKING:
    from manager.domain.record import RequestRecord

OUTCOMES = get_args(Outcome)


def test_each_request_is_counted_once_under_its_end() -> None:
    traffic = Traffic(lambda record: None)
    for outcome in OUTCOMES:
        traffic.ended(a_record(outcome=outcome))
    traffic.ended(a_record(outcome="refused", effective_target=None, role=None))
    assert traffic.requests == {
        **{("gpu0", "thinking", outcome): 1 for outcome in OUTCOMES},
        ("", "", "refused"): 1,
    }
    assert sum(traffic.durations["gpu0"].counts) == len(OUTCOMES)


def test_fallbacks_are_counted_from_where_to_where_and_why() -> None:
    traffic = Traffic(lambda record: None)
    reason = Reason.INSTANCE_UNAVAILABLE
    for _ in range(2):
        traffic.ended(a_record(fallback_from="gpu1", fallback=True, fallback_reason=reason))
    traffic.ended(a_record(fallback=True, fallback_reason=reason))
    traffic.ended(a_record(outcome="refused", fallback_reason=Reason.POLICY))
    assert traffic.fallbacks == {("gpu1", "gpu0", reason): 2, ("", "gpu0", reason): 1}


def test_failed_attempts_are_counted_whatever_became_of_the_request() -> None:
    traffic = Traffic(lambda record: None)
    traffic.failed("gpu1", Reason.ATTEMPT_TIMEOUT)
    traffic.failed("gpu1", Reason.ATTEMPT_TIMEOUT)
    traffic.failed("cpu", Reason.UPSTREAM_ERROR)
    traffic.ended(a_record())
    assert traffic.target_errors == {("gpu1", "attempt_timeout"): 2, ("cpu", "upstream_error"): 1}


def test_times_of_an_instance_are_counted_only_where_there_were_any() -> None:
    traffic = Traffic(lambda record: None)
    traffic.ended(a_record(effective_target=None, outcome="refused"))
    traffic.ended(a_record(ttfb_ms=None, outcome="client_gone"))
    assert set(traffic.durations) == {"gpu0"}
    assert traffic.durations["gpu0"].total_s == pytest.approx(1.5005)
    assert not traffic.first_tokens
    traffic.ended(a_record())
    assert traffic.first_tokens["gpu0"].total_s == pytest.approx(0.2)


def test_a_bucket_holds_what_is_at_most_its_bound() -> None:
    for at, bound_s in enumerate(BUCKETS_S):
        histogram = Histogram()
        histogram.observe(bound_s)
        histogram.observe(bound_s * 1.001)
        assert [index for index, count in enumerate(histogram.counts) if count] == [at, at + 1]
    assert sorted(BUCKETS_S) == list(BUCKETS_S)
    histogram = Histogram()
    histogram.observe(0.0)
    histogram.observe(10_000.0)
    assert (histogram.counts[0], histogram.counts[-1], histogram.total_s) == (1, 1, 10_000.0)


@pytest.mark.parametrize(("share", "least", "most"), [(1.0, 1000, 1000), (0.0, 0, 0), (0.25, 180, 320)])
def test_a_share_of_those_that_went_well_is_written_and_all_others(
    monkeypatch: pytest.MonkeyPatch, share: float, least: int, most: int
) -> None:
    monkeypatch.setattr(random, "random", random.Random(7).random)
    written: list[RequestRecord] = []
    traffic = Traffic(written.append, share_logged=share)
    for _ in range(1000):
        traffic.ended(a_record())
    assert least <= len(written) <= most
    written.clear()
    for outcome in OUTCOMES[1:]:
        traffic.ended(a_record(outcome=outcome))
    assert [record.outcome for record in written] == list(OUTCOMES[1:])
    assert traffic.requests["gpu0", "thinking", "ok"] == 1000


def test_sampled_traces_are_told_whether_they_are_written_or_not() -> None:
    written: list[RequestRecord] = []
    traced: list[RequestRecord] = []
    traffic = Traffic(written.append, share_logged=0, trace=traced.append)
    sampled, other = a_record(), a_record(sampled=False, outcome="cut")
    traffic.ended(sampled)
    traffic.ended(other)
    assert (written, traced) == ([other], [sampled])


def test_tokens_and_cost_are_counted_by_role_and_project() -> None:
    traffic = Traffic(lambda _: None)
    for _ in range(3):
        traffic.ended(a_record(project_id="shop", cost_usd=0.000001))
    traffic.ended(a_record(project_id="shop", input_tokens=None, output_tokens=None))
    used = traffic.used["thinking", "shop"]
    assert (used.input_tokens, used.output_tokens, used.cost_usd) == (36, 102, 0.000003)


def test_projects_beyond_the_bound_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic_module, "_MOST_USERS", 2)
    traffic = Traffic(lambda _: None)
    for project in ("a", "b", "c", "d", "a"):
        traffic.ended(a_record(project_id=project))
    assert {project: used.output_tokens for (_, project), used in traffic.used.items()} == {
        "a": 68,
        "b": 34,
        "other": 68,
    }
