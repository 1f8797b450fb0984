"""The headers by which servers know their clients, and the lists of models of OpenAI's API."""

from __future__ import annotations

from typing import Any

import pytest

from manager.domain.target import Protocol
from manager.wire.credentials import credentials
from manager.wire.openai_models import MOST_MODELS, named_models, read_models


def test_each_protocol_has_its_own_headers() -> None:
    version = (b"anthropic-version", b"2023-06-01")
    assert credentials(Protocol.OPENAI, "k") == ((b"authorization", b"Bearer k"),)
    assert credentials(Protocol.OLLAMA, "k") == ((b"authorization", b"Bearer k"),)
    assert credentials(Protocol.ANTHROPIC, "k") == ((b"x-api-key", b"k"), version)
    assert credentials(Protocol.ANTHROPIC, None) == (version,)
    assert credentials(Protocol.OLLAMA, None) == ()


def test_a_list_of_models_is_read_and_what_is_odd_is_left_out() -> None:
    body = {"data": [{"id": "a", "created": 1_700_000_000}, {"id": "b c"}, {"id": 1}, "x", {"id": ""}]}
    found = read_models(body)
    assert found is not None
    assert [one["name"] for one in found] == ["a"]
    assert found[0]["modified_at"] == "2023-11-14T22:13:20Z"
    assert (found[0]["size"], found[0]["digest"]) == (0, "")


@pytest.mark.parametrize("body", [None, [], {"data": 1}, {"models": []}])
def test_what_is_no_list_is_none(body: Any) -> None:
    assert read_models(body) is None


@pytest.mark.parametrize("created", [None, True, "x", 1e30, float("nan")])
def test_an_odd_time_is_the_beginning(created: Any) -> None:
    found = read_models({"data": [{"id": "a", "created": created}]})
    assert found is not None
    assert found[0]["modified_at"] == "1970-01-01T00:00:00Z"


def test_a_list_is_bounded() -> None:
    found = read_models({"data": [{"id": f"m{number}"} for number in range(MOST_MODELS + 5)]})
    assert found is not None
    assert len(found) == MOST_MODELS
    assert [one["model"] for one in named_models(["x", "y"])] == ["x", "y"]
