"""One event when a fallback begins and one when it has ended, also where instances take turns."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.errors import Reason
from manager.services.routing import fallback_events
from manager.services.routing.fallback_events import FallbackEvents
from tests.support.attempts import Journal
from tests.support.records import a_record


class Told:
    """What is told of requests that end one after the other."""

    def __init__(self) -> None:
        self.journal = Journal()
        self.events = FallbackEvents(cast("Any", self.journal))

    def falls_back(self, to: str = "cpu", reason: Reason = Reason.GPU_MISSING, **values: Any) -> None:
        self.events.ended(
            a_record(fallback=True, fallback_reason=reason, **{"effective_target": to, **values})
        )

    def does_not(self, times: int = 1, **values: Any) -> None:
        for _ in range(times):
            self.events.ended(a_record(**values))

    @property
    def kinds(self) -> list[str]:
        return self.journal.kinds


@pytest.fixture
def told() -> Told:
    return Told()


def test_the_beginning_and_the_end_of_a_fallback_are_told_once(told: Told) -> None:
    for _ in range(5):
        told.falls_back()
    assert told.journal.events == [("fallback", "cpu", Reason.GPU_MISSING)]
    told.does_not(2)
    assert told.kinds == ["fallback"]
    told.does_not(10)
    assert told.journal.events[1:] == [("fallback_ended", "gpu0", None)]
    assert told.journal.details == ["thinking (wanted: auto) is answered by cpu", "thinking is back"]


def test_requests_that_do_not_fall_back_are_not_told_of(told: Told) -> None:
    told.does_not(10)
    assert told.kinds == []
    told.falls_back(role="control")
    told.does_not(10)
    assert told.kinds == ["fallback"], "of another role"


def test_instances_that_take_turns_make_one_event(told: Told) -> None:
    """P12: 40 requests, of which each second one falls back."""
    for _ in range(20):
        told.falls_back()
        told.does_not(2)
    assert told.kinds == ["fallback"]


def test_a_fallback_that_comes_and_goes_is_told_less_and_less(told: Told) -> None:
    needed = []
    for _ in range(12):
        told.falls_back()
        before = len(told.kinds)
        count = 0
        while len(told.kinds) == before:
            told.does_not()
            count += 1
        needed.append(count)
    assert needed == [3, 6, 12, 24, 48, 96, 192, 384, 768, 1024, 1024, 1024]
    assert told.kinds == ["fallback", "fallback_ended"] * 12


@pytest.mark.parametrize("outcome", ["client_gone", "upstream_error", "refused", "cut"])
def test_only_requests_that_ended_well_count(told: Told, outcome: Any) -> None:
    told.falls_back(outcome=outcome)
    assert told.kinds == []
    told.falls_back()
    told.does_not(5, outcome=outcome)
    told.does_not(5, effective_target=None)
    assert told.kinds == ["fallback"]


def test_another_target_or_reason_of_a_fallback_is_told_up_to_a_bound(told: Told) -> None:
    told.falls_back("cpu", Reason.GPU_MISSING)
    told.falls_back("cpu", Reason.OVERLOADED)
    told.falls_back("gpu1", Reason.OVERLOADED)
    told.falls_back("cpu", Reason.GPU_MISSING)
    assert len(told.kinds) == 3
    for number in range(50):
        told.falls_back(f"i{number}")
    assert len(told.kinds) == 16


def test_a_fallback_that_begins_again_tells_its_target_again(told: Told) -> None:
    told.falls_back("cpu")
    told.does_not(3)
    told.falls_back("cpu")
    assert told.kinds == ["fallback", "fallback_ended", "fallback"]


def test_each_role_model_and_target_has_a_fallback_of_its_own(told: Told) -> None:
    told.falls_back()
    told.falls_back(role=None, model="qwen3:8b", requested_target="gpu1", policy=None)
    told.falls_back(role=None, model=None, policy=None)
    assert told.journal.details == [
        "thinking (wanted: auto) is answered by cpu",
        "qwen3:8b (wanted: gpu1) is answered by cpu",
        " (wanted: auto) is answered by cpu",
    ]
    told.does_not(3)
    assert told.kinds.count("fallback_ended") == 1


def test_a_fallback_without_a_reason_is_none(told: Told) -> None:
    told.events.ended(a_record(fallback=True, fallback_reason=None))
    assert told.kinds == []


def test_what_is_remembered_is_bounded_and_the_oldest_goes(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback_events, "_MAX_ENTRIES", 3)
    for number in range(4):
        told.falls_back(role=f"role{number}")
    told.does_not(3, role="role0")
    assert told.kinds == ["fallback"] * 4
    told.does_not(3, role="role3")
    assert told.kinds[-1] == "fallback_ended"
    assert len(told.events._entries) == 3


@given(st.lists(st.booleans(), max_size=200))
def test_whatever_the_order_beginnings_and_ends_take_turns_and_are_few(turns: list[bool]) -> None:
    told = Told()
    for back in turns:
        if back:
            told.falls_back()
        else:
            told.does_not()
    kinds = told.kinds
    assert kinds == ["fallback", "fallback_ended"] * (len(kinds) // 2) + ["fallback"] * (len(kinds) % 2)
    assert len(kinds) <= 2 * 7, "the pauses double: 3 + 6 + 12 + 24 + 48 + 96 > 180"
