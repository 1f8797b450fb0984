"""Who writes to a volume, and who is asked about it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from manager.domain.routing import State
from manager.domain.volumes import Member, readers, writers

RUNS = Member("runs", State.READY)
STARTS = Member("starts", State.STARTABLE, priority=10)
OUT = Member("out", State.OUT, priority=20)
READS = Member("reads", State.READY, priority=30, writable=False)

MEMBERS = st.lists(
    st.builds(
        Member,
        st.sampled_from("abcdef"),
        st.sampled_from(State),
        st.integers(-2, 2),
        writable=st.booleans(),
    ),
    unique_by=lambda member: member.id,
)


def test_whoever_runs_comes_before_whoever_would_have_to_be_started() -> None:
    assert writers([STARTS, OUT, RUNS], None) == ("runs", "starts")


def test_priority_then_order_decide_among_equals() -> None:
    one, two, three = Member("one", State.READY), Member("two", State.READY, 5), Member("three", State.READY)
    assert writers([one, two, three], None) == ("two", "one", "three")


def test_nobody_writes_to_what_it_mounts_for_reading_but_it_may_be_asked() -> None:
    assert writers([READS, STARTS], None) == ("starts",)
    assert readers([READS, STARTS]) == ("reads", "starts")


def test_the_operators_choice_stands_alone() -> None:
    assert writers([RUNS, STARTS, OUT], "out") == ("out",)
    assert writers([], "elsewhere") == ("elsewhere",)


def test_where_nobody_can_be_had_there_is_nobody() -> None:
    assert writers([OUT], None) == ()
    assert readers([OUT]) == ()


@given(MEMBERS)
def test_each_is_tried_once_and_nobody_who_is_out(members: list[Member]) -> None:
    known = {member.id: member for member in members}
    for ids in (writers(members, None), readers(members)):
        assert len(set(ids)) == len(ids)
        assert all(known[id_].state is not State.OUT for id_ in ids)
        states = [known[id_].state is State.READY for id_ in ids]
        assert states == sorted(states, reverse=True)
