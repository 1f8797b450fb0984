"""The bodies that clients send to collections: what is read, and what is refused with its place."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.api.collection_bodies import MOST_ITEM_BYTES, read_items, read_query
from manager.domain.embeddings import MOST_ITEMS_AT_ONCE, vector_values
from manager.domain.metadata_filter import Condition
from manager.errors import InvalidRequestError
from manager.services.embeddings.querying import Query
from manager.services.embeddings.writing import NewItem

if TYPE_CHECKING:
    from collections.abc import Callable

THOUSAND = b",".join(b'{"id": "%d", "text": "x"}' % number for number in range(MOST_ITEMS_AT_ONCE))
NESTED = b'{"items": [{"id": "a", "text": "x", "metadata": %b1%b}]}'


def refused(read: Callable[[bytes], object], body: bytes) -> list[str]:
    """The fields that a refusal names."""
    with pytest.raises(InvalidRequestError) as raised:
        read(body)
    fields: Any = raised.value.details["fields"]
    assert all(one["message"] for one in fields)
    assert raised.value.message == f"{fields[0]['field']}: {fields[0]['message']}"
    assert len(raised.value.message) < 1000
    return [one["field"] for one in fields]


def test_items_are_read_in_their_order() -> None:
    body = (
        '{ "items" : [ {"id": "ä/b", "text": "x\\u00e4", "metadata": {"n": [1, 2.5, null, true]}},\n'
        ' {"vector": [3, 4.0], "id": "v", "text": null, "metadata": null} ] } '
    )
    text, vector = read_items(body.encode())
    assert text == NewItem("ä/b", "xä", None, b'{"n":[1,2.5,null,true]}')
    assert (vector.id, vector.text, vector.metadata) == ("v", None, b"{}")
    assert vector.vector is not None
    assert vector_values(vector.vector) == pytest.approx([0.6, 0.8])


def test_as_many_items_as_are_possible_are_read() -> None:
    assert len(read_items(b'{"items": [%b]}' % THOUSAND)) == MOST_ITEMS_AT_ONCE


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"[]", "body"),
        (b"{", "body"),
        (b"", "body"),
        (b"\xff", "body"),
        (b"{}", "body.items"),
        (b'{"items": {}}', "body.items"),
        (b'{"items": []}', "body.items"),
        (b'{"items": [1]}', "body.items.0"),
        (b'{"items": [{"id": "a", "text": "x"}], "more": 1}', "body.more"),
        (b'{"items": [], "items": []}', "body.items"),
        (b'{"items": [{"id": "a", "text": "x"}]} 1', "body"),
        (b'{"items": [{"id": "a", "text": "x"},]}', "body"),
        (b'{"items": [{"id": "a", "text": "x"} {"id": "b", "text": "x"}]}', "body"),
        (b'{"items": [{"id": "a", "text": "x"]}]}', "body"),
        (b'{"items": [{"id": "a" "text": "x"}]}', "body.items.0"),
        (b'{"items": [{"id": "a"}]}', "body.items.0"),
        (b'{"items": [{"id": "a", "text": "x", "vector": [1]}]}', "body.items.0"),
        (b'{"items": [{"id": "a", "text": ""}]}', "body.items.0.text"),
        (b'{"items": [{"id": "a", "text": 1}]}', "body.items.0.text"),
        (b'{"items": [{"id": "a", "text": "\\ud800"}]}', "body.items.0"),
        (b'{"items": [{"id": "a", "text": "x", "metadata": {"\\udc00": 1}}]}', "body.items.0"),
        (b'{"items": [{"id": "a", "vector": [1, NaN]}]}', "body.items.0"),
        (b'{"items": [{"id": "a", "text": "x"}, NaN]}', "body"),
        (b'{"items": [{"id": "a", "vector": [1e400]}]}', "body.items.0"),
        (b'{"items": [{"id": "a", "vector": [1, "2"]}]}', "body.items.0.vector.1"),
        (b'{"items": [{"id": "a", "vector": [true]}]}', "body.items.0.vector.0"),
        (b'{"items": [{"id": "a", "vector": [0, 0]}]}', "body.items.0.vector"),
        (b'{"items": [{"id": "a", "vector": []}]}', "body.items.0.vector"),
        (b'{"items": [{"id": 1, "text": "x"}]}', "body.items.0.id"),
        (b'{"items": [{"text": "x"}]}', "body.items.0.id"),
        (b'{"items": [{"id": "a", "text": "x", "metadata": []}]}', "body.items.0.metadata"),
        (b'{"items": [{"id": "a", "text": "x", "metdata": {}}]}', "body.items.0.metdata"),
        (NESTED % (b'{"a":' * 300, b"}" * 300), "body.items.0.metadata"),
        (NESTED % (b'{"a":' * 9000, b"}" * 9000), "body.items.0"),
        (b'{"items": [{"id": "a", "text": "%b"}]}' % (b"x" * 100_001), "body.items.0.text"),
        (b'{"items": [{"id": "a", "vector": [1%b]}]}' % (b",1" * 8192), "body.items.0.vector"),
        (b'{"items": [{"id": "a", "text": "x"%b}]}' % (b" " * MOST_ITEM_BYTES), "body.items.0"),
        (b'{"items": [%b, {"id": "a", "text": "x"}]}' % THOUSAND, "body.items"),
        (b'{"items": [{"id": "a", "text": "x", "metadata": {"a": "%b"}}]}' % (b"x" * 2**14),
         "body.items.0.metadata"),
    ],
)  # fmt: skip
def test_a_body_that_is_wrong_is_refused_by_field(body: bytes, field: str) -> None:
    assert refused(read_items, body) == [field]


def test_problems_of_several_items_are_named_together_up_to_a_bound() -> None:
    items = [{"id": str(number), "text": ""} for number in range(100)]
    body = orjson.dumps({"items": [{"id": "good", "text": "x"}, *items]})
    assert refused(read_items, body) == [f"body.items.{number}.text" for number in range(1, 21)]


def test_an_id_that_comes_twice_is_named_at_both_places() -> None:
    body = orjson.dumps({"items": [{"id": one, "text": "x"} for one in ("a", "b", "a")]})
    with pytest.raises(InvalidRequestError, match=r"'a' is the id of body\.items\.0 too") as raised:
        read_items(body)
    assert raised.value.details["fields"][0]["field"] == "body.items.2.id"  # type: ignore[index]


def test_a_mistyped_key_is_told_with_the_one_that_was_meant() -> None:
    with pytest.raises(InvalidRequestError, match="did you mean 'metadata'"):
        read_items(b'{"items": [{"id": "a", "text": "x", "metdata": {}}]}')


def test_a_long_name_does_not_make_a_long_message() -> None:
    for body in (
        {"items": [{"id": "a", "text": "x", "k" * 100_000: 1}]},
        {"k" * 3000: 1},
        {"items": [{"id": "i" * 100_000, "text": "x"}]},
        {"items": "i" * 100_000},
    ):
        assert len(refused(read_items, orjson.dumps(body))) == 1
    assert len(refused(read_query, orjson.dumps({"text": "x", "filter": {"f" * 100_000: {}}}))) == 1


def test_a_query_has_defaults() -> None:
    assert read_query(b'{"text": "x"}') == Query("x", None, 10)
    full = {"text": "x", "vector": None, "k": 1000, "version": "v", "filter": {"a.b": {"$in": [1, "2"]}}}
    wanted = Query("x", None, 1000, "v", (Condition("a.b", "$in", [1, "2"]),))
    assert read_query(orjson.dumps(full)) == wanted
    empty = {"text": "x", "k": None, "version": None, "filter": None}
    assert read_query(orjson.dumps(empty)) == Query("x", None, 10)
    vector = read_query(b'{"vector": [0, 2]}').vector
    assert vector is not None
    assert vector_values(vector) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"[]", "body"),
        (b"{}", "body"),
        (b'{"text": "x"} 1', "body"),
        (b"[" * 5000, "body"),
        (b'{"text": "x", "vector": [1]}', "body"),
        (b'{"text": ""}', "body.text"),
        (b'{"text": 1}', "body.text"),
        (b'{"vector": {}}', "body.vector"),
        (b'{"vector": [null]}', "body.vector.0"),
        (b'{"vector": [0]}', "body.vector"),
        (b'{"text": "x", "k": 0}', "body.k"),
        (b'{"text": "x", "k": 1001}', "body.k"),
        (b'{"text": "x", "k": true}', "body.k"),
        (b'{"text": "x", "k": 1.0}', "body.k"),
        (b'{"text": "x", "version": 1}', "body.version"),
        (b'{"text": "x", "version": ""}', "body.version"),
        (b'{"text": "x", "filter": []}', "body.filter"),
        (b'{"text": "x", "filter": {"": 1}}', "body.filter"),
        (b'{"text": "x", "filter": {"a": {"$gt": true}}}', "body.filter.a.$gt"),
        (b'{"text": "x", "filter": {"a": {"$no": 1}}}', "body.filter.a"),
        (b'{"text": "x", "filter": {"a": {}}}', "body.filter.a"),
        (b'{"text": "x", "top_k": 3}', "body.top_k"),
    ],
)
def test_a_query_that_is_wrong_is_refused_by_field(body: bytes, field: str) -> None:
    assert refused(read_query, body) == [field]


keys = st.sampled_from(["id", "text", "vector", "metadata", "items", "x"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)
items_of_a_kind = st.fixed_dictionaries({"id": json_values, "text": json_values}) | json_values
near_items = st.fixed_dictionaries({"items": st.lists(items_of_a_kind, max_size=5)})


def told(read: Callable[[bytes], object], body: bytes) -> bool:
    """Whether a body is read, or is refused with a field; anything else is a defect."""
    try:
        read(body)
    except InvalidRequestError as error:
        return bool(error.details["fields"])
    return True


@given(json_values | near_items)
def test_whatever_is_sent_is_read_or_refused(value: Any) -> None:
    body = json.dumps(value).encode()
    assert told(read_items, body)
    assert told(read_query, body)


@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda part: b'{"items": [%b]}' % part))
def test_bytes_that_are_no_json_are_refused(body: bytes) -> None:
    assert told(read_items, body)
    assert told(read_query, body)


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
ids = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20).filter(
    lambda text: text not in (".", "..")
)


@given(
    items=st.lists(
        st.tuples(ids, texts, st.dictionaries(texts, st.integers(-9, 9) | st.text("ab"), max_size=3)),
        min_size=1,
        max_size=8,
        unique_by=lambda item: item[0],
    ),
    escapes=st.booleans(),
    indent=st.sampled_from([None, 1, "\t"]),
)
def test_what_can_be_written_is_read_as_it_is(
    items: list[tuple[str, str, dict[str, Any]]], *, escapes: bool, indent: int | str | None
) -> None:
    body = {"items": [{"id": id_, "text": text, "metadata": metadata} for id_, text, metadata in items]}
    read = read_items(json.dumps(body, ensure_ascii=escapes, indent=indent).encode())
    assert [(one.id, one.text, orjson.loads(one.metadata)) for one in read] == items
