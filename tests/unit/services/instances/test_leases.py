from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.target import Target
from manager.services.instances.leases import Lease, LeaseBook


class Book:
    """A lease book and how often it has told of a release."""

    def __init__(self) -> None:
        self.told = 0
        self.counts: dict[str, int] = {}
        self.book = LeaseBook("cpu", self._tell, self.counts)

    def _tell(self) -> None:
        self.told += 1


def test_a_lease_says_where_it_leads_and_counts_until_it_is_released() -> None:
    held = Book()
    lease = held.book.grant(Target("cpu", "http://there"))
    assert (lease.instance, lease.endpoint) == ("cpu", "http://there")
    assert (held.book.in_flight, held.told) == (1, 0)
    lease.release()
    assert (held.book.in_flight, held.told) == (0, 1)


def test_books_share_where_they_count() -> None:
    counts: dict[str, int] = {}
    one, two = (LeaseBook(name, lambda: None, counts) for name in ("one", "two"))
    one.grant(Target("cpu", "a"))
    with two.grant(Target("cpu", "b")):
        assert counts == {"one": 1, "two": 1}
    assert counts == {"one": 1, "two": 0}


def test_a_lease_that_is_released_twice_counts_once() -> None:
    held = Book()
    first, second = held.book.grant(Target("cpu", "a")), held.book.grant(Target("cpu", "b"))
    first.release()
    first.release()
    assert (held.book.in_flight, held.told) == (1, 1)
    second.release()
    assert held.book.in_flight == 0


def test_leaving_the_context_releases_however_it_is_left() -> None:
    held = Book()
    with pytest.raises(ZeroDivisionError), held.book.grant(Target("cpu", "a")):  # noqa: PT012  (the body is the point)
        assert held.book.in_flight == 1
        raise ZeroDivisionError
    assert held.book.in_flight == 0
    with held.book.grant(Target("cpu", "a")) as lease:
        lease.release()
    assert (held.book.in_flight, held.told) == (0, 2)


def test_the_count_is_right_by_the_time_a_release_is_told() -> None:
    seen: list[int] = []
    book = LeaseBook("cpu", lambda: seen.append(book.in_flight), {})
    leases = [book.grant(Target("cpu", "a")) for _ in range(3)]
    for lease in leases:
        lease.release()
    assert seen == [2, 1, 0]


@given(st.lists(st.integers(0, 9), max_size=40))
def test_whatever_the_order_the_count_is_that_of_the_leases_not_yet_released(numbers: list[int]) -> None:
    held = Book()
    leases: dict[int, Lease] = {}
    released: set[int] = set()
    for number in numbers:
        if number in leases:
            leases[number].release()
            released.add(number)
        else:
            leases[number] = held.book.grant(Target("cpu", "a"))
        assert held.book.in_flight == len(leases) - len(released)
    for lease in leases.values():
        lease.release()
    assert held.book.in_flight == 0
    assert held.told == len(leases)


def test_a_cut_concerns_the_leases_that_are_open_and_no_later_ones() -> None:
    held = Book()
    old = [held.book.grant(Target("cpu", "a")) for _ in range(2)]
    held.book.cut("it was stopped")
    new = held.book.grant(Target("cpu", "b"))
    assert [lease.cut for lease in (*old, new)] == ["it was stopped", "it was stopped", None]
    held.book.cut("again")
    assert (old[0].cut, new.cut) == ("it was stopped", "again")
    assert Lease(Target("cpu", "a"), lambda: None).cut is None
