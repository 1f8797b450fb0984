"""Filters over the metadata of items: `{"lang": "de", "year": {"$gte": 2020}}`. All conditions must hold."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MOST_CONDITIONS = 32
_MOST_VALUES = 1000
Scalar: TypeAlias = "str | int | float | bool | None"
_MISSING: Final = object()


class Condition(NamedTuple):
    """One condition: the name of a field, dots between levels; an operator; and its value."""

    field: str
    operator: str
    value: Any


def read_filter(given: Mapping[str, Any]) -> tuple[Condition, ...]:
    """Return the conditions of a filter.

    Raises:
        ValueError: the first argument is the place in the filter, the second one the problem.
    """
    found: list[Condition] = []
    for field, wanted in given.items():
        if not field:
            raise ValueError("filter", "a field without a name; expected the name of a field of the metadata")
        if not isinstance(wanted, dict):
            found.append(_condition(field, "$eq", wanted))
            continue
        if not wanted:
            raise ValueError(f"filter.{field}", f"no operator; possible are {', '.join(_OPERATORS)}")
        found += [_condition(field, operator, value) for operator, value in wanted.items()]
    if len(found) > MOST_CONDITIONS:
        raise ValueError("filter", f"{len(found)} conditions; at most {MOST_CONDITIONS} are possible")
    return tuple(found)


def matches(conditions: tuple[Condition, ...], metadata: Mapping[str, Any]) -> bool:
    """Return whether all conditions hold. A field that is missing fails all but `$ne`, `$nin`, `$exists`."""
    return all(_OPERATORS[one.operator](_field(metadata, one.field), one.value) for one in conditions)


def _condition(field: str, operator: str, value: Any) -> Condition:
    place = f"filter.{field}"
    if operator not in _OPERATORS:
        raise ValueError(place, f"{operator!r} is no operator; possible are {', '.join(_OPERATORS)}")
    if operator in ("$in", "$nin"):
        if not isinstance(value, list) or not all(_is_scalar(one) for one in value):
            raise ValueError(f"{place}.{operator}", "expected a list of strings, numbers or booleans")
        if len(value) > _MOST_VALUES:
            raise ValueError(
                f"{place}.{operator}", f"{len(value)} values; at most {_MOST_VALUES} are possible"
            )
    elif operator == "$exists":
        if not isinstance(value, bool):
            raise ValueError(f"{place}.{operator}", "expected true or false")
    elif operator in _ORDERS:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{place}.{operator}", "expected a number or a string")
    elif not _is_scalar(value):
        raise ValueError(place, "expected a string, a number, true, false, null, or an object of operators")
    return Condition(field, operator, value)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _field(metadata: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field; its whole name counts before the levels that its dots separate."""
    if field in metadata:
        return metadata[field]
    value: Any = metadata
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _equal(found: Any, wanted: Any) -> bool:
    """Return whether a field has a value; a list has each of its elements."""
    if isinstance(found, list):
        return any(_same(one, wanted) for one in found)
    return _same(found, wanted)


def _same(found: Any, wanted: Any) -> bool:
    # In Python True equals 1.
    return isinstance(found, bool) is isinstance(wanted, bool) and bool(found == wanted)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def holds(found: Any, wanted: Any) -> bool:
        if isinstance(found, bool):
            return False
        if isinstance(wanted, str):
            return isinstance(found, str) and compare(found, wanted)
        return isinstance(found, int | float) and compare(found, wanted)

    return holds


_ORDERS: Mapping[str, Callable[[Any, Any], bool]] = MappingProxyType(
    {
        "$gt": _ordered(lambda found, wanted: found > wanted),
        "$gte": _ordered(lambda found, wanted: found >= wanted),
        "$lt": _ordered(lambda found, wanted: found < wanted),
        "$lte": _ordered(lambda found, wanted: found <= wanted),
    }
)
_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = MappingProxyType(
    {
        "$eq": _equal,
        "$ne": lambda found, wanted: not _equal(found, wanted),
        "$in": lambda found, wanted: any(_equal(found, one) for one in wanted),
        "$nin": lambda found, wanted: not any(_equal(found, one) for one in wanted),
        **_ORDERS,
        "$exists": lambda found, wanted: (found is not _MISSING) is wanted,
    }
)
