"""Instances over several cards: which cards go together, and how memory is divided among them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.domain.gpu import (
    NamedCard,
    bind_gpus,
    cards_in_slots,
    divide,
    is_uuid,
    missing_bytes,
    outstanding_bytes,
    why_not_together,
)
from tests.unit.domain.test_gpu import gpu

if TYPE_CHECKING:
    from collections.abc import Mapping

GIB = 2**30


def test_a_card_that_one_instance_names_among_others_is_nobody_elses() -> None:
    added = bind_gpus(
        [gpu(1), gpu(2), gpu(3)],
        automatic=["any"],
        named=["GPU-1", "GPU-3", "GPU-9"],
        bindings={},
        taken_ids=["any", "both"],
        auto=True,
    )
    assert added == {"any": "GPU-2"}


def test_the_card_in_a_slot_is_found_by_any_spelling_of_it() -> None:
    words = ["auto", "all", "GPU-1", "01:00.0", "00000000:02:00.0", "07:00.0"]
    assert cards_in_slots([gpu(2), gpu(1)], words) == {"01:00.0": "GPU-1", "00000000:02:00.0": "GPU-2"}


def test_of_the_slices_in_a_slot_the_same_one_is_found_whatever_their_order() -> None:
    slices = [replace(gpu(1), uuid=uuid) for uuid in ("MIG-b", "MIG-a")]
    assert cards_in_slots(slices, ["01:00.0"]) == {"01:00.0": "MIG-a"}
    assert cards_in_slots(slices[::-1], ["01:00.0"]) == {"01:00.0": "MIG-a"}


# Cards together

A, B = NamedCard("GPU-a", "GPU-a"), NamedCard("02:00.0", "GPU-b")


@pytest.mark.parametrize(
    "cards",
    [(), (A,), (A, B), (NamedCard("MIG-1", "MIG-1"),), (A, NamedCard("07:00.0", None)), (A, *[B][:0])],
)
def test_whole_cards_go_together_and_a_slice_alone(cards: tuple[NamedCard, ...]) -> None:
    assert why_not_together(cards) is None


def test_a_card_that_is_named_twice_in_two_ways_is_refused_with_both_names() -> None:
    why = why_not_together((A, B, NamedCard("01:00.0", "GPU-a")))
    assert why is not None
    assert "names GPU GPU-a twice, as GPU-a and as 01:00.0" in why


@pytest.mark.parametrize("other", [A, NamedCard("MIG-2", "MIG-2"), NamedCard("07:00.0", None)])
def test_a_slice_goes_with_no_other_card(other: NamedCard) -> None:
    why = why_not_together((NamedCard("01:00.0", "MIG-1"), other))
    assert why is not None
    assert "MIG-1 is a slice" in why


# What is missing on several cards


@pytest.mark.parametrize(
    ("needed", "rooms", "missing"),
    [
        (10, [4, 6], 0),
        (11, [4, 6], 1),
        (10, [0, 10], 0),  # one card is full: the other one takes all of it
        (10, [-7, 10], 0),  # what was promised beyond a card is no debt of the other
        (10, [-7, 9], 1),
        (10, [0, 0], 10),
        (10, [-7, -2], 12),  # so much has to become free on the second card at least
        (10, [4, None], 0),
        (10, [], 0),
    ],
)
def test_what_several_cards_lack_is_told_by_the_sum_of_their_rooms(
    needed: int, rooms: list[int | None], missing: int
) -> None:
    assert missing_bytes(needed, rooms) == missing


@pytest.mark.parametrize(
    ("promised", "used", "left"),
    [
        ({"A": 4, "B": 4}, {}, {"A": 4, "B": 4}),
        ({"A": 4, "B": 4}, {"A": 1, "B": 4}, {"A": 3, "B": 0}),
        ({"A": 4, "B": 4}, {"A": 8}, {"A": 0, "B": 0}),  # all of it went to one card
        ({"A": 4, "B": 4}, {"A": 6}, {"A": 0, "B": 2}),
        ({"A": 4}, {"A": 1, "C": 9}, {"A": 0}),
        ({}, {"A": 1}, {}),
    ],
)
def test_what_a_server_has_placed_otherwise_is_outstanding_nowhere(
    promised: dict[str, int], used: dict[str, int], left: dict[str, int]
) -> None:
    assert outstanding_bytes(promised, used) == left


@pytest.mark.parametrize(
    ("total", "rooms", "likely", "shares"),
    [
        (8, {"A": 24}, {}, {"A": 8}),
        (8, {"A": None}, {}, {"A": 8}),
        (30, {"A": 24}, {}, {"A": 30}),  # whatever is free
        (8, {"A": 12, "B": 4}, {}, {"A": 6, "B": 2}),  # by the room
        (8, {"A": 12, "B": 4}, {"A": 4, "B": 4}, {"A": 4, "B": 4}),  # as it was before
        (8, {"A": 12, "B": 1}, {"A": 4, "B": 4}, {"A": 7, "B": 1}),  # as far as there is room
        (8, {"A": 12, "B": -3}, {"A": 4, "B": 4}, {"A": 8, "B": 0}),
        (4, {"A": 12, "B": 12}, {"A": 6, "B": 2}, {"A": 3, "B": 1}),  # less than before, in the same parts
        (9, {"A": 12, "B": 12, "C": 12}, {"A": 6, "Z": 9}, {"A": 6 + 1, "B": 1, "C": 1}),
        (9, {"A": None, "B": None}, {}, {"A": 5, "B": 4}),
        (20, {"A": 4, "B": 6}, {}, {"A": 4, "B": 16}),
        (20, {"A": 0, "B": -5}, {}, {"A": 20, "B": 0}),
        (0, {"A": 4, "B": 6}, {"A": 3, "B": 3}, {"A": 0, "B": 0}),
    ],
)
def test_memory_is_divided_as_before_and_the_rest_by_the_room(
    total: int, rooms: Mapping[str, int | None], likely: Mapping[str, int], shares: dict[str, int]
) -> None:
    assert divide(total, rooms, likely) == shares


amounts = st.integers(0, 2**40)
uuids = st.sampled_from(["A", "B", "C", "D"])
rooms_of = st.dictionaries(uuids, st.one_of(st.none(), st.integers(-(2**36), 2**40)), min_size=1)


@given(amounts, rooms_of, st.dictionaries(uuids, amounts))
def test_the_shares_add_up_and_exceed_no_room_where_it_fits(
    total: int, rooms: dict[str, int | None], likely: dict[str, int]
) -> None:
    shares = divide(total, rooms, likely)
    assert shares.keys() == rooms.keys()
    assert sum(shares.values()) == total
    assert all(share >= 0 for share in shares.values())
    known = [max(0, room) for room in rooms.values() if room is not None]
    if len(known) < len(rooms) or total <= sum(known):
        assert all(room is None or shares[uuid] <= max(0, room) for uuid, room in rooms.items())


@given(amounts, st.lists(st.integers(-(2**36), 2**40), min_size=1, max_size=4))
def test_what_is_missing_fits_once_it_has_become_free_on_some_card(needed: int, rooms: list[int]) -> None:
    missing = missing_bytes(needed, rooms)
    freed = [[*rooms[:n], room + missing, *rooms[n + 1 :]] for n, room in enumerate(rooms)]
    assert min(missing_bytes(needed, one) for one in freed) == 0
    if missing:
        less = [[*rooms[:n], room + missing - 1, *rooms[n + 1 :]] for n, room in enumerate(rooms)]
        assert min(missing_bytes(needed, one) for one in less) == 1


@given(st.dictionaries(uuids, amounts), st.dictionaries(uuids, amounts))
def test_no_card_is_promised_more_than_in_all_is_outstanding(
    promised: dict[str, int], used: dict[str, int]
) -> None:
    left = outstanding_bytes(promised, used)
    rest = max(0, sum(promised.values()) - sum(used.values()))
    for uuid, bytes_left in left.items():
        assert bytes_left == min(rest, max(0, promised[uuid] - used.get(uuid, 0)))


def test_a_uuid_is_told_from_a_place() -> None:
    assert [is_uuid(one) for one in ("GPU-a", "MIG-a", "01:00.0", "auto", "all")] == [True, True] + 3 * [
        False
    ]
