"""Fields of a request: each is read, passed over or refused, and an error says which one and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from manager.wire.errors import BadBodyError
from manager.wire.translate.codec import Untranslatable
from manager.wire.translate.fields import Fields, shown

if TYPE_CHECKING:
    from collections.abc import Callable

READS: dict[str, tuple[Any, Callable[[Fields], Any], Any]] = {
    "a text": ("a", lambda given: given.text("x"), "a"),
    "no text": (None, lambda given: given.text("x"), ""),
    "a needed text": ("a", lambda given: given.needed("x"), "a"),
    "a choice": ("a", lambda given: given.choice("x", ("a", "b")), "a"),
    "no choice": (None, lambda given: given.choice("x", ("a",)), None),
    "a flag": (False, lambda given: given.flag("x"), False),
    "no flag": (None, lambda given: given.flag("x"), None),
    "a number": (0.5, lambda given: given.number("x", 0, 1), 0.5),
    "no number": (None, lambda given: given.number("x", 0, 1), None),
    "a count": (3, lambda given: given.count("x"), 3),
    "no count": (None, lambda given: given.count("x"), None),
    "a whole number": (-3, lambda given: given.whole("x"), -3),
    "no whole number": (None, lambda given: given.whole("x"), None),
    "texts": (["a", "b"], lambda given: given.texts("x"), ("a", "b")),
    "no texts": (None, lambda given: given.texts("x"), ()),
    "an object as it is": ({"y": 1}, lambda given: given.mapping("x"), {"y": 1}),
    "no object": (None, lambda given: given.mapping("x"), None),
    "no inner object": (None, lambda given: given.inner("x"), None),
    "a neutral value": (False, lambda given: given.only("x", False), None),
    "another neutral value": ([], lambda given: given.only("x", False, []), None),
    "a hint": ({"deep": True}, lambda given: given.hints("x"), None),
}

REFUSED: dict[str, tuple[Any, Callable[[Fields], Any], str]] = {
    "text": (1, lambda given: given.text("x"), "at.x must be a string, not 1"),
    "needed": (None, lambda given: given.needed("x"), "at.x is missing: a string is required"),
    "empty": ("", lambda given: given.needed("x"), "at.x is missing: a string is required"),
    "choice": ("c", lambda given: given.choice("x", ("a", "b")), 'at.x must be one of a, b, not "c"'),
    "choice of a list": (
        [],
        lambda given: given.choice("x", ("a", "b")),
        "at.x must be one of a, b, not a list",
    ),
    "flag": (1, lambda given: given.flag("x"), "at.x must be true or false, not 1"),
    "number": ("1", lambda given: given.number("x", 0, 1), 'at.x must be a number from 0 to 1, not "1"'),
    "number too large": (
        1.5,
        lambda given: given.number("x", 0, 1),
        "at.x must be a number from 0 to 1, not 1.5",
    ),
    "number too small": (
        -1,
        lambda given: given.number("x", 0, 1),
        "at.x must be a number from 0 to 1, not -1",
    ),
    "number of a flag": (
        True,
        lambda given: given.number("x", 0, 1),
        "at.x must be a number from 0 to 1, not true",
    ),
    "count": (0, lambda given: given.count("x", 1), "at.x must be a whole number of at least 1, not 0"),
    "count of a fraction": (
        1.5,
        lambda given: given.count("x"),
        "at.x must be a whole number of at least 0, not 1.5",
    ),
    "count of a flag": (
        True,
        lambda given: given.count("x"),
        "at.x must be a whole number of at least 0, not true",
    ),
    "whole": (1.5, lambda given: given.whole("x"), "at.x must be a whole number, not 1.5"),
    "whole of a flag": (True, lambda given: given.whole("x"), "at.x must be a whole number, not true"),
    "items": ({}, lambda given: given.items("x"), "at.x must be a list, not an object"),
    "texts": (["a", 1], lambda given: given.texts("x"), "at.x[1] must be a string, not 1"),
    "inner": ([], lambda given: given.inner("x"), "at.x must be an object, not a list"),
    "inners": ([{}, "a"], lambda given: given.inners("x"), 'at.x[1] must be an object, not "a"'),
    "mapping": (2**70, lambda given: given.mapping("x"), f"at.x must be an object, not {2**70}"),
    "only": (
        True,
        lambda given: given.only("x", False),
        "at.x: true cannot be passed on to a server of another dialect: leave it out",
    ),
    "finish": (1, Fields.finish, "at.x cannot be passed on to a server of another dialect: leave it out"),
}


@pytest.mark.parametrize("case", READS)
def test_a_field_is_taken(case: str) -> None:
    value, take, expected = READS[case]
    given = Fields({"x": value}, "at")

    assert take(given) == expected

    given.finish()  # nothing is left
    assert "x" not in given


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_field_is_named_with_what_is_allowed(case: str) -> None:
    value, take, message = REFUSED[case]

    with pytest.raises(BadBodyError) as raised:
        take(Fields({"x": value}, "at"))

    assert str(raised.value) == message
    assert isinstance(raised.value, Untranslatable) == ("passed on" in message)


def test_inner_objects_know_their_place() -> None:
    given = Fields({"a": [{"b": {"c": 1}}]})
    (one,) = given.inners("a")
    inner = one.inner("b")

    assert inner is not None
    assert inner.place("c") == "a[0].b.c"
    assert "c" in inner


def test_what_is_no_object_has_no_fields() -> None:
    with pytest.raises(BadBodyError, match=r"^the request body must be an object, not a list$"):
        Fields([])


def test_a_long_value_is_shown_in_short() -> None:
    assert shown("a" * 100) == f'"{"a" * 59}…'
    assert shown("\ud800") == "'\\ud800'"
