"""An event for answers that cost money: at most one a minute for each role and server."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from manager.errors import Reason
from manager.services.routing import cloud_events
from manager.services.routing.cloud_events import CloudEvents
from tests.support.records import a_record

AT = datetime(2026, 8, 1, tzinfo=UTC)


class Journal:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def record(self, kind: str, **values: Any) -> None:
        self.events.append({"kind": kind, **values})


def test_one_event_a_minute_and_the_next_says_how_many_there_were() -> None:
    journal = Journal()
    events = CloudEvents(journal)  # type: ignore[arg-type]
    record = a_record(
        ts=AT, role="thinking", model="gpt", provider="openai", fallback_reason=Reason.BREAKER_OPEN
    )
    for second in (0, 10, 59, 60):
        events.ended(replace(record, ts=AT + timedelta(seconds=second)))
    events.ended(replace(record, role="other"))
    assert [(one["kind"], one["instance"], one["reason"], one["detail"]) for one in journal.events] == [
        ("cloud_used", "openai", Reason.BREAKER_OPEN, "thinking was put to openai (gpt): ok"),
        (
            "cloud_used",
            "openai",
            Reason.BREAKER_OPEN,
            "thinking was put to openai (gpt): ok; 2 more since the last event",
        ),
        ("cloud_used", "openai", Reason.BREAKER_OPEN, "other was put to openai (gpt): ok"),
    ]


def test_the_entries_are_bounded() -> None:
    events = CloudEvents(Journal())  # type: ignore[arg-type]
    for number in range(cloud_events._MOST_ENTRIES + 10):
        events.ended(a_record(ts=AT, role=f"r{number}", provider="openai"))
    assert len(events._entries) == cloud_events._MOST_ENTRIES
