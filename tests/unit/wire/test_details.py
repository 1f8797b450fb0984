"""A model's context length and what it can do, as servers tell it and as none should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.wire.details import Details, details_of, lacks_details, read_show, with_details

RECORDINGS = Path(__file__).parents[2] / "contract" / "recordings"
KNOWN = Details(2048, ("completion", "tools"))
SAID = {"name": "a", "capabilities": ["completion"], "details": {"family": "llama", "context_length": 4096}}


def test_what_ollama_shows_is_read() -> None:
    recording = json.loads((RECORDINGS / "34-show.json").read_text())
    found = read_show(json.dumps(recording["json"]).encode())
    assert found == Details(2048, ("completion",), 64)


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({}, Details(None, None)),
        ({"capabilities": [], "model_info": {}}, Details(None, ())),
        ({"model_info": {"general.architecture": "x", "x.context_length": 0}}, Details(None, None)),
        ({"model_info": {"general.architecture": "x", "y.context_length": 8}}, Details(None, None)),
        ({"model_info": {"general.architecture": 7, "x.context_length": 8}}, Details(None, None)),
        ({"model_info": {"general.architecture": "x", "x.context_length": "8"}}, Details(None, None)),
        ({"model_info": {"general.architecture": "x", "x.embedding_length": 384}}, Details(None, None, 384)),
        ({"capabilities": ["a"] * 99}, Details(None, ("a",) * 64)),
        ({"capabilities": "all"}, None),
        ([], None),
    ],
)
def test_an_odd_answer_tells_as_much_as_it_can(document: Any, found: Details | None) -> None:
    assert read_show(json.dumps(document).encode()) == found


@given(st.binary())
def test_no_answer_is_an_error(body: bytes) -> None:
    read_show(body)


def test_an_entry_is_completed_where_it_says_nothing_itself() -> None:
    entry = {"name": "a", "details": {"family": "llama"}}
    assert lacks_details(entry)
    assert with_details(entry, KNOWN) == {
        "name": "a",
        "details": {"family": "llama", "context_length": 2048},
        "capabilities": ["completion", "tools"],
    }
    assert entry == {"name": "a", "details": {"family": "llama"}}, "it is not changed itself"
    assert with_details({"name": "a", "details": None}, KNOWN)["details"] == {"context_length": 2048}
    assert with_details(entry, Details(None, None)) == entry
    vectors = with_details(entry, Details(None, None, 384))
    assert vectors["details"] == {"family": "llama", "embedding_length": 384}
    assert details_of(vectors) == Details(None, None, 384)


def test_what_an_entry_says_itself_stays() -> None:
    assert not lacks_details(SAID)
    assert with_details(SAID, KNOWN) == SAID
    assert details_of(SAID) == Details(4096, ("completion",))


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"details": None, "capabilities": None},
        {"details": {"context_length": True}, "capabilities": "all"},
        {"details": {"context_length": -1}},
        {"details": {"context_length": "8k"}},
    ],
)
def test_an_entry_that_says_neither_has_no_details(entry: dict[str, Any]) -> None:
    assert details_of(entry) == Details(None, None)
