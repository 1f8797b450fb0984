"""Requests that manage models: what they name, in every way in which a server reads them."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.body import BadBodyError
from manager.wire.management import read_copy, read_named


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


def test_a_field_is_text_or_nothing() -> None:
    read = read_named(b'{"model": "x", "from": "tiny", "system": 5}')
    assert (read.text("from"), read.text("system"), read.text("nothing")) == ("tiny", "", "")


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
