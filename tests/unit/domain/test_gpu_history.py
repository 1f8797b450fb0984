"""The history of a card: a grid of times, gaps that stay gaps, and columns of the largest holders."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manager.domain.gpu import Holder
from manager.domain.gpu_history import (
    MOST_INSTANCES,
    MOST_PROCESSES,
    Sample,
    Window,
    mean,
    sample_from,
    sample_of,
    sample_values,
)
from tests.support.gpu_machine import GIB, card, filled

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manager.domain.gpu_history import Columns

STEP_S = 5
LENGTH = 6


def used(count: float | None, **more: Any) -> Sample:
    return Sample(used_bytes=count, instances={}, processes={}, **more)


def window(*samples: tuple[float, Sample], length: int = LENGTH) -> Window:
    made = Window(STEP_S, length)
    for at_s, sample in samples:
        made.add(at_s, sample)
    return made


def known(column: Iterable[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in column]


def columns(it: Window, until_s: float = 0) -> Columns:
    found = it.columns(until_s)
    assert found is not None
    return found


# --- samples ---


def test_a_sample_has_the_memory_by_instance_and_by_name_of_foreign_processes() -> None:
    gpu = replace(filled(), utilisation_percent=40, temperature_c=50, power_watts=99.5)
    holders = (
        Holder(1, "ollama", "gpu0", 5),
        Holder(2, "ollama", "gpu0", 6),
        Holder(3, "python3", None, 7),
        Holder(4, "python3", None, 8),
        Holder(5, None, None, 9),
        Holder(6, "x" * 100, None, 1),
    )
    assert sample_of(gpu, holders) == Sample(
        used_bytes=0,
        utilisation_percent=40,
        temperature_c=50,
        power_watts=99.5,
        instances={"gpu0": 11},
        processes={"python3": 15, "unknown": 9, "x" * 64: 1},
    )


def test_memory_that_one_process_does_not_tell_is_unknown_for_all_of_its_name() -> None:
    holders = (Holder(1, "ollama", "gpu0", None), Holder(2, "ollama", "gpu0", 6), Holder(3, "a", None, 1))
    sample = sample_of(card(), holders)
    assert sample is not None
    assert (sample.instances, sample.processes) == ({"gpu0": None}, {"a": 1})


def test_a_card_whose_driver_lists_no_processes_has_no_split() -> None:
    sample = sample_of(card(lists_processes=False), ())
    assert sample is not None
    assert (sample.used_bytes, sample.instances, sample.processes) == (14 * GIB, None, None)


def test_a_card_of_which_nothing_is_known_has_no_sample() -> None:
    lost = card(free=None, lists_processes=False)
    assert sample_of(lost, ()) is None
    assert sample_of(replace(lost, temperature_c=40), ()) is not None


@pytest.mark.parametrize("unknown", [True, False])
def test_a_sample_of_very_many_names_keeps_the_largest_and_adds_up_the_others(*, unknown: bool) -> None:
    holders = [Holder(pid, f"p{pid:02}", None, pid) for pid in range(1, 41)]
    holders[0] = Holder(1, "p01", None, None if unknown else 1)
    sample = sample_of(card(), holders)
    assert sample is not None
    assert sample.processes == {
        **{f"p{pid}": pid for pid in range(10, 41)},
        "other": None if unknown else sum(range(1, 10)),
    }


def test_the_mean_is_of_what_is_known() -> None:
    samples = [
        Sample(used_bytes=10, temperature_c=50, instances={"a": 8}, processes={"x": 3, "y": None}),
        Sample(used_bytes=21, temperature_c=None, instances={}, processes={"y": 4}),
        Sample(used_bytes=None, power_watts=7.55, instances=None, processes=None),
    ]
    assert mean(samples) == Sample(
        used_bytes=16,
        utilisation_percent=None,
        temperature_c=50,
        power_watts=7.5,
        instances={"a": 4},
        processes={"x": 2, "y": 4},
    )
    assert mean([Sample(), Sample(used_bytes=1)]) == Sample(used_bytes=1)


def test_the_mean_of_many_names_has_no_more_than_one_sample() -> None:
    samples = [used(1, power_watts=1.0), replace(used(1), processes={f"p{n}": n for n in range(100)})]
    shares = mean(samples).processes
    assert shares is not None
    assert len(shares) == 32
    assert "other" in shares


shares = st.none() | st.dictionaries(st.text(max_size=5), st.none() | st.integers(0, 2**50), max_size=5)
numbers = st.none() | st.integers(0, 2**50) | st.floats(0, 1e6, allow_nan=False)


@settings(max_examples=50)
@given(st.builds(Sample, numbers, numbers, numbers, numbers, shares, shares))
def test_a_sample_survives_json(sample: Sample) -> None:
    assert sample_from(json.loads(json.dumps(sample_values(sample)))) == sample


@pytest.mark.parametrize(
    "values", [{"used_bytes": "1"}, {"used_bytes": True}, {"instances": [1]}, {"processes": {"a": "1"}}]
)
def test_stored_values_of_another_kind_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        sample_from(values)


# --- windows ---


def test_an_empty_window_has_no_columns() -> None:
    assert Window(STEP_S, LENGTH).columns(1000) is None


def test_samples_stand_on_a_grid_and_what_was_not_read_is_a_gap() -> None:
    it = window((1001, used(1, power_watts=5.5)), (1004.9, used(2)), (1006, used(3)), (1021, used(None)))
    found = columns(it)
    assert (found.begins_s, found.step_s) == (1000, STEP_S)
    assert known(found.used_bytes) == [2, 3, None, None, None]
    assert known(found.power_watts) == [None] * 5, "the second sample of a step replaces the first"


def test_a_card_that_is_not_read_any_more_has_a_gap_up_to_the_end() -> None:
    it = window((1000, used(1)), (1005, used(2)))
    assert known(columns(it, 1015).used_bytes) == [1, 2, None, None]
    assert known(columns(it, 1030).used_bytes) == [2, None, None, None, None, None]
    assert it.columns(1035) is None
    it.add(1036, used(9))
    assert known(columns(it).used_bytes) == [None] * 5 + [9]


def test_a_clock_that_is_set_back_a_little_drops_samples() -> None:
    it = window((1000, used(1)), (1015, used(2)), (1001, used(3)))
    assert known(columns(it).used_bytes) == [1, None, None, 2]


def test_a_clock_that_is_set_back_far_begins_anew() -> None:
    first = Sample(used_bytes=1, instances={"a": 1}, processes={f"p{n}": n for n in range(20)})
    it = window((9000, first), (1000, used(3)), (1010, used(4)))
    found = columns(it)
    assert (found.begins_s, known(found.used_bytes)) == (1000, [3, None, 4])
    assert (found.instances, found.processes) == ({}, {})


def test_an_instance_is_zero_where_it_was_not_on_the_card_and_unknown_where_that_was_not_read() -> None:
    it = window(
        (1000, used(1)),
        (1005, Sample(used_bytes=1)),
        (1010, Sample(instances={"a": 7}, processes={"x": None})),
        (1015, used(1)),
        (1025, used(1)),
    )
    found = columns(it)
    assert {name: known(one) for name, one in found.instances.items()} == {"a": [0, None, 7, 0, None, 0]}
    assert {name: known(one) for name, one in found.processes.items()} == {"x": [0, None, None, 0, None, 0]}


def test_a_holder_has_a_column_as_long_as_it_is_in_the_window() -> None:
    it = window((1000, Sample(instances={"a": 7}, processes={})))
    for n in range(1, LENGTH):
        it.add(1000 + n * STEP_S, used(1))
        assert list(columns(it).instances) == ["a"]
    it.add(1000 + LENGTH * STEP_S, used(1))
    assert columns(it).instances == {}
    assert not it._instances._by_name


def test_a_holder_is_forgotten_with_its_last_sample_although_no_other_sample_came() -> None:
    it = window((1000, Sample(instances={"a": 7}, processes={})), (1005, used(1)))
    assert list(columns(it, 1025).instances) == ["a"]
    assert columns(it, 1030).instances == {}


def test_a_step_without_a_list_of_processes_says_nothing_of_an_earlier_round() -> None:
    it = window(*((1000 + n * STEP_S, Sample(instances={"a": 7}, processes={})) for n in range(LENGTH)))
    it.add(1000 + LENGTH * STEP_S, Sample(used_bytes=1))
    assert known(columns(it).instances["a"]) == [7] * (LENGTH - 1) + [None]


def test_a_process_that_joins_the_others_is_shown_among_them() -> None:
    it = window(
        (1000, Sample(instances={}, processes=names(MOST_PROCESSES))),
        (1005, Sample(instances={}, processes={"large": 500})),
    )
    assert known(columns(it).processes["other"]) == [10, 0]


def names(count: int, *, first: int = 0) -> dict[str, float | None]:
    """Processes p0, p1, …, of which each holds 10 bytes more than the one before it."""
    return {f"p{n}": 10.0 * (n + 1) for n in range(first, first + count)}


def test_the_largest_processes_have_columns_and_all_others_one_together() -> None:
    it = window((1000, Sample(instances={}, processes=names(MOST_PROCESSES + 2))))
    found = columns(it).processes
    assert set(found) == {*(f"p{n}" for n in range(2, MOST_PROCESSES + 2)), "other"}
    assert known(found["other"]) == [30]


def test_a_larger_process_takes_the_column_of_the_smallest_which_joins_the_others() -> None:
    it = window(
        (1000, Sample(instances={}, processes=names(MOST_PROCESSES))),
        (1005, Sample(instances={}, processes={"p0": 10, "p1": 20, "small": 3, "large": 500})),
        (1010, Sample(instances={}, processes={"large": 400, "p0": 5, "other": 1})),
    )
    found = columns(it).processes
    assert len(found) == MOST_PROCESSES + 1
    assert known(found["large"]) == [0, 500, 400]
    assert known(found["other"]) == [10, 13, 6]
    assert known(found["p1"]) == [20, 20, 0]


def test_the_columns_of_each_moment_add_up_to_all_that_was_read() -> None:
    it = Window(STEP_S, LENGTH)
    totals = []
    for n in range(LENGTH):
        sample = Sample(instances={}, processes=names(MOST_PROCESSES + n, first=3 * n))
        totals.append(sum(value or 0 for value in (sample.processes or {}).values()))
        it.add(1000 + n * STEP_S, sample)
    found = columns(it).processes
    assert [sum(values) for values in zip(*found.values(), strict=True)] == totals
    assert len(found) <= MOST_PROCESSES + 1


def test_instances_beyond_the_bound_are_added_up_under_a_name_that_no_instance_has() -> None:
    sample = Sample(instances={f"i{n:02}": n + 1.0 for n in range(MOST_INSTANCES + 3)}, processes={})
    found = columns(window((1000, sample))).instances
    assert len(found) == MOST_INSTANCES + 1
    assert known(found["*"]) == [6]


@given(
    st.lists(
        st.tuples(st.integers(1, 3) | st.integers(1, 40), st.none() | st.integers(0, 99)),
        min_size=20,
        max_size=60,
    )
)
def test_a_window_shows_the_last_steps_as_they_were_added(steps: list[tuple[int, int | None]]) -> None:
    it, at, expected = Window(1, 16), 100, dict[int, int | None]()
    for step, value in steps:
        at += step
        it.add(at, used(value))
        expected[at] = value
    found = columns(it, at)
    begins = max(min(expected), at - 15)
    assert found.begins_s == begins
    assert known(found.used_bytes) == [expected.get(second) for second in range(begins, at + 1)]
