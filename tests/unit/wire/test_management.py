"""Requests that manage models: what they name, in every way in which a server reads them."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.body import BadBodyError
from manager.wire.management import read_copy, read_named, reading_named
from manager.wire.steps import run


def raw(**document: Any) -> bytes:
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "body",
    [
        raw(model="tiny"),
        raw(name="tiny"),
        raw(model="tiny", name="other"),
        raw(model="", name="tiny"),
        raw(model=None, name=" tiny "),
        raw(MODEL="tiny"),
    ],
)
def test_a_model_is_named_by_either_field(body: bytes) -> None:
    read = read_named(body)
    assert (read.model, read.instance, read.stream) == ("tiny", None, True)
    assert json.loads(read.raw()) == {"model": "tiny"}


def test_a_pin_is_taken_off_and_everything_else_stays() -> None:
    read = read_named(raw(model="tiny@gpu0", stream=False, insecure=True, options={"a": [1]}))
    assert (read.model, read.instance, read.stream) == ("tiny", "gpu0", False)
    assert json.loads(read.raw(stream=True)) == {
        "model": "tiny",
        "stream": True,
        "insecure": True,
        "options": {"a": [1]},
    }


def test_requests_that_mean_the_same_say_the_same_beside_the_model() -> None:
    one = read_named(raw(model="a", insecure=True, username="u", stream=False))
    other = read_named(raw(username="u", name="b", insecure=True))
    assert one.rest() == other.rest() != read_named(raw(model="a")).rest()
    # What no server reads makes no difference.
    assert read_named(raw(model="a", x="y")).rest() == read_named(raw(model="a")).rest()


def test_a_field_is_text_or_nothing() -> None:
    read = read_named(b'{"model": "x", "from": "tiny", "system": 5}')
    assert (read.text("from"), read.text("system"), read.text("nothing")) == ("tiny", "", "")


@pytest.mark.parametrize(
    ("value", "has"),
    [({"a": "b"}, True), ([1], True), ("abcdefgh", True), (1, True), ({}, False), ([], False), (None, False)],
)
def test_a_field_without_a_value_is_not_there(value: object, *, has: bool) -> None:
    assert read_named(raw(model="tiny", files=value)).has("files") is has
    assert not read_named(raw(model="tiny")).has("files")


def test_names_of_fields_are_folded_as_the_server_folds_them() -> None:
    read = read_named('{"model": "tiny", "\u017fTREAM": false, "MODEL": "other", "From": "base"}'.encode())
    assert (read.model, read.stream, read.text("from")) == ("other", False, "base")
    assert json.loads(read.raw()) == {"model": "other", "stream": False, "from": "base"}


def test_what_follows_the_first_value_is_not_sent_on() -> None:
    assert json.loads(read_named(b'{"model": "tiny"}{"model": "other"}').raw()) == {"model": "tiny"}


def test_a_large_request_is_read_in_steps() -> None:
    body = raw(model="tiny", messages=[{"role": "user", "content": "x"}] * 50_000)
    parts = [body[at : at + 65_536] for at in range(0, len(body), 65_536)]
    expected = read_named(body)
    assert sum(1 for _ in reading_named(list(parts))) > 2 * len(body) // 65_536 - 4
    read = run(reading_named(parts))
    assert (read.model, read.raw(), parts) == ("tiny", expected.raw(), [])
    assert json.loads(read.raw()) == json.loads(body)


@pytest.mark.parametrize("key", ["model", "name", "from"])
def test_a_name_of_any_length_is_refused_without_being_repeated(key: str) -> None:
    for length in (1025, 20_000_000):
        with pytest.raises(BadBodyError) as raised:
            read_named(raw(**{"model": "tiny", key: "x" * length}))
        assert str(raised.value) == f"{key} must be a name of at most 1024 characters"


@pytest.mark.parametrize("key", ["source", "destination"])
def test_so_is_one_of_a_copy(key: str) -> None:
    with pytest.raises(BadBodyError, match=f"^{key} must be a name of at most 1024 characters$"):
        read_copy(raw(**{"source": "tiny", "destination": "mine", key: "x" * 2_000_000}))


@pytest.mark.parametrize(
    "name", ["a b", "a/b/c/d", "a:", ":b", "a@", "a@B", "-a", "a\n", "é", "x" * 81, "a:b:c"]
)
def test_a_name_that_no_model_can_have_is_refused_as_the_server_does(name: str) -> None:
    with pytest.raises(BadBodyError, match=r"^invalid model name$"):
        read_named(raw(model=name + "@gpu0"))
    if name.strip() == name:
        with pytest.raises(BadBodyError) as raised:
            read_copy(raw(source=name, destination="mine"))
        assert str(raised.value) == f"source {json.dumps(name, ensure_ascii=False)} is invalid"
        with pytest.raises(BadBodyError) as raised:
            read_copy(raw(source="tiny", destination=name))
        assert str(raised.value) == f"destination {json.dumps(name, ensure_ascii=False)} is invalid"


@pytest.mark.parametrize(
    ("source", "destination", "instance"),
    [("tiny", "mine", None), ("tiny@a", "mine", "a"), ("tiny", "mine@b", "b"), ("tiny@a", "mine@a", "a")],
)
def test_a_copy_is_pinned_by_either_name(source: str, destination: str, instance: str | None) -> None:
    read = read_copy(raw(source=source, destination=destination))
    assert (read.model, read.instance) == ("tiny", instance)
    assert json.loads(read.raw()) == {"source": "tiny", "destination": "mine"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b" ", "missing request body"),
        (b"[]", "must be a JSON object"),
        (b"nothing", "not JSON"),
        (raw(model=5), "model must be a string"),
        (raw(), "model is required"),
        (raw(model="tiny", stream="no"), "stream must be true or false"),
        (raw(model="tiny", **{"from": 5}), "from must be a string"),
    ],
)
def test_what_names_no_model_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(BadBodyError, match=message):
        read_named(body)


def test_a_copy_without_a_source_or_torn_apart_is_refused() -> None:
    with pytest.raises(BadBodyError, match="source is required"):
        read_copy(raw(destination="mine"))
    with pytest.raises(BadBodyError, match="two instances"):
        read_copy(raw(source="tiny@a", destination="mine@b"))


VALUES = st.recursive(st.none() | st.text(), st.lists).map(lambda value: json.dumps(value).encode())


@given(st.binary() | VALUES)
def test_whatever_comes_is_read_or_refused(body: bytes) -> None:
    for read in (read_named, read_copy):
        with suppress(BadBodyError):
            assert read(body).model
