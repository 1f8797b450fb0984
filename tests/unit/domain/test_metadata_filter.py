from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from manager.domain.metadata_filter import MOST_CONDITIONS, matches, read_filter

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2**63, 2**64, -(2**64), 10**400])
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["", "a", "b", "\ud800", "\0"])
)
NAMES = st.sampled_from(["a", "b", "a.b", ".", "a.", "a.b.c", "$eq"]) | st.text(min_size=1, max_size=3)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=12,
)
METADATA = st.dictionaries(NAMES | st.just(""), ANYTHING, max_size=4)
CONDITION = st.one_of(
    st.tuples(st.sampled_from(["$eq", "$ne"]), SCALARS),
    st.tuples(st.sampled_from(["$in", "$nin"]), st.lists(SCALARS, max_size=3)),
    st.tuples(
        st.sampled_from(["$gt", "$gte", "$lt", "$lte"]),
        st.integers() | st.floats() | st.sampled_from([10**400, -(2**64)]) | st.text(max_size=2),
    ),
    st.tuples(st.just("$exists"), st.booleans()),
)
FILTERS = st.dictionaries(NAMES, SCALARS | st.lists(CONDITION, min_size=1, max_size=3).map(dict), max_size=3)


def holds(wanted: Any, metadata: dict[str, Any]) -> bool:
    return matches(read_filter(wanted), metadata)


@pytest.mark.parametrize(
    ("wanted", "metadata", "expected"),
    [
        ({}, {}, True),
        ({"lang": "de"}, {"lang": "de"}, True),
        ({"lang": "de"}, {"lang": "en"}, False),
        ({"lang": "de"}, {}, False),
        ({"lang": "de", "year": 2020}, {"lang": "de", "year": 2021}, False),
        ({"lang": "de", "year": {"$gte": 2020}}, {"lang": "de", "year": 2020}, True),
        # null is a value; a field that is missing has none
        ({"a": None}, {"a": None}, True),
        ({"a": None}, {}, False),
        ({"a": {"$exists": True}}, {"a": None}, True),
        ({"a": {"$exists": False}}, {"a": None}, False),
        ({"a": {"$exists": False}}, {}, True),
        ({"a": {"$exists": True}}, {}, False),
        # true is not 1
        ({"a": True}, {"a": 1}, False),
        ({"a": 1}, {"a": True}, False),
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": {"$in": [1]}}, {"a": True}, False),
        ({"a": {"$gt": 0}}, {"a": True}, False),
        ({"a": {"$eq": 2}}, {"a": 2}, True),
        ({"a": {"$ne": 2}}, {"a": 2}, False),
        ({"a": {"$ne": 2}}, {"a": 3}, True),
        ({"a": {"$ne": 2}}, {}, True),
        ({"a": {"$in": [1, 2]}}, {"a": 2}, True),
        ({"a": {"$in": [1, 2]}}, {"a": 3}, False),
        ({"a": {"$in": []}}, {"a": 3}, False),
        ({"a": {"$in": [None]}}, {}, False),
        ({"a": {"$nin": [1, 2]}}, {"a": 2}, False),
        ({"a": {"$nin": [1, 2]}}, {"a": 3}, True),
        ({"a": {"$nin": [1, 2]}}, {}, True),
        # a list has each of its elements
        ({"a": "x"}, {"a": ["x", "y"]}, True),
        ({"a": "z"}, {"a": ["x", "y"]}, False),
        ({"a": {"$ne": "x"}}, {"a": ["x", "y"]}, False),
        ({"a": {"$in": ["y"]}}, {"a": ["x", "y"]}, True),
        ({"a": {"$nin": ["y"]}}, {"a": ["x", "y"]}, False),
        ({"a": {"$gt": 1}}, {"a": [2]}, False),
        ({"a": "x"}, {"a": []}, False),
        # orders
        ({"a": {"$gt": 1}}, {"a": 1}, False),
        ({"a": {"$gt": 1}}, {"a": 1.5}, True),
        ({"a": {"$gte": 1}}, {"a": 1}, True),
        ({"a": {"$lt": 1}}, {"a": 1}, False),
        ({"a": {"$lt": 1}}, {"a": 0}, True),
        ({"a": {"$lte": 1}}, {"a": 1}, True),
        ({"a": {"$lte": 1}}, {"a": 2}, False),
        ({"a": {"$gt": 1, "$lt": 3}}, {"a": 2}, True),
        ({"a": {"$gt": 1, "$lt": 3}}, {"a": 3}, False),
        ({"a": {"$gt": "a"}}, {"a": "b"}, True),
        ({"a": {"$gt": "a"}}, {"a": 2}, False),
        ({"a": {"$gt": 1}}, {"a": "b"}, False),
        ({"a": {"$lt": 1}}, {"a": None}, False),
        ({"a": {"$lt": 1}}, {}, False),
        ({"a": {"$gt": 1.5}}, {"a": 10**400}, True),
        ({"a": {"$lt": 10**400}}, {"a": 1.5}, True),
        ({"a": {"$gte": 0}}, {"a": math.nan}, False),
        # levels
        ({"a.b": 1}, {"a": {"b": 1}}, True),
        ({"a.b": 1}, {"a.b": 1, "a": {"b": 2}}, True),
        ({"a.b": 1}, {"a": 1}, False),
        ({"a.b": 1}, {"a": {"c": 1}}, False),
        ({"a.b": 1}, {"a": [{"b": 1}]}, False),
        ({"a.b.c": 1}, {"a": {"b": {"c": 1}}}, True),
        ({"a.": 1}, {"a": {"": 1}}, True),
    ],
)
def test_filter(wanted: Any, metadata: dict[str, Any], expected: bool) -> None:
    assert holds(wanted, metadata) is expected


OPERATORS = r"\$eq, \$ne, \$in, \$nin, \$gt, \$gte, \$lt, \$lte, \$exists"


@pytest.mark.parametrize(
    ("wanted", "place", "problem"),
    [
        ({"": 1}, "filter", "a field without a name"),
        ({"a": {}}, "filter.a", f"no operator; possible are {OPERATORS}"),
        ({"a": {"$foo": 1}}, "filter.a", rf"'\$foo' is no operator; possible are {OPERATORS}"),
        ({"a": {"b": 1}}, "filter.a", "'b' is no operator"),
        ({"a": [1]}, "filter.a", "expected a string, a number, true, false, null, or an object"),
        ({"a": {"$ne": {}}}, "filter.a", "expected a string"),
        ({"a": {"$in": 1}}, "filter.a.$in", "expected a list of strings, numbers or booleans"),
        ({"a": {"$nin": [[1]]}}, "filter.a.$nin", "expected a list of strings, numbers or booleans"),
        ({"a": {"$in": [1] * 1001}}, "filter.a.$in", "1001 values; at most 1000 are possible"),
        ({"a": {"$exists": 1}}, "filter.a.$exists", "expected true or false"),
        ({"a": {"$gt": True}}, "filter.a.$gt", "expected a number or a string"),
        ({"a": {"$lte": None}}, "filter.a.$lte", "expected a number or a string"),
        ({str(one): 1 for one in range(MOST_CONDITIONS + 1)}, "filter", "33 conditions; at most 32"),
        ({"a": {"$gt": 1, "$foo": 1}}, "filter.a", r"'\$foo' is no operator"),
    ],
)
def test_a_filter_that_cannot_be_read_says_where(wanted: Any, place: str, problem: str) -> None:
    with pytest.raises(ValueError, match="filter") as raised:
        read_filter(wanted)
    assert raised.value.args[0] == place
    assert re.match(problem, raised.value.args[1])


def test_the_bounds_themselves_are_possible() -> None:
    assert len(read_filter({str(one): 1 for one in range(MOST_CONDITIONS)})) == MOST_CONDITIONS
    assert holds({"a": {"$in": [*range(1000)]}}, {"a": 999})


@given(FILTERS, METADATA)
@example({"a": {"$gt": 1.5}}, {"a": 10**400})
@example({"a.b": 1}, {"a": None})
def test_no_metadata_make_a_filter_raise(wanted: dict[str, Any], metadata: dict[str, Any]) -> None:
    assert holds(wanted, metadata) in (True, False)


@given(ANYTHING, METADATA)
def test_what_is_no_filter_is_refused_with_its_place(condition: Any, metadata: dict[str, Any]) -> None:
    try:
        conditions = read_filter({"a": condition})
    except ValueError as error:
        place, problem = error.args
    else:
        place, problem = "filter.a", str(matches(conditions, metadata))
    assert place.startswith("filter.a")
    assert problem


@given(CONDITION, METADATA)
def test_opposites(condition: tuple[str, Any], metadata: dict[str, Any]) -> None:
    opposites = {"$eq": "$ne", "$ne": "$eq", "$in": "$nin", "$nin": "$in"}
    operator, value = condition
    if operator in opposites:
        assert holds({"a": {operator: value}}, metadata) is not holds(
            {"a": {opposites[operator]: value}}, metadata
        )


@given(SCALARS.filter(lambda value: value == value), METADATA)  # noqa: PLR0124  (not NaN)
def test_an_item_is_found_by_what_it_has(value: Any, metadata: dict[str, Any]) -> None:
    assert holds({"a": value}, {**metadata, "a": value})
    assert holds({"a": {"$in": ["other", value]}}, {**metadata, "a": ["before", value]})
    assert holds({"a.b": value}, {"a": {"b": value}})


def test_metadata_that_python_reads_from_json() -> None:
    assert not holds({"a": {"$gt": 0}}, json.loads('{"a": NaN}'))
    assert holds({"a": {"$gt": 0}}, json.loads('{"a": Infinity}'))
    assert holds({"a": {"$gt": 1e300}}, json.loads('{"a": 1' + "0" * 400 + "}"))
