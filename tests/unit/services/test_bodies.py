"""The bodies of all requests together have one bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from manager.services.bodies import BodyBudget


def test_what_does_not_fit_is_refused_and_nothing_of_it_is_held() -> None:
    budget = BodyBudget(100)
    assert budget.take(60)
    assert not budget.take(41)
    assert budget.held_bytes == 60
    assert budget.take(40)
    assert not budget.take(1)
    assert budget.take(0)
    budget.give_back(60)
    assert budget.take(60)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=50))
def test_the_bound_holds_whatever_comes_and_goes(moves: list[tuple[bool, int]]) -> None:
    budget, held = BodyBudget(100), list[int]()
    for comes, size in moves:
        if not comes and held:
            budget.give_back(held.pop())
        elif budget.take(size):
            held.append(size)
        assert budget.held_bytes == sum(held) <= 100
    for size in held:
        budget.give_back(size)
    assert budget.held_bytes == 0
