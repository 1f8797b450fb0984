"""A record has every field from the beginning, and names a bounded number of failed attempts."""

from __future__ import annotations

from datetime import UTC, datetime

from manager.domain.record import RequestRecord, never
from manager.domain.roles import RequestKind
from manager.errors import Reason
from tests.support.records import CALLER, SPAN, TRACE

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)


def begun() -> RequestRecord:
    return RequestRecord.begun(
        ts=AT,
        request_id="1",
        trace_id=TRACE,
        span_id=SPAN,
        parent_span_id=CALLER,
        project_id="lab",
        path="/api/chat",
        sampled=True,
        kind=RequestKind.GENERATE,
        lane="output",
        intent="test",
    )


def test_a_record_that_has_begun_equals_one_that_was_constructed() -> None:
    constructed = RequestRecord(
        AT, "1", TRACE, SPAN, CALLER, "lab", "/api/chat", True, RequestKind.GENERATE, "output", "test"
    )
    assert begun().as_dict() == constructed.as_dict()


def test_the_first_failed_attempts_are_named_and_no_more() -> None:
    record = begun()
    assert not record.failed_attempts
    for number in range(20):
        record.attempt_failed(f"i{number}", Reason.OVERLOADED)
    assert [one.target for one in record.failed_attempts] == [f"i{number}" for number in range(16)]
    assert {one.reason for one in record.failed_attempts} == {Reason.OVERLOADED}
    assert record.as_dict()["failed_attempts"][0] == {"target": "i0", "reason": "overloaded"}


def test_no_trace_is_sampled_while_nothing_records_traces() -> None:
    assert not never(TRACE)
