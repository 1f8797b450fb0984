"""Which instance is stopped where `max_running` is reached."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.capacity import (
    AwaitEnd,
    CannotStart,
    Evict,
    NoPlace,
    Occupant,
    PlaceFree,
    is_failing,
    place_for,
    running,
)
from manager.domain.instance import Explanation
from manager.errors import Reason

STOPPED = Occupant("new", 0, False, False, False, False, None, True)
MISSING = Explanation(Reason.IMAGE_MISSING, "no image")


def unused(id_: str, since: float = 1.0, **changes: object) -> Occupant:
    return replace(Occupant(id_, 0, True, False, False, False, since, True), **changes)  # type: ignore[arg-type]


def used(id_: str) -> Occupant:
    return unused(id_, in_use=True, unused_since=None)


@pytest.mark.parametrize("limit", [None, 2, 3])
def test_below_the_limit_there_is_a_place_even_for_what_will_not_start(limit: int | None) -> None:
    assert place_for("new", [STOPPED, used("a")], max_running=limit, obstacle=MISSING) == PlaceFree()


def test_an_instance_that_holds_a_place_needs_no_other() -> None:
    assert place_for("a", [used("a"), used("b")], max_running=1) == PlaceFree()


def test_a_promised_place_counts_once() -> None:
    assert running("new", [STOPPED, used("a")], {"a", "b", "new"}) == ("a", "b")
    assert place_for("new", [STOPPED, used("a")], max_running=2, promised={"b"}) == NoPlace(("a", "b"))
    assert place_for("new", [STOPPED, used("a")], max_running=2, promised={"a"}) == PlaceFree()


def test_the_lowest_priority_is_stopped_first_and_then_what_was_used_least_recently() -> None:
    others = [unused("a", 5.0), unused("b", 1.0, priority=1), unused("c", 3.0)]
    assert place_for("new", [STOPPED, *others], max_running=3) == Evict("c")
    assert place_for("new", [STOPPED, *others], max_running=3, keep={"c"}) == Evict("a")
    assert place_for("new", [STOPPED, *others], max_running=3, keep={"a", "c"}) == Evict("b")


def test_what_is_used_pinned_or_kept_is_not_stopped() -> None:
    others = [used("a"), unused("b", pinned=True, unused_since=None), unused("c")]
    assert place_for("new", [STOPPED, *others], max_running=3, keep={"c"}) == NoPlace(("a", "b", "c"))


def test_nothing_is_stopped_for_what_will_not_start() -> None:
    assert place_for("new", [STOPPED, unused("a")], max_running=1, obstacle=MISSING) == CannotStart(MISSING)
    ending = unused("a", is_ending=True)
    assert place_for("new", [STOPPED, ending], max_running=1, obstacle=MISSING) == CannotStart(MISSING)


def test_what_could_not_start_again_is_not_stopped_even_if_it_would_come_first() -> None:
    gone = unused("a", 0.0, priority=-1, may_return=False)
    assert place_for("new", [STOPPED, gone, unused("b")], max_running=2) == Evict("b")
    assert place_for("new", [STOPPED, gone, used("b")], max_running=2) == NoPlace(("a", "b"), ("a",))


def test_a_stop_that_is_under_way_is_waited_for_unless_it_drains_or_the_instance_starts_again() -> None:
    ending = unused("a", is_ending=True, unused_since=None)
    assert place_for("new", [STOPPED, unused("b"), ending], max_running=2) == AwaitEnd("a")
    for protected in (replace(ending, in_use=True), replace(ending, pinned=True)):
        assert place_for("new", [STOPPED, unused("b"), protected], max_running=2) == Evict("b")
    assert place_for("a", [replace(ending, occupies=False), used("b")], max_running=1) == NoPlace(("b",))


@pytest.mark.parametrize(
    ("failures", "now", "expected"),
    [(0, 0.0, False), (1, 100.0, True), (1, 159.9, True), (1, 160.0, False), (9, 90.0, True)],
)
def test_an_instance_is_failing_until_a_minute_after_its_back_off(
    failures: int, now: float, *, expected: bool
) -> None:
    assert is_failing(failures, 100.0, now) is expected


OCCUPANTS = st.lists(
    st.builds(
        Occupant,
        id=st.sampled_from("abcdef"),
        priority=st.integers(-1, 1),
        occupies=st.booleans(),
        is_ending=st.booleans(),
        in_use=st.booleans(),
        pinned=st.booleans(),
        unused_since=st.none() | st.floats(0, 9),
        may_return=st.booleans(),
    ),
    unique_by=lambda one: one.id,
)


@given(OCCUPANTS, st.integers(1, 4), st.sets(st.sampled_from("abcdef")))
def test_whatever_the_facts_only_an_unused_instance_that_may_return_is_stopped(
    occupants: list[Occupant], limit: int, keep: set[str]
) -> None:
    verdict = place_for("new", [STOPPED, *occupants], max_running=limit, keep=keep)
    holders = [one.id for one in occupants if one.occupies]
    assert isinstance(verdict, PlaceFree) == (len(holders) < limit)
    if isinstance(verdict, Evict):
        one = next(one for one in occupants if one.id == verdict.instance)
        assert one.unused_since is not None
        assert one.may_return
        assert one.id not in keep
