"""Reads the items and the queries that clients send to collections. For a thread: bodies may be large.

The elements of a list are found first and read one by one: no call holds the interpreter for long, and the
values in memory are those of one item.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NoReturn

import orjson

from manager.api.submitted import invalid, invalid_fields
from manager.domain.embeddings import (
    MOST_DIMENSIONS,
    MOST_HITS,
    MOST_ID_CHARACTERS,
    MOST_ITEMS_AT_ONCE,
    MOST_METADATA_BYTES,
    MOST_TEXT_CHARACTERS,
    unit_vector,
)
from manager.domain.metadata_filter import read_filter
from manager.services.embeddings.querying import Query
from manager.services.embeddings.writing import NewItem
from manager.settings.problems import nearest, shown
from manager.wire.scan import NotJsonError, Scan
from manager.wire.steps import run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# A text of escaped characters beyond the basic plane, a vector with long numbers, and white space.
MOST_ITEM_BYTES: Final = 4 * 2**20
MOST_QUERY_BYTES: Final = MOST_ITEM_BYTES
DEFAULT_HITS: Final = 10
_MOST_PROBLEMS = 20
_MOST_VERSION_CHARACTERS = 64
# A place repeats names that the client has chosen.
_MOST_PLACE_CHARACTERS = 200
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_ITEM = ("id", "text", "vector", "metadata")
_QUERY = ("text", "vector", "k", "version", "filter")
_OBJECT, _ARRAY = b"{["
_NO_METADATA = b"{}"


class _WrongError(Exception):
    """A value is wrong: its place, and why."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(place, message)
        self.place = place if len(place) <= _MOST_PLACE_CHARACTERS else f"{place[:_MOST_PLACE_CHARACTERS]}…"
        self.message = message


def read_items(raw: bytes) -> list[NewItem]:
    """Read the body that writes items: `{"items": [{"id", "text" or "vector", "metadata"?}]}`.

    Raises:
        InvalidRequestError: it is none; the first problems are named with their places.
    """
    problems: list[tuple[str, str]] = []
    items: list[NewItem] = []
    try:
        for item in _items(memoryview(raw), problems):
            items.append(item)
            if len(items) > MOST_ITEMS_AT_ONCE:
                _refuse("body.items", f"more than {MOST_ITEMS_AT_ONCE} items; at most so many at once")
        if not items and not problems:
            _refuse("body.items", f"no items; expected 1 to {MOST_ITEMS_AT_ONCE}")
    except _WrongError as error:
        problems.append((error.place, error.message))
    except NotJsonError as error:
        problems.append(("body", f"it is not JSON: {error}"))
    if problems:
        raise invalid_fields(problems)
    return items


def read_query(raw: bytes) -> Query:
    """Read a query: `{"text" or "vector", "k": 10, "version"?, "filter"?}`.

    Raises:
        InvalidRequestError: it is none; the place is named.
    """
    try:
        given = _given("body", _loaded("body", memoryview(raw)), _QUERY)
        text, vector = _what("body", given)
        return Query(
            text,
            vector,
            _hits(given.get("k")),
            _version(given.get("version")),
            _conditions(given.get("filter")),
        )
    except _WrongError as error:
        raise invalid(error.place, error.message) from None


def _conditions(given: Any) -> Any:
    if given is None:
        return ()
    if not isinstance(given, dict):
        _refuse("body.filter", f"{_shown(given)}; expected an object")
    try:
        return read_filter(given)
    except ValueError as error:
        place, message = error.args
        raise _WrongError(f"body.{place}", message) from None


def _hits(given: Any) -> int:
    if given is None:
        return DEFAULT_HITS
    if type(given) is not int or not 1 <= given <= MOST_HITS:
        _refuse("body.k", f"{_shown(given)}; expected a whole number from 1 to {MOST_HITS}")
    return given


def _version(given: Any) -> str | None:
    if given is not None and not (isinstance(given, str) and 0 < len(given) <= _MOST_VERSION_CHARACTERS):
        _refuse("body.version", f"{_shown(given)}; expected the id of a version, or null for the active one")
    return given


def _items(text: memoryview, problems: list[tuple[str, str]]) -> Iterator[NewItem]:
    """Yield the items. Those that are wrong are added to the problems, until there are enough of them.

    Raises:
        _WrongError, NotJsonError: it is no list of items.
    """
    places: dict[str, int] = {}
    for number, element in enumerate(_elements(text)):
        place = f"body.items.{number}"
        try:
            item = _item(place, element)
            earlier = places.setdefault(item.id, number)
            if earlier != number:
                message = f"{shown(item.id)} is the id of body.items.{earlier} too; expected each id once"
                _refuse(f"{place}.id", message)
        except _WrongError as error:
            problems.append((error.place, error.message))
            if len(problems) == _MOST_PROBLEMS:
                return
        else:
            yield item


def _elements(text: memoryview) -> Iterator[memoryview]:
    """Yield the elements of `items`, as they stand in the body.

    Raises:
        _WrongError, NotJsonError: it is no such object.
    """
    scan = Scan(text)
    if run(scan.space()) != _OBJECT:
        _refuse("body", "expected an object")
    fields = run(scan.fields())
    if run(scan.space()) >= 0:
        _refuse("body", "there is more behind the JSON object")
    starts: dict[str, int] = {}
    for name, start, _ in fields:
        if name in starts:
            _refuse(f"body.{name}", "this key is given twice")
        starts[name] = start
    _refuse_unknown("body", starts, ("items",))
    if "items" not in starts:
        _refuse("body.items", "missing; expected a list of items")
    if text[starts["items"]] != _ARRAY:
        _refuse("body.items", f"expected a list of 1 to {MOST_ITEMS_AT_ONCE} items")
    scan = Scan(text, starts["items"] + 1)
    found = run(scan.next_element(first=True))
    while found is not None:
        yield text[found[0] : found[1]]
        found = run(scan.next_element(first=False))


def _item(place: str, element: memoryview) -> NewItem:
    if len(element) > MOST_ITEM_BYTES:
        _refuse(place, f"{len(element)} bytes; an item may have at most {MOST_ITEM_BYTES}")
    given = _given(place, _loaded(place, element), _ITEM)
    item_id = _id(f"{place}.id", given)
    text, vector = _what(place, given)
    return NewItem(item_id, text, vector, _metadata(f"{place}.metadata", given.get("metadata")))


def _loaded(place: str, text: memoryview) -> Any:
    try:
        return orjson.loads(text)
    except ValueError as error:
        raise _WrongError(place, f"it is not JSON: {error}") from None


def _given(place: str, given: Any, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        _refuse(place, f"{_shown(given)}; expected an object")
    _refuse_unknown(place, given, known)
    return given


def _refuse_unknown(place: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            hint = nearest(name[:_MOST_PLACE_CHARACTERS], known)
            _refuse(f"{place}.{name}", f"unknown key; {hint}allowed: {', '.join(known)}")


def _id(place: str, given: Mapping[str, Any]) -> str:
    if "id" not in given:
        _refuse(place, f"missing; expected text of 1 to {MOST_ID_CHARACTERS} characters")
    value = given["id"]
    if not isinstance(value, str) or not 1 <= len(value) <= MOST_ID_CHARACTERS:
        _refuse(place, f"{_shown(value)}; expected text of 1 to {MOST_ID_CHARACTERS} characters")
    if _CONTROL.search(value):
        _refuse(place, f"{_shown(value)}; expected no control characters")
    if value in (".", ".."):
        # A client resolves these in a path: the item could not be reached.
        _refuse(place, f"{_shown(value)}; expected another id: in a path this one is a step")
    return value


def _what(place: str, given: Mapping[str, Any]) -> tuple[str | None, bytes | None]:
    """Return the text or the vector; null is as if it were left out."""
    text, vector = given.get("text"), given.get("vector")
    if text is None and vector is None:
        _refuse(place, "neither `text` nor `vector`; expected one of the two")
    if text is None:
        return None, _vector(f"{place}.vector", vector)
    if vector is not None:
        _refuse(place, "both `text` and `vector`; expected one of the two")
    if not isinstance(text, str) or not text:
        _refuse(f"{place}.text", f"{_shown(text)}; expected text that is not empty")
    if len(text) > MOST_TEXT_CHARACTERS:
        _refuse(f"{place}.text", f"{len(text)} characters; at most {MOST_TEXT_CHARACTERS} are possible")
    return text, None


def _vector(place: str, values: Any) -> bytes:
    if not isinstance(values, list) or not 1 <= len(values) <= MOST_DIMENSIONS:
        said = f"{len(values)} numbers" if isinstance(values, list) else _shown(values)
        _refuse(place, f"{said}; expected a list of 1 to {MOST_DIMENSIONS} numbers")
    for number, value in enumerate(values):
        if type(value) is not float and type(value) is not int:
            _refuse(f"{place}.{number}", f"{_shown(value)}; expected a number")
    try:
        return unit_vector(values)
    except ValueError as error:
        raise _WrongError(place, str(error)) from None


def _metadata(place: str, value: Any) -> bytes:
    if value is None:
        return _NO_METADATA
    if not isinstance(value, dict):
        _refuse(place, f"{_shown(value)}; expected an object")
    try:
        encoded = orjson.dumps(value)
    except TypeError:
        raise _WrongError(place, "it nests too deep; at most 254 levels are possible") from None
    if len(encoded) > MOST_METADATA_BYTES:
        _refuse(place, f"{len(encoded)} bytes as JSON; at most {MOST_METADATA_BYTES} are possible")
    return encoded


def _shown(value: Any) -> str:
    """Return a value as a message may show it. Of a long text the beginning: no copy of it is made."""
    if isinstance(value, str):
        value = value[:_MOST_PLACE_CHARACTERS]
    return shown(value, mapping="an object")


def _refuse(place: str, message: str) -> NoReturn:
    raise _WrongError(place, message)
